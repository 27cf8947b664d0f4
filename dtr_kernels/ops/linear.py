"""Linear(modulate(LN(m * stream))) with stream = x + gate * branch: what comes before a block's attention.

Between ``gated_norm`` and ``window_linear`` nothing is stored for the backward pass: the linear layer's input is
recomputed from the stream, which the next op of the block keeps anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtr_kernels import reference
from dtr_kernels.ops.checks import check_linear, check_stream, check_window
from dtr_kernels.ops.dispatch import chosen_path, in_dtype_of
from dtr_kernels.ops.gated_norm import gated_norm_backward, gated_norm_forward
from dtr_kernels.ops.registration import op
from dtr_kernels.ops.window_linear import contracts_windows, window_linear_backward, window_linear_forward
from dtr_kernels.routing import ChannelWindow


@op("routed_linear")
def _op(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor | None,
    width: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(stream, out, mean, rstd); stream is empty without a branch, where it would be x itself."""
    compact = contracts_windows("windows_forward", x, start, width, weight)
    stream, u, mean, rstd = gated_norm_forward(x, branch, gate, shift, scale, start, width, eps, weight.dtype, compact)
    mean_rstd, window = (mean * rstd, start) if compact else (None, None)
    out = window_linear_forward(u, mean_rstd, shift, scale, weight, bias, window)
    return x.new_empty(0) if stream is None else stream, out, mean, rstd


@_op.register_fake
def _(
    x: Tensor, branch: Tensor | None, gate: Any, shift: Any, scale: Any, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, N, C = x.shape
    stream = x.new_empty(0) if branch is None else x.new_empty(B, N, C)
    statistics = x.new_empty(B, N, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return stream, x.new_empty(B, N, weight.shape[0], dtype=weight.dtype), statistics, torch.empty_like(statistics)


@_op.register_flops
def _(
    x: Any, branch: Any, gate: Any, shift: Any, scale: Any, weight: Any, bias: Any, start: Any, width: int, eps: float
) -> int:
    B, N, _ = x
    return 2 * B * N * width * weight[0]


@op("routed_linear_backward")
def _backward_op(
    dstream: Tensor | None,
    dout: Tensor,
    stream: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    start: Tensor | None,
    width: int,
    eps: float,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, branch, gate, shift, scale, weight, bias), empty where there is no such input or no need."""
    compact = contracts_windows("windows_backward", stream, start, width, weight)
    u = gated_norm_forward(stream, None, None, shift, scale, start, width, eps, weight.dtype, compact).u
    mean_rstd, window = (mean * rstd, start) if compact else (None, None)
    linear = window_linear_backward(dout, u, mean_rstd, shift, scale, weight, window, need_weight, need_bias)
    norm = gated_norm_backward(
        linear.u,
        dstream,
        linear.inactive,
        stream,
        branch,
        gate,
        scale,
        mean,
        rstd,
        start,
        width,
        compact,
        x_is_stream=True,
    )
    dshift = norm.shift if linear.shift is None else norm.shift + linear.shift
    dscale = norm.scale if linear.scale is None else norm.scale + linear.scale
    return (
        norm.x,
        _or_empty(norm.branch, stream),
        _or_empty(None if norm.gate is None or gate is None else norm.gate.to(gate.dtype), stream),
        dshift.to(shift.dtype),
        dscale.to(scale.dtype),
        _or_empty(linear.weight, weight),
        _or_empty(linear.bias, weight),
    )


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """x, or an empty tensor where an op's fixed number of outputs has no use for one."""
    return like.new_empty(0) if x is None else x


@_backward_op.register_fake
def _(
    dstream: Any,
    dout: Any,
    stream: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_weight, need_bias = rest[-2:]
    return (
        stream.new_empty(stream.shape),
        stream.new_empty(0) if branch is None else branch.new_empty(branch.shape),
        stream.new_empty(0) if gate is None else gate.new_empty(gate.shape),
        shift.new_empty(shift.shape),
        scale.new_empty(scale.shape),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


@_backward_op.register_flops
def _(
    dstream: Any,
    dout: Any,
    stream: Any,
    branch: Any,
    gate: Any,
    shift: Any,
    scale: Any,
    weight: Any,
    mean: Any,
    rstd: Any,
    start: Any,
    width: int,
    eps: float,
    need_weight: bool,
    need_bias: bool,
) -> int:
    B, N, O = dout
    return 2 * B * N * width * O * (1 + need_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, gate, shift, scale, weight, _, start, ctx.width, ctx.eps = inputs
    stream, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    # The stream instead of x: with it the sum is not computed again, and the next op saves the same tensor.
    ctx.save_for_backward(x if branch is None else stream, branch, gate, shift, scale, weight, mean, rstd, start)


def _backward(ctx: Any, dstream: Tensor | None, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    stream, branch, gate, shift, scale, weight, mean, rstd, start = ctx.saved_tensors
    if dout is None:
        dout = stream.new_zeros(*stream.shape[:2], weight.shape[0], dtype=weight.dtype)
    needs = ctx.needs_input_grad
    gradients = _backward_op(
        dstream if branch is not None else None,
        dout,
        stream,
        branch,
        gate,
        shift,
        scale,
        weight,
        mean,
        rstd,
        start,
        ctx.width,
        ctx.eps,
        needs[5],
        needs[6],
    )
    return *(g if need else None for g, need in zip(gradients, needs, strict=False)), None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.refuse_autograd()
_op.register_autocast(casts=(5, 6))


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
    check_stream(x, branch, gate, shift=shift, scale=scale)
    check_linear(x, "", weight, bias, x.shape[-1])
    window = check_window(x, window)
    if chosen_path(x, weight) == "plain":
        mask = None if window is None else window.mask()
        branch, gate, shift, scale = in_dtype_of(x, branch, gate, shift, scale)
        return reference.routed_linear(x, branch, gate, shift, scale, weight, bias, mask, eps)
    start, width = (None, x.shape[-1]) if window is None else (window.start, window.width)
    stream, out, _, _ = _op(x, branch, gate, shift, scale, weight, bias, start, width, eps)
    return x if branch is None else stream, out
