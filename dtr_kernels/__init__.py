"""Kernels for diffusion training as multi-task learning: Denoising Task Routing and gradient surgery."""

from dtr_kernels import nn, ops, reference, swap
from dtr_kernels.analysis import TaskAffinity, negative_transfer_gaps, task_affinity
from dtr_kernels.clusters import IntervalClusters, interval_clusters
from dtr_kernels.continuous import ContinuousClusters, continuous_clusters
from dtr_kernels.explanation import explain
from dtr_kernels.plotting import plot_affinity, plot_clusters, plot_conflicts, plot_routing
from dtr_kernels.routing import ChannelWindow, DenoisingTaskRouting, RandomRouting
from dtr_kernels.sampling import Sampler
from dtr_kernels.surgery import (
    GradientSurgery,
    NoiseLevelUncertainty,
    UncertaintyWeighting,
    conflict_fractions,
    min_snr_weights,
    p2_weights,
)
from dtr_kernels.swap import restore_blocks, swap_blocks

__version__ = "0.2.0"

__all__ = [
    "ChannelWindow",
    "ContinuousClusters",
    "DenoisingTaskRouting",
    "GradientSurgery",
    "IntervalClusters",
    "NoiseLevelUncertainty",
    "RandomRouting",
    "Sampler",
    "TaskAffinity",
    "UncertaintyWeighting",
    "conflict_fractions",
    "continuous_clusters",
    "explain",
    "interval_clusters",
    "min_snr_weights",
    "negative_transfer_gaps",
    "nn",
    "ops",
    "p2_weights",
    "plot_affinity",
    "plot_clusters",
    "plot_conflicts",
    "plot_routing",
    "reference",
    "restore_blocks",
    "swap",
    "swap_blocks",
    "task_affinity",
]
