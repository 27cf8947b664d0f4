"""The linear layers around GELU, with GELU in their kernels or in a pass: fc1 of an MLP forward, and fc2 backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import counts, sources
from benchmarks.cases import Benchmark, Case, Options
from benchmarks.counts import ITEMSIZES, Work
from benchmarks.suite import _routing
from benchmarks.suite._peers import Cell, Gate
from benchmarks.suite._routing import Linear, rotated
from dtr_kernels.ops import window_linear as ops

FORWARD, BACKWARD = "linear_gelu_forward", "gelu_linear_backward"
EAGER, EAGER_BACKWARD = "F.linear and F.gelu", "matmul and GELU's derivative"
LIBRARY = "cuBLASLt with GELU"


def cases(options: Options) -> list[Callable[[], Case]]:
    """fc1 and GELU forward, as in inference and as in training; backward through fc2 and GELU."""
    cells = _routing.cells(options, "gelu_linear")
    # In scope "block" the MLP sees all channels; and backward through fc2 there is no window in either scope.
    forwards = [_unrouted(cell) if cell.scope == "block" else cell for cell in cells]
    backwards = [_unrouted(cell) for cell in cells if cell.pass_ == "training"]
    chosen = [(forward, cell) for cell in _routing.unique(forwards)]
    chosen += [(backward, cell) for cell in _routing.unique(backwards)]
    return [partial(build, cell, options.device) for build, cell in chosen]


def _unrouted(cell: Cell) -> Cell:
    return replace(cell, beta=1.0, scope="block")


# --- forward ---------------------------------------------------------------------------------------------------------


def forward(cell: Cell, device: torch.device) -> Case:
    """GELU(fc1(u)), from W of C channels to H = 4C; training keeps what comes before GELU too."""
    (N, C, W), trains = _routing.sizes_of(cell), cell.pass_ == "training"
    H = 4 * C
    work = counts.gelu_linear_forward(cell.batch, N, C, W, H, ITEMSIZES[cell.precision], write_pre=trains)
    sets = _routing.buffers(partial(Linear.random, cell, H, device), work, device)

    def arguments(layer: Linear) -> tuple[Any, ...]:
        return layer.dense, layer.weight, layer.bias, trains

    # On a CPU the same call is of another GELU.
    others = {LIBRARY: library_forward} if device.type == "cuda" and not trains else {}
    pair = _Pair(EAGER, plain_forward, others, arguments, FORWARD, partial(fused_forward, write_pre=trains))
    what = f"forward{' with pre' if trains else ''}, scope {cell.scope}"
    layer = sets[0]
    called = f"{layer.multiplied_by()}, and GELU in a pass of its own"
    if ops.gelu_in_epilogue("gelu_forward", layer.u, layer.weight, C):
        called = "our GEMM with GELU in its epilogue"
    notes = [f"{FORWARD} called {called}", layer.in_the_library("windows_forward")]
    return _case(what, cell, device, sets, pair, work, notes)


def plain_forward(x: Tensor, weight: Tensor, bias: Tensor, write_pre: bool) -> list[Tensor]:
    """Of x on all channels: (pre, GELU(pre)), or the latter alone."""
    pre = F.linear(x, weight, bias)
    act = F.gelu(pre, approximate="tanh")
    return [pre, act] if write_pre else [act]


def library_forward(x: Tensor, weight: Tensor, bias: Tensor, write_pre: bool) -> list[Tensor]:
    """``plain_forward`` without pre by the library's own epilogue, which PyTorch has in a private function alone."""
    assert not write_pre
    return [torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True).unflatten(0, x.shape[:2])]


def fused_forward(layer: Linear, write_pre: bool) -> list[Tensor]:
    """The same by our launcher."""
    _routing.require_kernels(layer.u)
    pre, act = ops.linear_gelu_forward(
        layer.u, layer.mean_rstd, layer.shift, layer.scale, layer.weight, layer.bias, layer.start, write_pre
    )
    return [pre, act] if write_pre else [act]


