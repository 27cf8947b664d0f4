"""Blocks of the DTR paper's public code: DiT blocks that hold their masks in a router module."""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dtr_kernels.routing import ChannelWindow
from dtr_kernels.swap.dit import DiT
from dtr_kernels.swap.family import RandomTensor, WindowSource


class PublicDTR(DiT):
    """Blocks with ``routing._unit_mapping`` [T, C] and ``routing.active_task`` [B], which the model's forward sets."""

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        return DiT.matches(block) and hasattr(getattr(block, "routing", None), "_unit_mapping")

    @classmethod
    def windows(cls, block: Any) -> WindowSource:
        return MappingWindows(block.routing._unit_mapping)

    @classmethod
    def prepare_trial(cls, copy: Any, c: Tensor, random: RandomTensor) -> Tensor:
        super().prepare_trial(copy, c, random)
        router = copy.routing
        router.active_task = torch.tensor([0, len(router._unit_mapping) - 1], device=router._unit_mapping.device)
        mask = router._unit_mapping[router.active_task]
        router.active_mask = mask[:, None]
        return mask


class _Reading(NamedTuple):
    """A mapping as it was read: starts int32 [T], None if its rows are not windows of one width."""

    mapping: Tensor
    version: int
    starts: Tensor | None
    width: int


class MappingWindows:
    """The windows in a router's mapping, read once, and again after the mapping has changed."""

    def __init__(self, mapping: Tensor) -> None:
        self._reading = None if mapping.is_meta else _read(mapping)

    def window_of(self, block: Any) -> ChannelWindow | Tensor:
        """Return the windows of the active tasks; their mask [B, C] if the mapping has no windows of one width."""
        mapping, task = block.routing._unit_mapping, block.routing.active_task.long()
        if torch.compiler.is_compiling() and self._reading is not None:
            return _checked_window(mapping[task], self._reading)
        # Loading a state dict writes to the mapping; moving the model replaces it.
        if self._reading is None or self._reading.mapping is not mapping or self._reading.version != _version(mapping):
            self._reading = _read(mapping)
        _, _, starts, width = self._reading
        return mapping[task] if starts is None else ChannelWindow(starts[task], width, mapping.shape[1])

    def width_of(self, block: Any) -> int | None:
        reading = self._reading or _read(block.routing._unit_mapping)
        return None if reading.starts is None else reading.width


def _checked_window(mask: Tensor, reading: _Reading) -> ChannelWindow | Tensor:
    """Return the window of each row of mask [B, C] inside a graph, and check that the mapping still holds it."""
    if reading.starts is None:
        return mask
    window = ChannelWindow(mask.argmax(dim=1).int(), reading.width, mask.shape[1])
    message = "routing._unit_mapping was changed to other than windows of the compiled width; compile the model again"
    torch._assert_async((window.mask() == mask).all(), message)
    return window


def _version(mapping: Tensor) -> int:
    """Return the number of changes in place; 0 for inference tensors, which do not count them."""
    return 0 if mapping.is_inference() else mapping._version


def _read(mapping: Tensor) -> _Reading:
    active = (mapping != 0).int()  # integers, since bf16 cannot count exactly beyond 256
    width, starts = int(active[0].sum()), active.argmax(dim=1).int()
    if width < 1 or not torch.equal(ChannelWindow(starts, width, mapping.shape[1]).mask().to(mapping), mapping):
        _warn_no_window()
        return _Reading(mapping, _version(mapping), None, width)
    return _Reading(mapping, _version(mapping), starts, width)


@functools.cache
def _warn_no_window() -> None:
    """Warn once in a process, not once for every block."""
    warnings.warn(
        "routing._unit_mapping is not a window of channels for every timestep (random routing is not), so its blocks "
        "run the plain PyTorch path, where nothing is skipped",
        stacklevel=2,
    )
