"""fc2(GELU(fc1(modulate(LN(...))))), or another activation, after a gated residual: the second half of a block.

Only fc1's output of the hidden layer is kept for the backward pass; the activation, the norm's output and the stream
are recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtr_kernels import reference
from dtr_kernels.ops.activations import parts_of
from dtr_kernels.ops.checks import check_linear, check_norm, check_one_of, check_stream, check_window
from dtr_kernels.ops.dispatch import Choice, choose, in_dtype_of, or_empty
from dtr_kernels.ops.gated_norm import (
    Norm,
    NormGradients,
    NormInputs,
    NormWindow,
    gated_norm_backward,
    gated_norm_forward,
)
from dtr_kernels.ops.linear import closed_form, fake_statistics
from dtr_kernels.ops.registration import Op, op
from dtr_kernels.ops.window_linear import (
    activation_linear_backward,
    choose_gemm,
    linear_activation_forward,
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
    norm: str,
    activation: str,
    write_pre: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (stream, out, pre = fc1's output, mean, rstd). pre is empty unless ``write_pre``, mean for RMSNorm."""
    # With ``keep_branch`` fc1 reads every channel.
    fc1 = choose_gemm("windows_forward", x, None if keep_branch else start, width, fc1_weight)
    inputs = NormInputs(x, shift, scale, branch, gate)
    window = NormWindow(start, width, fc1.path == "windows", keep_branch)
    normed = gated_norm_forward(inputs, window, Norm(eps, norm), fc1_weight.dtype)
    pre, act = linear_activation_forward(
        normed.u, closed_form(inputs, normed), fc1_weight, fc1_bias, activation, write_pre
    )
    out = F.linear(act, fc2_weight, fc2_bias)
    return or_empty(normed.stream, x), out, pre, or_empty(normed.mean, normed.rstd), normed.rstd


