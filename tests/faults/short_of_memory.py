"""A process in which chosen allocations fail: it prints a line for each fault tried, until it is killed.

It ends by itself only if an exception ends it, as one that leaves a parallel region does.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from fuzz_boundary import load
from fuzz_cases import Call, Draw, calls, converted

_preloaded = ctypes.CDLL(None)
_preloaded.allocations_left.restype = ctypes.c_long
_MANY = 1 << 40


def fail_after(allocations: int) -> None:
    """Let that many allocations succeed, and then one fail; below zero, none fails."""
    _preloaded.fail_after(ctypes.c_long(allocations))


def allocations_of(call: Callable[[], Any]) -> int:
    fail_after(_MANY)
    call()
    left = _preloaded.allocations_left()
    fail_after(-1)
    return _MANY - left


def attempt(call: Callable[[], Any], allocations: int) -> bool:
    """Call with one failing allocation; return whether there were so many, which must be a MemoryError."""
    fail_after(allocations)
    try:
        call()
    except MemoryError:
        return True
    finally:
        failed = _preloaded.allocations_left() < 0
        fail_after(-1)
    assert not failed, "no MemoryError was raised"
    return False


# --- the extension ---------------------------------------------------------------------------------------------------


def calls_of_the_extension(seed: int, extension: str) -> Iterator[tuple[str, str | None]]:
    """Call each function in turn on random arguments: once for each allocation, which fails, and then without."""
    kernels = load(Path(extension))
    makers = {name: make for name, make in calls(kernels).items() if not name.startswith("cuda.")}
    for number in itertools.count():
        for name, make in makers.items():
            case = f"{seed} {number} {name}"
            call = make(Draw(case))
            allocation = 0

            def failing(kernels: Any, function: str, arguments: list[Any], call: Call = call) -> None:
                nonlocal allocation
                right, operands = converted(kernels, arguments), [*call.operands().values(), *call.keeps]
                # The last of these calls has all that it needs, and its results are checked.
                while attempt(lambda: getattr(kernels, function)(*right), allocation):
                    allocation += 1
                    assert all(x.is_as_before() for x in operands), "something was written"

            try:
                call.run(kernels, failing)
                outcome = None
            except Exception as error:
                outcome = f"case {case!r}, allocation {allocation}: {type(error).__name__}: {error}"
            yield from ((name, None) for _ in range(allocation))
            yield name, outcome
        yield from _gradients(kernels, Draw(f"{seed} {number}"))


def _gradients(kernels: Any, draw: Draw) -> Iterator[tuple[str, str | None]]:
    """Make ``Gradients`` of addresses and of tensors, once for each allocation, which fails, and then without."""
    K, sizes = draw.size(8), [draw.size(20) for _ in range(draw.size(5))]
    rows = [[torch.ones(size) for size in sizes] for _ in range(K)]
    pointers = [row[s].data_ptr() for s in range(len(sizes)) for row in rows]
    for name, make in {
        "Gradients.at": lambda: kernels.Gradients.at(kernels.Type.f32, K, pointers, sizes),
        "Gradients.of": lambda: kernels.Gradients.of(rows, torch.Tensor, nn.Parameter),
    }.items():
        make()  # PyTorch allocates in the first call of a process, and where that fails, ends it
        allocation = 0
        while attempt(make, allocation):
            allocation += 1
            yield name, None
        yield name, None if make().sizes == sizes else f"{name}: sizes {make().sizes} instead of {sizes}"


# --- gradient surgery ------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Two layers of which gradient surgery knows, and two outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 6))
        self.head = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


@dataclass
class Step:
    """A step of gradient surgery for a model's trunk; the head gets the gradient of the mean loss."""

    model: Model
    engine: str
    weighting: str
    clusters: int
    micro_batches: int
    batch: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        from dtr_kernels import GradientSurgery

        self.generator = torch.Generator()
        parameters = self.model.trunk.parameters()
        self.surgery = GradientSurgery(
            parameters, self.clusters, self.weighting, engine=self.engine, generator=self.generator
        )

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.model(x) - y).square().mean(1)

    def __call__(self) -> None:
        self.generator.manual_seed(0)
        for number in range(self.micro_batches):
            self.before_call = self.gradients()
            self.surgery.backward_batch(self.loss, *self.batch, last=number == self.micro_batches - 1)

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: None if p.grad is None else p.grad.clone() for name, p in self.model.named_parameters()}

    def set_gradients(self, gradients: dict[str, Tensor | None]) -> None:
        for name, p in self.model.named_parameters():
            p.grad = None if (old := gradients[name]) is None else old.clone()

    def of_a_copy(self, **changes: Any) -> Step:
        return replace(self, model=copy.deepcopy(self.model), **changes)


def steps_of_surgery(seed: int, extension: str) -> Iterator[tuple[str, str | None]]:
    """Take steps of which one allocation fails: ``p.grad`` must be as before, and the next step right."""
    rng = random.Random(seed)
    torch.set_num_threads(1)
    for number in itertools.count():
        engine = ("per_cluster", "one_pass", "low_memory", "auto")[number % 4]
        micro_batches = 1 if engine == "low_memory" else rng.randint(1, 2)
        torch.manual_seed(rng.randrange(10**9))
        K, B = rng.randint(2, 4), rng.randint(4, 8)
        batch = (torch.arange(B) % K, torch.randn(B, 6), torch.randn(B, 4))
        step = Step(Model(), engine, rng.choice(["pcgrad", "sum"]), K, micro_batches, batch)
        start = {name: torch.randn_like(p) if rng.random() < 0.7 else None for name, p in step.model.named_parameters()}
        what = f"{engine}, {step.weighting}, {micro_batches} micro-batches, seed {seed}, step {number}"
        try:
            right, counted = step.of_a_copy(engine="per_cluster"), step.of_a_copy()
            if rng.random() < 0.5:  # otherwise the first step fails, which makes the buffers
                step()
                counted()
            for each in (step, right, counted):
                each.set_gradients(start)
            allocations = allocations_of(counted)
            allocation = rng.randrange(allocations)
            what += f", allocation {allocation} of {allocations}"
            step.before_call = start
            fail_after(allocation)
            try:
                step()  # "auto" may go on with its other engine
                failed = False
            except Exception:
                failed = True
            fail_after(-1)
            if failed:
                for name, now in step.gradients().items():
                    as_before = _same(now, step.before_call[name]) or _same(now, start[name])
                    assert as_before, f"the gradient of {name} is not as before"
                step.set_gradients(start)
                step.surgery.drop_micro_batches()  # the allocation may be one of this file, between two of them
                step()
            right()
            for name, now in step.gradients().items():
                torch.testing.assert_close(now, right.gradients()[name], msg=f"the gradient of {name} is wrong")
            outcome = None
        except Exception as error:
            outcome = f"{what}: {type(error).__name__}: {error}"
        yield engine, outcome


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


if __name__ == "__main__":
    kind = {"extension": calls_of_the_extension, "surgery": steps_of_surgery}[sys.argv[1]]
    for name, outcome in kind(int(sys.argv[2]), sys.argv[3]):
        print(json.dumps([name, outcome]), flush=True)
