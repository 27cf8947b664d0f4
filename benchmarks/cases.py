"""What a benchmark is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.counts import NOT_COUNTED, Work

# What a goal is about; ``CaseResult.value`` measures it.
Quantity = Literal["speed-up", "time", "error", "share of copy", "share of floor", "FLOP rate", "bytes saved", "peak"]


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
        before: brings the inputs back to where they were; called before each ``call``, outside the clock. On a GPU
            calls without it are recorded as a graph, and the graph is timed.
        work: what the function that is computed needs at least.
        rotation: ``call`` on other buffers, for a GPU, so that no call finds its inputs in the L2 cache.
        forward: a forward pass whose result has a graph; the bytes that autograd saves for it are counted.
        parameters: tensors that live anyway and are not counted among them.
    """

    name: str
    call: Callable[[], Any]
    error: Callable[[Any], float]
    bound: float
    before: Callable[[], object] = do_nothing
    work: Work = NOT_COUNTED
    rotation: Sequence[Callable[[], Any]] = ()
    forward: Callable[[], Any] | None = None
    parameters: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Goal:
    """A limit for a figure of one side, or for its ratio to the same figure of the side ``over``."""

    quantity: Quantity
    side: str
    over: str | None = None
    at_least: float = -math.inf
    at_most: float = math.inf

    @property
    def text(self) -> str:
        """What is measured and what is wanted, in words."""
        limits = [f"at least {self.at_least:g}"] if self.at_least > -math.inf else []
        limits += [f"at most {self.at_most:g}"] if self.at_most < math.inf else []
        over = f" over {self.over}" if self.over else ""
        return f"{self.quantity} of {self.side}{over} {' and '.join(limits)}"

    def met(self, value: float | None) -> bool | None:
        """Whether a measured value is within the limits; None where there is none."""
        return None if value is None else self.at_least <= value <= self.at_most


@dataclass(frozen=True)
class Case:
    """One piece of work, done by every side.

    Args:
        name: what and how large.
        sides: the ways to do it.
        cell: where the case stands in the benchmark's table, such as {"model": "DiT-S/2", "batch": 16}.
        speedup_over: name of the side that the others are compared with: how many times as fast they are.
        time_over: the same as a cost: how many times as long they take.
        goals: figures to reach.
        matrix_dtype: whose matrix rate is a ceiling of the case; None where no side has FLOPs to count.
        memory: whether the peak memory of a call of each side is measured.
        notes: what a reader of the figures must know.
    """

    name: str
    sides: Sequence[Side]
    cell: Mapping[str, str | int | float] = field(default_factory=dict)
    speedup_over: str | None = None
    time_over: str | None = None
    goals: Sequence[Goal] = ()
    matrix_dtype: torch.dtype | None = None
    memory: bool = False
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Options:
    """What the command line asks for. What is empty is left to the benchmark."""

    device: torch.device
    quick: bool = False
    precisions: Sequence[str] = ()
    models: Sequence[str] = ()
    batches: Sequence[int] = ()
    scopes: Sequence[str] = ()
    betas: Sequence[float] = ()
    windows: Sequence[str] = ()
    passes: Sequence[str] = ()

    def check_axes(self, benchmark: str, *known: str) -> None:
        """Raises ValueError if the command line gives values for an axis that a benchmark does not have."""
        for name in ("precisions", "models", "batches", "scopes", "betas", "windows", "passes"):
            if getattr(self, name) and name not in known:
                raise ValueError(f"{benchmark} has no {name} to choose; got {', '.join(map(str, getattr(self, name)))}")


@dataclass(frozen=True)
class Benchmark:
    """A name of the command line.

    Args:
        name: also that of the files of results.
        summary: one sentence.
        cases: functions that each build one case. They are called in turn, so that one case's tensors live at a time.
            Raises ValueError if the options do not fit.
        sources: of the kernels, as patterns below the checkout: results are stale when these have changed.
    """

    name: str
    summary: str
    cases: Callable[[Options], Sequence[Callable[[], Case]]]
    sources: Sequence[str]


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTOCAST = "autocast"  # parameters and residual stream in fp32, matrix products in bf16
WINDOWS = ("per sample", "shared")
PASSES = ("forward", "training", "step", "sampling")  # the latter two of whole models


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name on the command line."""
    return next(name for name, known in DTYPES.items() if known == dtype)
