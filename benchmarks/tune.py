"""``python -m benchmarks tune``: finds the fastest tile of every Triton kernel on this machine's GPU, and from how many
tokens on the GEMMs among them beat cuBLAS.

A candidate must compile, spill no registers and compute what plain PyTorch computes in fp64. It replaces the default
tile only if it is faster by more than the measurements scatter. Crossovers come after the tiles, and are timed with
them.

Times are of CUDA graphs wherever a call can be recorded, without what the host takes to launch kernels. A small batch
that is run without graphs may wait for the host longer than the kernels take; crossovers do not take that into account.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from tqdm import tqdm
from triton.compiler.compiler import max_shared_mem

from benchmarks import environment, sources
from benchmarks.arguments import positive
from benchmarks.cases import DTYPES, dtype_name
from benchmarks.measure import BAR, one_line
from benchmarks.timing import Spread, Stopwatch, copies, ratio
from dtr_kernels.nn import DiT_models
from dtr_kernels.ops import tiles, tuned_tiles
from dtr_kernels.ops.dispatch import empty_rows
from dtr_kernels.ops.tiles import capability, default_tile, forced
from dtr_kernels.ops.tuned_tiles import KINDS, NEVER, Crossover, GemmTile, Measurement, RowTile, SumTile, Tile, Tuned

# ``dtr_kernels.ops`` has functions of the same names.
gated_norm, gated_residual, gelu, window_linear = LAUNCHERS = [
    importlib.import_module(f"dtr_kernels.ops.{name}") for name in ("gated_norm", "residual", "gelu", "window_linear")
]
# Of the kernels and of what hands them their tensors.
SOURCES = (
    "dtr_kernels/ops/dispatch.py",
    "dtr_kernels/ops/g[ae]*.py",
    "dtr_kernels/ops/linear.py",
    "dtr_kernels/ops/window_linear.py",
)
MODELS = ("DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2")
# A tile must be faster than the default by this share, and our GEMM than cuBLAS, in four of five rounds.
MARGIN = 0.02
# Rounds that choose the finalists among the candidates, and those that compare the finalists with the default.
ROUNDS, FINAL_ROUNDS, FINALISTS = 7, 40, 4
# What an element may be off, relative to its size and that of the others: several roundings. In fp32 they are those of
# tf32, where that is allowed. Of what a wrong tile computes, elements are off by about one.
BOUNDS = {torch.float32: 0.005, torch.bfloat16: 0.03, torch.float16: 0.005}
_EPS = 1e-6
# The two ways of an op with a crossover.
OURS, CUBLAS = Crossover(1), Crossover(NEVER)


class NotTuned(Exception):
    """Why there is no result for a problem."""


@dataclass(frozen=True)
class Problem:
    """What a tile is chosen for: one op on a batch of ``batch`` samples with ``tokens`` tokens of ``channels``; and a
    crossover, up to that batch."""

    op: str
    dtype: torch.dtype
    channels: int
    tokens: int
    batch: int

    @property
    def key(self) -> tuple[str, str, int, int]:
        """Of the entry that holds the result."""
        # fc2's input gradient has no window: its rows are the tokens of all samples.
        rows = self.tokens * (self.batch if self.op == "gelu_input_gradient" else 1)
        channels = self.channels * (3 if self.op == "token_sums" else 1)
        return self.op, str(self.dtype).removeprefix("torch."), channels, tuned_tiles.rows_class(rows)

    def default(self, arch: int) -> Tile:
        """The tile that runs without tuning."""
        op, _, channels, rows = self.key
        return default_tile(op, self.dtype, rows, channels, arch)

    def __str__(self) -> str:
        return f"{self.op} {dtype_name(self.dtype)}, {self.channels} channels, {self.tokens} tokens"


class Choice(NamedTuple):
    """The tile or crossover that was chosen, and seconds of a call with it and with the default."""

    tile: Tile
    seconds: float
    default_seconds: float


# --- command line ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``main`` reads."""
    parser.add_argument("--model", nargs="+", default=MODELS, metavar="NAME", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--dtype", nargs="+", default=("bf16", "fp32"), choices=DTYPES, help="default: bf16 fp32")
    parser.add_argument(
        "--batch",
        type=positive,
        default=32,
        metavar="B",
        help="samples in a batch, for crossovers also half of them, a quarter, ...; default: 32",
    )
    parser.add_argument("--ops", nargs="+", default=tuple(KINDS), choices=KINDS, metavar="OP", help=", ".join(KINDS))
    parser.add_argument("--seconds", type=positive, help="start nothing more after as long, and keep what is tuned")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to add to; default: in the user's cache")


def main(arguments: argparse.Namespace) -> int:
    """Tunes and returns the exit status: 0; 1 if there was something that could not be tuned; 130 after Ctrl-C.

    Raises:
        ValueError: if there is no GPU, no model of a name, or nothing can be added to the file.
    """
    problems = problems_of(arguments.model, arguments.dtype, arguments.ops, arguments.batch)
    if not torch.cuda.is_available():
        raise ValueError("PyTorch finds no CUDA device here, and tiles are what kernels on a GPU have")
    device = torch.device("cuda", torch.cuda.current_device())
    path = arguments.out or cached_file(torch.cuda.get_device_name(device))
    tuning = Tuning(path, measurement_on(device))
    stopwatch = Stopwatch(device)
    tuning.run(problems, lambda problem: choose_on(problem, device, stopwatch), arguments.seconds)
    if tuning.found:
        print(table(tuning.found))
        print(f"{len(tuning.found)} tuned tiles and crossovers are in {path}")
    for problem, reason in tuning.failures.items():
        print(f"not tuned: {problem}: {reason}", file=sys.stderr)
    if tuning.interrupted:
        print("interrupted", file=sys.stderr)
    return 130 if tuning.interrupted else int(bool(tuning.failures))


def cached_file(gpu: str) -> Path:
    """The user's file of a GPU.

    Raises:
        ValueError: if nobody knows where that is.
    """
    path = tuned_tiles.user_file(gpu)
    if path.parts[0] == "~":
        raise ValueError(
            "the home folder is unknown, and with it the user's cache; set DTR_KERNELS_CACHE to a folder, "
            "or choose a file with --out"
        )
    return path


def problems_of(models: Sequence[str], precisions: Sequence[str], ops: Sequence[str], batch: int) -> list[Problem]:
    """What is to be tuned, none of it twice, the crossovers of a model in a dtype after its tiles.

    Raises:
        ValueError: if there is no model of a name.
    """
    problems: dict[tuple[Any, ...], Problem] = {}
    ops = sorted(ops, key=lambda op: KINDS[op] is Crossover)
    for model, precision, op in itertools.product(models, precisions, ops):
        if model not in DiT_models:
            raise ValueError(f"argument --model: there is no {model}; there are {', '.join(DiT_models)}")
        size = DiT_models[model].keywords  # type: ignore[attr-defined]
        # Of latents of 32 x 32, which images of 256 x 256 have.
        problem = Problem(op, DTYPES[precision], size["hidden_size"], (32 // size["patch_size"]) ** 2, batch)
        problems.setdefault(problem.key, problem)
    return list(problems.values())


def measurement_on(device: torch.device) -> Measurement:
    """What a file says of everything that is measured now."""
    facts = environment.describe(device)
    return Measurement(
        gpu=facts["device"],
        capability=capability(torch.empty(0, device=device)),
        triton=triton.__version__,
        sources=sources.fingerprint(SOURCES),
        **{name: facts[name] for name in ("torch", "commit", "date", "command")},
    )


@dataclass
class Tuning:
    """A file that tuned tiles are added to as they are found; entries of other problems stay.

    Raises:
        ValueError: if the file holds something else, or its folder cannot be written to.
    """

    path: Path
    measurement: Measurement
    found: list[Tuned] = field(default_factory=list)
    failures: dict[Problem, str] = field(default_factory=dict)
    interrupted: bool = False

    def __post_init__(self) -> None:
        self._stored()
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(f"{folder} cannot be written to ({error.strerror}); choose a file with --out") from error

    def _stored(self) -> list[Tuned]:
        try:
            return tuned_tiles.read(self.path)
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path}: {error}; delete it, or choose another file with --out") from error

    def run(
        self, problems: Sequence[Problem], choose: Callable[[Problem], Choice], seconds: float | None = None
    ) -> None:
        """Solves problems until Ctrl-C, or until ``seconds`` have passed when the next would begin."""
        start = time.perf_counter()
        progress = tqdm(problems, "tuning", **BAR)
        try:
            for problem in progress:
                if seconds is not None and time.perf_counter() - start > seconds:
                    return
                progress.set_postfix_str(str(problem))
                try:
                    with used(self.path):
                        choice = choose(problem)
                except (NotTuned, RuntimeError) as error:  # such as too little memory for the batch
                    self.failures[problem] = str(error).strip().partition("\n")[0]
                else:
                    op, dtype, channels, rows = problem.key
                    self.found.append(Tuned(op, dtype, channels, rows, *choice, self.measurement))
                    # Read again, for another process may have added to it.
                    tuned_tiles.write(self.path, tuned_tiles.merged(self._stored(), self.found))
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            progress.close()


@contextmanager
def used(path: Path) -> Iterator[None]:
    """Inside, kernels run with the tiles of a file as it is now: it takes the place of the user's."""
    with mock.patch.object(tiles, "user_file", lambda gpu: path):
        tiles.forget()
        try:
            yield
        finally:
            tiles.forget()


def table(found: Sequence[Tuned]) -> str:
    """What was found, a line for each problem."""
    lines = [f"{'op':22} {'dtype':9} {'width':>5} {'rows':>4} {'default':>10} {'best':>10} {'gain':>6}  tile"]
    for entry in found:
        default, best = (f"{1e6 * seconds:.1f} µs" for seconds in (entry.default_seconds, entry.seconds))
        gain = f"{entry.default_seconds / entry.seconds - 1:.1%}"
        tile = " ".join(f"{name} {value}" for name, value in entry.tile._asdict().items())
        if isinstance(entry.tile, Crossover):
            tile = str(entry.tile)
        op, dtype, width, rows = entry.key
        lines.append(f"{op:22} {dtype:9} {width:5} {rows:4} {default:>10} {best:>10} {gain:>6}  {tile}")
    return "\n".join(lines)


# --- choosing --------------------------------------------------------------------------------------------------------


class Trial(Protocol):
    """What ``choose`` asks of a device about the tiles of one problem."""

    def unusable(self, tiles: Sequence[Tile]) -> dict[Tile, str]:
        """Why some of the tiles cannot be used: they do not compile, do not fit, or spill registers."""

    def error(self, tile: Tile) -> float:
        """How far an element is off at most."""

    def timer(self, tile: Tile) -> Callable[[], float]:
        """A function that runs the tile and gives the seconds of a call."""


def choose(default: Tile, tiles: Sequence[Tile], bound: float, trial: Trial) -> Choice:
    """The fastest of the usable and right tiles if it beats the default clearly, else the default.

    Raises:
        NotTuned: if the default itself does not run, or is wrong.
    """
    others = [tile for tile in tiles if tile != default]
    unusable = trial.unusable([default, *others])
    _require("the default tile", default, unusable, bound, trial)
    right = [tile for tile in others if tile not in unusable and trial.error(tile) <= bound]
    timers = {tile: trial.timer(tile) for tile in [default, *right]}
    seconds = alternating(timers, ROUNDS)
    finalists = sorted(right, key=lambda tile: Spread.of(seconds[tile]).median)[:FINALISTS]
    seconds = alternating({tile: timers[tile] for tile in [default, *finalists]}, FINAL_ROUNDS)
    medians = {tile: Spread.of(seconds[tile]).median for tile in seconds}
    best = min(medians, key=medians.__getitem__)
    if not _clearly_faster(seconds[best], seconds[default]):
        best = default
    return Choice(best, medians[best], medians[default])


def choose_crossover(
    problem: Problem, default: Crossover, bound: float, trial_of: Callable[[Problem], Trial]
) -> Choice:
    """The fewest tokens from which on our GEMM is clearly faster, among those of the problem's batch, half of it, a
    quarter, ... until it is not; never if it is not for the whole batch. Seconds are those of the whole batch.

    Raises:
        NotTuned: if either of the two does not run, or is wrong.
    """
    found = CUBLAS
    medians: dict[Tile, float] = {}
    for halvings in range(problem.batch.bit_length()):
        smaller = replace(problem, batch=problem.batch >> halvings)
        trial = trial_of(smaller)
        unusable = trial.unusable([OURS, CUBLAS])
        for name, way in (("our GEMM", OURS), ("cuBLAS", CUBLAS)):
            _require(f"{name}, for {smaller.batch} samples,", way, unusable, bound, trial)
        seconds = alternating({way: trial.timer(way) for way in (OURS, CUBLAS)}, FINAL_ROUNDS)
        medians = medians or {way: Spread.of(taken).median for way, taken in seconds.items()}
        if not _clearly_faster(seconds[OURS], seconds[CUBLAS]):
            break
        # The power of two between these tokens and the half of them.
        found = Crossover(1 << ((smaller.tokens * smaller.batch).bit_length() - 1))
        del trial  # its memory, before the next takes more
    largest = problem.tokens * problem.batch
    taken, by_default = (medians[OURS if way.tokens <= largest else CUBLAS] for way in (found, default))
    return Choice(found, taken, by_default)


def _require(what: str, tile: Tile, unusable: dict[Tile, str], bound: float, trial: Trial) -> None:
    """Spilled registers make a kernel slow, not wrong."""
    if unusable.get(tile, SPILLS) != SPILLS:
        raise NotTuned(f"{what} does not run: {unusable[tile]}")
    if not (error := trial.error(tile)) <= bound:
        raise NotTuned(f"{what} is wrong: error {error:.1e}, allowed {bound:.1e}")


def _clearly_faster(seconds: Sequence[float], than: Sequence[float]) -> bool:
    return ratio(than, seconds).p20 > 1 + MARGIN


def alternating(timers: dict[Tile, Callable[[], float]], rounds: int) -> dict[Tile, list[float]]:
    """Seconds of every tile in every round, with another tile first each time and a round before for the clocks."""
    tiles = list(timers)
    seconds: dict[Tile, list[float]] = {tile: [] for tile in tiles}
    for number in range(-1, rounds):
        first = number % len(tiles)
        for tile in tiles[first:] + tiles[:first]:
            taken = timers[tile]()
            if number >= 0:
                seconds[tile].append(taken)
    return seconds


# --- candidates ------------------------------------------------------------------------------------------------------


def candidates(problem: Problem, arch: int, shared_memory: int) -> list[Tile]:
    """Tiles worth a try: of those that a kernel can run with, the ones that fit a multiprocessor.

    Args:
        problem: of an op whose kernel has a tile.
        arch: compute capability, 80, 90, ...
        shared_memory: bytes that one program may have.
    """
    op, _, channels, rows = problem.key
    kind = KINDS[op]
    tiles: Iterator[Tile]
    if kind is GemmTile:
        tiles = _gemm_tiles(op, problem.dtype, rows, arch, shared_memory)
    elif kind is RowTile:
        tiles = _row_tiles(channels)
    else:
        tiles = _sum_tiles()
    return [tile for tile in tiles if tuned_tiles.problem_of(op, tile, rows, channels) is None]


def _gemm_tiles(op: str, dtype: torch.dtype, rows: int, arch: int, shared_memory: int) -> Iterator[GemmTile]:
    sides, most_accumulators = [64, 128, 256], 128
    if dtype == torch.float32:  # fused multiply-adds: a thread has operands in its registers too
        sides, most_accumulators = [32, 64, 128], 64
        loads = [(16, 2), (16, 3), (32, 2)]  # contraction depth, and how many loads are under way or in use
    elif 90 <= arch < 110:  # where the defaults too are larger: warpgroup instructions and much shared memory
        loads = [(64, 3), (64, 4), (128, 2), (128, 3)]
    else:
        loads = [(32, 3), (32, 4), (64, 2), (64, 3)]
    # Tokens of one sample share a window, and no tile reaches beyond them.
    if op == "weight_gradient":
        heights, loads = sides, [(min(depth, rows), buffers) for depth, buffers in loads]
    else:
        heights = [min(side, rows) for side in sides]
    for m, n, (k, buffers), warps in dict.fromkeys(itertools.product(heights, sides, loads, (4, 8))):
        accumulators = m * n // (32 * warps)
        # Half the most that registers hold keeps a thread busy; samples of few tokens do not have as many.
        busy = min(most_accumulators, max(heights)) // 2 <= accumulators <= most_accumulators
        if busy and buffers * (m + n) * k * dtype.itemsize <= shared_memory:
            # A step of the weight gradient first loads its sample's start, which takes as many stages again.
            yield GemmTile(m, n, k, warps, 2 * buffers - 1 if op == "weight_gradient" else buffers)


def _sum_tiles() -> Iterator[SumTile]:
    for block, warps in itertools.product((64, 128, 256, 512, 1024), (2, 4, 8, 16)):
        if 16 <= block // warps <= 64:  # elements a thread, which has a part of 32 tokens
            yield SumTile(block, warps)


def _row_tiles(channels: int) -> Iterator[RowTile]:
    block = tuned_tiles.power_of_two(channels)
    for rows, warps in itertools.product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16)):
        if 4 <= rows * block // (32 * warps) <= 64:
            yield RowTile(rows, block, warps)


