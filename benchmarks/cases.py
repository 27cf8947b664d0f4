"""What a benchmark is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.results import CaseResult


def do_nothing() -> None:
    """Where a side needs no preparation."""


@dataclass(frozen=True)
class Side:
    """One way to do the work of a case.

    Args:
        name: unique within the case.
        call: what is timed. Its result is freed outside the clock.
        error: how far the result of ``call`` is from the oracle's.
        bound: the largest error that counts as right.
        before: brings the inputs back to where they were; called before each ``call``, outside the clock.
        bytes_moved: bytes that the work must read and write at least, however it is done.
    """

    name: str
    call: Callable[[], Any]
    error: Callable[[Any], float]
    bound: float
    before: Callable[[], object] = do_nothing
    bytes_moved: int | None = None


@dataclass(frozen=True)
class Goal:
    """A figure of merit to report, met or not. ``measured`` gives None where a side that it needs did not run."""

    text: str
    measured: Callable[[CaseResult], float | None]
    at_least: float = -math.inf
    at_most: float = math.inf

    @property
    def wanted(self) -> str:
        """The limits in words."""
        limits = [f"at least {self.at_least:g}"] if self.at_least > -math.inf else []
        return " and ".join(limits + ([f"at most {self.at_most:g}"] if self.at_most < math.inf else []))

    def met(self, value: float | None) -> bool | None:
        """Whether a measured value is within the limits; None where there is none."""
        return None if value is None else self.at_least <= value <= self.at_most


@dataclass(frozen=True)
class Case:
    """One piece of work, done by every side.

    Args:
        name: what and how large.
        speedup_over: name of the side that the others are compared with: how many times as fast they are.
        time_over: the same as a cost: how many times as long they take.
        memory: whether the peak memory of each side's first call is measured.
        notes: what a reader of the figures must know.
    """

    name: str
    sides: Sequence[Side]
    speedup_over: str | None = None
    time_over: str | None = None
    goals: Sequence[Goal] = ()
    memory: bool = False
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Options:
    """What the command line asks for. None leaves the choice to the benchmark."""

    device: torch.device
    dtype: torch.dtype | None = None
    quick: bool = False
    model: str | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """A name of the command line.

    Args:
        cases: functions that each build one case. They are called in turn, so that one case's tensors live at a time.
            Raises ValueError if the options do not fit.
    """

    name: str
    summary: str
    cases: Callable[[Options], Sequence[Callable[[], Case]]]


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name on the command line."""
    return next(name for name, known in DTYPES.items() if known == dtype)
