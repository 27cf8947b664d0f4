"""Families of tiles, declared by ops beside their kernels, and crossovers: the number of tokens from which on our GEMMs
run instead of cuBLAS.

A tile tuned for the GPU, from a file in the user's cache or the package, replaces the default. Nothing is ever timed
here: ``python -m benchmarks tune`` does that once.

The defaults compile without register spills on sm_80, sm_90 and sm_100 in the widths of DiT models, which tests and
``python -m benchmarks static`` check. None has been timed on a GPU yet.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dtr_kernels.ops.dispatch import capability, capability_of
from dtr_kernels.ops.tuned_tiles import (
    KINDS,
    NEVER,
    TOKENS_PER_SUM,
    Crossover,
    GemmTile,
    Kind,
    RowTile,
    SumTile,
    T,
    Tile,
    Tuned,
    merged,
    packaged_file,
    power_of_two,
    read,
    rows_class,
    user_file,
)

# Sides of a tile, and their names in kernels and in Triton.
_OPTIONS = {
    **{"m": "BLOCK_M", "n": "BLOCK_N", "k": "BLOCK_K", "rows": "ROWS", "block": "BLOCK"},
    **{"warps": "num_warps", "stages": "num_stages"},
}
_forced: dict[str, Tile] = {}
# A file used instead of the user's.
_instead: Path | None = None


# --- families of tiles -----------------------------------------------------------------------------------------------


class Tiles(Kind[T]):
    """A family of tiles, one for each dtype, number of rows and of channels, and GPU."""

    def tile(self, x: Tensor, rows: int, channels: int, active: int = 100) -> T:
        """Return the tile for a launch; x is an operand, for its device and dtype, the other arguments are as in
        ``default``.

        Raises:
            ValueError: if a tile is forced with which no kernel can run.
        """
        if self.name in _forced:
            tile = _forced[self.name]
            if problem := self.problem(tile, rows_class(rows), channels):
                raise ValueError(f"{self.name} of {rows} rows and {channels} channels: {problem}")
            return tile  # type: ignore[return-value]
        return _tile(self, x.get_device(), x.dtype, rows, channels, capability(x), active)


@lru_cache(maxsize=4096)  # for batches of many shapes
def _tile(kind: Tiles[T], device: int, dtype: torch.dtype, rows: int, channels: int, arch: int, active: int) -> T:
    tuned = None
    if device >= 0:  # Triton's interpreter runs on a CPU, number -1
        gpu = configuration(torch.cuda.get_device_name(device), capability_of(device))
        tuned = tuned_for(gpu, kind.name, dtype, rows, channels, active)
    if tuned is None:
        return kind.default(dtype, rows, channels, arch, active)
    return tuned.tile  # type: ignore[return-value]


def has_large_tiles(arch: int) -> bool:
    """Return whether this is Hopper or data-center Blackwell: warpgroup matrix instructions and more than 200 KiB of
    shared memory."""
    return 90 <= arch < 110


def options(tile: Tile) -> dict[str, int]:
    """Return a tile as the launch options of a kernel."""
    return {_OPTIONS[side]: value for side, value in tile._asdict().items()}


class GemmTiles(Tiles[GemmTile]):
    """Tiles of GEMMs whose rows are tokens: the forward pass and the input gradient."""

    type = GemmTile

    def default(self, dtype: torch.dtype, rows: int, channels: int, arch: int, active: int = 100) -> GemmTile:
        m = rows_class(rows)
        if dtype == torch.float32:  # fused multiply-adds, or tf32 if PyTorch may use it
            return GemmTile(min(m, 64), 64, 16, 8 if m >= 64 else 4, 2)
        if m < 128:
            return GemmTile(m, 128, 64 if has_large_tiles(arch) else 32, 4, 3)
        if not has_large_tiles(arch):
            return GemmTile(64, 128, 32, 8, 3)
        return GemmTile(128, 256, 64, 8, 3)

    def _misfit(self, tile: GemmTile, rows: int, channels: int) -> str | None:
        return f"m of its tile, {tile.m}, is more than its {rows} rows" if tile.m > rows else None


class TokenGemmTiles(Tiles[GemmTile]):
    """Tiles of a GEMM whose contraction runs over tokens, the weight gradient: a step holds tokens of one sample."""

    type = GemmTile

    def default(self, dtype: torch.dtype, rows: int, channels: int, arch: int, active: int = 100) -> GemmTile:
        k = min(64 if has_large_tiles(arch) else 32, power_of_two(rows))
        if dtype == torch.float32:
            return GemmTile(64, 64, 16, 8, 2)
        # The load of a sample's start takes stages too: five leave three buffers per operand, as the compiler reports.
        return GemmTile(128, 256, k, 8, 5) if has_large_tiles(arch) else GemmTile(128, 128, k, 8, 3)

    def _misfit(self, tile: GemmTile, rows: int, channels: int) -> str | None:
        return f"k of its tile, {tile.k}, is more than its {rows} rows" if tile.k > rows else None


class RowTiles(Tiles[RowTile]):
    """Tiles of a kernel that holds whole rows of channels in registers, ``tensors`` of them at a time."""

    type = RowTile

    def __init__(self, name: str, tensors: int) -> None:
        super().__init__(name)
        self._tensors = tensors

    def default(self, dtype: torch.dtype, rows: int, channels: int, arch: int, active: int = 100) -> RowTile:
        block = power_of_two(channels)
        warps = min(max(block // 128, 1), 16)
        # About 32 registers a thread for the rows themselves.
        fitting = min(TOKENS_PER_SUM, max(1, 32 * 32 * warps // (block * self._tensors)))
        return RowTile(1 << (fitting.bit_length() - 1), block, warps)

    def _misfit(self, tile: RowTile, rows: int, channels: int) -> str | None:
        block = power_of_two(channels)
        return (
            None if tile.block == block else f"block of its tile must be {block}, which holds the row, got {tile.block}"
        )


class SumTiles(Tiles[SumTile]):
    """Tiles of a kernel that sums over tokens."""

    type = SumTile

    def default(self, dtype: torch.dtype, rows: int, channels: int, arch: int, active: int = 100) -> SumTile:
        return SumTile(min(256, power_of_two(channels)), warps=4)


class Crossovers(Tiles[Crossover]):
    """Crossovers of a GEMM. The defaults are predictions, derived in docs/performance.md.

    Args:
        name: of the op with a crossover.
        tokens: maps channels, and per cent of them active, to the tokens from which on our GEMM is predicted to be
            faster than cuBLAS, in 16-bit dtypes on GPUs with large tiles. Elsewhere cuBLAS always runs.
    """

    type = Crossover

    def __init__(self, name: str, tokens: Callable[[int, int], int]) -> None:
        super().__init__(name)
        self._tokens = tokens

    def default(self, dtype: torch.dtype, rows: int, channels: int, arch: int, active: int = 100) -> Crossover:
        # In fp32 our GEMM is fused multiply-adds in a simple loop; without Hopper's copy engine it waits for all loads.
        if dtype == torch.float32 or not has_large_tiles(arch):
            return Crossover(NEVER)
        return Crossover(self._tokens(channels, active))


def crossovers() -> list[str]:
    """Return the names of the ops with a crossover."""
    return [op for op, kind in KINDS.items() if isinstance(kind, Crossovers)]


@contextmanager
def forced(op: str, tile: Tile) -> Iterator[None]:
    """Run ``op`` with ``tile``, whatever is configured, in every thread while the context is open.

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


