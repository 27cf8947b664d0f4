"""The routed residual block of ADM, the U-Net of guided-diffusion, written once for our own module and for swapped
blocks of other models."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dtr_kernels import ops, reference
from dtr_kernels.nn.parts import ReadParts
from dtr_kernels.nn.torchscript import NoTorchScript
from dtr_kernels.ops.checks import check_floating, check_shape, check_tensor
from dtr_kernels.reference.unet import Resampling, resampling, rest_of_branch
from dtr_kernels.routing import ChannelWindow, check_count

__all__ = ["RoutedResBlock", "for_any_channels", "run_res_block"]


def run_res_block(block: Any, x: Tensor, emb: Tensor, window: ChannelWindow | None) -> Tensor:
    """Run one routed residual block of ADM, S(x) + h(m * x, emb). A window shared by the batch lets it skip channels.

    This is the DTR paper's equation 6 if the skip S is the identity; for blocks that change channels or resolution
    it is this library's own generalisation (``dtr_kernels.reference.unet``). Only the first norm and the first
    convolution see the mask. ``dtr_kernels.ops.routed_conv`` describes what is computed and what is skipped.

    Args:
        block: any module with the attributes of guided-diffusion's ResBlock: ``in_layers`` (GroupNorm, SiLU, a 3x3
            convolution with padding 1), ``emb_layers``, ``out_layers`` (GroupNorm and the layers that follow it),
            ``skip_connection``, ``use_scale_shift_norm``, and ``h_upd`` and ``x_upd`` if it may resample. Norms run
            in fp32; dropout follows its module.
        x: [B, C, H, W], floating point.
        emb: [B, E].
        window: active channels of each sample; None runs the unrouted block.

    Returns:
        [B, C_out, H', W'].

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes, dtypes, devices or the window do not fit x.
    """
    norm, _, conv = block.in_layers
    h = ops.routed_conv(
        x,
        norm.weight,
        norm.bias,
        norm.num_groups,
        norm.eps,
        conv.weight,
        conv.bias,
        window,
        for_any_channels(resampling(block, "h_upd")),
    )
    return block.skip_connection(resampling(block, "x_upd")(x)) + rest_of_branch(block, h, emb)


def for_any_channels(resample: Any) -> Resampling | None:
    """Return a block's resampling as a function of any number of channels; None for none.

    guided-diffusion's own modules insist on the channels of the block.
    """
    if isinstance(resample, nn.Identity):
        return None
    if not hasattr(resample, "channels"):
        return resample
    return getattr(resample, "op", partial(F.interpolate, scale_factor=2, mode="nearest"))


class RoutedResBlock(NoTorchScript, nn.Module):
    """A residual block of ADM, S(x) + h(m * x, emb), that skips deactivated channels if the batch shares a window.

    h is GroupNorm, SiLU, resampling, 3x3 convolution, conditioning by emb, GroupNorm, SiLU, dropout and 3x3
    convolution; S is x itself, resampled, or convolved if the number of channels changes. state_dict keys are those
    of guided-diffusion's ResBlock. The paper routes ADM too, but has published code for DiT only: the form for blocks
    that change channels or resolution is this library's own (``dtr_kernels.reference.unet``).

    Args:
        channels: number of input channels C, which the window selects from.
        emb_channels: width E of the conditioning vector.
        dropout: probability, before the last convolution.
        out_channels: number of output channels; None for C.
        use_conv: a skip that changes the number of channels is a 3x3 instead of a 1x1 convolution.
        use_scale_shift_norm: emb scales and shifts the second norm's output; otherwise it is added before the norm.
        up: double height and width (nearest).
        down: halve height and width (mean of 2x2).
        num_groups: of both norms; must divide C and out_channels.

    Raises:
        TypeError: if a number of channels or groups is not an integer.
        ValueError: if a number is less than 1, num_groups does not divide the channels, dropout is not a
            probability, or both up and down are asked for.
    """

    _read = ReadParts(
        {
            "in_layers": nn.Sequential,
            "in_layers.0": nn.GroupNorm,
            "in_layers.1": nn.SiLU,
            "in_layers.2": nn.Conv2d,
            "out_layers": nn.Sequential,
            "out_layers.0": nn.GroupNorm,
        }
    )

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float = 0.0,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = True,
        up: bool = False,
        down: bool = False,
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        channels, emb_channels = check_count("channels", channels), check_count("emb_channels", emb_channels)
        out_channels = channels if out_channels is None else check_count("out_channels", out_channels)
        num_groups = check_count("num_groups", num_groups)
        for name, number in (("channels", channels), ("out_channels", out_channels)):
            if number % num_groups:
                raise ValueError(f"{name} must be a multiple of num_groups, got {number} and {num_groups}")
        self.channels = channels
        self.emb_channels = emb_channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            nn.GroupNorm(num_groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.h_upd, self.x_upd = _resampling(up, down), _resampling(up, down)
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        last = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.out_layers = nn.Sequential(nn.GroupNorm(num_groups, out_channels), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = _skip(channels, out_channels, use_conv)

    def forward(self, x: Tensor, emb: Tensor, window: ChannelWindow | Tensor | None = None) -> Tensor:
        """Run the block.

        Args:
            x: [B, C, H, W], floating point.
            emb: conditioning [B, E].
            window: ``DenoisingTaskRouting.window(t, C)``; or a bool mask [B, C], which runs the plain PyTorch path
                (random routing); or None, the unrouted block. Channels are skipped for a window made of a Python
                number, which the batch shares; with one window per sample convolutions are dense.

        Returns:
            [B, out_channels, H', W'].

        Raises:
            ValueError: if shapes, dtypes, devices or the window do not fit x.
            TypeError: if x or emb is not floating point.
            RuntimeError: if a part that is not called, ``in_layers`` for one, was wrapped, patched or given hooks.
        """
        self._read.refuse_changes(self)
        check_floating("x", x, "; convert it with x.float()")
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must have shape [B, {self.channels}, H, W], got {list(x.shape)}")
        check_tensor("emb", emb, (x.shape[0], self.emb_channels), x)
        if isinstance(window, Tensor):
            check_shape("window, a mask,", window, (x.shape[0], self.channels), x)
            return reference.res_block(self, x, emb, window)
        return run_res_block(self, x, emb, window)


def _resampling(up: bool, down: bool) -> nn.Module:
    if up and down:
        raise ValueError("up and down were both asked for; a block does one of them at most")
    if up:
        return nn.Upsample(scale_factor=2, mode="nearest")
    return nn.AvgPool2d(2) if down else nn.Identity()


def _skip(channels: int, out_channels: int, use_conv: bool) -> nn.Module:
    if out_channels == channels:
        return nn.Identity()
    return nn.Conv2d(channels, out_channels, 3, padding=1) if use_conv else nn.Conv2d(channels, out_channels, 1)
