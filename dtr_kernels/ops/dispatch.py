"""Choose which code runs, launch kernels, and lay out tensors as the kernels read them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd import forward_ad
from triton.tools.tensor_descriptor import TensorDescriptor

from dtr_kernels.ops import extension, triton_version
from dtr_kernels.ops.tuned_tiles import TOKENS_PER_SUM

# Alignment in bytes of base address and strides for tensor descriptors (Hopper's TMA).
_ALIGNMENT = 16
# Rows written by GPU kernels are padded to a multiple of so many elements, so that they start on a 32-byte memory
# sector in 16-bit dtypes.
_ROW_PADDING = 16
# Triton decides whether a kernel is interpreted when the kernel is defined.
_INTERPRETED = triton.knobs.runtime.interpret
# Below this many elements of x the reference block is faster on a CPU (`python -m benchmarks run cpu_limits`).
LEAST_ELEMENTS_ON_CPU = 3 << 16

# --- which code runs -------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """The implementation that runs: ``path`` names it for code, ``why`` gives the reason in words."""

    path: str
    why: str


# Choices recorded by ``choices``, by thread: another thread may run another model.
_made: dict[int, list[Choice]] = {}


def made(choice: Choice) -> Choice:
    """Report a choice to ``choices`` of this thread, and return it."""
    if _made and not torch.compiler.is_compiling() and (heard := _made.get(threading.get_ident())) is not None:
        heard.append(choice)
    return choice


@contextmanager
def choices() -> Iterator[list[Choice]]:
    """Collect every choice of this thread in a list while the context is open."""
    thread = threading.get_ident()
    before = _made.get(thread)
    heard: list[Choice] = []
    _made[thread] = heard
    try:
        yield heard
    finally:
        del _made[thread]
        if before is not None:
            _made[thread] = before


def kernels_for(device: torch.device, dtype: torch.dtype) -> Choice:
    """Choose the kernels for tensors of any size: "triton", "cpu" (the compiled extension) or "plain" (the reference).

    Triton's interpreter, when TRITON_INTERPRET is set, replaces a GPU. fp64 has no Triton kernels.
    """
    if device.type == "cuda" or _INTERPRETED or _arch is not None:
        if dtype == torch.float64:
            return Choice("plain", "Triton kernels do not compute in fp64; use fp32, bf16 or fp16")
        return Choice("triton", "Triton kernels")
    if device.type != "cpu":
        return Choice("plain", f"there are no kernels for {device.type}, only for CUDA GPUs and CPUs")
    if extension.kernels is None:
        return Choice("plain", str(extension.unavailable))
    return Choice("cpu", "compiled CPU kernels")


def choose(x: Tensor, *weights: Tensor) -> Choice:
    """Choose what computes an op of x and these weights: as ``kernels_for``, but "plain" if that is faster or nothing
    else works.

    It is faster for small tensors on a CPU, where calling an op takes longer than a kernel saves. Nothing else works
    under functorch transforms and forward-mode differentiation, and for weights that are not plain numbers in memory.
    """
    return made(_choose(x, weights))


def _choose(x: Tensor, weights: tuple[Tensor, ...]) -> Choice:
    kernels = kernels_for(x.device, x.dtype)
    if kernels.path == "plain":
        return kernels
    # An exported graph serves all batch sizes: a comparison would bind it to one side of the limit.
    if kernels.path == "cpu" and not torch.compiler.is_exporting() and x.numel() < LEAST_ELEMENTS_ON_CPU:
        # In a compiled graph a number in the text would bind it to one size.
        size = "few" if torch.compiler.is_compiling() else f"{x.numel():,}"
        return Choice(
            "plain",
            f"x has {size} elements, and on a CPU plain PyTorch is faster below {LEAST_ELEMENTS_ON_CPU:,}; use "
            "a larger batch",
        )
    if _is_transformed():
        return Choice(
            "plain", "inside torch.func transforms and forward-mode differentiation only PyTorch's own ops work"
        )
    if kind := next((type(weight).__name__ for weight in weights if is_wrapper(weight)), None):
        return Choice(
            "plain",
            f"kernels cannot read weights of type {kind}, as quantisation makes them; dequantise them to use kernels",
        )
    return kernels


def runs_on_cpu(x: Tensor) -> bool:
    """Return whether a launcher runs the compiled CPU kernels on x; otherwise it launches Triton's."""
    return kernels_for(x.device, x.dtype).path == "cpu"


def _is_transformed() -> bool:
    """Return whether a functorch transform or forward-mode differentiation is active; torch.compile is neither."""
    return not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_wrapper(weight: Tensor) -> bool:
    """Return whether a weight is a subclass around other tensors, as quantised ones are (TorchAO's Int8Tensor)."""
    return hasattr(type(weight), "__tensor_flatten__")  # by class: torch.compile hides the instance's attributes


