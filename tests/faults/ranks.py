"""Ranks that fail, are interrupted or die at any point of a step of gradient surgery, and what becomes of the rest."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import dtr_kernels as dtr
from tests import distributed_checks
from tests.faults.fault import Fault
from tests.processes import forks

# Seconds within which every rank must have ended its part, or raised.
_PATIENCE = 30.0
_SURGERY = str(Path(dtr.__file__).parent / "surgery")


class Try(NamedTuple):
    """A fault on one rank.

    Attributes:
        kind: a key of KINDS.
        rank: where it happens.
        at: how far in the step, from 0 to 1.
        engine: of the step, or "sharded".
        micro_batches: of the step.
        seed: of the model and the batches.
    """

    kind: str
    rank: int
    at: float
    engine: str
    micro_batches: int
    seed: int


class _AtLine:
    """Calls a function at the n-th line of the package's code for gradient surgery; counts lines."""

    def __init__(self, surgery: dtr.GradientSurgery, act: Callable[[], object], at: int = 0) -> None:
        self.passed, self._surgery, self._act, self._at = 0, surgery, act, at

    def __enter__(self) -> _AtLine:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: Any, event: str, _: Any) -> Any:
        # Interrupts between two calls are the caller's: not in "attempt", around each of them, nor in its blocks' ends.
        code = frame.f_code
        inside = code.co_filename.startswith(_SURGERY) and code.co_name != "attempt"
        inside = inside and not code.co_filename.endswith("interrupts.py")
        if not inside or not (self.passed or getattr(self._surgery._ranks, "_others", "meet") == "meet"):
            return self._trace if inside else None
        if event == "line":
            self.passed += 1
            if self.passed == self._at:
                self._act()
        return self._trace


class _AtAllocation(TorchDispatchMode):
    """Fails in place of the n-th operation that allocates; counts them.

    Not in the sharded model's passes, nor in the meetings of the ranks, which allocate a few numbers.
    """

    def __init__(self, surgery: dtr.GradientSurgery, at: int = 0) -> None:
        super().__init__()
        self.passed, self._surgery, self._at = 0, surgery, at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        new = func.namespace != "c10d" and not any(result.alias_info for result in func._schema.returns)
        meta = isinstance(out, torch.Tensor) and out.is_meta  # one_pass asks for shapes by such
        if new and not meta and self._surgery._ranks._others == "meet":
            self.passed += 1
            if self.passed == self._at:
                raise torch.OutOfMemoryError("no memory, by a fault that was tried")
        return out


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


KINDS: dict[str, Callable[..., Any]] = {
    "runs out of memory": lambda surgery, at=0: _AtAllocation(surgery, at),
    "is interrupted": lambda surgery, at=0: _AtLine(surgery, lambda: signal.raise_signal(signal.SIGINT), at),
    "dies": lambda surgery, at=0: _AtLine(surgery, _die, at),
}


class _Step:
    """A model, its surgery and the rank's batch. A parameter of the loss, ``scale``, is not in params."""

    def __init__(self, rank: int, size: int, what: Try) -> None:
        torch.manual_seed(what.seed)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        if what.engine == "sharded":
            self.model, self.whole = distributed_checks.sharded(init_device_mesh("cpu", (size,)))
            self.surgery = dtr.GradientSurgery(self.model.named_parameters(), distributed_checks.K)
        else:
            self.model = self.whole = distributed_checks.Net().double()
            group = dist.group.WORLD if size > 1 else None
            parameters = self.model.named_parameters()
            self.surgery = dtr.GradientSurgery(
                parameters, distributed_checks.K, engine=what.engine, process_group=group
            )
        self._micro_batches = what.micro_batches
        parts, self._batch = distributed_checks.batches(size)
        self._part = parts[rank]
        self.leaves = [*self.model.parameters(), self.scale]
        for leaf in self.leaves[::2]:
            leaf.grad = torch.ones_like(leaf)

    def run(self) -> None:
        for last in [False] * (self._micro_batches - 1) + [True]:
            self.surgery.backward_batch(self._losses, self._part[0], *self._part, last=last)

    def _losses(self, *tensors: torch.Tensor) -> torch.Tensor:
        return distributed_checks.losses_of(self.model, *tensors) * self.scale

    def gradients(self) -> list[torch.Tensor | None]:
        return [None if p.grad is None else distributed_checks.own_part(p.grad).clone() for p in self.leaves]

    def check(self) -> None:
        """Run a step, and compare it with the truth."""
        for leaf in self.leaves:
            leaf.grad = None
        self.run()
        truth = distributed_checks.true_gradients(self.whole, self._batch)
        update = distributed_checks.flat_update(self.model)
        distributed_checks.assert_close(update, self.surgery.last_weights @ truth)
        assert self.scale.grad is not None and self.scale.grad != 0


def _same(a: list[torch.Tensor | None], b: list[torch.Tensor | None]) -> bool:
    return all(_close(x, y) for x, y in zip(a, b, strict=True))


