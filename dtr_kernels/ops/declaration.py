"""Declarations: how a kernel is called, what it computes, in which modes, and its least cost.

Checks, tuning, benchmarks and the compilers' report run the declared kernels (``ops.KERNELS``). Each declaration stands
beside its launcher.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dtr_kernels.ops.dispatch import compute_dtype, empty_rows

Mode = Mapping[str, Any]


class Itemsizes(NamedTuple):
    """Bytes per element.

    Attributes:
        operand: of the inputs and outputs of matrix products, and of modulation.
        stream: of the residual stream, of parameters and of their gradients. Larger than ``operand`` under autocast.
    """

    operand: int
    stream: int


@dataclass(frozen=True)
class Work:
    """Floating-point operations of matrix products, and bytes that must be read or written."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __sub__(self, other: Work) -> Work:
        return Work(self.flops - other.flops, self.bytes - other.bytes)

    def __rmul__(self, times: int) -> Work:
        return Work(times * self.flops, times * self.bytes)


class Precision(NamedTuple):
    """The dtypes of matrix products and modulation, and of the residual stream."""

    operand: torch.dtype
    stream: torch.dtype

    @property
    def items(self) -> Itemsizes:
        """The item sizes of both dtypes."""
        return Itemsizes(self.operand.itemsize, self.stream.itemsize)


PRECISIONS = {
    name: Precision(dtype, dtype)
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items()
}
#: Matrix products in bf16, parameters and residual stream in fp32.
AUTOCAST = Precision(torch.bfloat16, torch.float32)


class Sizes(NamedTuple):
    """B samples of N tokens with C channels, a share ``beta`` of them active."""

    B: int
    N: int
    C: int
    beta: float = 0.8

    @property
    def W(self) -> int:
        """The number of active channels."""
        return max(1, int(self.beta * self.C))

    def __str__(self) -> str:
        return f"{self.B} x {self.N} x {self.C}"


class Gradients(NamedTuple):
    """Gradients of K clusters with respect to P parameters in total."""

    K: int
    P: int

    def __str__(self) -> str:
        return f"{self.K} x {self.P}"


#: Peers of kernels over windows: PyTorch on all channels, and on a slice of active channels, an upper bound.
ALL_CHANNELS, ONE_SLICE = "PyTorch, all channels", "PyTorch, one slice"

#: Odd sizes, windows smaller than the channels, more tokens than a tile has, and empty batches.
SIZES = (Sizes(2, 33, 67), Sizes(3, 70, 192, 0.48), Sizes(1, 1, 80), Sizes(2, 0, 32), Sizes(0, 4, 32))


# Means, sums over tokens and other statistics are fp32 in every precision; the first channel of a window is an int32.
STATISTIC = 4
_START = 4


def starts(B: int, C: int, W: int) -> int:
    """Count the bytes of a batch's windows; 0 if all channels are active."""
    return B * _START if W < C else 0


class Draw:
    """Random arguments for one call, the same for the same seed of PyTorch.

    Attributes:
        sizes, precision, device: of the arguments; on "meta" they hold no numbers.
        shared: all samples have the same window.
    """

    def __init__(self, sizes: Any, precision: Precision, device: torch.device, shared: bool = False) -> None:
        self.sizes, self.precision, self.device, self.shared = sizes, precision, device, shared

    @property
    def start(self) -> Tensor:
        """The first active channel of each sample, int32 [B], drawn anew each time."""
        return self.starts(self.sizes.C - self.sizes.W + 1)

    def starts(self, positions: int) -> Tensor:
        """Draw starts of windows, int32 [B], below ``positions``."""
        B = self.sizes.B
        drawn = torch.randint(positions, (B,), device=self._source, dtype=torch.int32)
        return (drawn[:1].repeat(B) if self.shared else drawn).to(self.device)

    @property
    def _source(self) -> str:
        """The device that draws random numbers, so that they are the same for every device."""
        return "meta" if self.device.type == "meta" else "cpu"

    def _normal(self, shape: Sequence[int], dtype: torch.dtype, std: float = 1.0) -> Tensor:
        return (std * torch.randn(tuple(shape), device=self._source)).to(self.device, dtype)

    def __call__(self, *shape: int, std: float = 1.0) -> Tensor:
        """Draw an operand."""
        return self._normal(shape, self.precision.operand, std)

    def stream(self, *shape: int) -> Tensor:
        """Draw a residual stream, each token with its own mean: otherwise deactivated channels would leave a norm as
        nearly zero, and 16-bit dtypes would hide their absence."""
        return self._normal(shape, self.precision.stream) + self._normal((*shape[:-1], 1), self.precision.stream)

    def statistic(self, *shape: int) -> Tensor:
        """Draw a mean, a sum over tokens or another statistic."""
        return self._normal(shape, compute_dtype(torch.empty(0, dtype=self.precision.operand)))

    def weight(self, outputs: int, inputs: int) -> Tensor:
        """Draw a weight [outputs, inputs], scaled to keep the scale of activations."""
        return self(outputs, inputs, std=max(inputs, 1) ** -0.5)

    def vectors(self, count: int) -> Sequence[Tensor]:
        """Draw strided [B, C] views of one [B, 6C], as adaLN returns them."""
        return self(self.sizes.B, 6 * self.sizes.C, std=0.5).chunk(6, dim=1)[:count]

    def compact(self, channels: int | None = None) -> Tensor:
        """Draw windows [B, N, W], or of ``channels`` channels, in rows as one launcher leaves them for another."""
        rows = self(self.sizes.B, self.sizes.N, self.sizes.W if channels is None else channels)
        return empty_rows(*rows.shape, like=rows, dtype=rows.dtype).copy_(rows)


