"""PCGrad on K gradients in two passes over memory (Yu et al., 2020; ANT, section 4).

A projected gradient never leaves the span of the originals, so with the Gram matrix G the whole loop runs on K x K
coefficients C: <g_i', g_j> = (C G)[i, j], and a conflict changes C[i, j] alone. One pass over the gradients computes G
and one applies C; the loop over the gradients themselves would take K (K - 1) passes. ``reference.pcgrad`` is the
reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from dtr_kernels import reference
from dtr_kernels.ops import extension
from dtr_kernels.ops.combine import combine_of, weighted_sum_of
from dtr_kernels.ops.declaration import Draw, Kernel, Work, modes
from dtr_kernels.ops.gradient_lists import (
    CLUSTERS,
    MOST_CLUSTERS,
    FlatGradients,
    Gathered,
    checked,
    choose_surgery,
    current_stream,
    drawn,
    joined,
)
from dtr_kernels.ops.gram_matrix import gram_of
from dtr_kernels.ops.registration import op


@op("pcgrad_coefficients")
def _coefficients(gram: Tensor, order: Tensor) -> Tensor:
    clusters = len(gram)
    # The matrix is fp64 on every path, and on the gradients' device, whose kernels read it.
    path = choose_surgery(gram.device, torch.float32).path
    if path == "plain":
        return _plain_coefficients(gram, order)
    out = torch.empty_like(gram)
    if path == "cpu":
        extension.kernels.pcgrad_coefficients(clusters, gram.data_ptr(), order.data_ptr(), out.data_ptr())
        return out
    with torch.cuda.device(gram.device):
        extension.kernels.cuda.pcgrad_coefficients(
            clusters, gram.data_ptr(), order.data_ptr(), out.data_ptr(), current_stream(gram)
        )
    return out


def _plain_coefficients(gram: Tensor, order: Tensor) -> Tensor:
    """Compute all K rows of C at once, one step of the order after the other."""
    clusters = torch.arange(len(gram), device=gram.device)
    others = clusters[:-1] + (clusters[:-1] >= clusters[:, None])  # row i: all but i, in ascending order
    valid = (order.sort(dim=1).values == others).all(dim=1, keepdim=True)
    C = torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    products = gram.clone()  # (C G)[i, :], kept up to date
    for j in order.where(valid, others).unbind(1):
        product, norm = products.gather(1, j[:, None]), gram.diagonal()[j][:, None]
        step = torch.where((product < 0) & (norm > 0), product / norm, 0.0)
        C.scatter_add_(1, j[:, None], -step)
        products -= step * gram[j]
    return C.masked_fill(~(valid & gram.isfinite().all()), torch.nan)


@_coefficients.register_fake
def _(gram: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(gram)


def random_order(clusters: int, generator: torch.Generator | None = None, device: torch.device | None = None) -> Tensor:
    """Draw the order in which each gradient meets the others, uniformly.

    Args:
        clusters: K, at least 1.
        generator: draws the order on its own device; a CPU generator gives the same orders for gradients anywhere.
            Default: PyTorch's CPU generator; in a CUDA graph, and in code compiled for a GPU, the device's generator,
            so that each replay draws anew.
        device: of the order; the copy does not make the host wait.

    Returns:
        int64 [K, K-1]; row i is a permutation of the other clusters.

    Raises:
        ValueError: if the generator is on a CPU while a CUDA graph is captured.
    """
    source = torch.device("cpu") if generator is None else generator.device
    device = device or source
    if (
        generator is None
        and device.type == "cuda"
        and (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())
    ):
        source = device
    keys = torch.rand(clusters, clusters, generator=generator, device=source, dtype=torch.float32)
    order = keys.fill_diagonal_(2).argsort(dim=1)[:, :-1].contiguous()  # 2 is above every key: i itself comes last
    return _moved(order, device)


def _moved(order: Tensor, device: torch.device) -> Tensor:
    """Return the order on a device; from a CPU to a GPU through pinned memory, so that the host does not wait."""
    if order.device.type != "cpu" or device.type != "cuda" or torch.compiler.is_compiling():
        return order.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"order, or the generator that draws it, must be on {device} while a CUDA graph is captured: every replay "
            "would copy it again from memory of the CPU that is in other use by then"
        )
    return order.pin_memory().to(device, non_blocking=True)


def pcgrad_coefficients(gram: Tensor, order: Tensor) -> Tensor:
    """Return the coefficients of PCGrad's projected gradients: g_i' = sum over j of C[i, j] g_j.

    A gradient of norm 0 changes nothing, and no division by it occurs. If an entry of the matrix is NaN or inf, all
    coefficients are NaN. Computed on the matrix's device without host synchronisation.

    Args:
        gram: [K, K], 1 <= K <= 64; used as fp64.
        order: int [K, K-1]; row i holds the other clusters in the order in which gradient i meets them. It is on the
            matrix's device, as a CUDA graph needs, or on a CPU, from where it is copied. Its values are checked if the
            host need not wait for them; on a GPU a row that is no permutation gives a row of NaN.

    Returns:
        fp64 [K, K]; row i holds the coefficients of g_i'. The column sums are the weights of the update.

    Raises:
        TypeError, ValueError: if an argument is not as described.
    """
    if not isinstance(gram, Tensor) or not gram.is_floating_point():
        raise TypeError(f"gram must be a floating-point tensor, got {getattr(gram, 'dtype', type(gram).__name__)}")
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or not 1 <= len(gram) <= MOST_CLUSTERS:
        raise ValueError(f"gram must be [K, K] with K from 1 to {MOST_CLUSTERS}, got {list(gram.shape)}")
    return _coefficients(gram.detach().double().contiguous(), _checked_order(order, len(gram), gram.device))


def pcgrad_(
    grads: Tensor | Sequence[Sequence[Tensor]],
    order: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Project K gradients in place, each off the gradients that it conflicts with: g_i <- g_i'.

    If the Gram matrix is not finite, the whole result is NaN: after NaN, inf, and products beyond ``gram``'s range. A
    gradient whose elements are all below that range counts as zero and conflicts with none; scale it up.

    Args:
        grads: as in ``gram``; no two tensors may share memory.
        order: as in ``pcgrad_coefficients``; default: ``random_order``.
        generator: for the random order.

    Raises:
        TypeError, ValueError: before anything is written, if an argument is not as described.
    """
    found = checked(grads)
    order = _order_for(found, order, generator)
    combine_of(found, _coefficients(gram_of(found), order))


