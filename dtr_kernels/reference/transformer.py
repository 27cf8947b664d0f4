"""Denoising Task Routing as the paper writes it: masks are multiplied, norms run over all channels, and autograd
computes the backward pass.

Notation: x [B, N, C] tokens, c [B, C] conditioning, mask [B, C] (1 = active; None = unrouted); shift, scale and gate
[B, C] are broadcast over tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SCOPES = ("block", "branch", "inner")
NORMS = ("layer", "rms")
ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "swiglu")


class BlockKind(NamedTuple):
    """The kind of a transformer block; the defaults are facebookresearch/DiT's.

    Attributes:
        norm: "layer" or "rms".
        affine: both norms have a weight, and LayerNorm a bias.
        activation: "gelu_tanh", "gelu", "silu" or "swiglu"; with "swiglu" fc1 has two outputs for each input of fc2.
        qk_norm: norm queries and keys, each head's channels by a norm of the same kind with a weight.
    """

    norm: str = "layer"
    affine: bool = False
    activation: str = "gelu_tanh"
    qk_norm: bool = False


Rope = Callable[[Tensor], Tensor]


def routing_mask(t: Tensor, channels: int, num_timesteps: int = 1000, alpha: float = 4.0, beta: float = 0.8) -> Tensor:
    """Return DTR's mask [B, C] for integer timesteps t [B], one sample after the other (section 4.2)."""
    width = int(beta * channels)
    mask = torch.zeros(len(t), channels, device=t.device)
    times = np.linspace(0, 1, num_timesteps)  # their last bits decide where halves are rounded
    for b, timestep in enumerate(t.tolist()):
        start = round(times[timestep] ** alpha * (channels - width))  # Python rounds half to even, as numpy does
        mask[b, start : start + width] = 1
    return mask


