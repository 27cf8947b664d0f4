"""What runs on this machine, and why: ``python -m dtr_kernels info``."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import triton

import dtr_kernels
from dtr_kernels.ops import _cpu
from dtr_kernels.ops._gradients import why_plain
from dtr_kernels.ops._launch import LEAST_ELEMENTS_ON_CPU, kernel_path
from dtr_kernels.ops._tiles import configuration
from dtr_kernels.ops._tuned import KINDS, Tuned, user_file

__all__ = ["collect", "show"]

_REASONS = {
    "triton": "Triton kernels",
    "cpu": "compiled CPU kernels",
    "plain": "plain PyTorch (the reference)",
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WHAT_RUNS = {
    "routed_blocks": "routed_linear, routed_mlp and gated_residual",
    "gradient_surgery": "gradient surgery (gram, pcgrad_, pcgrad_sum, combine_ and weighted_sum)",
}
# Of ops that are tuned alike, the most that are named.
_MOST_OPS = 3


def collect() -> dict[str, Any]:
    """Versions, devices, which tiles the kernels of each GPU use, the extension's build, and for each device and dtype
    which implementation of the ops runs."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]

    def table(path: Callable[[torch.device, torch.dtype], str]) -> dict[str, dict[str, str]]:
        return {
            device: {str(dtype).removeprefix("torch."): path(torch.device(device), dtype) for dtype in _DTYPES}
            for device in devices
        }

    return {
        "dtr_kernels": dtr_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "tiles": [_tiles(i) for i in range(torch.cuda.device_count())],
        "extension": _cpu.unavailable or _cpu.kernels.build_config(),
        "paths": {"routed_blocks": table(_routing_path), "gradient_surgery": table(_surgery_path)},
    }


def _gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"


def _tiles(index: int) -> str:
    """Where the tiles of a GPU's Triton kernels are from. A file that cannot be used makes a warning."""
    gpu = torch.cuda.get_device_name(index)
    major, minor = torch.cuda.get_device_capability(index)
    tuned = configuration(gpu, 10 * major + minor)
    sources = [f"user's file ({user_file(gpu)}): {_summary(tuned.user)}"] if tuned.user else []
    if tuned.packaged:
        latest = max((entry.measurement for entry in tuned.packaged), key=lambda measurement: measurement.date)
        commit = f", {latest.commit[:12]}" if latest.commit else ""
        sources.append(f"packaged file ({latest.date}{commit}): {_summary(tuned.packaged)}")
    if not sources:
        return f"defaults: not tuned for {gpu}; run python -m benchmarks tune from a checkout"
    return "; ".join([*sources, "defaults otherwise"])


def _summary(entries: Sequence[Tuned]) -> str:
    """What is tuned: ops, dtypes and widths, with the ops together that have the same of both."""
    widths: dict[tuple[str, str], set[int]] = {}
    for entry in entries:
        widths.setdefault((entry.op, entry.dtype), set()).add(entry.channels)
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (op, dtype), channels in widths.items():
        groups.setdefault((dtype, tuple(sorted(channels))), []).append(op)
    parts = [
        f"{_joined(ops) if len(ops) <= _MOST_OPS else f'{len(ops)} of {len(KINDS)} ops'} in {dtype} "
        f"of {_joined(map(str, channels))} channels"
        for (dtype, channels), ops in groups.items()
    ]
    return f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}, {', '.join(parts)}"


def _joined(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _routing_path(device: torch.device, dtype: torch.dtype) -> str:
    path = kernel_path(torch.empty(0, device=device, dtype=dtype))
    if path == "cpu":
        return f"{_REASONS[path]} (plain PyTorch below {LEAST_ELEMENTS_ON_CPU} elements of x, where it is faster)"
    if path != "plain":
        return _REASONS[path]
    why = "Triton kernels do not compute in fp64" if device.type != "cpu" else _cpu.unavailable
    return f"{_REASONS[path]}: {why}"


def _surgery_path(device: torch.device, dtype: torch.dtype) -> str:
    why = why_plain(device, dtype)
    return f"PyTorch ops: {why}" if why else "CUDA kernels" if device.type == "cuda" else "compiled CPU kernels"


def show() -> None:
    """Prints ``collect()`` for people."""
    facts = collect()
    paths, extension, tiles = facts.pop("paths"), facts.pop("extension"), facts.pop("tiles")
    for name, value in facts.items():
        print(f"{name:12} {', '.join(value) or 'none' if isinstance(value, list) else value}")
    for index, source in enumerate(tiles):
        print(f"{'tiles':12} cuda:{index}: {source}")
    if isinstance(extension, str):
        print(f"{'extension':12} {extension}")
    else:
        print(f"{'extension':12} compiler {extension['compiler']}, instruction set {extension['instruction_set']}")
        cuda = f"CUDA {extension['cuda']} for {' '.join(extension['architectures'])}"
        print(f"{'':12} {cuda if extension['cuda'] else 'no CUDA kernels: ' + extension['no_cuda_reason']}")
    for name, by_device in paths.items():
        print(f"\nWhat runs {_WHAT_RUNS[name]}:")
        for device, by_dtype in by_device.items():
            for dtype, path in by_dtype.items():
                print(f"  {device:8} {dtype:9} {path}")
