"""Blocks of LightningDiT: RMSNorm or LayerNorm, rotary position embeddings, query and key norms, SwiGLU."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtr_kernels import reference
from dtr_kernels.nn.block import BlockKind, Stream, advance
from dtr_kernels.reference.transformer import Rope
from dtr_kernels.routing import ChannelWindow
from dtr_kernels.swap.checks import has
from dtr_kernels.swap.family import TRIAL_TOKENS, Family, RandomTensor, Unfit
from dtr_kernels.swap.views import Layers, MlpLayers, StackedLinear


class _Conditioning(NamedTuple):
    """c [B, C], and the model's rotary embedding of queries and keys, for the attention only."""

    c: Tensor
    feat_rope: Rope | None


class LightningDiT(Family):
    """The family of LightningDiT's blocks, in all variants of its constructor."""

    name = "LightningDiT block"
    anatomy = (
        "a module with children norm1, attn, norm2, mlp (with w12 and w3, or w1, w3 and w2) and adaLN_modulation, and "
        "an argument feat_rope of its forward"
    )

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        children = dict(block.named_children())
        takes_rope = "feat_rope" in inspect.signature(type(block).forward).parameters
        return takes_rope and "attn" in children and "adaLN_modulation" in children

    @classmethod
    def layers(cls, block: Any) -> Layers:
        mlp = block.mlp
        if has(block, "mlp.w12"):
            mlp = MlpLayers(mlp.w12, F.silu, mlp.w3)
        elif has(block, "mlp.w1"):
            mlp = MlpLayers(StackedLinear((mlp.w1, mlp.w3)), F.silu, mlp.w2)
        kind = BlockKind(
            norm="layer" if isinstance(block.norm1, nn.LayerNorm) else "rms",
            affine=any(getattr(norm, "weight", None) is not None for norm in (block.norm1, block.norm2)),
            activation="gelu_tanh" if mlp is block.mlp else "swiglu",
        )
        return Layers(block.norm1, block.attn, block.norm2, mlp, block.adaLN_modulation, kind)

    @classmethod
    def arguments(cls, x: Any, c: Any, feat_rope: Any = None) -> tuple[Tensor, Any]:
        return x, _Conditioning(c, feat_rope)

    @classmethod
    def marker(cls, c: _Conditioning) -> Tensor:
        return c.c

    @classmethod
    def run(cls, block: Any, x: Tensor, c: _Conditioning, window: ChannelWindow | None, scope: str) -> Tensor:
        return advance(cls.layers(block), Stream(x), c.c, window, scope, c.feat_rope).sum()

    @classmethod
    def run_plain(cls, block: Any, x: Tensor, c: _Conditioning, mask: Tensor | None, scope: str) -> Tensor:
        return reference.dit_block(cls.layers(block), x, c.c, mask, scope, c.feat_rope)

    @classmethod
    def trial_input(cls, copy: Any, random: RandomTensor) -> tuple[Any, ...]:
        return *super().trial_input(copy, random), _turned

    @classmethod
    def prepare_trial(cls, copy: Any, c: _Conditioning, random: RandomTensor) -> Tensor | None:
        mask = super().prepare_trial(copy, c.c, random)
        x = random(2, TRIAL_TOKENS, cls.channels(copy))
        try:
            found = copy(x, c.c)
        except Exception:  # a block that always needs a rope, as JiT's does, is never called without
            return mask
        expected = cls.run_plain(copy, x, c._replace(feat_rope=None), mask, "block")
        if (found - expected).abs().max() > torch.finfo(x.dtype).eps ** 0.5 * expected.abs().max():
            raise Unfit(f"without feat_rope its forward computes something else than a {cls.name}; leave it unswapped")
        return mask


def _turned(q: Tensor) -> Tensor:
    """Return q [B, H, N, d] with each channel turned towards its neighbour by its position's angle.

    Unlike a rotary embedding it changes lengths, so a norm before it is another function than one after it.
    """
    angle = torch.arange(q.shape[2], device=q.device, dtype=q.dtype)[:, None] / 10
    return q * angle.cos() + q.roll(1, dims=3) * angle.sin()
