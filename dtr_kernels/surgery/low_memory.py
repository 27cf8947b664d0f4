"""Per-cluster gradients that are never all in memory: first the Gram matrix, then the update by a second backward pass.

PCGrad and other Gram weightings need only G[i, j] = <g_i, g_j>, a sum over parameters. So in the first backward pass
the K gradients of one parameter live only until their Gram matrix is computed. Once the weights are known, the update
sum_k w_k g_k is the gradient of sum_k w_k l_k: an ordinary backward pass of the same graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dtr_kernels import ops
from dtr_kernels.surgery.batch import Batch
from dtr_kernels.surgery.interception import Interception, Whole
from dtr_kernels.surgery.leaves import Leaves, gradients_set_aside, other_leaves
from dtr_kernels.surgery.one_pass import differentiate
from dtr_kernels.surgery.rules import RULES
from dtr_kernels.surgery.separation import Separation


class StreamedGradients:
    """K gradients, of which only the Gram matrix and the graph are kept."""

    def __init__(self, run: Interception, gram: Tensor, losses: Sequence[Tensor | None]) -> None:
        self._run, self._gram, self._losses = run, gram, losses

    def gram(self) -> Tensor:
        return self._gram

    def weighted_sum(self, weights: Tensor) -> list[Tensor]:
        """Return the update. It frees the graph, so it can be called only once."""
        losses = [w.to(loss.dtype) * loss for w, loss in zip(weights, self._losses, strict=True) if loss is not None]
        parameters = self._run.parameters
        others = other_leaves(losses, parameters)  # they got their gradients in the first pass
        with gradients_set_aside([*parameters.values(), *others]):
            self._run.backward(losses, Whole(self._run.samples))
            return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]


def stream(
    parameters: Mapping[str, Tensor],
    loss: Callable[..., Tensor],
    batch: Batch,
    scaled: Callable[[Tensor], Tensor],
    separation: Separation,
    leaves: Leaves,
) -> tuple[StreamedGradients, list[Tensor | None], set[str]]:
    """Return the gradients of ``scaled(mean loss of cluster k)``, and the results of ``one_pass.accumulate``.

    The K gradients of a parameter are held until all its uses in the model (several, if weights are tied) have been
    added.
    """
    run = Interception(parameters, RULES)
    sink = _IntoGram(parameters, len(batch.sizes), run.uses)
    values, losses = differentiate(run, loss, batch, scaled, separation, sink, leaves, retain_graph=True)
    return StreamedGradients(run, sink.finish(), losses), values, set(sink.received)


class _IntoGram:
    """Adds the Gram matrix of each parameter's gradients as soon as these are complete.

    Args:
        uses: how often each parameter was used in the forward pass.
    """

    def __init__(self, parameters: Mapping[str, Tensor], clusters: int, uses: Counter[str]) -> None:
        self.received: Counter[str] = Counter()
        self._parameters, self._clusters, self._uses = parameters, clusters, uses
        device = next(iter(parameters.values())).device
        self._gram = torch.zeros(clusters, clusters, dtype=torch.float64, device=device)
        self._incomplete: dict[str, Tensor] = {}

    def add(self, name: str, write: Callable[[Tensor], None]) -> None:
        gradients = self._incomplete.pop(name, None)
        if gradients is None:
            p = self._parameters[name]
            gradients = p.new_zeros(self._clusters, *p.shape)
        write(gradients)
        self.received[name] += 1
        if self.received[name] == self._uses[name]:
            self._gram += ops.gram(gradients.reshape(self._clusters, -1))
        else:
            self._incomplete[name] = gradients

    def finish(self) -> Tensor:
        """Return the Gram matrix over all parameters."""
        for gradients in self._incomplete.values():  # parameters with a use that the loss does not depend on
            self._gram += ops.gram(gradients.reshape(self._clusters, -1))
        self._incomplete.clear()
        return self._gram
