"""The rules of our own fused ops: ``routed_linear``, ``routed_mlp`` and those of scope "inner".

The forward pass runs the ops themselves, the backward pass the ops' own kernels except for the weights' gradients.
These use the layer's input on all channels, modulate(LN(m * stream)), so they are those of an ordinary linear layer,
and one batched GEMM computes them for all clusters. That takes 1 / beta times the multiplications of a window, in far
fewer launches than one for each cluster. In scope "inner" gradients of inactive rows, and inputs of inactive columns,
are zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtr_kernels.ops.activations import parts_of
from dtr_kernels.ops.band_linear import (
    Heads,
    activation_band_backward,
    among_all,
    band_input_gradient,
    in_order,
    order_by_window,
    out_of_order,
)
from dtr_kernels.ops.gated_norm import Norm, NormInputs, NormWindow, gated_norm_backward, gated_norm_forward
from dtr_kernels.ops.window_linear import activation_linear_backward
from dtr_kernels.surgery.interception import Interception, Refusal, Rule, in_autocast_dtype, take_linear


def _norm_linear(run: Interception, op: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
    _check(run, [*args[:3], *args[5:8]], list(args[3:5]))
    return _NormLinear.apply(run, op, *args)


def _routed_mlp(run: Interception, op: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
    _check(run, [*args[:3], *args[7:10]], list(args[3:7]))
    return _RoutedMlp.apply(run, op, *args)


def _inner_projection(run: Interception, op: Callable[..., Any], *args: Any) -> Tensor:
    _check(run, [args[0], args[3]], list(args[1:3]))
    return _InnerProjection.apply(run, op, *args)


def _inner_mlp(run: Interception, op: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
    _check(run, [*args[:3], *args[7:10]], list(args[3:7]))
    return _InnerMlp.apply(run, op, *args)


def _check(run: Interception, rows: list[Tensor | None], weights: list[Tensor | None]) -> None:
    run.check_rows(*(tensor for tensor in rows if tensor is not None))
    run.check_no_rows(*weights)
    if any(w is not None and w.requires_grad and not run.is_weight(w) for w in weights):
        raise Refusal("another of its parameters requires grad and is none of params")


def _cast(weights: list[Tensor | None], x: Tensor) -> list[Tensor | None]:
    """Cast weights like the ops' autocast."""
    return [w if w is None or x.dtype == torch.float64 else in_autocast_dtype(w) for w in weights]


