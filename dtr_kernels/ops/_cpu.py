"""The bridge from tensors to the compiled CPU kernels: pointers, dtypes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from dtr_kernels import _just_in_time

try:
    # PyTorch must be imported first: it brings the OpenMP runtime that the extension runs on.
    _just_in_time.load()
    from dtr_kernels import _C as kernels
except ImportError as error:
    kernels = None  # type: ignore[assignment]
    unavailable: str | None = (
        f"the compiled CPU kernels are missing ({error}); install a C++ compiler, and run python -m dtr_kernels build "
        "or install this package again (pip install --force-reinstall --no-deps)"
    )
else:
    unavailable = None
    _TYPES = {
        torch.float32: kernels.Type.f32,
        torch.float64: kernels.Type.f64,
        torch.bfloat16: kernels.Type.bf16,
        torch.float16: kernels.Type.f16,
    }


def dtype_code(dtype: torch.dtype) -> kernels.Type:
    """The extension's name of a dtype."""
    return _TYPES[dtype]


def rows(x: Tensor | None) -> kernels.Rows:
    """x as equally spaced rows of its contiguous last dimension; None as the null tensor.

    Holds a bare pointer: the caller keeps x alive until the kernel has run.
    """
    if x is None:
        return kernels.Rows(0, kernels.Type.f32, 0)
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"rows must be contiguous for the CPU kernels, got strides {x.stride()}")
    return kernels.Rows(x.data_ptr(), _TYPES[x.dtype], x.shape[-1] if x.is_contiguous() else x.stride(-2))


def shape(B: int, N: int, C: int, start: Tensor | None, width: int, chunk: int = 1) -> kernels.Shape:
    """Sizes of a batch and its windows; ``chunk`` is the number of tokens per partial sum."""
    return kernels.Shape(B, N, C, 0 if start is None else start.data_ptr(), width, chunk)
