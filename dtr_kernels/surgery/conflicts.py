"""Count how often the gradients of two clusters conflict, from the Gram matrices of a training's steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def conflict_fractions(grams: Tensor | Iterable[Tensor]) -> Tensor:
    """Return, for each pair of clusters, the share of steps in which their gradients have a cosine below 0.

    Collect ``surgery.last_gram`` of each step; the host waits for a GPU only in this function.

    Args:
        grams: the Gram matrices of S steps, [S, K, K], or an iterable of S matrices [K, K].

    Returns:
        fp64 [K, K], symmetric, 0 on the diagonal. A step counts if both clusters have a gradient and its matrix is
        finite; NaN if no step counts.

    Raises:
        TypeError: if grams are not floating-point tensors.
        ValueError: if there are none, or they are not square and of one size.
    """
    grams = list(grams)
    for step, gram in enumerate(grams):
        if not isinstance(gram, Tensor) or not gram.is_floating_point():
            given = getattr(gram, "dtype", type(gram).__name__)
            raise TypeError(
                f"grams must be floating-point tensors such as surgery.last_gram, got {given} of step {step}"
            )
        if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape != grams[0].shape:
            raise ValueError(f"grams must be of shape [S, K, K], got {list(gram.shape)} of step {step}")
    if not grams:
        raise ValueError("grams must hold the Gram matrix of at least one step, got none")
    stacked = torch.stack(grams)
    there = (stacked.diagonal(dim1=1, dim2=2) > 0) & stacked.isfinite().all(2).all(1, keepdim=True)
    both = there[:, :, None] & there[:, None, :]
    return ((stacked < 0) & both).sum(0) / both.sum(0).double()
