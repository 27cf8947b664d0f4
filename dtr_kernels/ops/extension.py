"""The bridge from tensors to the compiled CPU kernels: pointers, dtypes and strides."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from torch import Tensor

from dtr_kernels import compilation, just_in_time

_NAME = "dtr_kernels._C"


def _hidden_package(package: Path) -> str | None:
    """If this copy of the package has no extension, name another copy that has one, and say what to do.

    An editable install of another checkout would otherwise lend its own, perhaps built from other sources.
    """
    if _NAME in sys.modules or PathFinder.find_spec(_NAME, [str(package)]):
        return None
    on_path = [str(Path(folder, package.name)) for folder in sys.path]
    other = PathFinder.find_spec(_NAME, on_path) or importlib.util.find_spec(_NAME)
    if not other or not other.origin:
        return None
    return (
        f"{package} has none, and is imported instead of {Path(other.origin).parent}, which has them; run "
        f"pip install -e . in {package.parent}, or start Python in another folder"
    )


just_in_time.load()
_hidden = _hidden_package(just_in_time.PACKAGE)
try:
    if _hidden:
        raise ImportError
    # PyTorch must be imported first: it brings the OpenMP runtime that the extension runs on.
    import dtr_kernels._C as kernels
except ImportError as error:
    kernels = None  # type: ignore[assignment]
    unavailable: str | None = (
        "the compiled CPU kernels are missing: "
        f"{_hidden or f'{error}; install a C++ compiler, and {compilation.AGAIN}'}"
    )
    warnings.warn(f"{unavailable}. Until then plain PyTorch runs, which is slower", RuntimeWarning, stacklevel=2)
else:
    unavailable = None
    _TYPES = {
        torch.float32: kernels.Type.f32,
        torch.float64: kernels.Type.f64,
        torch.bfloat16: kernels.Type.bf16,
        torch.float16: kernels.Type.f16,
    }


def dtype_code(dtype: torch.dtype) -> kernels.Type:
    """Return the extension's name of a dtype."""
    return _TYPES[dtype]


def rows(x: Tensor | None) -> kernels.Rows:
    """Describe x as equally spaced rows of its contiguous last dimension; None as the null tensor.

    The result holds a bare pointer: the caller keeps x alive until the kernel has run.
    """
    if x is None:
        return 0, kernels.Type.f32, 0
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"rows must be contiguous for the CPU kernels, got strides {x.stride()}")
    return x.data_ptr(), _TYPES[x.dtype], x.shape[-1] if x.is_contiguous() else x.stride(-2)


def shape(B: int, N: int, C: int, start: Tensor | None, width: int, chunk: int = 1) -> kernels.Shape:
    """Return the sizes of a batch and its windows; ``chunk`` is the number of tokens per partial sum."""
    return B, N, C, 0 if start is None else start.data_ptr(), width, chunk
