"""Clusters of continuous time: intervals of t in [0, 1], as in flow matching."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from dtr_kernels.clusters import Clusters
from dtr_kernels.quoting import quoted
from dtr_kernels.routing import check_number, check_range, is_integer

__all__ = ["ContinuousClusters", "continuous_clusters"]

# Time at log SNR l, for each process whose log SNR can be split into equal parts.
_TIMES = {
    "flow": lambda l: 1 / (1 + math.exp(l / 2)),
    "cosine": lambda l: 2 / math.pi * math.atan(math.exp(-l / 2)),
}
SPACINGS = ("time", *_TIMES)
# Each cluster is a comparison in ``assign``.
_MOST_CLUSTERS = 10_000
# Beyond it fp32 cannot distinguish times at either end.
_LARGEST_LOG_SNR = 100.0
# The least probability of a cluster under a normal distribution that fp64 can divide by.
_LEAST_PROBABILITY = 1e-290


@dataclass(frozen=True)
class ContinuousClusters(Clusters):
    """K contiguous intervals that cover the times [0, 1], 0 being the clean image.

    Attributes:
        bounds: K + 1 edges, 0 = b[0] < b[1] < ... < b[K] = 1, also in fp32; cluster k holds the times
            b[k] <= t < b[k + 1], the last one also t = 1. Times are compared with the bounds in fp32.

    Raises:
        ValueError: if bounds is not as described.
    """

    bounds: tuple[float, ...]

    def __post_init__(self) -> None:
        edges = _floats(self.bounds)
        ascending = all(np.float32(first) < np.float32(end) for first, end in pairwise(edges))
        if edges[:1] != (0,) or edges[-1:] != (1,) or not ascending:
            raise ValueError(
                "bounds must be a sequence of numbers that begins with 0 and ascends to 1, also where it is rounded to "
                f"fp32, such as (0, 0.875, 1), got {quoted(self.bounds)}"
            )
        object.__setattr__(self, "bounds", edges)

    @overload
    def assign(self, t: Tensor) -> Tensor: ...

    @overload
    def assign(self, t: float) -> int: ...

    def assign(self, t: Tensor | float) -> Tensor | int:
        """Return the cluster of every time, computed on t's device without a host synchronisation.

        Args:
            t: floating-point tensor [B] of times in [0, 1] on any device, or one Python or NumPy float. Times may be
                rounded past either end.

        Returns:
            int64 [B] of clusters 0..K-1 on t's device; an int for a float.

        Raises:
            ValueError: if t is out of range or NaN (on a GPU: a device-side assertion, so that nothing waits), has
                another shape, or holds integers.
            TypeError: if t is neither a tensor nor a number.
        """
        if not isinstance(t, Tensor):
            return self._assign_one(t)
        if not t.is_floating_point():
            raise ValueError(_not_continuous(t.dtype))
        if t.dim() != 1:
            raise ValueError(f"t must be a vector [B] of times, got {t.dtype} of shape {list(t.shape)}")
        times: Tensor = torch.ops.dtr_kernels.checked_times(t)
        clusters = torch.zeros_like(times, dtype=torch.int64)
        for bound in self.bounds[1:-1]:
            clusters += times >= bound
        return clusters

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        *,
        logit_normal: tuple[float, float] | None = None,
    ) -> Tensor:
        """Draw the times of a training batch, balanced over the clusters.

        Each cluster gets floor or ceil(B / K) times, B in all, in random order. The clusters that get one more are
        random.

        Args:
            batch_size: B, at least 1; may be less than K.
            generator: draws on its own device; a CPU generator gives the same times for every ``device``.
                Default: PyTorch's generator of ``device``, which needs no copy and no wait.
            device: of the times. Default: the generator's, or PyTorch's default device.
            logit_normal: mean and standard deviation of a normal distribution of log(t / (1 - t)), such as (0, 1)
                (Esser et al., 2024, section 3.1). Each cluster's times follow it exactly, restricted to the cluster,
                while clusters still come equally often. Default: uniform within each cluster.

        Returns:
            fp32 [B].

        Raises:
            ValueError: if batch_size is not a positive integer below 2**63, logit_normal is not two finite numbers
                with the second above 0, or a cluster holds less than 1e-290 of the probability because it is so far
                from the mean.
            TypeError: if generator is something else, such as a seed.
        """
        normal = None if logit_normal is None else _checked_normal(logit_normal)

        def draw(k: int, n: int, source: torch.device | str | None) -> Tensor:
            first, end = self.bounds[k : k + 2]
            u = torch.rand(n, dtype=torch.float64, generator=generator, device=source)
            t = first + (end - first) * u if normal is None else _logit_normal(u, first, end, *normal)
            last = np.nextafter(np.float32(end), np.float32(0))  # t may be rounded to the next cluster's
            return t.float().clamp(float(np.float32(first)), float(last))

        return self._evenly(batch_size, generator, device, draw)

    def _assign_one(self, t: Any) -> int:
        if is_integer(t):
            raise ValueError(_not_continuous(type(t).__name__))
        if isinstance(t, bool) or not isinstance(t, Real):
            raise TypeError(f"t must be a floating-point tensor [B] or a float, got {type(t).__name__}")
        return int(self.assign(torch.tensor([float(t)], dtype=torch.float64, device="cpu")))


def _not_continuous(given: object) -> str:
    return (
        f"t must hold floating-point times in [0, 1], got {given}; for timesteps 0..T-1 give t / (T - 1), or make "
        "IntervalClusters"
    )


# A separate op, so that the range check (a data-dependent branch on a CPU) does not break a torch.compile graph.
@torch.library.custom_op("dtr_kernels::checked_times", mutates_args=())
def _checked_times(t: Tensor) -> Tensor:
    """Return a copy of the times in fp32: an op's output must not share memory with its input."""
    check_range(t, 1, "t is continuous time, 0 the clean image and 1 noise")
    return t.to(torch.float32, copy=True)


