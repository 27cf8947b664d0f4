"""Multi-task methods on timestep clusters (ANT): gradient surgery and uncertainty weighting.

What happens in a step, and where:

    gradient_surgery   the losses of K clusters in, the update in p.grad out
    batch              the samples, cluster by cluster
    engines            which of these computes the K gradients, by measurement:
        per_cluster        a forward and backward pass for each cluster
        one_pass           one pass of the whole batch; low_memory without holding K gradients. Both stand on
                           interception (between model and parameters), rules (for each function), layout (where the
                           batch is), segments (sums by cluster) and separation (are samples mixed?)
    buffer             where the K gradients are kept
    distributed        what the ranks of a process group add
    weightings         from their Gram matrix to weights
    conflicts          from the Gram matrices of many steps to how often clusters conflict

Weights of the losses themselves need no surgery: uncertainty for clusters, noise_levels without any.
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
