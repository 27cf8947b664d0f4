"""One block of a DiT: routed by our kernels, routed by plain PyTorch, and not routed at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import sources
from benchmarks.cases import AUTOCAST, Benchmark, Case, Goal, Options
from benchmarks.counts import ITEMSIZES, Work, block_forward, block_training
from benchmarks.suite import _peers
from benchmarks.suite._models import TINY
from benchmarks.suite._peers import (
    AUTOTUNED,
    COMPILED,
    MASKED,
    MAX_AUTOTUNE,
    SEED,
    UNDER_AUTOCAST,
    UNROUTED,
    Axes,
    Cell,
    Forward,
    Gate,
)
from dtr_kernels import nn, reference
from dtr_kernels.ops.dispatch import chosen_path
from dtr_kernels.routing import ChannelWindow

PASSES = ("forward", "training")
FUSED = "RoutedDiTBlock"

_COMMON: Axes = {"scope": ("block",), "window": ("per sample",), "beta": (0.8,), "pass_": PASSES}
_CENTRE: dict[str, Axes] = {
    "quick": {**_COMMON, "model": (TINY,), "batch": (2, 16), "precision": ("fp32",)},
    "cpu": {**_COMMON, "model": ("DiT-S/2",), "batch": (16,), "precision": ("fp32", "bf16")},
    "cuda": {**_COMMON, "model": ("DiT-XL/2",), "batch": (32,), "precision": ("bf16",)},
}
_ROUTINGS: Sequence[Axes] = ({"scope": ("branch",)}, {"window": ("shared",)}, {"beta": (0.2, 0.5, 1.0)})
_STAR: dict[str, Sequence[Axes]] = {
    "quick": (),
    "cpu": (
        {"batch": (1, 4, 64)},
        {"model": ("DiT-B/2", "DiT-L/2", "DiT-XL/2"), "batch": (4,)},
        # In 16-bit dtypes a CPU's GEMMs are dense, whatever the window.
        *({**changed, "precision": ("fp32",)} for changed in _ROUTINGS),
    ),
    "cuda": (
        {"batch": (1, 8, 128, 256)},
        {"model": ("DiT-S/2", "DiT-B/2", "DiT-L/2")},
        *_ROUTINGS,
        {"precision": ("fp32", AUTOCAST)},
    ),
}


def cases(options: Options) -> list[Callable[[], Case]]:
    """A star: from its centre one thing is varied at a time. With options, all combinations of what they give."""
    _peers.check_passes(options, PASSES, "a block")
    size = "quick" if options.quick else options.device.type
    cells = _peers.grid(options, _CENTRE[size], _STAR[size])
    return [partial(build, cell, options.device) for cell in cells]


def build(cell: Cell, device: torch.device) -> Case:
    """A forward pass, or forward and backward to the gradients of x, c and all parameters."""
    torch.compiler.reset()  # each case compiles for itself, and none is the one too many for PyTorch's limit
    piece = Piece.of(cell, device)
    exact = piece.exact(piece.mask)
    active, channels = piece.window.width, piece.window.channels
    routed = partial(piece.side, gate=piece.gate(exact, piece.masked), work=piece.work(active))
    unrouted = partial(piece.side, gate=piece.gate(piece.exact(None), piece.unrouted), work=piece.work(channels))

    sides = [routed(MASKED, piece.masked), routed(MASKED + COMPILED, _peers.compiled(piece.masked))]
    if device.type == "cuda":
        sides.append(routed(MASKED + AUTOTUNED, _peers.compiled(piece.masked, MAX_AUTOTUNE)))
    if device.type == "cuda" and cell.precision == "bf16":
        wide = piece.under_autocast()
        sides.append(wide.side(UNDER_AUTOCAST, wide.masked, wide.gate(exact, wide.masked), wide.work(active)))
    sides += [
        unrouted(UNROUTED, piece.unrouted),
        unrouted(UNROUTED + COMPILED, _peers.compiled(piece.unrouted)),
        routed(FUSED, piece.fused),
        routed(FUSED + COMPILED, _peers.compiled(piece.fused)),
    ]

    notes = [_peers.ABOUT_PEERS]
    if not piece.runs_kernels:
        notes.append(
            f"{FUSED} is plain PyTorch here: the case is too small for the kernels to pay, or they are missing"
        )
    if device.type == "cuda":
        notes.append(_peers.ABOUT_AUTOTUNED)
    return Case(
        f"{cell.model} block, {cell}",
        sides,
        cell.coordinates,
        speedup_over=MASKED,
        goals=_goals(piece),
        matrix_dtype=cell.matrix_dtype,
        memory=piece.trains,
        notes=notes,
    )


@dataclass(frozen=True)
class Piece(_peers.Whole):
    """A block, its inputs, and what is computed of them."""

    cell: Cell
    block: nn.RoutedDiTBlock
    x: Tensor
    c: Tensor
    cotangent: Tensor
    mask: Tensor
    window: ChannelWindow

    @classmethod
    def of(cls, cell: Cell, device: torch.device) -> Piece:
        torch.manual_seed(SEED)
        model = _peers.blueprint(cell.model)
        tokens, channels = model.pos_embed.shape[1:]
        block: Any = copy.deepcopy(model.blocks[0]).to_empty(device="cpu")
        block.scope = cell.scope
        _peers.draw(block)
        trains = cell.pass_ == "training"
        x = _peers.tokens(cell.batch, tokens, channels).to(device, cell.dtype)
        shapes = [(cell.batch, channels), (cell.batch, tokens, channels)]
        c, cotangent = (torch.randn(shape).to(device, cell.dtype) for shape in shapes)
        window = cell.routing.window(_peers.timesteps(cell, device), channels)
        return cls(
            cell,
            block.to(device, cell.dtype),
            x.requires_grad_(trains),
            c.requires_grad_(trains),
            cotangent,
            _peers.mask_of(window, x),
            window,
        )

    def under_autocast(self) -> Piece:
        """The same values, with parameters and stream in fp32."""
        x, c = (tensor.detach().float().requires_grad_(self.trains) for tensor in (self.x, self.c))
        return replace(
            self,
            cell=replace(self.cell, precision=AUTOCAST),
            block=copy.deepcopy(self.block).float(),
            x=x,
            c=c,
            cotangent=self.cotangent.float(),
            mask=self.mask.float(),
        )

    @property
    def module(self) -> nn.RoutedDiTBlock:
        return self.block

    @property
    def runs_kernels(self) -> bool:
        """Whether our block is more than plain PyTorch at this size."""
        return chosen_path(self.x) != "plain"

    def masked(self) -> Tensor:
        return reference.dit_block(self.block, self.x, self.c, self.mask, self.cell.scope)

    def unrouted(self) -> Tensor:
        return reference.dit_block(self.block, self.x, self.c)

    def fused(self) -> Tensor:
        return self.block(self.x, self.c, self.window)

    def exact(self, mask: Tensor | None) -> list[Tensor]:
        """In fp64 what a call returns."""
        function = partial(reference.dit_block, scope=self.cell.scope)
        return _peers.exact(function, self.block, (self.x, self.c, mask), self.cotangent if self.trains else None)

    def gate(self, exact: Sequence[Tensor], eager: Forward) -> Gate:
        """For results in this precision."""
        return Gate(exact, self.call(self.in_precision(eager))(), self.cell.precision)

    def work(self, active: int) -> Work:
        """What the function of as many active channels needs."""
        B, N, C = self.x.shape
        H, items, scope = self.block.mlp.fc1.out_features, ITEMSIZES[self.cell.precision], self.cell.scope
        if self.trains:
            return block_training(B, N, C, active, H, self.block.attn.num_heads, items, scope)
        return block_forward(B, N, C, active, H, items, scope)

    def call(self, forward: Forward) -> Callable[[], list[Tensor]]:
        if not self.trains:
            return _peers.without_graph(forward)
        return _peers.with_gradients(forward, [self.x, self.c, *self.block.parameters()], self.cotangent)


def goals_on_gpu(scope: str) -> list[Goal]:
    """To reach in bf16, forward and training."""
    return [
        Goal("speed-up", FUSED, over=MASKED + COMPILED, at_least=1.2 if scope == "branch" else 1.15),
        Goal("speed-up", FUSED, over=UNROUTED + COMPILED, at_least=1.0),
        Goal("speed-up", FUSED, over=UNDER_AUTOCAST, at_least=1.8),
    ]


def _goals(piece: Piece) -> list[Goal]:
    goals = []
    if piece.trains and piece.runs_kernels:
        goals.append(Goal("bytes saved", FUSED, over=MASKED, at_most=0.57))
    if piece.x.device.type == "cpu":
        goals.append(Goal("speed-up", FUSED, over=MASKED, at_least=1.0))
    elif piece.cell.precision == "bf16":
        goals += goals_on_gpu(piece.cell.scope)
    return goals


BENCHMARK = Benchmark(
    "block",
    "A routed DiT block: RoutedDiTBlock, the masked reference and the unrouted block, eager and compiled.",
    cases,
    sources=sources.BLOCKS,
)
