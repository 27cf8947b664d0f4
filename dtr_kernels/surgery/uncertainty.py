"""Uncertainty weighting of the clusters' losses: learned, nearly free, and often sufficient."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from dtr_kernels.quoting import quoted
from dtr_kernels.routing import is_integer
from dtr_kernels.surgery.batch import check_by_cluster

# Lower bound of a loss in the gradient of s_k.
_LEAST_LOSS = 1e-8
# Each cluster is a parameter: far more than these would fill the memory unnoticed.
_MOST_CLUSTERS = 10_000


class UncertaintyWeighting(nn.Module):
    """One learned log-variance s_k for each cluster (Kendall et al., 2018, as in ANT), a parameter ``s[k]`` [1].

    In ANT's results it does as well as PCGrad (see ``GradientSurgery``), at the speed of ordinary training: 2.103 steps
    per second, against 1.523 with PCGrad and 2.108 without either (LDM on FFHQ).

    Args:
        num_clusters: K, the number of clusters.

    Raises:
        ValueError: if num_clusters is not an integer from 1 to 10,000.
    """

    def __init__(self, num_clusters: int) -> None:
        super().__init__()
        if not is_integer(num_clusters) or not 1 <= num_clusters <= _MOST_CLUSTERS:
            raise ValueError(f"num_clusters must be an integer from 1 to {_MOST_CLUSTERS}, got {quoted(num_clusters)}")
        # One parameter each, so that an optimizer leaves a cluster without samples, and its moments, unchanged.
        self.s = nn.ParameterList(torch.zeros(1) for _ in range(num_clusters))
        self.register_load_state_dict_pre_hook(_split_log_variances)

    @property
    def log_variances(self) -> Tensor:
        """A copy of all s_k, [K]; write to ``s[k]`` to change one."""
        return torch.cat(list(self.s))

    def forward(self, losses: Tensor | Sequence[Tensor | None]) -> Tensor:
        """Return the loss to differentiate: sum over k of (exp(-s_k) l_k + s_k) / 2, over the clusters with a loss.

        l_k is the mean loss of cluster k divided by K, as in ANT's code. For the gradient of s_k it is at least 1e-8,
        even if it is zero or negative, so that exp(-s_k) settles at 1e8 instead of growing without end; the gradient
        with respect to the loss itself stays exp(-s_k) / 2K.

        Args:
            losses: the K clusters' mean losses: a tensor [K], or K scalars with None for each cluster without samples,
                which is left out of the sum and whose s_k gets no gradient (None). A loss of NaN gives NaN. fp16 and
                bf16 are computed in fp32.

        Returns:
            A scalar, fp32 or, for losses in fp64, fp64.

        Raises:
            TypeError: if losses is not as described.
            ValueError: if there are not K losses, a loss is not a scalar, or all are None.
        """
        present = self._present(losses)
        dtype = reduce(torch.promote_types, (loss.dtype for loss in present.values()), torch.float32)
        stacked = torch.stack([loss.reshape(()).to(dtype) for loss in present.values()])
        l = stacked / len(self.s)
        l = torch.where(l < _LEAST_LOSS, _LEAST_LOSS + (l - l.detach()), l)
        s = torch.cat([self.s[k].to(dtype) for k in present])
        return 0.5 * (torch.exp(-s) * l + s).sum()

    def _present(self, losses: Tensor | Sequence[Tensor | None]) -> dict[int, Tensor]:
        """Return the losses that are not None, by cluster."""
        check_by_cluster(losses, len(self.s))
        present = {k: loss for k, loss in enumerate(losses) if loss is not None}
        if not present:
            raise ValueError("losses must hold at least one loss, got None for every cluster")
        for k, loss in present.items():
            if not isinstance(loss, Tensor):
                raise TypeError(f"losses[{k}] must be a scalar tensor or None, got {type(loss).__name__}")
            if loss.numel() != 1:
                raise ValueError(f"losses[{k}] must be a scalar, got shape {list(loss.shape)}; take its mean")
        return present

    def param_group(self, lr: float = 0.025) -> dict[str, Any]:
        """Return an optimizer's parameter group with the learning rate of the paper and without weight decay."""
        return {"params": list(self.s), "lr": lr, "weight_decay": 0.0}


def _split_log_variances(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Read older checkpoints, in which all s_k were one parameter [K]."""
    if f"{prefix}log_variances" in state:
        for k, s in enumerate(state.pop(f"{prefix}log_variances")):
            state[f"{prefix}s.{k}"] = s.reshape(1)
