"""Refusal of wrappers around a model that communicate gradients in its backward passes.

DistributedDataParallel averages ``p.grad`` over the ranks after a backward pass: here each of the K gradients, in as
many passes as a rank has clusters. If ranks have different clusters, it averages gradients of different clusters, or
ends the process.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

_REFUSAL = (
    "the losses come from a DistributedDataParallel wrapper, which communicates each of the K gradients on its own; "
    "let them call the model itself, the wrapper's .module, and give GradientSurgery process_group="
)


_LOCK = threading.Lock()
_steps_running = 0  # in all threads
_this_thread = threading.local()
_pre_forward = DistributedDataParallel._pre_forward


@contextmanager
def refused() -> Iterator[None]:
    """Refuse forward passes of DistributedDataParallel in this thread, except under its no_sync().

    Raises:
        RuntimeError: from the forward pass.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    outer, _this_thread.refuses = getattr(_this_thread, "refuses", False), True
    _count(1)
    try:
        yield
    finally:
        _count(-1)
        _this_thread.refuses = outer


def _count(steps: int) -> None:
    """Replace the method while steps run.

    The wrapper itself is out of reach, since only params are known here. Its method before a forward pass is common to
    subclasses, compiled ones, and replicate().
    """
    global _steps_running
    with _LOCK:
        _steps_running += steps
        DistributedDataParallel._pre_forward = _refuse if _steps_running else _pre_forward  # type: ignore[method-assign]


def _refuse(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
    if getattr(_this_thread, "refuses", False) and torch.is_grad_enabled() and self.require_backward_grad_sync:
        raise RuntimeError(_REFUSAL)
    return _pre_forward(self, *args, **kwargs)


def backward(loss: Tensor, gradients: Sequence[Tensor], retain_graph: bool) -> None:
    """Run ``loss.backward()`` for a loss that the caller has computed, perhaps with a wrapper.

    Args:
        gradients: the parameters' ``grad``.

    Raises:
        RuntimeError: if the gradients are written to after autograd has computed them.
    """
    # Compiled autograd can trace neither this hook nor DistributedDataParallel's.
    compiled = getattr(sys.modules.get("torch._dynamo.compiled_autograd"), "compiled_autograd_enabled", False)
    if compiled or not (dist.is_available() and dist.is_initialized()):
        loss.backward(retain_graph=retain_graph)
        return
    computed: list[int] = []
    # Final callbacks run in the order in which they were queued, and this one is the first.
    engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
    loss.register_hook(lambda _: engine.queue_callback(lambda: computed.extend(g._version for g in gradients)))
    loss.backward(retain_graph=retain_graph)
    if computed != [g._version for g in gradients]:
        raise RuntimeError(_REFUSAL)