# --- on a GPU --------------------------------------------------------------------------------------------------------

SPILLS = "it spills registers"


def choose_on(problem: Problem, device: torch.device, stopwatch: Stopwatch) -> Choice:
    """Solves a problem on a GPU."""
    arch, bound = capability(torch.empty(0, device=device)), BOUNDS[problem.dtype]
    default = problem.default(arch)
    if isinstance(default, Crossover):
        return choose_crossover(problem, default, bound, lambda smaller: TrialOnGpu(smaller, device, stopwatch))
    tiles = candidates(problem, arch, max_shared_mem(device.index))
    return choose(default, tiles, bound, TrialOnGpu(problem, device, stopwatch))


class Launch(NamedTuple):
    """What a launcher was about to launch."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Of the tensors that are read and written."""
        tensors = [getattr(arg, "base", arg) for arg in self.args]  # of a tensor descriptor
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, launchers do everything but launch; what they were about to is in the list."""
    launches: list[Launch] = []

    def record(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        launches.append(Launch(kernel, programs, args, options))

    with ExitStack() as stack:
        for module in LAUNCHERS:
            stack.enter_context(mock.patch.object(module, "launch", record))
        yield launches


class TrialOnGpu:
    """Runs the tiles of a problem, in every way that the library calls the op, on buffers that L2 cannot hold."""

    def __init__(self, problem: Problem, device: torch.device, stopwatch: Stopwatch) -> None:
        self._op, self._device, self._stopwatch = problem.op, device, stopwatch
        self._pieces = pieces(Inputs(problem, device))
        self._exact = [exact for piece in self._pieces for exact in piece.exact()]
        self._rotation = list(self._pieces)
        with recorded() as launches:
            for piece in self._pieces:
                piece.launch()
        for _ in range(copies(device, sum(launch.bytes for launch in launches)) - 1):
            self._rotation += pieces(Inputs(problem, device))

    def unusable(self, tiles: Sequence[Tile]) -> dict[Tile, str]:
        """As ``Trial`` says. Compiles as many at a time as there are cores."""
        cores = os.cpu_count() or 1
        reasons: dict[Tile, str] = {}
        pool = ThreadPoolExecutor(cores)
        try:
            # The first alone: it initialises what the others share.
            for some in (tiles[:1], *(tiles[i : i + cores] for i in range(1, len(tiles), cores))):
                launches = [self._launches(tile) for tile in some]
                list(pool.map(self._compile, launches))
                reasons |= {
                    tile: reason
                    for tile, launch in zip(some, launches, strict=True)
                    if (reason := self._try(launch)) is not None
                }
        finally:
            pool.shutdown(cancel_futures=True)
        return reasons

    def error(self, tile: Tile) -> float:
        """As ``Trial`` says, for ``BOUNDS``."""
        found = itertools.chain.from_iterable(self._call(piece, tile) for piece in self._pieces)
        return largest_error(list(found), self._exact)

    def timer(self, tile: Tile) -> Callable[[], float]:
        """As ``Trial`` says."""
        return self._stopwatch.timer([partial(self._call, piece, tile) for piece in self._rotation])

    def _call(self, piece: Piece, tile: Tile) -> Sequence[Tensor]:
        with forced(self._op, tile):
            return piece.launch()

    def _launches(self, tile: Tile) -> list[Launch]:
        with recorded() as launches:
            for piece in self._pieces:
                self._call(piece, tile)
        return launches

    def _compile(self, launches: Sequence[Launch]) -> None:
        # What fails here is compiled once more by ``_try``: Python's parser, which Triton calls, can fail in threads.
        with suppress(Exception), torch.cuda.device(self._device):  # the device is a thread's own
            for kernel, programs, args, options in launches:
                kernel.warmup(*args, grid=(programs,), **options)

    def _try(self, launches: Sequence[Launch]) -> str | None:
        """Only what has been loaded says what it spills."""
        try:
            compiled = [kernel[(programs,)](*args, **options) for kernel, programs, args, options in launches]
        except Exception as error:  # too much shared memory, most of all
            return one_line(error)
        return SPILLS if any(kernel.n_spills for kernel in compiled) else None


def largest_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest error of an element over the sum of its size and its tensor's root mean square; NaN if one is."""

    def error(a: Tensor, b: Tensor) -> Tensor:
        return ((a.double() - b).abs() / (b.abs() + b.square().mean().sqrt())).max()

    return torch.stack([error(a, b) for a, b in zip(found, exact, strict=True)]).max().item()


