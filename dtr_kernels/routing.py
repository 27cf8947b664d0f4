"""Which channels a timestep sees: Denoising Task Routing (Park et al., ICLR 2024, section 4).

At timestep t a block sees W = int(beta * C) of its C channels, and DTR makes them neighbours: the window
``[start, start + W)``. A mask is therefore two integers per sample, never a [B, C] tensor, and that is what makes
skipping possible. Random routing (the paper's R-TR baseline) draws an arbitrary subset, which is not a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real

import torch
from torch import Tensor

__all__ = ["ChannelWindow", "DenoisingTaskRouting", "RandomRouting"]


@dataclass(frozen=True)
class ChannelWindow:
    """The channels each sample of a batch sees: ``start[b] <= c < start[b] + width``.

    Attributes:
        start: int32 [B], the first active channel of each sample, on the device of the batch; in 0..channels - width,
            which is checked where it is used on a CPU and not on a GPU.
        width: number of active channels W, the same for every sample; 1 <= W <= channels.
        channels: number of channels C of the residual stream.
        shared_start: the common start where the host knows it (sampling, t given as a Python number), else None.
            It selects a faster path and never changes the result.

    Raises:
        ValueError: if ``start`` is not an int32 vector or ``width`` is outside 1..channels.
    """

    start: Tensor
    width: int
    channels: int
    shared_start: int | None = None

    def __post_init__(self) -> None:
        if self.start.dtype != torch.int32 or self.start.dim() != 1:
            raise ValueError(
                f"start must be an int32 tensor of shape [B], got {self.start.dtype} of shape {list(self.start.shape)}"
            )
        if not 1 <= self.width <= self.channels:
            raise ValueError(f"width must be between 1 and channels ({self.channels}), got {self.width}")

    def mask(self) -> Tensor:
        """The window as a bool mask [B, C], True where active (for the plain PyTorch path)."""
        channel = torch.arange(self.channels, device=self.start.device)
        offset = channel - self.start[:, None]
        return (offset >= 0) & (offset < self.width)

    def for_batch(self, batch_size: int, device: torch.device) -> ChannelWindow:
        """This window for ``batch_size`` samples on ``device``; a start of shape [1] is shared by all of them.

        Raises:
            ValueError: if the window holds the starts of another number of samples, or lives on another device.
        """
        if self.shared_start is not None:
            start = torch.full((batch_size,), self.shared_start, dtype=torch.int32, device=device)
            return ChannelWindow(start, self.width, self.channels, self.shared_start)
        if self.start.shape[0] not in (1, batch_size):
            raise ValueError(
                f"window holds starts for {self.start.shape[0]} samples, but the batch has {batch_size}; "
                "make it from the t of this batch"
            )
        if self.start.device != device:
            raise ValueError(f"window is on {self.start.device}, but x is on {device}; make it from a t on {device}")
        return ChannelWindow(self.start.expand(batch_size).contiguous(), self.width, self.channels)


def _check_ratio(beta: float, num_timesteps: int) -> None:
    if not 0 < beta <= 1:
        raise ValueError(f"beta, the ratio of active channels, must be in (0, 1], got {beta}")
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")


def _active_channels(beta: float, channels: int) -> int:
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    width = int(beta * channels)
    if width < 1:
        raise ValueError(
            f"beta {beta} of {channels} channels leaves none active; it must be at least 1/{channels} = "
            f"{1 / channels:.4g}"
        )
    return width


def _check_range(t: Tensor, last: float, hint: str) -> None:
    """Refuses t outside [0, last] without a host synchronisation: on a GPU as a device-side assertion."""
    message = f"t must be in 0..{last}; {hint}"
    if not t.is_floating_point():
        t = t.long()  # a narrow dtype would wrap ``last`` around
    valid = ((t >= 0) & (t <= last)).all()
    if t.device.type == "cpu":
        if not valid:
            raise ValueError(f"{message}; got values from {t.min().item()} to {t.max().item()}")
    else:
        torch._assert_async(valid, message)


# An op of its own, so that the range check (a data-dependent branch on a CPU) does not break a torch.compile graph.
@torch.library.custom_op("dtr_kernels::window_starts", mutates_args=())
def _window_starts(t: Tensor, num_timesteps: int, alpha: float, travel: int) -> Tensor:
    """start[b] = round(time**alpha * travel), half to even, in fp64 as the reference code computes it."""
    if t.is_floating_point():
        _check_range(
            t, 1, "a floating-point t is continuous time in [0, 1], and timestep numbers need an integer dtype"
        )
        time = t.double()
    else:
        _check_range(t, num_timesteps - 1, f"the routing was made for num_timesteps={num_timesteps}")
        time = t.double() / max(num_timesteps - 1, 1)
    # The exponent as a tensor on t's device: for small integers PyTorch would multiply, and differ from pow in the last
    # bit.
    exponent = torch.full((), alpha, dtype=torch.float64, device=t.device)
    return (time**exponent * travel).round().to(torch.int32)


@_window_starts.register_fake
def _(t: Tensor, num_timesteps: int, alpha: float, travel: int) -> Tensor:
    return torch.empty_like(t, dtype=torch.int32)


def _check_timesteps(t: Tensor) -> None:
    if t.dim() != 1 or t.dtype == torch.bool or t.is_complex():
        raise ValueError(
            "t must be a vector [B] of integer timesteps or of continuous times in [0, 1], "
            f"got {t.dtype} of shape {list(t.shape)}"
        )


@dataclass(frozen=True)
class DenoisingTaskRouting:
    """DTR's sliding window: equation 5 and section 4.2 of the paper.

    The window of timestep t starts at ``round((t / (T - 1)) ** alpha * (C - W))`` with ``W = int(beta * C)``.
    Neighbouring timesteps share most of their channels, and alpha > 1 gives the noisy end of the process more
    channels of its own.

    Args:
        num_timesteps: T, the number of timesteps of the diffusion process the model was trained with. A respaced
            sampler passes the original timestep numbers.
        alpha: shape of the slide, > 0. The paper uses 4.
        beta: ratio of active channels, in (0, 1]. The paper uses 0.8; 1 is the ordinary, unrouted model.

    Raises:
        ValueError: if beta is outside (0, 1], alpha <= 0 or num_timesteps < 1.
    """

    num_timesteps: int = 1000
    alpha: float = 4.0
    beta: float = 0.8

    def __post_init__(self) -> None:
        _check_ratio(self.beta, self.num_timesteps)
        if not self.alpha > 0:
            raise ValueError(f"alpha, the exponent of the slide, must be greater than 0, got {self.alpha}")

    def window(self, t: Tensor | int | float, channels: int) -> ChannelWindow:
        """The window of every sample of a batch, computed on t's device without a host synchronisation.

        Args:
            t: integer tensor [B] of timesteps 0..T-1, or floating-point tensor [B] of continuous times in [0, 1]
                (flow matching), or one Python number shared by the whole batch (sampling). Inside a function given
                to torch.compile a Python float compiles anew for each value; an int or a tensor does not.
            channels: number of channels C of the residual stream.

        Returns:
            ``ChannelWindow`` with start int32 [B] ([1] for a Python number).

        Raises:
            ValueError: if t is outside its range (on a GPU: a device-side assertion, so that nothing waits), has
                another shape or dtype, or if beta leaves no channel active.
        """
        width = _active_channels(self.beta, channels)
        if isinstance(t, Tensor):
            _check_timesteps(t)
            start = torch.ops.dtr_kernels.window_starts(t, self.num_timesteps, self.alpha, channels - width)
            return ChannelWindow(start, width, channels)
        if isinstance(t, bool):
            raise ValueError(f"t must be a timestep, got {t}")
        if not isinstance(t, Real):
            raise TypeError(f"t must be a tensor, an int or a float, got {type(t).__name__}")
        dtype = torch.int64 if isinstance(t, Integral) else torch.float64
        start = _window_starts(torch.tensor([t], dtype=dtype), self.num_timesteps, self.alpha, channels - width)
        return ChannelWindow(start, width, channels, shared_start=int(start))


@dataclass(frozen=True)
class RandomRouting:
    """Random task routing (R-TR), the paper's ablation baseline: a fixed random subset of channels for each timestep.

    The subset is not a window, so blocks run it through the plain PyTorch path, where nothing is skipped.

    Args:
        num_timesteps: T, the number of timesteps.
        beta: ratio of active channels, in (0, 1].
        seed: of the subsets; the same seed gives the same subsets on every device.

    Raises:
        ValueError: if beta is outside (0, 1] or num_timesteps < 1.
    """

    num_timesteps: int = 1000
    beta: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        _check_ratio(self.beta, self.num_timesteps)

    def mask(self, t: Tensor, channels: int) -> Tensor:
        """Bool mask [B, C], True where active, on t's device.

        Args:
            t: integer tensor [B] of timesteps 0..T-1.
            channels: number of channels C.

        Raises:
            ValueError: if t is not an integer vector or is out of range (on a GPU: a device-side assertion).
        """
        _check_timesteps(t)
        if t.is_floating_point():
            raise ValueError(f"t must hold integer timesteps for random routing, got {t.dtype}")
        _active_channels(self.beta, channels)
        return torch.ops.dtr_kernels.random_masks(t, self.num_timesteps, self.beta, self.seed, channels)


@torch.library.custom_op("dtr_kernels::random_masks", mutates_args=())
def _random_masks(t: Tensor, num_timesteps: int, beta: float, seed: int, channels: int) -> Tensor:
    _check_range(t, num_timesteps - 1, f"the routing was made for num_timesteps={num_timesteps}")
    return _random_table(num_timesteps, beta, seed, channels, t.device)[t.long()]


@_random_masks.register_fake
def _(t: Tensor, num_timesteps: int, beta: float, seed: int, channels: int) -> Tensor:
    return t.new_empty((t.shape[0], channels), dtype=torch.bool)


@lru_cache(maxsize=8)
def _random_table(num_timesteps: int, beta: float, seed: int, channels: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(num_timesteps, channels, generator=generator).argsort(dim=1)
    return (rank < _active_channels(beta, channels)).to(device)
