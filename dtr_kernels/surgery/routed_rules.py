"""The rules of our own fused ops, ``routed_linear`` and ``routed_mlp``.

Forward they are the ops themselves, backward the ops' own kernels but for the weights' gradients. These want the
layer's input on all channels, modulate(LN(m * stream)): then they are those of an ordinary linear layer, and one
batched GEMM gives them for all clusters. That is 1 / beta times the multiplications of a window, in far fewer launches
than one for each cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtr_kernels.ops.gated_norm import gated_norm_backward, gated_norm_forward
from dtr_kernels.ops.window_linear import gelu_linear_backward
from dtr_kernels.surgery.interception import Interception, Refusal, Rule, in_autocast_dtype, take_linear


def _routed_linear(run: Interception, op: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
    *rows, weight, bias, start = args[:8]
    _check(run, [*rows, start], [weight, bias])
    return _RoutedLinear.apply(run, op, *args)


def _routed_mlp(run: Interception, op: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
    _check(run, [*args[:5], args[9]], list(args[5:9]))
    return _RoutedMlp.apply(run, op, *args)


def _check(run: Interception, rows: list[Tensor | None], weights: list[Tensor | None]) -> None:
    run.check_rows(*(tensor for tensor in rows if tensor is not None))
    run.check_no_rows(*weights)
    if any(w is not None and w.requires_grad and not run.is_weight(w) for w in weights):
        raise Refusal("another of its parameters requires grad and is none of params")


def _cast(weights: list[Tensor | None], x: Tensor) -> list[Tensor | None]:
    """As the ops' autocast casts them."""
    return [w if w is None or x.dtype == torch.float64 else in_autocast_dtype(w) for w in weights]


class _RoutedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Interception, op: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
        x, branch, gate, shift, scale, *weights, start = args[:8]
        ctx.run, ctx.weights, ctx.settings = run, weights, args[8:]
        weight, bias = _cast(weights, x)
        stream, out, mean, rstd = op(x, branch, gate, shift, scale, weight, bias, *args[7:])
        ctx.set_materialize_grads(False)
        seen = x if branch is None else stream
        ctx.save_for_backward(seen, branch, gate, shift, scale, weight, mean, rstd, start)
        ctx.mark_non_differentiable(mean, rstd)
        return stream, out, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstream: Tensor | None, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
        stream, branch, gate, shift, scale, weight, mean, rstd, start = ctx.saved_tensors
        width, eps = ctx.settings
        with torch._C.DisableTorchFunction():
            if dout is None:
                dout = stream.new_zeros(*stream.shape[:2], len(weight), dtype=weight.dtype)
            u = gated_norm_forward(stream, None, None, shift, scale, start, width, eps, weight.dtype).u
            taken = ctx.run.collect(ctx.weights, take_linear, dout, u)
            del u
            dx, dbranch, dgate, dshift, dscale, *_ = torch.ops.dtr_kernels.routed_linear_backward(
                None if branch is None else dstream,
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
                width,
                eps,
                need_weight=False,
                need_bias=False,
            )
        if branch is None:
            dbranch = dgate = None
        return None, None, dx, dbranch, dgate, dshift, dscale, *taken, None, None, None, None


class _RoutedMlp(torch.autograd.Function):
    """Not by the op's own backward pass, because fc1's weight gradient needs a product that this keeps inside."""

    @staticmethod
    def forward(ctx: Any, run: Interception, op: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
        x, branch, gate, shift, scale, *weights, start = args[:10]
        ctx.run, ctx.weights = run, weights
        ctx.width, ctx.keep_branch, ctx.eps, _ = args[10:]
        cast = _cast(weights, x)
        stream, out, pre, mean, rstd = op(x, branch, gate, shift, scale, *cast, *args[9:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, branch, gate, shift, scale, cast[0], cast[2], start, pre, mean, rstd)
        ctx.mark_non_differentiable(pre, mean, rstd)
        return stream, out, pre, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstream: Tensor | None, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
        x, branch, gate, shift, scale, fc1_weight, fc2_weight, start, pre, mean, rstd = ctx.saved_tensors
        width, keep_branch, eps = ctx.width, ctx.keep_branch, ctx.eps
        with torch._C.DisableTorchFunction():
            if dout is None:
                dout = x.new_zeros(*x.shape[:2], len(fc2_weight), dtype=fc2_weight.dtype)
            dpre, act = gelu_linear_backward(dout, pre, fc2_weight)
            fc2 = ctx.run.collect(ctx.weights[2:], take_linear, dout, act)
            del act
            u = gated_norm_forward(
                x,
                branch,
                gate,
                shift,
                scale,
                start,
                width,
                eps,
                dpre.dtype,
                keep_branch=keep_branch,
                write_stream=False,
            ).u
            fc1 = ctx.run.collect(ctx.weights[:2], take_linear, dpre, u)
            norm = gated_norm_backward(
                dpre @ fc1_weight,
                dstream,
                None,
                x,
                branch,
                gate,
                scale,
                mean,
                rstd,
                start,
                width,
                keep_branch=keep_branch,
            )
            assert norm.gate is not None
            vectors = norm.gate.to(gate.dtype), norm.shift.to(shift.dtype), norm.scale.to(scale.dtype)
            inputs = norm.x, norm.branch, *vectors
        return None, None, *inputs, *fc1, *fc2, None, None, None, None, None


ROUTED_RULES: dict[Any, Rule] = {
    torch.ops.dtr_kernels.routed_linear.default: _routed_linear,
    torch.ops.dtr_kernels.routed_mlp.default: _routed_mlp,
}