def modulate(z: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply adaLN modulation: z * (1 + scale) + shift."""
    return z * (1 + scale[:, None]) + shift[:, None]


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x with deactivated channels set to zero."""
    return x if mask is None else x * mask[:, None].to(x.dtype)


def normalize(x: Tensor, eps: float = 1e-6, norm: str = "layer") -> Tensor:
    """Apply LayerNorm or RMSNorm ("rms") over all C channels, deactivated zeros included, without affine parameters."""
    return (F.rms_norm if norm == "rms" else F.layer_norm)(x, x.shape[-1:], eps=eps)


def activate(x: Tensor, activation: str = "gelu_tanh") -> Tensor:
    """Apply one of ``ACTIVATIONS``; "swiglu" is SiLU(a) * b of the two halves a and b of the channels."""
    if activation == "swiglu":
        a, b = x.chunk(2, dim=-1)
        return F.silu(a) * b
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def routed_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    mask: Tensor | None = None,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    keep_branch: bool = False,
    eps: float = 1e-6,
    norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """Compute residual + gate, mask, norm and modulation between two linear layers.

    Returns the new residual stream x + gate * branch and the input of the next linear layer, both [B, N, C]. With
    ``keep_branch`` the mask acts on x alone and gate * branch passes on every channel: the second norm of scope
    "block".
    """
    if branch is None or gate is None:
        return x, modulate(normalize(masked(x, mask), eps, norm), shift, scale)
    update = gate[:, None] * branch
    stream = x + update
    seen = masked(x, mask) + update if keep_branch else masked(stream, mask)
    return stream, modulate(normalize(seen, eps, norm), shift, scale)


def routed_linear(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None = None,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """Return the new residual stream, and Linear(modulate(LN(mask * stream)))."""
    stream, u = routed_norm(x, shift, scale, mask, branch, gate, eps=eps, norm=norm)
    return stream, F.linear(u, weight, bias)


def routed_mlp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None = None,
    keep_branch: bool = False,
    eps: float = 1e-6,
    norm: str = "layer",
    activation: str = "gelu_tanh",
) -> tuple[Tensor, Tensor]:
    """Return the new residual stream, and fc2(GELU(fc1(modulate(LN(...))))), with GELU in its tanh form or another of
    ``ACTIVATIONS``."""
    stream, u = routed_norm(x, shift, scale, mask, branch, gate, keep_branch, eps, norm)
    hidden = activate(F.linear(u, fc1_weight, fc1_bias), activation)
    return stream, F.linear(hidden, fc2_weight, fc2_bias)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Return x + gate * branch."""
    return x + gate[:, None] * branch


def queries_and_keys(attn: Any, q: Tensor, k: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor]:
    """Return queries and keys [B, H, N, d] after attn's norms for them, if it has any, and their rotation by position.

    Raises:
        TypeError: if rope is no function.
        ValueError: if rope returns something else than floating-point numbers for as many channels.
    """
    given = q
    if hasattr(attn, "q_norm"):  # timm's optional norms, Identity by default
        q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        if not callable(rope):
            raise TypeError(f"rope must be a function of queries or keys, or None, got {type(rope).__name__}")
        q, k = rope(q), rope(k)
        for turned in (q, k):
            if not (isinstance(turned, Tensor) and turned.is_floating_point() and turned.shape == given.shape):
                found = f"{turned.dtype} {list(turned.shape)}" if isinstance(turned, Tensor) else type(turned).__name__
                raise ValueError(f"rope must return floating-point numbers {list(given.shape)}, as given, got {found}")
    return q.to(given.dtype), k.to(given.dtype)  # tables of cosines are often wider


def attention(u: Tensor, attn: Any, mask: Tensor | None = None, rope: Rope | None = None) -> Tensor:
    """Apply multi-head self-attention to tokens u [B, N, C], with timm's query and key norms if attn has them.

    mask [B, H], 1 where active, multiplies each head's input to the output projection. rope rotates queries and keys
    [B, H, N, C / H] by their positions.
    """
    B, N, C = u.shape
    q, k, v = attn.qkv(u).reshape(B, N, 3, attn.num_heads, C // attn.num_heads).permute(2, 0, 3, 1, 4)
    q, k = queries_and_keys(attn, q, k, rope)
    out = F.scaled_dot_product_attention(q, k, v)
    if mask is not None:
        out = out * mask[:, :, None, None].to(out.dtype)
    return attn.proj(out.transpose(1, 2).reshape(B, N, C))


def mlp(
    u: Tensor,
    fc1: torch.nn.Linear,
    fc2: torch.nn.Linear,
    mask: Tensor | None = None,
    activation: str = "gelu_tanh",
) -> Tensor:
    """Return fc2(GELU(fc1(u))), with GELU in its tanh form or another of ``ACTIVATIONS``.

    mask [B, H], 1 where active, multiplies the hidden channels; each column is repeated for an equal run of channels.
    """
    hidden = activate(fc1(u), activation)
    if mask is not None:
        hidden = masked(hidden, mask.repeat_interleave(hidden.shape[2] // mask.shape[1], dim=1))
    return fc2(hidden)


def dit_block(
    block: Any, x: Tensor, c: Tensor, mask: Tensor | None = None, scope: str = "block", rope: Rope | None = None
) -> Tensor:
    """Run one DiT block under a routing mask.

    Args:
        block: any module with the attributes of facebookresearch/DiT's block: ``attn.qkv``, ``attn.proj``,
            ``attn.num_heads``, ``mlp.fc1``, ``mlp.fc2``, ``adaLN_modulation``, and ``norm1.eps``, ``norm2.eps``; the
            norms' ``weight`` and ``bias`` if they have them; and ``kind`` if it has another ``BlockKind``.
        x: [B, N, C].
        c: [B, C].
        mask: [B, C], in scope "inner" [B, H] for H heads, 1 where active; None is the unrouted block.
        scope: "block" routes the whole residual block, as in the paper; "branch" masks the inputs of attention and of
            MLP; "inner" masks attention heads and hidden channels.
        rope: rotary position embedding, a function of queries or keys [B, H, N, C / H].

    Returns:
        [B, N, C].
    """
    s1, k1, g1, s2, k2, g2 = (m for m in block.adaLN_modulation(c).chunk(6, dim=1))
    kind: BlockKind = getattr(block, "kind", BlockKind())

    def normed(z: Tensor, norm: Any) -> Tensor:
        z, weight, bias = normalize(z, norm.eps, kind.norm), getattr(norm, "weight", None), getattr(norm, "bias", None)
        z = z if weight is None else z * weight
        return z if bias is None else z + bias

    def attend(z: Tensor, heads: Tensor | None = None) -> Tensor:
        return attention(modulate(normed(z, block.norm1), s1, k1), block.attn, heads, rope)

    def transform(z: Tensor, heads: Tensor | None = None) -> Tensor:
        u = modulate(normed(z, block.norm2), s2, k2)
        return mlp(u, block.mlp.fc1, block.mlp.fc2, heads, kind.activation)

    if scope == "inner":
        x = x + g1[:, None] * attend(x, mask)
        return x + g2[:, None] * transform(x, mask)
    if scope == "branch":
        x = x + g1[:, None] * attend(masked(x, mask))
        return x + g2[:, None] * transform(masked(x, mask))
    routed = masked(x, mask)
    routed = routed + g1[:, None] * attend(routed)
    routed = routed + g2[:, None] * transform(routed)
    return routed if mask is None else routed + x * (1 - mask[:, None].to(x.dtype))


def dit(model: Any, x: Tensor, t: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """Run a whole DiT under a routing mask.

    Args:
        model: an ``nn.DiT``, whose parameters and embeddings are used; a block's ``scope`` says what the mask routes.
        x: noisy input [B, in_channels, H, W]. t: timesteps [B]. y: labels [B].
        mask: [B, C], in scope "inner" [B, H], 1 where active; None is the unrouted model.

    Returns:
        [B, out_channels, H, W].
    """
    c = model.t_embedder(t) + model.y_embedder(y)
    tokens = model.x_embedder(x) + model.pos_embed
    for block in model.blocks:
        tokens = dit_block(block, tokens, c, mask, block.scope, model.rope)
    final = model.final_layer
    shift, scale = final.adaLN_modulation(c).chunk(2, dim=1)
    return model.unpatchify(final.linear(modulate(normalize(tokens, final.norm_final.eps), shift, scale)))
