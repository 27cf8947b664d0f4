"""PCGrad on K gradients of P elements: from [K, P] to the update [P]."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import dtr_kernels as dtr
from benchmarks.cases import DTYPES, Benchmark, Case, Goal, Options, Side, do_nothing, dtype_name
from benchmarks.counts import Work
from benchmarks.suite.surgery import OTHERS, OURS, Oracle, torchjd_order, what_runs

Bounds = dict[torch.dtype, float]

SEED = 0
ELEMENTS, QUICK_ELEMENTS = 33_000_000, 200_000  # DiT-S/2 has 33 million parameters
LOOP, MM, BMM, COMPILED = "the loop", "torch.mm", "torch.bmm in chunks", "torch.compile"


def cases(options: Options) -> list[Callable[[], Case]]:
    """Return a case for each dtype and K."""
    P = QUICK_ELEMENTS if options.quick else ELEMENTS
    options.check("surgery_projection", "gradients", ("precision",), precision=DTYPES)
    return [
        partial(projection, K, P, DTYPES[precision], options.device)
        for precision in options.asked.get("precision", ("fp32", "bf16"))
        for K in (5, 8)  # the clusters of ANT and of DTR
    ]


def projection(K: int, P: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Build everything between the gradients and the update, by the public code's loop, plain PyTorch, and ours."""
    grads = conflicting_gradients(K, P, dtype, device)
    own = torch.empty_like(grads)
    host_order = torchjd_order(K, SEED)  # on the CPU, where the loop takes it; and on the device
    order = host_order.to(device)
    oracle = Oracle(grads, order)
    update = Work(bytes=(2 * K + 1) * P * dtype.itemsize)  # two reads of all gradients, one write of the update

    def side(name: str, call: Callable[[], object], bounds: Bounds, before: Callable[[], object] = do_nothing) -> Side:
        return Side(name, call, oracle.error_of_update, bounds[dtype], before, update)

    def in_place() -> Tensor:
        dtr.ops.pcgrad_(own, order=order)
        return own

    seeded = partial(torch.manual_seed, SEED)  # TorchJD draws the order itself
    sides = [
        side(LOOP, lambda: dtr.reference.pcgrad(grads, host_order).sum(0), OTHERS),
        side(MM, lambda: mm_update(grads, order), OTHERS),
        side(BMM, lambda: bmm_update(grads, order), OTHERS),
        side(COMPILED, partial(compiled(one_pass_update), grads, order), OTHERS),
        side("TorchJD PCGrad", lambda: torchjd_update(grads), OTHERS, seeded),
        side("TorchJD weights of our Gram", lambda: torchjd_weighted(grads), OURS, seeded),
        side("pcgrad_sum", lambda: dtr.ops.pcgrad_sum(grads, order=order), OURS),
        Side(
            "pcgrad_",
            in_place,
            oracle.error_of_projected,
            OURS[dtype],
            before=lambda: own.copy_(grads),
            work=Work(bytes=3 * K * P * dtype.itemsize),
        ),
    ]

    goals = [
        Goal("speed-up", "pcgrad_sum", over=LOOP, at_least=8),
        Goal("speed-up", "pcgrad_sum", over=MM, at_least=2.5),
        Goal("error", "pcgrad_sum", at_most=OURS[dtype]),
    ]
    notes = [
        oracle.conflicts,
        what_runs(device, dtype),
        "torch.compile: of a Gram matrix written as sums of products, which it fuses into fewer passes; of torch.mm it "
        "changes little, since a matrix product stays one library call",
        "pcgrad_ returns all K projected gradients (K P more reads and writes), the others their sum",
    ]
    precision = dtype_name(dtype)
    cell: dict[str, str | int | float] = {"what": "projection", "clusters": K, "parameters": P, "precision": precision}
    name = f"projection, K {K}, P {P / 1e6:g}M, {precision}"
    return Case(name, sides, cell, speedup_over=LOOP, goals=goals, notes=notes)


def conflicting_gradients(K: int, P: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw gradients [K, P]; every other one leans the opposite way, so that about half of the pairs conflict and the
    update is far from the plain sum."""
    generator = torch.Generator(device).manual_seed(SEED)
    lean = torch.randn(P, device=device, generator=generator)
    grads = torch.empty(K, P, dtype=dtype, device=device)
    for k, row in enumerate(grads):
        row.copy_(torch.randn(P, device=device, generator=generator).add_(lean, alpha=(-1) ** k))
    return grads


def mm_update(grads: Tensor, order: Tensor) -> Tensor:
    """Compute the update in plain PyTorch, with Gram matrix and weighted sum as matrix products."""
    return pcgrad_weights((grads @ grads.T).float(), order).to(grads.dtype) @ grads


def bmm_update(grads: Tensor, order: Tensor, columns: int = 8192) -> Tensor:
    """Compute the update with a Gram matrix by stretches that fit into a cache, which is faster in CPU libraries."""
    P = grads.shape[1]
    whole = P - P % columns
    stretches = grads[:, :whole].unflatten(1, (-1, columns)).transpose(0, 1)
    rest = grads[:, whole:]
    gram = (stretches @ stretches.mT).float().sum(0) + (rest @ rest.T).float()
    return pcgrad_weights(gram, order).to(grads.dtype) @ grads


def one_pass_update(grads: Tensor, order: Tensor) -> Tensor:
    """Compute the update for a compiler: every product is written out, so that one loop can compute them all."""
    K = len(grads)
    wide = grads.float()
    products = {(i, j): (wide[i] * wide[j]).sum() for i in range(K) for j in range(i, K)}
    gram = torch.stack([products[min(i, j), max(i, j)] for i in range(K) for j in range(K)]).view(K, K)
    return (wide * pcgrad_weights(gram, order)[:, None]).sum(0).to(grads.dtype)


def pcgrad_weights(gram: Tensor, order: Tensor) -> Tensor:
    """Return PCGrad's weights [K] for a Gram matrix, all gradients at once and without host synchronisation."""
    norms, products = gram.diagonal(), gram
    coefficients = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for j in order.unbind(1):
        product, norm = products.gather(1, j[:, None]), norms[j][:, None]
        step = torch.where((product < 0) & (norm > 0), product / norm, 0.0)
        coefficients = coefficients.scatter_add(1, j[:, None], -step)
        products = products - step * gram[j]
    return coefficients.sum(0)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile with torch.compile, without the deprecation warnings of its own internals."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    return torch.compile(function, dynamic=False)


def torchjd_update(grads: Tensor) -> Tensor:
    """Run TorchJD's aggregator on the matrix of gradients."""
    from torchjd.aggregation import PCGrad

    return PCGrad()(grads)


def torchjd_weighted(grads: Tensor) -> Tensor:
    """Run TorchJD's weighting between our two passes."""
    from torchjd.aggregation import PCGradWeighting

    return dtr.ops.weighted_sum(grads, PCGradWeighting()(dtr.ops.gram(grads)))


BENCHMARK = Benchmark(
    "surgery_projection",
    "PCGrad from the gradients [K, P] to the update [P]: the public loop, plain PyTorch, TorchJD, dtr_kernels.",
    cases,
)