# --- what is tuned ---------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """One way to call an op: its launcher, and the same in plain PyTorch and fp64."""

    launch: Callable[[], Sequence[Tensor]]
    exact: Callable[[], Sequence[Tensor]]


class Inputs:
    """Random inputs of a problem, with a window of its own for each sample.

    Attributes:
        B, N, C, W: samples, tokens, channels, active channels. start: int32 [B].
        channel: [B, 1, W], which channels are active, as ``gather`` and ``scatter`` take them.
        mask: [B, 1, C], 1 where active.
    """

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.op, self.dtype, self.device = problem.op, problem.dtype, device
        self.B, self.N, self.C = problem.batch, problem.tokens, problem.channels
        self.W = int(0.8 * self.C)
        self.start = torch.randint(self.C - self.W + 1, (self.B,), device=device, dtype=torch.int32)
        self.channel = (self.start[:, None] + torch.arange(self.W, device=device))[:, None]
        self.mask = torch.zeros(self.B, 1, self.C, device=device, dtype=torch.float64).scatter(2, self.channel, 1)

    def random(self, *shape: int, scale: float = 1, dtype: torch.dtype | None = None) -> Tensor:
        """Normal random numbers of standard deviation ``scale``, in the problem's dtype unless another is given."""
        return (torch.randn(shape, device=self.device) * scale).to(dtype or self.dtype)

    def statistic(self, *shape: int) -> Tensor:
        """The same in fp32."""
        return self.random(*shape, dtype=torch.float32)

    def weight(self, outputs: int, inputs: int) -> Tensor:
        """[outputs, inputs], of a scale that keeps that of activations."""
        return self.random(outputs, inputs, scale=inputs**-0.5)

    def modulation(self, count: int) -> Sequence[Tensor]:
        """Strided [B, C] views of one [B, 6C], as adaLN gives them."""
        return self.random(self.B, 6 * self.C, scale=0.5).chunk(6, dim=1)[:count]

    def compact(self, full: Tensor) -> Tensor:
        """The windows [B, N, W] of full [B, N, C], laid out as the kernels read and write them."""
        x = empty_rows(self.B, self.N, self.W, like=full, dtype=self.dtype)
        return x.copy_(self.windows(full))

    def windows(self, full: Tensor) -> Tensor:
        """[B, N, W] of [B, N, C]."""
        return full.gather(2, self.channel.expand(-1, full.shape[1], -1))

    def scattered(self, compact: Tensor) -> Tensor:
        """[B, N, C] in fp64, zero outside of the windows."""
        zeros = compact.new_zeros(self.B, self.N, self.C, dtype=torch.float64)
        return zeros.scatter(2, self.channel.expand(-1, self.N, -1), compact.double())


