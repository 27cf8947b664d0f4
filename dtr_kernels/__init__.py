"""Kernels for diffusion training as multi-task learning: Denoising Task Routing and gradient surgery."""

from dtr_kernels import nn, ops, reference
from dtr_kernels.plotting import plot_routing
from dtr_kernels.routing import ChannelWindow, DenoisingTaskRouting, RandomRouting
from dtr_kernels.surgery import GradientSurgery, UncertaintyWeighting
from dtr_kernels.swap import restore_blocks, swap_blocks

__version__ = "0.1.0"

__all__ = [
    "ChannelWindow",
    "DenoisingTaskRouting",
    "GradientSurgery",
    "RandomRouting",
    "UncertaintyWeighting",
    "nn",
    "ops",
    "plot_routing",
    "reference",
    "restore_blocks",
    "swap_blocks",
]
