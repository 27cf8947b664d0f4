"""Peak memory of a call, and memory that autograd keeps for the backward pass."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def in_use(device: torch.device) -> int | None:
    """Return the bytes in use now.

    On a GPU these are PyTorch's allocations. On a CPU it is the resident memory of the process, which only Linux
    reports; elsewhere None.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _resident("VmRSS")


def peak(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the most bytes in use during ``call``; None like ``in_use``."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    restarted = True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from here: proc_pid_clear_refs(5)
    except OSError:
        restarted = False
    call()
    return _resident("VmHWM") if restarted else None


def saved_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor] = ()) -> int:
    """Count the bytes that autograd keeps for the backward pass of ``forward``, each storage once, no parameters."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in storages.values())


def _resident(field: str) -> int | None:
    try:
        # Memory that was freed but not returned to the system would count as used, and hide allocations of a call.
        ctypes.CDLL(None).malloc_trim(0)
        kilobytes = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except (OSError, AttributeError, TypeError):
        return None
    return int(kilobytes[1]) * 1024 if kilobytes else None
