"""Which tile every Triton kernel runs with, and from how many tokens on ours run instead of cuBLAS, in one place.

What was tuned for the GPU, in a file of the user's cache or of the package, goes before the default. Nothing is
ever timed here: ``python -m benchmarks tune`` does that once.

The defaults compile without register spills on sm_80, sm_90 and sm_100 (a test compiles each of them for all three).
None has been timed on a GPU yet.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from dtr_kernels.ops.tuned_tiles import (
    KINDS,
    NEVER,
    Crossover,
    GemmTile,
    RowTile,
    SumTile,
    Tile,
    Tuned,
    merged,
    packaged,
    packaged_file,
    power_of_two,
    problem_of,
    read,
    rows_class,
    user_file,
)

__all__ = [
    "NEVER",
    "Configuration",
    "Crossover",
    "CrossoverOp",
    "GemmTile",
    "RowTile",
    "SumTile",
    "Tile",
    "Tuned",
    "capability",
    "configuration",
    "default_tile",
    "forced",
    "forget",
    "multiprocessors",
    "packaged",
    "power_of_two",
    "tile_for",
    "tuned_for",
]

GemmOp = Literal["forward", "forward_gelu", "input_gradient", "gelu_input_gradient", "weight_gradient"]
RowOp = Literal[
    "norm_forward",
    "norm_forward_update",
    "norm_backward",
    "norm_backward_update",
    "residual_forward",
    "residual_backward",
]
CrossoverOp = Literal["windows_forward", "windows_backward", "gelu_forward", "gelu_backward"]
# Rows of channels that a row kernel holds at a time.
_TENSORS = {
    "norm_forward": 2,
    "norm_forward_update": 3,
    "norm_backward": 4,
    "norm_backward_update": 6,
    "residual_forward": 2,
    "residual_backward": 2,
}
_forced: dict[str, Tile] = {}


def capability(x: Tensor) -> int:
    """Compute capability of x's device as 80, 90, 100, ...; 90 in Triton's interpreter."""
    return 90 if x.device.type != "cuda" else _capability(x.get_device())


@cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(x: Tensor) -> int:
    """How many multiprocessors x's device has; an H200's 132 in Triton's interpreter."""
    return 132 if x.device.type != "cuda" else _multiprocessors(x.get_device())


@cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# --- what a launcher asks --------------------------------------------------------------------------------------------


@overload
def tile_for(op: GemmOp, x: Tensor, rows: int, channels: int, arch: int) -> GemmTile: ...
@overload
def tile_for(op: RowOp, x: Tensor, rows: int, channels: int) -> RowTile: ...
@overload
def tile_for(op: Literal["token_sums"], x: Tensor, rows: int, channels: int) -> SumTile: ...
@overload
def tile_for(op: CrossoverOp, x: Tensor, rows: int, channels: int, arch: int) -> Crossover: ...
def tile_for(op: str, x: Tensor, rows: int, channels: int, arch: int = 0) -> Any:
    """The tile that a kernel runs with, or the crossover from which on it runs.

    Args:
        op: what the kernel computes, of ``KINDS``.
        x: an operand, for its device and dtype.
        rows: tokens that share a window.
        channels: C of the residual stream; of "token_sums", columns of the gradient.
        arch: compute capability, as ``capability`` returns it, where the op is a GEMM or has a crossover.
    """
    if op in _forced:
        return _checked(op, _forced[op], rows, channels)
    return _tile(op, x.get_device(), x.dtype, rows, channels, arch)


@contextmanager
def forced(op: str, tile: Tile) -> Iterator[None]:
    """Inside, ``op`` runs with ``tile`` whatever is configured, in every thread: to time and to compile tiles.

    Raises:
        ValueError: if there is no such op; and in the launcher, if the kernel cannot run with the tile.
    """
    if op not in KINDS:
        raise ValueError(f"op must be one of {', '.join(KINDS)}, got {op!r}")
    before = dict(_forced)
    _forced[op] = tile
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def _checked(op: str, tile: Tile, rows: int, channels: int) -> Tile:
    problem = problem_of(op, tile, rows_class(rows), channels)
    if problem:
        raise ValueError(f"{op} of {rows} rows and {channels} channels: {problem}")
    return tile


@lru_cache(maxsize=4096)  # of batches of many shapes, those that were used last
def _tile(op: str, device: int, dtype: torch.dtype, rows: int, channels: int, arch: int) -> Tile:
    tuned = None
    if device >= 0:  # Triton's interpreter runs on a CPU, whose number is -1
        gpu = configuration(torch.cuda.get_device_name(device), _capability(device))
        tuned = tuned_for(gpu, op, dtype, rows, channels)
    return default_tile(op, dtype, rows, channels, arch) if tuned is None else tuned.tile


# --- tuned tiles -----------------------------------------------------------------------------------------------------


class Configuration(NamedTuple):
    """What is tuned for a GPU: entries of the user's file and of the package's; either may be empty."""

    user: tuple[Tuned, ...]
    packaged: tuple[Tuned, ...]

    @property
    def entries(self) -> list[Tuned]:
        """Those that are used: the user's stand in for the package's of the same key."""
        return merged(self.packaged, self.user)


