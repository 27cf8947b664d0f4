"""Residual blocks of guided-diffusion's U-Net (ADM) and its descendants."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtr_kernels import reference
from dtr_kernels.nn.res_block import RoutedResBlock, for_any_channels, run_res_block
from dtr_kernels.reference.unet import resampling
from dtr_kernels.routing import ChannelWindow
from dtr_kernels.swap import checks
from dtr_kernels.swap.family import Family, RandomTensor, inputs_of

_PARTS = ("in_layers", "emb_layers", "out_layers")
_NEEDED = (
    "in_layers.2",
    "out_layers.3",
    "skip_connection",
    "use_scale_shift_norm",
)
# The fused block calls the layers in _CALLED, whatever they are, and reads the parameters of those in _READ.
_CALLED = ("emb_layers", "out_layers.1", "out_layers.2", "out_layers.3", "x_upd", "skip_connection")
_READ = ("in_layers.0", "in_layers.2", "out_layers.0")


class ADM(Family):
    """The family of guided-diffusion's ResBlock. Its checkpointing calls ``_forward``, so that method is replaced."""

    name = "U-Net residual block"
    anatomy = "a module with children in_layers, emb_layers, out_layers and skip_connection, as guided-diffusion's"
    scopes = ("block",)

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        return set(_PARTS) <= dict(block.named_children()).keys()

    @classmethod
    def problems(cls, block: Any) -> Iterator[str]:
        if isinstance(block, RoutedResBlock):
            yield "it runs the fused kernels as it is; give it its window when calling it"
        yield from checks.missing_problems(block, _NEEDED, cls.name)
        yield from checks.argument_problems(block, cls.arguments, cls.method(type(block)))
        yield from checks.patch_problems(block, _CALLED, cls.method(type(block)))
        yield from _layer_problems(block)
        yield from checks.parameter_problems(block, _CALLED + _READ)
        yield from checks.dropout_problems(block, _CALLED)
        yield from _function_problems(block)

    @classmethod
    def calls(cls, block: Any) -> tuple[str, ...]:
        return _CALLED

    @classmethod
    def channels(cls, block: Any) -> int:
        return block.in_layers[2].in_channels

    @classmethod
    def conditioned(cls, block: Any) -> tuple[nn.Module, ...]:
        return (block.emb_layers,)

    @classmethod
    def weight(cls, block: Any) -> Tensor:
        return block.in_layers[2].weight

    @classmethod
    def method(cls, kind: type) -> str:
        return "_forward" if hasattr(kind, "_forward") else "forward"

    @classmethod
    def checkpoints(cls, block: Any) -> bool:
        return getattr(block, "use_checkpoint", False)

    @classmethod
    def run(cls, block: Any, x: Tensor, c: Tensor, window: ChannelWindow | None, scope: str) -> Tensor:
        return run_res_block(block, x, c, window)

    @classmethod
    def run_plain(cls, block: Any, x: Tensor, c: Tensor, mask: Tensor | None, scope: str) -> Tensor:
        return reference.res_block(block, x, c, mask)

    @classmethod
    def trial_input(cls, copy: Any, random: RandomTensor) -> tuple[Tensor, Tensor]:
        return random(2, cls.channels(copy), 4, 6), random(2, inputs_of(copy.emb_layers))

    @classmethod
    def prepare_trial(cls, copy: Any, c: Tensor, random: RandomTensor) -> Tensor | None:
        copy.out_layers[3] = _Open(copy.out_layers[3])
        return None


class _Open(nn.Module):
    """Adds its input to a convolution's output, which is zero in a fresh ADM and would hide earlier differences."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h) + h


def _layer_problems(block: Any) -> Iterator[str]:
    for name, length in (("in_layers", 3), ("out_layers", 4)):
        layers = getattr(block, name)
        if not isinstance(layers, nn.Sequential) or len(layers) != length:
            found = f"{type(layers).__name__} of {len(layers)} layers"
            yield f"{name} is {found}, not nn.Sequential of {length}; leave this model unswapped"
    if inputs_of(block.emb_layers) is None:
        yield "emb_layers holds no nn.Linear, which tells how wide the embedding is; leave this model unswapped"
    conv = block.in_layers[2]
    if not isinstance(conv, nn.Conv2d) or type(conv).forward is not nn.Conv2d.forward:
        yield f"in_layers.2 is {type(conv).__name__}, but the kernels read an nn.Conv2d's weight; leave it unswapped"
    geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    if geometry != ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"):
        yield f"in_layers.2 is {conv}, but the fused convolution is 3 x 3 with padding 1; leave this model unswapped"
    for name, channels in (("in_layers.0", conv.in_channels), ("out_layers.0", conv.out_channels)):
        norm = attrgetter(name)(block)
        if not isinstance(norm, nn.GroupNorm):
            yield f"{name} is {type(norm).__name__}, but the fused norm is nn.GroupNorm; leave this model unswapped"
        elif norm.weight is None:
            yield f"{name} has no affine parameters, which the fused norm reads; use affine=True"
        elif norm.num_channels != channels:
            yield f"{name} normalises {norm.num_channels} channels next to in_layers.2, which is {conv}"


def _function_problems(block: Any) -> Iterator[str]:
    """Report modules that the fused block replaces by functions."""
    z = torch.linspace(-4, 4, 33, device="cpu")
    if not torch.allclose(block.in_layers[1](z.clone()), F.silu(z), atol=1e-5):
        yield f"in_layers.1 is {block.in_layers[1]}, but the fused block computes nn.SiLU()"
    if not _resamples(block):
        found = resampling(block, "h_upd")
        yield (
            f"h_upd is {found}, but the fused block resamples to the nearest neighbour times 2, to the mean of 2 x 2, "
            "or not at all; leave this model unswapped"
        )


@torch.no_grad()
def _resamples(block: Any) -> bool:
    """Return whether h_upd is one of the three supported resamplings, for any number of channels.

    All three leave a constant image constant, on which the skipping of channels depends.
    """
    u = torch.randn(2, ADM.channels(block), 4, 4, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    upd = resampling(block, "h_upd")
    resample = for_any_channels(upd) or nn.Identity()
    try:
        whole, part = upd(u), resample(u[:, :1])
    except Exception:
        return False
    known = u, F.interpolate(u, scale_factor=2, mode="nearest"), F.avg_pool2d(u, 2)
    return torch.equal(part, whole[:, :1]) and any(torch.equal(whole, image) for image in known)
