"""Measurement of one case: first correctness, then time."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import memory
from benchmarks.cases import Case, Side, do_nothing
from benchmarks.results import CaseResult, Ceiling, SideResult
from benchmarks.timing import Copy, MatrixProduct, Stopwatch, Timer

# Redraw often for a person, but leave few lines in a log.
BAR: dict[str, Any] = {"leave": False, "mininterval": 0.2 if sys.stderr.isatty() else 15.0}

# Bytes that the copy moves, and the size of the multiplied matrices; smaller in a quick run.
COPY_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30, "quick": 1 << 28}
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192, "quick": 512}


@dataclass(frozen=True)
class Rounds:
    """How often to time every side of a case: at least ``least`` times, then until ``seconds`` have passed."""

    least: int
    most: int
    seconds: float

    def __iter__(self) -> Iterator[int]:
        start = time.perf_counter()
        for number in range(self.most):
            if number >= self.least and time.perf_counter() - start > self.seconds:
                return
            yield number


class Bench:
    """A device with a stopwatch and its ceilings, which are measured along with every case."""

    def __init__(self, device: torch.device, quick: bool = False) -> None:
        self._device = device
        self._size = "quick" if quick else device.type
        self._copy = Copy(device, COPY_BYTES[self._size])
        self._products: dict[torch.dtype, MatrixProduct] = {}

    def result_of(self, case: Case) -> CaseResult:
        """Return an empty result for ``measure`` to fill."""
        product = self._product(case.matrix_dtype)
        return CaseResult.of(case, self._copy.amount, None if product is None else product.amount)

    def not_built(self, name: str, error: Exception) -> CaseResult:
        """Return the result of a case that could not be built."""
        return CaseResult(name, Ceiling(self._copy.amount), problem=f"could not be built: {one_line(error)}")

    def measure(self, case: Case, result: CaseResult, rounds: Rounds) -> None:
        """Add to ``result`` side by side and round by round, so that complete rounds survive an interrupt."""
        stopwatch = Stopwatch(self._device)
        timers: dict[str, Timer] = {}
        befores = {side.name: side.before for side in case.sides}
        progress = tqdm(case.sides, f"checking {case.name}", **BAR)
        for side in progress:
            progress.set_postfix_str(side.name)
            result.sides[side.name] = checked = SideResult(side.bound, side.work)
            try:
                self._check(side, checked, case.memory)
                if checked.status == "right":
                    # A graph would replay on data that the call has changed, so a side that prepares its inputs is
                    # called.
                    timer = stopwatch.timer((side.call, *side.rotation), graph=side.before is do_nothing)
                    timers[side.name], checked.graph = timer, timer.graph
            except (ImportError, NotImplementedError) as error:
                checked.status, checked.message = "unavailable", one_line(error)
            except Exception as error:
                checked.status, checked.message = "failed", one_line(error)
        if not timers:
            return
        product = self._product(case.matrix_dtype)
        ceilings = [stopwatch.timer([self._copy])] + ([stopwatch.timer([product])] if product else [])

        def one_round(order: list[str]) -> tuple[dict[str, float], list[float]]:
            seconds = {}
            for name in order:
                befores[name]()
                seconds[name] = timers[name]()
            return seconds, [ceiling() for ceiling in ceilings]

        names = list(timers)
        gc.collect()
        if not case.memory:  # cases with memory are the slowest; the check has warmed them up
            one_round(names)  # warm-up
        for number in tqdm(rounds, f"timing {case.name}", total=rounds.most, **BAR):
            # Vary the order: each side begins in turn, and every other round runs backwards.
            first = number % len(names)
            order = names[first:] + names[:first]
            seconds, ceiling_seconds = one_round(order if number % 2 else order[::-1])
            result.add_round(seconds, *ceiling_seconds)

    def _product(self, dtype: torch.dtype | None) -> MatrixProduct | None:
        if dtype is None:
            return None
        if dtype not in self._products:
            self._products[dtype] = MatrixProduct(self._device, dtype, MATRIX_SIZE[self._size])
        return self._products[dtype]

    def _check(self, side: Side, checked: SideResult, measure_peak: bool) -> None:
        """Call a side, compare its result, and measure its memory, in the same call if possible."""
        side.before()
        gc.collect()
        level = memory.in_use(self._device)
        results: list[Any] = []
        highest = memory.peak(lambda: results.append(side.call()), self._device)
        error = side.error(results.pop())
        checked.error = error if math.isfinite(error) else None
        if not error <= side.bound:  # also for NaN
            checked.status, checked.message = "wrong", f"error {error:.1e}, allowed {side.bound:.1e}"
            return
        if side.forward is not None:
            checked.saved_bytes = memory.saved_bytes(side.forward, side.parameters)
        if measure_peak:
            if side.compiles or self._device.type == "cuda":  # GPU libraries allocate in their first call
                side.before()
                highest = memory.peak(side.call, self._device)
            checked.peak_bytes = None if level is None or highest is None else highest - level


def one_line(error: Exception) -> str:
    """Return an exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