class Gradient:
    """Plain PyTorch's gradient, the exact result of a kernel that is a backward pass.

    Args:
        of: maps the kernel's arguments to a function, its inputs, and the gradients of its outputs (None for an output
            without one).
    """

    def __init__(self, of: Callable[..., tuple[Callable[..., Any], Sequence[Tensor], Sequence[Tensor | None]]]) -> None:
        self.of = of

    def prepare(
        self, arguments: Mapping[str, Any], wrap: Callable[[Any], Any] = lambda function: function
    ) -> Callable[[], tuple[Tensor, ...]]:
        """Run the forward pass, and return the backward pass, which may be called repeatedly.

        Args:
            arguments: of the kernel.
            wrap: applied to the function, like ``torch.compile``.
        """
        function, inputs, cotangents = self.of(**arguments)
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        found = zip(wrap(function)(*leaves), cotangents, strict=True)
        outputs, given = zip(*[(out, g.to(out.dtype)) for out, g in found if g is not None], strict=True)
        return lambda: torch.autograd.grad(outputs, leaves, given, retain_graph=True)

    def __call__(self, **arguments: Any) -> tuple[Tensor, ...]:
        """Return the gradients of all inputs."""
        return self.prepare(arguments)()


@dataclass(frozen=True)
class Kernel:
    """Declaration of a launcher, or of an op built from several, for checks, tuning, benchmarks and reports.

    Attributes:
        name: unique.
        launch: called with ``inputs`` as keywords; returns tensors, nested in any way.
        exact: the same in plain PyTorch, from the same arguments in any precision; or ``Gradient``.
        inputs: makes the arguments of a mode: ``inputs(draw, **mode)``.
        modes: the modes in which the library calls it.
        work: the least work of a mode, ``work(sizes, items, **mode)``; None for a part of a kernel that is counted as a
            whole, which has no benchmark.
        timed: selects the modes that are tuned and benchmarked, those of training steps and samplers.
        tiles: names in ``tiles.KINDS`` of the tiles of a mode.
        crossover: the name there of the choice between our GEMM and the library's; None if there is no choice.
        peers: alternatives that people would call, by name: each maps the arguments to a call, or to None if it does
            not run on their device.
        sizes: the sizes of the checks.
        under_autocast: streams and operands may differ in dtype.
        in_place: it writes to its arguments.
        triton_only: it runs on a GPU alone, and the compiled CPU kernels have it as a part of another kernel.
    """

    name: str
    launch: Callable[..., Any]
    exact: Callable[..., Any]
    inputs: Callable[..., Mapping[str, Any]]
    modes: Sequence[Mode] = ({},)
    work: Callable[..., Work] | None = None
    timed: Callable[..., bool] = lambda **_: True
    tiles: Callable[..., tuple[str, ...]] = lambda **_: ()
    crossover: str | None = None
    peers: Mapping[str, Callable[..., Callable[[], Any] | None]] = field(default_factory=dict)
    sizes: Sequence[Any] = SIZES
    under_autocast: bool = False
    in_place: bool = False
    triton_only: bool = False

    def run(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        """Launch it, on copies of the arguments if it writes to them, and return the tensors that it computes."""
        return results(self.launch(**(tree_map(_copy, dict(arguments)) if self.in_place else arguments)))

    @property
    def precisions(self) -> dict[str, Precision]:
        """The precisions that the kernel takes, by name."""
        return PRECISIONS | ({"autocast": AUTOCAST} if self.under_autocast else {})


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def results(nested: Any) -> list[Tensor]:
    """Return the tensors in a kernel's nested result, without its Nones."""
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def widened(arguments: Any) -> Any:
    """Return the arguments in fp64."""

    def wide(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.double() if leaf.is_floating_point() else leaf
        return torch.float64 if isinstance(leaf, torch.dtype) else leaf

    return tree_map(wide, arguments)


def modes(valid: Callable[..., bool] = lambda **_: True, **axes: Sequence[Any]) -> list[Mode]:
    """Return all valid combinations of the axes' values."""
    found = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [mode for mode in found if valid(**mode)]


def mode_name(mode: Mode) -> str:
    """Describe a mode in words: the names of true flags, and other values as they are."""
    return ", ".join(
        name.replace("_", " ") if value is True else str(value) for name, value in mode.items() if value is not False
    )


# --- windows, for plain formulas -------------------------------------------------------------------------------------


def in_window(dense: Tensor, start: Tensor, width: int) -> Tensor:
    """Return the active channels [B, N, W] of dense [B, N, C]."""
    channel = start[:, None].long() + torch.arange(width, device=dense.device)
    return dense.gather(2, channel[:, None].expand(-1, dense.shape[1], -1))


def spread(compact: Tensor, start: Tensor, into: Tensor) -> Tensor:
    """Return ``into`` [B, N, C] with the active channels [B, N, W] written to their places."""
    channel = start[:, None].long() + torch.arange(compact.shape[2], device=compact.device)
    return into.scatter(2, channel[:, None].expand(-1, into.shape[1], -1), compact.to(into.dtype))
