"""Clocks, the ceilings for results, and the statistics of repeated measurements."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The most calls on separate buffers in one graph: enough for times of a few microseconds.
_MOST_COPIES = 64


@dataclass(frozen=True)
class Timer:
    """The seconds of one call: a function without arguments.

    Attributes:
        graph: a CUDA graph is replayed, without the time that the host takes to launch kernels.
    """

    seconds: Callable[[], float]
    graph: bool

    def __call__(self) -> float:
        return self.seconds()


class Stopwatch:
    """Measures calls on a device, for one case; its recordings live as long as the stopwatch.

    On a GPU the time is between two device events, with none of the call's inputs left in the L2 cache. On a CPU it is
    wall clock time, and inputs that fit into a cache may be found there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._in_the_way = torch.zeros(2 * cache // 8, dtype=torch.int64, device=device)
            # One pool for all graphs: they are replayed one by one and nobody reads their results. One stream for
            # warm-up and recording, so that the libraries' workspaces for it are allocated outside of the pool.
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)

    def timer(self, calls: Sequence[Callable[[], Any]], graph: bool = True) -> Timer:
        """Return a timer of ``calls``, which do the same work on separate buffers.

        Args:
            calls: at least one. On a GPU all of them are recorded into one graph and the time is divided by their
                number; on a CPU, or if they cannot be recorded, each time the next one is called.
            graph: try to record them.
        """
        if graph and self._device.type == "cuda" and (recorded := self._record(calls)):
            return Timer(lambda: self._between_events(recorded.replay) / len(calls), graph=True)
        rotated = itertools.cycle(calls)
        clock = self._by_wall_clock if self._device.type == "cpu" else self._between_events
        return Timer(lambda: clock(next(rotated)), graph=False)

    def _by_wall_clock(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        _result = call()  # freed on return, after the clock is read
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
        """Record the calls as a graph; None if one of them waits for the device or cannot be recorded otherwise."""
        recorded = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                for call in calls:  # lazy initialisation must precede the graph
                    call()
                torch.cuda.synchronize(self._device)
                with _no_waiting():
                    for call in calls:
                        call()
                torch.cuda.synchronize(self._device)
                with torch.cuda.graph(recorded, pool=self._pool, stream=self._stream):
                    # Kept until the end: one result overwriting the other would stay in the cache.
                    _results = [call() for call in calls]
        except torch.OutOfMemoryError:
            raise
        except Exception:
            self._start_again()
            return None
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return recorded

    def _start_again(self) -> None:
        """Recover from a failed recording: drop its pool, and record an empty graph to end the open capture."""
        self._pool = torch.cuda.graph_pool_handle()
        with suppress(RuntimeError), torch.cuda.stream(self._stream):
            torch.cuda.synchronize(self._device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream):
                pass


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Make waiting for the device an error while the context is open: PyTorch recovers badly from it in a recording."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def copies(device: torch.device, bytes_per_call: int) -> int:
    """Return the number of buffer sets for a rotation in which no call finds its own in the L2 cache; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MOST_COPIES, 1 + 2 * cache // max(bytes_per_call, 1))


class Copy:
    """A copy of a tensor far larger than any cache: the machine's bandwidth, counting bytes read and bytes written.

    A CPU also reads the memory that it overwrites, which is not counted: kernels that only read, or overwrite their
    input, can be faster there than a copy.
    """

    def __init__(self, device: torch.device, bytes_moved: int) -> None:
        self._source = torch.ones(bytes_moved // 8, device=device)
        self._target = torch.zeros_like(self._source)
        self.amount = 2 * self._source.nbytes

    def __call__(self) -> Tensor:
        return self._target.copy_(self._source)


class MatrixProduct:
    """A large product of random square matrices by PyTorch's library: the machine's matrix rate."""

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int) -> None:
        # Random numbers, since products of zeros take less power, so GPUs run them at higher clocks.
        self._a, self._b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        self.amount = 2 * size**3

    def __call__(self) -> Tensor:
        return self._a @ self._b


@dataclass(frozen=True)
class Spread:
    """The median, and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        at = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        return cls(*torch.tensor(values, dtype=torch.float64).quantile(at).tolist())


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Return the spread of the ratios round by round: what slows a whole round cancels."""
    return Spread.of([a / b for a, b in zip(over, under, strict=True)])
