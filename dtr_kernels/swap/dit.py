"""Blocks of facebookresearch/DiT and its descendants: timm's Attention and Mlp between adaLN modulations."""

from __future__ import annotations

from torch import nn

from dtr_kernels.swap.family import Family


class DiT(Family):
    """The family of facebookresearch/DiT: blocks without their own routing."""

    anatomy = (
        "a module with children norm1, attn (with qkv and proj), norm2, mlp (with fc1, act and fc2) and "
        "adaLN_modulation"
    )

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        children = dict(block.named_children())
        return "attn" in children and "adaLN_modulation" in children
