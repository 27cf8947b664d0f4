"""Shared by all tests: uninitialised memory is NaN, GPU tests say when they did not run, random inputs are fresh."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
if os.environ.get("TRITON_INTERPRET"):
    from repaired_interpreter import repair

    repair()

from dtr_kernels.ops import tiles
from dtr_kernels.ops.tiles import NEVER, Crossover, RowTiles, Tiles, crossovers
from dtr_kernels.verify import usable

# A background job of a shell ignores Ctrl-C, and so would all that tests start to be interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files with fixtures that take long, such as builds. They come first, so that with --dist worksteal no process takes
# over a part of one at the end and makes its fixtures again.
FIRST = ["test_wheels", "test_build", "test_cuda_source", "test_distributed", "test_docs"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in FIRST)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="NOT RUN: needs an NVIDIA GPU"))


def pytest_collection_finish():
    """Thousands of collected tests are no garbage, and to look through them takes a second each time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item):
    """After a CUDA error every later test of the process would fail: under pytest-xdist another takes its place."""
    on_gpu = item.get_closest_marker("gpu") and torch.cuda.is_available() and "PYTEST_XDIST_WORKER" in os.environ
    if on_gpu and not usable(torch.device("cuda")):
        os._exit(1)


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory():
    """A kernel that leaves part of its output unwritten shows at once."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before[0]
    torch.use_deterministic_algorithms(before[1])


@pytest.fixture(autouse=True)
def convolutions_in_fp32(monkeypatch):
    """On a GPU cuDNN would multiply fp32 in tf32, which no bound of a test allows for."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def kernels_at_every_size(monkeypatch):
    """Small tensors would take the plain path on a CPU and cuBLAS on a GPU, and tests of the kernels compare neither.

    Slices of the weight, which long samples or narrow windows are worth on a CPU, begin between the tests' small and
    large sizes.
    """
    monkeypatch.setattr("dtr_kernels.ops.dispatch.LEAST_ELEMENTS_ON_CPU", 0)
    monkeypatch.setattr("dtr_kernels.ops.window_linear._LEAST_GAIN", 35)
    for op in crossovers():
        monkeypatch.setitem(tiles._forced, op, Crossover(1))


@pytest.fixture
def dense_products(monkeypatch, kernels_at_every_size):
    """Run as where windows do not pay: PyTorch's products on all channels, and GELU in a pass of its own."""
    monkeypatch.setattr("dtr_kernels.ops.window_linear._LEAST_GAIN", sys.maxsize)
    for op in crossovers():
        monkeypatch.setitem(tiles._forced, op, Crossover(NEVER))


@pytest.fixture
def tall_tiles(monkeypatch):
    """In Triton's interpreter, whose time goes by programs and steps of loops: kernels over rows take eight at once."""
    if os.environ.get("TRITON_INTERPRET"):
        monkeypatch.setattr(RowTiles, "tile", lambda *args: Tiles.tile(*args)._replace(rows=8))


@pytest.fixture
def one_thread():
    """For files of tests on small tensors, where threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gloo(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def fresh_compiler():
    """For tests that count what torch.compile makes, or would leave it to later ones."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The device a test runs on; with TRITON_INTERPRET=1 the CPU stands in for a GPU."""
    return torch.device(request.param)


@pytest.fixture
def seed(request):
    """A fresh seed for each run, printed when a test fails; set DTR_TEST_SEED to repeat one."""
    value = int(os.environ.get("DTR_TEST_SEED", torch.seed() % 2**31))
    print(f"DTR_TEST_SEED={value}")
    torch.manual_seed(value)
    return value