class _NormLinear(torch.autograd.Function):
    """``routed_linear`` and ``inner_linear``; the settings of the latter include the heads."""

    @staticmethod
    def forward(ctx: Any, run: Interception, op: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
        x, shift, scale, *weights, branch, gate, start = args[:8]
        ctx.run, ctx.weights, ctx.settings = run, weights, args[8:]
        weight, bias = _cast(weights, x)
        stream, out, mean, rstd = op(x, shift, scale, weight, bias, *args[5:])
        ctx.outputs = out.shape[2]
        ctx.set_materialize_grads(False)
        seen = x if branch is None else stream
        ctx.save_for_backward(seen, shift, scale, weight, branch, gate, start, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        return stream, out, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstream: Tensor | None, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
        *inputs, mean, rstd = ctx.saved_tensors
        stream, shift, scale, weight, branch, _gate, start = inputs
        width, *heads, eps, norm = ctx.settings
        with torch._C.DisableTorchFunction():
            if dout is None:
                dout = stream.new_zeros(*stream.shape[:2], ctx.outputs, dtype=weight.dtype)
            if heads:
                total, parts = heads
                window, backward = NormWindow(None, stream.shape[2]), torch.ops.dtr_kernels.inner_linear_backward
                every = among_all(dout, Heads(start, width, total).rows(weight, parts), len(weight))
            else:
                window, backward = NormWindow(start, width), torch.ops.dtr_kernels.routed_linear_backward
                every = dout
            u = gated_norm_forward(NormInputs(stream, shift, scale), window, Norm(eps, norm), weight.dtype).u
            taken = ctx.run.collect(ctx.weights, take_linear, every, u)
            del u, every
            dx, dshift, dscale, _, _, dbranch, dgate = backward(
                None if branch is None else dstream, dout, *inputs, *ctx.settings, mean, rstd, False, False
            )
        if branch is None:
            dbranch = dgate = None
        return None, None, dx, dshift, dscale, *taken, dbranch, dgate, None, *[None] * len(ctx.settings)


class _RoutedMlp(torch.autograd.Function):
    """``routed_mlp``. Its own backward pass does not expose a product that fc1's weight gradient needs."""

    @staticmethod
    def forward(ctx: Any, run: Interception, op: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
        x, shift, scale, *weights, branch, gate, start = args[:10]
        ctx.run, ctx.weights = run, weights
        *ctx.settings, _ = args[10:]
        cast = _cast(weights, x)
        stream, out, pre, mean, rstd = op(x, shift, scale, *cast, *args[7:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, shift, scale, branch, gate, cast[0], cast[2], start, pre, mean, rstd)
        ctx.mark_non_differentiable(pre, mean, rstd)
        return stream, out, pre, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstream: Tensor | None, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
        *tensors, fc1_weight, fc2_weight, start, pre, mean, rstd = ctx.saved_tensors
        width, keep_branch, eps, norm, activation = ctx.settings
        inputs, window = NormInputs(*tensors), NormWindow(start, width, keep_branch=keep_branch)
        with torch._C.DisableTorchFunction():
            if dout is None:
                dout = inputs.x.new_zeros(*inputs.x.shape[:2], len(fc2_weight), dtype=fc2_weight.dtype)
            dpre, act = activation_linear_backward(dout, pre, fc2_weight, activation)
            fc2 = ctx.run.collect(ctx.weights[2:], take_linear, dout, act)
            del act
            u = gated_norm_forward(inputs, window, Norm(eps, norm), dpre.dtype, write_stream=False).u
            fc1 = ctx.run.collect(ctx.weights[:2], take_linear, dpre, u)
            mean = None if norm == "rms" else mean
            found = gated_norm_backward(dpre @ fc1_weight, dstream, None, inputs, mean, rstd, window).of(inputs)
        return None, None, *found[:3], *fc1, *fc2, *found[3:], None, *[None] * len(ctx.settings), None


class _InnerProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Interception, op: Callable[..., Any], z: Tensor, *args: Any) -> Tensor:
        *weights, start, active, total = args
        ctx.run, ctx.weights, ctx.heads, ctx.dtype = run, weights, (active, total), z.dtype
        cast, weight, bias = _cast([z, *weights], z)
        ctx.save_for_backward(cast, weight, start)
        return op(cast, weight, bias, start, active, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        z, weight, start = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            every = among_all(z, Heads(start, *ctx.heads).columns(weight), weight.shape[1])
            taken = ctx.run.collect(ctx.weights, take_linear, dout, every)
            dz, *_ = torch.ops.dtr_kernels.inner_projection_backward(
                dout, z, weight, start, *ctx.heads, need_weight=False, need_bias=False
            )
        return None, None, dz.to(ctx.dtype), *taken, None, None, None


class _InnerMlp(_RoutedMlp):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstream: Tensor | None, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
        *tensors, fc1_weight, fc2_weight, start, pre, mean, rstd = ctx.saved_tensors
        width, total, eps, norm, activation = ctx.settings
        inputs, window = NormInputs(*tensors), NormWindow(None, tensors[0].shape[2])
        with torch._C.DisableTorchFunction():
            if dout is None:
                dout = inputs.x.new_zeros(*inputs.x.shape[:2], len(fc2_weight), dtype=fc2_weight.dtype)
            order = order_by_window(dout, start)  # the order of pre's samples
            heads = Heads(in_order(start, order), width, total)
            rows, columns = heads.rows(fc1_weight, parts_of(activation)), heads.columns(fc2_weight)
            dout_in_order = in_order(dout.contiguous(), order)
            dpre, act = activation_band_backward(dout_in_order, pre, fc2_weight, columns, activation)
            every = out_of_order(among_all(act, columns, fc2_weight.shape[1]), order)
            fc2 = ctx.run.collect(ctx.weights[2:], take_linear, dout, every)
            del act, every
            u = gated_norm_forward(inputs, window, Norm(eps, norm), dpre.dtype, write_stream=False).u
            every = out_of_order(among_all(dpre, rows, len(fc1_weight)), order)
            fc1 = ctx.run.collect(ctx.weights[:2], take_linear, every, u)
            du = out_of_order(band_input_gradient(dpre, fc1_weight, rows), order)
            mean = None if norm == "rms" else mean
            found = gated_norm_backward(du, dstream, None, inputs, mean, rstd, window).of(inputs)
        return None, None, *found[:3], *fc1, *fc2, *found[3:], None, *[None] * len(ctx.settings), None


ROUTED_RULES: dict[Any, Rule] = {
    torch.ops.dtr_kernels.routed_linear.default: _norm_linear,
    torch.ops.dtr_kernels.routed_mlp.default: _routed_mlp,
    torch.ops.dtr_kernels.inner_linear.default: _norm_linear,
    torch.ops.dtr_kernels.inner_projection.default: _inner_projection,
    torch.ops.dtr_kernels.inner_mlp.default: _inner_mlp,
}