@_checked_times.register_fake
def _(t: Tensor) -> Tensor:
    return torch.empty_like(t, dtype=torch.float32)


def _floats(given: object) -> tuple[float, ...]:
    """Return the numbers of a sequence; () for anything else, which no caller allows."""
    try:
        return tuple(float(check_number("a number", each)) for each in given) if isinstance(given, Sequence) else ()
    except (TypeError, ValueError):
        return ()


def _checked_normal(given: object) -> tuple[float, ...]:
    numbers = _floats(given)
    if len(numbers) != 2 or not math.isfinite(numbers[0]) or not 0 < numbers[1] < math.inf:
        raise ValueError(
            "logit_normal must be a mean and a standard deviation above 0, finite numbers such as (0.0, 1.0), got "
            f"{quoted(given)}"
        )
    return numbers


def _logit_normal(u: Tensor, first: float, end: float, mean: float, std: float) -> Tensor:
    """Return t in [first, end], where log(t / (1 - t)) is normal, for u uniform in [0, 1]."""
    low, high = ((_logit(t) - mean) / std for t in (first, end))
    sign = 1
    if low > 0:  # probabilities close to 1 are too coarse: take those of the other tail
        low, high, sign = -high, -low, -1
    low, high = (0.5 * math.erfc(-z / math.sqrt(2)) for z in (low, high))
    if high - low < _LEAST_PROBABILITY:
        raise ValueError(
            f"logit_normal must reach every cluster, but {(mean, std)} leaves next to no probability to the times from "
            f"{first} to {end}; give a larger standard deviation, or other bounds"
        )
    return (mean + sign * std * torch.special.ndtri(low + (high - low) * u)).sigmoid()


def _logit(t: float) -> float:
    return math.log(t) - math.log1p(-t) if 0 < t < 1 else math.copysign(math.inf, t - 0.5)


def continuous_clusters(
    k: int, spacing: str = "time", log_snr: tuple[float, float] = (-10.0, 10.0)
) -> ContinuousClusters:
    """Split the times [0, 1] into K intervals.

    - "time": of equal length;
    - "flow": of equal parts of the log SNR of flow matching, 2 log((1 - t) / t), where x_t = (1 - t) x_0 + t eps;
    - "cosine": of equal parts of -2 log tan(pi t / 2), where x_t = cos(pi t / 2) x_0 + sin(pi t / 2) eps.

    Args:
        k: K, the number of clusters, 1 to 10,000.
        spacing: "time", "flow" or "cosine".
        log_snr: for "flow" and "cosine", the least and the largest log SNR of the range to divide, from -100 to 100.
            At t = 0 and t = 1 the log SNR is infinite, so only a finite range has K equal parts; times beyond it
            belong to the first and the last cluster. Default: about the range of DDPM's linear schedule, 9.2 to
            -10.1.

    Returns:
        ``ContinuousClusters``, with ``bounds``, ``assign``, ``sample``, ``save`` and ``load``.

    Raises:
        ValueError: if an argument is not as described, or intervals are too short for fp32.
    """
    if not is_integer(k) or not 1 <= k <= _MOST_CLUSTERS:
        raise ValueError(f"k, the number of clusters, must be an integer from 1 to {_MOST_CLUSTERS}, got {quoted(k)}")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(map(repr, SPACINGS))}, got {quoted(spacing)}")
    low, high = _checked_log_snr(log_snr)
    inner = [j / k for j in range(1, k)]
    if spacing != "time":
        inner = [_TIMES[spacing](high + (low - high) * part) for part in inner]
    return ContinuousClusters((0.0, *inner, 1.0))


def _checked_log_snr(given: object) -> tuple[float, ...]:
    ends = _floats(given)
    if len(ends) != 2 or not -_LARGEST_LOG_SNR <= ends[0] < ends[1] <= _LARGEST_LOG_SNR:
        raise ValueError(
            f"log_snr must be two numbers from {-_LARGEST_LOG_SNR:g} to {_LARGEST_LOG_SNR:g}, the least and the "
            f"largest log SNR, got {quoted(given)}"
        )
    return ends
