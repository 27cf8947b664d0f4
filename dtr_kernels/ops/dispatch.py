"""What every launcher needs: which path runs, and tensors in the layout the kernels read."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd import forward_ad
from triton.tools.tensor_descriptor import TensorDescriptor

from dtr_kernels.ops import extension, triton_version

# Bytes to which tensor descriptors (Hopper's TMA) want base address and strides aligned.
_ALIGNMENT = 16
# Padding of a compact window's rows, in elements: rows start on a 32-byte memory sector in 16-bit dtypes.
_ROW_PADDING = 16
# Triton decides when a kernel is defined whether it is interpreted.
_INTERPRETED = triton.knobs.runtime.interpret
# Below this many elements of x the reference block is faster on a CPU (`python -m benchmarks run cpu_limits`).
LEAST_ELEMENTS_ON_CPU = 3 << 16
# Tokens that a backward kernel sums over before it writes a partial sum.
TOKENS_PER_SUM = 32


def kernel_path(x: Tensor) -> str:
    """Which implementation runs for x: "triton", "cpu" (the compiled extension) or "plain" (the PyTorch reference).

    Triton's interpreter, when TRITON_INTERPRET is set, takes the place of a GPU. fp64 has no Triton kernels.
    """
    if x.device.type == "cuda" or _INTERPRETED:
        return "plain" if x.dtype == torch.float64 else "triton"
    return "cpu" if x.device.type == "cpu" and extension.kernels is not None else "plain"


def chosen_path(x: Tensor, *weights: Tensor) -> str:
    """``kernel_path``, but "plain" where that is better or all there is.

    Better for small tensors on a CPU, where calling an op takes longer than a kernel saves; all there is for functorch
    transforms, forward-mode differentiation, and weights that are not plain numbers in memory.
    """
    path = kernel_path(x)
    plain = _is_small(x, path) or _is_transformed() or any(is_wrapper(weight) for weight in weights)
    return "plain" if plain else path


def why_plain(x: Tensor, *weights: Tensor) -> str | None:
    """Why ``chosen_path`` is "plain" for x and these weights, for people; None where it is not."""
    path = kernel_path(x)
    if path == "plain":
        if x.device.type == "cuda":
            return "Triton kernels do not compute in fp64; use fp32, bf16 or fp16"
        if x.device.type == "cpu":
            return extension.unavailable
        return f"there are no kernels for {x.device.type}, only for CUDA GPUs and CPUs"
    if _is_small(x, path):
        return (
            f"x has {x.numel():,} elements, and on a CPU plain PyTorch is faster below {LEAST_ELEMENTS_ON_CPU:,}; use "
            "a larger batch"
        )
    if _is_transformed():
        return "inside torch.func transforms and forward-mode differentiation only PyTorch's own ops work"
    kind = next((type(weight).__name__ for weight in weights if is_wrapper(weight)), None)
    if kind is not None:
        return f"kernels cannot read weights of type {kind}, as quantisation makes them; dequantise them to use kernels"
    return None


def _is_small(x: Tensor, path: str) -> bool:
    # An exported graph is one for all sizes of its batch: a comparison would bind it to one side of the limit.
    return path == "cpu" and not torch.compiler.is_exporting() and x.numel() < LEAST_ELEMENTS_ON_CPU


def _is_transformed() -> bool:
    """Whether a functorch transform or forward-mode differentiation is at work; torch.compile is neither."""
    return not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_wrapper(weight: Tensor) -> bool:
    """Return whether a weight is a subclass around other tensors, as quantised ones are (TorchAO's Int8Tensor)."""
    return hasattr(type(weight), "__tensor_flatten__")  # by its class, as torch.compile shows no more of an instance


def in_dtype_of(x: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """tensors in x's dtype, for the plain path, where PyTorch would promote or refuse a mixture."""
    return tuple(t if t is None else t.to(x.dtype) for t in tensors)


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Runs ``programs`` programs of a Triton kernel on the device of its first tensor argument."""
    device = next(a.device if isinstance(a, Tensor) else a.base.device for a in args if a is not None)
    if device.type != "cuda" and not _INTERPRETED:
        raise RuntimeError(f"no kernel runs on {device}: {extension.unavailable or 'Triton needs an NVIDIA GPU'}")
    triton_version.warn_of_mismatch()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*args, **options)


def row_stride(x: Tensor) -> int:
    """Elements from one row to the next of a tensor whose rows are equally spaced."""
    return x.shape[-1] if x.is_contiguous() else x.stride(-2)


def rows_contiguous(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous (a chunk of a wider tensor is), else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_rows(*shape: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised tensor; on a GPU its rows are padded to an aligned stride, so that a descriptor reads it in place.

    Not on a CPU: oneDNN multiplies what lies behind a row of odd length with zeros, and the padding may hold NaN.
    """
    width = shape[-1]
    padded = -(-width // _ROW_PADDING) * _ROW_PADDING if kernel_path(like) == "triton" else width
    return torch.empty(*shape[:-1], padded, device=like.device, dtype=dtype)[..., :width]


def descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """A tensor descriptor of x for tiles of shape ``block``, copying x only if its layout cannot be described."""
    size = x.element_size()
    aligned = x.data_ptr() % _ALIGNMENT == 0 and all(stride * size % _ALIGNMENT == 0 for stride in x.stride()[:-1])
    expanded = any(stride == 0 and n > 1 for stride, n in zip(x.stride(), x.shape, strict=True))
    if not aligned or expanded or x.stride(-1) != 1:
        x = empty_rows(*x.shape, like=x, dtype=x.dtype).copy_(x)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def dot_precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies fp32: as PyTorch does, exactly unless the user allowed tf32."""
    settings = torch.backends.cuda.matmul
    # From torch 2.9 on there is fp32_precision, and reading the older setting may raise.
    tf32 = settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"


def chunks_of(N: int) -> int:
    """Partial sums per sample of N tokens."""
    return -(-N // TOKENS_PER_SUM)


def modulation(vector: Tensor, x: Tensor) -> Tensor:
    """A [B, C] vector as the kernels of x read it: rows contiguous, and for the CPU in the compute dtype."""
    if kernel_path(x) == "cpu":
        vector = vector.to(compute_dtype(x))
    return rows_contiguous(vector)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def matmul_accumulated(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the result left in the accumulator's dtype instead of rounded to a 16-bit input dtype."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
