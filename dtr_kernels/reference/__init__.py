"""Plain PyTorch for everything in this package, written to be read next to the papers.

Nothing here is fast or clever. Every kernel, test and benchmark of this package is compared with these
functions.
"""

from dtr_kernels.reference.surgery import gram, pcgrad, pcgrad_coefficients, uncertainty_loss
from dtr_kernels.reference.transformer import (
    ACTIVATIONS,
    NORMS,
    SCOPES,
    activate,
    attention,
    dit,
    dit_block,
    gated_residual,
    masked,
    mlp,
    modulate,
    normalize,
    queries_and_keys,
    routed_linear,
    routed_mlp,
    routed_norm,
    routing_mask,
)
from dtr_kernels.reference.unet import group_norm, res_block, routed_conv

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "SCOPES",
    "activate",
    "attention",
    "dit",
    "dit_block",
    "gated_residual",
    "gram",
    "group_norm",
    "masked",
    "mlp",
    "modulate",
    "normalize",
    "pcgrad",
    "pcgrad_coefficients",
    "queries_and_keys",
    "res_block",
    "routed_conv",
    "routed_linear",
    "routed_mlp",
    "routed_norm",
    "routing_mask",
    "uncertainty_loss",
]
