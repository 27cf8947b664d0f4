"""Denoising Task Routing of ADM's residual block: masks are multiplied, norms run over all channels, and autograd
computes the backward pass.

DTR's residual form (equation 6 of the paper) is

    out = Block(m * x) + (1 - m) * x,

and if the block's skip is the identity, Block(z) = z + h(z), this is x + h(m * x): routing changes the input of the
branch h and never touches the residual stream. The skip S of ADM's block may also resample x or convolve it to another
number of channels; it is linear in x up to its bias, and the same form for every kind of block is

    out = S(x) + h(m * x, emb).

This generalisation to blocks that change channels or resolution is this library's own: the paper names ADM as a
backbone, but its public code has DiT only.

Notation: x [B, C, H, W] images, emb [B, E] conditioning, mask [B, C] (1 = active; None = unrouted).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Resampling = Callable[[Tensor], Tensor]


def masked_image(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x [B, C, H, W] with deactivated channels set to zero."""
    return x if mask is None else x * mask[:, :, None, None].to(x.dtype)


def group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Apply GroupNorm in fp32 (fp64 for fp64), deactivated zeros included; the result is in x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.group_norm(x.to(wide), num_groups, weight.to(wide), bias.to(wide), eps).to(x.dtype)


def routed_conv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    num_groups: int,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None = None,
    resample: Resampling | None = None,
) -> Tensor:
    """Return Conv3x3(resample(SiLU(GroupNorm(mask * x)))) with zeros around the image."""
    u = F.silu(group_norm(masked_image(x, mask), num_groups, norm_weight, norm_bias, eps))
    return F.conv2d(u if resample is None else resample(u), weight, bias, padding=1)


def res_block(block: Any, x: Tensor, emb: Tensor, mask: Tensor | None = None) -> Tensor:
    """Run one residual block of ADM under a routing mask.

    Args:
        block: any module with the attributes of guided-diffusion's ResBlock: ``in_layers``, ``emb_layers``,
            ``out_layers``, ``skip_connection``, ``use_scale_shift_norm``, and ``h_upd`` and ``x_upd`` if it may
            resample (improved-diffusion's has none).
        x: [B, C, H, W].
        emb: [B, E].
        mask: [B, C], 1 where active; None is the unrouted block.

    Returns:
        [B, C_out, H', W'].
    """
    norm, _, conv = block.in_layers
    h = routed_conv(
        x, norm.weight, norm.bias, norm.num_groups, norm.eps, conv.weight, conv.bias, mask, resampling(block, "h_upd")
    )
    return block.skip_connection(resampling(block, "x_upd")(x)) + rest_of_branch(block, h, emb)


def resampling(block: Any, name: str) -> Resampling:
    """Return the block's resampling of h or x by its name, ``h_upd`` or ``x_upd``; the identity if it has none."""
    return getattr(block, name, nn.Identity())


def rest_of_branch(block: Any, h: Tensor, emb: Tensor) -> Tensor:
    """Finish the branch from h, the output of the first convolution: conditioning, norm, SiLU, dropout and the second
    convolution."""
    norm, rest = block.out_layers[0], block.out_layers[1:]
    conditioning = block.emb_layers(emb).to(h.dtype)[:, :, None, None]
    if block.use_scale_shift_norm:
        scale, shift = conditioning.chunk(2, dim=1)
        return rest(group_norm(h, norm.num_groups, norm.weight, norm.bias, norm.eps) * (1 + scale) + shift)
    return rest(group_norm(h + conditioning, norm.num_groups, norm.weight, norm.bias, norm.eps))
