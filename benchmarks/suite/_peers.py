"""What the benchmarks of whole pieces share: grids of cases, the oracle, and how a forward pass becomes a call."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import AUTOCAST, DTYPES, Options, Side
from benchmarks.counts import Work
from benchmarks.suite._models import check_model, make_dit
from dtr_kernels.nn import DiT
from dtr_kernels.routing import ChannelWindow, DenoisingTaskRouting

# The sides that are the same everywhere.
MASKED, UNROUTED, COMPILED, AUTOTUNED = "reference", "unrouted", ", compiled", ", max-autotune"
UNDER_AUTOCAST = f"{MASKED}, autocast"
ABOUT_PEERS = (
    f"{MASKED} multiplies by the mask, as the paper writes it; {UNROUTED} is the ordinary DiT, another function, which "
    "needs all channels and is checked against an oracle of its own"
)

SEED = 0
# The timestep of a batch that shares one. DTR's window has moved about two fifths of its way there.
SHARED_TIMESTEP = 800
# Added to the bound of errors: half a unit in the last place. In fp32 more, since there the order of sums over tokens
# shows, in which compilers differ from eager PyTorch; what is wrong is wrong by far more.
SLACK = {"fp32": 1e-5, "bf16": 2**-8, "fp16": 2**-11, AUTOCAST: 2**-8}
# Samples that the oracle computes at a time.
_CHUNK = 4

# What is timed on a GPU is replayed as a CUDA graph, so the compiler makes none.
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"
ABOUT_AUTOTUNED = f'max-autotune is torch.compile(mode="{MAX_AUTOTUNE}")'

# A forward pass with everything it needs.
Forward = Callable[[], Tensor]
# Values by the name of a field of ``Cell``.
Axes = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Cell:
    """Where a case stands: a value on each axis that the command line knows."""

    model: str
    batch: int
    precision: str
    scope: str
    window: str
    beta: float
    pass_: str

    @property
    def coordinates(self) -> dict[str, str | int | float]:
        """The values by the names that a table has."""
        return {name.rstrip("_"): value for name, value in asdict(self).items()}

    @property
    def routing(self) -> DenoisingTaskRouting:
        """Of 1000 timesteps, as the paper's."""
        return DenoisingTaskRouting(beta=self.beta)

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and inputs."""
        return DTYPES.get(self.precision, torch.float32)

    @property
    def matrix_dtype(self) -> torch.dtype:
        """Of matrix products."""
        return torch.bfloat16 if self.precision == AUTOCAST else self.dtype

    def __str__(self) -> str:
        return (
            f"batch {self.batch}, {self.precision}, scope {self.scope}, window {self.window}, beta {self.beta:g}, "
            f"{self.pass_}"
        )


def grid(options: Options, centre: Axes, star: Sequence[Axes]) -> list[Cell]:
    """The cells of a benchmark, each once.

    Args:
        options: with values for an axis, the cells are all combinations of the values given, and of the centre's for
            the other axes; the star is left out.
        centre: values for every axis, all of whose combinations are cells.
        star: values that replace those of the centre for some axes, one entry after the other.

    Raises:
        ValueError: if there is no such model, or its blocks cannot have such a window.
    """
    asked = {
        "model": options.models,
        "batch": options.batches,
        "precision": options.precisions,
        "scope": options.scopes,
        "window": options.windows,
        "beta": options.betas,
        "pass_": options.passes,
    }
    given = {axis: values for axis, values in asked.items() if values}
    changes: Sequence[Axes] = [given] if given else [{}, *star]
    axes = list(Cell.__dataclass_fields__)
    chosen = (
        Cell(*values)
        for changed in changes
        for values in itertools.product(*({**centre, **changed}[axis] for axis in axes))
    )
    cells = list(dict.fromkeys(chosen))
    for cell in cells:
        check_model(cell.model)
        cell.routing.window(SHARED_TIMESTEP, blueprint(cell.model).hidden_size)
    return cells


@lru_cache
def blueprint(model: str) -> DiT:
    """A DiT without memory for its parameters."""
    with torch.device("meta"):
        return make_dit(model, torch.device("meta"), torch.float32)


def draw(module: nn.Module) -> None:
    """Random parameters that make every branch as large as the stream: an error in one of them, or a mask that is not
    there, shows in the output."""
    for p in trainable(module):
        inputs = p[0].numel() if p.dim() > 1 else len(p)
        nn.init.normal_(p, std=inputs**-0.5)


def tokens(B: int, N: int, C: int, device: torch.device | None = None) -> Tensor:
    """Random tokens [B, N, C] in fp32, each with a mean of its own: without one, what a norm makes of deactivated
    channels would be all but zero, and a result that lacks it would pass in 16-bit dtypes."""
    return torch.randn(B, N, C, device=device) + torch.randn(B, N, 1, device=device)


def timesteps(cell: Cell, device: torch.device) -> Tensor | int:
    """Random ones [B], as training draws them, or the one that a batch shares, as the number that samplers have."""
    return SHARED_TIMESTEP if cell.window == "shared" else torch.randint(1000, (cell.batch,)).to(device)


def mask_of(window: ChannelWindow, x: Tensor) -> Tensor:
    """The window as plain PyTorch takes it: [B, C] of ones and zeros in x's dtype."""
    return window.for_batch(x.shape[0], x.device).mask().to(x.dtype)


