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


def _has_large_tiles(arch: int) -> bool:
    """Hopper and data-center Blackwell: warpgroup matrix instructions and more than 200 KiB of shared memory."""
    return 90 <= arch < 110


def gemm_tile(dtype: torch.dtype, rows: int, arch: int, slope: bool = False) -> GemmTile:
    """Tile of the forward and input-gradient GEMMs.

    Args:
        dtype: of the operands.
        rows: tokens that share a window; a tile does not reach beyond them.
        arch: compute capability, as ``capability`` returns it.
        slope: whether the epilogue computes GELU's derivative, which needs the registers of half a tile.
    """
    m = min(128, power_of_two(rows))
    if dtype == torch.float32:  # fused multiply-adds, or tf32 where PyTorch is allowed it
        return GemmTile(min(m, 64), 64, 16, 8 if m >= 64 else 4, 2)
    if m < 128:
        return GemmTile(m, 128, 64 if _has_large_tiles(arch) else 32, 4, 3)
    if not _has_large_tiles(arch):
        return GemmTile(64, 128, 32, 8, 3)
    return GemmTile(128, 128, 64, 8, 4) if slope else GemmTile(128, 256, 64, 8, 3)


def weight_gradient_tile(dtype: torch.dtype, rows: int, arch: int) -> GemmTile:
    """Tile of the weight-gradient GEMM, whose contraction runs over tokens: a step holds tokens of one sample."""
    k = min(64 if _has_large_tiles(arch) else 32, power_of_two(rows))
    if dtype == torch.float32:
        return GemmTile(64, 64, 16, 8, 2)
    # One stage more than the tiles need: the load of a sample's start takes one.
    return GemmTile(128, 256, k, 8, 4) if _has_large_tiles(arch) else GemmTile(128, 128, k, 8, 3)


def row_tile(channels: int, tensors: int) -> RowTile:
    """Tile of a kernel that holds whole rows of ``channels`` in registers, ``tensors`` of them at a time."""
    block = power_of_two(channels)
    warps = min(max(block // 128, 1), 16)
    # About 32 registers a thread for the rows themselves, and at most the 32 tokens that a backward program sums over.
    rows = min(32, max(1, 32 * 32 * warps // (block * tensors)))
    return RowTile(1 << (rows.bit_length() - 1), block, warps)
