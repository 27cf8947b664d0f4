"""Steps of a block in scope "inner", over each sample's active heads: norm and rows, columns, and the MLP of both.

The norms see every channel; ``band_linear`` describes the rest. As in the other scopes, the backward pass recomputes
the norms' outputs and everything between fc1 and fc2 except fc1's output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dtr_kernels import reference
from dtr_kernels.ops.activations import parts_of
from dtr_kernels.ops.band_linear import (
    Heads,
    activation_band_backward,
    band_activation_forward,
    band_backward,
    band_forward,
    in_order,
    order_by_window,
    out_of_order,
    parameter_gradients,
    plain_band,
)
from dtr_kernels.ops.checks import check_heads, check_linear, check_norm, check_stream
from dtr_kernels.ops.dispatch import Choice, choose, in_dtype_of, or_empty
from dtr_kernels.ops.gated_norm import Norm, NormInputs, NormWindow, gated_norm_backward, gated_norm_forward
from dtr_kernels.ops.linear import (
    fake_linear_gradients,
    fake_statistics,
    linear_gradients,
    register_linear_autograd,
)
from dtr_kernels.ops.mlp import check_mlp, fake_mlp, fake_mlp_gradients, mlp_gradients, register_mlp_autograd
from dtr_kernels.ops.registration import op
from dtr_kernels.routing import ChannelWindow

# --- norm, then rows -------------------------------------------------------------------------------------------------


@op("inner_linear")
def _linear(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    start: Tensor,
    width: int,
    heads: int,
    parts: int,
    eps: float,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (stream, out, mean, rstd). stream is empty without a branch (it equals x); mean is empty for RMSNorm."""
    inputs, window = NormInputs(x, shift, scale, branch, gate), NormWindow(None, x.shape[-1])
    stream, u, mean, rstd, _ = gated_norm_forward(inputs, window, Norm(eps, norm), weight.dtype)
    order = order_by_window(u, start)
    band = Heads(in_order(start, order), width, heads).rows(weight, parts)
    out = out_of_order(band_forward(in_order(u, order), weight, bias, band), order)
    return or_empty(stream, x), out, or_empty(mean, rstd), rstd


