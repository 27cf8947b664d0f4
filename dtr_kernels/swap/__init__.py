"""Fused blocks for existing models: ``swap_blocks``, ``restore_blocks`` to undo it, and families of blocks."""

from dtr_kernels.swap.core import one_timestep, restore_blocks, swap_blocks
from dtr_kernels.swap.family import Family
from dtr_kernels.swap.registry import register_family
from dtr_kernels.swap.views import AttentionLayers, Layers, MlpLayers, RMSNormLayer, StackedLinear

__all__ = [
    "AttentionLayers",
    "Family",
    "Layers",
    "MlpLayers",
    "RMSNormLayer",
    "StackedLinear",
    "one_timestep",
    "register_family",
    "restore_blocks",
    "swap_blocks",
]
