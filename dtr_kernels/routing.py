"""The channels that each timestep sees: Denoising Task Routing (Park et al., ICLR 2024, section 4).

At timestep t a block sees W = int(beta * C) of its C channels, and DTR makes them neighbours: the window
``[start, start + W)``. A mask is therefore two integers per sample, never a [B, C] tensor, and that makes skipping
possible. Random routing (the paper's R-TR baseline) draws an arbitrary subset, which is not a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from dtr_kernels.quoting import quoted

__all__ = ["ChannelWindow", "DenoisingTaskRouting", "RandomRouting"]


@dataclass(frozen=True)
class ChannelWindow:
    """The channels each sample of a batch sees: ``start[b] <= c < start[b] + width``.

    Attributes:
        start: int32 [B], the first active channel of each sample, on the device of the batch, in 0..channels - width.
            CPU ops check the range where they use it, GPU ops do not.
        width: number of active channels W, the same for every sample; 1 <= W <= channels.
        channels: number of channels C of the residual stream. In scope "inner" these are attention heads.
        shared_start: the common start if the host knows it (sampling, t given as a Python number), else None. It
            selects a faster path and never changes the result.

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
        """Return the window as a bool mask [B, C], True where active (for the plain PyTorch path)."""
        channel = torch.arange(self.channels, device=self.start.device)
        offset = channel - self.start[:, None]
        return (offset >= 0) & (offset < self.width)

    def for_batch(self, batch_size: int, device: torch.device) -> ChannelWindow:
        """Return this window for ``batch_size`` samples on ``device``; a start of shape [1] is shared by all of them.

        Raises:
            ValueError: if the window holds the starts of another number of samples, or is on another device.
        """
        if self.shared_start is not None:
            start = torch.full((batch_size,), self.shared_start, dtype=torch.int32, device=device)
            return ChannelWindow(start, self.width, self.channels, self.shared_start)
        # Not by "in", which in a compiled graph does not see that two sizes are equal.
        if self.start.shape[0] != batch_size and self.start.shape[0] != 1:
            raise ValueError(
                f"window holds starts for {self.start.shape[0]} samples, but the batch has {batch_size}; "
                "make it from the t of this batch"
            )
        if self.start.device != device:
            raise ValueError(f"window is on {self.start.device}, but x is on {device}; make it from a t on {device}")
        return ChannelWindow(self.start.expand(batch_size).contiguous(), self.width, self.channels)


