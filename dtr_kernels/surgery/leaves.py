"""``leaf.grad`` during a step: put away at its start, updated at its end, and restored after an error."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Leaves:
    """The leaves that a step's losses reach: the parameters in params, and others, such as another optimizer's.

    The engines keep the new gradients of parameters; the new gradients of other leaves are kept here, added up over
    micro-batches. Between micro-batches every ``grad`` is as before the step.
    """

    def __init__(self) -> None:
        self._before: dict[Tensor, Tensor | None] = {}  # while they are put away
        self._others: dict[Tensor, Tensor | None] = {}  # new gradients

    def put_away(self, parameters: Iterable[Tensor]) -> None:
        """Remember the parameters' ``grad``, which engines may then change."""
        self._before = {p: p.grad for p in parameters}

    def collect(self, others: Iterable[Tensor]) -> None:
        """Make autograd add to new gradients of these leaves, until ``put_back``."""
        for leaf in others:
            if leaf not in self._before:
                self._before[leaf] = leaf.grad
                leaf.grad = self._others.setdefault(leaf, None)

    def start_over(self) -> None:
        """Drop the new gradients of other leaves."""
        for leaf in self._others:
            self._others[leaf] = leaf.grad = None

    def put_back(self) -> None:
        """Restore every leaf's own ``grad``."""
        self._others |= {leaf: leaf.grad for leaf in self._others if leaf in self._before}
        self._restore()

    @torch.no_grad()
    def add(self, updates: Iterable[tuple[Tensor, Tensor]]) -> None:
        """End the step: add parameters' updates, and the other leaves' new gradients, to ``grad``."""
        new = [(leaf, grad) for leaf, grad in [*updates, *self._others.items()] if grad is not None]
        # Sums that need memory come first: if memory runs out, nothing has changed.
        replaced = [
            (leaf, grad if leaf.grad is None else grad + leaf.grad) for leaf, grad in new if not _in_place(leaf)
        ]
        for leaf, grad in new:
            if _in_place(leaf):
                _add(leaf, grad)
        for leaf, total in replaced:
            leaf.grad = total
        self._others = {}

    def drop(self) -> None:
        """End the step without any effect."""
        self._restore()
        self._others = {}

    def _restore(self) -> None:
        for leaf, grad in self._before.items():
            try:
                leaf.grad = grad
            except (RuntimeError, TypeError):  # the caller has cast or moved the leaf meanwhile
                leaf.grad = None
        self._before = {}


def _in_place(leaf: Tensor) -> bool:
    """Return whether a gradient is added in place, as autograd does, since others may hold leaf.grad."""
    grad = leaf.grad
    if grad is None or grad.is_sparse or grad.is_inference():
        return False
    return all(stride for size, stride in zip(grad.shape, grad.stride(), strict=True) if size > 1)  # not expanded


def _add(leaf: Tensor, new: Tensor) -> None:
    leaf.grad.add_(new)  # type: ignore[union-attr]


@contextmanager
def gradients_set_aside(leaves: Collection[Tensor]) -> Iterator[None]:
    """Set ``leaf.grad`` to None while the context is open, and restore it afterwards."""
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, grad in zip(leaves, before, strict=True):
            leaf.grad = grad


def other_leaves(losses: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the leaves that get gradients in the losses' backward pass, apart from the parameters.

    Leaves inside of checkpointing with use_reentrant=True are not found.
    """
    ours = {id(p) for p in parameters.values()}
    leaves: dict[int, Tensor] = {}
    nodes = [torch.autograd.graph.get_gradient_edge(loss).node for loss in losses]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        leaf = node.variable if type(node).__name__ == "AccumulateGrad" else None  # type: ignore[attr-defined]
        if leaf is not None and id(leaf) not in ours:
            leaves[id(leaf)] = leaf
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return list(leaves.values())
