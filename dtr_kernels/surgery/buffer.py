"""The memory of the K gradients: one [K, P] tensor for each dtype, whose rows autograd writes directly."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dtr_kernels import ops

# Elements; every parameter's stretch of a row starts on a 128-byte boundary in fp32, for kernels and optimizers.
_ALIGNMENT = 32


class _Stretch(NamedTuple):
    """The place of one parameter's gradient: the key of the tensor, and the offset in its rows."""

    key: tuple[torch.dtype, Hashable]
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]


class ClusterGradients(Protocol):
    """The gradients of K clusters, however they are kept."""

    def gram(self) -> Tensor:
        """Return the Gram matrix of the gradients, fp64 [K, K]."""

    def weighted_sum(self, weights: Tensor) -> list[Tensor]:
        """Return the sum over k of weights[k] times gradient k, one new tensor for each parameter."""


class GradientBuffer:
    """K gradients of some parameters, side by side in memory.

    Each parameter has a stretch of columns, in the dtype of its gradient and its own memory layout. The gaps between
    the stretches stay zero, and so add nothing to any product.

    Over the micro-batches of a step, row k accumulates the mean gradient of ``totals[k]`` samples, times
    totals[k] / units[k]. So the first micro-batch, and any with equally many samples of a cluster, is added unscaled.

    Args:
        parameters: by name, on one device.
        clusters: K.
        slices: number of equal slices into which the columns of a tensor can be cut.
        apart: by parameter name; parameters with different values are in different tensors.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        clusters: int,
        *,
        slices: int = 1,
        apart: Mapping[str, Hashable] | None = None,
    ) -> None:
        self._layout = _layout(parameters)
        lengths: dict[tuple[torch.dtype, Hashable], int] = {}
        self._stretches: list[_Stretch] = []
        for name, p in parameters.items():
            key = _gradient_dtype(p), apart[name] if apart else None
            self._stretches.append(_Stretch(key, lengths.setdefault(key, 0), p.shape, _dense_strides(p)))
            lengths[key] += _rounded_up(p.numel(), _ALIGNMENT)
        device = next(iter(parameters.values())).device
        # The [K, P] tensors. Assigning a row of a tensor to p.grad makes autograd write there.
        self.tensors = {
            key: torch.zeros(clusters, _rounded_up(n, _ALIGNMENT * slices), dtype=key[0], device=device)
            for key, n in lengths.items()
        }
        self._gradients = self._views(clusters)
        self.units = self.totals = [0] * clusters

    def _views(self, clusters: int) -> list[list[Tensor]]:
        return [self.split({key: t[k] for key, t in self.tensors.items()}) for k in range(clusters)]

    def __getstate__(self) -> dict[str, Any]:
        # pickle would copy the memory of each row's views, and later gradients would not reach the tensors.
        return {**vars(self), "_gradients": len(self._gradients)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._gradients = self._views(state["_gradients"])

    def fits(self, parameters: Mapping[str, Tensor]) -> bool:
        """Return whether the parameters are still the buffer's, with the same shapes, dtypes and layouts."""
        return self._layout == _layout(parameters)

    def gradient(self, k: int) -> list[Tensor]:
        """Return gradient k, one view for each parameter. The views' version counters count the writes to them."""
        return self._gradients[k]

    def zero_(self) -> None:
        """Set all K gradients to zero, with no samples."""
        for tensor in self.tensors.values():
            tensor.zero_()
        self.units = self.totals = [0] * len(self._gradients)

    def expect(self, counts: Sequence[int]) -> None:
        """Prepare row k for adding the mean gradient of counts[k] further samples."""
        units = [count or unit for count, unit in zip(counts, self.units, strict=True)]
        self._scale([old / new if old else 1 for old, new in zip(self.units, units, strict=True)])
        self.units = units
        self.totals = [total + count for total, count in zip(self.totals, counts, strict=True)]

    def average(self, totals: Sequence[float]) -> None:
        """Make row k the sum of its samples' gradients, divided by totals[k]."""
        self._scale([unit / total if total else 1 for unit, total in zip(self.units, totals, strict=True)])

    def _scale(self, factors: Sequence[float]) -> None:
        for tensor in self.tensors.values():
            for row, factor in zip(tensor, factors, strict=True):
                if factor != 1:  # saves a pass over memory
                    row.mul_(factor)

    def gram(self) -> Tensor:
        return torch.stack([ops.gram(tensor) for tensor in self.tensors.values()]).sum(0)

    def weighted_sum(self, weights: Tensor) -> list[Tensor]:
        return self.split({key: ops.weighted_sum(tensor, weights) for key, tensor in self.tensors.items()})

    def split(self, flat: Mapping[tuple[torch.dtype, Hashable], Tensor]) -> list[Tensor]:
        """Return the parameters' stretches of [P] tensors, each with its own version counter (by .data)."""
        return [
            flat[s.key].as_strided(s.shape, s.strides, flat[s.key].storage_offset() + s.offset).data
            for s in self._stretches
        ]


def _rounded_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _layout(parameters: Mapping[str, Tensor]) -> list[Any]:
    return [(name, p.shape, p.stride(), _gradient_dtype(p), p.device) for name, p in parameters.items()]


def _gradient_dtype(p: Tensor) -> torch.dtype:
    """Return the dtype that autograd expects of p.grad: p's own, unless p.grad_dtype is set (torch 2.10)."""
    return getattr(p, "grad_dtype", None) or p.dtype


def _dense_strides(p: Tensor) -> tuple[int, ...]:
    """Return strides of a gradient for p: p's own, for optimizers to traverse both in one order, or contiguous ones."""
    return torch.empty_like(p, device="meta").stride()
