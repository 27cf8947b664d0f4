"""Multi-task methods on timestep clusters (ANT): gradient surgery and uncertainty weighting.

The modules, in the order of a step:

    gradient_surgery   from the losses of K clusters to the update in p.grad
    batch              the samples, cluster by cluster
    engines            chooses, by measurement, which of these computes the K gradients:
        per_cluster        a forward and backward pass for each cluster
        one_pass           one pass of the whole batch; low_memory without holding K gradients. Both use
                           interception (between model and parameters), rules (for each function), layout (the batch
                           dimension), segments (sums by cluster) and separation (are samples mixed?)
    buffer             the memory of the K gradients
    distributed        the ranks of a process group
    weightings         from the Gram matrix of the gradients to weights
    conflicts          from the Gram matrices of many steps to how often clusters conflict

Weighting the losses themselves needs no surgery: uncertainty for clusters, noise_levels without clusters.
"""

from dtr_kernels.surgery.conflicts import conflict_fractions
from dtr_kernels.surgery.gradient_surgery import GradientSurgery
from dtr_kernels.surgery.noise_levels import NoiseLevelUncertainty, min_snr_weights, p2_weights
from dtr_kernels.surgery.uncertainty import UncertaintyWeighting
from dtr_kernels.surgery.weightings import GramWeighting

__all__ = [
    "GradientSurgery",
    "GramWeighting",
    "NoiseLevelUncertainty",
    "UncertaintyWeighting",
    "conflict_fractions",
    "min_snr_weights",
    "p2_weights",
]
