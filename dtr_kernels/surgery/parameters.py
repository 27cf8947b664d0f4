"""The parameters of gradient surgery: by name, without duplicates, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeGuard

import torch
from torch import Tensor

from dtr_kernels.ops.gradient_lists import DTYPES


def named(params: Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return parameters by name; a parameter without a name is called by its position. Duplicates are ignored."""
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(f"params must be parameters such as model.named_parameters(), got one {type(params).__name__}")
    by_name: dict[str, Tensor] = {}
    seen: set[Tensor] = set()
    for i, item in enumerate(params):
        name, p = item if _is_pair(item) else (f"params[{i}]", item)
        if not isinstance(p, Tensor):
            raise TypeError(f"{name} must be a tensor or a (name, tensor) pair, got {type(p).__name__}")
        if not p.is_leaf:
            raise ValueError(f"{name} must be a parameter, got the result of a computation")
        if p in seen:
            continue
        if name in by_name:
            raise ValueError(f"params must have different names, got two parameters of the name {name!r}")
        by_name[name] = p
        seen.add(p)
    return by_name


def _is_pair(item: object) -> TypeGuard[tuple[str, Tensor]]:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)


def trainable(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters that require grad now, checked to be on one device and of a supported dtype."""
    found = {name: p for name, p in parameters.items() if p.requires_grad}
    if not found:
        raise ValueError(
            "params must hold at least one parameter that requires grad, got none; an iterator such as "
            "model.parameters() that something else has used up is empty, so pass list(...) to both"
        )
    for name, p in found.items():
        if p.dtype not in DTYPES:
            raise TypeError(f"params must be fp32, bf16, fp16 or fp64, but {name} is {p.dtype}")
    devices = {p.device for p in found.values()}
    if len(devices) > 1:
        raise ValueError(f"params must be on one device, got {', '.join(sorted(map(str, devices)))}")
    return found


def device_of(parameters: Mapping[str, Tensor]) -> torch.device:
    """Return the one device of the parameters."""
    return next(iter(parameters.values())).device