def _close(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
    return x is y if x is None or y is None else torch.allclose(x, y, rtol=1e-9)


def _attempt(rank: int, size: int, what: Try) -> str:
    """Return what was lost, in a sentence; nothing if nothing was."""
    whole = _Step(rank, size, what)
    with KINDS[what.kind](whole.surgery) as counted:
        whole.run()
    step = _Step(rank, size, what)
    before = step.gradients()
    fault = nullcontext()
    if rank == what.rank:
        fault = KINDS[what.kind](step.surgery, 1 + int(what.at * counted.passed))
    error: BaseException | None = None
    try:
        with fault:
            step.run()
    except BaseException as caught:
        error = caught
    if what.kind == "dies":
        if error is None:  # it died at the very end
            try:
                step.run()
            except RuntimeError as caught:
                error = caught
        elif not _same(before, step.gradients()):
            return "a gradient changed although the step failed"
        return "" if error is not None else "a step was made without the rank that died"
    now = step.gradients()
    unchanged = _same(before, now)
    partly = not unchanged and not _same(whole.gradients(), now)
    if torch._C._len_torch_function_stack() or torch._dynamo.eval_frame._stance.stance != "default":
        return "PyTorch is left in another mode"
    everywhere: list[Any] = [(unchanged, error is not None)]
    if size > 1:
        everywhere *= size
        dist.all_gather_object(everywhere, (unchanged, error is not None))
    if partly:
        return "gradients changed, and not to those of the whole update"
    if len({unchanged for unchanged, _ in everywhere}) > 1:
        return f"gradients changed on some ranks alone: {everywhere}"
    if unchanged and not all(failed for _, failed in everywhere):
        return f"no error on some ranks: {everywhere}"
    if rank == what.rank:
        if not isinstance(error, KeyboardInterrupt if what.kind == "is interrupted" else torch.OutOfMemoryError):
            return f"the rank itself raised {error!r}"
    elif unchanged and f"rank {what.rank} failed in this step" not in str(error):
        return f"another rank raised {error!r}"
    elif not unchanged and error is not None:
        return f"a rank raised {error!r} and has its update"
    if size > 1 and not unchanged:  # the others have made the step, and must hear that one was interrupted
        message = distributed_checks.raised(ValueError, step.run)
        assert "calls of backward and backward_batch" in message
    step.check()
    return ""


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=size)
    pipe.send("ready")
    while True:
        what = pipe.recv()
        try:
            pipe.send(_attempt(rank, size, what))
        except BaseException as error:
            pipe.send(f"{type(error).__name__}: {error}")
        if what.kind == "dies":
            os._exit(0)


class _Group:
    """Processes that try faults together."""

    def __init__(self, size: int, store: Path) -> None:
        context = forks()
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            self._processes.append(context.Process(target=_serve, args=(rank, size, f"file://{store}", there)))
            self._processes[-1].start()
            self._pipes.append(here)
        for pipe in self._pipes:  # starting takes as long as the machine is busy
            pipe.recv()

    def attempt(self, what: Try) -> str | None:
        """Return what was lost, on which rank and in which try."""
        for pipe in self._pipes:
            pipe.send(what)
        end = time.monotonic() + _PATIENCE
        for rank, pipe in enumerate(self._pipes):
            if what.kind == "dies" and rank == what.rank:
                continue
            if not pipe.poll(max(end - time.monotonic(), 0)):
                return f"rank {rank} waited for more than {_PATIENCE:.0f} seconds in {what}"
            if lost := pipe.recv():
                return f"rank {rank}: {lost}, in {what}"
        return None

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _tries(kind: str, size: int) -> Callable[[random.Random, Path], Iterator[str | None]]:
    def tries(chance: random.Random, folder: Path) -> Iterator[str | None]:
        group = None
        try:
            for i in count():
                group = group or _Group(size, folder / f"store{i}")
                engine = chance.choice(["per_cluster", "one_pass"] + ["sharded"] * (kind == "runs out of memory"))
                rank, micro_batches = chance.randrange(size), chance.choice([1, 1, 2])
                lost = group.attempt(Try(kind, rank, chance.random(), engine, micro_batches, chance.randrange(2**31)))
                if lost or kind == "dies":
                    group.end()
                    group = None
                yield lost
        finally:
            if group:
                group.end()

    return tries


def _interrupts_alone(chance: random.Random, folder: Path) -> Iterator[str | None]:
    while True:
        engine = chance.choice(["per_cluster", "one_pass", "low_memory"])
        micro_batches = 1 if engine == "low_memory" else chance.choice([1, 2])
        what = Try("is interrupted", 0, chance.random(), engine, micro_batches, chance.randrange(2**31))
        lost = _attempt(0, 1, what)
        yield f"{lost}, in {what}" if lost else None


FAULTS = [
    Fault(
        "Ctrl-C at any point of a step by one process",
        "all gradients as before or the whole update, and the next step right",
        _interrupts_alone,
    ),
    *(
        Fault(f"one rank of {size} {kind} at any point of a step", expected, _tries(kind, size))
        for kind, expected in {
            "runs out of memory": "an error on every rank, all gradients as before, and the next step right",
            "is interrupted": "an error on every rank and all gradients as before, or the whole update on every rank; "
            "the next step right",
            "dies": "an error on every other rank within seconds",
        }.items()
        for size in (2, 4)
    ),
]
