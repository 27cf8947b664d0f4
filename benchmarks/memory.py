"""Peak memory of a call, and what autograd keeps for the backward pass."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def with_peak(call: Callable[[], Result], device: torch.device) -> tuple[Result, int | None]:
    """The result of ``call``, and by how many bytes the memory in use rose above its level before.

    On a GPU the allocations of PyTorch are counted. On a CPU it is the resident memory of the process, which Linux
    alone tells; elsewhere None.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    try:
        # Memory that was freed before but not given back would hide what the call allocates in it.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from here: proc_pid_clear_refs(5)
        before = _resident("VmRSS")
    except (OSError, AttributeError, TypeError):
        return call(), None
    result = call()
    return result, _resident("VmHWM") - before


def saved_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of ``forward``: every storage once, without the parameters."""
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


def _resident(field: str) -> int:
    kilobytes = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if kilobytes is None:
        raise OSError(f"/proc/self/status has no {field} on {sys.platform}")
    return int(kilobytes[1]) * 1024
