"""Modules: the routed DiT block and the DiT built from it."""

from dtr_kernels.nn.block import RoutedDiTBlock
from dtr_kernels.nn.dit import DiT, DiT_models

__all__ = ["DiT", "DiT_models", "RoutedDiTBlock"]