def in_dtype_of(x: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Return the tensors in x's dtype, for the plain path, where PyTorch would promote or refuse a mixture."""
    return tuple(t if t is None else t.to(x.dtype) for t in tensors)


# --- launching -------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """A launch of ``programs`` programs of a Triton kernel."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    options: dict[str, Any]


_recorded: list[Launch] | None = None
# The compute capability that ``recording`` simulates.
_arch: int | None = None


@contextmanager
def recording(arch: int | None = None) -> Iterator[list[Launch]]:
    """Record the launches of all threads instead of running them while the context is open.

    Args:
        arch: choose paths, tiles and crossovers as on a GPU of this compute capability (80, 90, 100, ...), also for
            tensors on the device "meta"; None for the device's own.
    """
    global _recorded, _arch
    before = _recorded, _arch
    _recorded, _arch = [], _arch if arch is None else arch
    try:
        yield _recorded
    finally:
        _recorded, _arch = before


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Run ``programs`` programs of a Triton kernel on the device of its first tensor argument."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, programs, args, options))
        return
    device = next(a.device if isinstance(a, Tensor) else a.base.device for a in args if a is not None)
    if device.type != "cuda" and not _INTERPRETED:
        raise RuntimeError(f"no kernel runs on {device}: {extension.unavailable or 'Triton needs an NVIDIA GPU'}")
    triton_version.warn_of_mismatch()
    if device.type != "cuda":
        kernel[(programs,)](*args, **options)
        return
    with torch.cuda.device(device):
        # Any CUDA runtime call makes a context current on this thread; this one is allowed during graph capture. Triton
        # makes one current too, but only after it has encoded descriptors, which needs one (pytorch#124565).
        torch.cuda.is_current_stream_capturing()
        kernel[(programs,)](*args, **options)


def capability(x: Tensor) -> int:
    """Return the compute capability of x's device as 80, 90, 100, ...; 90 in Triton's interpreter."""
    if _arch is not None:
        return _arch
    return 90 if x.device.type != "cuda" else capability_of(x.get_device())


@cache
def capability_of(device: int) -> int:
    """Return the compute capability of a GPU by its number, as 80, 90, 100, ..."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(x: Tensor) -> int:
    """Return the number of multiprocessors of x's device; an H200's 132 in Triton's interpreter."""
    return 132 if x.device.type != "cuda" else _multiprocessors(x.get_device())


@cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# --- tensors ---------------------------------------------------------------------------------------------------------


def row_stride(x: Tensor) -> int:
    """Return the elements from one row to the next of a tensor whose rows are equally spaced."""
    return x.shape[-1] if x.is_contiguous() else x.stride(-2)


def rows_contiguous(x: Tensor) -> Tensor:
    """Return x if its last dimension is contiguous (a chunk of a wider tensor is), else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_rows(*shape: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate an uninitialised tensor; on a GPU its rows have an aligned stride, for a descriptor to read it in place.

    Rows are not padded on a CPU: oneDNN multiplies what follows a row of odd length by zeros, and padding may hold NaN.
    """
    width = shape[-1]
    triton = kernels_for(like.device, like.dtype).path == "triton"
    padded = -(-width // _ROW_PADDING) * _ROW_PADDING if triton else width
    return torch.empty(*shape[:-1], padded, device=like.device, dtype=dtype)[..., :width]


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """Return x, or an empty tensor for None, since an op has a fixed number of outputs."""
    return like.new_empty(0) if x is None else x


def descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """Return a tensor descriptor of x for tiles of shape ``block``. Copies x only if its layout cannot be described."""
    size = x.element_size()
    aligned = x.data_ptr() % _ALIGNMENT == 0 and all(stride * size % _ALIGNMENT == 0 for stride in x.stride()[:-1])
    expanded = any(stride == 0 and n > 1 for stride, n in zip(x.stride(), x.shape, strict=True))
    if not aligned or expanded or x.stride(-1) != 1:
        x = empty_rows(*x.shape, like=x, dtype=x.dtype).copy_(x)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def dot_precision(dtype: torch.dtype) -> str:
    """Return how ``tl.dot`` multiplies fp32: as PyTorch does, exactly unless the user allowed tf32."""
    settings = torch.backends.cuda.matmul
    # Since torch 2.9 there is fp32_precision, and reading the older setting may raise.
    tf32 = settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"


def chunks_of(N: int) -> int:
    """Return the number of partial sums for a sample of N tokens."""
    return -(-N // TOKENS_PER_SUM)


def modulation(x: Tensor, *vectors: Tensor | None) -> tuple[Any, ...]:
    """Return [B, C] vectors as the kernels of x read them: rows contiguous, and for the CPU in the compute dtype."""
    dtype = compute_dtype(x) if runs_on_cpu(x) else None
    return tuple(v if v is None else rows_contiguous(v if dtype is None else v.to(dtype)) for v in vectors)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of statistics and sums: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def matmul_accumulated(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in the accumulator's dtype instead of rounded to a 16-bit input dtype."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