def is_integer(value: object) -> bool:
    """Return whether value is an integer, Python's or NumPy's."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Return an integer, NumPy's too, as an int.

    Raises:
        TypeError: if value is not an integer.
        ValueError: if it is less than ``least``, or not below 2**63, the limit of PyTorch's integers.
    """
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer of at least {least}, got {quoted(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {quoted(value)}")
    if value >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {quoted(value)}")
    return int(value)


def check_number(name: str, value: Any) -> int | float:
    """Return a number, NumPy's too, as an int or a float.

    Raises:
        TypeError: if value is not a number.
        ValueError: if it is larger than a float can be.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {quoted(value)}")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that fits into a float, got {quoted(value)}") from None
    return int(value) if isinstance(value, Integral) else float(value)


def check_timesteps(t: Any) -> None:
    """Refuse a t that is neither a vector [B] of integers or floating-point numbers nor a single number.

    Raises:
        TypeError: if t is neither a tensor nor a number.
        ValueError: if its shape or dtype does not fit, or it is a bool.
    """
    if isinstance(t, Tensor):
        if t.dim() != 1 or t.dtype == torch.bool or t.is_complex():
            raise ValueError(
                f"t must be a vector [B] of integer timesteps or of floating-point numbers, got {t.dtype} of shape "
                f"{list(t.shape)}"
            )
    elif isinstance(t, bool):
        raise ValueError(f"t must be a timestep, got {t}")
    elif not isinstance(t, Real):
        raise TypeError(f"t must be a tensor, an int or a float, got {type(t).__name__}")


def _check_ratio(beta: float) -> float:
    beta = check_number("beta", beta)
    if not 0 < beta <= 1:
        raise ValueError(f"beta, the ratio of active channels, must be in (0, 1], got {beta}")
    return beta


def window_width(beta: float, channels: int, name: str = "channels") -> int:
    """Return W = int(beta * C); error messages call the C things ``name``.

    Raises:
        ValueError: if W is 0.
    """
    width = int(beta * channels)
    if width < 1:
        raise ValueError(
            f"beta {beta} of {channels} {name} leaves none active; it must be at least 1/{channels} = "
            f"{1 / channels:.4g}"
        )
    return width


def check_range(t: Tensor, last: float, hint: str, name: str = "t") -> None:
    """Refuse t outside [0, last] without a host synchronisation: on a GPU and in compiled code by an assertion there.

    A floating-point t may be a few rounding units outside, of fp32 if it was made of a Python number.
    """
    message = f"{name} must be in 0..{last}; {hint}"
    margin: float = 0
    if t.is_floating_point() and last < math.inf:
        margin = 4 * max(torch.finfo(t.dtype).eps, torch.finfo(torch.float32).eps) * max(last, 1)
    t = t.double() if t.is_floating_point() else t.long()  # a narrow dtype would wrap ``last`` around, or round it
    valid = ((t >= -margin) & (t <= last + margin)).all()
    if t.device.type == "cpu" and not torch.compiler.is_compiling():  # a branch would break a graph
        if not valid:
            raise ValueError(f"{message}; got values from {t.min().item()} to {t.max().item()}")
    else:
        torch._assert_async(valid, message)


# A separate op, so that the range check (a data-dependent branch on a CPU) does not break a torch.compile graph.
@torch.library.custom_op("dtr_kernels::window_starts", mutates_args=())
def _window_starts(t: Tensor, num_timesteps: int, alpha: float, travel: int, float_timesteps: bool = False) -> Tensor:
    """Return start[b] = round(u[b]**alpha * travel), half to even, in fp64 as the reference code computes it."""
    if t.is_floating_point() and not float_timesteps:
        check_range(
            t,
            1,
            "a floating-point t is continuous time in [0, 1], and timestep numbers need an integer dtype or a routing "
            "made with float_timesteps=True; where time runs in another way, give swap_blocks a noise_level",
        )
        time = t.double()
    else:
        last = num_timesteps - 1
        check_range(t, last, f"the routing was made for num_timesteps={num_timesteps}")
        time = t.double()
        # As in numpy.linspace(0, 1, T): t / (T - 1) differs in the last bit, and so where halves are rounded.
        time = torch.where(time == max(last, 1), 1.0, time * (1 / max(last, 1)))
    # The exponent is a tensor on t's device: for small integers PyTorch would multiply, and differ from pow in the
    # last bit.
    exponent = torch.full((), alpha, dtype=torch.float64, device=t.device)
    return (time.clamp(0, 1) ** exponent * travel).round().to(torch.int32)


@_window_starts.register_fake
def _(t: Tensor, num_timesteps: int, alpha: float, travel: int, float_timesteps: bool = False) -> Tensor:
    return torch.empty_like(t, dtype=torch.int32)


@dataclass(frozen=True)
class DenoisingTaskRouting:
    """DTR's sliding window: equation 5 and section 4.2 of the paper.

    The window of timestep t starts at ``round(u[t] ** alpha * (C - W))`` with ``u = numpy.linspace(0, 1, T)`` and
    ``W = int(beta * C)``. Neighbouring timesteps share most of their channels, and alpha > 1 gives the noisy end of the
    process more channels of its own.

    Args:
        num_timesteps: T, the number of timesteps of the diffusion process the model was trained with. A respaced
            sampler passes the original timestep numbers.
        alpha: shape of the slide, > 0. The paper uses 4.
        beta: ratio of active channels, in (0, 1]. The paper uses 0.8; 1 is the ordinary, unrouted model.
        float_timesteps: take a floating-point t as a timestep number in 0..T-1, which may lie between two timesteps, as
            in diffusers' Euler schedulers. By default a floating-point t is a continuous time in [0, 1].

    Raises:
        TypeError: if an argument is not a number, num_timesteps not an integer or float_timesteps not a bool.
        ValueError: if beta is outside (0, 1], alpha <= 0, num_timesteps < 1, or an argument is too large for 64 bits.
    """

    num_timesteps: int = 1000
    alpha: float = 4.0
    beta: float = 0.8
    float_timesteps: bool = False

    def __post_init__(self) -> None:
        alpha = check_number("alpha", self.alpha)
        if not alpha > 0:
            raise ValueError(f"alpha, the exponent of the slide, must be greater than 0, got {alpha}")
        if not isinstance(self.float_timesteps, bool):
            raise TypeError(f"float_timesteps must be True or False, got {self.float_timesteps!r}")
        # Python's own numbers: ops and compiled code refuse NumPy's.
        _set(self, num_timesteps=check_count("num_timesteps", self.num_timesteps), alpha=alpha)
        _set(self, beta=_check_ratio(self.beta))

    def window(self, t: Tensor | int | float, channels: int) -> ChannelWindow:
        """Return the window of every sample of a batch, computed on t's device without a host synchronisation.

        Args:
            t: integer tensor [B] of timesteps 0..T-1, or floating-point tensor [B] of continuous times in [0, 1]
                (flow matching), with ``float_timesteps`` of timestep numbers in 0..T-1; or one Python or NumPy number
                shared by the whole batch (sampling). Floating-point numbers may be rounded past either end. Inside a
                function given to torch.compile, each value of a Python float compiles anew; an int or a tensor does
                not.
            channels: number of channels C of the residual stream; in scope "inner", of attention heads.

        Returns:
            ``ChannelWindow`` with start int32 [B] ([1] for a number).

        Raises:
            TypeError: if t is neither a tensor nor a number, or channels is not an integer.
            ValueError: if t is outside its range (on a GPU: a device-side assertion, so that nothing waits), has
                another shape or dtype, or if beta leaves no channel active.
        """
        channels = check_count("channels", channels)
        width = window_width(self.beta, channels)
        check_timesteps(t)
        settings = self.num_timesteps, self.alpha, channels - width, self.float_timesteps
        if isinstance(t, Tensor):
            return ChannelWindow(torch.ops.dtr_kernels.window_starts(t, *settings), width, channels)
        dtype = torch.int64 if isinstance(t, Integral) else torch.float64
        start = _window_starts(torch.tensor([t], dtype=dtype, device="cpu"), *settings)
        return ChannelWindow(start, width, channels, shared_start=int(start))


def _set(routing: Any, **values: Any) -> None:
    """Set fields of a frozen dataclass while it is made."""
    for name, value in values.items():
        object.__setattr__(routing, name, value)


@dataclass(frozen=True)
class RandomRouting:
    """Random task routing (R-TR), the paper's ablation baseline: a fixed random subset of channels for each timestep.

    The subset is not a window, so blocks run it through the plain PyTorch path, where nothing is skipped. Only integer
    timesteps have a subset, so floating-point timesteps are refused.

    Args:
        num_timesteps: T, the number of timesteps.
        beta: ratio of active channels, in (0, 1].
        seed: of the subsets; the same seed gives the same subsets on every device.

    Raises:
        TypeError: if num_timesteps or seed is not an integer or beta not a number.
        ValueError: if beta is outside (0, 1], num_timesteps < 1, seed < 0, or num_timesteps or seed is not below 2**63.
    """

    num_timesteps: int = 1000
    beta: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        _set(self, num_timesteps=check_count("num_timesteps", self.num_timesteps), beta=_check_ratio(self.beta))
        _set(self, seed=check_count("seed", self.seed, least=0))

    def mask(self, t: Tensor, channels: int) -> Tensor:
        """Return the bool mask [B, C], True where active, on t's device.

        Args:
            t: integer tensor [B] of timesteps 0..T-1.
            channels: number of channels C; in scope "inner", of attention heads.

        Raises:
            TypeError: if t is not a tensor, or channels not an integer.
            ValueError: if t is not an integer vector or is out of range (on a GPU: a device-side assertion).
        """
        if not isinstance(t, Tensor):
            raise TypeError(f"t must be a tensor [B] for random routing, got {type(t).__name__}")
        check_timesteps(t)
        if t.is_floating_point():
            raise ValueError(
                f"t must hold integer timesteps for random routing, got {t.dtype}; round it, as in t.round().long()"
            )
        channels = check_count("channels", channels)
        window_width(self.beta, channels)
        return torch.ops.dtr_kernels.random_masks(t, self.num_timesteps, self.beta, self.seed, channels)


@torch.library.custom_op("dtr_kernels::random_masks", mutates_args=())
def _random_masks(t: Tensor, num_timesteps: int, beta: float, seed: int, channels: int) -> Tensor:
    check_range(t, num_timesteps - 1, f"the routing was made for num_timesteps={num_timesteps}")
    return _random_table(num_timesteps, beta, seed, channels, t.device)[t.long()]


@_random_masks.register_fake
def _(t: Tensor, num_timesteps: int, beta: float, seed: int, channels: int) -> Tensor:
    return t.new_empty((t.shape[0], channels), dtype=torch.bool)


@lru_cache(maxsize=8)
def _random_table(num_timesteps: int, beta: float, seed: int, channels: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(num_timesteps, channels, generator=generator).argsort(dim=1)
    return (rank < window_width(beta, channels)).to(device)
