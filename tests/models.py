"""Small stand-ins for the models that ``swap_blocks`` knows, with the attributes and forwards of the public ones."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """Self-attention as in timm: optional query and key norms, dropouts, and a path without the fused kernel."""

    def __init__(self, dim, num_heads, qk_norm=False, fused_attn=True, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale, self.fused_attn = self.head_dim**-0.5, fused_attn
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        heads = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = heads.transpose(1, 3).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            out = self.attn_drop((q * self.scale @ k.mT).softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """Two linear layers as in timm."""

    def __init__(self, dim, hidden, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class DiTBlock(nn.Module):
    """A block of facebookresearch/DiT."""

    def __init__(self, dim, num_heads, attn=None, mlp=None, **attn_options):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = attn or Attention(dim, num_heads, **attn_options)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = mlp or Mlp(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def branches(self, x, c):
        """x after both gated branches."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def forward(self, x, c):
        return self.branches(x, c)


class RMSNorm(nn.Module):
    """RMSNorm with a weight, as LightningDiT and JiT write it; the latter calls eps by another name."""

    def __init__(self, dim, eps="eps"):
        super().__init__()
        self.weight, self.name = nn.Parameter(1 + torch.randn(dim) / 4), eps
        setattr(self, eps, 1e-6)

    def forward(self, x):
        wide = x.float() if x.itemsize < 4 else x
        return (wide * (wide.square().mean(-1, keepdim=True) + getattr(self, self.name)).rsqrt()).to(x) * self.weight


class RotaryEmbedding(nn.Module):
    """Turns pairs of a head's channels [B, H, N, d] by an angle for each position."""

    def __init__(self, dim, tokens=256):
        super().__init__()
        angles = torch.arange(tokens)[:, None] / 100 ** (torch.arange(dim // 2) * 2 / dim)
        self.register_buffer("cos", angles.cos().repeat_interleave(2, 1))
        self.register_buffer("sin", angles.sin().repeat_interleave(2, 1))

    def forward(self, q):
        a, b = q.unflatten(-1, (-1, 2)).unbind(-1)
        N = q.shape[2]
        return q * self.cos[:N].to(q) + torch.stack([-b, a], -1).flatten(-2) * self.sin[:N].to(q)


class RotaryAttention(Attention):
    """Self-attention whose queries and keys are turned after they were normed."""

    def forward(self, x, rope=None):
        heads = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = heads.transpose(1, 3).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class SwiGLUFFN(nn.Module):
    """The gated MLP of LightningDiT and JiT."""

    def __init__(self, dim, hidden, drop=0.0):
        super().__init__()
        self.w12, self.w3, self.ffn_dropout = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim), nn.Dropout(drop)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.ffn_dropout(F.silu(a) * b))


