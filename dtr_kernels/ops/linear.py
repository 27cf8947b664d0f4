"""Linear(modulate(LN(m * stream))) with stream = x + gate * branch: what comes before a block's attention.

Between ``gated_norm`` and ``window_linear`` nothing is stored for the backward pass: the linear layer's input is
recomputed from the stream, which the next op of the block keeps anyway.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from dtr_kernels import reference
from dtr_kernels.ops.checks import check_linear, check_stream, check_window
from dtr_kernels.ops.declaration import Draw, Gradient, Kernel, modes, widened
from dtr_kernels.ops.dispatch import Choice, choose, compute_dtype, in_dtype_of
from dtr_kernels.ops.gated_norm import (
    EPS,
    NormInputs,
    NormOutput,
    NormWindow,
    gated_norm_backward,
    gated_norm_forward,
    plain_norm,
)
from dtr_kernels.ops.registration import op
from dtr_kernels.ops.window_linear import ClosedForm, choose_gemm, window_linear_backward, window_linear_forward
from dtr_kernels.routing import ChannelWindow


@op("routed_linear")
def _op(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor | None,
    width: int,
    branch: Tensor | None,
    gate: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(stream, out, mean, rstd); stream is empty without a branch, where it would be x itself."""
    compact = choose_gemm("windows_forward", x, start, width, weight).path == "windows"
    inputs, window = NormInputs(x, shift, scale, branch, gate), NormWindow(start, width, compact)
    norm = gated_norm_forward(inputs, window, eps, weight.dtype)
    out = window_linear_forward(norm.u, closed_form(inputs, norm), weight, bias)
    return x.new_empty(0) if norm.stream is None else norm.stream, out, norm.mean, norm.rstd


def closed_form(inputs: NormInputs, norm: NormOutput) -> ClosedForm | None:
    """Return what the linear layer needs to know of channels that a compact norm left out; None if it left out none."""
    if norm.first is None:
        return None
    return ClosedForm(norm.mean * norm.rstd, inputs.shift, inputs.scale, norm.first)


