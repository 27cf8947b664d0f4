"""Tile shapes of every Triton kernel, in one place.

Defaults that compile without register spills on sm_80, sm_90 and sm_100 (a test compiles each of them for all three).
None has been timed on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor


class GemmTile(NamedTuple):
    """Rows, columns and contraction depth of one program's tile, with its warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


class RowTile(NamedTuple):
    """Tokens per step and padded channels of a row kernel, with its warps."""

    rows: int
    block: int
    warps: int


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (and at least 16, the smallest side of a matrix instruction)."""
    return max(16, triton.next_power_of_2(n))


def capability(x: Tensor) -> int:
    """Compute capability of x's device as 80, 90, 100, ...; 90 in Triton's interpreter."""
    if x.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def gemm_tile(dtype: torch.dtype, rows: int, arch: int) -> GemmTile:
    """Tile of the forward and input-gradient GEMMs; ``rows`` is the number of tokens that share a window."""
    m = min(128, power_of_two(rows))
    if dtype == torch.float32:  # fused multiply-adds, or tf32 where PyTorch is allowed it
        return GemmTile(min(m, 64), 64, 32, 4, 2)
    if arch in (90, 100) and m == 128:
        return GemmTile(128, 256, 64, 8, 3)
    return GemmTile(m, 128, 32 if arch < 90 else 64, 4, 3)


def weight_gradient_tile(dtype: torch.dtype, rows: int, arch: int) -> GemmTile:
    """Tile of the weight-gradient GEMM, whose contraction runs over tokens: k is bounded by a sample's ``rows``."""
    k = min(64 if arch >= 90 else 32, power_of_two(rows))
    if dtype == torch.float32:
        return GemmTile(64, 64, min(k, 32), 4, 2)
    if arch in (90, 100):
        return GemmTile(128, 256, k, 8, 3)
    return GemmTile(128, 128, k, 8, 3)


def row_tile(channels: int, tensors: int) -> RowTile:
    """Tile of a kernel that holds whole rows of ``channels`` in registers, ``tensors`` of them at a time."""
    block = power_of_two(channels)
    warps = min(max(block // 256, 1), 8)
    # About 64 registers a thread for the rows themselves, and at most the 32 tokens that a backward program sums over.
    rows = min(32, max(1, 64 * 32 * warps // (block * tensors)))
    return RowTile(1 << (rows.bit_length() - 1), block, warps)