@overload
def pcgrad_sum(grads: Tensor, order: Tensor | None = ..., generator: torch.Generator | None = ...) -> Tensor: ...
@overload
def pcgrad_sum(
    grads: Sequence[Sequence[Tensor]], order: Tensor | None = ..., generator: torch.Generator | None = ...
) -> list[Tensor]: ...
def pcgrad_sum(
    grads: Tensor | Sequence[Sequence[Tensor]],
    order: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor | list[Tensor]:
    """Return PCGrad's update, the sum of the projected gradients; the gradients themselves stay unchanged.

    If the Gram matrix is not finite, the whole result is NaN: after NaN, inf, and products beyond ``gram``'s range. A
    gradient whose elements are all below that range counts as zero and conflicts with none; scale it up.

    Args:
        grads: as in ``gram``.
        order: as in ``pcgrad_coefficients``; default: ``random_order``.
        generator: for the random order.

    Returns:
        [P] for a [K, P] tensor, else one tensor for each parameter; in the gradients' dtype.

    Raises:
        TypeError, ValueError: if an argument is not as described.
    """
    found = checked(grads)
    order = _order_for(found, order, generator)
    out = weighted_sum_of(found, _coefficients(gram_of(found), order).sum(0))
    return out[0] if isinstance(grads, Tensor) else out


def _order_for(grads: Gathered | FlatGradients, order: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if order is None:
        return random_order(grads.clusters, generator, grads.device)
    return _checked_order(order, grads.clusters, grads.device)


def _checked_order(order: Tensor, clusters: int, device: torch.device) -> Tensor:
    if not isinstance(order, Tensor) or order.is_floating_point() or order.is_complex() or order.dtype == torch.bool:
        raise TypeError(f"order must be an integer tensor, got {getattr(order, 'dtype', type(order).__name__)}")
    if tuple(order.shape) != (clusters, clusters - 1):
        shape = [clusters, clusters - 1]
        raise ValueError(f"order must have shape {shape} for {clusters} gradients, got {list(order.shape)}")
    if order.device.type != "cpu" and order.device != device:
        raise ValueError(f"order is on {order.device}, but the gradients are on {device}; move it there or to the CPU")
    if order.device.type == "cpu" and not torch.compiler.is_compiling():
        for i, row in enumerate(order.tolist()):
            if sorted(row) != [j for j in range(clusters) if j != i]:
                raise ValueError(f"order[{i}] must be a permutation of the clusters other than {i}, got {row}")
    return _moved(order.long().contiguous(), device)


def _projected(grads: Any, order: Tensor) -> Tensor:
    pcgrad_(grads, order)
    return joined(grads)


def _drawn(draw: Draw, lists: bool) -> dict[str, Any]:
    return dict(grads=drawn(draw, lists), order=random_order(draw.sizes.K))


def _drawn_gram(draw: Draw) -> dict[str, Tensor]:
    return dict(gram=reference.gram(joined(drawn(draw, False)).double()), order=random_order(draw.sizes.K))


KERNELS = [
    Kernel(
        "pcgrad_coefficients",
        pcgrad_coefficients,
        reference.pcgrad_coefficients,
        _drawn_gram,
        work=lambda s, items: Work(bytes=8 * s.K * (3 * s.K - 1)),  # two matrices and the order
        sizes=CLUSTERS,
    ),
    Kernel(
        "pcgrad_",
        _projected,
        lambda grads, order: reference.pcgrad(joined(grads), order),
        _drawn,
        modes(lists=(False, True)),
        sizes=CLUSTERS,
        in_place=True,
    ),
    Kernel(
        "pcgrad_sum",
        lambda grads, order: joined(pcgrad_sum(grads, order)),
        lambda grads, order: reference.pcgrad(joined(grads), order).sum(0),
        _drawn,
        modes(lists=(False, True)),
        sizes=CLUSTERS,
    ),
]
