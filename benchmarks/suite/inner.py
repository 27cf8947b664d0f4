"""Scope "inner", which computes a part of the attention heads, against the unrouted block and model, compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.cases import WINDOWS, Benchmark, Case, Cell, Goal, Options
from benchmarks.suite import block, model, whole
from benchmarks.suite.models import LIGHTNING, TINY, dit_channels
from benchmarks.suite.whole import COMPILED, MASKED, UNROUTED, Axes

PASSES = (*block.PASSES, "sampling")
PEER = UNROUTED + COMPILED
_SIDES = (MASKED, PEER, block.FUSED, model.FUSED, model.REMEMBERED)

_COMMON: Axes = {"scope": ("inner",), "window": ("shared",), "beta": (0.75, 0.5), "pass_": block.PASSES}
_CENTRE: dict[str, Axes] = {
    "quick": {**_COMMON, "model": (TINY,), "batch": (2,), "precision": ("fp32",), "beta": (0.5,)},
    "cpu": {**_COMMON, "model": ("DiT-B/2", "DiT-L/2", "DiT-XL/2"), "batch": (4,), "precision": ("fp32", "bf16")},
    "cuda": {**_COMMON, "model": ("DiT-XL/2",), "batch": (256,), "precision": ("bf16",), "window": WINDOWS},
}
_SAMPLING: Axes = {"model": ("DiT-B/2",), "pass_": ("sampling",)}
_STAR: dict[str, Sequence[Axes]] = {
    "quick": ({"window": ("per sample",)}, {"pass_": ("sampling",)}),
    "cpu": (
        {"model": ("DiT-B/2",), "batch": (16,), "window": ("per sample",)},
        {"model": ("DiT-B/2",), "precision": ("fp32",), "beta": (0.25, 1.0)},
        {"model": (LIGHTNING,), "beta": (0.5,)},
        _SAMPLING,
    ),
    "cuda": ({"batch": (32,)}, {"window": ("shared",), "beta": (0.25, 1.0)}, {**_SAMPLING, "window": ("shared",)}),
}
# Speed-ups over the peer to reach, for three quarters of the heads and for half of them.
_SHARED = {"forward": (1.25, 1.75), "training": (1.2, 1.7), "sampling": (1.25, 1.6)}
_PER_SAMPLE = {"forward": (1.2, 1.7), "training": (1.15, 1.6)}
_ON_GPU = {"per sample": (1.15, 1.5)}
_SAVED = (0.46, 0.36)


def cases(options: Options) -> list[Callable[[], Case]]:
    """Return blocks with a shared window and with one per sample, other active shares, and guided steps of a Sampler;
    with options, all their combinations."""
    options.check("inner", 'scope "inner"', scope=("inner",), pass_=PASSES)
    if "sampling" in options.asked.get("pass_", ()) and options.asked.get("window", ("shared",)) != ("shared",):
        raise ValueError("--window must be shared for --pass sampling, whose samples all have one timestep")
    cells = whole.grid(options, dit_channels, _CENTRE[options.size], _STAR[options.size])
    return [partial(build, cell, options.device) for cell in cells]


def build(cell: Cell, device: torch.device) -> Case:
    """Build a case of ``block`` or ``model`` with fewer sides, against the unrouted side."""
    case = (model if cell.pass_ == "sampling" else block).build(cell, device)
    sides = [side for side in case.sides if side.name in _SIDES]
    return replace(case, sides=sides, speedup_over=PEER, goals=goals(cell, device))


def goals(cell: Cell, device: torch.device) -> list[Goal]:
    """Return the goals for three quarters or half of the heads; none for other shares."""
    shares = {0.75: 0, 0.5: 1}
    if cell.beta not in shares or cell.model == TINY:
        return []
    number = shares[cell.beta]
    ours = model.REMEMBERED if cell.pass_ == "sampling" else block.FUSED
    if device.type == "cpu":
        wanted = (_PER_SAMPLE if cell.window == "per sample" else _SHARED)[cell.pass_][number]
    else:
        wanted = _ON_GPU.get(cell.window, (1.25, 1.7))[number]
    found = [Goal("speed-up", ours, over=PEER, at_least=wanted)]
    if cell.pass_ == "training":
        found.append(Goal("bytes saved", ours, over=MASKED, at_most=_SAVED[number]))
    return found


BENCHMARK = Benchmark(
    "inner",
    'Scope "inner": blocks and sampling steps with a part of the heads, against the unrouted ones, compiled.',
    cases,
)
