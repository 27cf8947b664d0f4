"""Rules for PyTorch's functions of weights and samples: how they are computed, and the gradients of their weights.

Each function runs once for the whole batch, with detached weights and PyTorch's own gradient of its input. The rules
add the weights' gradients, cluster by cluster:

- linear, matmul: batched GEMMs, one for each run of equally large clusters.
- norms with affine parameters: the normalised input is recomputed, then summed over each cluster's rows.
- embedding, indexing: one scatter into all K gradients.
- convolutions: one backward call for each cluster.
- elementwise functions: each row gets its own view of the weight, so that autograd sums over everything else.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtr_kernels.routing import is_integer
from dtr_kernels.surgery.interception import Interception, Refusal, Rule, in_autocast_dtype, take_linear
from dtr_kernels.surgery.layout import functions, replaced, tensors_in
from dtr_kernels.surgery.routed_rules import ROUTED_RULES
from dtr_kernels.surgery.segments import Segments

# --- matrix multiplications ------------------------------------------------------------------------------------------


def _linear(run: Interception, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    run.check_rows(input)
    run.check_no_rows(weight, bias)
    if input.dim() < 2:
        raise Refusal(f"its input has shape {list(input.shape)}, without a dimension for the batch")
    x = in_autocast_dtype(input)
    return run.tap(F.linear(x, run.frozen(weight), run.frozen(bias)), (weight, bias), [x], take_linear)


def _matmul(run: Interception, func: Any, input: Tensor, other: Tensor) -> Tensor:
    if not run.is_weight(other) or other.dim() != 2:
        raise Refusal(f"only samples @ matrix is covered, not shapes {list(input.shape)} and {list(other.shape)}")
    return _linear(run, func, input, run.derived(other.mT, other))


def _addmm(
    run: Interception, func: Any, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    if input.dim() != 1 or beta != 1 or alpha != 1:
        raise Refusal("only bias [O] + samples @ matrix is covered")
    return _linear(run, func, mat1, run.derived(mat2.mT, mat2), input)


# --- convolutions ----------------------------------------------------------------------------------------------------


def _convolution(
    run: Interception, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    run.check_rows(input)
    run.check_no_rows(weight, bias)
    if input.dim() != weight.dim():
        raise Refusal(f"its input has shape {list(input.shape)}, without a dimension for the batch")
    transposed = "transpose" in func.__name__
    names = "stride padding output_padding groups dilation" if transposed else "stride padding dilation groups"
    given: dict[str, Any] = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
    given |= dict(zip(names.split(), args, strict=False)) | kwargs
    sizes, groups = weight.shape[2:], given.pop("groups")
    given["padding"] = _padding(given["padding"], given["dilation"], sizes)
    stride, padding, output_padding, dilation = (_each(value, sizes) for value in given.values())
    settings = stride, padding, dilation, transposed, output_padding, groups
    x, frozen = in_autocast_dtype(input), in_autocast_dtype(run.frozen(weight))
    frozen_bias = None if bias is None else in_autocast_dtype(run.frozen(bias))

    def take_gradients(take: Any, dout: Tensor, x: Tensor) -> None:
        def add(gradients: Tensor, segments: Segments) -> None:
            for k, _, (g, z) in segments.parts(dout, x):
                wanted = [False, True, False]
                gradients[k] += torch.ops.aten.convolution_backward(g, z, frozen, None, *settings, wanted)[1]

        take(0, add)
        take(1, lambda gradients, segments: segments.add_sums(gradients, dout.flatten(2).sum(2, dtype=gradients.dtype)))

    return run.tap(torch.convolution(x, frozen, frozen_bias, *settings), (weight, bias), [x], take_gradients)


def _each(value: Any, sizes: Sequence[int]) -> list[int]:
    """Return one number for every spatial dimension."""
    values = [int(value)] if is_integer(value) else list(value)
    return values * len(sizes) if len(values) == 1 else values


def _padding(padding: Any, dilation: Any, sizes: Sequence[int]) -> list[int]:
    if padding == "valid":
        return _each(0, sizes)
    if padding != "same":
        return _each(padding, sizes)
    both = [d * (size - 1) for d, size in zip(_each(dilation, sizes), sizes, strict=True)]
    if any(total % 2 for total in both):
        raise Refusal("padding='same' pads its two sides differently")
    return [total // 2 for total in both]


# --- norms -----------------------------------------------------------------------------------------------------------


def _norm(run: Interception, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Compute a norm, followed by its affine weight and bias."""
    arguments = inspect.signature(func).bind(*args, **kwargs).arguments
    if arguments.get("training"):
        raise Refusal("the norm mixes the samples of a batch")
    x, weight, bias = arguments.pop("input"), arguments.pop("weight", None), arguments.pop("bias", None)
    run.check_rows(x)
    run.check_no_rows(*arguments.values(), weight, bias)
    # The weight has one entry for each channel, dimension 1, or the shape of the last dimensions.
    by_channel = func in (F.group_norm, F.batch_norm)

    def take_gradients(take: Any, dout: Tensor, x: Tensor) -> None:
        wide = torch.promote_types(x.dtype, torch.float32)

        def in_rows(t: Tensor) -> Tensor:
            t = t.movedim(1, -1) if by_channel else t
            return t.flatten(0, -2) if by_channel else t.flatten(0, -1 - len(arguments["normalized_shape"]))

        def add_products(gradients: Tensor, segments: Segments) -> None:
            normalised = func(x.to(wide), **replaced(dict(arguments), lambda statistic: statistic.to(wide)))
            segments.add_sums(gradients, in_rows(dout * normalised))

        take(0, add_products)
        take(1, lambda gradients, segments: segments.add_sums(gradients, in_rows(dout)))

    affine = {name: run.frozen(w) for name, w in (("weight", weight), ("bias", bias)) if w is not None}
    return run.tap(func(x, **arguments, **affine), (weight, bias), [x], take_gradients)


