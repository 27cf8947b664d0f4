"""Clusters of timesteps: interval clustering by exact dynamic programming (Go et al., NeurIPS 2023, section 4.1).

Neighbouring denoising tasks help each other and distant ones may not, so ANT takes intervals of timesteps as the tasks
of its multi-task learning. The intervals are found once, before training, on the CPU. The cluster of a timestep is
computed on the device of the timesteps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from dtr_kernels.files import expecting, read_json, replacing
from dtr_kernels.quoting import quoted
from dtr_kernels.routing import check_range, is_integer

__all__ = ["IntervalClusters", "interval_clusters"]

COSTS = ("timestep", "snr", "log_snr", "affinity")
FORMAT = 1
# The largest magnitude of a value: the sum of T distances between values stays finite.
_LARGEST = 1e300

_Kind = TypeVar("_Kind", bound="Clusters")


@dataclass(frozen=True)
class Clusters:
    """K contiguous intervals of time: the base of both kinds of clusters, with balanced batches and files."""

    bounds: tuple[float, ...]

    @property
    def num_clusters(self) -> int:
        """K, the number of clusters."""
        return len(self.bounds) - 1

    def save(self, path: str | Path) -> None:
        """Write the clusters as JSON. A reader or another writer of the same file never finds half a file.

        Raises:
            OSError: if the file cannot be written. The old file stays as it was.
        """
        text = json.dumps({"format": FORMAT, **vars(self)}) + "\n"
        with replacing(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls: type[_Kind], path: str | Path) -> _Kind:
        """Read a file that ``save`` has written. The file has no checksum, so that it can be edited by hand.

        Raises:
            ValueError: naming the file, if it holds something else or has another version of the format.
            OSError: if the file cannot be read.
        """
        advice = "make them again, or name another file"
        with expecting(f"clusters that {cls.__name__}.save has written", path, advice):
            stored = read_json(path)
            if not isinstance(stored, dict) or "format" not in stored:
                raise ValueError("it is not an object with a format")
            if (version := stored["format"]) != FORMAT:
                raise ValueError(f"its format is version {quoted(version)}, and this dtr_kernels reads {FORMAT}")
            names = [field.name for field in fields(cls)]
            if stored.keys() != {"format", *names}:
                raise ValueError(f"it must hold format, {' and '.join(names)}, but holds {', '.join(stored)}")
            return cls(**{name: stored[name] for name in names})

    def _evenly(
        self,
        batch_size: int,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        draw: Callable[[int, int, torch.device | str | None], Tensor],
    ) -> Tensor:
        """Return B times, floor or ceil(B / K) of each cluster, in random order.

        Args:
            batch_size, generator, device: as in ``sample``.
            draw: called with a cluster, n and a device; returns n times of the cluster on the device.
        """
        if not is_integer(batch_size) or not 1 <= batch_size < 2**63:
            raise ValueError(f"batch_size must be a positive integer below 2**63, got {quoted(batch_size)}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator, got {type(generator).__name__}; "
                "for a seed use torch.Generator().manual_seed(seed)"
            )
        batch_size = int(batch_size)  # NumPy's unsigned integers wrap around
        source = device if generator is None else generator.device
        # Every round draws one time per cluster; the last round may have fewer places than clusters.
        rounds = -(-batch_size // self.num_clusters)
        columns = [draw(k, rounds, source) for k in range(self.num_clusters)]
        table = torch.stack(columns, dim=1)[:, torch.randperm(len(columns), generator=generator, device=source)]
        t = table.flatten()[:batch_size]
        t = t[torch.randperm(batch_size, generator=generator, device=source)]
        if device is None:
            return t
        if t.device.type == "cpu" and torch.device(device).type == "cuda":
            return t.pin_memory().to(device, non_blocking=True)  # the host does not wait
        return t.to(device)


@dataclass(frozen=True)
class IntervalClusters(Clusters):
    """K contiguous, non-empty intervals that cover the timesteps 0..T-1, as ``interval_clusters`` returns them.

    Attributes:
        bounds: K + 1 edges, 0 = b[0] < b[1] < ... < b[K] = T, below 2**63; cluster k holds the timesteps
            b[k] <= t < b[k + 1].
        cost: the cost that the intervals minimise, "timestep", "snr", "log_snr" or "affinity".

    Raises:
        ValueError: if bounds or cost is not as described.
    """

    bounds: tuple[int, ...]
    cost: str

    def __post_init__(self) -> None:
        edges = tuple(self.bounds) if isinstance(self.bounds, Sequence) else ()
        ascending = all(map(is_integer, edges)) and all(first < end for first, end in pairwise(edges))
        if len(edges) < 2 or not ascending or edges[0] != 0:
            raise ValueError(
                "bounds must be a sequence of integers that begins with 0 and ascends to the number of timesteps, "
                f"got {quoted(self.bounds)}"
            )
        if edges[-1] >= 2**63:
            raise ValueError(f"bounds must end below 2**63, as timesteps are int64, got {quoted(int(edges[-1]))}")
        object.__setattr__(self, "bounds", tuple(map(int, edges)))
        _check_cost(self.cost)

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps."""
        return self.bounds[-1]

    @overload
    def assign(self, t: Tensor) -> Tensor: ...

    @overload
    def assign(self, t: int) -> int: ...

    def assign(self, t: Tensor | int) -> Tensor | int:
        """Return the cluster of every timestep, computed on t's device without a host synchronisation.

        Args:
            t: integer tensor [B] of timesteps 0..T-1 on any device, or one Python integer.

        Returns:
            int64 [B] of clusters 0..K-1 on t's device; an int for an int.

        Raises:
            ValueError: if t is out of range (on a GPU: a device-side assertion, so that nothing waits), has another
                shape, or is not an integer.
            TypeError: if t is neither a tensor nor a number.
        """
        if not isinstance(t, Tensor):
            return self._assign_one(t)
        if t.is_floating_point():
            raise ValueError(self._not_an_integer(t.dtype))
        if t.dim() != 1 or t.dtype == torch.bool or t.is_complex():
            raise ValueError(f"t must be a vector [B] of integer timesteps, got {t.dtype} of shape {list(t.shape)}")
        timesteps: Tensor = torch.ops.dtr_kernels.checked_timesteps(t, self.num_timesteps)
        # One comparison per bound: a table of bounds would have to be copied to the GPU, and the host would wait.
        clusters = torch.zeros_like(timesteps)
        for bound in self.bounds[1:-1]:
            clusters += timesteps >= bound
        return clusters

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw the timesteps of a training batch, balanced over the clusters.

        Each cluster gets floor or ceil(B / K) timesteps, B in all, uniform within the cluster and in random order. The
        clusters that get one more are random, so on average all get the same, and a timestep of a short cluster comes
        more often than one of a long cluster.

        Args:
            batch_size: B, at least 1; may be less than K.
            generator: draws on its own device; a CPU generator gives the same timesteps for every ``device``.
                Default: PyTorch's generator of ``device``, which needs no copy and no wait.
            device: of the timesteps. Default: the generator's, or PyTorch's default device.

        Returns:
            int64 [B].

        Raises:
            ValueError: if batch_size is not a positive integer below 2**63.
            TypeError: if generator is something else, such as a seed.
        """

        def draw(k: int, n: int, source: torch.device | str | None) -> Tensor:
            first, end = self.bounds[k : k + 2]
            return torch.randint(first, end, (n,), generator=generator, device=source)

        return self._evenly(batch_size, generator, device, draw)

    def _assign_one(self, t: Any) -> int:
        if isinstance(t, float):
            raise ValueError(self._not_an_integer(type(t).__name__))
        if not is_integer(t):
            raise TypeError(f"t must be an integer tensor [B] or an int, got {type(t).__name__}")
        if not 0 <= t < self.num_timesteps:
            raise ValueError(
                f"t must be in 0..{self.num_timesteps - 1}; {_covered(self.num_timesteps)}; got {quoted(t)}"
            )
        return sum(int(t) >= bound for bound in self.bounds[1:-1])

    def _not_an_integer(self, given: object) -> str:
        last = self.num_timesteps - 1
        return (
            f"t must hold integer timesteps, got {given}; for continuous time in [0, 1] give "
            f"(t * {self.num_timesteps}).long().clamp(max={last}), or make ContinuousClusters"
        )


# A separate op, so that the range check (a data-dependent branch on a CPU) does not break a torch.compile graph.
@torch.library.custom_op("dtr_kernels::checked_timesteps", mutates_args=())
def _checked_timesteps(t: Tensor, num_timesteps: int) -> Tensor:
    """Return a copy of the timesteps as int64: an op's output must not share memory with its input."""
    check_range(t, num_timesteps - 1, _covered(num_timesteps))
    return t.to(torch.int64, copy=True)