@_linear.register_fake
def _(
    x: Tensor, shift: Any, scale: Any, weight: Tensor, bias: Any, branch: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width, heads, *_, norm = rest[2:]
    stream = x.new_empty(0 if branch is None else x.shape)
    out = x.new_empty(*x.shape[:2], weight.shape[0] // heads * width, dtype=weight.dtype)
    return stream, out, *fake_statistics(x, norm)


@_linear.register_flops
def _(x: Any, shift: Any, scale: Any, weight: Any, *rest: Any) -> int:
    width, heads, *_ = rest[4:]
    B, N, C = x
    return 2 * B * N * C * (weight[0] // heads * width)


@op("inner_linear_backward")
def _linear_backward(
    dstream: Tensor | None,
    dout: Tensor,
    stream: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    start: Tensor,
    width: int,
    heads: int,
    parts: int,
    eps: float,
    norm: str,
    mean: Tensor,
    rstd: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of (x, shift, scale, weight, bias, branch, gate), empty for missing inputs and unneeded ones."""
    window = NormWindow(None, stream.shape[-1])
    u = gated_norm_forward(NormInputs(stream, shift, scale), window, Norm(eps, norm), weight.dtype).u
    order = order_by_window(u, start)
    band = Heads(in_order(start, order), width, heads).rows(weight, parts)
    dout, u = in_order(dout.contiguous(), order), in_order(u, order)
    linear = band_backward(dout, u, weight, band, need_weight, need_bias)
    du = out_of_order(linear.u, order)
    inputs = NormInputs(stream, shift, scale, branch, gate)
    mean_of_layer = None if norm == "rms" else mean
    found = gated_norm_backward(du, dstream, None, inputs, mean_of_layer, rstd, window, x_is_stream=True)
    return linear_gradients(found.of(inputs), weight, linear.weight, linear.bias)


_linear_backward.register_fake(fake_linear_gradients)


@_linear_backward.register_flops
def _(dstream: Any, dout: Any, stream: Any, shift: Any, scale: Any, weight: Any, *rest: Any) -> int:
    need_weight = rest[-2]
    B, N, outputs = dout
    return 2 * B * N * weight[1] * outputs * (1 + need_weight)


register_linear_autograd(_linear, _linear_backward)


# --- columns ---------------------------------------------------------------------------------------------------------


@op("inner_projection")
def _projection(z: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor, width: int, heads: int) -> Tensor:
    order = order_by_window(z, start)
    band = Heads(in_order(start, order), width, heads).columns(weight)
    return out_of_order(band_forward(in_order(z, order), weight, bias, band), order)


@_projection.register_fake
def _(z: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return z.new_empty(*z.shape[:2], weight.shape[0])


@_projection.register_flops
def _(z: Any, weight: Any, *_: Any) -> int:
    B, N, active = z
    return 2 * B * N * active * weight[0]


@op("inner_projection_backward")
def _projection_backward(
    dout: Tensor, z: Tensor, weight: Tensor, start: Tensor, width: int, heads: int, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of (z, weight, bias), empty if not needed."""
    order = order_by_window(z, start)
    band = Heads(in_order(start, order), width, heads).columns(weight)
    dout, z = in_order(dout.contiguous(), order), in_order(z, order)
    found = band_backward(dout, z, weight, band, need_weight, need_bias)
    return out_of_order(found.u.contiguous(), order), or_empty(found.weight, weight), or_empty(found.bias, weight)


@_projection_backward.register_fake
def _(dout: Any, z: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_weight, need_bias = rest[-2:]
    return (
        z.new_empty(z.shape),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


@_projection_backward.register_flops
def _(dout: Any, z: Any, weight: Any, start: Any, width: Any, heads: Any, need_weight: bool, need_bias: Any) -> int:
    B, N, active = z
    return 2 * B * N * active * weight[0] * (1 + need_weight)


def _setup_projection(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, weight, _, start, ctx.width, ctx.heads = inputs
    ctx.save_for_backward(z, weight, start)


def _of_projection(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    z, weight, start = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = _projection_backward(dout, z, weight, start, ctx.width, ctx.heads, *needs[1:])
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None


_projection.register_autograd(_of_projection, setup_context=_setup_projection)
_projection_backward.refuse_autograd()
_projection.register_autocast(casts=(0, 1, 2))


# --- norm, fc1, GELU, fc2 --------------------------------------------------------------------------------------------


@op("inner_mlp")
def _mlp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    branch: Tensor,
    gate: Tensor,
    start: Tensor,
    width: int,
    heads: int,
    eps: float,
    norm: str,
    activation: str,
    write_pre: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (stream, out, pre, mean, rstd). pre, fc1's output in the order of windows, is empty unless ``write_pre``;
    mean is empty for RMSNorm."""
    inputs, window = NormInputs(x, shift, scale, branch, gate), NormWindow(None, x.shape[-1])
    stream, u, mean, rstd, _ = gated_norm_forward(inputs, window, Norm(eps, norm), fc1_weight.dtype)
    order = order_by_window(u, start)
    active = Heads(in_order(start, order), width, heads)
    rows = active.rows(fc1_weight, parts_of(activation))
    pre, act = band_activation_forward(in_order(u, order), fc1_weight, fc1_bias, rows, activation, write_pre)
    out = out_of_order(band_forward(act, fc2_weight, fc2_bias, active.columns(fc2_weight)), order)
    return or_empty(stream, x), out, pre, or_empty(mean, rstd), rstd


@_mlp.register_fake
def _(
    x: Tensor, shift: Any, scale: Any, fc1_weight: Tensor, fc1_bias: Any, fc2_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    width, heads, _eps, norm, _activation, write_pre = rest[-6:]
    return fake_mlp(x, fc1_weight, fc2_weight, len(fc1_weight) // heads * width, norm, write_pre)


@_mlp.register_flops
def _(x: Any, shift: Any, scale: Any, fc1_weight: Any, fc1_bias: Any, fc2_weight: Any, *rest: Any) -> int:
    width, heads, *_ = rest[-6:]
    B, N, C = x
    O, hidden = fc2_weight
    return 2 * B * N * (fc1_weight[0] // heads * width * C + hidden // heads * width * O)


@op("inner_mlp_backward")
def _mlp_backward(
    dstream: Tensor | None,
    dout: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    branch: Tensor,
    gate: Tensor,
    start: Tensor,
    width: int,
    heads: int,
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
    order = order_by_window(dout, start)
    active, dout = Heads(in_order(start, order), width, heads), in_order(dout.contiguous(), order)
    columns = active.columns(fc2_weight)
    dpre, act = activation_band_backward(dout, pre, fc2_weight, columns, activation)
    fc2 = parameter_gradients(dout, act, fc2_weight, columns, *needs[2:])
    del act
    inputs, window = NormInputs(x, shift, scale, branch, gate), NormWindow(None, x.shape[-1])
    u = gated_norm_forward(inputs, window, Norm(eps, norm), fc1_weight.dtype, write_stream=False).u
    fc1 = band_backward(dpre, in_order(u, order), fc1_weight, active.rows(fc1_weight, parts_of(activation)), *needs[:2])
    du, mean_of_layer = out_of_order(fc1.u, order), None if norm == "rms" else mean
    found = gated_norm_backward(du, dstream, None, inputs, mean_of_layer, rstd, window)
    return mlp_gradients(found.of(inputs), fc1_weight, fc2_weight, (*fc1[1:], *fc2))


_mlp_backward.register_fake(fake_mlp_gradients)


@_mlp_backward.register_flops
def _(dstream: Any, dout: Any, x: Any, shift: Any, scale: Any, fc1_weight: Any, fc2_weight: Any, *rest: Any) -> int:
    _branch, _gate, _start, width, heads, *_, needs = rest
    B, N, C = x
    O, hidden = fc2_weight
    fc1, fc2 = fc1_weight[0] // heads * width * C, hidden // heads * width * O
    return 2 * B * N * (fc1 * (1 + needs[0]) + fc2 * (1 + needs[2]))


register_mlp_autograd(_mlp, _mlp_backward)


# --- public functions ------------------------------------------------------------------------------------------------


def inner_linear(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: ChannelWindow,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    parts: int = 1,
    eps: float = 1e-6,
    norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """Compute stream = x + gate * branch, and the active heads' outputs of Linear(modulate(LN(stream), shift, scale)).

    Args:
        x: residual stream [B, N, C], fp32, bf16, fp16 or fp64.
        shift, scale: adaLN modulation [B, C], any floating dtype; rows may be strided views of one [B, 6C].
        weight, bias: of the linear layer, [O, C] and [O] (or None), in x's dtype; autocast casts them, but not x.
        window: ``routing.window(t, channels=H)`` over H heads. If t is a number or on the CPU the host knows the
            window, which is faster on a GPU too.
        branch, gate: a pending update of the stream, [B, N, C] and [B, C], or None.
        parts: number of equal parts of the outputs, each with outputs of every head: 3 for queries, keys and values in
            one layer.
        eps, norm: as in ``routed_linear``.

    Returns:
        stream [B, N, C] in x's dtype (x itself without a branch), and [B, N, O * A / H] in weight's dtype for A active
        heads.

    Raises:
        TypeError: if a tensor is not floating point, window not a window, or eps not a number.
        ValueError: if shapes, dtypes, devices or the window do not fit x, eps is negative or not finite, norm is
            unknown, or O is not divisible by parts * H.
    """
    choice = choose(x, weight)
    return inner_linear_by(choice, x, shift, scale, weight, bias, window, branch, gate, parts, Norm(eps, norm))


def inner_linear_by(
    choice: Choice,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: ChannelWindow,
    branch: Tensor | None,
    gate: Tensor | None,
    parts: int,
    norm: Norm,
) -> tuple[Tensor, Tensor]:
    """Run ``inner_linear`` by a choice that was made for it or for its block."""
    check_stream(x, branch, gate, shift=shift, scale=scale)
    check_linear(x, "", weight, bias, x.shape[-1])
    heads = _heads(x, window)
    check_norm(*norm)
    _check_divisible("weight", len(weight), parts * heads.total)
    if choice.path == "plain":
        branch, gate, shift, scale = in_dtype_of(x, branch, gate, shift, scale)
        stream, u = reference.routed_norm(x, shift, scale, None, branch, gate, False, *norm)
        return stream, plain_band(u, weight, bias, heads.rows(weight, parts))
    stream, out, _, _ = _linear(x, shift, scale, weight, bias, branch, gate, *heads, parts, *norm)
    return x if branch is None else stream, out


def inner_projection(x: Tensor, weight: Tensor, bias: Tensor | None, window: ChannelWindow) -> Tensor:
    """Compute Linear(x), where x holds the inputs of active heads only, and the others count as zero.

    Args:
        x: [B, N, I * A / H] for A active heads of H, fp32, bf16, fp16 or fp64.
        weight, bias: of the linear layer, [O, I] and [O] (or None), in x's dtype; autocast casts all three.
        window: as in ``inner_linear``.

    Returns:
        [B, N, O] in weight's dtype.

    Raises:
        TypeError: if a tensor is not floating point, or window not a window.
        ValueError: if shapes, dtypes, devices or the window do not fit x, or I is not divisible by H.
    """
    return inner_projection_by(choose(x, weight), x, weight, bias, window)


def inner_projection_by(
    choice: Choice, x: Tensor, weight: Tensor, bias: Tensor | None, window: ChannelWindow
) -> Tensor:
    """Run ``inner_projection`` by a choice that was made for it or for its block."""
    check_stream(x, None, None)
    heads = _heads(x, window)
    check_linear(x, "", weight, bias, weight.shape[-1])
    _check_divisible("weight's inputs", weight.shape[1], heads.total)
    band = heads.columns(weight)
    if x.shape[2] != band.width:
        raise ValueError(f"x must have shape [B, N, {band.width}] for {heads.active} heads, got {list(x.shape)}")
    if choice.path == "plain":
        return plain_band(x, weight, bias, band)
    return _projection(x, weight, bias, *heads)


def inner_mlp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    branch: Tensor,
    gate: Tensor,
    window: ChannelWindow,
    eps: float = 1e-6,
    norm: str = "layer",
    activation: str = "gelu_tanh",
) -> tuple[Tensor, Tensor]:
    """Compute stream = x + gate * branch, and fc2(m * GELU(fc1(modulate(LN(stream), shift, scale)))).

    m is 1 for the hidden channels of active heads, F / H for each of H heads, and 0 for the others.

    Args:
        x: residual stream [B, N, C], fp32, bf16, fp16 or fp64.
        shift, scale: adaLN modulation [B, C], any floating dtype; rows may be strided views of one [B, 6C].
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: [F, C], [F], [O, F], [O], biases may be None; in x's dtype; autocast
            casts them, but not x. With "swiglu" the first two are [2F, C], [2F].
        branch, gate: the update of the stream, [B, N, C] and [B, C].
        window: as in ``inner_linear``.
        eps, norm, activation: as in ``routed_mlp``.

    Returns:
        stream [B, N, C] in x's dtype and the MLP's output [B, N, O] in the weights' dtype.

    Raises:
        TypeError: if a tensor is not floating point, window not a window, or eps not a number.
        ValueError: if shapes, dtypes, devices or the window do not fit x, eps is negative or not finite, norm or
            activation is unknown, or F is not divisible by H.
    """
    if branch is None or gate is None:
        raise ValueError("branch and gate must both be given, got None")
    choice = choose(x, fc1_weight, fc2_weight)
    weights = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return inner_mlp_by(choice, x, shift, scale, weights, branch, gate, window, Norm(eps, norm), activation)


def inner_mlp_by(
    choice: Choice,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    branch: Tensor,
    gate: Tensor,
    window: ChannelWindow,
    norm: Norm,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Run ``inner_mlp`` by a choice that was made for it or for its block; ``weights`` are those of fc1 and fc2."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    check_stream(x, branch, gate, shift=shift, scale=scale)
    check_norm(*norm)
    check_mlp(x, weights, activation)
    heads = _heads(x, window)
    _check_divisible("fc2_weight's inputs", fc2_weight.shape[1], heads.total)
    if choice.path == "plain":
        branch, gate, shift, scale = in_dtype_of(x, branch, gate, shift, scale)
        stream, u = reference.routed_norm(x, shift, scale, None, branch, gate, False, *norm)
        pre = plain_band(u, fc1_weight, fc1_bias, heads.rows(fc1_weight, parts_of(activation)))
        return stream, plain_band(reference.activate(pre, activation), fc2_weight, fc2_bias, heads.columns(fc2_weight))
    inputs = (x, shift, scale, *weights, branch, gate)
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    stream, out, *_ = _mlp(*inputs, *heads, *norm, activation, training)
    return stream, out


def _heads(x: Tensor, window: ChannelWindow) -> Heads:
    window = check_heads(x, window)
    return Heads(window.start, window.width, window.channels)


def _check_divisible(name: str, size: int, heads: int) -> None:
    if size % heads:
        raise ValueError(f"{name} has {size} features, which {heads} do not divide: as many belong to every head")
