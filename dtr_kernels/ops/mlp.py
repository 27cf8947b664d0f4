"""fc2(GELU(fc1(modulate(LN(...))))) after a gated residual: the second half of a block.

Of the hidden layer only fc1's output is kept for the backward pass; the activation, the norm's output and the stream
are recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtr_kernels import reference
from dtr_kernels.ops.checks import check_linear, check_stream, check_window
from dtr_kernels.ops.dispatch import Choice, choose, in_dtype_of
from dtr_kernels.ops.gated_norm import NormInputs, NormWindow, gated_norm_backward, gated_norm_forward
from dtr_kernels.ops.linear import closed_form
from dtr_kernels.ops.registration import op
from dtr_kernels.ops.window_linear import (
    choose_gemm,
    gelu_linear_backward,
    linear_gelu_forward,
    window_linear_backward,
)
from dtr_kernels.routing import ChannelWindow


@op("routed_mlp")
def _op(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    branch: Tensor,
    gate: Tensor,
    start: Tensor | None,
    width: int,
    keep_branch: bool,
    eps: float,
    write_pre: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(stream, out, pre, mean, rstd); pre, fc1's output, is empty unless ``write_pre``."""
    # With ``keep_branch`` fc1 reads every channel.
    fc1 = choose_gemm("windows_forward", x, None if keep_branch else start, width, fc1_weight)
    inputs = NormInputs(x, shift, scale, branch, gate)
    window = NormWindow(start, width, fc1.path == "windows", keep_branch)
    norm = gated_norm_forward(inputs, window, eps, fc1_weight.dtype)
    pre, act = linear_gelu_forward(norm.u, closed_form(inputs, norm), fc1_weight, fc1_bias, write_pre)
    assert norm.stream is not None
    return norm.stream, F.linear(act, fc2_weight, fc2_bias), pre, norm.mean, norm.rstd


