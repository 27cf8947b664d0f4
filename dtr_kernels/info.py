"""What runs on this machine, and why: ``python -m dtr_kernels info``."""

from __future__ import annotations

import platform
from typing import Any

import torch
import triton

import dtr_kernels
from dtr_kernels.ops import _cpu
from dtr_kernels.ops._launch import LEAST_ELEMENTS_ON_CPU, kernel_path

__all__ = ["collect", "show"]

_REASONS = {
    "triton": "Triton kernels",
    "cpu": "compiled CPU kernels",
    "plain": "plain PyTorch (the reference)",
}


def collect() -> dict[str, Any]:
    """Versions, devices, the extension's build, and for each device and dtype which implementation of the ops runs."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return {
        "dtr_kernels": dtr_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "extension": _cpu.unavailable or _cpu.kernels.build_config(),
        "paths": {
            device: {str(dtype).removeprefix("torch."): _path(device, dtype) for dtype in _DTYPES} for device in devices
        },
    }


def _gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _path(device: str, dtype: torch.dtype) -> str:
    path = kernel_path(torch.empty(0, device=device, dtype=dtype))
    if path == "cpu":
        return f"{_REASONS[path]} (plain PyTorch below {LEAST_ELEMENTS_ON_CPU} elements of x, where it is faster)"
    if path != "plain":
        return _REASONS[path]
    why = "Triton kernels do not compute in fp64" if device != "cpu" else _cpu.unavailable
    return f"{_REASONS[path]}: {why}"


def show() -> None:
    """Prints ``collect()`` for people."""
    facts = collect()
    paths = facts.pop("paths")
    for name, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{name:12} {', '.join(text) or 'none' if isinstance(text, list) else text}")
    print("\nWhat runs routed_linear, routed_mlp and gated_residual:")
    for device, by_dtype in paths.items():
        for dtype, path in by_dtype.items():
            print(f"  {device:8} {dtype:9} {path}")