@_op.register_fake
def _(
    x: Tensor, shift: Any, scale: Any, fc1_weight: Tensor, fc1_bias: Any, fc2_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    norm, _activation, write_pre = rest[-3:]
    return fake_mlp(x, fc1_weight, fc2_weight, len(fc1_weight), norm, write_pre)


def fake_mlp(
    x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor, hidden: int, norm: str, write_pre: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (stream, out, pre, mean, rstd) for tracing; pre has ``hidden`` channels."""
    return (
        x.new_empty(x.shape),
        x.new_empty(*x.shape[:2], fc2_weight.shape[0], dtype=fc2_weight.dtype),
        fc1_weight.new_empty((*x.shape[:2], hidden) if write_pre else 0),
        *fake_statistics(x, norm),
    )


@_op.register_flops
def _(x: Any, shift: Any, scale: Any, fc1_weight: Any, fc1_bias: Any, fc2_weight: Any, *rest: Any) -> int:
    width, keep_branch, *_ = rest[-6:]
    B, N, C = x
    return 2 * B * N * (fc1_weight[0] * (C if keep_branch else width) + fc2_weight[0] * fc2_weight[1])


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
    norm: str,
    activation: str,
    pre: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of (x, shift, scale, fc1's and fc2's weight and bias, branch, gate); of parameters only those in
    ``needs``."""
    dpre, act = activation_linear_backward(dout, pre, fc2_weight, activation)
    flat = dout.reshape(-1, dout.shape[-1])
    dfc2_weight = flat.t() @ act.reshape(-1, act.shape[-1]) if needs[2] else None
    dfc2_bias = flat.sum(0) if needs[3] else None
    del act
    choice = choose_gemm("windows_backward", x, None if keep_branch else start, width, fc1_weight)
    inputs = NormInputs(x, shift, scale, branch, gate)
    window = NormWindow(start, width, choice.path == "windows", keep_branch)
    again = gated_norm_forward(inputs, window, Norm(eps, norm), fc1_weight.dtype, write_stream=False)
    fc1 = window_linear_backward(dpre, again.u, closed_form(inputs, again), fc1_weight, *needs[:2])
    found = gated_norm_backward(fc1.u, dstream, fc1.inactive, inputs, None if norm == "rms" else mean, rstd, window)
    of_weights = (fc1.weight, fc1.bias, dfc2_weight, dfc2_bias)
    return mlp_gradients(found.of(inputs, fc1.shift, fc1.scale), fc1_weight, fc2_weight, of_weights)


def mlp_gradients(
    norm: NormGradients, fc1_weight: Tensor, fc2_weight: Tensor, of_weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients as the outputs of an op, empty tensors for None."""
    weights = zip(of_weights, (fc1_weight, fc1_weight, fc2_weight, fc2_weight), strict=True)
    return norm.x, norm.shift, norm.scale, *(or_empty(*each) for each in weights), norm.branch, norm.gate  # type: ignore


@_backward_op.register_fake
def fake_mlp_gradients(
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
    fc1 = fc1_weight[0] * (C if keep_branch else width) * (1 + needs[0])
    return 2 * B * N * (fc1 + fc2_weight[0] * fc2_weight[1] * (1 + needs[2]))


def register_mlp_autograd(forward: Op, backward: Op) -> None:
    """Register the gradient of an op that takes x, shift, scale, weights and biases of fc1 and fc2, branch, gate, a
    window's start, settings and ``write_pre``, and returns (stream, out, pre, mean, rstd)."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, shift, scale, fc1_weight, _, fc2_weight, _, branch, gate, start, *ctx.settings, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, shift, scale, fc1_weight, fc2_weight, branch, gate, start, *output[2:])

    def gradients(ctx: Any, dstream: Tensor | None, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        *inputs, pre, mean, rstd = ctx.saved_tensors
        x, fc2_weight = inputs[0], inputs[4]
        if dout is None:
            dout = x.new_zeros(*x.shape[:2], fc2_weight.shape[0], dtype=fc2_weight.dtype)
        needs = list(ctx.needs_input_grad[:9])
        found = backward(dstream, dout, *inputs, *ctx.settings, pre, mean, rstd, needs[3:7])
        wanted = [g if need else None for g, need in zip(found, needs, strict=True)]
        return *wanted, None, *[None] * len(ctx.settings), None

    forward.register_autograd(gradients, setup_context=setup_context)
    backward.refuse_autograd()
    forward.register_autocast(casts=(3, 4, 5, 6))


register_mlp_autograd(_op, _backward_op)


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
    norm: str = "layer",
    activation: str = "gelu_tanh",
) -> tuple[Tensor, Tensor]:
    """Compute stream = x + gate * branch, and fc2(GELU(fc1(modulate(LN(v), shift, scale)))), GELU in its tanh form.

    With ``keep_branch``, v = m * x + gate * branch (scope "block", DTR paper, equation 6: every channel sees the
    attention's output); otherwise v = m * stream (scope "branch": fc1 reads only active channels, if that is faster).

    Args:
        x: residual stream [B, N, C], fp32, bf16, fp16 or fp64.
        shift, scale: adaLN modulation [B, C], any floating dtype; rows may be strided views of one [B, 6C].
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: [H, C], [H], [O, H], [O], biases may be None; in x's dtype; autocast
            casts them, but not x. With "swiglu" the first two are [2H, C], [2H].
        branch, gate: the update of the stream, [B, N, C] and [B, C].
        window: active channels of each sample; None for all.
        keep_branch: as above.
        eps, norm: as in ``routed_linear``.
        activation: "gelu_tanh"; "gelu", its exact form; "silu"; or "swiglu", SiLU of the first half of fc1's outputs
            times the second.

    Returns:
        stream [B, N, C] in x's dtype and the MLP's output [B, N, O] in the weights' dtype.

    Raises:
        TypeError: if a tensor is not floating point, or eps not a number.
        ValueError: if shapes, dtypes, devices or the window do not fit x, eps is negative or not finite, or norm or
            activation is unknown.
    """
    if branch is None or gate is None:
        raise ValueError("branch and gate must both be given, got None")
    choice = choose(x, fc1_weight, fc2_weight)
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return routed_mlp_by(
        choice, x, shift, scale, weights, branch, gate, window, keep_branch, Norm(eps, norm), activation
    )


def check_mlp(x: Tensor, weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None], activation: str) -> None:
    """Raise ValueError or TypeError unless weights and biases of fc1 and fc2 fit x and the activation between them."""
    check_one_of("activation", activation, reference.ACTIVATIONS)
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    check_linear(x, "fc1_", fc1_weight, fc1_bias, x.shape[-1])
    if len(fc1_weight) % parts_of(activation):
        raise ValueError(f'fc1_weight must have two halves for "swiglu", an even number of rows, got {len(fc1_weight)}')
    check_linear(x, "fc2_", fc2_weight, fc2_bias, len(fc1_weight) // parts_of(activation))


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
    norm: Norm,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Run ``routed_mlp`` by a choice that was made for it or for its block; ``weights`` are those of fc1 and fc2."""
    check_stream(x, branch, gate, shift=shift, scale=scale)
    check_norm(*norm)
    check_mlp(x, weights, activation)
    window = check_window(x, window)
    if choice.path == "plain":
        mask = None if window is None else window.mask()
        branch, gate, shift, scale = in_dtype_of(x, branch, gate, shift, scale)
        return reference.routed_mlp(x, shift, scale, *weights, branch, gate, mask, keep_branch, *norm, activation)
    inputs = (x, shift, scale, *weights, branch, gate)
    start, width = (None, x.shape[-1]) if window is None else (window.start, window.width)
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    stream, out, *_ = _op(*inputs, start, width, keep_branch and window is not None, *norm, activation, training)
    return stream, out