def pieces(inputs: Inputs) -> list[Piece]:
    """The ways in which the library calls the op, on inputs of their own."""
    return {
        "forward": lambda i: [_forward(i, gelu=False)],
        # After a window in scope "branch", on all channels in scope "block".
        "forward_gelu": lambda i: (
            [_forward(i, gelu=True)]
            + ([_ours("gelu_forward", _gelu_forward(i, write_pre=True))] if i.N >= tuned_tiles.MOST_ROWS else [])
        ),
        "input_gradient": lambda i: [_input_gradient(i)],
        "gelu_input_gradient": lambda i: [_ours("gelu_backward", _gelu_backward(i))],
        "weight_gradient": lambda i: [_weight_gradient(i)],
        "token_sums": lambda i: [_token_sums(i)],
        "norm_forward": lambda i: [_norm_forward(i, False, compact) for compact in (True, False)],
        "norm_forward_update": lambda i: [
            _norm_forward(i, True, compact, keep_branch)
            for compact, keep_branch in ((True, False), (False, False), (False, True))
        ],
        "norm_backward": lambda i: [_norm_backward(i, False, compact) for compact in (True, False)],
        "norm_backward_update": lambda i: [
            _norm_backward(i, True, compact, keep_branch, x_is_stream)
            for compact, keep_branch, x_is_stream in (
                (True, False, True),
                (True, False, False),
                (False, False, True),
                (False, False, False),
                (False, True, False),
            )
        ],
        "residual_forward": lambda i: [_residual_forward(i)],
        "residual_backward": lambda i: [_residual_backward(i)],
        "windows_forward": lambda i: [_windows_forward(i)],
        "windows_backward": lambda i: [_windows_backward(i)],
        "gelu_forward": lambda i: [_gelu_forward(i, write_pre) for write_pre in (True, False)],
        "gelu_backward": lambda i: [_gelu_backward(i)],
    }[inputs.op](inputs)


