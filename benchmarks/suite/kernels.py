"""Every declared kernel in the modes that training steps and samplers run: a benchmark for each file of ``ops``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.cases import AUTOCAST, DTYPES, WINDOWS, Benchmark, Case, Goal, Options, Side, do_nothing
from benchmarks.counts import NOT_COUNTED, Work
from benchmarks.suite import whole
from benchmarks.suite.models import TINY, blueprint, dit_channels
from benchmarks.suite.whole import ABOUT_AUTOTUNED, AUTOTUNED, COMPILED, MASKED, Axes, Gate
from benchmarks.timing import copies
from dtr_kernels import ops
from dtr_kernels.ops.declaration import (
    ONE_SLICE,
    PRECISIONS,
    Draw,
    Gradient,
    Gradients,
    Kernel,
    Mode,
    Precision,
    Sizes,
    mode_name,
    results,
    widened,
)

_SIZE: dict[str, Axes] = {
    "quick": {"model": (TINY,), "batch": (2,)},
    "cpu": {"model": ("DiT-S/2", "DiT-XL/2"), "batch": (4,)},
    "cuda": {"model": ("DiT-S/2", "DiT-XL/2"), "batch": (32,)},
}
_PRECISION = {"quick": ("fp32",), "cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
# Gradients larger than any cache, with the clusters of ANT and of DTR.
_GRADIENTS = {True: [Gradients(5, 1 << 16)], False: [Gradients(5, 8 << 20), Gradients(8, 8 << 20)]}
# Shares of the copy's bandwidth to reach. On a CPU a copy also reads what it writes.
_SHARE = {"cpu": 0.7, "cuda": 0.9}


class Point(NamedTuple):
    """The place of a case: sizes, a precision, whether the batch shares a window, and the coordinates of all these."""

    sizes: Any
    precision: Precision
    shared: bool
    coordinates: Mapping[str, str | int | float]


def benchmark_of(module: str, kernels: list[Kernel]) -> Benchmark:
    """Return the benchmark of the kernels that one module declares: their timed modes at every point of its grid."""
    file = module.rpartition(".")[2]
    points = _of_gradients if isinstance(kernels[0].sizes[0], Gradients) else _of_blocks

    def cases(options: Options) -> list[Callable[[], Case]]:
        return [
            partial(build, kernel, mode, point, options.device)
            for point in points(file, kernels, options)
            for kernel in kernels
            for mode in kernel.modes
            if kernel.timed(**mode) and point.precision in kernel.precisions.values()
        ]

    names = ", ".join(kernel.name for kernel in kernels)
    return Benchmark(file, f"{names}, against plain PyTorch, eager and compiled.", cases, modules=(module,))


def _of_blocks(file: str, kernels: list[Kernel], options: Options) -> Iterator[Point]:
    known = {name for kernel in kernels for name in kernel.precisions}
    axes = ("model", "batch", "precision", "window", "beta")
    options.check(file, file, axes, precision=[name for name in (*DTYPES, AUTOCAST) if name in known])
    centre: Axes = {
        **_SIZE[options.size],
        "precision": _PRECISION[options.size],
        "scope": ("block",),
        "window": WINDOWS[:1],
        "beta": (0.8,),
        "pass_": ("forward",),
    }
    for cell in whole.grid(options, dit_channels, centre):
        _, N, C = blueprint(cell.model).pos_embed.shape
        coordinates = {axis: cell.coordinates[axis] for axis in axes}
        precision = Precision(cell.matrix_dtype, cell.dtype)
        yield Point(Sizes(cell.batch, N, C, cell.beta), precision, cell.window == "shared", coordinates)


def _of_gradients(file: str, kernels: list[Kernel], options: Options) -> Iterator[Point]:
    options.check(file, "gradients", ("precision",), precision=tuple(DTYPES))
    for name in options.asked.get("precision", ("fp32",) if options.quick else ("fp32", "bf16")):
        for sizes in _GRADIENTS[options.quick]:
            coordinates = {"clusters": sizes.K, "parameters": sizes.P, "precision": name}
            yield Point(sizes, PRECISIONS[name], False, coordinates)


def build(kernel: Kernel, mode: Mode, point: Point, device: torch.device) -> Case:
    """Build the kernel, the reference and the peers, in one mode at one point."""
    assert kernel.work is not None
    torch.compiler.reset()
    precision = str(point.coordinates["precision"])
    work = kernel.work(point.sizes, point.precision.items, **mode)
    torch.manual_seed(whole.SEED)
    draw = Draw(point.sizes, point.precision, device, point.shared)
    sets = [dict(kernel.inputs(draw, **mode)) for _ in range(copies(device, work.bytes))]
    wide = widened(sets[0])
    right = results(kernel.exact(**wide))
    gate = Gate(right, results(kernel.exact(**sets[0])), precision)

    def side(name: str, prepare: Callable[..., Any], gate: Gate, work: Work = work, **others: Any) -> Side:
        first, *rotation = (prepare(**arguments) for arguments in sets)
        error = lambda found: gate.error(results(found))  # noqa: E731
        return Side(name, first, error, gate.bound, work=work, rotation=rotation, **others)

    compilers = {COMPILED: None} | ({AUTOTUNED: whole.MAX_AUTOTUNE} if device.type == "cuda" else {})
    sides = [side(MASKED, partial(_reference, kernel, lambda function: function), gate)]
    sides += [
        side(MASKED + name, partial(_reference, kernel, partial(whole.compiled, mode=mode)), gate)
        for name, mode in compilers.items()
    ]
    for name, peer in kernel.peers.items():
        exact, eager = (peer(**arguments) for arguments in (wide, sets[0]))
        if exact and eager:
            found = results(exact())
            # A peer may compute another function, whose work is not counted.
            same = [t.shape for t in found] == [t.shape for t in right] and gate.error(found) <= gate.bound
            own = Gate(found, results(eager()), precision)
            sides.append(side(name, peer, own, work if same else NOT_COUNTED))
    written = [leaf for leaf in tree_leaves(sets[0]) if isinstance(leaf, Tensor)] if kernel.in_place else []
    kept = [leaf.clone() for leaf in written]
    before = partial(torch._foreach_copy_, written, kept) if written else do_nothing
    sides.append(side(kernel.name, lambda **arguments: lambda: kernel.launch(**arguments), gate, before=before))

    what = ", ".join(filter(None, (kernel.name, mode_name(mode))))
    return Case(
        ", ".join((what, *(f"{axis} {value}" for axis, value in point.coordinates.items()))),
        sides,
        {"what": what, **point.coordinates},
        speedup_over=MASKED,
        goals=goals(kernel, device.type),
        matrix_dtype=point.precision.operand if work.flops else None,
        notes=[ABOUT_AUTOTUNED] * (device.type == "cuda"),
    )


def _reference(kernel: Kernel, wrap: Callable[[Any], Any], **arguments: Any) -> Callable[[], Any]:
    """Return a call of plain PyTorch; for a backward pass, only the backward pass."""
    if isinstance(kernel.exact, Gradient):
        return kernel.exact.prepare(arguments, wrap)
    function = wrap(kernel.exact)
    return lambda: function(**arguments)


def goals(kernel: Kernel, device_type: str) -> list[Goal]:
    """Return the kernel's goals: the bandwidth of a copy, or for products nearly the speed of PyTorch's."""
    mode = next(mode for mode in kernel.modes if kernel.timed(**mode))
    of_gradients, items = isinstance(kernel.sizes[0], Gradients), PRECISIONS["fp32"].items
    moves_alone = kernel.work is not None and not kernel.work(kernel.sizes[0], items, **mode).flops
    if moves_alone and (kernel.peers if of_gradients else device_type == "cuda"):
        return [Goal("share of copy", kernel.name, at_least=_SHARE[device_type])]
    if device_type == "cuda" and ONE_SLICE in kernel.peers:
        return [Goal("speed-up", kernel.name, over=ONE_SLICE, at_least=0.95)]
    return []


def _by_module() -> dict[str, list[Kernel]]:
    found: dict[str, list[Kernel]] = {}
    for kernel in ops.KERNELS:
        if kernel.work is not None:
            found.setdefault(kernel.work.__module__, []).append(kernel)
    return found


BENCHMARKS = [benchmark_of(module, kernels) for module, kernels in _by_module().items()]
