"""Report which kernels run on this machine, and why: ``python -m dtr_kernels info``."""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args

import torch
import triton

import dtr_kernels
from dtr_kernels import ops
from dtr_kernels.ops import extension, triton_version
from dtr_kernels.ops.dispatch import LEAST_ELEMENTS_ON_CPU, capability_of, kernels_for
from dtr_kernels.ops.gradient_lists import CLUSTERS, choose_surgery
from dtr_kernels.ops.tiles import KINDS, Configuration, Tuned, configuration, crossovers, tuned_for
from dtr_kernels.ops.tuned_tiles import user_file
from dtr_kernels.ops.window_linear import WindowsOp

__all__ = ["collect", "show"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# More ops than these that are tuned alike are counted, not named.
_MOST_OPS = 3
# Crossovers are printed for these tokens per sample, channels of DiT-S/2 to DiT-XL/2, and percentages of active
# channels.
_TOKENS, _WIDTHS, _ACTIVE = 256, (384, 768, 1024, 1152), (20, 50, 80)


def collect() -> dict[str, Any]:
    """Return versions and their problems, devices, the tiles and crossovers of each GPU, the extension's build, and for
    each op, device and dtype what computes it and why nothing faster does."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return {
        "dtr_kernels": dtr_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "problems": [problem] if (problem := triton_version.mismatch()) else [],
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "tiles": [_tiles(i) for i in range(torch.cuda.device_count())],
        "crossovers": [_crossovers(i) for i in range(torch.cuda.device_count())],
        "extension": extension.unavailable or extension.kernels.build_config(),
        "ops": {
            op: {
                str(device): {
                    str(dtype).removeprefix("torch."): _PATHS.get(op, _fused_path)(device, dtype) for dtype in _DTYPES
                }
                for device in devices
            }
            for op in _OPS
        },
    }


def _gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"


def _tiles(index: int) -> str:
    """Say which files the tiles of a GPU's Triton kernels come from. Warns about a file that cannot be used."""
    gpu = torch.cuda.get_device_name(index)
    tuned = _configuration(index)
    sources = [f"user's file ({user_file(gpu)}): {_summary(tuned.user)}"] if tuned.user else []
    if tuned.packaged:
        latest = max((entry.measurement for entry in tuned.packaged), key=lambda measurement: measurement.date)
        commit = f", {latest.commit[:12]}" if latest.commit else ""
        sources.append(f"packaged file ({latest.date}{commit}): {_summary(tuned.packaged)}")
    if not sources:
        return f"defaults: not tuned for {gpu}; run python -m benchmarks tune from a checkout"
    return "; ".join([*sources, "defaults otherwise"])


def _configuration(index: int) -> Configuration:
    return configuration(torch.cuda.get_device_name(index), capability_of(index))


def _crossovers(index: int) -> list[str]:
    """Say from how many tokens of a batch on our GEMMs replace cuBLAS on a GPU, and where the crossovers come from."""
    dtypes_of: dict[tuple[str, str], list[str]] = {}
    for op, dtype in itertools.product(crossovers(), (torch.bfloat16, torch.float16, torch.float32)):
        betas: dict[str, list[str]] = {}
        for active in _ACTIVE if op in get_args(WindowsOp) else (100,):
            betas.setdefault(_crossover(index, op, dtype, active), []).append(f"{active / 100:g}")
        for crossover, some in betas.items():
            name = op if len(betas) == 1 else f"{op} at beta {_joined(some)}"
            dtypes_of.setdefault((name, crossover), []).append(str(dtype).removeprefix("torch."))
    alike: dict[tuple[str, str], list[str]] = {}
    for (name, crossover), dtypes in dtypes_of.items():
        alike.setdefault((_joined(dtypes), crossover), []).append(name)
    return [f"{_joined(names)} in {joined}: {crossover}" for (joined, crossover), names in alike.items()]


def _crossover(index: int, op: str, dtype: torch.dtype, active: int) -> str:
    gpu = _configuration(index)
    widths: dict[str, list[str]] = {}
    for channels in _WIDTHS:
        tuned = tuned_for(gpu, op, dtype, _TOKENS, channels, active)
        source = "default" if tuned is None else "user's file" if tuned in gpu.user else "packaged file"
        default = KINDS[op].default(dtype, _TOKENS, channels, capability_of(index), active)
        crossover = default if tuned is None else tuned.tile
        widths.setdefault(f"{crossover} ({source})", []).append(str(channels))
    if len(widths) == 1:
        return next(iter(widths))
    return ", ".join(f"{crossover} with {_joined(channels)} channels" for crossover, channels in widths.items())


def _summary(entries: Sequence[Tuned]) -> str:
    """Summarise tuned entries, grouping ops that share dtype and width."""
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


def _fused_path(device: torch.device, dtype: torch.dtype) -> str:
    path, why = kernels_for(device, dtype)
    if path == "cpu":
        return f"{why}; below {LEAST_ELEMENTS_ON_CPU:,} elements of x plain PyTorch, which is faster"
    return f"plain PyTorch (the reference): {why}" if path == "plain" else why


def _linear_path(device: torch.device, dtype: torch.dtype) -> str:
    path, fused = kernels_for(device, dtype).path, _fused_path(device, dtype)
    if path == "triton":
        return f"{fused}; of GEMMs those that the crossovers choose, else cuBLAS"
    if path == "plain":
        return fused
    if dtype.itemsize < 4:
        return f"{fused}; dense GEMMs, since a CPU repacks slices of a 16-bit weight at every call"
    return f"{fused}; GEMMs on slices of the weight where windows are narrow or samples long enough, else dense"


def _conv_path(device: torch.device, dtype: torch.dtype) -> str:
    return (
        "PyTorch's convolution of the groups that the window touches, where a batch shares a window that is known as a "
        "Python number, outside torch.compile; else dense"
    )


def _surgery_path(device: torch.device, dtype: torch.dtype) -> str:
    path, why = choose_surgery(device, dtype)
    return f"PyTorch ops: {why}" if path == "plain" else why


# All other ops follow the choice for their kernels.
_PATHS: dict[str, Callable[[torch.device, torch.dtype], str]] = {
    "routed_linear": _linear_path,
    "routed_mlp": _linear_path,
    "routed_conv": _conv_path,
    **{kernel.name: _surgery_path for kernel in ops.KERNELS if kernel.sizes is CLUSTERS},
}
_OPS = [name for name in ops.__all__ if name not in ("pcgrad_coefficients", "random_order")]


def show() -> None:
    """Print ``collect()`` as text."""
    facts = collect()
    computed, built, tiles, crossovers = (facts.pop(name) for name in ("ops", "extension", "tiles", "crossovers"))
    for name, value in facts.items():
        print(f"{name:12} {', '.join(value) or 'none' if isinstance(value, list) else value}")
    for index, source in enumerate(tiles):
        print(f"{'tiles':12} cuda:{index}: {source}")
    for index, lines in enumerate(crossovers):
        what = f"tokens of a batch from which on our GEMM runs instead of cuBLAS, {_TOKENS} a sample"
        print(f"{'crossovers':12} cuda:{index}, {what}:")
        for line in lines:
            print(f"{'':12} {line}")
    if isinstance(built, str):
        print(f"{'extension':12} {built}")
    else:
        print(f"{'extension':12} compiler {built['compiler']}, instruction set {built['instruction_set']}")
        cuda = f"CUDA {built['cuda']} for {' '.join(built['architectures'])}"
        print(f"{'':12} {cuda if built['cuda'] else 'no CUDA kernels: ' + built['no_cuda_reason']}")
        print(f"{'':12} {extension.kernels.__file__}")
    alike: dict[str, list[str]] = {}
    for op, by_device in computed.items():
        alike.setdefault(json.dumps(by_device), []).append(op)
    for table, names in alike.items():
        print(f"\nWhat computes {_joined(names)}:")
        for device, by_dtype in json.loads(table).items():
            by_path: dict[str, list[str]] = {}
            for dtype, path in by_dtype.items():
                by_path.setdefault(path, []).append(dtype)
            for path, dtypes in by_path.items():
                print(f"  {device}, {_joined(dtypes)}: {path}")
