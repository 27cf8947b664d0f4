"""Linear combinations of K gradients: g <- C g in place, and the weighted sum alone.

The compiled kernels (csrc/cpu/surgery.inl, csrc/cuda/surgery.cu) read every gradient once and compute in fp32. Every
product is formed, also with a zero coefficient, so that NaN and inf in a gradient reach the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, overload

import torch
from torch import Tensor

from dtr_kernels.ops import _cpu
from dtr_kernels.ops._gradients import (
    current_stream,
    described,
    flat,
    plain_chunks,
    refuse_shared_memory,
    segments,
    surgery_path,
)
from dtr_kernels.ops._registration import op


@op("combine_", mutates=("grads",))
def _combine(grads: list[Tensor], coefficients: Tensor) -> None:
    clusters = len(coefficients)
    refuse_shared_memory(grads, clusters)
    # So that autograd notices if it has saved one of them for a backward pass.
    torch.autograd.graph.increment_version(grads)
    path = surgery_path(grads[0])
    if path == "plain":
        for _, rows in plain_chunks(grads, clusters):
            for row, combined in zip(rows, coefficients @ torch.stack(rows).double(), strict=True):
                row.copy_(combined)
        return
    gradients = described(grads, clusters)
    if path == "cpu":
        _cpu.kernels.combine(gradients, coefficients.data_ptr())
        return
    with torch.cuda.device(coefficients.device):
        _cpu.kernels.cuda.combine(gradients, coefficients.data_ptr(), current_stream(coefficients))


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
    path = surgery_path(grads[0])
    if path == "plain":
        sums: list[list[Tensor]] = [[] for _ in out]
        for s, rows in plain_chunks(grads, clusters):
            sums[s].append((weights @ torch.stack(rows).double()).to(rows[0].dtype))
        for tensor, parts in zip(out, sums, strict=True):
            torch.cat(parts, out=flat(tensor))
        return out
    gradients, pointers = described(grads, clusters), [tensor.data_ptr() for tensor in out]
    if path == "cpu":
        _cpu.kernels.weighted_sum(gradients, weights.data_ptr(), pointers)
    else:
        with torch.cuda.device(weights.device):
            _cpu.kernels.cuda.weighted_sum(gradients, weights.data_ptr(), pointers, current_stream(weights))
    return out


@_weighted_sum.register_fake
def _(grads: list[Tensor], weights: Tensor) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in grads[:: len(weights)]]


@_weighted_sum.register_flops
def _(grads: list[Any], weights: Any) -> int:
    return 2 * sum(map(prod, grads))


def combine_(grads: Tensor | Sequence[Sequence[Tensor]], coefficients: Tensor) -> None:
    """Replaces K gradients by linear combinations of them, in place: g_i <- sum over j of coefficients[i, j] g_j.

    Args:
        grads: as in ``gram``; no two tensors may share memory.
        coefficients: [K, K], on the gradients' device.

    Raises:
        TypeError, ValueError: before anything is written, if an argument is not as described.
    """
    tensors, clusters = segments(grads)
    _combine(tensors, _matrix("coefficients", coefficients, (clusters, clusters), tensors[0]))


@overload
def weighted_sum(grads: Tensor, weights: Tensor) -> Tensor: ...
@overload
def weighted_sum(grads: Sequence[Sequence[Tensor]], weights: Tensor) -> list[Tensor]: ...
def weighted_sum(grads: Tensor | Sequence[Sequence[Tensor]], weights: Tensor) -> Tensor | list[Tensor]:
    """The sum over k of weights[k] g_k.

    Args:
        grads: as in ``gram``.
        weights: [K], on the gradients' device.

    Returns:
        [P] for a [K, P] tensor, else one tensor for each parameter; in the gradients' dtype.

    Raises:
        TypeError, ValueError: if an argument is not as described.
    """
    tensors, clusters = segments(grads)
    out = _weighted_sum(tensors, _matrix("weights", weights, (clusters,), tensors[0]))
    return out[0] if isinstance(grads, Tensor) else out


def _matrix(name: str, matrix: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        given = getattr(matrix, "dtype", type(matrix).__name__)
        raise TypeError(f"{name} must be a floating-point tensor, got {given}")
    if tuple(matrix.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)} for {shape[0]} gradients, got {list(matrix.shape)}")
    if matrix.device != like.device:
        raise ValueError(f"{name} is on {matrix.device}, but the gradients are on {like.device}; move one of them")
    return matrix.detach().double().contiguous()
