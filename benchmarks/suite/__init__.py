"""The benchmarks by name: declared kernels, one for each file of ``ops``; whole blocks, models and steps; and the
limits by which the library chooses."""

from __future__ import annotations

from benchmarks.cases import Benchmark
from benchmarks.suite import block, cpu_limits, inner, kernels, model, res_block, surgery_projection, surgery_step

_WHOLE = (block, model, inner, res_block, surgery_projection, surgery_step, cpu_limits)
BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (*kernels.BENCHMARKS, *(module.BENCHMARK for module in _WHOLE))
}
