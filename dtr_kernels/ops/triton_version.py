"""The Triton version that fits the installed PyTorch. PyTorch's CUDA builds require it; its CPU builds require none."""

from __future__ import annotations

import warnings
from functools import cache

import torch
import triton

_TRITON_OF_TORCH = {
    (2, 8): (3, 4),
    (2, 9): (3, 5),
    (2, 10): (3, 6),
    (2, 11): (3, 6),
    (2, 12): (3, 7),
    (2, 13): (3, 7),
    (2, 14): (3, 8),
    (2, 15): (3, 9),
}


def mismatch() -> str | None:
    """Say why Triton does not fit PyTorch, and which version does; None if it fits or PyTorch's version is unknown."""
    fitting = _TRITON_OF_TORCH.get(_release(torch.__version__))
    if fitting is None or fitting == _release(triton.__version__):
        return None
    major, minor = fitting
    return (
        f"triton {triton.__version__} does not fit torch {torch.__version__}, which needs triton {major}.{minor}; "
        f'pip install "triton=={major}.{minor}.*"'
    )


@cache
def warn_of_mismatch() -> None:
    """Warn in the first call of a process if the installed Triton does not fit PyTorch."""
    if problem := mismatch():
        warnings.warn(problem, RuntimeWarning, stacklevel=3)


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
