"""Measure whether a part of the timesteps would be better off with its own model (ANT, observation O2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dtr_kernels.analysis.bar import ticking

if TYPE_CHECKING:
    from dtr_kernels.clusters import IntervalClusters
    from dtr_kernels.continuous import ContinuousClusters


def negative_transfer_gaps(
    distance: Callable[[nn.Module], float],
    shared: nn.Module,
    specialists: Iterable[nn.Module | None],
    clusters: IntervalClusters | ContinuousClusters,
    *,
    progress: bool = True,
) -> Tensor:
    """Return the negative transfer gap of each cluster of timesteps (ANT, section 3, observation O2).

        gap[k] = distance(shared model, with cluster k denoised by specialists[k]) - distance(shared model)

    Negative: the specialist, trained on that cluster alone, does better, so learning the other timesteps as well has
    hurt the shared model. That is NEGATIVE TRANSFER. Positive: sharing has helped.

    Args:
        distance: returns a number that is lower for a better model: the Fréchet distance between its samples and the
            data, as in the paper, or a denoising loss. It is called once with ``shared``, and with an
            ``IntervalSpecialist`` for each specialist. Gaps are small differences, so use the same random numbers in
            each call.
        shared: the model trained on all timesteps, called with (x, t, ...).
        specialists: K models, each trained on the timesteps of one cluster; None leaves a cluster out.
        clusters: the K clusters, from ``interval_clusters``, or from ``continuous_clusters`` if t is continuous time.
        progress: show a bar over the calls of distance, if tqdm is installed.

    Returns:
        fp64 [K], NaN for clusters without a specialist.

    Raises:
        ValueError: if there are not K specialists.
    """
    specialists = list(specialists)
    if len(specialists) != clusters.num_clusters:
        raise ValueError(
            f"specialists must have {clusters.num_clusters} entries, one for each cluster (None for one without), got "
            f"{len(specialists)}"
        )
    gaps = torch.full((len(specialists),), torch.nan, dtype=torch.float64)
    # The outer intervals have no end: continuous times may be rounded past either, and the last one holds t = 1.
    edges = (-math.inf, *clusters.bounds[1:-1], math.inf)
    present = {k: specialist for k, specialist in enumerate(specialists) if specialist is not None}
    with ticking(1 + len(present), 0, "models", progress) as tick:
        of_shared = float(distance(shared))
        tick()
        for k, specialist in present.items():
            gaps[k] = float(distance(IntervalSpecialist(shared, specialist, *edges[k : k + 2]))) - of_shared
            tick()
    return gaps


class IntervalSpecialist(nn.Module):
    """A model that leaves the timesteps from ``start`` up to but not including ``stop`` to another model.

    Args:
        shared: denoises the other timesteps. Both are called with (x, t, ...), like a DiT, and return [B, ...].
        specialist: denoises the timesteps in the interval.
        start, stop: the interval.

    Raises:
        ValueError: if the interval is empty.
    """

    def __init__(self, shared: nn.Module, specialist: nn.Module, start: float, stop: float) -> None:
        super().__init__()
        if start >= stop:
            raise ValueError(f"start must be less than stop, got {start} and {stop}")
        self.shared = shared
        self.specialist = specialist
        self.start = start
        self.stop = stop

    def forward(self, x: Tensor, t: Tensor | int | float, *args: Any, **kwargs: Any) -> Tensor:
        """Run each model on its own samples, and return all results in the order of the batch.

        Args:
            x: [B, ...].
            t: timesteps [B], for which the host waits, or one number for the whole batch.
            args, kwargs: passed on; for a tensor [B, ...] among them each model gets its own samples.

        Raises:
            ValueError: if t is a tensor of another shape.
        """
        return self._run(lambda model: model, x, t, args, kwargs)

    def forward_with_cfg(self, x: Tensor, t: Tensor | int | float, *args: Any, **kwargs: Any) -> Tensor:
        """Run both models' ``forward_with_cfg`` in the same way: the second half of the batch repeats the first's t."""
        return self._run(attrgetter("forward_with_cfg"), x, t, args, kwargs)

    def _run(
        self,
        method: Callable[[Any], Callable[..., Tensor]],
        x: Tensor,
        t: Tensor | int | float,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        if not isinstance(t, Tensor):
            model = self.specialist if self._inside(torch.tensor(t, device="cpu")) else self.shared
            return method(model)(x, t, *args, **kwargs)
        B = len(x)
        if t.shape != (B,):
            raise ValueError(f"t must have shape [{B}], one timestep per sample of x, got {list(t.shape)}")
        inside = self._inside(t)
        order, outputs = [], []
        for model, own in (self.specialist, inside), (self.shared, ~inside):
            samples = own.nonzero()[:, 0]
            if len(samples):
                part = partial(_samples_of, samples, B)
                given = {name: part(value) for name, value in kwargs.items()}
                outputs.append(method(model)(part(x), part(t), *map(part, args), **given))
                order.append(samples)
        out = torch.cat(outputs)
        return out[torch.cat(order).argsort().to(out.device)]

    def _inside(self, t: Tensor) -> Tensor:
        """Return which timesteps are in the interval. Continuous times are compared in fp32, as in ``assign``."""
        t = t.float() if t.is_floating_point() else t
        return (self.start <= t) & (t < self.stop)


def _samples_of(samples: Tensor, batch_size: int, value: Any) -> Any:
    """Return the given samples of a tensor [B, ...]; any other value as it is."""
    if isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch_size:
        return value[samples.to(value.device)]
    return value
