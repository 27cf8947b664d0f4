"""The first half of ADM's routed residual block: GroupNorm, SiLU, resampling and a 3x3 convolution of m * x, without
the deactivated channels.

A group of channels outside the window is all zeros. GroupNorm makes it exactly 0 before its affine parameters, so its
channels reach the convolution as constants over space, the same for every sample,

    v[c] = SiLU(norm_bias[c]),

since resampling (nearest, or the mean of neighbours) keeps constants. A constant channel adds its value times the sum
of the kernel's taps inside the image to the output: one number for the interior and one for each edge and corner. For
all constant channels together these are the convolution of an image of min(H, 3) x min(W, 3) pixels,

    out = Conv(u, weight[:, touched], bias) + stretched(Conv(v[others], weight[:, others])),

where u are the normalised channels of the groups that the window touches. In a group that the window cuts, a
deactivated channel is constant too, SiLU((0 - mean) * rstd * norm_weight[c] + norm_bias[c]), with statistics over the
whole group, zeros included. These channels, at most two groups less two channels, go through norm and convolution with
the active ones: removing them costs as much as it saves (ADM has 32 groups).

This applies to a window that the whole batch shares, if it saves time. With one window per sample the convolution is
dense: on a CPU it takes longer to gather weights for a grouped convolution, or to run one per sample. Inside
torch.compile it is dense as well, since every first channel would need its own graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dtr_kernels import reference
from dtr_kernels.ops.checks import DTYPES, check_parameters, check_tensor, check_window
from dtr_kernels.ops.dispatch import Choice, is_wrapper, made
from dtr_kernels.reference.unet import Resampling
from dtr_kernels.routing import ChannelWindow

# Costs of skipping, measured on a CPU. Copying a slice of the weight takes as long as using it at this many positions;
# all other overhead takes as long as this many products of an input and a weight at each of the kernel's taps.
_POSITIONS_PER_COPY = 150
_LEAST_PRODUCTS = 3 << 20


def routed_conv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    num_groups: int,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    window: ChannelWindow | None = None,
    resample: Resampling | None = None,
) -> Tensor:
    """Compute Conv3x3(resample(SiLU(GroupNorm(m * x)))), over the touched groups only if the batch shares the window.

    The result equals the dense convolution of masked input (DTR paper, equation 6), because a group without an active
    channel leaves the norm as constants known beforehand. With a window per sample, inside torch.compile, and for
    images too small for skipping to pay, the dense convolution of masked input runs.

    Args:
        x: [B, C, H, W], fp32, bf16, fp16 or fp64.
        norm_weight, norm_bias: affine parameters of the norm [C], any floating dtype.
        num_groups: of the norm; divides C. The norm runs in fp32 (fp64 for fp64) and its result is in x's dtype.
        eps: added to the variance.
        weight, bias: of the convolution, padded by one zero, [O, C, 3, 3] and [O] (or None), in x's dtype; autocast
            casts them.
        window: active channels of each sample; None for all.
        resample: applied between SiLU and the convolution; maps [B, K, H, W] to [B, K, H', W'] for any K, each channel
            by itself, and a constant channel to the same constant. None for no resampling.

    Returns:
        [B, O, H', W'] in the dtype of a convolution of x.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes, dtypes, devices, num_groups or the window do not fit x.
    """
    _check(x, norm_weight, norm_bias, num_groups, weight, bias)
    window = check_window(x.movedim(1, -1), window)
    norm, conv = (norm_weight, norm_bias, num_groups, eps), (weight, bias)
    choice = made(_choose(x, num_groups, weight, window, resample))
    if window is None or window.shared_start is None or choice.path == "dense":
        return reference.routed_conv(x, *norm, *conv, None if window is None else window.mask(), resample)

    first, last = _touched(window.shared_start, window, num_groups)
    start, end = window.shared_start, window.shared_start + window.width
    z = F.pad(x[:, start:end], (0, 0, 0, 0, start - first, last - end))
    groups = (last - first) * num_groups // window.channels
    u = F.silu(reference.group_norm(z, groups, norm_weight[first:last], norm_bias[first:last], eps))
    u = u if resample is None else resample(u)
    return _conv_among_constants(u, first, F.silu(norm_bias.to(x.dtype)), weight, bias)


def _check(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, num_groups: int, weight: Tensor, bias: Tensor | None
) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be floating point (fp32 to fp16, or fp64), got {x.dtype}; convert it with x.float()")
    if x.dim() != 4:
        raise ValueError(f"x must have shape [B, C, H, W], got {list(x.shape)}")
    C = x.shape[1]
    if num_groups < 1 or C % num_groups:
        raise ValueError(f"num_groups must divide the {C} channels of x, got {num_groups}")
    for name, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_tensor(name, vector, (C,), x)
    if tuple(weight.shape[1:]) != (C, 3, 3):
        raise ValueError(f"weight must have shape [O, {C}, 3, 3], got {list(weight.shape)}")
    check_parameters(x, "", weight, bias)


def _touched(start: int, window: ChannelWindow, num_groups: int) -> tuple[int, int]:
    """Return the first channel of the groups that a window from ``start`` touches, and the end of the last group."""
    end = start + window.width
    if not 0 <= start <= end <= window.channels:
        raise ValueError(
            f"window starts at channel {start}, but {window.width} of {window.channels} channels start in "
            f"0..{window.channels - window.width}"
        )
    per_group = window.channels // num_groups
    return start // per_group * per_group, -(-end // per_group) * per_group


def _choose(
    x: Tensor, num_groups: int, weight: Tensor, window: ChannelWindow | None, resample: Resampling | None
) -> Choice:
    """Choose whether ``routed_conv`` is "dense", over all channels of x, or reads only the "touched" groups."""
    if window is None:
        return Choice("dense", "unrouted")
    if window.shared_start is None:
        return Choice(
            "dense",
            "each sample has a window of its own; dtr.Sampler, for one timestep that the host knows, skips channels",
        )
    if is_wrapper(weight):
        return Choice("dense", f"its weight is a {type(weight).__name__}, of which no channels can be left out")
    if torch.compiler.is_compiling():
        return Choice("dense", "inside torch.compile every first channel would need a graph of its own")
    first, last = _touched(window.shared_start, window, num_groups)
    if not _pays(x, weight, last - first, resample):
        return Choice("dense", "the batch of images is too small for skipping to pay")
    return Choice("touched", "PyTorch's convolution of the groups that the window touches")


def _pays(x: Tensor, weight: Tensor, kept: int, resample: Resampling | None) -> bool:
    """Return whether convolving only ``kept`` channels saves time."""
    one = x[:1, :1].detach()
    positions = len(x) * (one if resample is None else resample(one)).numel()
    O, C = weight.shape[:2]
    return O * (positions * (C - kept) - _POSITIONS_PER_COPY * kept) > _LEAST_PRODUCTS


def _conv_among_constants(u: Tensor, first: int, constants: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve an image whose channels from number ``first`` on are u [B, K, H, W], and whose other channels hold their
    values in ``constants`` [C]."""
    kept, H, W = u.shape[1:]
    sizes = [first, kept, len(constants) - first - kept]
    before, _, after = constants.split(sizes)
    # One split instead of slices: its backward pass writes the weight's gradient once.
    weight_before, weight_kept, weight_after = weight.split(sizes, dim=1)
    others = torch.cat([before, after])[:, None, None].expand(1, -1, min(H, 3), min(W, 3))
    added = F.conv2d(others, torch.cat([weight_before, weight_after], dim=1), padding=1)
    return F.conv2d(u, weight_kept, bias, padding=1).add_(_stretched(_stretched(added, 2, H), 3, W))


def _stretched(image: Tensor, dim: int, size: int) -> Tensor:
    """Repeat the second of an image's three rows (or columns) until there are ``size``; leave fewer as they are."""
    if size <= 3:
        return image
    edge, interior, other_edge = image.split(1, dim)
    return torch.cat([edge, interior.repeat_interleave(size - 2, dim), other_edge], dim)
