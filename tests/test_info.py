"""``python -m dtr_kernels info``: whatever was built and whatever device there is, it says what runs and why."""

from __future__ import annotations

import json

import pytest
import torch

from dtr_kernels import info
from dtr_kernels.ops import _cpu

WITHOUT_CUDA = {
    "compiler": "1.2",
    "instruction_set": "baseline",
    "cuda": None,
    "architectures": [],
    "no_cuda_reason": "nvcc was lost",
}
WITH_CUDA = WITHOUT_CUDA | {"cuda": "13.0", "architectures": ["sm_90", "compute_90"], "no_cuda_reason": None}


@pytest.fixture
def built(monkeypatch):
    """Sets what the extension says of its build."""
    if _cpu.kernels is None:
        pytest.skip("NOT RUN: the extension is not built")
    return lambda config: monkeypatch.setattr(_cpu.kernels, "build_config", lambda: config)


def test_covers_every_device_and_dtype():
    facts = json.loads(json.dumps(info.collect()))
    assert set(facts["paths"]) == {"routed_blocks", "gradient_surgery"}
    for by_device in facts["paths"].values():
        assert len(by_device) == 1 + torch.cuda.device_count()
        for by_dtype in by_device.values():
            assert set(by_dtype) == {"float32", "bfloat16", "float16", "float64"}


def test_shows_the_cuda_build(built, capsys):
    built(WITH_CUDA)
    info.show()
    assert "CUDA 13.0 for sm_90 compute_90" in capsys.readouterr().out


def test_shows_why_there_is_no_cuda(built, capsys):
    built(WITHOUT_CUDA)
    info.show()
    assert "no CUDA kernels: nvcc was lost" in capsys.readouterr().out


def test_surgery_says_why_pytorch_ops_run(monkeypatch, capsys):
    monkeypatch.setattr(_cpu, "unavailable", "the extension was lost")
    monkeypatch.setattr(_cpu, "kernels", None)
    facts = info.collect()
    assert facts["extension"] == "the extension was lost"
    assert facts["paths"]["gradient_surgery"]["cpu"]["float32"] == "PyTorch ops: the extension was lost"
    assert "fp64" in facts["paths"]["gradient_surgery"]["cpu"]["float64"]
    info.show()
    assert "extension    the extension was lost" in capsys.readouterr().out


@pytest.mark.gpu
def test_a_gpu_runs_cuda_kernels_or_says_why_not():
    for dtype, path in info.collect()["paths"]["gradient_surgery"]["cuda:0"].items():
        assert path == "CUDA kernels" or path.startswith("PyTorch ops: "), (dtype, path)