@_op.register_fake
def _(
    x: Tensor, shift: Any, scale: Any, fc1_weight: Tensor, fc1_bias: Any, fc2_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    write_pre = rest[-1]
    B, N, C = x.shape
    statistics = x.new_empty(B, N, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return (
        x.new_empty(B, N, C),
        x.new_empty(B, N, fc2_weight.shape[0], dtype=fc2_weight.dtype),
        fc1_weight.new_empty((B, N, fc1_weight.shape[0]) if write_pre else 0),
        statistics,
        torch.empty_like(statistics),
    )


@_op.register_flops
def _(x: Any, shift: Any, scale: Any, fc1_weight: Any, fc1_bias: Any, fc2_weight: Any, *rest: Any) -> int:
    _start, width, keep_branch, _eps, _write_pre = rest[-5:]
    B, N, C = x
    O, H = fc2_weight
    return 2 * B * N * H * ((C if keep_branch else width) + O)


@op("routed_mlp_backward")
def _backward_op(
    dstream: Tensor | None,
    dout: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    branch: Tensor,
    gate: Tensor,
    start: Tensor | None,
    width: int,
    keep_branch: bool,
    eps: float,
    pre: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, shift, scale, fc1's and fc2's weight and bias, branch, gate); parameters only where
    ``needs``."""
    dpre, act = gelu_linear_backward(dout, pre, fc2_weight)
    flat = dout.reshape(-1, dout.shape[-1])
    dfc2_weight = flat.t() @ act.reshape(-1, act.shape[-1]) if needs[2] else fc2_weight.new_empty(0)
    dfc2_bias = flat.sum(0) if needs[3] else fc2_weight.new_empty(0)
    del act
    choice = choose_gemm("windows_backward", x, None if keep_branch else start, width, fc1_weight)
    inputs = NormInputs(x, shift, scale, branch, gate)
    window = NormWindow(start, width, choice.path == "windows", keep_branch)
    again = gated_norm_forward(inputs, window, eps, fc1_weight.dtype, write_stream=False)
    fc1 = window_linear_backward(dpre, again.u, closed_form(inputs, again), fc1_weight, *needs[:2])
    norm = gated_norm_backward(fc1.u, dstream, fc1.inactive, inputs, mean, rstd, window)
    assert norm.branch is not None and norm.gate is not None
    dshift = norm.shift if fc1.shift is None else norm.shift + fc1.shift
    dscale = norm.scale if fc1.scale is None else norm.scale + fc1.scale
    return (
        norm.x,
        dshift.to(shift.dtype),
        dscale.to(scale.dtype),
        fc1_weight.new_empty(0) if fc1.weight is None else fc1.weight,
        fc1_weight.new_empty(0) if fc1.bias is None else fc1.bias,
        dfc2_weight,
        dfc2_bias,
        norm.branch,
        norm.gate.to(gate.dtype),
    )


@_backward_op.register_fake
def fake_gradients(
    dstream: Any,
    dout: Any,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    branch: Tensor,
    gate: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the shapes of the gradients of (x, shift, scale, fc1's and fc2's weight and bias, branch, gate)."""
    needs = rest[-1]
    return (
        x.new_empty(x.shape),
        shift.new_empty(shift.shape),
        scale.new_empty(scale.shape),
        fc1_weight.new_empty(fc1_weight.shape if needs[0] else 0),
        fc1_weight.new_empty(fc1_weight.shape[0] if needs[1] else 0),
        fc2_weight.new_empty(fc2_weight.shape if needs[2] else 0),
        fc2_weight.new_empty(fc2_weight.shape[0] if needs[3] else 0),
        branch.new_empty(branch.shape),
        gate.new_empty(gate.shape),
    )


@_backward_op.register_flops
def _(dstream: Any, dout: Any, x: Any, shift: Any, scale: Any, fc1_weight: Any, fc2_weight: Any, *rest: Any) -> int:
    _start, width, keep_branch, *_, needs = rest[2:]
    B, N, C = x
    O, H = fc2_weight
    fc1, fc2 = (C if keep_branch else width) * (1 + needs[0]), O * (1 + needs[2])
    return 2 * B * N * H * (fc1 + fc2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, fc1_weight, _, fc2_weight, _, branch, gate, start = inputs[:10]
    ctx.width, ctx.keep_branch, ctx.eps, _ = inputs[10:]
    _, _, pre, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, shift, scale, fc1_weight, fc2_weight, branch, gate, start, pre, mean, rstd)


def _backward(ctx: Any, dstream: Tensor | None, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    *inputs, pre, mean, rstd = ctx.saved_tensors
    x, fc2_weight = inputs[0], inputs[4]
    if dout is None:
        dout = x.new_zeros(*x.shape[:2], fc2_weight.shape[0], dtype=fc2_weight.dtype)
    needs = list(ctx.needs_input_grad)
    settings = (ctx.width, ctx.keep_branch, ctx.eps)
    gradients = _backward_op(dstream, dout, *inputs, *settings, pre, mean, rstd, needs[3:7])
    return *(g if need else None for g, need in zip(gradients, needs, strict=False)), None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.refuse_autograd()
_op.register_autocast(casts=(3, 4, 5, 6))


def routed_mlp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    branch: Tensor,
    gate: Tensor,
    window: ChannelWindow | None = None,
    keep_branch: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """stream = x + gate * branch, and fc2(GELU(fc1(modulate(LN(v), shift, scale)))), GELU in its tanh form.

    v = m * x + gate * branch with ``keep_branch`` (scope "block", DTR paper, equation 6: what attention wrote is seen
    on every channel), else m * stream (scope "branch": fc1 reads active channels only, where that is faster).

    Args:
        x: residual stream [B, N, C], fp32, bf16, fp16 or fp64.
        shift, scale: adaLN modulation [B, C], any floating dtype; rows may be strided views of one [B, 6C].
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: [H, C], [H], [O, H], [O], biases may be None; in x's dtype,
            autocast casts them and leaves x alone.
        branch, gate: the update of the stream, [B, N, C] and [B, C].
        window: active channels of each sample; None for all.
        keep_branch: as above.
        eps: added to the variance.

    Returns:
        stream [B, N, C] in x's dtype and the MLP's output [B, N, O] in the weights' dtype.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes, dtypes, devices or the window do not fit x.
    """
    if branch is None or gate is None:
        raise ValueError("branch and gate must both be given, got None")
    choice = choose(x, fc1_weight, fc2_weight)
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return routed_mlp_by(choice, x, shift, scale, weights, branch, gate, window, keep_branch, eps)


def routed_mlp_by(
    choice: Choice,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    branch: Tensor,
    gate: Tensor,
    window: ChannelWindow | None,
    keep_branch: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``routed_mlp`` by a choice that was made for it or for its block; weights and biases of fc1 and fc2 together."""
    check_stream(x, branch, gate, shift=shift, scale=scale)
    check_linear(x, "fc1_", weights[0], weights[1], x.shape[-1])
    check_linear(x, "fc2_", weights[2], weights[3], weights[0].shape[0])
    window = check_window(x, window)
    if choice.path == "plain":
        mask = None if window is None else window.mask()
        branch, gate, shift, scale = in_dtype_of(x, branch, gate, shift, scale)
        return reference.routed_mlp(x, shift, scale, *weights, branch, gate, mask, keep_branch, eps)
    inputs = (x, shift, scale, *weights, branch, gate)
    start, width = (None, x.shape[-1]) if window is None else (window.start, window.width)
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    stream, out, *_ = _op(*inputs, start, width, keep_branch and window is not None, eps, training)
    return stream, out
