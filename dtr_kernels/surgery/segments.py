"""Rows that are sorted by cluster, and the sums that turn them into one weight gradient for each cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor


class Segments:
    """The division of a batch's samples into clusters.

    Tensors here have m B rows: m rows of the first sample, m of the second, and so on.

    Args:
        sizes: samples of each cluster, in the order of the batch; may be 0.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self.samples = sum(sizes)
        self._clusters: dict[torch.device, Tensor] = {}

    def clusters(self, device: torch.device) -> Tensor:
        """Return the cluster of each sample, int64 [B]."""
        if device not in self._clusters:  # once for each batch: the host waits for the copy to a GPU
            self._clusters[device] = (
                torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes)).to(device)
            )
        return self._clusters[device]

    def parts(self, *tensors: Tensor) -> Iterator[tuple[int, slice, list[Tensor]]]:
        """Yield, for each cluster with samples, its number, its rows, and these rows of each tensor."""
        m, begin = len(tensors[0]) // self.samples, 0
        for k, size in enumerate(self.sizes):
            rows = slice(begin, begin + m * size)
            if size:
                yield k, rows, [tensor[rows] for tensor in tensors]
            begin = rows.stop

    def stacks(self, *tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """Yield neighbouring clusters of equal size together: their numbers, and [clusters, rows per cluster, ...] of
        each tensor."""
        m, k, begin = len(tensors[0]) // self.samples, 0, 0
        for size, group in groupby(self.sizes):
            count = len(list(group))
            end = begin + m * size * count
            if size:
                yield slice(k, k + count), [tensor[begin:end].unflatten(0, (count, -1)) for tensor in tensors]
            k, begin = k + count, end

    def add_products(self, gradients: Tensor, dout: Tensor, x: Tensor) -> None:
        """Add a linear layer's dout_k^T x_k to gradients[k] [K, O, I]; dout [m B, O] and x [m B, I] have one dtype."""
        for which, (g, z) in self.stacks(dout, x):
            if gradients.dtype == g.dtype:
                gradients[which].baddbmm_(g.mT, z)
            else:
                gradients[which] += torch.bmm(g.mT, z)

    def add_sums(self, gradients: Tensor, x: Tensor) -> None:
        """Add the sum of cluster k's rows to gradients[k]; gradients [K, ...] and x [m B, ...]."""
        for which, (z,) in self.stacks(x):
            gradients[which] += z.sum(1, dtype=gradients.dtype)
