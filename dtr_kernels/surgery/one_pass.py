"""Per-cluster gradients by one forward and one backward pass of the whole batch.

When a layer's weight gradient is computed, the samples are still sorted by cluster, so that the sum over them can be
taken in K parts: for a linear layer dW_k = dY_k^T X_k, a batched GEMM with as many multiplications as dY^T X.

The model must treat its samples separately, with the batch as dimension 0 of its activations or flattened with the next
dimensions, and use its parameters in functions that ``rules`` has a rule for. Anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from dtr_kernels.surgery import interception
from dtr_kernels.surgery.batch import Batch
from dtr_kernels.surgery.buffer import GradientBuffer
from dtr_kernels.surgery.interception import Interception, PerCluster, Sink, Unsupported
from dtr_kernels.surgery.leaves import Leaves, gradients_set_aside, other_leaves
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
    leaves: Leaves,
) -> tuple[list[Tensor | None], set[str]]:
    """Add the gradient of ``scaled(mean loss of cluster k)`` to gradient k of the buffer, for every k.

    Returns:
        The mean losses' detached values, None for clusters without samples, and the names of the parameters that got a
        gradient.

    Raises:
        Unsupported, TypeError, ValueError: as ``differentiate``. The buffer is then unchanged, unless a parameter goes
            through functions that PyTorch does not show.
    """
    sink = _IntoBuffer(buffer, parameters, len(batch.sizes))
    values, _ = differentiate(Interception(parameters, RULES), loss, batch, scaled, separation, sink, leaves)
    return values, sink.received


def differentiate(
    run: Interception,
    loss: Callable[..., Tensor],
    batch: Batch,
    scaled: Callable[[Tensor], Tensor],
    separation: Separation,
    sink: Sink,
    leaves: Leaves,
    retain_graph: bool = False,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Hand the gradients of ``scaled(mean loss of cluster k)`` to ``sink``, for every k.

    Args:
        run: of the parameters; their ``grad`` is unchanged afterwards, also after an error.
        loss: called with tensors like the batch's, with or without autocast; returns the loss of each sample.
        scaled: maps a mean loss to the scalar to differentiate.
        separation: checks the model with the first batch of a shape.
        leaves: collects the gradients of leaves that are not parameters.

    Returns:
        The mean losses' detached values and the results of ``scaled``, None for clusters without samples.

    Raises:
        Unsupported: if a parameter is used in a way that has no rule.
        TypeError, ValueError: if loss does not return one loss for each sample, or it depends on no parameter.
    """
    with gradients_set_aside(run.parameters.values()):
        means = run.mean_losses(loss, batch)
        others = other_leaves([mean for mean in means if mean is not None], run.parameters)
        if any(leaf._post_accumulate_grad_hooks for leaf in others):  # type: ignore[attr-defined]
            raise Unsupported(
                "a parameter that is not in params has a hook, which the passes that look at the model would run too; "
                "use engine='per_cluster'"
            )
        leaves.collect(others)
        separation.check(run, means, batch)
        losses = [None if mean is None else scaled(mean) for mean in means]
        present = [loss for loss in losses if loss is not None]
        run.backward(present, PerCluster(run.parameters, batch.sizes, sink), retain_graph)
        interception.check_nothing_missed(run.parameters)
    return [None if mean is None else mean.detach() for mean in means], losses


class _IntoBuffer:
    """Adds to the gradients of a buffer."""

    def __init__(self, buffer: GradientBuffer, parameters: Mapping[str, Tensor], clusters: int) -> None:
        self.received: set[str] = set()
        self._gradients = [buffer.gradient(k) for k in range(clusters)]
        self._numbers = {name: i for i, name in enumerate(parameters)}

    def add(self, name: str, write: Callable[[Tensor], None]) -> None:
        first, *others = (gradient[self._numbers[name]] for gradient in self._gradients)
        distance = others[0].storage_offset() - first.storage_offset() if others else 0
        write(first.as_strided((len(self._gradients), *first.shape), (distance, *first.stride())))
        self.received.add(name)
