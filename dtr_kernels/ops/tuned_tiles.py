"""Tiles and crossovers that were timed on a GPU, and the JSON files that keep them: one for each GPU, in the package or
in the user's cache."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
import triton

from dtr_kernels.files import cache_folder, read_json, replacing
from dtr_kernels.quoting import shortened

FORMAT = 2
PACKAGED = Path(__file__).parent.parent / "tuned"
# Tokens that a backward kernel sums over before it writes a partial sum.
TOKENS_PER_SUM = 32
# The most rows of a GEMM's tile: more tokens than these do not change the best tile.
MOST_ROWS = 128


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


class SumTile(NamedTuple):
    """Channels per step of the kernel that sums over tokens, with its warps."""

    block: int
    warps: int


class Crossover(NamedTuple):
    """Tokens of a batch from which on our GEMM runs; below, cuBLAS and separate kernels for the epilogues run."""

    tokens: int

    def __str__(self) -> str:
        """Return the crossover in words."""
        if self.tokens >= NEVER:
            return "never"
        return "always" if self.tokens == 1 else f"from {self.tokens:,} tokens on"


Tile = GemmTile | RowTile | SumTile | Crossover
T = TypeVar("T", GemmTile, RowTile, SumTile, Crossover)

_DTYPES = ("float32", "bfloat16", "float16")
# More tokens than any batch has.
NEVER = 1 << 30
# The least side is that of a matrix instruction, the most that of a tensor descriptor's box.
_SIDE = 16, 256
_LIMITS = {
    "m": _SIDE,
    "n": _SIDE,
    "k": _SIDE,
    "stages": (1, 8),
    "rows": (1, TOKENS_PER_SUM),
    "block": (16, 1 << 16),
    "warps": (1, 32),
    "tokens": (1, NEVER),
}
_MOST_CHANNELS = 1 << 24


def power_of_two(n: int) -> int:
    """Return the smallest power of two >= n, and at least 16, the smallest side of a matrix instruction."""
    return max(16, triton.next_power_of_2(n))


def rows_class(tokens: int) -> int:
    """Return the class of the tokens that share a window, for looking up entries: 16, 32, 64 or 128."""
    return min(MOST_ROWS, power_of_two(tokens))


def active_share(width: int, channels: int) -> int:
    """Return the per cent of the channels in a window of ``width``, for looking up entries."""
    return max(1, round(100 * width / channels))


class Kind(Generic[T]):
    """A kernel or crossover with a tunable tile, under its name in files and command lines; enters itself in ``KINDS``.

    Attributes:
        type: of its tiles.
    """

    type: ClassVar[type[Any]]

    def __init__(self, name: str) -> None:
        self.name = name
        KINDS[name] = self

    def default(self, dtype: torch.dtype, rows: int, channels: int, arch: int, active: int = 100) -> T:
        """Return the tile for a GPU without tuned entries.

        Args:
            dtype: of the operands.
            rows: tokens that share a window; for "closed_form", samples.
            channels: C of the residual stream; for "token_sums", columns of the gradient.
            arch: compute capability as 80, 90, 100, ...
            active: per cent of the channels in a window, for the crossovers of windows.
        """
        raise NotImplementedError

    def problem(self, tile: Tile, rows: int, channels: int) -> str | None:
        """Say why a kernel cannot run with a tile, for windows of ``rows`` tokens and ``channels`` channels; None if it
        can."""
        if type(tile) is not self.type:
            return f"its tile must be a {self.type.__name__}, got {tile!r}"
        for name, value in tile._asdict().items():
            least, most = _LIMITS[name]
            if not _is_integer(value) or not least <= value <= most or (name != "stages" and value & (value - 1)):
                what = "whole number" if name == "stages" else "power of two"
                return f"{name} of its tile must be a {what} between {least} and {most}, got {value!r}"
        return self._misfit(tile, rows, channels)

    def _misfit(self, tile: Any, rows: int, channels: int) -> str | None:
        """Say why a tile within the limits does not fit these rows and channels."""
        return None


#: The kinds of tiles by op. The families of ``tiles`` enter themselves, beside the kernels.
KINDS: dict[str, Kind[Any]] = {}


@dataclass(frozen=True)
class Measurement:
    """Conditions under which tiles were timed.

    Attributes:
        gpu: as ``torch.cuda.get_device_name`` says.
        capability: 80, 90, 100, ...
        torch, triton: versions. commit: None outside of a git checkout. date: in ISO format. command: to repeat it.
        sources: a fingerprint of the kernels' source.
    """

    gpu: str
    capability: int
    torch: str
    triton: str
    commit: str | None
    date: str
    command: str
    sources: str

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            kind = int if name == "capability" else str
            if not isinstance(value, kind) and not (name == "commit" and value is None):
                raise ValueError(f"{name} of a measurement must be of type {kind.__name__}, got {value!r}")


@dataclass(frozen=True)
class Tuned:
    """The fastest tile found for an op, or its crossover.

    Attributes:
        op: of ``KINDS``. dtype: of its operands: "float32", "bfloat16" or "float16".
        channels: of the residual stream; for "token_sums" of the gradient that it reads.
        rows: tokens that share a window, for "closed_form" samples, as classes of ``rows_class``.
        active: per cent of the channels in a window, for the crossovers of windows; 100 for everything else.
        tile: of the op's kind.
        seconds, default_seconds: of a call with this tile, and with the default one; for a crossover, on the largest
            batch that was timed.
        measurement: the conditions.

    Raises:
        ValueError: if no kernel could run with the tile.
    """

    op: str
    dtype: str
    channels: int
    rows: int
    active: int
    tile: Tile
    seconds: float
    default_seconds: float
    measurement: Measurement

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(f"the entry {self.op!r}, {self.dtype!r}, {self.channels!r} channels: {problem}")

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        """The entry's key, unique within a file."""
        return self.op, self.dtype, self.channels, self.rows, self.active

    def _problem(self) -> str | None:
        if self.op not in KINDS:
            return f"op must be one of {', '.join(KINDS)}"
        if self.dtype not in _DTYPES:
            return f"dtype must be one of {', '.join(_DTYPES)}"
        if not _is_integer(self.channels) or not 1 <= self.channels <= _MOST_CHANNELS:
            return f"channels must be a whole number between 1 and {_MOST_CHANNELS:,}"
        if not _is_integer(self.rows) or self.rows != rows_class(self.rows):
            return f"rows must be 16, 32, 64 or {MOST_ROWS}, got {self.rows!r}"
        if not _is_integer(self.active) or not 1 <= self.active <= 100:
            return f"active must be a whole number of per cent between 1 and 100, got {self.active!r}"
        if not all(isinstance(s, float) and 0 < s < math.inf for s in (self.seconds, self.default_seconds)):
            return "seconds and default_seconds must be positive and finite"
        return KINDS[self.op].problem(self.tile, self.rows, self.channels)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# --- files -----------------------------------------------------------------------------------------------------------


