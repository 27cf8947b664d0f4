"""``leaf.grad`` during a step: put away at its start, added to at its end, and as before after an error."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Leaves:
    """The leaves that a step's losses reach: the parameters in params and others, such as those of another optimizer.

    The engines keep the new gradients of parameters; those of other leaves are kept here, added up over micro-batches.
    Between micro-batches every ``grad`` is as before the step.
    """

    def __init__(self) -> None:
        self._before: dict[Tensor, Tensor | None] = {}  # while they are put away
        self._others: dict[Tensor, Tensor | None] = {}  # new gradients

    def put_away(self, parameters: Iterable[Tensor]) -> None:
        """Remember the parameters' ``grad``, which engines then use as they like."""
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
        """Give every leaf the ``grad`` that it had."""
        self._others |= {leaf: leaf.grad for leaf in self._others if leaf in self._before}
        self._restore()

    def add(self, updates: Iterable[tuple[Tensor, Tensor]]) -> None:
        """End the step: add parameters' updates, and the other leaves' new gradients, to ``grad``."""
        for leaf, new in [*updates, *self._others.items()]:
            if new is not None:
                _add_gradient(leaf, new)
        self._others = {}

    def drop(self) -> None:
        """End the step as if it had not been."""
        self._restore()
        self._others = {}

    def _restore(self) -> None:
        for leaf, grad in self._before.items():
            leaf.grad = grad
        self._before = {}


@torch.no_grad()
def _add_gradient(leaf: Tensor, new: Tensor) -> None:
    """Add a gradient as autograd does: in place, because others may hold leaf.grad, if its memory allows."""
    if leaf.grad is None:
        leaf.grad = new
    elif leaf.grad.is_sparse:
        leaf.grad = new + leaf.grad
    else:
        leaf.grad.add_(new)


@contextmanager
def gradients_set_aside(leaves: Collection[Tensor]) -> Iterator[None]:
    """``leaf.grad`` is None inside, and what it was before outside."""
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

    Those inside of checkpointing with use_reentrant=True are not seen.
    """
    ours = {id(p) for p in parameters.values()}
    leaves: dict[int, Tensor] = {}
    nodes = [torch.autograd.graph.get_gradient_edge(loss).node for loss in losses]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in ours:
            leaves[id(leaf)] = leaf
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return list(leaves.values())
