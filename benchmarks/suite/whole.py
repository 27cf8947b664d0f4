"""Blocks and models as pieces that several sides compute: grids of cases, the oracle, gates, calls."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.cases import AUTOCAST, AXES, Case, Cell, Goal, Options, Side
from benchmarks.counts import ITEMSIZES, Block, Work
from dtr_kernels.routing import ChannelWindow

# Names of sides that are the same in all benchmarks.
MASKED, UNROUTED, COMPILED, AUTOTUNED = "reference", "unrouted", ", compiled", ", max-autotune"
UNDER_AUTOCAST = f"{MASKED}, autocast"
ABOUT_PEERS = (
    f"{MASKED} multiplies by the mask, as the paper writes it; {UNROUTED} is the ordinary DiT, another function, which "
    "needs all channels and is checked against an oracle of its own"
)

SEED = 0
# The timestep of a batch that shares one. DTR's window has moved about two fifths of its way there.
SHARED_TIMESTEP = 800
# Added to the bound of errors: half a unit in the last place, in fp32 more, since compilers sum tokens in another order
# than eager PyTorch. Wrong results are off by far more.
SLACK = {"fp32": 1e-5, "bf16": 2**-8, "fp16": 2**-11, AUTOCAST: 2**-8}
# Samples that the oracle computes at a time.
_CHUNK = 4

# Timing on a GPU replays a CUDA graph, so the compiler makes none.
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"
ABOUT_AUTOTUNED = f'max-autotune is torch.compile(mode="{MAX_AUTOTUNE}")'

# A forward pass with everything it needs.
Forward = Callable[[], Tensor]
# Values by the name of a field of ``Cell``.
Axes = Mapping[str, Sequence[Any]]


def grid(options: Options, channels: Callable[[str], int], centre: Axes, star: Sequence[Axes] = ()) -> list[Cell]:
    """Return the cells of a benchmark, without duplicates.

    Args:
        options: if it has values for an axis, the cells are all combinations of the given values, with the centre's
            values for the other axes; the star is left out.
        channels: returns the channels of a model, or raises ValueError if there is no such model.
        centre: values for every axis; all their combinations are cells.
        star: values that replace the centre's for some axes, one entry after the other.

    Raises:
        ValueError: if there is no such model, or its blocks cannot have such a window.
    """
    changes = [options.asked] if options.asked else [{}, *star]
    combinations = (itertools.product(*({**centre, **changed}[axis] for axis in AXES)) for changed in changes)
    cells = list(dict.fromkeys(Cell(*values) for values in itertools.chain.from_iterable(combinations)))
    for cell in cells:
        cell.routing.window(SHARED_TIMESTEP, channels(cell.model))
    return cells


def draw(module: nn.Module) -> None:
    """Draw parameters that make every branch as large as the stream, so that an error in a branch, or a missing mask,
    shows in the output. Weights of norms are around 1: with small ones attention would be flat."""
    for name, p in module.named_parameters():
        inputs = p[0].numel() if p.dim() > 1 else len(p)
        if p.requires_grad:
            nn.init.normal_(p, mean=float(re.search(r"norm\w*\.weight$", name) is not None), std=inputs**-0.5)


def tokens(B: int, N: int, C: int, device: torch.device | None = None) -> Tensor:
    """Draw tokens [B, N, C] in fp32, each with its own mean: otherwise a norm's output at deactivated channels would be
    nearly zero, and a result that lacks it would pass in 16-bit dtypes."""
    return torch.randn(B, N, C, device=device) + torch.randn(B, N, 1, device=device)


def timesteps(cell: Cell, device: torch.device) -> Tensor | int:
    """Return random timesteps [B], as in training, or the shared one as a number, as in samplers."""
    if cell.window == "shared":
        return SHARED_TIMESTEP
    drawn = torch.randint(1000, (cell.batch,))
    return drawn if cell.window == "host" else drawn.to(device)


def mask_of(window: ChannelWindow, x: Tensor) -> Tensor:
    """Return the window as plain PyTorch takes it: [B, C] of ones and zeros in x's dtype."""
    on_host = window.start.device.type == "cpu" and window.shared_start is None
    return window.for_batch(x.shape[0], window.start.device if on_host else x.device).mask().to(x.device, x.dtype)