@_checked_timesteps.register_fake
def _(t: Tensor, num_timesteps: int) -> Tensor:
    return torch.empty_like(t, dtype=torch.int64)


def _covered(num_timesteps: int) -> str:
    return f"the clusters were made for num_timesteps={num_timesteps}"


# --- clustering ------------------------------------------------------------------------------------------------------


def interval_clusters(num_timesteps: int, k: int, cost: str = "timestep", values: Any = None) -> IntervalClusters:
    """Split the timesteps 0..T-1 into the K intervals of least total cost (ANT, section 4.1: interval clustering).

    With c = (l + r + 1) // 2, the centre of an interval l..r, the cost of the interval is the sum over t = l..r of

    - "timestep": \\|t - c\\|, which makes intervals of equal length, or nearly;
    - "snr": \\|SNR[t] - SNR[c]\\|, which cuts the clean end, where the SNR is large, into tiny intervals;
    - "log_snr": \\|log SNR[t] - log SNR[c]\\|, which cuts where the noise level changes fast;
    - "affinity": -A[c, t] for the task affinity A (ANT's gradient-based cost).

    ANT uses K = 5, and DTR's runs with it K = 8.

    The minimum is exact, by dynamic programming over costs in fp64, in O(K T^2) time and O(K T) memory beside
    ``values``. Among clusterings of equal cost, the one with the least sum of squared lengths wins, then the one whose
    last bound is largest, then the one before it, and so on: longer intervals come first, as in ``numpy.array_split``,
    whose lengths the timestep cost always gives.

    Args:
        num_timesteps: T, the number of timesteps, below 2**63.
        k: K, the number of clusters, 1 to T.
        cost: "timestep", "snr", "log_snr" or "affinity".
        values: the tensor, array or sequence that defines the cost. "snr" and "log_snr": the SNR itself at every
            timestep, [T], alpha_bar / (1 - alpha_bar) in DDPM's notation; "log_snr" takes its logarithm. "affinity":
            A, [T, T]. "timestep": None.

    Returns:
        ``IntervalClusters``, with ``bounds``, ``assign``, ``sample``, ``save`` and ``load``.

    Raises:
        ValueError: if an argument is not as described, or values are NaN, infinite, or an SNR that is negative or, for
            "log_snr", 0.
        TypeError: if values are not real numbers.
    """
    if not is_integer(num_timesteps) or not 1 <= num_timesteps < 2**63:
        raise ValueError(f"num_timesteps must be a positive integer below 2**63, got {quoted(num_timesteps)}")
    if not is_integer(k) or not 1 <= k <= num_timesteps:
        raise ValueError(
            f"k, the number of clusters, must be an integer from 1 to num_timesteps = {num_timesteps}, got {quoted(k)}"
        )
    _check_cost(cost)
    T, K = int(num_timesteps), int(k)
    if cost != "timestep":
        return IntervalClusters(_cheapest_bounds(_distances(T, cost, values), T, K), cost)
    if values is not None:
        raise ValueError('values must be None for cost "timestep"; name the cost that they are for')
    # n timesteps cost n^2 // 4, a convex function: equal lengths are cheapest, and longer ones come first.
    length, longer = divmod(T, K)
    return IntervalClusters(tuple(j * length + min(j, longer) for j in range(K + 1)), cost)


