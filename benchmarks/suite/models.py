"""Models that the benchmarks run."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

import dtr_kernels as dtr
from dtr_kernels.routing import DenoisingTaskRouting

TINY, LIGHTNING = "tiny", "LightningDiT-XL/1"
MODELS = (TINY, *dtr.nn.DiT_models, LIGHTNING)


def dit_channels(name: str) -> int:
    """Return the channels of the named model; raise ValueError if there is none."""
    if name not in MODELS:
        raise ValueError(f"--model must be one of {', '.join(MODELS)}, got {name}")
    return blueprint(name).hidden_size


@lru_cache
def blueprint(model: str) -> dtr.nn.DiT:
    """Return a DiT without memory for its parameters."""
    with torch.device("meta"):
        return make_dit(model, torch.device("meta"), torch.float32)


def make_dit(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    routing: DenoisingTaskRouting | None = None,
    scope: str = "block",
) -> dtr.nn.DiT:
    """Build a DiT of a published size for latents of 32 x 32 (images of 256 x 256), or "tiny"; or one of LightningDiT's
    blocks, for its latents of 16 x 16.

    Training starts with closed gates and a last layer of zeros, so that most gradients are zero; here all weights are
    random. Labels are never dropped, so that all sides that train the model on a batch compute the same.
    """
    chosen = {"routing": routing, "scope": scope, "class_dropout_prob": 0}
    if name == TINY:
        model = dtr.nn.DiT(input_size=16, hidden_size=128, depth=2, num_heads=4, **chosen)  # type: ignore[arg-type]
    elif name == LIGHTNING:
        kind = dtr.nn.BlockKind(norm="rms", affine=True, activation="swiglu", qk_norm=True)
        sizes = {"input_size": 16, "patch_size": 1, "in_channels": 32, "learn_sigma": False, "mlp_ratio": 3072 / 1152}
        rope = rotary(16 * 16, 1152 // 16, device)
        model = dtr.nn.DiT(**sizes, kind=kind, rope=rope, **chosen)  # type: ignore[arg-type]
    else:
        model = dtr.nn.DiT_models[name](input_size=32, **chosen)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.02)
    return model.to(device, dtype)


def rotary(tokens: int, channels: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a rotary embedding of queries or keys [B, heads, tokens, channels]: it rotates pairs of channels by the
    token's number times 1 to 1 / 10000."""
    frequencies = 10_000 ** -torch.linspace(0, 1, channels // 2, device=device)
    angles = torch.outer(torch.arange(tokens, device=device), frequencies)
    cos, sin = angles.cos(), angles.sin()

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=3)
        c, s = cos.to(x.dtype), sin.to(x.dtype)
        return torch.cat([a * c - b * s, a * s + b * c], dim=3)

    return turned
