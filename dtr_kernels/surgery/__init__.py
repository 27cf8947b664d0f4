"""Multi-task methods on timestep clusters (ANT): gradient surgery and uncertainty weighting."""

from dtr_kernels.surgery.gradient_surgery import GradientSurgery
from dtr_kernels.surgery.uncertainty import UncertaintyWeighting
from dtr_kernels.surgery.weightings import GramWeighting

__all__ = ["GradientSurgery", "GramWeighting", "UncertaintyWeighting"]
