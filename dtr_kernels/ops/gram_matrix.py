"""The Gram matrix of K gradients, G[i, j] = <g_i, g_j>: all that PCGrad needs to know of the gradients.

The compiled kernels (csrc/cpu/surgery.inl, csrc/cuda/surgery.cu) read every gradient once. Products are added in fp32
within a lane and in fp64 across lanes and blocks, in an order that depends on the sizes alone: the same gradients give
the same bits, whatever the number of threads. ``reference.gram`` is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from dtr_kernels import reference
from dtr_kernels.ops import extension
from dtr_kernels.ops.declaration import Kernel, Work, modes
from dtr_kernels.ops.gradient_lists import (
    CLUSTERS,
    FlatGradients,
    Gathered,
    checked,
    choose_surgery,
    current_stream,
    described,
    drawn,
    joined,
    plain_chunks,
)
from dtr_kernels.ops.registration import op


@op("gram")
def _gram(grads: list[Tensor], clusters: int) -> Tensor:
    if choose_surgery(grads[0].device, grads[0].dtype).path != "plain":
        return _launch(described(grads, clusters), clusters, grads[0].device)
    out = torch.zeros(clusters, clusters, device=grads[0].device, dtype=torch.float64)
    for _, rows in plain_chunks(grads, clusters):
        wide = torch.stack(rows).double()
        out += wide @ wide.T
    return out


def _launch(gradients: extension.kernels.Gradients, clusters: int, device: torch.device) -> Tensor:
    out = torch.zeros(clusters, clusters, device=device, dtype=torch.float64)
    if device.type == "cpu":
        extension.kernels.gram(gradients, out.data_ptr())
        return out
    with torch.cuda.device(device):
        workspace = torch.empty(
            extension.kernels.cuda.gram_workspace(gradients), device=out.device, dtype=torch.float64
        )
        extension.kernels.cuda.gram(gradients, out.data_ptr(), workspace.data_ptr(), current_stream(out))
    return out


@_gram.register_fake
def _(grads: list[Tensor], clusters: int) -> Tensor:
    return grads[0].new_empty(clusters, clusters, dtype=torch.float64)


@_gram.register_flops
def _(grads: list[Any], clusters: int) -> int:
    return 2 * clusters * sum(map(prod, grads))


def gram_of(grads: Gathered | FlatGradients) -> Tensor:
    """Run ``gram`` on checked gradients."""
    return _launch(grads.described, grads.clusters, grads.device) if isinstance(grads, Gathered) else _gram(*grads)


def gram(grads: Tensor | Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the Gram matrix of K gradients.

    Args:
        grads: [K, P], or K lists of tensors (one list for each gradient, equally shaped), 1 <= K <= 64; fp32, bf16,
            fp16 or fp64, on one device. Rows may have any stride.

    Returns:
        fp64 [K, K], on the gradients' device. NaN and inf in a gradient reach its row and column. The kernels multiply
        in fp32: elements above about 1e19 give inf, elements below about 1e-19 lose digits, and elements below about
        1e-23 count as zero. fp64 gradients are multiplied in fp64.

    Raises:
        TypeError, ValueError: if the gradients are not as described.
    """
    return gram_of(checked(grads))


def _plain(grads: Any) -> Tensor:
    """Compute the Gram matrix in plain PyTorch, with products of 16-bit numbers added in fp32 at least."""
    rows = joined(grads)
    return reference.gram(rows.to(torch.promote_types(rows.dtype, torch.float32)))


KERNELS = [
    Kernel(
        "gram",
        gram,
        _plain,
        lambda draw, lists: dict(grads=drawn(draw, lists)),
        modes(lists=(False, True)),
        work=lambda s, items, **_: Work(bytes=s.K * s.P * items.operand),
        timed=lambda lists: not lists,
        peers={"torch.mm": lambda grads: lambda: grads @ grads.T},
        sizes=CLUSTERS,
    )
]
