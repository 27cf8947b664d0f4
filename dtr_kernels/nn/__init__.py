"""Modules: the routed DiT block and the DiT built from it."""

from dtr_kernels.nn.block import RoutedDiTBlock

__all__ = ["RoutedDiTBlock"]