@_op.register_fake
def _(
    x: Tensor, shift: Any, scale: Any, weight: Tensor, bias: Any, start: Any, width: Any, branch: Any, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, N, C = x.shape
    stream = x.new_empty(0) if branch is None else x.new_empty(B, N, C)
    statistics = x.new_empty(B, N, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return stream, x.new_empty(B, N, weight.shape[0], dtype=weight.dtype), statistics, torch.empty_like(statistics)


@_op.register_flops
def _(x: Any, shift: Any, scale: Any, weight: Any, bias: Any, start: Any, width: int, *_: Any) -> int:
    B, N, _C = x
    return 2 * B * N * width * weight[0]


@op("routed_linear_backward")
def _backward_op(
    dstream: Tensor | None,
    dout: Tensor,
    stream: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    start: Tensor | None,
    width: int,
    branch: Tensor | None,
    gate: Tensor | None,
    eps: float,
    mean: Tensor,
    rstd: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, shift, scale, weight, bias, branch, gate), empty where there is no such input or no need."""
    compact = choose_gemm("windows_backward", stream, start, width, weight).path == "windows"
    window = NormWindow(start, width, compact)
    again = gated_norm_forward(NormInputs(stream, shift, scale), window, eps, weight.dtype)
    inputs = NormInputs(stream, shift, scale, branch, gate)
    linear = window_linear_backward(dout, again.u, closed_form(inputs, again), weight, need_weight, need_bias)
    norm = gated_norm_backward(linear.u, dstream, linear.inactive, inputs, mean, rstd, window, x_is_stream=True)
    dshift = norm.shift if linear.shift is None else norm.shift + linear.shift
    dscale = norm.scale if linear.scale is None else norm.scale + linear.scale
    return (
        norm.x,
        dshift.to(shift.dtype),
        dscale.to(scale.dtype),
        or_empty(linear.weight, weight),
        or_empty(linear.bias, weight),
        or_empty(norm.branch, stream),
        or_empty(None if norm.gate is None or gate is None else norm.gate.to(gate.dtype), stream),
    )


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """Return x, or an empty tensor where an op's fixed number of outputs has no use for one."""
    return like.new_empty(0) if x is None else x


@_backward_op.register_fake
def _(
    dstream: Any,
    dout: Any,
    stream: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    start: Any,
    width: Any,
    branch: Tensor | None,
    gate: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_weight, need_bias = rest[-2:]
    return (
        stream.new_empty(stream.shape),
        shift.new_empty(shift.shape),
        scale.new_empty(scale.shape),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
        stream.new_empty(0) if branch is None else branch.new_empty(branch.shape),
        stream.new_empty(0) if gate is None else gate.new_empty(gate.shape),
    )


@_backward_op.register_flops
def _(
    dstream: Any, dout: Any, stream: Any, shift: Any, scale: Any, weight: Any, start: Any, width: int, *rest: Any
) -> int:
    B, N, O = dout
    need_weight, _need_bias = rest[-2:]
    return 2 * B * N * width * O * (1 + need_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, weight, _, start, ctx.width, branch, gate, ctx.eps = inputs
    stream, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    # The stream instead of x: with it the sum is not computed again, and the next op saves the same tensor.
    ctx.save_for_backward(x if branch is None else stream, shift, scale, weight, start, branch, gate, mean, rstd)


def _backward(ctx: Any, dstream: Tensor | None, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    stream, shift, scale, weight, start, branch, gate, mean, rstd = ctx.saved_tensors
    if dout is None:
        dout = stream.new_zeros(*stream.shape[:2], weight.shape[0], dtype=weight.dtype)
    needs = ctx.needs_input_grad
    inputs = (stream, shift, scale, weight, start, ctx.width, branch, gate, ctx.eps)
    gradients = _backward_op(dstream if branch is not None else None, dout, *inputs, mean, rstd, *needs[3:5])
    wanted = [g if need else None for g, need in zip(gradients, needs[:5] + needs[7:9], strict=True)]
    return *wanted[:5], None, None, *wanted[5:], None


_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.refuse_autograd()
_op.register_autocast(casts=(3, 4))


def routed_linear(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: ChannelWindow | None = None,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """stream = x + gate * branch, and Linear(modulate(LN(m * stream), shift, scale)).

    Over active channels only, where that is faster. It equals the dense layer on masked input (DTR paper, equation 6),
    because a deactivated channel leaves the norm with a value that is known per token; see ``window_linear``.

    Args:
        x: residual stream [B, N, C], fp32, bf16, fp16 or fp64.
        shift, scale: adaLN modulation [B, C], any floating dtype; rows may be strided views of one [B, 6C].
        weight, bias: of the linear layer, [O, C] and [O] (or None), in x's dtype; autocast casts them and leaves x
            alone.
        window: active channels of each sample; None for all.
        branch, gate: a pending update of the stream, [B, N, C] and [B, C], or None.
        eps: added to the variance.

    Returns:
        stream [B, N, C] in x's dtype (x itself without a branch) and the layer's output [B, N, O] in weight's dtype.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes, dtypes, devices or the window do not fit x.
    """
    return routed_linear_by(choose(x, weight), x, shift, scale, weight, bias, window, branch, gate, eps)


def routed_linear_by(
    choice: Choice,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: ChannelWindow | None,
    branch: Tensor | None,
    gate: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``routed_linear`` by a choice that was made for it or for its block."""
    check_stream(x, branch, gate, shift=shift, scale=scale)
    check_linear(x, "", weight, bias, x.shape[-1])
    window = check_window(x, window)
    if choice.path == "plain":
        mask = None if window is None else window.mask()
        branch, gate, shift, scale = in_dtype_of(x, branch, gate, shift, scale)
        return reference.routed_linear(x, shift, scale, weight, bias, mask, branch, gate, eps)
    start, width = (None, x.shape[-1]) if window is None else (window.start, window.width)
    stream, out, _, _ = _op(x, shift, scale, weight, bias, start, width, branch, gate, eps)
    return x if branch is None else stream, out


# --- declarations ----------------------------------------------------------------------------------------------------


def _drawn(draw: Draw, routed: bool, update: bool) -> dict[str, Any]:
    B, N, C, _ = draw.sizes
    shift, scale, gate = draw.vectors(3)
    routing = dict(start=draw.start, width=draw.sizes.W) if routed else dict(start=None, width=C)
    pending = dict(branch=draw(B, N, C), gate=gate) if update else dict(branch=None, gate=None)
    return dict(
        x=draw.stream(B, N, C), shift=shift, scale=scale, weight=draw.weight(3 * C, C), **routing, **pending, eps=EPS
    )


def _plain(start: Tensor | None, width: int, **layer: Any) -> tuple[Tensor, ...]:
    mask = None if start is None else ChannelWindow(start, width, layer["x"].shape[2]).mask()
    stream, out = reference.routed_linear(**layer, mask=mask)
    return (out,) if layer["branch"] is None else (stream, out)


def _backward_inputs(draw: Draw, **mode: bool) -> dict[str, Any]:
    layer = _drawn(draw, **mode)
    x = layer.pop("x")
    inputs = widened(NormInputs(x, layer["shift"], layer["scale"]))
    _, _, mean, rstd, _ = plain_norm(inputs, NormWindow(layer["start"], layer["width"]), EPS, torch.float64)
    statistics = dict(mean=mean.to(compute_dtype(x)), rstd=rstd.to(compute_dtype(x)))
    dout = draw(*x.shape[:2], len(layer["weight"]))
    needs = dict(need_weight=True, need_bias=True)
    return dict(
        dstream=None if layer["branch"] is None else draw.stream(*x.shape),
        dout=dout,
        stream=x,
        **layer,
        **statistics,
        **needs,
    )


def _of_backward(
    dstream: Tensor | None, dout: Tensor, stream: Tensor, branch: Tensor | None, gate: Tensor | None, **rest: Any
) -> tuple[Any, list[Tensor], list[Tensor | None]]:
    shift, scale, weight = (rest[name] for name in ("shift", "scale", "weight"))
    fixed: dict[str, Any] = dict(start=rest["start"], width=rest["width"], eps=rest["eps"])
    bias, update = weight.new_zeros(len(weight)), [t for t in (branch, gate) if t is not None]
    x = stream if branch is None or gate is None else stream - gate[:, None] * branch

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        names = ("x", "shift", "scale", "weight", "bias", "branch", "gate")
        layer: dict[str, Any] = dict(itertools.zip_longest(names, given))
        return _plain(**fixed, **layer)

    return function, [x, shift, scale, weight, bias, *update], [dstream, dout] if update else [dout]


KERNELS = [
    Kernel(
        "routed_linear",
        lambda **layer: torch.ops.dtr_kernels.routed_linear(**layer)[layer["branch"] is None : 2],
        _plain,
        lambda draw, bias, **mode: _drawn(draw, **mode) | dict(bias=draw(3 * draw.sizes.C) if bias else None),
        modes(routed=(True, False), update=(True, False), bias=(True, False)),
        timed=lambda routed, update, bias: routed and update and bias,
        crossover="windows_forward",
    ),
    Kernel(
        "routed_linear_backward",
        lambda **layer: torch.ops.dtr_kernels.routed_linear_backward(**layer)[: 5 if layer["branch"] is None else 7],
        Gradient(_of_backward),
        _backward_inputs,
        modes(routed=(True, False), update=(True, False)),
        timed=lambda routed, update: routed and update,
        crossover="windows_backward",
    ),
]
