"""The limits by which the ops choose between two ways on a CPU, checked to be where the faster way changes.

Either way is forced by setting the library's own constant around each call. A third side runs the library's choice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import TypeVar

import torch

from benchmarks.cases import DTYPES, Benchmark, Case, Cell, Goal, Options, Side
from benchmarks.counts import ITEMSIZES, norm_backward, norm_forward, window_linear_forward, window_linear_gradients
from benchmarks.suite import block
from benchmarks.suite.models import TINY
from benchmarks.suite.whole import SEED, Gate
from dtr_kernels import ops
from dtr_kernels.ops import dispatch, window_linear
from dtr_kernels.ops.declaration import PRECISIONS, Draw, Sizes, results, widened
from dtr_kernels.ops.window_linear import slice_gain

DISPATCHED = "as dispatched"
# Near a limit both ways take equally long, and noise decides which is faster.
NOT_SLOWER = 0.97
# Models and batches: 49 to 590 thousand elements of x, in samples of 64 and of 256 tokens.
BLOCKS = (
    *(("DiT-S/4", batch) for batch in (2, 4, 8, 16)),
    *(("DiT-S/2", batch) for batch in (1, 2, 4)),
    *(("DiT-XL/4", batch) for batch in (1, 2, 4, 8)),
    *(("DiT-XL/2", batch) for batch in (1, 2)),
)
# Channels, and for each beta tokens per sample. The total number of tokens stays the same, so that only the slices
# grow.
CHANNELS, TOKENS, ALL_TOKENS = (384, 1152), {0.8: (64, 128, 256, 1024), 0.65: (64, 256), 0.5: (16, 64)}, 4096
QUICK_BLOCKS, QUICK_CHANNELS, QUICK_TOKENS, QUICK_ALL_TOKENS = ((TINY, 4),), (384,), {0.8: (64, 1024)}, 1024

_FP32 = ITEMSIZES["fp32"]
_KERNELS = {kernel.name: kernel for kernel in ops.KERNELS}
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Limit:
    """A constant of the library, and the ways that run at or above it (as with a limit of 0) and below it."""

    module: ModuleType
    name: str
    at_least: str
    below: str

    def chosen(self, size: int) -> str:
        """Return the way that the library runs at this size."""
        return self.at_least if size >= getattr(self.module, self.name) else self.below

    def set_to(self, value: int, call: Callable[[], Result]) -> Callable[[], Result]:
        """Return ``call`` under another limit."""

        def forced() -> Result:
            before = getattr(self.module, self.name)
            setattr(self.module, self.name, value)
            try:
                return call()
            finally:
                setattr(self.module, self.name, before)

        return forced


_ELEMENTS = _Limit(dispatch, "LEAST_ELEMENTS_ON_CPU", "fused block", "plain block")
_SLICES = _Limit(window_linear, "_LEAST_GAIN", "slices of the weight", "dense weight")


def cases(options: Options) -> list[Callable[[], Case]]:
    """Return blocks of several numbers of elements, and linear layers of several numbers of tokens per sample."""
    if options.device.type != "cpu":
        raise ValueError(f"cpu_limits measures the CPU's limits: --device must be cpu, got {options.device.type}")
    options.check("cpu_limits", "the CPU's limits", ("precision", "pass_"), precision=DTYPES, pass_=block.PASSES)
    precisions, passes = options.asked.get("precision", ("fp32", "bf16")), options.asked.get("pass_", block.PASSES)
    blocks = [
        partial(elements, Cell(model, batch, precision, "block", "per sample", 0.8, pass_))
        for precision in precisions
        for pass_ in passes
        for model, batch in (QUICK_BLOCKS if options.quick else BLOCKS)
    ]
    total = QUICK_ALL_TOKENS if options.quick else ALL_TOKENS
    layers = [
        partial(slices, "forward" if pass_ == "forward" else "backward", Sizes(total // N, N, C, beta))
        for pass_ in (passes if "fp32" in precisions else ())  # a weight of 16 bits is never cut
        for beta, tokens in (QUICK_TOKENS if options.quick else TOKENS).items()
        for C in (QUICK_CHANNELS if options.quick else CHANNELS)
        for N in tokens
    ]
    return [*blocks, *layers]


def elements(cell: Cell) -> Case:
    """Build a block by the compiled kernels, and by plain PyTorch."""
    piece = block.Piece.of(cell, torch.device("cpu"))
    side = replace(piece.routed(DISPATCHED, piece.fused), forward=None)
    return _case(_ELEMENTS, piece.x.numel(), side, tuple(piece.x.shape), cell.precision, cell.pass_)


def slices(pass_: str, sizes: Sizes) -> Case:
    """Build a norm and its linear layer by GEMMs on each sample's slice of the weight, and by one dense GEMM: the
    forward pass, or only the gradients."""
    B, N, C, beta = sizes
    mode = {"routed": True, "update": False, "rms": False}
    if pass_ == "backward":
        kernel = _KERNELS["routed_linear_backward"]
        work = norm_backward(B, N, C, sizes.W, _FP32, compact=True, dstream=False)
        work += window_linear_gradients(B, N, C, sizes.W, 3 * C, _FP32)
    else:
        kernel, mode = _KERNELS["routed_linear"], {**mode, "bias": True}
        work = norm_forward(B, N, C, sizes.W, _FP32, compact=True)
        work += window_linear_forward(B, N, C, sizes.W, 3 * C, _FP32)
    torch.manual_seed(SEED)
    arguments = kernel.inputs(Draw(sizes, PRECISIONS["fp32"], torch.device("cpu")), **mode)
    exact, plain = (results(kernel.exact(**given)) for given in (widened(arguments), arguments))
    gate = Gate(exact, plain, "fp32")
    side = Side(DISPATCHED, partial(kernel.launch, **arguments), gate.error, gate.bound, work=work)
    gain = slice_gain("windows_backward" if pass_ == "backward" else "windows_forward", N, C, sizes.W)
    return _case(_SLICES, gain, side, (B, N, C), "fp32", pass_, beta)


def _case(
    limit: _Limit, size: int, side: Side, shape: Sequence[int], precision: str, pass_: str, beta: float = 0.8
) -> Case:
    """Compare the limit's choice at this size with both ways that it chooses between."""
    forced = ((limit.at_least, 0), (limit.below, sys.maxsize))
    other = limit.below if limit.chosen(size) == limit.at_least else limit.at_least
    B, N, C = shape
    return Case(
        f"{limit.name}, batch {B}, {N} tokens, {C} channels, beta {beta}, {precision}, {pass_}",
        [*(replace(side, name=way, call=limit.set_to(value, side.call)) for way, value in forced), side],
        {
            "limit": limit.name,
            "size": size,
            "batch": B,
            "tokens": N,
            "channels": C,
            "beta": beta,
            "precision": precision,
            "pass": pass_,
        },
        speedup_over=limit.below,
        goals=[Goal("speed-up", DISPATCHED, over=other, at_least=NOT_SLOWER)],
        matrix_dtype=DTYPES[precision],
        notes=[
            f"{limit.at_least} and {limit.below} are forced by setting {limit.name} around each call; {DISPATCHED} it "
            f"is {getattr(limit.module, limit.name)}"
        ],
    )


BENCHMARK = Benchmark(
    "cpu_limits",
    "The sizes from which a CPU runs kernels instead of plain PyTorch, and GEMMs on windows instead of dense ones.",
    cases,
)
