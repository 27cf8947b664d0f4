"""Clocks, the copy bandwidth that results are held against, and what is reported of repeated measurements."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Stopwatch:
    """Measures the seconds that a call takes on a device.

    On a GPU between two device events, with nothing of the call's inputs left in the L2 cache. On a CPU by the wall
    clock; there inputs that fit into a cache may be found in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._in_the_way = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], Any]) -> float:
        if self._device.type == "cpu":
            start = time.perf_counter()
            _result = call()  # freed when this function returns, after the clock is read
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self._device)
        self._in_the_way.zero_()
        begin.record()
        _result = call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


class Copy:
    """A copy of a tensor far larger than any cache: the machine's bandwidth, counting bytes read and bytes written."""

    def __init__(self, device: torch.device, bytes_moved: int) -> None:
        self._source = torch.ones(bytes_moved // 8, device=device)
        self._target = torch.zeros_like(self._source)
        self.bytes_moved = 2 * self._source.nbytes

    def __call__(self) -> Tensor:
        return self._target.copy_(self._source)


@dataclass(frozen=True)
class Spread:
    """Median and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        at = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        return cls(*torch.tensor(values, dtype=torch.float64).quantile(at).tolist())


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """The ratio of the medians of two lists of the same rounds, and the percentiles of the ratios round by round."""
    by_round = Spread.of([a / b for a, b in zip(over, under, strict=True)])
    return Spread(Spread.of(over).median / Spread.of(under).median, by_round.p20, by_round.p80)