def _ours(crossover: str, piece: Piece) -> Piece:
    """The same by our GEMM, however few tokens there are."""

    def launch() -> Sequence[Tensor]:
        with forced(crossover, OURS):
            return piece.launch()

    return piece._replace(launch=launch)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _forward(i: Inputs, gelu: bool) -> Piece:
    outputs = (4 if gelu else 3) * i.C
    u, weight = i.compact(i.random(i.B, i.N, i.C)), i.weight(outputs, i.C)
    mean_rstd, p, q = i.statistic(i.B, i.N), i.statistic(i.B, outputs), i.statistic(i.B, outputs)

    def launch() -> Sequence[Tensor]:
        return window_linear._launch_forward(u, weight, q, i.start, mean_rstd, p, gelu, write_out=True)[: 1 + gelu]

    def exact() -> Sequence[Tensor]:
        out = i.scattered(u) @ weight.double().t() + q[:, None] - mean_rstd[..., None].double() * p[:, None]
        return (out, _gelu(out)) if gelu else (out,)

    return Piece(launch, exact)


def _gelu_forward(i: Inputs, write_pre: bool) -> Piece:
    u, weight, bias = i.random(i.B, i.N, i.C), i.weight(4 * i.C, i.C), i.random(4 * i.C)
    shift, scale = i.modulation(2)
    first = 0 if write_pre else 1

    def launch() -> Sequence[Tensor]:
        return window_linear.linear_gelu_forward(u, None, shift, scale, weight, bias, None, write_pre)[first:]

    def exact() -> Sequence[Tensor]:
        out = F.linear(u.double(), weight.double(), bias.double())
        return (out, _gelu(out))[first:]

    return Piece(launch, exact)


