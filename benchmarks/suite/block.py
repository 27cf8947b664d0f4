"""One block of a DiT: routed by our kernels, routed by plain PyTorch, and unrouted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import AUTOCAST, Benchmark, Case, Cell, Goal, Options
from benchmarks.counts import Work
from benchmarks.suite import whole
from benchmarks.suite.models import LIGHTNING, TINY, blueprint, dit_channels, rotary
from benchmarks.suite.whole import COMPILED, MASKED, SEED, UNDER_AUTOCAST, UNROUTED, Axes, Whole
from dtr_kernels import reference
from dtr_kernels.ops.dispatch import choose

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
        {"model": ("DiT-B/2", "DiT-L/2", "DiT-XL/2", LIGHTNING), "batch": (4,)},
        # In 16-bit dtypes a CPU's GEMMs are dense for every window.
        *({**changed, "precision": ("fp32",)} for changed in _ROUTINGS),
    ),
    "cuda": (
        {"batch": (1, 8, 128, 256)},
        {"model": ("DiT-S/2", "DiT-B/2", "DiT-L/2", LIGHTNING)},
        *_ROUTINGS,
        {"precision": ("fp32", AUTOCAST)},
    ),
}


def cases(options: Options) -> list[Callable[[], Case]]:
    """Return a star of cases that vary one axis at a time around its centre; with options, all their combinations."""
    options.check("block", "a block", pass_=PASSES)
    cells = whole.grid(options, dit_channels, _CENTRE[options.size], _STAR[options.size])
    return [partial(build, cell, options.device) for cell in cells]


def build(cell: Cell, device: torch.device) -> Case:
    """Build a forward pass, or forward and backward to the gradients of x, c and all parameters."""
    torch.compiler.reset()  # each case compiles anew, below PyTorch's limit of recompilations
    piece = Piece.of(cell, device)
    notes = [whole.ABOUT_PEERS]
    if not piece.runs_kernels:
        notes.append(
            f"{FUSED} is plain PyTorch here: the case is too small for the kernels to pay, or they are missing"
        )
    return piece.case(f"{cell.model} block, {cell}", piece.sides(FUSED), notes, _goals(piece))


@dataclass(frozen=True)
class Piece(Whole):
    """A block of x and c; its queries and keys are rotated if the model's are."""

    rope: Callable[[Tensor], Tensor] | None

    @classmethod
    def of(cls, cell: Cell, device: torch.device) -> Piece:
        """Draw random parameters and inputs."""
        torch.manual_seed(SEED)
        model = blueprint(cell.model)
        tokens, channels = model.pos_embed.shape[1:]
        block: Any = copy.deepcopy(model.blocks[0]).to_empty(device="cpu")
        block.scope = cell.scope
        whole.draw(block)
        x = whole.tokens(cell.batch, tokens, channels).to(device, cell.dtype)
        shapes = [(cell.batch, channels), (cell.batch, tokens, channels)]
        c, cotangent = (torch.randn(shape).to(device, cell.dtype) for shape in shapes)
        window = cell.routing.window(whole.timesteps(cell, device), block.routed_channels)
        trains = cell.pass_ == "training"
        batch = (x.requires_grad_(trains), c.requires_grad_(trains))
        rope = rotary(tokens, channels // block.attn.num_heads, device) if model.rope else None
        return cls(cell, block.to(device, cell.dtype), batch, cotangent, window, whole.mask_of(window, x), rope)

    @property
    def runs_kernels(self) -> bool:
        """True if our block runs more than plain PyTorch at this size."""
        return choose(self.x).path != "plain"

    def plain(self, module: Any, *batch: Any) -> Tensor:
        x, c, mask = batch
        return reference.dit_block(module, x, c, mask, self.cell.scope, self.rope)

    def fused(self) -> Tensor:
        return self.module(*self.batch, self.window, self.rope)

    def work(self, active: int) -> Work:
        B, N, _ = self.x.shape
        block = self.sizes(self.module, B, N, active)
        return block.training() if self.trains else block.forward()


def goals_on_gpu(scope: str) -> list[Goal]:
    """Return the goals in bf16, forward and training."""
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
)
