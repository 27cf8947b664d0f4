"""One case: correctness first, then time."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.cases import Case, Side
from benchmarks.memory import with_peak
from benchmarks.results import CaseResult, SideResult
from benchmarks.timing import Copy, Stopwatch

# Bars redraw often for a person and leave few lines in a log.
_BAR: dict[str, Any] = {"leave": False, "mininterval": 0.2 if sys.stderr.isatty() else 15.0}


@dataclass(frozen=True)
class Rounds:
    """How often every side of a case is timed: at least ``least`` times, then while ``seconds`` have not passed."""

    least: int
    most: int
    seconds: float

    def __iter__(self) -> Iterator[int]:
        start = time.perf_counter()
        for number in range(self.most):
            if number >= self.least and time.perf_counter() - start > self.seconds:
                return
            yield number


def measure(case: Case, result: CaseResult, rounds: Rounds, device: torch.device, copy: Copy) -> None:
    """Adds to ``result`` side by side and round by round, so that an interrupt leaves all that was complete."""
    right: list[Side] = []
    progress = tqdm(case.sides, f"checking {case.name}", **_BAR)
    for side in progress:
        progress.set_postfix_str(side.name)
        result.sides[side.name] = checked = _checked(side, device, case.memory)
        if checked.status == "right":
            right.append(side)
    if not right:
        return
    stopwatch = Stopwatch(device)
    gc.collect()
    _round(right, stopwatch, copy)  # warm-up, as the check was
    for number in tqdm(rounds, f"timing {case.name}", total=rounds.most, **_BAR):
        first = number % len(right)  # so that no side always follows the same other
        result.add_round(*_round(right[first:] + right[:first], stopwatch, copy))


def _round(sides: list[Side], stopwatch: Stopwatch, copy: Copy) -> tuple[dict[str, float], float]:
    """The seconds of one call of every side, and of the copy."""
    seconds = {}
    for side in sides:
        side.before()
        seconds[side.name] = stopwatch(side.call)
    return seconds, stopwatch(copy)


def _checked(side: Side, device: torch.device, memory: bool) -> SideResult:
    """Calls a side once; what goes wrong becomes part of the result."""
    checked = SideResult(side.bound, side.bytes_moved)
    try:
        side.before()
        if memory:
            output, checked.peak_bytes = with_peak(side.call, device)
        else:
            output = side.call()
        checked.error = side.error(output)
    except (ImportError, NotImplementedError) as error:
        checked.status, checked.message = "unavailable", _one_line(error)
    except Exception as error:
        checked.status, checked.message = "failed", _one_line(error)
    else:
        if not checked.error <= side.bound:  # which NaN is not
            checked.status, checked.message = "wrong", f"error {checked.error:.1e}, allowed {side.bound:.1e}"
    return checked


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