def _input_gradient(i: Inputs) -> Piece:
    g, weight = i.random(i.B, i.N, 3 * i.C), i.weight(3 * i.C, i.C)

    def launch() -> Sequence[Tensor]:
        du = empty_rows(i.B, i.N, i.W, like=g, dtype=g.dtype)
        return window_linear._launch_input_gradient(g, weight, i.start, du, None)[:1]

    return Piece(launch, lambda: (i.windows(g.double() @ weight.double()),))


def _gelu_backward(i: Inputs) -> Piece:
    g, weight, pre = i.random(i.B, i.N, i.C), i.weight(i.C, 4 * i.C), i.random(i.B, i.N, 4 * i.C)

    def exact() -> Sequence[Tensor]:
        wide = pre.double().requires_grad_()
        act = _gelu(wide)
        return torch.autograd.grad(act, wide, g.double() @ weight.double())[0], act.detach()

    return Piece(lambda: window_linear.gelu_linear_backward(g, pre, weight), exact)


def _weight_gradient(i: Inputs) -> Piece:
    g, u = i.random(i.B, i.N, 3 * i.C), i.compact(i.random(i.B, i.N, i.C))

    def exact() -> Sequence[Tensor]:
        return (g.double().flatten(0, 1).t() @ i.scattered(u).flatten(0, 1),)

    return Piece(lambda: (window_linear._launch_weight_gradient(g, u, i.start, i.C),), exact)


