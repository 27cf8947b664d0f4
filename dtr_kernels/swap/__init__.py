"""Fused blocks for models that exist: ``swap_blocks`` and its undoing, ``restore_blocks``."""

from dtr_kernels.swap.core import restore_blocks, swap_blocks

__all__ = ["restore_blocks", "swap_blocks"]
