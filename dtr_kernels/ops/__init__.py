"""The fused ops, registered with torch.library as ``torch.ops.dtr_kernels.*``.

``routed_linear``, ``routed_mlp`` and ``gated_residual`` are the three steps of a routed DiT block around PyTorch's own
attention. They are built from ``gated_norm`` and ``window_linear``, whose files hold the kernels. In scope "inner" the
steps are ``inner_linear``, ``inner_projection`` and ``inner_mlp``, built from ``band_linear``.

``gram``, ``pcgrad_``, ``pcgrad_sum``, ``combine_`` and ``weighted_sum`` act on the gradients of K timestep clusters.
"""

from dtr_kernels.ops import (
    activations,
    band_linear,
    combine,
    gated_norm,
    gram_matrix,
    linear,
    pcgrad,
    residual,
    window_linear,
)
from dtr_kernels.ops.combine import combine_, weighted_sum
from dtr_kernels.ops.conv import routed_conv
from dtr_kernels.ops.gram_matrix import gram
from dtr_kernels.ops.inner import inner_linear, inner_mlp, inner_projection
from dtr_kernels.ops.linear import fold_affine, routed_linear
from dtr_kernels.ops.mlp import routed_mlp
from dtr_kernels.ops.pcgrad import pcgrad_, pcgrad_coefficients, pcgrad_sum, random_order
from dtr_kernels.ops.residual import gated_residual

#: Every kernel, as it declares itself.
KERNELS = [
    kernel
    for module in (gated_norm, window_linear, band_linear, activations, linear, residual, gram_matrix, combine, pcgrad)
    for kernel in module.KERNELS
]

__all__ = [
    "combine_",
    "fold_affine",
    "gated_residual",
    "gram",
    "inner_linear",
    "inner_mlp",
    "inner_projection",
    "pcgrad_",
    "pcgrad_coefficients",
    "pcgrad_sum",
    "random_order",
    "routed_conv",
    "routed_linear",
    "routed_mlp",
    "weighted_sum",
]