def _distances(num_timesteps: int, cost: str, values: Any) -> Iterator[np.ndarray]:
    """Yield, for every centre c, the cost of each timestep in an interval with that centre, fp64 [T]."""
    if cost == "affinity":
        affinity = real_numbers(values, (num_timesteps, num_timesteps), "the affinity of all pairs of timesteps")
        return (-row for row in affinity)
    snr = real_numbers(values, (num_timesteps,), "the SNR at every timestep")
    check_snr(snr, cost)
    x = np.log(snr) if cost == "log_snr" else snr
    return (np.abs(x - centre) for centre in x)


def _cheapest_bounds(distances: Iterable[np.ndarray], num_timesteps: int, k: int) -> tuple[int, ...]:
    """Return the bounds of the K intervals of least total cost; see ``interval_clusters`` for ties.

    Intervals are visited centre by centre, so that each cost is needed once: an interval with centre c starts at c
    or before, and every clustering that ends there is made of intervals with earlier centres.
    """
    T = num_timesteps
    longest = T - k + 1  # every other cluster holds a timestep
    squared = np.arange(longest + 2) ** 2
    # For the best clustering into j clusters ending at e, [j, e]: cost, sum of squared lengths, start of the last one.
    total = np.full((k + 1, T + 1), np.inf)
    total[0, 0] = 0
    squares = np.zeros((k + 1, T + 1), dtype=np.int64)
    starts = np.zeros((k + 1, T + 1), dtype=np.int32)
    for c, distance in enumerate(distances):
        # An interval grows from its centre, to the left and to the right in turn. Differences of prefix sums would lose
        # the small distances beside the large ones: SNRs span eight orders of magnitude.
        even, odd = min(c, T - c, longest // 2), min(c + 1, T - c, (longest + 1) // 2)  # number of such lengths
        costs = np.empty(even + odd)
        costs[::2] = distance[c : c + odd]
        costs[1::2] = distance[c - even : c][::-1]
        costs = costs.cumsum()
        # Two intervals may end at the same place: the one of odd length starts later, and wins ties.
        for n, parity in ((even, 0), (odd, 1)):
            start, end = slice(c + parity - n, c + parity), slice(c + 1, c + 1 + n)
            before = slice(max(0, c - (T - k)), min(k, c + n))  # numbers of clusters: each holds a timestep
            after = slice(before.start + 1, before.stop + 1)
            new_total = total[before, start][:, ::-1] + costs[1 - parity :: 2]
            new_squares = squares[before, start][:, ::-1] + squared[2 - parity :: 2][:n]
            old_total, old_squares = total[after, end], squares[after, end]
            better = (new_total < old_total) | ((new_total == old_total) & (new_squares <= old_squares))
            np.copyto(old_total, new_total, where=better)
            np.copyto(old_squares, new_squares, where=better)
            np.copyto(starts[after, end], np.arange(c + parity - 1, c + parity - 1 - n, -1), where=better)
    bounds = [T]
    for j in range(k, 0, -1):
        bounds.append(int(starts[j, bounds[-1]]))
    return tuple(reversed(bounds))


# --- arguments -------------------------------------------------------------------------------------------------------


def _check_cost(cost: object) -> None:
    if cost not in COSTS:
        raise ValueError(f"cost must be one of {', '.join(map(repr, COSTS))}, got {quoted(cost)}")


def real_numbers(values: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Return the values in fp64, checked. They may be the caller's own memory, so do not write to them."""
    wanted = f"values must be {what}, finite real numbers of shape {list(shape)}"
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.double().numpy() if values.is_floating_point() else values.numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{wanted}, got {type(values).__name__} ({error})") from error
    if array.dtype.kind not in "iuf":
        given = type(values).__name__ if array.dtype == object else array.dtype
        raise TypeError(f"{wanted}, got {given}")
    if array.shape != shape:
        raise ValueError(f"{wanted}, got shape {list(array.shape)}")
    array = array.astype(np.float64, copy=False)
    if not max(array.max(), -array.min()) <= _LARGEST:  # also if one is NaN
        bad = np.argwhere(~(np.abs(array) <= _LARGEST))
        raise ValueError(f"{wanted} and magnitude at most {_LARGEST:g}, got {_entry(array, bad[0])}")
    return array


def check_snr(snr: np.ndarray, cost: str) -> None:
    if len(negative := np.argwhere(snr < 0)):
        raise ValueError(
            f"values must be SNRs, which are not negative, got {_entry(snr, negative[0])}; "
            'cost="log_snr" takes the SNR too and computes its logarithm'
        )
    if cost == "log_snr" and len(zeros := np.argwhere(snr == 0)):
        raise ValueError(
            f'values must be greater than 0 for cost="log_snr", got {_entry(snr, zeros[0])}; for a schedule with zero '
            'terminal SNR use cost="snr", or give that timestep a small SNR, such as its neighbour\'s'
        )


def _entry(array: np.ndarray, index: np.ndarray) -> str:
    return f"values[{', '.join(map(str, index))}] = {array[tuple(index)]:g}"
