"""Clocks, the ceilings that results are held against, and what is reported of repeated measurements."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Calls of buffers of their own that one graph holds at most: enough for times of a few microseconds.
_MOST_COPIES = 64


@dataclass(frozen=True)
class Timer:
    """The seconds of one call: a function without arguments.

    Attributes:
        graph: whether a CUDA graph is replayed, without the time that the host takes to launch kernels.
    """

    seconds: Callable[[], float]
    graph: bool

    def __call__(self) -> float:
        return self.seconds()


class Stopwatch:
    """Measures calls on a device, for one case: what it has recorded lives and ends together.

    On a GPU between two device events, with nothing of the call's inputs left in the L2 cache. On a CPU by the wall
    clock; there inputs that fit into a cache may be found in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._in_the_way = torch.zeros(2 * cache // 8, dtype=torch.int64, device=device)
            # One pool for all graphs: they are replayed one after the other and nobody reads what they leave. And one
            # stream for warm-up and recording, so that libraries set up what they keep for it outside of the pool.
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)

    def timer(self, calls: Sequence[Callable[[], Any]], graph: bool = True) -> Timer:
        """A timer of ``calls``, which do the same work on buffers of their own.

        Args:
            calls: at least one. On a GPU all of them are recorded into one graph and the time is divided by their
                number; on a CPU, or where they cannot be recorded, the next one is called each time.
            graph: whether to try to record them.
        """
        if graph and self._device.type == "cuda" and (recorded := self._record(calls)):
            return Timer(lambda: self._between_events(recorded.replay) / len(calls), graph=True)
        rotated = itertools.cycle(calls)
        clock = self._by_wall_clock if self._device.type == "cpu" else self._between_events
        return Timer(lambda: clock(next(rotated)), graph=False)

    def _by_wall_clock(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        _result = call()  # freed when this function returns, after the clock is read
        return time.perf_counter() - start

    def _between_events(self, call: Callable[[], Any]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self._device)
        self._in_the_way.sum()  # read, not written: dirty lines would go to memory while the call runs
        begin.record()
        _result = call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def _record(self, calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph | None:
        """The calls as a graph; None where one of them waits for the device or cannot be recorded otherwise."""
        recorded = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                for call in calls:  # lazy initialisation is no part of a graph
                    call()
                torch.cuda.synchronize(self._device)
                with _no_waiting():
                    for call in calls:
                        call()
                torch.cuda.synchronize(self._device)
                with torch.cuda.graph(recorded, pool=self._pool, stream=self._stream):
                    # Kept until the end: one result written over the other would stay in the cache.
                    _results = [call() for call in calls]
        except torch.OutOfMemoryError:
            raise
        except Exception:
            self._start_again()
            return None
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return recorded

    def _start_again(self) -> None:
        """After a recording that failed: its pool is not used again, and an empty recording ends what it left open."""
        self._pool = torch.cuda.graph_pool_handle()
        with suppress(RuntimeError), torch.cuda.stream(self._stream):
            torch.cuda.synchronize(self._device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream):
                pass


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Inside, what waits for the device is an error: recording it would be one too, which PyTorch recovers from
    badly."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def copies(device: torch.device, bytes_per_call: int) -> int:
    """How many sets of buffers a rotation needs so that no call finds its own in the L2 cache; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MOST_COPIES, 1 + 2 * cache // max(bytes_per_call, 1))


class Copy:
    """A copy of a tensor far larger than any cache: the machine's bandwidth, counting bytes read and bytes written.

    A CPU also reads what it is about to overwrite, which is not counted: kernels that only read, or that write where
    they have read, can be faster there than a copy.
    """

    def __init__(self, device: torch.device, bytes_moved: int) -> None:
        self._source = torch.ones(bytes_moved // 8, device=device)
        self._target = torch.zeros_like(self._source)
        self.amount = 2 * self._source.nbytes

    def __call__(self) -> Tensor:
        return self._target.copy_(self._source)


class MatrixProduct:
    """A large product of random square matrices by the library that PyTorch calls: the machine's matrix rate."""

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int) -> None:
        # Random numbers, since products of zeros take less power, so GPUs run them at higher clocks.
        self._a, self._b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        self.amount = 2 * size**3

    def __call__(self) -> Tensor:
        return self._a @ self._b


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
