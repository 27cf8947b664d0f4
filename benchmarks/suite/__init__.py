"""The benchmarks by name: microbenchmarks, one per op; whole blocks, models and steps; what the library decides by."""

from __future__ import annotations

from benchmarks.cases import Benchmark
from benchmarks.suite import (
    block,
    cpu_limits,
    gated_norm,
    gelu_linear,
    model,
    res_block,
    surgery_projection,
    surgery_step,
    window_linear,
)

BENCHMARKS: dict[str, Benchmark] = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (
        gated_norm,
        window_linear,
        gelu_linear,
        block,
        model,
        res_block,
        surgery_projection,
        surgery_step,
        cpu_limits,
    )
}
