"""Linear combinations of K gradients: g <- C g in place, and the weighted sum alone.

The compiled kernels (csrc/cpu/surgery.inl, csrc/cuda/surgery.cu) read every gradient once and compute in fp32. Every
product is formed, also with a zero coefficient, so that NaN and inf in a gradient reach the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, overload

import torch
from torch import Tensor

from dtr_kernels.ops import extension
from dtr_kernels.ops.declaration import Draw, Kernel, Work, modes
from dtr_kernels.ops.gradient_lists import (
    CLUSTERS,
    FlatGradients,
    Gathered,
    checked,
    choose_surgery,
    current_stream,
    described,
    drawn,
    flat,
    flattened,
    joined,
    plain_chunks,
    refuse_shared_memory,
)
from dtr_kernels.ops.registration import op


@op("combine_", mutates=("grads",))
def _combine(grads: list[Tensor], coefficients: Tensor) -> None:
    clusters = len(coefficients)
    refuse_shared_memory(grads, clusters)
    # Autograd then notices if it has saved a gradient for a backward pass.
    torch.autograd.graph.increment_version(grads)
    if choose_surgery(grads[0].device, grads[0].dtype).path != "plain":
        _launch_combine(described(grads, clusters), coefficients)
        return
    for _, rows in plain_chunks(grads, clusters):
        for row, combined in zip(rows, coefficients @ torch.stack(rows).double(), strict=True):
            row.copy_(combined)


def _launch_combine(gradients: extension.kernels.Gradients, coefficients: Tensor) -> None:
    if coefficients.device.type == "cpu":
        extension.kernels.combine(gradients, coefficients.data_ptr())
        return
    with torch.cuda.device(coefficients.device):
        extension.kernels.cuda.combine(gradients, coefficients.data_ptr(), current_stream(coefficients))


@_combine.register_fake
def _(grads: list[Tensor], coefficients: Tensor) -> None:
    return None


@_combine.register_flops
def _(grads: list[Any], coefficients: Any) -> int:
    return 2 * coefficients[0] * sum(map(prod, grads))


@op("weighted_sum")
def _weighted_sum(grads: list[Tensor], weights: Tensor) -> list[Tensor]:
    clusters = len(weights)
    out = [torch.empty_like(tensor) for tensor in grads[::clusters]]
    if choose_surgery(grads[0].device, grads[0].dtype).path != "plain":
        _launch_weighted_sum(described(grads, clusters), weights, out)
        return out
    sums: list[list[Tensor]] = [[] for _ in out]
    for s, rows in plain_chunks(grads, clusters):
        sums[s].append((weights @ torch.stack(rows).double()).to(rows[0].dtype))
    for tensor, parts in zip(out, sums, strict=True):
        torch.cat(parts, out=flat(tensor))
    return out


def _launch_weighted_sum(gradients: extension.kernels.Gradients, weights: Tensor, out: list[Tensor]) -> None:
    pointers = [tensor.data_ptr() for tensor in out]
    if weights.device.type == "cpu":
        extension.kernels.weighted_sum(gradients, weights.data_ptr(), pointers)
        return
    with torch.cuda.device(weights.device):
        extension.kernels.cuda.weighted_sum(gradients, weights.data_ptr(), pointers, current_stream(weights))


@_weighted_sum.register_fake
def _(grads: list[Tensor], weights: Tensor) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in grads[:: len(weights)]]


@_weighted_sum.register_flops
def _(grads: list[Any], weights: Any) -> int:
    return 2 * sum(map(prod, grads))


def combine_of(grads: Gathered | FlatGradients, coefficients: Tensor) -> None:
    """Run ``combine_`` on checked gradients."""
    if isinstance(grads, Gathered):
        try:
            _launch_combine(grads.described, coefficients)
        except ValueError:  # Some share memory; the op's error says which.
            grads = flattened(grads.rows)
        else:
            torch.autograd.graph.increment_version([tensor for row in grads.rows for tensor in row])
            return
    _combine(grads.tensors, coefficients)


def weighted_sum_of(grads: Gathered | FlatGradients, weights: Tensor) -> list[Tensor]:
    """Run ``weighted_sum`` on checked gradients; return one tensor for each segment."""
    if isinstance(grads, FlatGradients):
        return _weighted_sum(grads.tensors, weights)
    out = _empty_like(grads.rows[0], grads.described.sizes)
    _launch_weighted_sum(grads.described, weights, out)
    return out


def _empty_like(tensors: Sequence[Tensor], sizes: list[int]) -> list[Tensor]:
    """Allocate uninitialised tensors; on a CPU as parts of one allocation, which is faster than separate ones."""
    if tensors[0].device.type != "cpu":  # GPU kernels are faster on aligned tensors
        return [torch.empty_like(tensor) for tensor in tensors]
    parts = torch.unsafe_split_with_sizes(tensors[0].new_empty(sum(sizes)), sizes)
    return [
        part if tensor.dim() == 1 else part.as_strided(tensor.shape, tensor.stride())
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def combine_(grads: Tensor | Sequence[Sequence[Tensor]], coefficients: Tensor) -> None:
    """Replace K gradients by linear combinations of them, in place: g_i <- sum over j of coefficients[i, j] g_j.

    Args:
        grads: as in ``gram``; no two tensors may share memory.
        coefficients: [K, K], on the gradients' device.

    Raises:
        TypeError, ValueError: before anything is written, if an argument is not as described.
    """
    found = checked(grads)
    combine_of(found, _matrix("coefficients", coefficients, (found.clusters, found.clusters), found.device))


@overload
def weighted_sum(grads: Tensor, weights: Tensor) -> Tensor: ...
@overload
def weighted_sum(grads: Sequence[Sequence[Tensor]], weights: Tensor) -> list[Tensor]: ...
def weighted_sum(grads: Tensor | Sequence[Sequence[Tensor]], weights: Tensor) -> Tensor | list[Tensor]:
    """Return the sum over k of weights[k] g_k.

    Args:
        grads: as in ``gram``.
        weights: [K], on the gradients' device.

    Returns:
        [P] for a [K, P] tensor, else one tensor for each parameter; in the gradients' dtype.

    Raises:
        TypeError, ValueError: if an argument is not as described.
    """
    found = checked(grads)
    out = weighted_sum_of(found, _matrix("weights", weights, (found.clusters,), found.device))
    return out[0] if isinstance(grads, Tensor) else out


def _matrix(name: str, matrix: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        given = getattr(matrix, "dtype", type(matrix).__name__)
        raise TypeError(f"{name} must be a floating-point tensor, got {given}")
    if tuple(matrix.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)} for {shape[0]} gradients, got {list(matrix.shape)}")
    if matrix.device != device:
        raise ValueError(f"{name} is on {matrix.device}, but the gradients are on {device}; move one of them")
    return matrix.detach().double().contiguous()


def _combined(grads: Any, coefficients: Tensor) -> Tensor:
    combine_(grads, coefficients)
    return joined(grads)


def _drawn(draw: Draw, lists: bool, shape: Callable[[int], tuple[int, ...]]) -> tuple[Any, Tensor]:
    coefficients = torch.randn(shape(draw.sizes.K), dtype=torch.float64).to(draw.device)
    return drawn(draw, lists), coefficients


KERNELS = [
    Kernel(
        "combine_",
        _combined,
        lambda grads, coefficients: coefficients.to((rows := joined(grads)).dtype) @ rows,
        lambda draw, lists: dict(zip(("grads", "coefficients"), _drawn(draw, lists, lambda K: (K, K)), strict=True)),
        modes(lists=(False, True)),
        work=lambda s, items, **_: Work(bytes=2 * s.K * s.P * items.operand),
        timed=lambda lists: not lists,
        peers={
            "torch.mm, not in place": lambda grads, coefficients: partial(torch.mm, coefficients.to(grads.dtype), grads)
        },
        sizes=CLUSTERS,
        in_place=True,
    ),
    Kernel(
        "weighted_sum",
        lambda grads, weights: joined(weighted_sum(grads, weights)),
        lambda grads, weights: weights.to((rows := joined(grads)).dtype) @ rows,
        lambda draw, lists: dict(zip(("grads", "weights"), _drawn(draw, lists, lambda K: (K,)), strict=True)),
        modes(lists=(False, True)),
        work=lambda s, items, **_: Work(bytes=(s.K + 1) * s.P * items.operand),
        timed=lambda lists: not lists,
        peers={"torch.mv": lambda grads, weights: partial(torch.mv, grads.T, weights.to(grads.dtype))},
        sizes=CLUSTERS,
    ),
]
