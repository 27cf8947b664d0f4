"""The fused ops, registered with torch.library as ``torch.ops.dtr_kernels.*``.

``routed_linear``, ``routed_mlp`` and ``gated_residual`` are the three steps of a routed DiT block around PyTorch's own
attention. They are built from ``gated_norm`` and ``window_linear``, whose files hold the kernels.
"""

from dtr_kernels.ops.gated_residual import gated_residual
from dtr_kernels.ops.routed_linear import routed_linear
from dtr_kernels.ops.routed_mlp import routed_mlp

__all__ = ["gated_residual", "routed_linear", "routed_mlp"]
