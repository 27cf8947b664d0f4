"""Check that a cluster's loss depends on its own samples alone, which the one-pass engines rely on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dtr_kernels.surgery.batch import Batch
from dtr_kernels.surgery.interception import Interception, PerCluster, Unsupported
from dtr_kernels.surgery.leaves import gradients_set_aside, other_leaves


class Separation:
    """Detects models that mix or reorder the samples of a batch.

    The one-pass engines assign a layer's rows to clusters by position. So the loss of one cluster alone must leave the
    gradients of all others at exactly zero. Checking that takes a backward pass for each cluster, once for each shape
    of batch.
    """

    def __init__(self) -> None:
        self._found: set[tuple[torch.Size, ...]] = set()

    def check(self, run: Interception, losses: Sequence[Tensor | None], batch: Batch) -> None:
        """Check the losses of a forward pass, one for each cluster, and keep their graph.

        Raises:
            Unsupported: naming a parameter whose gradient comes from another cluster's samples.
        """
        shapes = tuple(tensor.shape for tensor in batch.tensors)
        present = {k: loss for k, loss in enumerate(losses) if loss is not None}
        if shapes in self._found or len(present) < 2:
            return
        finite = True
        for k, loss in present.items():
            sink = _Elsewhere(run.parameters, k, len(losses))
            with gradients_set_aside(other_leaves([loss], run.parameters)):
                run.backward([loss], PerCluster(run.parameters, batch.sizes, sink), retain_graph=True)
            finite &= sink.finite
        if finite:
            self._found.add(shapes)


class _Elsewhere:
    """Detects gradients of other clusters than k."""

    def __init__(self, parameters: Mapping[str, Tensor], k: int, clusters: int) -> None:
        self.finite = True  # 0 times inf proves nothing
        self._parameters, self._k, self._clusters = parameters, k, clusters

    def add(self, name: str, write: Callable[[Tensor], None]) -> None:
        p = self._parameters[name]
        gradients = p.new_zeros(self._clusters, *p.shape)
        write(gradients)
        if not gradients.isfinite().all():
            self.finite = False
            return
        gradients[self._k] = 0
        if gradients.any():
            raise Unsupported(
                f"the loss of cluster {self._k} reaches parameter {name!r} through rows of other clusters: the loss "
                "function mixes the samples of the batch or puts them in another order; use engine='per_cluster'"
            )
