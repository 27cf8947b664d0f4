"""The linear layer over each sample's window, and its gradients: ``dtr_kernels.ops.window_linear``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import counts, sources
from benchmarks.cases import WINDOWS, Benchmark, Case, Goal, Options
from benchmarks.counts import ITEMSIZES, Itemsizes, Work
from benchmarks.suite import _peers, _routing
from benchmarks.suite._peers import Cell, Gate
from benchmarks.suite._routing import Linear, rotated
from dtr_kernels.ops import dispatch
from dtr_kernels.ops import window_linear as ops

FUSED, DENSE, SLICE = "window_linear", "F.linear, all channels", "F.linear, one slice"
GOALS_ON_GPU = [Goal("FLOP rate", FUSED, over=SLICE, at_least=0.95)]


@dataclass(frozen=True)
class Task:
    """What is computed.

    Args:
        fused, plain: by our launcher, and by autograd on all channels: the same tensors.
        product: by PyTorch's matrix products, from (input, weight, bias, gradient of the output).
        work: of the first two, from (B, N, C, W, O, itemsizes).
        product_work: of the last one on its own, from (rows, channels, O, itemsizes).
        called: what our launcher calls, in words.
        pass_: the pass of the layer for which the library decides whether to contract over windows.
    """

    name: str
    fused: Callable[[Linear], list[Tensor]]
    plain: Callable[[Linear], list[Tensor]]
    product: Callable[..., Any]
    work: Callable[[int, int, int, int, int, Itemsizes], Work]
    product_work: Callable[[int, int, int, Itemsizes], Work]
    called: Callable[[Linear], str]
    pass_: Literal["windows_forward", "windows_backward"]


def cases(options: Options) -> list[Callable[[], Case]]:
    """The QKV layer forward, its input gradient, its weight gradient, and all of its gradients."""
    cells = _routing.cells(options, "window_linear", windows=WINDOWS)
    # The layer is the same in both scopes.
    chosen = _routing.unique(replace(cell, scope="block") for cell in cells)
    return [partial(build, cell, task, options.device) for cell in chosen for task in TASKS[cell.pass_]]


def build(cell: Cell, task: Task, device: torch.device) -> Case:
    """One task; W channels of C go to O = 3C."""
    torch.compiler.reset()
    (N, C, W), items = _routing.sizes_of(cell), ITEMSIZES[cell.precision]
    O = 3 * C
    work = task.work(cell.batch, N, C, W, O, items)
    sets = _routing.buffers(partial(Linear.random, cell, O, device), work, device)
    layer, wide = sets[0], _routing.widened(sets[0])
    rows, channels = layer.one_slice.shape
    slice_work = task.product_work(rows, channels, O, items)

    ours = Gate(task.plain(wide), task.plain(layer), cell.precision)
    dense = Gate(on_all_channels(wide, task.product), on_all_channels(layer, task.product), cell.precision)
    one_slice = Gate(on_one_slice(wide, task.product), on_one_slice(layer, task.product), cell.precision)

    peers: dict[str, Callable[..., Any]] = {DENSE: task.product}
    if device.type == "cuda":
        # The compiler's default calls the same cuBLAS; with autotuning it may write a matrix product itself.
        peers[DENSE + _peers.AUTOTUNED] = _peers.compiled(task.product, _peers.MAX_AUTOTUNE)
    sides = [
        *(rotated(name, partial(on_all_channels, product=p), sets, dense, work) for name, p in peers.items()),
        rotated(SLICE, partial(on_one_slice, product=task.product), sets, one_slice, slice_work),
        rotated(FUSED, task.fused, sets, ours, work),
    ]
    return Case(
        _routing.name_of(task.name, cell),
        sides,
        _routing.coordinates(task.name, cell),
        speedup_over=DENSE,
        goals=GOALS_ON_GPU if device.type == "cuda" else (),
        matrix_dtype=cell.matrix_dtype,
        notes=[
            f"O = 3C, as of queries, keys and values; {FUSED} called {task.called(layer)}",
            layer.in_the_library(task.pass_),
            f"{DENSE}: on the masked input that a masked model has, and as fast as the layer of an unrouted model",
            f"{SLICE}: another function, on {channels} channels that are the same for all samples, and "
            "without what deactivated channels add: PyTorch's speed at almost the same FLOPs, an upper bound",
            _routing.how_called(cell, device),
        ],
    )


def on_all_channels(layer: Linear, product: Callable[..., Any]) -> list[Tensor]:
    """What a masked model computes."""
    return product(layer.dense, layer.weight, layer.bias, layer.g)


def on_one_slice(layer: Linear, product: Callable[..., Any]) -> list[Tensor]:
    """The same on the first channels alone."""
    x = layer.one_slice
    return product(x, layer.weight[:, : x.shape[1]], layer.bias, layer.g.flatten(0, 1))


def _called(layer: Linear) -> str:
    return layer.multiplied_by()


# --- forward ---------------------------------------------------------------------------------------------------------


def _fused_forward(layer: Linear) -> list[Tensor]:
    _routing.require_kernels(layer.u)
    return [
        ops.window_linear_forward(
            layer.u,
            layer.mean_rstd,
            layer.shift,
            layer.scale,
            layer.weight,
            layer.bias,
            layer.start,
        )
    ]


def _plain_forward(layer: Linear) -> list[Tensor]:
    return [F.linear(layer.dense, layer.weight, layer.bias)]


def _product_forward(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor) -> list[Tensor]:
    return [F.linear(x, weight, bias)]


# --- gradients -------------------------------------------------------------------------------------------------------


def _fused_gradients(layer: Linear, parameters: bool) -> list[Tensor]:
    _routing.require_kernels(layer.u)
    gradients = ops.window_linear_backward(
        layer.g,
        layer.u,
        layer.mean_rstd,
        layer.shift,
        layer.scale,
        layer.weight,
        layer.start,
        need_weight=parameters,
        need_bias=parameters,
    )
    return [gradient for gradient in gradients if gradient is not None]


def _plain_gradients(layer: Linear, parameters: bool) -> list[Tensor]:
    names = ["u"]
    if layer.window is not None:
        names += ["mean_rstd", "shift", "scale"]
    if parameters:
        names += ["weight", "bias"]
    leaves = {name: getattr(layer, name).detach().requires_grad_() for name in names}
    (out,) = _plain_forward(replace(layer, **leaves))
    gradients = dict(zip(names, torch.autograd.grad(out, list(leaves.values()), layer.g), strict=True))
    if layer.window is not None:
        # Deactivated channels are -mean_rstd * (1 + scale) + shift; ours returns the sum of gradient * (1 + scale).
        gradients["mean_rstd"] = -gradients["mean_rstd"]
    return list(gradients.values())


def _product_gradients(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor, parameters: bool) -> list[Tensor]:
    if not parameters:
        return [g @ weight]
    rows = g.flatten(0, -2)
    return [g @ weight, rows.t() @ x.flatten(0, -2), rows.sum(0)]


def _fused_weight_gradient(layer: Linear) -> list[Tensor]:
    """Of the windows alone: what deactivated channels add to it, the library multiplies afterwards."""
    _routing.require_kernels(layer.u)
    if layer.start is None:
        return _product_weight_gradient(layer.u, layer.weight, layer.bias, layer.g)
    if dispatch.kernel_path(layer.u) == "cpu":
        raise NotImplementedError("on a CPU the weight gradient is computed with the other gradients only")
    return [ops._launch_weight_gradient(layer.g, layer.u, layer.start, layer.weight.shape[1])]


def _plain_weight_gradient(layer: Linear) -> list[Tensor]:
    x = layer.dense if layer.window is None else layer.dense * layer.window.mask()[:, None]
    return _product_weight_gradient(x, layer.weight, layer.bias, layer.g)


def _product_weight_gradient(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor) -> list[Tensor]:
    return [g.flatten(0, -2).t() @ x.flatten(0, -2)]


def _called_for_weight(layer: Linear) -> str:
    if layer.start is None:
        return "PyTorch's product"
    called, in_library = "our GEMM", layer.multiplied_by()
    if in_library != called:
        called += f", where contracting over windows the library calls {in_library}"
    return f"{called}; for what the windows add, in fp32: what deactivated channels add is in all gradients"


FORWARD = Task(
    "forward",
    _fused_forward,
    _plain_forward,
    _product_forward,
    counts.window_linear_forward,
    counts.linear_forward,
    _called,
    "windows_forward",
)
INPUT_GRADIENT = Task(
    "input gradient",
    partial(_fused_gradients, parameters=False),
    partial(_plain_gradients, parameters=False),
    partial(_product_gradients, parameters=False),
    counts.window_linear_input_gradient,
    counts.linear_input_gradient,
    _called,
    "windows_backward",
)
WEIGHT_GRADIENT = Task(
    "weight gradient",
    _fused_weight_gradient,
    _plain_weight_gradient,
    _product_weight_gradient,
    counts.window_linear_weight_product,
    counts.linear_weight_product,
    _called_for_weight,
    "windows_backward",
)
ALL_GRADIENTS = Task(
    "all gradients",
    partial(_fused_gradients, parameters=True),
    partial(_plain_gradients, parameters=True),
    partial(_product_gradients, parameters=True),
    counts.window_linear_gradients,
    counts.linear_gradients,
    _called,
    "windows_backward",
)
TASKS = {"forward": (FORWARD,), "training": (INPUT_GRADIENT, WEIGHT_GRADIENT, ALL_GRADIENTS)}

BENCHMARK = Benchmark(
    "window_linear",
    "A linear layer over each sample's window, and its gradients: our launchers, F.linear on all channels.",
    cases,
    sources=sources.BLOCKS,
)
