"""Uncertainty weighting of the clusters' losses: learned, nearly free, and often enough."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn


class UncertaintyWeighting(nn.Module):
    """One learned log-variance s_k for each cluster (Kendall et al., 2018, as ANT uses it).

    In ANT's results it does as well as PCGrad (see ``GradientSurgery``), at the speed of ordinary training: 2.103
    steps a second against PCGrad's 1.523 and 2.108 without either (LDM on FFHQ).

    Args:
        num_clusters: K, the number of clusters.

    Raises:
        ValueError: if num_clusters is not a positive integer.
    """

    def __init__(self, num_clusters: int) -> None:
        super().__init__()
        if isinstance(num_clusters, bool) or not isinstance(num_clusters, int) or num_clusters < 1:
            raise ValueError(f"num_clusters must be a positive integer, got {num_clusters!r}")
        self.log_variances = nn.Parameter(torch.zeros(num_clusters))

    def forward(self, losses: Tensor | Sequence[Tensor | None]) -> Tensor:
        """The loss to differentiate: sum over k of (exp(-s_k) l_k + s_k) / 2, where there is an l_k.

        Args:
            losses: the K clusters' mean losses: a tensor [K], or K scalars with None for each cluster without samples,
                which is left out of the sum. A loss of NaN gives NaN. fp16 and bf16 are computed in fp32.

        Returns:
            A scalar, fp32 or, for losses in fp64, fp64.

        Raises:
            TypeError: if losses is not as described.
            ValueError: if there are not K losses, one is no scalar, or all are None.
        """
        present = self._present(losses)
        dtype = reduce(torch.promote_types, (loss.dtype for loss in present.values()), torch.float32)
        stacked = torch.stack([loss.reshape(()).to(dtype) for loss in present.values()])
        log_variances = self.log_variances if len(present) == len(losses) else self.log_variances[list(present)]
        return 0.5 * (torch.exp(-log_variances.to(dtype)) * stacked + log_variances.to(dtype)).sum()

    def _present(self, losses: Tensor | Sequence[Tensor | None]) -> dict[int, Tensor]:
        """The losses that are not None, by cluster."""
        clusters = len(self.log_variances)
        if not isinstance(losses, Sequence | Tensor) or (isinstance(losses, Tensor) and losses.dim() == 0):
            given = "one scalar" if isinstance(losses, Tensor) else type(losses).__name__
            raise TypeError(f"losses must be a sequence of {clusters} losses, one for each cluster, got {given}")
        if len(losses) != clusters:
            raise ValueError(f"losses must have {clusters} entries, one for each cluster, got {len(losses)}")
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
        """An optimizer's parameter group with the learning rate of the paper and without weight decay."""
        return {"params": [self.log_variances], "lr": lr, "weight_decay": 0.0}