# --- tables ----------------------------------------------------------------------------------------------------------


def _embedding(
    run: Interception,
    func: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise Refusal("max_norm, scale_grad_by_freq and sparse are not covered")
    return _looked_up(run, weight, input, padding_idx)


def _getitem(run: Interception, func: Any, input: Tensor, index: Any) -> Tensor:
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        raise Refusal("only weight[integer tensor] and indices that do not depend on the batch are covered")
    return _looked_up(run, input, index, None)


def _looked_up(run: Interception, table: Tensor, index: Tensor, padding: int | None) -> Tensor:
    """Return table[index]; entries at ``padding`` get no gradient."""
    run.check_rows(index)
    run.check_no_rows(table)

    def take_gradients(take: Any, dout: Tensor, index: Tensor) -> None:
        entry = index.flatten()
        values = dout.reshape(len(entry), *table.shape[1:])
        if padding is not None:
            values = values.masked_fill((entry == padding % len(table))[:, None], 0)

        def add(gradients: Tensor, segments: Segments) -> None:
            cluster = segments.clusters(entry.device).repeat_interleave(len(entry) // segments.samples)
            gradients.index_put_((cluster, entry), values.to(gradients.dtype), accumulate=True)

        take(0, add)

    return run.tap(table.detach()[index], (table,), [index], take_gradients)


# --- elementwise functions -------------------------------------------------------------------------------------------


def _elementwise(run: Interception, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    if func.__name__.endswith("_") and run.is_weight(args[0]):
        raise Refusal("it changes a weight in place")
    tensors = list(tensors_in((*args, *kwargs.values())))
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    rows = [tensor for tensor in tensors if run.has_rows(tensor)]
    run.check_rows(*rows)
    if any(tensor.dim() != len(shape) or len(tensor) != shape[0] for tensor in rows):
        raise Refusal(f"shapes {[list(tensor.shape) for tensor in tensors]} do not have the batch in one dimension")

    def per_row(tensor: Tensor) -> Tensor:
        return _PerRow.apply(run, tensor, shape[0], len(shape)) if run.is_weight(tensor) else tensor

    out = func(*replaced(args, per_row), **replaced(kwargs, per_row))
    # PyTorch treats a weight without dimensions as a number, which does not promote the dtype of the others.
    dtypes = [tensor.dtype for tensor in tensors if tensor.dim() and tensor.is_floating_point()]
    return out.to(reduce(torch.promote_types, dtypes)) if dtypes and out.is_floating_point() else out


def _cat(run: Interception, func: Any, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    rows = [tensor for tensor in tensors if run.has_rows(tensor)]
    run.check_rows(*rows)
    if dim % rows[0].dim() == 0 or any(len(tensor) != len(rows[0]) for tensor in tensors):
        raise Refusal("it puts weights between the samples of the batch")
    return func([_PerRow.apply(run, t, len(t), t.dim()) if run.is_weight(t) else t for t in tensors], dim)


class _PerRow(torch.autograd.Function):
    """A weight as [rows, ...]: each row sees the whole weight or, if the weight itself has as many rows, its own."""

    @staticmethod
    def forward(ctx: Any, run: Interception, weight: Tensor, rows: int, dims: int) -> Tensor:
        aligned = weight.reshape((1,) * (dims - weight.dim()) + tuple(weight.shape))
        ctx.run, ctx.weight, ctx.own_rows = run, weight, len(aligned) == rows
        ctx.set_materialize_grads(False)
        return aligned.expand(rows, *aligned.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
        if dout is None:
            return None, None, None, None

        def add(gradients: Tensor, segments: Segments) -> None:
            if ctx.own_rows:
                for k, rows, (part,) in segments.parts(dout):
                    gradients[k, rows] += part
            else:
                segments.add_sums(gradients.view(len(gradients), *dout.shape[1:]), dout)

        (gradient,) = ctx.run.collect([ctx.weight], lambda take: take(0, add))
        return None, gradient, None, None


RULES: dict[Any, Rule] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    Tensor.__getitem__: _getitem,
    **dict.fromkeys(functions("matmul __matmul__ mm", torch, Tensor), _matmul),
    **dict.fromkeys(
        functions("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d", F), _convolution
    ),
    **dict.fromkeys(functions("layer_norm group_norm rms_norm batch_norm", F), _norm),
    **dict.fromkeys(functions("cat concat concatenate", torch), _cat),
    **dict.fromkeys(
        functions(
            "add sub subtract rsub mul multiply div divide true_divide pow maximum minimum where lerp addcmul addcdiv "
            "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __pow__ __rpow__ "
            "add_ sub_ mul_ div_ __iadd__ __isub__ __imul__ __itruediv__",
            torch,
            Tensor,
        ),
        _elementwise,
    ),
    **ROUTED_RULES,
}
