"""Shared by the benchmarks of gradient surgery: the oracle, and random orders drawn as other code draws them."""

from __future__ import annotations

import torch
from torch import Tensor

from dtr_kernels import reference
from dtr_kernels.ops.gradient_lists import choose_surgery

# Columns of the gradients that are widened to fp64 at a time, few enough for a CPU's cache.
_CHUNK = 1 << 15

# Errors relative to the norm. Ours may be a few roundings of the gradients' dtype.
OURS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
# The loop rounds every dot product and every projected gradient; the accuracy of the alternatives is a result.
OTHERS = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}


class Oracle:
    """PCGrad in fp64 on gradients [K, P] of a lower precision, without an fp64 copy of them.

    It runs the loop of ``reference.pcgrad`` on the coefficients [K, K] of the gradients.
    """

    def __init__(self, grads: Tensor, order: Tensor) -> None:
        self._grads, self.order = grads, order
        self.gram = torch.zeros(len(grads), len(grads), dtype=torch.float64, device=grads.device)
        for chunk in grads.split(_CHUNK, dim=1):
            wide = chunk.double()
            self.gram += wide @ wide.T
        self.coefficients = reference.pcgrad_coefficients(self.gram.cpu(), order.cpu()).to(grads.device)

    @property
    def conflicts(self) -> str:
        """The number of conflicting pairs of gradients, in words: the loop's work depends on it."""
        K = len(self.gram)
        return f"{int((self.gram < 0).sum()) // 2} of {K * (K - 1) // 2} pairs conflict"

    def error_of_update(self, update: Tensor) -> float:
        """Return the error of the sum of the projected gradients [P], relative to its norm."""
        return self.error_of_combination(update[None], self.coefficients.sum(0, keepdim=True))

    def error_of_sum(self, update: Tensor) -> float:
        """Return the error of the plain sum of the gradients [P], relative to its norm."""
        return self.error_of_combination(update[None], torch.ones_like(self.gram[:1]))

    def error_of_projected(self, projected: Tensor) -> float:
        """Return the error of the projected gradients [K, P], relative to their norm."""
        return self.error_of_combination(projected, self.coefficients)

    def error_of_combination(self, found: Tensor, coefficients: Tensor) -> float:
        """Return the error of found [M, P] as coefficients [M, K] @ gradients, relative to the norm of the product."""
        wrong = norm = torch.zeros((), dtype=torch.float64, device=found.device)
        for part, chunk in zip(found.split(_CHUNK, dim=1), self._grads.split(_CHUNK, dim=1), strict=True):
            exact = coefficients @ chunk.double()
            wrong, norm = wrong + (part.double() - exact).square().sum(), norm + exact.square().sum()
        return (wrong / norm).sqrt().item()


def what_runs(device: torch.device, dtype: torch.dtype) -> str:
    """Name the implementation of the ops that was measured."""
    path, why = choose_surgery(device, dtype)
    return f"the ops of gradient surgery ran as {'plain PyTorch: ' + why if path == 'plain' else 'compiled kernels'}"


def torchjd_order(clusters: int, seed: int) -> Tensor:
    """Return the order [K, K-1] that TorchJD's PCGrad draws after ``torch.manual_seed(seed)``."""
    torch.manual_seed(seed)
    return torch.stack([(drawn := torch.randperm(clusters))[drawn != i] for i in range(clusters)])
