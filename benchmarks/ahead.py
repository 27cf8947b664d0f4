"""``python -m benchmarks.ahead``: compile the kernels of ``make gpu`` and ``make gpu-benchmarks`` for Hopper, without a
GPU.

Checks, tests, benchmarks and tuning run up to their launches, which are compiled into Triton's cache (TRITON_CACHE_DIR)
instead of run. A second run prints how many of the kernels the cache holds.
"""

from __future__ import annotations

import ctypes
import io
import itertools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from tqdm import tqdm
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

from benchmarks import tune
from benchmarks.cases import Cell
from benchmarks.measure import BAR
from benchmarks.static import PROCESSORS, Target
from benchmarks.suite.block import Piece
from dtr_kernels import ops, reference, verify
from dtr_kernels.ops.declaration import PRECISIONS, SIZES, Draw, Sizes
from dtr_kernels.ops.dispatch import Launch, recording
from dtr_kernels.ops.tiles import KINDS, Crossover, forced

ARCH = 90
CPU, META = torch.device("cpu"), torch.device("meta")
KERNELS = {kernel.name: kernel for kernel in ops.KERNELS if kernel.sizes is SIZES}  # the others are CUDA kernels
MODEL, XL = "DiT-XL/2", [Sizes(4, 256, 1152), Sizes(4, 33, 1152), Sizes(4, 1, 1152), Sizes(256, 256, 1152)]

# --- jobs ------------------------------------------------------------------------------------------------------------

# Runs inside of ``recording``, and yields whenever the recorded launches are to be compiled.
Job = Callable[[], Iterator[object]]


def checks(name: str, precision: str) -> Iterator[object]:
    """Run ``verify --kernels`` of one kernel; on a CPU tensors are aligned as on a GPU."""
    for _, attempt in verify.kernel_cases(CPU, [KERNELS[name]], precision):
        yield attempt()


def smoke(name: str) -> Iterator[object]:
    """Run one kernel in the sizes of DiT-XL/2, in bf16."""
    for call in verify.calls(META, [replace(KERNELS[name], sizes=XL)]):
        with call.forced():
            yield call.kernel.launch(**call.kernel.inputs(Draw(call.sizes, PRECISIONS["bf16"], META), **call.mode))


def blocks(part: int, parts: int) -> Iterator[object]:
    """Run a part of ``verify``."""
    for _, attempt in itertools.islice(verify.cases(CPU), part, None, parts):
        yield attempt()


def training(scope: str) -> Iterator[object]:
    """Run a step of the benchmark of a block."""
    piece = Piece.of(Cell(MODEL, 16, "bf16", scope, "per sample", 0.8, "training"), CPU)
    yield piece.call(piece.fused)()


def tuning(problem: tune.Problem) -> Iterator[object]:
    """Run the tiles that ``tune`` tries."""
    calls, default = tune.calls_of(problem, META), problem.default(ARCH)
    if isinstance(default, Crossover):
        tiles: Sequence[Any] = [tune.OURS, tune.CUBLAS]
    else:
        tiles = [default, *tune.candidates(problem, ARCH, PROCESSORS[ARCH].shared_per_block)]
    for tile in tiles:
        with forced(problem.op, tile), tune._by_our_gemm(problem.op):
            yield [call() for call in calls]


def tests(which: str) -> Iterator[object]:
    """Run tests on the CPU, with the examples of a fixed seed, as if all comparisons passed."""

    class Recording:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_call(self) -> Generator[None, object, object]:
            with recording(ARCH) as launches:
                try:
                    return (yield)
                finally:
                    compile_all(launches)

    verify.Comparison.passed = True  # type: ignore[method-assign, assignment]
    options = ["-q", "--hypothesis-seed=0", "-k", f"not cuda and {which}", "tests/test_ops.py"]
    with redirect_stdout(io.StringIO()):
        yield pytest.main(options, plugins=[Recording()])


def jobs() -> list[Job]:
    """Return all jobs, the slowest first."""
    found: list[Job] = [partial(tests, "any_shape"), partial(tests, "not any_shape")]
    found += [partial(tuning, problem) for problem in tune.problems_of([MODEL], ["bf16"], list(KINDS), 256, tune.BETAS)]
    found += [partial(training, scope) for scope in reference.SCOPES]
    found += [partial(checks, kernel.name, name) for kernel in KERNELS.values() for name in kernel.precisions]
    found += [partial(smoke, name) for name in KERNELS]
    return found + [partial(blocks, part, 8) for part in range(8)]


# --- compiling -------------------------------------------------------------------------------------------------------

# By Triton's names of the kernels compiled or found since ``compiled`` was called: whether each was found.
_found: dict[str, bool] = {}


def compiled(job: Job) -> dict[str, bool]:
    """Compile the launches of a job; return for each kernel whether it was found in the cache."""
    _found.clear()
    with recording(ARCH) as launches:
        for _ in job():
            compile_all(launches)
    return dict(_found)


def compile_all(launches: list[Launch]) -> None:
    """Compile the recorded launches, and clear the list."""
    for kernel, programs, args, options in launches:
        try:
            kernel.warmup(*args, grid=(programs,), **options)
        except Exception:  # the others go on, as on a GPU
            traceback.print_exc(limit=-2)
    launches.clear()


def _begin(libcuda: str) -> None:
    """Make Triton compile for the architecture; ``libcuda`` replaces the driver's library, whose functions are never
    called."""
    ctypes.CDLL(libcuda)
    sys.setdlopenflags(os.RTLD_LAZY)
    triton.knobs.nvidia.libcuda_path = str(Path(libcuda).parent)
    triton.knobs.compilation.listener = _listen
    target: Any = Target(ARCH)
    target.utils = CudaUtils()
    triton.runtime.driver.set_active(target)


def _listen(src: Any, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
    _found.setdefault(metadata["hash"], cache_hit)
    CudaLauncher(src, SimpleNamespace(**metadata))  # compiles the C code that launches the kernel into the same cache


def main() -> int:
    """Compile on all cores and print how many kernels were compiled, and how many were found."""
    found: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/libcuda.so.1"
        subprocess.run(["cc", "-shared", "-x", "c", os.devnull, "-Wl,-soname,libcuda.so.1", "-o", library], check=True)
        # Processes, since Triton's compiler parses Python, which is not safe in threads before Python 3.13.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(mp_context=spawn, initializer=_begin, initargs=(library,)) as workers:
            everything = jobs()
            for some in tqdm(workers.map(compiled, everything), "compiling", len(everything), **BAR):
                found |= {name: there and found.get(name, True) for name, there in some.items()}
    there = sum(found.values())
    print(f"{len(found)} kernels for sm_{ARCH}: {there} found, {len(found) - there} compiled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
