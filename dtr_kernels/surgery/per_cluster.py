"""Per-cluster gradients by one forward and backward pass for each cluster's own samples.

The clusters partition the batch, so the K passes together do the work of one ordinary step, for any model that
autograd can differentiate: compiled, checkpointed, under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import Node

from dtr_kernels.surgery import interrupts, wrappers
from dtr_kernels.surgery.buffer import GradientBuffer
from dtr_kernels.surgery.leaves import Leaves, other_leaves

Loss = Tensor | Callable[[], Tensor] | None


def accumulate(
    buffer: GradientBuffer,
    parameters: Mapping[str, Tensor],
    losses: Sequence[Loss],
    scaled: Callable[[Tensor], Tensor],
    leaves: Leaves,
) -> tuple[list[Tensor | None], set[str]]:
    """Add the gradient of ``scaled(losses[k])`` to gradient k of the buffer, for every k.

    Args:
        losses: scalars, or functions that return one and are called in turn; None for a cluster without samples.
        leaves: its ``put_away`` must have had the parameters; collects the gradients of other leaves.

    Returns:
        The losses' detached values, and the names of the parameters that got a gradient.

    Raises:
        TypeError, ValueError: if a loss is not a scalar that requires grad.
        RuntimeError: if other code, such as a hook, assigns to a parameter's ``grad`` meanwhile.
    """
    for k, loss in enumerate(losses):
        if isinstance(loss, Tensor):
            _check(f"losses[{k}]", loss)
        elif loss is not None and not callable(loss):
            raise TypeError(f"losses[{k}] must be a scalar tensor, a function or None, got {type(loss).__name__}")
    needed_again = _needed_again(losses)
    values: list[Tensor | None] = []
    received: set[str] = set()
    for k, loss in enumerate(losses):
        if loss is None:
            values.append(None)
            continue
        with _gradients_into(parameters, buffer.gradient(k), received):
            with interrupts.LetThrough():
                value = loss if isinstance(loss, Tensor) else _check(f"losses[{k}]()", loss())
            leaves.collect(other_leaves([value], parameters))
            with interrupts.LetThrough():
                if isinstance(loss, Tensor):
                    wrappers.backward(scaled(value), buffer.gradient(k), retain_graph=needed_again[k])
                else:
                    scaled(value).backward()
        values.append(value.detach())
    return values, received


def _needed_again(losses: Sequence[Loss]) -> list[bool]:
    """Return, for each loss, whether a later one shares part of its graph, as if both were computed together.

    A graph that is retained without need stays in memory as long as the caller keeps the loss, and compiled models
    refuse to retain it.
    """
    needed = [False] * len(losses)
    of_later_losses: set[Node] = set()
    for k in reversed(range(len(losses))):
        loss = losses[k]
        own: set[Node] = set()
        to_visit = [loss.grad_fn] if isinstance(loss, Tensor) else []
        while to_visit:
            node = to_visit.pop()
            if node is None or node in own or not node.next_functions:  # a node without next functions is a parameter's
                continue
            own.add(node)
            # Casts of parameters keep nothing, and are shared by all graphs of one autocast context.
            if node in of_later_losses and node.name() != "ToCopyBackward0":
                needed[k] = True
            else:
                to_visit += [following for following, _ in node.next_functions]
        of_later_losses |= own
    return needed


def _check(name: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a scalar tensor, got {type(value).__name__}")
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"{name} must be one real number, got {value.dtype} of shape {list(value.shape)}; take the mean over its "
            "samples"
        )
    if not value.requires_grad:
        raise ValueError(f"{name} does not depend on any parameter that requires grad")
    return value


def _writes(view: Tensor) -> int:
    """Count the writes to a view: by autograd, or by FSDP, which writes to this rank's shard of a DTensor."""
    return view._version + getattr(view, "_local_tensor", view)._version


@contextmanager
def _gradients_into(parameters: Mapping[str, Tensor], gradient: list[Tensor], received: set[str]) -> Iterator[None]:
    """Make autograd add to ``gradient``, and record the names of the parameters it reached."""
    versions = [_writes(view) for view in gradient]
    for p, view in zip(parameters.values(), gradient, strict=True):
        p.grad = view
    yield
    for (name, p), view, version in zip(parameters.items(), gradient, versions, strict=True):
        if p.grad is not view:
            raise RuntimeError(
                f"the grad of {name} was replaced while a cluster's gradient was computed; hooks and loss "
                "functions may change it in place only, optimizers may step only after the update, and losses must "
                "call the model itself, not a DistributedDataParallel wrapper (its .module)"
            )
        if _writes(view) != version:
            received.add(name)
