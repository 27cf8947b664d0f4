"""Every Triton kernel, in every configuration that the launchers use, compiled for sm_80, sm_90 and sm_100 without a
GPU.

The launchers run as they would on a GPU up to the launch itself; what they were about to launch is compiled instead.
A kernel may not spill registers, and a GEMM in a 16-bit dtype must use the matrix instructions of its architecture.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

pytestmark = pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter compiles nothing")

MODULES = [
    importlib.import_module(f"dtr_kernels.ops.{name}") for name in ("gated_norm", "window_linear", "gated_residual")
]
gated_norm, window_linear, gated_residual = MODULES
launch_module = importlib.import_module("dtr_kernels.ops._launch")
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
GEMMS = {"_forward_kernel:gemm", "_input_gradient_kernel", "_weight_gradient_kernel"}


class Target:
    """Stands in for Triton's GPU driver: names the architecture to compile for."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # Triton caches what it compiled per device

    def get_current_stream(self, device=None):
        return 0


@pytest.fixture
def compile_for(monkeypatch):
    """compile_for(arch) makes the launchers compile for it; returns the list that the compiled kernels are added to."""

    def prepare(arch):
        compiled = []

        def compile_instead(kernel, programs, *args, **options):
            gemm = "BLOCK_K" in options
            name = kernel.__name__ + (":gemm" if gemm and kernel.__name__ == "_forward_kernel" else "")
            compiled.append((name, kernel.warmup(*args, grid=(programs,), **options)))

        for module in MODULES:
            monkeypatch.setattr(module, "launch", compile_instead)
            monkeypatch.setattr(module, "kernel_path", lambda x: "triton")
        monkeypatch.setattr(launch_module, "kernel_path", lambda x: "triton")
        monkeypatch.setattr(window_linear, "capability", lambda x: arch)
        triton.runtime.driver.set_active(Target(arch))
        return compiled

    yield prepare
    if torch.cuda.is_available():
        triton.runtime.driver.reset_active()


def run_every_launcher(dtype, channels, tokens, batch=2):
    """Calls each launcher in each of its modes."""
    width = max(1, int(0.8 * channels))
    x, branch = (torch.zeros(batch, tokens, channels, dtype=dtype) for _ in range(2))
    gate, shift, scale = torch.zeros(batch, 6 * channels, dtype=dtype).chunk(6, dim=1)[:3]
    start = torch.zeros(batch, dtype=torch.int32)
    statistics = torch.zeros(batch, tokens)
    for keep_branch, window, update in [
        (False, None, None),
        (False, start, None),
        (False, None, branch),
        (False, start, branch),
        (True, start, branch),
    ]:
        w, g = (channels if window is None else width), (None if update is None else gate)
        u = gated_norm.gated_norm_forward(x, update, g, shift, scale, window, w, 1e-6, dtype, keep_branch).u
        for is_stream in {False, not keep_branch}:
            gated_norm.gated_norm_backward(
                u, x, statistics, x, update, g, scale, statistics, statistics, window, w, keep_branch, is_stream
            )
    u = launch_module.empty_rows(batch, tokens, width, like=x, dtype=dtype)
    qkv, bias = torch.zeros(3 * channels, channels, dtype=dtype), torch.zeros(3 * channels, dtype=dtype)
    out = window_linear.window_linear_forward(u, statistics, shift, scale, qkv, bias, start)
    window_linear.window_linear_backward(out, u, statistics, shift, scale, qkv, start)
    fc1, bias = torch.zeros(4 * channels, channels, dtype=dtype), torch.zeros(4 * channels, dtype=dtype)
    for write_pre in (True, False):
        window_linear.linear_gelu_forward(u, statistics, shift, scale, fc1, bias, start, write_pre)
        window_linear.linear_gelu_forward(x, None, shift, scale, fc1, bias, None, write_pre)
    pre = torch.zeros(batch, tokens, 4 * channels, dtype=dtype)
    window_linear.gelu_linear_backward(x, pre, torch.zeros(channels, 4 * channels, dtype=dtype))
    gated_residual.gated_residual_forward(x, branch, gate)
    gated_residual.gated_residual_backward(x, branch, gate)


def resources(kernel, folder):
    """(registers, bytes of stack, bytes of local memory) of a compiled kernel, as cuobjdump reports them."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    report = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    return tuple(int(n) for n in re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report.stdout).groups())


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    "dtype, channels, tokens", [(torch.bfloat16, 1152, 256), (torch.float32, 384, 256), (torch.float16, 384, 16)]
)
def test_no_spills_and_matrix_instructions(compile_for, tmp_path, arch, dtype, channels, tokens):
    compiled = compile_for(arch)
    run_every_launcher(dtype, channels, tokens)
    assert {name for name, _ in compiled} >= GEMMS | {"_forward_kernel", "_backward_kernel", "_token_sums_kernel"}
    for name, kernel in compiled:
        registers, stack, local = resources(kernel, tmp_path)
        assert (stack, local) == (0, 0), f"{name} spills: {registers} registers, {stack} + {local} bytes"
        if name in GEMMS and dtype != torch.float32:
            # Warpgroup instructions take 64 rows; samples of fewer tokens use the older ones.
            instruction = MATRIX_INSTRUCTION[arch if tokens >= 64 or name == "_weight_gradient_kernel" else 80]
            assert instruction in kernel.asm["ptx"], f"{name} has no {instruction}"
        if name in GEMMS and arch >= 90:
            assert "cp.async.bulk.tensor" in kernel.asm["ptx"], f"{name} does not load through tensor descriptors"


@pytest.mark.parametrize("channels, tokens, batch", [(64, 40, 1), (64, 1, 3), (1, 8, 2)])
def test_sizes_of_one_compile(compile_for, channels, tokens, batch):
    """Triton makes an argument that is 1 a constant of another type, which the interpreter does not."""
    assert (compiled := compile_for(90)) == []
    run_every_launcher(torch.bfloat16, channels, tokens, batch)
    assert compiled


def test_tf32_uses_the_matrix_units_where_pytorch_may(compile_for, monkeypatch):
    monkeypatch.setattr(window_linear, "dot_precision", lambda dtype: "tf32")
    compiled = compile_for(90)
    run_every_launcher(torch.float32, 64, 64)
    for name, kernel in compiled:
        if name in GEMMS:
            assert "mma" in kernel.asm["ptx"], name
