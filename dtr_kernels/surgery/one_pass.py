"""Per-cluster gradients by one forward and one backward pass of the whole batch.

Wherever a layer's weight gradient is computed, the samples still stand cluster by cluster, so that the sum over them
can be taken in K parts: for a linear layer dW_k = dY_k^T X_k, a batched GEMM that multiplies no more than dY^T X does.

The model must treat its samples apart from each other, with the batch as dimension 0 of its activations or flattened
with the dimensions behind it, and use its parameters in functions that ``rules`` has a rule for. What cannot be
followed is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from dtr_kernels.surgery.batch import Batch
from dtr_kernels.surgery.buffer import GradientBuffer
from dtr_kernels.surgery.interception import (
    Interception,
    PerCluster,
    Unsupported,
    check_nothing_missed,
    gradients_added_if_all_goes_well,
    gradients_set_aside,
    other_leaves,
)
from dtr_kernels.surgery.rules import RULES
from dtr_kernels.surgery.separation import Separation

__all__ = ["Unsupported", "accumulate"]


def accumulate(
    buffer: GradientBuffer,
    parameters: Mapping[str, Tensor],
    loss: Callable[..., Tensor],
    batch: Batch,
    scaled: Callable[[Tensor], Tensor],
    separation: Separation,
) -> tuple[list[Tensor | None], set[str]]:
    """Adds the gradient of ``scaled(mean loss of cluster k)`` to row k of the buffer, for every k.

    Args:
        buffer: of ``parameters``.
        parameters: whose ``grad`` is as before afterwards, also after an error.
        loss: called with tensors like the batch's, under autocast or not; returns the loss of each sample.
        batch: sorted by cluster.
        scaled: gives the scalar whose gradient is wanted.
        separation: checks the model with the first batch of a shape.

    Returns:
        The mean losses' detached values, None for clusters without samples, and the names of the parameters that got a
        gradient.

    Raises:
        Unsupported: if a parameter is used in a way that has no rule. Except where it goes through functions that
            PyTorch does not show, the buffer is as before then.
        TypeError, ValueError: if the loss is not one for each sample, or depends on no parameter.
    """
    run = Interception(parameters, RULES)
    sink = _IntoBuffer(buffer, parameters, len(batch.sizes))
    with gradients_set_aside(parameters.values()):
        means = run.mean_losses(loss, batch)
        separation.check(run, parameters, means, batch)
        losses = [scaled(mean) for mean in means if mean is not None]
        with gradients_added_if_all_goes_well(other_leaves(losses, parameters)):
            run.backward(losses, PerCluster(parameters, batch.sizes, sink))
            check_nothing_missed(parameters)
    return [None if mean is None else mean.detach() for mean in means], sink.received


class _IntoBuffer:
    """Adds to the rows of a buffer."""

    def __init__(self, buffer: GradientBuffer, parameters: Mapping[str, Tensor], clusters: int) -> None:
        self.received: set[str] = set()
        self._rows = [buffer.row(k) for k in range(clusters)]
        self._numbers = {name: i for i, name in enumerate(parameters)}

    def add(self, name: str, write: Callable[[Tensor], None]) -> None:
        first, *others = (row[self._numbers[name]] for row in self._rows)
        distance = others[0].storage_offset() - first.storage_offset() if others else 0
        write(first.as_strided((len(self._rows), *first.shape), (distance, *first.stride())))
        self.received.add(name)