class SeparateSwiGLU(nn.Module):
    """The gated MLP with a matrix for each of its halves, as language models name them."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.Linear(dim, hidden)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LightningDiTBlock(DiTBlock):
    """A block of LightningDiT, by default with all that it can have."""

    def __init__(self, dim, num_heads, rms=True, mlp=SwiGLUFFN, qk_norm=True, eps="eps"):
        super().__init__(dim, num_heads, RotaryAttention(dim, num_heads), mlp(dim, 2 * dim))
        if rms:
            self.norm1, self.norm2 = RMSNorm(dim, eps), RMSNorm(dim, eps)
        if qk_norm:
            self.attn.q_norm, self.attn.k_norm = RMSNorm(dim // num_heads, eps), RMSNorm(dim // num_heads, eps)

    def forward(self, x, c, feat_rope=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rope=feat_rope)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class JiTBlock(LightningDiTBlock):
    """A block of JiT."""

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads, eps="variance_epsilon")


class Router(nn.Module):
    """The router module of the public DTR code: a mask for every timestep, and that of the running batch."""

    def __init__(self, mapping: Tensor):
        super().__init__()
        self.active_task = 0
        self.register_buffer("_unit_mapping", mapping)

    def set_active_task(self, t):
        self.active_task = t
        self.active_mask = self._unit_mapping[t.long()][:, None]

    def forward(self, inputs, outputs):
        return outputs + inputs * (1 - self.active_mask)


class DTRBlock(DiTBlock):
    """A block of the public DTR code."""

    def __init__(self, dim, num_heads, mapping):
        super().__init__(dim, num_heads)
        self.routing = Router(mapping)

    def forward(self, x, c):
        return self.routing(x, self.branches(x * self.routing.active_mask, c))


class DiT(nn.Module):
    """A class-conditional DiT around given blocks.

    No parameter that matters is left at the zero it starts from in training, so that every gate is open.
    """

    def __init__(self, blocks, dim, reentrant: bool | None = None, rope: nn.Module | None = None):
        super().__init__()
        self.rope = rope  # what its blocks are given besides
        self.reentrant = reentrant  # of gradient checkpointing; None is without
        self.x_embedder = nn.Conv2d(3, dim, kernel_size=2, stride=2)
        self.t_embedder = nn.Linear(8, dim)
        self.y_embedder = nn.Embedding(10, dim)
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = nn.Linear(dim, 12)
        for block in self.blocks:
            nn.init.normal_(block.adaLN_modulation[-1].weight, std=dim**-0.5)
            nn.init.normal_(block.adaLN_modulation[-1].bias, std=0.5)

    def forward(self, x, t, y):
        """Images [B, 3, H, W], timesteps [B], labels [B] -> [B, 12, H / 2, W / 2]."""
        for module in self.modules():
            if isinstance(module, Router):
                module.set_active_task(t)
        x = self.x_embedder(x)
        grid = x.shape[2:]
        x = x.flatten(2).mT
        frequency = torch.arange(8, device=t.device).to(x.dtype)
        c = self.t_embedder(torch.cos(t[:, None].to(x.dtype) * 1e-2 * frequency)) + self.y_embedder(y)
        given = (c,) if self.rope is None else (c, self.rope)
        for block in self.blocks:
            x = (
                block(x, *given)
                if self.reentrant is None
                else checkpoint(block, x, *given, use_reentrant=self.reentrant)
            )
        return self.final_layer(x).mT.unflatten(2, grid)

    def forward_with_cfg(self, x, t, y, cfg_scale):
        """Guidance by a second half of the batch, without labels; calls forward itself, as the public code does."""
        conditional, unconditional = self.forward(x, t, y).chunk(2)
        return unconditional + cfg_scale * (conditional - unconditional)


class TimestepEmbedder(nn.Module):
    """Sines and cosines of the timestep, whatever its range, and an MLP."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        frequencies = 10000 ** -(torch.arange(128, device=t.device) / 128)
        angles = t[:, None].float() * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class FinalLayer(nn.Module):
    """The adaptive norm and the linear layer after the blocks."""

    def __init__(self, dim, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class PatchEmbed(nn.Module):
    """Patches of 2 x 2 as tokens."""

    def __init__(self, channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=2, stride=2)

    def forward(self, x):
        return self.proj(x).flatten(2).mT


class SiT(nn.Module):
    """A class-conditional model of latents [B, 4, 8, 8] around given blocks, with the attributes of SiT.

    SiT is built as facebookresearch/DiT is, and differs in what its timesteps are: times in [0, 1], from noise at 0 to
    data at 1. Here too every gate is open.
    """

    def __init__(self, blocks, dim, x_embedder=None):
        super().__init__()
        self.in_channels, self.out_channels, self.patch_size = 4, 8, 2
        self.x_embedder = x_embedder or PatchEmbed(4, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = nn.Embedding(10, dim)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, dim), requires_grad=False)
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(dim, 4 * self.out_channels)
        for block in self.blocks:
            nn.init.normal_(block.adaLN_modulation[-1].weight, std=dim**-0.5)
            nn.init.normal_(block.adaLN_modulation[-1].bias, std=0.5)

    def unpatchify(self, x):
        patches = x.unflatten(2, (2, 2, self.out_channels)).unflatten(1, (4, 4))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def forward(self, x, t, y):
        """Latents [B, 4, 8, 8], times [B], labels [B] -> [B, 4, 8, 8]."""
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))[:, :4]

    def forward_with_cfg(self, x, t, y, cfg_scale):
        """Guidance by the second half of the labels, for the images of the first half."""
        half = x[: len(x) // 2]
        conditional, unconditional = self.forward(torch.cat([half, half]), t, y).chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([guided, guided])


def change(path, value):
    """A function that replaces an attribute of a block, given as a dotted path."""
    *parents, name = path.split(".")
    return lambda block: setattr(functools.reduce(getattr, parents, block), name, value)


def become(kind):
    """A function that changes the class of a block."""
    return lambda block: setattr(block, "__class__", kind)


class LowRankLinear(nn.Linear):
    """A layer and something on top."""

    def forward(self, x):
        return super().forward(x) + x.mean()


class DropPath(nn.Identity):
    """Stochastic depth, by its attribute."""

    drop_prob = 0.1


DIM, HEADS, DEPTH, TIMESTEPS = 32, 4, 2, 50


def window_mapping(alpha: float = 4.0, beta: float = 0.8) -> Tensor:
    """The mapping [T, C] of the public DTR code."""
    width = int(DIM * beta)
    starts = (torch.tensor(np.linspace(0, 1, TIMESTEPS)) ** alpha * (DIM - width)).round()
    channel = torch.arange(DIM)
    return ((channel >= starts[:, None]) & (channel < starts[:, None] + width)).float()


def random_mapping(width: int = 25) -> Tensor:
    """The mapping [T, C] of the random baseline."""
    return (torch.rand(TIMESTEPS, DIM).argsort(dim=1) < width).float()


def facebook_dit(reentrant: bool | None = None, **attn_options) -> DiT:
    """A model of facebookresearch/DiT's shape."""
    return DiT([DiTBlock(DIM, HEADS, **attn_options) for _ in range(DEPTH)], DIM, reentrant)


def lightning_dit(kind=LightningDiTBlock, reentrant: bool | None = None, **options) -> DiT:
    """A model of LightningDiT's shape, or with JiT's blocks."""
    blocks = [kind(DIM, HEADS, **options) for _ in range(DEPTH)]
    return DiT(blocks, DIM, reentrant, RotaryEmbedding(DIM // HEADS))


def public_dtr(mapping: Tensor | None = None, reentrant: bool | None = None) -> DiT:
    """A model of the public DTR code's shape."""
    mapping = window_mapping() if mapping is None else mapping
    return DiT([DTRBlock(DIM, HEADS, mapping.clone()) for _ in range(DEPTH)], DIM, reentrant)


def sit(**attn_options) -> SiT:
    """A model of SiT's shape."""
    return SiT([DiTBlock(DIM, HEADS, **attn_options) for _ in range(DEPTH)], DIM)