# --- backward --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Second:
    """The MLP's second layer, whose input is GELU(pre).

    Attributes:
        g: gradient of its output [B, N, C]. pre: [B, N, H]. weight: [C, H].
    """

    g: Tensor
    pre: Tensor
    weight: Tensor

    @classmethod
    def random(cls, cell: Cell, device: torch.device) -> Second:
        """With H = 4C."""
        N, C, _ = _routing.sizes_of(cell)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(cell.dtype)

        return cls(draw(cell.batch, N, C), draw(cell.batch, N, 4 * C), C**-0.5 * draw(C, 4 * C))


def backward(cell: Cell, device: torch.device) -> Case:
    """The gradient of pre, through fc2 and GELU, and GELU(pre) again, which fc2's weight gradient needs."""
    N, C, _ = _routing.sizes_of(cell)
    work = counts.gelu_linear_backward(cell.batch, N, 4 * C, C, ITEMSIZES[cell.precision], write_act=True)
    sets = _routing.buffers(partial(Second.random, cell, device), work, device)

    def arguments(layer: Second) -> tuple[Any, ...]:
        return layer.g, layer.pre, layer.weight

    pair = _Pair(EAGER_BACKWARD, plain_backward, {}, arguments, BACKWARD, fused_backward)
    called = "PyTorch's product, and GELU in a pass of its own"
    if ops.gelu_in_epilogue("gelu_backward", sets[0].g, sets[0].weight, C):
        called = "our GEMM with GELU in its epilogue"
    notes = [
        f"{BACKWARD} called {called}",
        "all sides compute GELU again beside its derivative; the weight gradient, which reads it, is left out",
    ]
    return _case("backward", cell, device, sets, pair, work, notes)


def plain_backward(g: Tensor, pre: Tensor, weight: Tensor) -> list[Tensor]:
    """(gradient of pre, GELU(pre)), the former by what autograd calls."""
    dact = g @ weight
    return [torch.ops.aten.gelu_backward(dact, pre, approximate="tanh"), F.gelu(pre, approximate="tanh")]


def fused_backward(layer: Second) -> list[Tensor]:
    """The same by our launcher."""
    _routing.require_kernels(layer.g)
    return list(ops.gelu_linear_backward(layer.g, layer.pre, layer.weight))


# --- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """The same by plain PyTorch, ``plain(*arguments(inputs))``, by what else takes its arguments, and by our launcher,
    ``fused(inputs)``."""

    eager: str
    plain: Callable[..., list[Tensor]]
    others: Mapping[str, Callable[..., list[Tensor]]]
    arguments: Callable[[Any], tuple[Any, ...]]
    ours: str
    fused: Callable[[Any], list[Tensor]]

    def call_plain(self, inputs: Any, function: Callable[..., list[Tensor]]) -> list[Tensor]:
        """By ``plain`` or a compilation of it."""
        return function(*self.arguments(inputs))


def _case(
    what: str, cell: Cell, device: torch.device, sets: Sequence[Any], pair: _Pair, work: Work, notes: Sequence[str]
) -> Case:
    torch.compiler.reset()
    exact, eager = (pair.call_plain(inputs, pair.plain) for inputs in (_routing.widened(sets[0]), sets[0]))
    side = partial(rotated, sets=sets, gate=Gate(exact, eager, cell.precision), work=work)
    peers = {pair.eager: pair.plain, **_routing.compilations(pair.eager, pair.plain, device), **pair.others}
    return Case(
        _routing.name_of(what, cell),
        [
            *(side(name, partial(pair.call_plain, function=function)) for name, function in peers.items()),
            side(pair.ours, pair.fused),
        ],
        _routing.coordinates(what, cell),
        speedup_over=pair.eager,
        matrix_dtype=cell.matrix_dtype,
        notes=[*notes, _routing.how_called(cell, device)],
    )


BENCHMARK = Benchmark(
    "gelu_linear",
    "A linear layer and GELU, forward and backward: our launchers, F.linear and F.gelu.",
    cases,
    sources=sources.BLOCKS,
)
