"""Checks that refuse bad input by name, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dtr_kernels import reference
from dtr_kernels.routing import ChannelWindow, check_number

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_block(x: Tensor, c: Tensor, channels: int) -> None:
    """Check that x [B, N, channels] and c [B, channels] are floating point and on x's device.

    Raises:
        TypeError: if x or c is not floating point.
        ValueError: if a shape or device does not fit.
    """
    check_floating("x", x, "; convert it with x.float()")
    if x.dim() != 3 or x.shape[-1] != channels:
        raise ValueError(f"x must have shape [B, N, {channels}], got {list(x.shape)}")
    check_tensor("c", c, (x.shape[0], channels), x)


def check_stream(x: Tensor, branch: Tensor | None, gate: Tensor | None, **modulation: Tensor) -> None:
    """Check x [B, N, C]; branch like x; gate and each of ``modulation`` [B, C]: all floating point, on x's device.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if a shape or device does not fit x, or only one of branch and gate is given.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be floating point (fp32 to fp16, or fp64), got {x.dtype}; convert it with x.float()")
    if x.dim() != 3:
        raise ValueError(f"x must have shape [B, N, C], got {list(x.shape)}")
    if (branch is None) != (gate is None):
        raise ValueError("branch and gate belong together: give both or neither")
    B, _, C = x.shape
    if branch is not None and gate is not None:
        check_tensor("branch", branch, (B, x.shape[1], C), x)
        check_tensor("gate", gate, (B, C), x)
    for name, vector in modulation.items():
        check_tensor(name, vector, (B, C), x)


def check_linear(x: Tensor, name: str, weight: Tensor, bias: Tensor | None, inputs: int) -> None:
    """Check weight [O, inputs] and bias [O]: in x's dtype (under autocast, which casts them, any floating dtype).

    Raises:
        ValueError: if a shape, dtype or device does not fit.
    """
    if weight.dim() != 2 or weight.shape[1] != inputs:
        raise ValueError(f"{name}weight must have shape [O, {inputs}], got {list(weight.shape)}")
    check_parameters(x, name, weight, bias)


def check_parameters(x: Tensor, name: str, weight: Tensor, bias: Tensor | None) -> None:
    """Check weight [O, ...] and bias [O]: in x's dtype (under autocast, which casts them, any floating dtype).

    Raises:
        ValueError: if a shape, dtype or device does not fit.
    """
    check_tensor(f"{name}weight", weight, tuple(weight.shape), x)
    if bias is not None:
        check_tensor(f"{name}bias", bias, (weight.shape[0],), x)
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return
    for kind, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(
                f"{name}{kind} is {tensor.dtype} but x is {x.dtype}; convert one of them or use torch.autocast"
            )


def check_norm(eps: float, norm: str) -> None:
    """Raise ValueError or TypeError unless norm is one of ``reference.NORMS`` and eps what it can add."""
    check_one_of("norm", norm, reference.NORMS)
    if not 0 <= check_number("eps", eps) < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")


def check_one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise ValueError unless value is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_window(x: Tensor, window: ChannelWindow | None) -> ChannelWindow | None:
    """Return the window for x's batch, device and channels, or None if it leaves every channel active.

    Raises:
        TypeError: if window is not a ChannelWindow.
        ValueError: if it was made for another batch, device or number of channels.
    """
    if window is None:
        return None
    if not isinstance(window, ChannelWindow):
        raise TypeError(f"window must be a ChannelWindow or None, got {type(window).__name__}")
    if window.channels != x.shape[-1]:
        raise ValueError(f"window is for {window.channels} channels, but x has {x.shape[-1]}")
    window = window.for_batch(x.shape[0], x.device)
    return None if window.width == window.channels else window


def check_heads(x: Tensor, window: ChannelWindow, heads: int | None = None) -> ChannelWindow:
    """Return the window over attention heads for x's batch, on the CPU if the host knows it, else on x's device.

    Raises:
        TypeError: if window is not a ChannelWindow.
        ValueError: if it was made for another batch, another device or, if ``heads`` is given, other heads.
    """
    if not isinstance(window, ChannelWindow):
        raise TypeError(f"window must be a ChannelWindow, got {type(window).__name__}")
    if heads is not None and window.channels != heads:
        raise ValueError(
            f'window is for {window.channels} channels, but in scope "inner" it is one over {heads} heads; make it by '
            f"routing.window(t, channels={heads})"
        )
    on_host = window.shared_start is not None or window.start.device.type == "cpu"
    return window.for_batch(x.shape[0], torch.device("cpu") if on_host else x.device)


def check_floating(name: str, tensor: Tensor, hint: str = "") -> None:
    """Raise TypeError unless ``tensor`` is a floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be floating point, a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}{hint}")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    check_floating(name, tensor)
    check_shape(name, tensor, shape, x)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)} to fit x {list(x.shape)}, got {list(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}; move one of them")