def _token_sums(i: Inputs) -> Piece:
    g, mean_rstd, p = i.random(i.B, i.N, 3 * i.C), i.statistic(i.B, i.N), i.statistic(i.B, 3 * i.C)

    def exact() -> Sequence[Tensor]:
        wide = g.double()
        inactive = torch.linalg.vecdot(wide, p.double()[:, None])
        return inactive, -(mean_rstd.double()[..., None] * wide).sum(1), wide.sum(1)

    return Piece(lambda: window_linear._launch_token_sums(g, mean_rstd, p), exact)


class Norm(NamedTuple):
    """What the norm computes, in fp64: stream and u [B, N, C], mean and rstd [B, N]."""

    stream: Tensor
    u: Tensor
    mean: Tensor
    rstd: Tensor


def _norm(i: Inputs, tensors: Sequence[Tensor | None], keep_branch: bool) -> Norm:
    """Of x, branch, gate, shift and scale in fp64; branch and gate may be None."""
    x, branch, gate, shift, scale = tensors
    assert x is not None and shift is not None and scale is not None
    update = 0 if branch is None or gate is None else gate[:, None] * branch
    v = i.mask * x + update if keep_branch else i.mask * (x + update)
    mean = v.mean(-1, keepdim=True)
    rstd = (v.var(-1, correction=0, keepdim=True) + _EPS) ** -0.5
    u = (v - mean) * rstd * (1 + scale[:, None]) + shift[:, None]
    return Norm(x + update, u, mean[..., 0], rstd[..., 0])


def _norm_inputs(i: Inputs, update: bool) -> list[Tensor | None]:
    """x, branch, gate, shift and scale."""
    x, (gate, shift, scale) = i.random(i.B, i.N, i.C), i.modulation(3)
    return [x, i.random(i.B, i.N, i.C), gate, shift, scale] if update else [x, None, None, shift, scale]


