"""One residual block of ADM's U-Net: routed by our code, routed by plain PyTorch, and unrouted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import AUTOCAST, AXES, WINDOWS, Benchmark, Case, Cell, Goal, Options
from benchmarks.counts import ITEMSIZES, Itemsizes, Work, linear_forward, linear_gradients
from benchmarks.suite import whole
from benchmarks.suite.whole import COMPILED, MASKED, SEED, UNROUTED, Axes, Whole
from dtr_kernels import nn, reference

PASSES = ("forward", "training")
SKIPPING = "RoutedResBlock"
ABOUT_DENSE = (
    f"with a window per sample, and wherever it is compiled, {SKIPPING} has dense convolutions: it is {MASKED} then"
)
TAPS = 9  # of a 3x3 kernel


@dataclass(frozen=True)
class Place:
    """A block's place in ADM: its input and output channels, its input's height and width, its resampling, and the
    width of the conditioning."""

    channels: int
    out_channels: int
    size: int
    up: bool = False
    down: bool = False
    emb_channels: int = 1024

    @property
    def out_size(self) -> int:
        """The height and width of the output."""
        return 2 * self.size if self.up else self.size // 2 if self.down else self.size


#: Places by their "model" on the command line. 256 channels and their multiples are those of ADM for ImageNet.
PLACES = {
    "ADM-256x32": Place(256, 256, 32),
    "ADM-512x16": Place(512, 512, 16),
    "ADM-1024x8": Place(1024, 1024, 8),
    "ADM-256x32, down": Place(256, 256, 32, down=True),
    "ADM-512x16, up": Place(512, 512, 16, up=True),
    "ADM-1024x16 to 512": Place(1024, 512, 16),  # in the decoder, after concatenation with the encoder's output
    "tiny": Place(64, 96, 8, emb_channels=32),
}

_COMMON: Axes = {"scope": ("block",), "window": WINDOWS[:2], "beta": (0.8,), "pass_": PASSES}
_CENTRE: dict[str, Axes] = {
    "quick": {**_COMMON, "model": ("tiny",), "batch": (2,), "precision": ("fp32",)},
    "cpu": {**_COMMON, "model": ("ADM-256x32",), "batch": (4,), "precision": ("fp32",)},
    "cuda": {**_COMMON, "model": ("ADM-256x32",), "batch": (32,), "precision": ("bf16",)},
}
_SHARED: Axes = {"window": ("shared",)}
_OTHERS: Sequence[Axes] = (
    {**_SHARED, "model": ("ADM-512x16", "ADM-1024x8")},
    {**_SHARED, "model": ("ADM-256x32, down", "ADM-512x16, up", "ADM-1024x16 to 512"), "pass_": ("training",)},
    {**_SHARED, "beta": (0.5,)},
)
_STAR: dict[str, Sequence[Axes]] = {
    "quick": (),
    "cpu": (*_OTHERS, {**_SHARED, "precision": ("bf16",)}),
    "cuda": (*_OTHERS, {**_SHARED, "precision": ("fp32", AUTOCAST)}),
}


def cases(options: Options) -> list[Callable[[], Case]]:
    """Return a star of cases that vary one axis at a time around its centre; with options, all their combinations.

    Raises:
        ValueError: if an option does not fit a residual block.
    """
    options.check("res_block", "a block", [axis for axis in AXES if axis != "scope"], pass_=PASSES)
    cells = whole.grid(options, _channels, _CENTRE[options.size], _STAR[options.size])
    return [partial(build, cell, options.device) for cell in cells]


def _channels(model: str) -> int:
    if model not in PLACES:
        raise ValueError(f"--model must be one of {'; '.join(PLACES)} for res_block, got {model}")
    return PLACES[model].channels


def build(cell: Cell, device: torch.device) -> Case:
    """Build a forward pass, or forward and backward to the gradients of x, emb and all parameters."""
    torch.compiler.reset()  # each case compiles anew, below PyTorch's limit of recompilations
    piece = Piece.of(cell, device)
    sides = [
        piece.routed(MASKED, piece.masked),
        piece.routed(MASKED + COMPILED, whole.compiled(piece.masked)),
        piece.dense(UNROUTED, piece.unrouted),
        piece.routed(SKIPPING, piece.fused),
    ]
    shared = piece.window.shared_start is not None
    goals = [Goal("speed-up", SKIPPING, over=MASKED, at_least=1.0)] if shared and device.type == "cpu" else []
    case = piece.case(
        f"{cell.model}, batch {cell.batch}, {cell.precision}, window {cell.window}, beta {cell.beta:g}, {cell.pass_}",
        sides,
        [whole.ABOUT_PEERS.replace("DiT", "block"), ABOUT_DENSE],
        goals,
    )
    return replace(case, cell={name: value for name, value in case.cell.items() if name != "scope"})


class Piece(Whole):
    """A block of x and emb."""

    @classmethod
    def of(cls, cell: Cell, device: torch.device) -> Piece:
        """Draw random parameters and inputs."""
        torch.manual_seed(SEED)
        place = PLACES[cell.model]
        B, C, O, H = cell.batch, place.channels, place.out_channels, place.out_size
        block = nn.RoutedResBlock(C, place.emb_channels, out_channels=O, up=place.up, down=place.down)
        _draw(block)
        # Every channel has its own mean, as in trained models.
        x = torch.randn(B, C, place.size, place.size) + torch.randn(B, C, 1, 1)
        emb, cotangent = torch.randn(B, place.emb_channels), torch.randn(B, O, H, H)
        x, emb, cotangent = (tensor.to(device, cell.dtype) for tensor in (x, emb, cotangent))
        window = cell.routing.window(whole.timesteps(cell, device), C)
        trains = cell.pass_ == "training"
        batch = (x.requires_grad_(trains), emb.requires_grad_(trains))
        return cls(cell, block.to(device, cell.dtype), batch, cotangent, window, whole.mask_of(window, x))

    def plain(self, module: Any, *batch: Any) -> Tensor:
        return reference.res_block(module, *batch)

    def fused(self) -> Tensor:
        return self.module(*self.batch, self.window)

    def work(self, active: int) -> Work:
        count = training_work if self.trains else forward_work
        return count(PLACES[self.cell.model], self.cell.batch, active, ITEMSIZES[self.cell.precision])


@torch.no_grad()
def _draw(block: nn.RoutedResBlock) -> None:
    """Draw parameters that make the branch as large as the skip, and deactivated channels as large as active ones."""
    whole.draw(block)
    for norm in (block.in_layers[0], block.out_layers[0]):
        for parameter in norm.parameters():
            parameter.normal_()


# --- counts ----------------------------------------------------------------------------------------------------------


def forward_work(place: Place, B: int, W: int, items: Itemsizes) -> Work:
    """Count the forward pass of a block with W active channels; W = C is the unrouted block."""
    C, O = place.channels, place.out_channels
    P, Q = B * place.size**2, B * place.out_size**2
    return (
        Work(bytes=P * W * items.stream + Q * W * items.operand)  # norm, SiLU, resampling
        + _convolutions(place, B, W, items)
        + linear_forward(B, place.emb_channels, 2 * O, items)
        + Work(bytes=2 * Q * O * items.operand)  # norm, conditioning, SiLU
        + Work(
            bytes=Q * O * (items.operand + items.stream) + (P * C * items.stream if C == O else Q * O * items.operand)
        )
    )


def training_work(place: Place, B: int, W: int, items: Itemsizes) -> Work:
    """Count the forward pass, and gradients of x, emb and the parameters: for each convolution two more that read and
    write as much, of its input and of its weight."""
    C, O = place.channels, place.out_channels
    P, Q = B * place.size**2, B * place.out_size**2
    return (
        forward_work(place, B, W, items)
        + 2 * _convolutions(place, B, W, items)
        + linear_gradients(B, place.emb_channels, 2 * O, items)
        + Work(bytes=3 * Q * O * items.operand)  # the second norm
        + Work(bytes=(P * W + 2 * P * C) * items.stream + Q * W * items.operand)  # the first, added to that of the skip
    )


def _convolutions(place: Place, B: int, W: int, items: Itemsizes) -> Work:
    """Count the branch's two convolutions and the skip's. In the first, a deactivated channel of a sample is one
    number, which each of the kernel's taps multiplies once."""
    C, O, Q = place.channels, place.out_channels, B * place.out_size**2
    constants = Work(2 * TAPS * B * (C - W) * O, TAPS * (C - W) * O * items.stream)
    skip = Work() if C == O else _convolution(Q, C, O, 1, items)
    return _convolution(Q, W, O, TAPS, items) + constants + _convolution(Q, O, O, TAPS, items) + skip


def _convolution(pixels: int, K: int, O: int, taps: int, items: Itemsizes) -> Work:
    return Work(2 * taps * pixels * K * O, pixels * (K + O) * items.operand + taps * K * O * items.stream)


BENCHMARK = Benchmark(
    "res_block",
    "A routed residual block of ADM: RoutedResBlock, the masked reference and the unrouted block.",
    cases,
)
