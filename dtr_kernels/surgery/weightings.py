"""Weightings map the Gram matrix of K gradients to K weights: the update is the weighted sum of the gradients."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dtr_kernels import ops
from dtr_kernels.quoting import quoted
from dtr_kernels.routing import is_integer

NAMES = ("pcgrad", "nash", "sum")


class GramWeighting(Protocol):
    """Called by ``GradientSurgery`` once a step; TorchJD's Gramian weightings are such objects.

    If an object has ``state_dict`` and ``load_state_dict``, its state is saved and restored with the surgery's.
    """

    def __call__(self, gram: Tensor, /) -> Tensor:
        """Return weights [K], floating point, for the Gram matrix of the clusters' gradients, finite fp64 [K, K]."""


class PCGrad:
    """PCGrad in random order: the weight of gradient j is the sum over i of C[i, j] (ANT, section 4)."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self._generator = generator

    def __call__(self, gram: Tensor) -> Tensor:
        order = ops.random_order(len(gram), self._generator, gram.device)
        return ops.pcgrad_coefficients(gram, order).sum(0)

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's state, if a generator was given."""
        return {} if self._generator is None else {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the generator's state.

        Raises:
            ValueError: if only one of the saved state and this object has a generator.
        """
        if ("generator" in state) != (self._generator is not None):
            saved, here = ("with", "without") if "generator" in state else ("without", "with")
            raise ValueError(
                f"state was saved {saved} a generator, but this object was made {here} one; its orders would not go on "
                f"where they stopped: make it {saved} generator="
            )
        if self._generator is not None:
            self._generator.set_state(state["generator"].cpu())


class Sum:
    """Weight 1 for every gradient: the update of an ordinary step."""

    def __call__(self, gram: Tensor) -> Tensor:
        return gram.new_ones(len(gram))


class Nash:
    """Nash-MTL (Navon et al., 2022) with the settings of ANT, solved by TorchJD.

    The weights solve w_i (K^2 G w)_i = 1, where K^2 G is the Gram matrix of losses that are not divided by K; the
    update then has norm 1 / sqrt(K). The solver runs every few steps, while the host waits, and starts from the last
    weights. In between the weights stay the same, but are shrunk if the norm of the update, sqrt(w^T G w), would exceed
    1.

    A matrix without a solution (NaN, inf, or a gradient of zero, as from an empty cluster) leaves the weights
    unchanged, and the next step tries again. With NaN or inf, the step itself gets weights of NaN.

    Raises:
        ImportError: if TorchJD or its solver is not installed.
    """

    every = 25
    iterations = 20
    max_norm = 1.0

    def __init__(self, clusters: int) -> None:
        try:
            from torchjd.aggregation import NashMTL

            # Its own schedule and clipping are off: they would lose the weights in a checkpoint and make the host wait
            # at every step.
            solver = NashMTL(clusters, max_norm=0.0, update_weights_every=1, optim_niter=self.iterations)
        except ImportError as error:
            raise ImportError(
                f"weighting 'nash' needs the solver of TorchJD: pip install 'torchjd[nash-mtl]' ({error})"
            ) from error
        self._solver = solver.weighting
        self._weights = torch.ones(clusters, dtype=torch.float64)
        self._steps_until_solved = 0

    def __call__(self, gram: Tensor) -> Tensor:
        self._weights = self._weights.to(gram.device)
        if self._steps_until_solved == 0:
            solution = self._solved(gram.cpu())
            if solution is not None:
                self._weights, self._steps_until_solved = solution.to(gram.device), self.every
        self._steps_until_solved = max(self._steps_until_solved - 1, 0)
        norm = (self._weights @ gram @ self._weights).clamp_min(0).sqrt()
        shrunk = self._weights * torch.where(norm > self.max_norm, self.max_norm / norm, 1.0)
        return torch.where(gram.isfinite().all(), shrunk, torch.nan)

    def _solved(self, gram: Tensor) -> Tensor | None:
        if not (gram.isfinite().all() and (gram.diagonal() > 0).all()):
            return None
        if len(gram) == 1:  # TorchJD's formulation needs two clusters
            return gram[0].rsqrt()
        # TorchJD expects gradients [K, P] but uses only their Gram matrix: any square root of it will do.
        eigenvalues, eigenvectors = torch.linalg.eigh(len(gram) ** 2 * gram)
        root = eigenvectors * eigenvalues.clamp_min(0).sqrt()
        self._solver.prvs_alpha = self._weights.cpu().numpy()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are solving a parameterized problem that is not DPP")
            solution = self._solver(root)
        return solution if solution.isfinite().all() else None

    def state_dict(self) -> dict[str, Any]:
        """Return the weights, from which the next solution starts, and when it is due."""
        return {"weights": self._weights.cpu(), "steps_until_solved": self._steps_until_solved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore saved weights; ValueError unless they are K finite numbers, and the steps a valid number of steps."""
        weights, steps = state["weights"], state["steps_until_solved"]
        if weights.shape != self._weights.shape or not weights.isfinite().all():
            raise ValueError(f"weights must be {len(self._weights)} finite numbers, got {quoted(weights)}")
        if not is_integer(steps) or not 0 <= steps < self.every:
            raise ValueError(f"steps_until_solved must be in 0..{self.every - 1}, got {quoted(steps)}")
        self._weights, self._steps_until_solved = weights.to(torch.float64, copy=True), steps


class External:
    """A caller's weighting, checked, and never shown NaN or inf, at which solvers fail and averages stay NaN.

    For a matrix that is not finite, which the host waits to know, it is not called, and the weights are NaN.
    """

    def __init__(self, weighting: GramWeighting) -> None:
        self._weighting: Any = weighting

    def __call__(self, gram: Tensor) -> Tensor:
        if not gram.isfinite().all():
            return gram.new_full((len(gram),), torch.nan)
        weights = self._weighting(gram)
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            given = getattr(weights, "dtype", type(weights).__name__)
            raise TypeError(f"weighting must return a floating-point tensor of {len(gram)} weights, got {given}")
        if tuple(weights.shape) != (len(gram),):
            raise ValueError(f"weighting must return weights of shape [{len(gram)}], got {list(weights.shape)}")
        return weights.detach().to(gram)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the weighting itself saves."""
        return self._weighting.state_dict() if hasattr(self._weighting, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the weighting's saved state; warn of entries that a module has no place for."""
        if isinstance(self._weighting, nn.Module):
            # TorchJD's running averages are buffers that a new module does not have yet, so it cannot load them.
            unexpected = self._weighting.load_state_dict(state, strict=False).unexpected_keys
            if unexpected:
                name = type(self._weighting).__name__
                warnings.warn(f"{name} cannot restore {', '.join(unexpected)}, and starts afresh", stacklevel=3)
        elif hasattr(self._weighting, "load_state_dict"):
            self._weighting.load_state_dict(state)


def make(weighting: str | GramWeighting, clusters: int, generator: torch.Generator | None) -> GramWeighting:
    """Return the weighting with a name, or the given object, checked; "nash" raises ImportError without TorchJD."""
    names = ", ".join(map(repr, NAMES))
    if isinstance(weighting, str):
        known: dict[str, Callable[[], GramWeighting]]
        known = {"pcgrad": lambda: PCGrad(generator), "nash": lambda: Nash(clusters), "sum": Sum}
        if weighting in known:
            return known[weighting]()
        raise ValueError(f"weighting must be one of {names} or a callable, got {weighting!r}")
    if isinstance(weighting, type):
        raise TypeError(
            f"weighting must be an object, but {weighting.__name__} is a class: pass {weighting.__name__}(...)"
        )
    if not callable(weighting):
        raise TypeError(f"weighting must be one of {names} or a callable, got {type(weighting).__name__}")
    _refuse_what_takes_gradients(weighting)
    return External(weighting)


def _refuse_what_takes_gradients(weighting: GramWeighting) -> None:
    """Refuse TorchJD's aggregators and weightings that would mistake the Gram matrix for the gradients [K, P]."""
    if "torchjd.aggregation" not in sys.modules:
        return
    from torchjd import aggregation
    from torchjd.linalg import PSDMatrix

    inner: Any = weighting
    while isinstance(inner, aggregation.CRMOGMWeighting):  # it smooths another weighting's weights
        inner = inner.weighting
    if isinstance(inner, aggregation.Aggregator):
        raise TypeError(
            f"weighting must map a Gram matrix to weights, but TorchJD's {type(inner).__name__} aggregates "
            "gradients; pass its weighting, such as UPGradWeighting() for UPGrad, or 'nash' for NashMTL"
        )
    number_alone = (  # They look at the number of rows alone.
        aggregation.ConstantWeighting,
        aggregation.MeanWeighting,
        aggregation.RandomWeighting,
        aggregation.SumWeighting,
    )
    if not isinstance(inner, aggregation.Weighting) or isinstance(inner, number_alone):
        return
    if not any(aggregation.Weighting[PSDMatrix] in getattr(t, "__orig_bases__", ()) for t in type(inner).__mro__):
        raise TypeError(
            f"weighting must map a Gram matrix to weights, but TorchJD's {type(inner).__name__} is no Gramian "
            "weighting and would take it for the gradients; pass one that is, such as UPGradWeighting(), or 'nash' "
            "for NashMTL"
        )
