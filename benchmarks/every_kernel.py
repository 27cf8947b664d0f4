"""Every kernel in each of its modes: run and compared with the oracle, or compiled without a GPU.

``python -m benchmarks.every_kernel --device cuda`` runs all of them on small, odd sizes; it is made to run under
compute-sanitizer too. ``binaries`` gives the Triton kernels as the launchers would run them on an architecture.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from benchmarks.cases import DTYPES, dtype_name
from benchmarks.measure import BAR
from dtr_kernels import ops, reference
from dtr_kernels.ops import dispatch, tiles
from dtr_kernels.ops.gradient_lists import why_plain

# ``dtr_kernels.ops`` has functions of the same names.
gated_norm, gated_residual, gelu, window_linear = LAUNCHERS = [
    importlib.import_module(f"dtr_kernels.ops.{name}") for name in ("gated_norm", "residual", "gelu", "window_linear")
]
_EPS = 1e-6
_FUSED, _UNFUSED = tiles.Crossover(1), tiles.Crossover(tiles.NEVER)
# Errors that rounding explains: the root mean square of found - exact, over that of exact or 1 if that is larger.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Call:
    """One call of a launcher or of an op.

    Args:
        name: of what is called.
        mode: what it is asked for.
        run: calls it and returns what it computes.
        exact: the same in plain PyTorch, in fp64 on the CPU.
        bound: how far apart they may be, as ``problem`` measures it.
    """

    name: str
    mode: str
    run: Callable[[], Sequence[Tensor]]
    exact: Callable[[], Sequence[Tensor]]
    bound: float

    def problem(self) -> str | None:
        """What is wrong with what it computes; None if nothing is. NaN in a result is wrong."""
        for number, (found, exact) in enumerate(zip(self.run(), self.exact(), strict=True)):
            # Inputs are about 1 in size. A result that is near 0 by chance, such as a single mean, has larger terms.
            size = max(exact.norm().item(), exact.numel() ** 0.5)
            error = (found.cpu().double() - exact).norm().item() / size
            if not (found.shape == exact.shape and error <= self.bound):
                return f"{self.name}, {self.mode}: result {number} has error {error:.2g}, allowed {self.bound:.2g}"
        return None


# --- routed blocks ---------------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """Samples, tokens per sample, channels; four fifths of the channels are active."""

    batch: int
    tokens: int
    channels: int

    @property
    def width(self) -> int:
        """W, the active channels."""
        return max(1, int(0.8 * self.channels))


class _Both(NamedTuple):
    """The same numbers on the device in the launchers' dtype, and on the CPU in fp64."""

    given: Tensor
    exact: Tensor


