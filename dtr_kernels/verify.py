"""Do the kernels agree with the oracle on this machine?  ``python -m dtr_kernels verify``

The bound is threefold: with everything also computed in fp64, the error of a kernel may be at most twice the error
that plain PyTorch makes in the same dtype, plus a few rounding units of the largest value. That holds for the output
and for every gradient, with a window, timestep and modulation of its own for every sample. The ops of gradient surgery
are held to the same bound, on gradients that conflict.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from dtr_kernels import nn, ops, reference
from dtr_kernels.ops.dispatch import kernel_path
from dtr_kernels.ops.tiles import NEVER, Crossover, CrossoverOp, forced
from dtr_kernels.routing import ChannelWindow, DenoisingTaskRouting

__all__ = ["Comparison", "check_block", "check_surgery", "compare", "run"]

Function = Callable[..., tuple[Tensor, ...]]

# The constant of the bound, in rounding units of the largest value: plain PyTorch may happen to be exact.
_SLACK = {torch.float32: 8, torch.bfloat16: 2, torch.float16: 2}


@dataclass(frozen=True)
class Comparison:
    """Largest absolute errors against fp64 of one tensor: the kernel's, plain PyTorch's, and what the kernel may
    have."""

    name: str
    error: float
    plain_error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound; NaN is not."""
        return self.error <= self.bound


def compare(
    fused: Function,
    oracle: Function,
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    precision: AbstractContextManager[object] | None = None,
    conditioning: float = 1,
    outputs: Sequence[str] | None = None,
) -> list[Comparison]:
    """Compares a fused function with its oracle: outputs, and gradients of a random projection of the outputs.

    Args:
        fused, oracle: called with ``inputs`` as keyword arguments, return a tuple of tensors.
        inputs: tensors in the precision they are used in; a gradient is taken of each that requires one. A view
            of a wider tensor keeps its strides.
        dtype: whose rounding unit the bound allows.
        precision: a context such as ``torch.autocast`` that fused and oracle run in; the fp64 run does not.
        conditioning: multiplies the constant of the bound, for inputs whose gradients nearly cancel.
        outputs: names for the outputs; default: "out0", "out1", ...

    Returns:
        One comparison for each output and each gradient ("d" + input name).
    """
    context = precision or nullcontext()
    with context:
        got = fused(**inputs)
        plain = oracle(**inputs)
    wide = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in inputs.items()}
    exact = oracle(**wide)
    projections = [torch.randn_like(out) for out in plain]
    names = [name for name, t in inputs.items() if t.requires_grad]

    def with_gradients(results: tuple[Tensor, ...], source: dict[str, Tensor]) -> list[Tensor]:
        if not names:
            return list(results)
        cotangents = [p.to(out.dtype) for p, out in zip(projections, results, strict=True)]
        return [*results, *torch.autograd.grad(results, [source[name] for name in names], cotangents)]

    labels = [*(outputs or (f"out{i}" for i in range(len(got)))), *(f"d{name}" for name in names)]
    runs = zip(
        labels, with_gradients(got, inputs), with_gradients(plain, inputs), with_gradients(exact, wide), strict=True
    )
    unit = conditioning * _SLACK[dtype] * torch.finfo(dtype).eps
    return [_comparison(*row, unit) for row in runs]


def _comparison(name: str, got: Tensor, plain: Tensor, exact: Tensor, unit: float) -> Comparison:
    if exact.numel() == 0:
        return Comparison(name, 0.0, 0.0, 0.0)
    error, plain_error = ((t.double() - exact).abs().max().item() for t in (got, plain))
    bound = 2 * plain_error + unit * exact.abs().max().item()
    return Comparison(name, error, plain_error, bound)


def random_block(channels: int, heads: int, scope: str, device: torch.device, dtype: torch.dtype) -> nn.RoutedDiTBlock:
    """A block whose modulation is random too: at initialisation its gates are zero and would hide every difference."""
    block = nn.RoutedDiTBlock(channels, heads, scope=scope)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5 if parameter.dim() == 1 else parameter.shape[1] ** -0.5)
    return block.to(device, dtype)


def check_block(
    block: nn.RoutedDiTBlock,
    window: ChannelWindow | None,
    samples: int,
    tokens: int,
    autocast: torch.dtype | None = None,
) -> list[Comparison]:
    """Compares a block's output and all of its gradients with the oracle, on random x and c in the block's dtype."""
    weight = block.attn.qkv.weight
    x = torch.randn(samples, tokens, weight.shape[1], device=weight.device, dtype=weight.dtype, requires_grad=True)
    c = torch.randn(samples, weight.shape[1], device=weight.device, dtype=weight.dtype, requires_grad=True)
    mask = None if window is None else window.for_batch(samples, weight.device).mask()

    def fused(x: Tensor, c: Tensor, **parameters: Tensor) -> tuple[Tensor, ...]:
        return (torch.func.functional_call(block, _dotted(parameters), (x, c, window)),)

    def oracle(x: Tensor, c: Tensor, **parameters: Tensor) -> tuple[Tensor, ...]:
        return (torch.func.functional_call(_OracleBlock(block), _inner(parameters), (x, c, mask)),)

    inputs = {"x": x, "c": c} | {name.replace(".", "__"): p for name, p in block.named_parameters()}
    precision = None if autocast is None else torch.autocast(weight.device.type, dtype=autocast)
    return compare(fused, oracle, inputs, autocast or weight.dtype, precision)


