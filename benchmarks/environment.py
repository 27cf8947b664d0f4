"""Description of the machine and the versions that something was measured with."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dtr_kernels import info
from dtr_kernels.ops.tuned_tiles import slug

_ROOT = Path(__file__).parent.parent


def describe(device: torch.device) -> dict[str, Any]:
    """Return the machine, the versions, the commit and the command; for a GPU also the origin of its kernels' tiles.

    ``commit`` is None outside a git checkout.
    """
    # Without optional locks git only reads; results written meanwhile do not count as changes to the code.
    changes = _output("git", "--no-optional-locks", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    facts = info.collect()
    on_gpu, index = device.type == "cuda", device.index
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        **{name: facts[name] for name in ("python", "torch", "cuda", "triton")},
        "torchjd": _version("torchjd"),
        **{name: facts[name] for name in ("dtr_kernels", "extension")},
        **({"tiles": facts["tiles"][torch.cuda.current_device() if index is None else index]} if on_gpu else {}),
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted changes": None if changes is None else changes != "",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
    }


def folder_name(device: torch.device) -> str:
    """Return "cpu", or the name of the GPU in the form of a folder's."""
    return "cpu" if device.type == "cpu" else slug(torch.cuda.get_device_name(device))


def _cpu() -> str:
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