def check_passes(options: Options, known: Sequence[str], what: str) -> None:
    """Raises ValueError unless the passes asked for are known ones."""
    for asked in options.passes:
        if asked not in known:
            raise ValueError(f"--pass must be one of {', '.join(known)} for {what}, got {asked}")


def compiled(forward: Forward, mode: str | None = None) -> Forward:
    """torch.compile for these shapes alone, and of the whole graph: a break in it is an error."""
    return torch.compile(forward, fullgraph=True, dynamic=False, mode=mode)


def in_precision(forward: Forward, precision: str, device: torch.device) -> Forward:
    """``forward`` under autocast if that is the precision, else itself."""
    if precision != AUTOCAST:
        return forward

    def call() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return forward()

    return call


def without_graph(forward: Forward) -> Callable[[], list[Tensor]]:
    """A call that returns the output alone, as inference does it."""

    def call() -> list[Tensor]:
        with torch.no_grad():
            return [forward()]

    return call


def with_gradients(forward: Forward, inputs: Sequence[Tensor], cotangent: Tensor) -> Callable[[], list[Tensor]]:
    """A call that returns the output and the gradients of inputs; the cotangent is the gradient of the output."""

    def call() -> list[Tensor]:
        out = forward()
        return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]

    return call


def trainable(module: nn.Module) -> list[Tensor]:
    """The parameters that training changes."""
    return [p for p in module.parameters() if p.requires_grad]


def exact(
    function: Callable[..., Tensor],
    module: nn.Module,
    batch: Sequence[Tensor | None],
    cotangent: Tensor | None = None,
) -> list[Tensor]:
    """``function(module, *batch)`` in fp64, and with a cotangent the gradients of it: of what in the batch requires
    one, then of the trainable parameters.

    Samples, which must not depend on each other, are computed a few at a time: the memory that it takes does not grow
    with the batch.
    """
    module = copy.deepcopy(module).double()
    parameters = trainable(module)
    by_sample: list[list[Tensor]] = []
    sums = [torch.zeros_like(p) for p in parameters] if cotangent is not None else []
    size = next(len(tensor) for tensor in batch if tensor is not None)
    for first in range(0, size, _CHUNK):
        chunk = slice(first, first + _CHUNK)
        samples = [None if tensor is None else _widened(tensor, chunk) for tensor in batch]
        if cotangent is None:
            with torch.no_grad():
                by_sample.append([function(module, *samples)])
            continue
        inputs = [sample for sample in samples if sample is not None and sample.requires_grad]
        out = function(module, *samples)
        gradients = torch.autograd.grad(out, [*inputs, *parameters], cotangent[chunk].double())
        by_sample.append([out.detach(), *gradients[: len(inputs)]])
        for total, gradient in zip(sums, gradients[len(inputs) :], strict=True):
            total += gradient
    return [*(torch.cat(parts) for parts in zip(*by_sample, strict=True)), *sums]


def _widened(tensor: Tensor, chunk: slice) -> Tensor:
    part = tensor.detach()[chunk]
    return part.double().requires_grad_(tensor.requires_grad) if part.is_floating_point() else part


class Gate:
    """What is right, and how wrong a result in some precision may be.

    Args:
        exact: outputs and gradients in fp64.
        eager: the same by plain PyTorch in the precision.
        precision: as on the command line.
    """

    def __init__(self, exact: Sequence[Tensor], eager: Sequence[Tensor], precision: str) -> None:
        self._exact = exact
        self.bound = 2 * self.error(eager) + SLACK[precision]

    def error(self, found: Sequence[Tensor]) -> float:
        """The largest error of a tensor relative to its norm; NaN if one holds NaN."""
        errors = [(f.double() - e).norm() / e.norm() for f, e in zip(found, self._exact, strict=True)]
        return torch.stack(errors).max().item()


class Whole:
    """What a block and a model have in common as pieces that sides compute; subclasses say the rest."""

    cell: Cell
    x: Tensor

    @property
    def module(self) -> nn.Module:
        """Whose parameters are used."""
        raise NotImplementedError

    def call(self, forward: Forward) -> Callable[[], list[Tensor]]:
        """A forward pass as the cell's pass: alone, with gradients, ..."""
        raise NotImplementedError

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return self.cell.pass_ in ("training", "step")

    def in_precision(self, forward: Forward) -> Forward:
        """``forward`` in the cell's precision."""
        return in_precision(forward, self.cell.precision, self.x.device)

    def side(self, name: str, forward: Forward, gate: Gate, work: Work) -> Side:
        """A side whose bytes kept for the backward pass are counted, if there is one."""
        forward = self.in_precision(forward)
        return Side(
            name,
            self.call(forward),
            gate.error,
            gate.bound,
            work=work,
            forward=forward if self.trains else None,
            parameters=list(self.module.parameters()),
        )