@cache
def configuration(gpu: str, arch: int) -> Configuration:
    """What is tuned for a GPU, read from its files once.

    Entries that were measured with another compute capability than ``arch`` are left out. A file that cannot be used
    is left out with a warning.
    """
    return Configuration(*(_usable(path, arch) for path in (user_file(gpu), packaged_file(gpu))))


def forget() -> None:
    """Files are read again at the next launch."""
    configuration.cache_clear()
    _tile.cache_clear()


def _usable(path: Path, arch: int) -> tuple[Tuned, ...]:
    try:
        return tuple(entry for entry in read(path) if entry.measurement.capability == arch)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        warnings.warn(
            f"{path}: {what}. Its tuned tiles are not used; delete the file, or replace it with "
            "python -m benchmarks tune from a checkout",
            RuntimeWarning,
            stacklevel=2,
        )
        return ()


def tuned_for(gpu: Configuration, op: str, dtype: torch.dtype, rows: int, channels: int) -> Tuned | None:
    """The entry of the nearest width, in proportion, or None; the arguments are those of ``tile_for``.

    A row kernel takes none whose registers would hold other rows.
    """
    kind = op, str(dtype).removeprefix("torch."), rows_class(rows)
    alike = [
        entry
        for entry in gpu.entries
        if (entry.op, entry.dtype, entry.rows) == kind and problem_of(op, entry.tile, entry.rows, channels) is None
    ]
    return min(alike, key=lambda entry: abs(math.log(entry.channels / channels)), default=None)


# --- defaults --------------------------------------------------------------------------------------------------------


def default_tile(op: str, dtype: torch.dtype, rows: int, channels: int, arch: int) -> Tile:
    """The tile of a GPU that nobody has tuned; the arguments are those of ``tile_for``."""
    if op == "weight_gradient":
        return weight_gradient_tile(dtype, rows, arch)
    if op == "token_sums":
        return SumTile(min(256, power_of_two(channels)), warps=4)
    if KINDS[op] is Crossover:
        return crossover(op, dtype, arch)
    if op in _TENSORS:
        tile = row_tile(channels, _TENSORS[op])
        if op == "norm_backward" and dtype != torch.float32:  # a vector of 8 channels a thread, and few barriers
            return RowTile(1, tile.block, max(1, tile.block // 256))
        # Of fp32 rows this long ptxas spills a register on sm_90, so that one more block fits a multiprocessor.
        spills = op == "norm_backward" and tile.block == 2048
        return RowTile(1, tile.block, warps=32) if spills else tile
    return gemm_tile(dtype, rows, arch)


def _has_large_tiles(arch: int) -> bool:
    """Hopper and data-center Blackwell: warpgroup matrix instructions and more than 200 KiB of shared memory."""
    return 90 <= arch < 110


def gemm_tile(dtype: torch.dtype, rows: int, arch: int) -> GemmTile:
    """Tile of the forward and input-gradient GEMMs.

    Args:
        dtype: of the operands.
        rows: tokens that share a window; a tile does not reach beyond them.
        arch: compute capability, as ``capability`` returns it.
    """
    m = rows_class(rows)
    if dtype == torch.float32:  # fused multiply-adds, or tf32 where PyTorch is allowed it
        return GemmTile(min(m, 64), 64, 16, 8 if m >= 64 else 4, 2)
    if m < 128:
        return GemmTile(m, 128, 64 if _has_large_tiles(arch) else 32, 4, 3)
    if not _has_large_tiles(arch):
        return GemmTile(64, 128, 32, 8, 3)
    return GemmTile(128, 256, 64, 8, 3)


def weight_gradient_tile(dtype: torch.dtype, rows: int, arch: int) -> GemmTile:
    """Tile of the weight-gradient GEMM, whose contraction runs over tokens: a step holds tokens of one sample."""
    k = min(64 if _has_large_tiles(arch) else 32, power_of_two(rows))
    if dtype == torch.float32:
        return GemmTile(64, 64, 16, 8, 2)
    # The load of a sample's start takes stages too: four leave two buffers for each operand, as the compiler reports.
    return GemmTile(128, 256, k, 8, 4) if _has_large_tiles(arch) else GemmTile(128, 128, k, 8, 3)


def crossover(op: str, dtype: torch.dtype, arch: int) -> Crossover:
    """Where our GEMMs are taken to become faster than cuBLAS: predictions, which docs/performance.md derives.

    A window of 0.8 saves less than cuBLAS is ahead of our GEMMs by. GELU costs about as much in an epilogue as in a
    pass of its own, in half the launches.
    """
    # In fp32 ours are fused multiply-adds in a simple loop; without Hopper's copy engine all loads are waited for.
    pays = op in ("gelu_forward", "gelu_backward") and dtype != torch.float32 and _has_large_tiles(arch)
    return Crossover(1 if pays else NEVER)


def row_tile(channels: int, tensors: int) -> RowTile:
    """Tile of a kernel that holds whole rows of ``channels`` in registers, ``tensors`` of them at a time."""
    block = power_of_two(channels)
    warps = min(max(block // 128, 1), 16)
    # About 32 registers a thread for the rows themselves, and at most the 32 tokens that a backward program sums over.
    rows = min(32, max(1, 32 * 32 * warps // (block * tensors)))
    return RowTile(1 << (rows.bit_length() - 1), block, warps)