# --- tuned tiles -----------------------------------------------------------------------------------------------------


class Configuration(NamedTuple):
    """Tuned entries for a GPU, from the user's file and from the package's; either may be empty."""

    user: tuple[Tuned, ...]
    packaged: tuple[Tuned, ...]

    @property
    def entries(self) -> list[Tuned]:
        """The entries in use: the user's replace the package's of the same key."""
        return merged(self.packaged, self.user)


@cache
def configuration(gpu: str, arch: int) -> Configuration:
    """Read the tuned entries for a GPU from its files, once.

    Entries measured with another compute capability than ``arch`` are left out. A file that cannot be used is left out
    with a warning.
    """
    return Configuration(*(_usable(path, arch) for path in (_instead or user_file(gpu), packaged_file(gpu))))


def forget() -> None:
    """Read the files again at the next launch."""
    configuration.cache_clear()
    _tile.cache_clear()


@contextmanager
def instead_of_users(path: Path) -> Iterator[None]:
    """Run kernels with the tiles of a file, as it is now, instead of the user's while the context is open."""
    global _instead
    before, _instead = _instead, path
    forget()
    try:
        yield
    finally:
        _instead = before
        forget()


def _usable(path: Path, arch: int) -> tuple[Tuned, ...]:
    try:
        return tuple(entry for entry in read(path) if entry.measurement.capability == arch)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        what = f"{path}: {error.strerror}" if isinstance(error, OSError) else error
        warnings.warn(
            f"{what}. Its tuned tiles are not used; delete the file, or replace it with "
            "python -m benchmarks tune from a checkout",
            RuntimeWarning,
            stacklevel=2,
        )
        return ()


def tuned_for(
    gpu: Configuration, op: str, dtype: torch.dtype, rows: int, channels: int, active: int = 100
) -> Tuned | None:
    """Return the entry nearest in channels and in the active share, both in proportion, or None; arguments as in
    ``Tiles.default``.

    A row kernel takes no entry whose registers would hold other rows, and a window none for windows 1.5 times as wide
    or as narrow.
    """

    def distance(entry: Tuned) -> float:
        return abs(math.log(entry.channels / channels)) + abs(math.log(entry.active / active))

    kind = op, str(dtype).removeprefix("torch."), rows_class(rows)
    alike = [
        entry
        for entry in gpu.entries
        if (entry.op, entry.dtype, entry.rows) == kind
        and 2 / 3 < entry.active / active < 3 / 2
        and KINDS[op].problem(entry.tile, entry.rows, channels) is None
    ]
    return min(alike, key=distance, default=None)


# --- defaults --------------------------------------------------------------------------------------------------------
