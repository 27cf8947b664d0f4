"""Blocks of JiT ("Back to Basics: Let Denoising Generative Models Denoise"): RMSNorm, query and key norms, rotary
position embeddings, SwiGLU."""

from __future__ import annotations

from typing import Any

from torch import nn

from dtr_kernels.swap.checks import has
from dtr_kernels.swap.lightning_dit import LightningDiT
from dtr_kernels.swap.views import Layers, RMSNormLayer


class JiT(LightningDiT):
    """The family of JiT's blocks: LightningDiT's with another name for the norms' eps."""

    name = "JiT block"
    anatomy = "one whose norms have a weight and variance_epsilon besides"

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        return super().matches(block) and has(block, "norm1.variance_epsilon")

    @classmethod
    def layers(cls, block: Any) -> Layers:
        norm1, norm2 = (RMSNormLayer(norm.weight, norm.variance_epsilon) for norm in (block.norm1, block.norm2))
        return super().layers(block)._replace(norm1=norm1, norm2=norm2)
