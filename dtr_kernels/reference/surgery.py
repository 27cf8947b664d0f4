"""Gradient surgery between timestep clusters, as "Addressing Negative Transfer in Diffusion Models" describes it.

Notation: grads [K, P], row k is the gradient of cluster k's mean loss divided by K; order [K, K-1], row i lists the
other clusters in the order in which gradient i meets them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gram(grads: Tensor) -> Tensor:
    """Return the Gram matrix G [K, K], G[i, j] = <g_i, g_j>."""
    return grads @ grads.T


def pcgrad(grads: Tensor, order: Tensor) -> Tensor:
    """Project gradients by PCGrad (Yu et al., 2020, algorithm 1), in a loop: [K, P], whose sum is the update.

    Each gradient meets the original others one after the other, and loses its component along each that it conflicts
    with. The result is all NaN if a squared norm is not finite: after an overflow, conflicts are unknown.
    """
    norms = torch.stack([g @ g for g in grads])
    if not norms.isfinite().all():
        return torch.full_like(grads, torch.nan)
    projected = grads.clone()
    for i, others in enumerate(order.tolist()):
        for j in others:
            product = projected[i] @ grads[j]
            if product < 0:
                projected[i] -= product / norms[j] * grads[j]
    return projected


def pcgrad_coefficients(gram: Tensor, order: Tensor) -> Tensor:
    """Return C [K, K] with projected gradients = C @ grads: the same loop on each projected gradient's coefficients.

    C is NaN if the Gram matrix is not finite.
    """
    if not gram.isfinite().all():
        return torch.full_like(gram, torch.nan)
    C = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for i, others in enumerate(order.tolist()):
        for j in others:
            product = C[i] @ gram[:, j]
            if product < 0 and gram[j, j] > 0:
                C[i, j] -= product / gram[j, j]
    return C


def uncertainty_loss(losses: Tensor, log_variances: Tensor) -> Tensor:
    """Weight losses by uncertainty (Kendall et al., 2018, as in ANT): sum over k of (exp(-s_k) l_k + s_k) / 2.

    l_k is the mean loss of cluster k, losses[k], divided by K.
    """
    return 0.5 * (torch.exp(-log_variances) * losses / len(losses) + log_variances).sum()