class _OracleBlock(torch.nn.Module):
    """The oracle's block as a module, so that its parameters can be replaced by fp64 ones."""

    def __init__(self, block: nn.RoutedDiTBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
        return reference.dit_block(self.block, x, c, mask, self.block.scope)


def _dotted(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("__", "."): p for name, p in parameters.items()}


def _inner(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"block.{name}": p for name, p in _dotted(parameters).items()}


def check_surgery(clusters: int, sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[Comparison]:
    """Compares the Gram matrix and PCGrad of random gradients with the oracle, as one buffer and as lists of tensors.

    Args:
        clusters: K.
        sizes: elements of each parameter, P in all.

    Returns:
        Comparisons of the Gram matrix, of PCGrad's update, and of the gradients that it projects in place.
    """
    # Near three directions, so that many of them conflict strongly, and of norm about 1, as fp16 needs it.
    near = torch.randn(clusters, 3) @ torch.randn(3, sum(sizes)) + 0.3 * torch.randn(clusters, sum(sizes))
    inputs = {"grads": (near / (3 * sum(sizes)) ** 0.5).to(device, dtype)}
    order = ops.random_order(clusters)

    def split(grads: Tensor) -> list[list[Tensor]]:
        return [list(row.split(list(sizes))) for row in grads]

    def fused_gram(grads: Tensor) -> tuple[Tensor, ...]:
        return ops.gram(grads), ops.gram(split(grads))

    def gram(grads: Tensor) -> tuple[Tensor, ...]:
        # The products of 16-bit numbers too are added in fp32 at least.
        return (reference.gram(grads.to(torch.promote_types(grads.dtype, torch.float32))),) * 2

    def fused_pcgrad(grads: Tensor) -> tuple[Tensor, ...]:
        buffer, lists = grads.clone(), grads.clone()
        ops.pcgrad_(buffer, order)
        ops.pcgrad_(split(lists), order)
        return ops.pcgrad_sum(grads, order), torch.cat(ops.pcgrad_sum(split(grads), order)), buffer, lists

    def pcgrad(grads: Tensor) -> tuple[Tensor, ...]:
        projected = reference.pcgrad(grads, order)
        return (projected.sum(0),) * 2 + (projected,) * 2

    names = ["update", "update of lists", "projected", "projected lists"]
    return [
        *compare(fused_gram, gram, inputs, torch.float32, outputs=["gram", "gram of lists"]),
        # Sums of K terms, which are larger than the sums.
        *compare(fused_pcgrad, pcgrad, inputs, dtype, conditioning=1 + clusters / 16, outputs=names),
    ]


def _cases(device: torch.device) -> Iterable[tuple[str, list[Comparison]]]:
    yield from _block_cases(device)
    for precision, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        for clusters in (5, 8, 64):
            name = f"{precision:13}  gradient surgery, {clusters} clusters"
            yield name, check_surgery(clusters, (700, 1, 0, 303, 129), device, dtype)


def _block_cases(device: torch.device) -> Iterable[tuple[str, list[Comparison]]]:
    samples, tokens, channels, heads = 3, 190, 384, 6  # large enough that the CPU runs its kernels
    routing = DenoisingTaskRouting()
    t = torch.tensor([3, 612, 999], device=device)
    windows = {
        "one window per sample": routing.window(t, channels),
        "one shared window": routing.window(700, channels),
        "unrouted": None,
    }
    precisions: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
        "fp32": (torch.float32, None),
        "bf16": (torch.bfloat16, None),
        "fp16": (torch.float16, None),
        "autocast bf16": (torch.float32, torch.bfloat16),
    }
    for precision, (dtype, autocast) in precisions.items():
        for scope, (name, window), products in itertools.product(reference.SCOPES, windows.items(), _products(device)):
            block = random_block(channels, heads, scope, device, dtype)
            with _from_the_first_token(products):
                comparisons = check_block(block, window, samples, tokens, autocast)
            yield f"{precision:13}  scope {scope:6}  {name}" + (f", {products}" if products else ""), comparisons
    # So narrow and long that a CPU too multiplies with slices of the weight, in both passes.
    block = random_block(channels, heads, "branch", device, torch.float32)
    narrow = check_block(block, DenoisingTaskRouting(beta=0.5).window(t, channels), samples, 1030)
    yield f"{'fp32':13}  scope branch  one window per sample, beta 0.5, 1030 tokens", narrow


def _products(device: torch.device) -> list[str]:
    """On a GPU a block this small would run cuBLAS alone, where a large one runs our GEMMs: both are checked."""
    return ["our GEMMs", "cuBLAS"] if kernel_path(torch.empty(0, device=device)) == "triton" else [""]


@contextmanager
def _from_the_first_token(products: str) -> Iterator[None]:
    """Inside, matrix products of any size run in the way that ``_products`` names; "" leaves the choice."""
    with ExitStack() as stack:
        for op in get_args(CrossoverOp) if products else ():
            stack.enter_context(forced(op, Crossover(1 if products == "our GEMMs" else NEVER)))
        yield


def run(device: torch.device) -> bool:
    """Prints a table of errors and returns whether all are within their bounds.

    Its rows are routed blocks, for each precision, scope and kind of window, and gradient surgery, for each precision
    and number of clusters. A row shows the comparison that comes closest to its bound, of all that were made.
    """
    print(f"{'case':69} {'closest to its bound':28} {'kernel':>9} {'PyTorch':>9} {'bound':>9}")
    passed = True
    for name, comparisons in _cases(device):
        worst = max(
            comparisons, key=lambda c: c.error / c.bound if c.passed and c.bound > 0 else float(not c.passed) * 1e9
        )
        passed &= all(c.passed for c in comparisons)
        print(
            f"{name:69} {worst.name.replace('__', '.'):28} {worst.error:9.1e} {worst.plain_error:9.1e} "
            f"{worst.bound:9.1e}  {'ok' if worst.passed else 'FAILED'}",
            flush=True,
        )
    return passed