def _in_fp64(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def _norm_forward(i: Inputs, update: bool, compact: bool, keep_branch: bool = False) -> Piece:
    inputs = _norm_inputs(i, update)

    def launch() -> Sequence[Tensor]:
        stream, *others = gated_norm.gated_norm_forward(*inputs, i.start, i.W, _EPS, i.dtype, compact, keep_branch)
        return [stream, *others] if update else others

    def exact() -> Sequence[Tensor]:
        stream, u, mean, rstd = _norm(i, _in_fp64(inputs), keep_branch)
        others = (i.windows(u) if compact else u, mean, rstd)
        return (stream, *others) if update else others

    return Piece(launch, exact)


def _norm_with_gradients(
    i: Inputs, inputs: Sequence[Tensor | None], keep_branch: bool, x_is_stream: bool
) -> tuple[list[Tensor], Norm]:
    """The inputs that there are, in fp64 and with gradients, and the outputs."""
    wide = _in_fp64(inputs)
    if x_is_stream:
        wide[0] -= wide[2][:, None] * wide[1]  # type: ignore[index, operator]
    leaves = [t.requires_grad_() for t in wide if t is not None]
    return leaves, _norm(i, wide, keep_branch)


def _statistics(i: Inputs, inputs: Sequence[Tensor | None], keep_branch: bool, x_is_stream: bool) -> list[Tensor]:
    """The norm's mean and rstd, as its forward pass keeps them."""
    with torch.no_grad():
        return [t.float() for t in _norm_with_gradients(i, inputs, keep_branch, x_is_stream)[1][2:]]


def _norm_backward(
    i: Inputs, update: bool, compact: bool, keep_branch: bool = False, x_is_stream: bool = False
) -> Piece:
    inputs = _norm_inputs(i, update)
    x, branch, gate, _, scale = inputs
    assert scale is not None
    dstream, full_du = i.random(i.B, i.N, i.C), i.random(i.B, i.N, i.C)
    du = i.compact(full_du) if compact else full_du
    # What the linear layer knows of deactivated channels: the sum of the gradients of the norm's output.
    inactive = (full_du.double() * (1 + scale.double()[:, None]) * (1 - i.mask)).sum(-1).float()
    mean, rstd = _statistics(i, inputs, keep_branch, x_is_stream)

    def launch() -> Sequence[Tensor]:
        found = gated_norm.gated_norm_backward(
            du,
            dstream,
            inactive if compact else None,
            x,
            branch,
            gate,
            scale,
            mean,
            rstd,
            i.start,
            i.W,
            compact,
            keep_branch,
            x_is_stream,
        )
        return [t for t in found if t is not None]

    def exact() -> Sequence[Tensor]:
        leaves, norm = _norm_with_gradients(i, inputs, keep_branch, x_is_stream)
        *others, dshift, dscale = torch.autograd.grad(
            (norm.stream, norm.u), leaves, (dstream.double(), full_du.double())
        )
        # Of deactivated channels the linear layer adds these.
        seen = i.mask[:, 0] if compact else 1
        return *others, dshift * seen, dscale * seen

    return Piece(launch, exact)


def _windows_forward(i: Inputs) -> Piece:
    inputs, weight, bias = _norm_inputs(i, update=True), i.weight(3 * i.C, i.C), i.random(3 * i.C)

    def launch() -> Sequence[Tensor]:
        return torch.ops.dtr_kernels.routed_linear(*inputs, weight, bias, i.start, i.W, _EPS)

    def exact() -> Sequence[Tensor]:
        norm = _norm(i, _in_fp64(inputs), keep_branch=False)
        return norm.stream, F.linear(norm.u, weight.double(), bias.double()), norm.mean, norm.rstd

    return Piece(launch, exact)


def _windows_backward(i: Inputs) -> Piece:
    inputs, weight, bias = _norm_inputs(i, update=True), i.weight(3 * i.C, i.C), i.random(3 * i.C)
    dstream, dout = i.random(i.B, i.N, i.C), i.random(i.B, i.N, 3 * i.C)
    mean_rstd = _statistics(i, inputs, keep_branch=False, x_is_stream=True)

    def launch() -> Sequence[Tensor]:
        return torch.ops.dtr_kernels.routed_linear_backward(
            dstream, dout, *inputs, weight, *mean_rstd, i.start, i.W, _EPS, True, True
        )

    def exact() -> Sequence[Tensor]:
        leaves, norm = _norm_with_gradients(i, inputs, keep_branch=False, x_is_stream=True)
        parameters = [t.double().requires_grad_() for t in (weight, bias)]
        outputs, gradients = (norm.stream, F.linear(norm.u, *parameters)), (dstream.double(), dout.double())
        return torch.autograd.grad(outputs, [*leaves, *parameters], gradients)

    return Piece(launch, exact)


def _residual_forward(i: Inputs) -> Piece:
    x, branch, (gate,) = i.random(i.B, i.N, i.C), i.random(i.B, i.N, i.C), i.modulation(1)

    def exact() -> Sequence[Tensor]:
        return (x.double() + gate.double()[:, None] * branch.double(),)

    return Piece(lambda: (gated_residual.gated_residual_forward(x, branch, gate),), exact)


def _residual_backward(i: Inputs) -> Piece:
    dout, branch, (gate,) = i.random(i.B, i.N, i.C), i.random(i.B, i.N, i.C), i.modulation(1)

    def exact() -> Sequence[Tensor]:
        return dout.double() * gate.double()[:, None], (dout.double() * branch.double()).sum(1)

    return Piece(lambda: gated_residual.gated_residual_backward(dout, branch, gate), exact)