class _Inputs:
    """Random inputs; on the device "meta", where they have no numbers, ``exact`` is there too."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self._source = "meta" if device.type == "meta" else "cpu"
        B, _, C = size
        start = torch.randint(C - size.width + 1, (B,), device=self._source, dtype=torch.int32)
        self.start = start.to(device)
        self.columns = start[:, None] + torch.arange(size.width, device=self._source)  # [B, W], of each window
        self.mask = torch.zeros(B, C, device=self._source).scatter(1, self.columns, 1.0)
        # Views of one tensor, as in a block.
        given, exact = self.random(B, 6 * C)
        self.gate, self.shift, self.scale = map(_Both, given.chunk(6, dim=1)[:3], exact.chunk(6, dim=1)[:3])

    def random(self, *shape: int, std: float = 1.0) -> _Both:
        x = (std * torch.randn(shape, device=self._source)).to(self.dtype)
        return _Both(x.to(self.device), x.double())

    def random_rows(self, *shape: int) -> _Both:
        """``random`` with the strides of what one launcher leaves for another."""
        x = self.random(*shape)
        return x._replace(given=dispatch.empty_rows(*shape, like=x.given, dtype=self.dtype).copy_(x.given))

    def statistic(self, x: Tensor) -> Tensor:
        """x as the launchers take statistics and sums."""
        return x.detach().to(self.device, torch.float32)

    def call(self, name: str, mode: str, run: Callable[[], Any], exact: Callable[[], Any]) -> Call:
        return Call(name, mode, run, exact, BOUNDS[self.dtype])


def routed_calls(size: Size, dtype: torch.dtype, device: torch.device) -> Iterator[Call]:
    """Each launcher of routed blocks in each of its modes. On the device "meta" only ``run`` can be called."""
    inputs = _Inputs(size, dtype, device)
    for routed, update, compact, keep_branch in [
        (False, False, False, False),
        (False, True, False, False),
        (True, False, True, False),
        (True, True, True, False),
        (True, False, False, False),
        (True, True, False, False),
        (True, True, False, True),
    ]:
        yield from _Norm(inputs, routed, update, compact, keep_branch).calls()
    yield from _Linear(inputs).calls()
    yield from _Residual(inputs).calls()


class _Norm:
    """The fused norm: with a window or without, with a pending update or without, masked before it or after, and with
    an output of active channels or of all."""

    def __init__(self, inputs: _Inputs, routed: bool, update: bool, compact: bool, keep_branch: bool) -> None:
        B, N, C = inputs.size
        self.inputs, self.update, self.compact, self.keep_branch = inputs, update, compact, keep_branch
        self.start = inputs.start if routed else None
        self.mask = inputs.mask if routed else None
        self.width = inputs.size.width if routed else C
        self.x, self.branch, self.dstream = (inputs.random(B, N, C) for _ in range(3))
        self.du = inputs.random_rows(B, N, self.width) if self.compact else inputs.random(B, N, C)
        self.inactive = inputs.random(B, N)
        self.mode = ("routed" if routed else "unrouted") + (", compact" if compact else "")
        self.mode += ", update" if update else ""
        if keep_branch:
            self.mode += " not masked"

    def calls(self) -> Iterator[Call]:
        for write_stream in (True, False) if self.update else (True,):
            mode = self.mode if write_stream else f"{self.mode}, stream not written"
            run, exact = partial(self._run_forward, write_stream), partial(self._exact_forward, write_stream)
            yield self.inputs.call("gated_norm_forward", mode, run, exact)
        for x_is_stream in (False, True) if self.update and not self.keep_branch else (False,):
            for has_dstream in (True, False):
                mode = self.mode + (", from the stream" if x_is_stream else "") + ", dstream" * has_dstream
                run = partial(self._run_backward, x_is_stream, has_dstream)
                yield self.inputs.call("gated_norm_backward", mode, run, partial(self._exact_backward, has_dstream))

    def _leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        branch = [self.branch, self.inputs.gate] if self.update else []
        return [t.exact.requires_grad_() for t in (self.x, *branch, self.inputs.shift, self.inputs.scale)]

    def _formula(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The stream, u of the channels that the linear layer reads, and the norm's mean and rstd."""
        branch, gate = rest[:2] if self.update else (None, None)
        shift, scale = rest[-2:]
        stream, u = reference.routed_norm(x, branch, gate, shift, scale, self.mask, self.keep_branch, _EPS)
        seen = reference.masked(stream, self.mask)
        if branch is not None and gate is not None and self.keep_branch:
            seen = reference.masked(x, self.mask) + gate[:, None] * branch
        if self.compact:
            u = u.gather(2, self.inputs.columns[:, None].expand(*u.shape[:2], -1))
        return stream, u, seen.mean(2), (seen.var(2, correction=0) + _EPS).rsqrt()

    def _run_forward(self, write_stream: bool) -> list[Tensor]:
        inputs, update = self.inputs, self.update
        output = gated_norm.gated_norm_forward(
            self.x.given,
            self.branch.given if update else None,
            inputs.gate.given if update else None,
            inputs.shift.given,
            inputs.scale.given,
            self.start,
            self.width,
            _EPS,
            inputs.dtype,
            self.compact,
            self.keep_branch,
            write_stream,
        )
        return [tensor for tensor in output if tensor is not None]

    def _exact_forward(self, write_stream: bool) -> Sequence[Tensor]:
        output = [tensor.detach() for tensor in self._formula(*self._leaves())]
        return output if self.update and write_stream else output[1:]

    def _run_backward(self, x_is_stream: bool, has_dstream: bool) -> list[Tensor]:
        inputs, update = self.inputs, self.update
        stream, _, mean, rstd = (tensor.detach() for tensor in self._formula(*self._leaves()))
        gradients = gated_norm.gated_norm_backward(
            self.du.given,
            self.dstream.given if has_dstream else None,
            inputs.statistic(self.inactive.exact) if self.compact else None,
            stream.to(inputs.device, inputs.dtype) if x_is_stream else self.x.given,
            self.branch.given if update else None,
            inputs.gate.given if update else None,
            inputs.scale.given,
            inputs.statistic(mean),
            inputs.statistic(rstd),
            self.start,
            self.width,
            self.compact,
            self.keep_branch,
            x_is_stream,
        )
        return [tensor for tensor in gradients if tensor is not None]

    def _exact_backward(self, has_dstream: bool) -> Sequence[Tensor]:
        leaves = self._leaves()
        stream, u, mean, rstd = self._formula(*leaves)
        objective = (u * self.du.exact).sum()
        if has_dstream:
            objective = objective + (stream * self.dstream.exact).sum()
        if self.compact:  # every deactivated channel leaves the norm as -mean * rstd
            objective = objective - (self.inactive.exact * mean * rstd).sum()
        return torch.autograd.grad(objective, leaves)


