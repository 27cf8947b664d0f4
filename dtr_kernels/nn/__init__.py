"""Modules: the routed DiT block and the DiT built from it, and the routed residual block of ADM."""

from dtr_kernels.nn.block import BlockKind, RoutedDiTBlock
from dtr_kernels.nn.dit import DiT, DiT_models
from dtr_kernels.nn.res_block import RoutedResBlock

__all__ = ["BlockKind", "DiT", "DiT_models", "RoutedDiTBlock", "RoutedResBlock"]