def slug(gpu: str) -> str:
    """Turn a GPU's name into a file's: "NVIDIA H200" into "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def packaged_file(gpu: str) -> Path:
    """Return the package's file of tiles for a GPU; it need not exist."""
    return PACKAGED / f"{slug(gpu)}.json"


def user_file(gpu: str) -> Path:
    """Return the file of tiles for a GPU in the user's cache; it need not exist."""
    return cache_folder() / "tuned" / f"{slug(gpu)}.json"


def packaged() -> list[Tuned]:
    """Return every entry of every file in the package."""
    return [entry for path in sorted(PACKAGED.glob("*.json")) for entry in read(path)]


def read(path: Path) -> list[Tuned]:
    """Read the entries of a file.

    Raises:
        FileNotFoundError: if there is no such file, or there cannot be one, as below a home of /dev/null.
        OSError: if it cannot be read.
        ValueError: naming the file, if it holds anything else, has another version of the format, or an entry that no
            kernel could run with.
    """
    try:
        stored = read_json(path)
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
    try:
        if stored["format"] != FORMAT:
            raise ValueError(f"its format is version {stored['format']!r}, and this dtr_kernels reads {FORMAT}")
        measurements = [Measurement(**facts) for facts in stored["measurements"]]
        return [_entry(facts, measurements) for facts in stored["entries"]]
    except ValueError as error:
        raise ValueError(f"{path}: {shortened(error)}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold tuned tiles ({type(error).__name__}: {shortened(error)})") from error


def write(path: Path, entries: Iterable[Tuned]) -> None:
    """Write a file of entries with different keys. A reader never finds half of it."""
    entries = sorted(entries, key=lambda entry: entry.key)
    measurements = list(dict.fromkeys(entry.measurement for entry in entries))
    lines = {
        "measurements": [dataclasses.asdict(measurement) for measurement in measurements],
        "entries": [
            vars(entry) | {"tile": entry.tile._asdict(), "measurement": measurements.index(entry.measurement)}
            for entry in entries
        ],
    }
    # One line for each, so that a change of one is a change of one line.
    parts = [f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, facts)) + "\n ]" for name, facts in lines.items()]
    with replacing(path) as unfinished:
        unfinished.write_text("{\n" + f' "format": {FORMAT},\n' + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def merged(*lists: Iterable[Tuned]) -> list[Tuned]:
    """Merge lists of entries; the last of those with the same key wins."""
    return list({entry.key: entry for entries in lists for entry in entries}.values())


def _entry(facts: dict[str, Any], measurements: list[Measurement]) -> Tuned:
    if facts["op"] not in KINDS:
        raise ValueError(f"there is no op {facts['op']!r} to tune; there are {', '.join(KINDS)}")
    tile = KINDS[facts["op"]].type(**facts["tile"])
    return Tuned(**facts | {"tile": tile, "measurement": measurements[facts["measurement"]]})