class _Linear:
    """The linear layer over windows, alone and with GELU after it, and the linear layer after that; GELU in the GEMM's
    epilogue and in a pass of its own."""

    def __init__(self, inputs: _Inputs) -> None:
        B, N, C = inputs.size
        self.inputs = inputs
        self.u, self.x = inputs.random_rows(B, N, inputs.size.width), inputs.random(B, N, C)
        self.mean_rstd = inputs.random(B, N)
        self.qkv, self.qkv_bias, self.g = inputs.random(3 * C, C, std=C**-0.5), inputs.random(3 * C), None
        self.fc1, self.fc1_bias = inputs.random(4 * C, C, std=C**-0.5), inputs.random(4 * C)
        self.fc2 = inputs.random(C, 4 * C, std=C**-0.5)
        self.dout, self.pre = inputs.random(B, N, 3 * C), inputs.random(B, N, 4 * C)

    def calls(self) -> Iterator[Call]:
        call = self.inputs.call
        yield call("window_linear_forward", "routed", self._run_forward, self._exact_forward)
        yield call("window_linear_backward", "routed", self._run_backward, self._exact_backward)
        for routed, bias, write_pre in [
            (True, True, True),
            (True, True, False),
            (False, True, True),
            (False, True, False),
            (False, False, True),
        ]:
            mode = ("routed" if routed else "unrouted") + ("" if bias else ", no bias")
            mode += "" if write_pre else ", GELU alone"
            exact = partial(self._exact_linear_gelu, routed, bias, write_pre)
            for fused in (True, False):
                run = partial(self._run_linear_gelu, routed, bias, write_pre, fused)
                yield call("linear_gelu_forward", mode + ("" if fused else ", by a pass"), run, exact)
        for fused in (True, False):
            run = partial(self._run_gelu_linear, fused)
            mode = "unrouted" + ("" if fused else ", by a pass")
            yield call("gelu_linear_backward", mode, run, self._exact_gelu_linear)

    def _formula(
        self, u: Tensor, mean_rstd: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        """The layer on all channels, of which the deactivated ones left the norm as -mean * rstd."""
        inactive = -mean_rstd[:, :, None].expand(-1, -1, weight.shape[1])
        dense = reference.modulate(inactive, shift, scale)
        return F.linear(dense.scatter(2, self.inputs.columns[:, None].expand_as(u), u), weight, bias)

    def _routed(self) -> list[Any]:
        inputs = self.inputs
        return [self.u.given, inputs.statistic(self.mean_rstd.exact), inputs.shift.given, inputs.scale.given]

    def _routed_leaves(self, *parameters: _Both) -> list[Tensor]:
        inputs = (self.u, self.mean_rstd, self.inputs.shift, self.inputs.scale)
        return [t.exact.requires_grad_() for t in (*inputs, *parameters)]

    def _run_forward(self) -> list[Tensor]:
        arguments = (*self._routed(), self.qkv.given, self.qkv_bias.given, self.inputs.start)
        return [window_linear.window_linear_forward(*arguments)]

    def _exact_forward(self) -> Sequence[Tensor]:
        return [self._formula(*self._routed_leaves(self.qkv, self.qkv_bias)).detach()]

    def _run_backward(self) -> list[Tensor]:
        arguments = (*self._routed(), self.qkv.given, self.inputs.start)
        return list(window_linear.window_linear_backward(self.dout.given, *arguments))

    def _exact_backward(self) -> Sequence[Tensor]:
        leaves = self._routed_leaves(self.qkv, self.qkv_bias)
        u, mean_rstd, *rest = torch.autograd.grad(self._formula(*leaves), leaves, self.dout.exact)
        return [u, -mean_rstd, *rest]  # of the norm's output, which is -mean * rstd

    def _run_linear_gelu(self, routed: bool, bias: bool, write_pre: bool, fused: bool) -> Sequence[Tensor]:
        arguments = self._routed() if routed else [self.x.given, None, *self._routed()[2:]]
        with tiles.forced("gelu_forward", _FUSED if fused else _UNFUSED):
            pre, act = window_linear.linear_gelu_forward(
                *arguments,
                self.fc1.given,
                self.fc1_bias.given if bias else None,
                self.inputs.start if routed else None,
                write_pre,
            )
        return [pre, act] if write_pre else [act]

    def _exact_linear_gelu(self, routed: bool, bias: bool, write_pre: bool) -> Sequence[Tensor]:
        if routed:
            pre = self._formula(*self._routed_leaves(self.fc1, self.fc1_bias)).detach()
        else:
            pre = F.linear(self.x.exact, self.fc1.exact, self.fc1_bias.exact if bias else None).detach()
        act = F.gelu(pre, approximate="tanh")
        return [pre, act] if write_pre else [act]

    def _run_gelu_linear(self, fused: bool) -> Sequence[Tensor]:
        with tiles.forced("gelu_backward", _FUSED if fused else _UNFUSED):
            return window_linear.gelu_linear_backward(self.x.given, self.pre.given, self.fc2.given)

    def _exact_gelu_linear(self) -> Sequence[Tensor]:
        pre = self.pre.exact.requires_grad_()
        act = F.gelu(pre, approximate="tanh")
        return [torch.autograd.grad(F.linear(act, self.fc2.exact), pre, self.x.exact)[0], act.detach()]


class _Residual:
    """The end of a block that stands alone."""

    def __init__(self, inputs: _Inputs) -> None:
        self.inputs = inputs
        self.x, self.branch, self.dout = (inputs.random(*inputs.size) for _ in range(3))

    def calls(self) -> Iterator[Call]:
        yield self.inputs.call("gated_residual_forward", "", self._run_forward, self._exact_forward)
        yield self.inputs.call("gated_residual_backward", "", self._run_backward, self._exact_backward)

    def _run_forward(self) -> Sequence[Tensor]:
        return [gated_residual.gated_residual_forward(self.x.given, self.branch.given, self.inputs.gate.given)]

    def _exact_forward(self) -> Sequence[Tensor]:
        return [reference.gated_residual(self.x.exact, self.branch.exact, self.inputs.gate.exact)]

    def _run_backward(self) -> Sequence[Tensor]:
        return gated_residual.gated_residual_backward(self.dout.given, self.branch.given, self.inputs.gate.given)

    def _exact_backward(self) -> Sequence[Tensor]:
        branch, gate = self.branch.exact, self.inputs.gate.exact
        return [self.dout.exact * gate[:, None], (self.dout.exact * branch).sum(1)]


# --- gradient surgery ------------------------------------------------------------------------------------------------


def surgery_calls(clusters: int, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Iterator[Call]:
    """Each op of gradient surgery on K random gradients: rows of one buffer, and lists of tensors of these sizes."""
    # Near three directions, so that many of them conflict.
    near = torch.randn(clusters, 3) @ torch.randn(3, sum(sizes))
    grads = (near + 0.3 * torch.randn(clusters, sum(sizes))).to(dtype)
    exact = grads.double()
    given = grads.to(device)
    coefficients = torch.randn(clusters, clusters, dtype=torch.float64)
    matrix, weights = coefficients.to(device), coefficients[0].to(device)

    def lists(rows: Tensor) -> list[list[Tensor]]:
        """Tensors of their own, each at an aligned address."""
        return [[part.clone() for part in row.split(list(sizes))] for row in rows]

    def gram(copy: Callable[[Tensor], Any]) -> list[Tensor]:
        return [ops.gram(copy(given))]

    def combined(copy: Callable[[Tensor], Any]) -> list[Tensor]:
        gradients = copy(given)
        ops.combine_(gradients, matrix)
        return [torch.stack([torch.cat(list(row)) if isinstance(row, list) else row for row in gradients])]

    def summed(copy: Callable[[Tensor], Any]) -> list[Tensor]:
        total = ops.weighted_sum(copy(given), weights)
        return [total if isinstance(total, Tensor) else torch.cat(total)]

    layouts: dict[str, Callable[[Tensor], Any]] = {"one buffer": torch.clone, "lists": lists}
    for layout, copy in layouts.items():
        mode = f"K {clusters}, {layout}"
        # Products of 16-bit numbers too are added in fp32 and fp64.
        yield Call("gram", mode, partial(gram, copy), lambda: [reference.gram(exact)], BOUNDS[torch.float32])
        yield Call("combine_", mode, partial(combined, copy), lambda: [coefficients @ exact], BOUNDS[dtype])
        yield Call("weighted_sum", mode, partial(summed, copy), lambda: [coefficients[0] @ exact], BOUNDS[dtype])
    products, order = reference.gram(exact), ops.random_order(clusters)
    yield Call(
        "pcgrad_coefficients",
        f"K {clusters}",
        lambda: [ops.pcgrad_coefficients(products.to(device), order.to(device))],
        lambda: [reference.pcgrad_coefficients(products, order)],
        1e-9,
    )


# --- compiling instead of launching ----------------------------------------------------------------------------------


class Launch(NamedTuple):
    """What a launcher was about to run.

    Attributes:
        kernel: its name, such as "window_input_gradient".
        op: what its tile is chosen for, of ``tiles.tile_for``.
        options: the kernel's constants, warps and stages.
        compiled: what Triton made of it.
    """

    kernel: str
    op: str
    options: dict[str, Any]
    compiled: Any


class _Target:
    """Stands in for Triton's GPU driver: names the architecture to compile for."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch  # Triton keeps what it compiled per device

    def get_current_stream(self, device: object = None) -> int:
        return 0


@contextmanager
def compiling(arch: int, only: str | None = None) -> Iterator[list[Launch]]:
    """Inside, the launchers of routed blocks compile for an architecture what they would launch.

    Args:
        arch: compute capability, as 80, 90 or 100.
        only: compile the kernels of this op alone, of those that tiles are chosen for.

    Yields:
        The list to which every launch is added.
    """
    launches: list[Launch] = []
    asked = ""

    def tile_for(op: str, *problem: Any) -> Any:
        nonlocal asked
        asked = op
        return tiles.tile_for(op, *problem)  # type: ignore[call-overload]

    def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        nonlocal asked
        if only in (None, asked):
            name = kernel.__name__.removesuffix("_kernel")
            launches.append(Launch(name, asked, options, kernel.warmup(*args, grid=(programs,), **options)))
        asked = ""  # the next kernel may have one tile for all sizes

    instead = {"launch": launch, "tile_for": tile_for, "kernel_path": lambda x: "triton", "capability": lambda x: arch}
    with ExitStack() as stack:
        for module in (dispatch, *LAUNCHERS):
            for name in instead.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, name, instead[name]))
        stack.callback(triton.runtime.driver.set_active, None)  # finds the real driver when next it is asked for
        triton.runtime.driver.set_active(_Target(arch))
        yield launches


def binaries(arch: int, dtype: torch.dtype, size: Size, only: str | None = None) -> list[tuple[str, Launch]]:
    """Every Triton kernel in each of its modes, compiled for an architecture without a GPU.

    Args:
        arch, only: as in ``compiling``.
        dtype: of the operands.
        size: of the inputs, which have no storage.

    Returns:
        (mode, launch) of each kernel that a launcher runs.
    """
    modes: list[str] = []
    with compiling(arch, only) as launches:
        for call in routed_calls(size, dtype, torch.device("meta")):
            call.run()
            modes += [call.mode] * (len(launches) - len(modes))
    return list(zip(modes, launches, strict=True))


# --- command line ----------------------------------------------------------------------------------------------------

SIZES = (Size(3, 70, 96), Size(2, 33, 67), Size(1, 1, 80))
CLUSTERS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 32, 33, 64)
SEGMENTS = (1003, 1, 0, 2500)


@contextmanager
def nan_in_uninitialised_memory() -> Iterator[None]:
    """Inside, what a kernel leaves unwritten is NaN."""
    settings: Any = torch.utils.deterministic
    enabled = torch.are_deterministic_algorithms_enabled()
    before = settings.fill_uninitialized_memory, torch.is_deterministic_algorithms_warn_only_enabled()
    settings.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of operations whose bits vary, which do not matter here
            yield
    finally:
        settings.fill_uninitialized_memory = before[0]
        torch.use_deterministic_algorithms(enabled, warn_only=before[1])


def every_call(dtype: torch.dtype, device: torch.device) -> Iterator[Call]:
    """What the command line runs of a dtype."""
    for size in SIZES:
        for call in routed_calls(size, dtype, device):
            sized = f"{call.mode}, {size.batch} x {size.tokens} x {size.channels}".removeprefix(", ")
            yield Call(call.name, sized, call.run, call.exact, call.bound)
    for clusters in CLUSTERS:
        yield from surgery_calls(clusters, SEGMENTS, dtype, device)


def main(command_line: Sequence[str] | None = None) -> int:
    """Runs every kernel and returns 1 if a result is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.every_kernel", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument("--seed", type=int, help="of the random inputs; default: a fresh one, printed")
    arguments = parser.parse_args(command_line)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: PyTorch finds no CUDA device here; use --device cpu")
    seed = torch.seed() % 2**31 if arguments.seed is None else arguments.seed
    torch.manual_seed(seed)
    if dispatch.kernel_path(torch.empty(0, device=device)) == "plain":
        parser.error(f"argument --device: there are no kernels for {device} here; python -m dtr_kernels info says why")
    print(f"device {device}, seed {seed}")
    if reason := why_plain(device, torch.float32):
        print(f"gradient surgery runs PyTorch ops: {reason}")
    wrong: list[str] = []
    total = 0
    with nan_in_uninitialised_memory():
        for dtype in DTYPES.values():
            for call in tqdm(every_call(dtype, device), desc=dtype_name(dtype), unit=" calls", **BAR):
                total += 1
                if problem := call.problem():
                    wrong.append(f"{dtype_name(dtype)}: {problem}")
                    print(f"WRONG: {wrong[-1]}", flush=True)
    print(f"{total} calls, {len(wrong)} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