def compiled(forward: Forward, mode: str | None = None) -> Forward:
    """Compile with torch.compile for these shapes only, as one graph: a graph break is an error."""
    return torch.compile(forward, fullgraph=True, dynamic=False, mode=mode)


def in_precision(forward: Forward, precision: str, device: torch.device) -> Forward:
    """Return ``forward`` under autocast if that is the precision, else itself."""
    if precision != AUTOCAST:
        return forward

    def call() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return forward()

    return call


def without_graph(forward: Forward) -> Callable[[], list[Tensor]]:
    """Return a call that returns only the output, as in inference."""

    def call() -> list[Tensor]:
        with torch.no_grad():
            return [forward()]

    return call


def with_gradients(forward: Forward, inputs: Sequence[Tensor], cotangent: Tensor) -> Callable[[], list[Tensor]]:
    """Return a call that returns the output and the gradients of inputs; the cotangent is the output's gradient."""

    def call() -> list[Tensor]:
        out = forward()
        return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]

    return call


def trainable(module: nn.Module) -> list[Tensor]:
    """Return the parameters that training changes."""
    return [p for p in module.parameters() if p.requires_grad]


def exact(
    function: Callable[..., Tensor],
    module: nn.Module,
    batch: Sequence[Tensor | None],
    cotangent: Tensor | None = None,
) -> list[Tensor]:
    """Compute ``function(module, *batch)`` in fp64, and with a cotangent its gradients: of the tensors in the batch
    that require one, then of the trainable parameters.

    Samples, which must not depend on each other, are computed a few at a time, so that the memory does not grow with
    the batch.
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
    """The exact result, and the largest error allowed in some precision.

    Args:
        exact: outputs and gradients in fp64.
        eager: the same by plain PyTorch in the precision.
        precision: as on the command line.
    """

    def __init__(self, exact: Sequence[Tensor], eager: Sequence[Tensor], precision: str) -> None:
        self._exact = exact
        self.bound = 2 * self.error(eager) + SLACK[precision]

    def error(self, found: Sequence[Tensor]) -> float:
        """Return the largest error of a tensor relative to its norm; NaN for NaN."""
        tiny = torch.finfo(torch.float64).tiny  # if all is zero, anything else is wrong
        errors = [
            (f.double() - e).norm() / e.double().norm().clamp(tiny) for f, e in zip(found, self._exact, strict=True)
        ]
        return torch.stack(errors).max().item()


Piece = TypeVar("Piece", bound="Whole")


@dataclass(frozen=True)
class Whole:
    """A module with a batch, which several sides compute; subclasses define the sides.

    Attributes:
        batch: inputs of ``plain`` after the module and before the mask.
        cotangent: the gradient of the output.
        mask: the window as plain PyTorch takes it.
    """

    cell: Cell
    module: Any
    batch: tuple[Tensor, ...]
    cotangent: Tensor
    window: ChannelWindow
    mask: Tensor

    def plain(self, module: Any, *batch: Any) -> Tensor:
        """Compute the reference of ``batch`` and its mask [B, C], or None for the unrouted function."""
        raise NotImplementedError

    def fused(self) -> Tensor:
        """Compute the library's result."""
        raise NotImplementedError

    def work(self, active: int) -> Work:
        """Count the least work of the function with ``active`` channels or heads."""
        raise NotImplementedError

    def sizes(self, block: Any, B: int, N: int, active: int) -> Block:
        """Return the sizes of a ``RoutedDiTBlock`` with ``active`` channels or heads."""
        C, H, heads = block.attn.qkv.in_features, block.mlp.fc2.in_features, block.attn.num_heads
        W, items = active * C // self.window.channels, ITEMSIZES[self.cell.precision]
        return Block(B, N, C, W, H, heads, items, self.cell.scope, block.kind)

    @property
    def x(self) -> Tensor:
        """The input of the module."""
        return self.batch[0]

    @property
    def trains(self) -> bool:
        """True if there is a backward pass."""
        return self.cell.pass_ in ("training", "step")

    def masked(self) -> Tensor:
        return self.plain(self.module, *self.batch, self.mask)

    def unrouted(self) -> Tensor:
        return self.plain(self.module, *self.batch, None)

    def exact(self, mask: Tensor | None) -> list[Tensor]:
        """Compute the exact result of a call in fp64."""
        return exact(self.plain, self.module, (*self.batch, mask), self.cotangent if self.trains else None)

    def call(self, forward: Forward) -> Callable[[], list[Tensor]]:
        """Return a call that runs the cell's pass: the output alone, or with gradients."""
        if not self.trains:
            return without_graph(forward)
        leaves = [tensor for tensor in self.batch if tensor.requires_grad]
        return with_gradients(forward, [*leaves, *trainable(self.module)], self.cotangent)

    def in_precision(self, forward: Forward) -> Forward:
        """Return ``forward`` in the cell's precision."""
        return in_precision(forward, self.cell.precision, self.x.device)

    def gate(self, exact: Sequence[Tensor], eager: Forward) -> Gate:
        """Return the gate for results in this precision; ``eager`` computes such a result."""
        return Gate(exact, self.call(self.in_precision(eager))(), self.cell.precision)

    def side(self, name: str, forward: Forward, gate: Gate, work: Work) -> Side:
        """Return a side; the bytes that it keeps for the backward pass are counted, if there is one."""
        forward = self.in_precision(forward)
        return Side(
            name,
            self.call(forward),
            gate.error,
            gate.bound,
            work=work,
            forward=forward if self.trains else None,
            parameters=list(self.module.parameters()),
            compiles=name.endswith((COMPILED, AUTOTUNED)),
        )

    @cached_property
    def _exact(self) -> list[Tensor]:
        return self.exact(self.mask)

    @cached_property
    def _gate(self) -> Gate:
        return self.gate(self._exact, self.masked)

    def routed(self, name: str, forward: Forward) -> Side:
        """Return a side of the routed function."""
        return self.side(name, forward, self._gate, self.work(self.window.width))

    @cached_property
    def _unrouted_gate(self) -> Gate:
        return self.gate(self.exact(None), self.unrouted)

    def dense(self, name: str, forward: Forward) -> Side:
        """Return a side of the unrouted function."""
        return self.side(name, forward, self._unrouted_gate, self.work(self.window.channels))

    def under_autocast(self: Piece) -> Piece:
        """Return a copy with parameters and stream in fp32."""

        def widened(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            return tensor.detach().float().requires_grad_(tensor.requires_grad)

        return replace(
            self,
            cell=replace(self.cell, precision=AUTOCAST),
            module=copy.deepcopy(self.module).float(),
            batch=tuple(map(widened, self.batch)),
            cotangent=self.cotangent.float(),
            mask=self.mask.float(),
        )

    def sides(self, ours: str) -> list[Side]:
        """Return the reference, the unrouted function and ours, eager and compiled; on a GPU also faster variants."""
        on_gpu = self.x.device.type == "cuda"
        sides = [self.routed(MASKED, self.masked), self.routed(MASKED + COMPILED, compiled(self.masked))]
        if on_gpu:
            sides.append(self.routed(MASKED + AUTOTUNED, compiled(self.masked, MAX_AUTOTUNE)))
        if on_gpu and self.cell.precision == "bf16":
            wide = self.under_autocast()
            gate = wide.gate(self._exact, wide.masked)
            sides.append(wide.side(UNDER_AUTOCAST, wide.masked, gate, wide.work(self.window.width)))
        return [
            *sides,
            self.dense(UNROUTED, self.unrouted),
            self.dense(UNROUTED + COMPILED, compiled(self.unrouted)),
            self.routed(ours, self.fused),
            self.routed(ours + COMPILED, compiled(self.fused)),
        ]

    def case(self, name: str, sides: Sequence[Side], notes: Sequence[str], goals: Sequence[Goal] = ()) -> Case:
        """Return the case with these sides."""
        autotuned = [ABOUT_AUTOTUNED] if any(side.name.endswith(AUTOTUNED) for side in sides) else []
        return Case(
            name,
            sides,
            self.cell.coordinates,
            speedup_over=MASKED,
            goals=goals,
            matrix_dtype=self.cell.matrix_dtype,
            memory=self.trains,
            notes=[*notes, *autotuned],
        )
