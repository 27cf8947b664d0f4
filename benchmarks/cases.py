"""The parts of a benchmark: the axes along which its cases differ, cases, their sides and goals."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.arguments import positive
from benchmarks.counts import NOT_COUNTED, Work
from dtr_kernels import reference
from dtr_kernels.routing import DenoisingTaskRouting

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTOCAST = "autocast"  # parameters and residual stream in fp32, matrix products in bf16
# "host" is for scope "inner", where timesteps may be on the CPU for any device.
WINDOWS = ("per sample", "shared", "host")
PASSES = ("forward", "training", "step", "sampling")  # the last two for whole models


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name on the command line."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def _axis(plural: str, help: str, option: str = "", **argument: Any) -> Any:
    """Declare an axis: its name in ``Options`` and in messages, and its option on the command line."""
    return field(metadata={"plural": plural, "option": option, "argument": {"help": help, **argument}})


@dataclass(frozen=True)
class Cell:
    """The place of a case: a value on each axis. Options, validation, grids and tables follow from these fields."""

    model: str = _axis("models", "tiny, DiT-S/2, ... (several for a grid, as below)", metavar="NAME")
    batch: int = _axis("batches", "samples in a batch", type=positive, metavar="B")
    precision: str = _axis(
        "precisions", "of parameters, gradients and activations", "--dtype", choices=(*DTYPES, AUTOCAST)
    )
    scope: str = _axis("scopes", "of the routing", choices=reference.SCOPES)
    window: str = _axis(
        "windows", "one per sample, or one that the batch shares; host: per sample, t on the CPU", choices=WINDOWS
    )
    beta: float = _axis("betas", "active channels over all channels", type=float, metavar="RATIO")
    pass_: str = _axis("passes", "of a block or a model", choices=PASSES)

    @property
    def coordinates(self) -> dict[str, str | int | float]:
        """The values by their names in tables."""
        return {name.rstrip("_"): value for name, value in asdict(self).items()}

    @property
    def routing(self) -> DenoisingTaskRouting:
        """The routing over 1000 timesteps, as in the paper; over heads with alpha 1, as its study recommends."""
        return DenoisingTaskRouting(alpha=1.0 if self.scope == "inner" else 4.0, beta=self.beta)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters and inputs."""
        return DTYPES.get(self.precision, torch.float32)

    @property
    def matrix_dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return torch.bfloat16 if self.precision == AUTOCAST else self.dtype

    def __str__(self) -> str:
        return (
            f"batch {self.batch}, {self.precision}, scope {self.scope}, window {self.window}, beta {self.beta:g}, "
            f"{self.pass_}"
        )


_AXES = {axis.metadata["plural"]: axis for axis in fields(Cell)}
AXES = tuple(axis.name for axis in _AXES.values())


class Options:
    """The choices of the command line.

    Args:
        device: where to measure.
        quick: use small sizes.
        asked: values for axes, by the axes' plurals. The benchmark chooses values for the other axes.

    Attributes:
        asked: the same by the names of ``Cell``'s fields, without the empty ones.
    """

    def __init__(self, device: torch.device, quick: bool = False, **asked: Sequence[Any]) -> None:
        self.device, self.quick = device, quick
        self.asked = {_AXES[plural].name: values for plural, values in asked.items() if values}

    @property
    def size(self) -> str:
        """The grid of a benchmark to use: "quick", "cpu" or "cuda"."""
        return "quick" if self.quick else self.device.type

    def check(self, benchmark: str, what: str, axes: Collection[str] = AXES, **allowed: Collection[str]) -> None:
        """Raise ValueError unless only these axes have values, and all values are allowed.

        Args:
            benchmark, what: the benchmark's name, and the words for its subject.
            axes: the axes of the benchmark.
            allowed: the allowed values of an axis, if they are fewer than on the command line.
        """
        for axis in _AXES.values():
            name, argument = axis.name, axis.metadata["argument"]
            values = self.asked.get(name, ())
            if values and name not in axes:
                given = ", ".join(map(str, values))
                raise ValueError(f"{benchmark} has no {axis.metadata['plural']} to choose; got {given}")
            known = allowed.get(name, argument.get("choices", values))
            for value in values:
                if value not in known:
                    raise ValueError(f"{_option(axis)} must be one of {', '.join(known)} for {what}, got {value}")


def _option(axis: Any) -> str:
    return axis.metadata["option"] or f"--{axis.name.rstrip('_')}"


def add_axes(parser: argparse.ArgumentParser) -> None:
    """Add an option for each axis."""
    for plural, axis in _AXES.items():
        parser.add_argument(_option(axis), dest=plural, nargs="+", default=(), **axis.metadata["argument"])


def asked(arguments: argparse.Namespace) -> dict[str, Sequence[Any]]:
    """Return the command line's values for axes, as ``Options`` takes them."""
    return {plural: getattr(arguments, plural) for plural in _AXES}


# A goal limits one of these; ``CaseResult.value`` measures it.
Quantity = Literal["speed-up", "time", "error", "share of copy", "share of floor", "FLOP rate", "bytes saved", "peak"]


def do_nothing() -> None:
    """Do nothing: the ``before`` of sides that need no preparation."""


@dataclass(frozen=True)
class Side:
    """One way to do the work of a case.

    Args:
        name: unique within the case.
        call: the timed call. Its result is freed after the clock has stopped.
        error: returns the distance of a result of ``call`` from the oracle's.
        bound: the largest error that counts as right.
        before: restores the inputs; called before each ``call``, outside the clock. On a GPU, calls without it are
            recorded as a graph, and the graph is timed.
        work: the least work of the computed function.
        rotation: ``call`` on other buffers, for a GPU, so that no call finds its inputs in the L2 cache.
        forward: a forward pass whose result has a graph; the bytes that autograd saves for it are counted.
        parameters: tensors that exist anyway and are not counted.
        compiles: the first ``call`` compiles something, so the peak memory is measured in the second.
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
    compiles: bool = False


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
        """The quantity and its limits, in words."""
        limits = [f"at least {self.at_least:g}"] if self.at_least > -math.inf else []
        limits += [f"at most {self.at_most:g}"] if self.at_most < math.inf else []
        over = f" over {self.over}" if self.over else ""
        return f"{self.quantity} of {self.side}{over} {' and '.join(limits)}"

    def met(self, value: float | None) -> bool | None:
        """Return whether ``value`` is within the limits; None if nothing was measured."""
        return None if value is None else self.at_least <= value <= self.at_most


@dataclass(frozen=True)
class Case:
    """One piece of work, done by every side.

    Args:
        name: the work and its size.
        sides: the ways to do it.
        cell: the coordinates of the case in the benchmark's table, such as {"model": "DiT-S/2", "batch": 16}.
        speedup_over: name of the side that is the baseline of speed-ups: how many times as fast the others are.
        time_over: name of the baseline of costs: how many times as long the others take.
        goals: figures to reach.
        matrix_dtype: the dtype whose matrix rate is a ceiling of the case; None if no side counts FLOPs.
        memory: measure the peak memory of a call of each side.
        notes: facts that a reader of the figures must know.
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
class Benchmark:
    """A name of the command line.

    Args:
        name: also that of the files of results.
        summary: one sentence.
        cases: returns functions that each build one case. They are called in turn, so that only one case's tensors
            exist at a time. Raises ValueError if the options do not fit. Results are stale when the library code that
            its module imports has changed.
        modules: further modules of the library that results depend on.
    """

    name: str
    summary: str
    cases: Callable[[Options], Sequence[Callable[[], Case]]]
    modules: Sequence[str] = ()
