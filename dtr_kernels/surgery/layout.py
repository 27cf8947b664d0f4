"""The batch dimension of a tensor, followed through the functions that are applied to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def functions(names: str, *owners: Any) -> list[Any]:
    """Return the functions with these names that the owners have."""
    return [getattr(owner, name) for name in names.split() for owner in owners if hasattr(owner, name)]


# Functions that permute dimensions, so that dimension 0 may be another one afterwards, even of the same size.
_PERMUTING = {
    *functions("permute transpose swapaxes swapdims movedim moveaxis t adjoint", torch, Tensor),
    *(attribute.__get__ for attribute in functions("T mT H mH", Tensor)),
}

# Functions that keep the order of elements: the outermost dimension stays outermost, even if merged or split.
_RESHAPING = set(functions("reshape view flatten unflatten view_as reshape_as", torch, Tensor))


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield all tensors among a function's arguments or results, also those in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def replaced(values: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of a function's arguments with every tensor in them replaced."""
    if isinstance(values, Tensor):
        return replace(values)
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*(replaced(value, replace) for value in values))
    if isinstance(values, list | tuple):
        return type(values)(replaced(value, replace) for value in values)
    if isinstance(values, dict):
        return {key: replaced(value, replace) for key, value in values.items()}
    return values


def batch_dimensions(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    inputs: Sequence[tuple[Tensor, int | None]],
    outputs: Sequence[Tensor],
) -> list[int | None]:
    """Return the batch dimension of each output of ``func(*args, **kwargs)``; None if it is unknown.

    Args:
        inputs: the arguments that hold samples, with their batch dimensions.
    """
    if any(dimension is None for _, dimension in inputs):
        return [None] * len(outputs)
    stays, certain = False, False
    if all(dimension == 0 for _, dimension in inputs):
        stays, certain = _stays_in_front(func, [tensor for tensor, _ in inputs], outputs)
    if not certain:
        found = _found_by_doubling(func, args, kwargs, inputs)
        if found is not None and len(found) == len(outputs):
            return found
    return [0 if stays else None] * len(outputs)


def _stays_in_front(func: Callable[..., Any], inputs: list[Tensor], outputs: Sequence[Tensor]) -> tuple[bool, bool]:
    """Return whether dimension 0, the batch, seems to be that of the outputs too, and whether this is certain."""
    if func in _RESHAPING:
        return all(output.dim() for output in outputs), True
    x = inputs[0]
    if func in _PERMUTING:
        stays = outputs[0].shape[:1] == x.shape[:1] and outputs[0].stride()[:1] == x.stride()[:1]
        return stays, stays
    lengths = {tensor.shape[0] for tensor in inputs}
    stays = all(output.dim() > 0 and output.shape[0] in lengths for output in outputs)
    # Another dimension of the same length may have moved to the front.
    return stays, stays and lengths.isdisjoint(length for tensor in inputs for length in tensor.shape[1:])


def _found_by_doubling(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    inputs: Sequence[tuple[Tensor, int | None]],
) -> list[int | None] | None:
    """Find the batch dimensions of the outputs: those that double with the batch. None if that does not work.

    Nothing is computed.
    """
    batch = {id(tensor): dimension for tensor, dimension in inputs if dimension is not None}

    def shapes(factor: int) -> list[torch.Size]:
        def empty(tensor: Tensor) -> Tensor:
            shape = list(tensor.shape)
            if id(tensor) in batch:
                shape[batch[id(tensor)]] *= factor
            return torch.empty(shape, dtype=tensor.dtype, device="meta")

        result = func(*replaced(list(args), empty), **replaced(kwargs, empty))
        return [tensor.shape for tensor in tensors_in([result])]

    try:
        single, double = shapes(1), shapes(2)
    except Exception:  # functions that fix the batch size or the device fail in many ways
        return None
    lengths = {tensor.shape[dimension] for tensor, dimension in inputs if dimension is not None}
    return [_longer_dimension(a, b, lengths) for a, b in zip(single, double, strict=False)]


def _longer_dimension(single: torch.Size, double: torch.Size, lengths: set[int]) -> int | None:
    """Return the one dimension in which two shapes differ, if its length is one of ``lengths``."""
    if len(single) != len(double):
        return None
    different = [i for i, (a, b) in enumerate(zip(single, double, strict=True)) if a != b]
    if len(different) != 1 or single[different[0]] not in lengths:
        return None
    return different[0]
