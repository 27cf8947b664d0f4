"""How often the gradients of two clusters conflict, from the Gram matrices of a training's steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def conflict_fractions(grams: Tensor | Iterable[Tensor]) -> Tensor:
    """Return for every two clusters the share of steps in which their gradients point apart, with a cosine below 0.

    Collect ``surgery.last_gram`` of each step; nothing waits for a GPU until you look.

    Args:
        grams: the Gram matrices of S steps, [S, K, K], or an iterable of as many [K, K].

    Returns:
        fp64 [K, K], symmetric, 0 on the diagonal. Counted are steps in which both clusters have a gradient, and whose
        matrix is finite; NaN where there is none.

    Raises:
        TypeError: if grams are no floating-point tensors.
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
