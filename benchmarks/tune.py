"""``python -m benchmarks tune``: find the fastest tile of every Triton kernel on this machine's GPU, and the number of
tokens from which on our GEMMs beat cuBLAS.

A candidate must compile, spill no registers and agree with plain PyTorch in fp64. It replaces the default tile only if
it is faster by more than the scatter of the measurements. Crossovers are timed after the tiles, with the tuned tiles.

Times are of CUDA graphs whenever a call can be recorded, without the host's time to launch kernels. A small batch that
runs without graphs may wait for the host longer than its kernels take; crossovers do not take that into account.
"""

from __future__ import annotations

import argparse
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
from typing import Any, NamedTuple, get_args

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.compiler.compiler import max_shared_mem

from benchmarks import environment, sources
from benchmarks.arguments import positive, share
from benchmarks.cases import DTYPES, dtype_name
from benchmarks.measure import BAR, one_line
from benchmarks.timing import Spread, Stopwatch, copies, ratio
from dtr_kernels import ops
from dtr_kernels.nn import DiT_models
from dtr_kernels.ops import tuned_tiles
from dtr_kernels.ops.declaration import Draw, Kernel, Mode, Precision, Sizes, results, widened
from dtr_kernels.ops.dispatch import Launch, capability, recording
from dtr_kernels.ops.tiles import KINDS, crossovers, forced, instead_of_users
from dtr_kernels.ops.tuned_tiles import NEVER, Crossover, GemmTile, Measurement, RowTile, SumTile, Tile, Tuned
from dtr_kernels.ops.window_linear import WindowsOp

MODELS = ("DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2")
# Shares of active channels for which the crossovers of windows are found; all else is tuned at 0.8.
BETAS = (0.2, 0.5, 0.8)
# In four of five rounds a tile must be faster than the default by this share, and our GEMM than cuBLAS.
MARGIN = 0.02
# Rounds that select the finalists among the candidates, and rounds that compare the finalists with the default.
ROUNDS, FINAL_ROUNDS, FINALISTS = 7, 40, 4
# The largest error of an element, relative to its size and that of the others: several roundings, in fp32 those of
# tf32, where that is allowed. Elements that a wrong tile computes are off by about one.
BOUNDS = {torch.float32: 0.005, torch.bfloat16: 0.03, torch.float16: 0.005}
# The two ways of an op with a crossover.
OURS, CUBLAS = Crossover(1), Crossover(NEVER)


class NotTuned(Exception):
    """Raised with the reason why a problem has no result."""


@dataclass(frozen=True)
class Problem:
    """A search for the best tile of one op, on a batch of ``batch`` samples with ``tokens`` tokens of ``channels``, a
    share ``beta`` of them active; or for its crossover, up to that batch."""

    op: str
    dtype: torch.dtype
    channels: int
    tokens: int
    batch: int
    beta: float = 0.8

    @property
    def sizes(self) -> Sizes:
        """The sizes of the batch."""
        return Sizes(self.batch, self.tokens, self.channels, self.beta)

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        """The key of the entry that holds the result."""
        # fc2's input gradient has no window: its rows are the tokens of all samples. Rows of closed forms are samples.
        own_rows = {"gelu_input_gradient": self.tokens * self.batch, "closed_form": self.batch}
        rows = own_rows.get(self.op, self.tokens)
        channels = self.channels * (3 if self.op == "token_sums" else 1)
        active = tuned_tiles.active_share(self.sizes.W, self.channels) if self.op in get_args(WindowsOp) else 100
        return self.op, str(self.dtype).removeprefix("torch."), channels, tuned_tiles.rows_class(rows), active

    def default(self, arch: int) -> Tile:
        """Return the default tile."""
        op, _, channels, rows, active = self.key
        return KINDS[op].default(self.dtype, rows, channels, arch, active)

    def __str__(self) -> str:
        precision = dtype_name(self.dtype)
        return f"{self.op} {precision}, {self.channels} channels, beta {self.beta:g}, {self.tokens} tokens"


class Choice(NamedTuple):
    """The chosen tile or crossover, and seconds of a call with it and with the default."""

    tile: Tile
    seconds: float
    default_seconds: float


# --- command line ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tune``."""
    parser.add_argument("--model", nargs="+", default=MODELS, metavar="NAME", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--dtype", nargs="+", default=("bf16", "fp32"), choices=DTYPES, help="default: bf16 fp32")
    parser.add_argument(
        "--batch",
        type=positive,
        default=32,
        metavar="B",
        help="samples in a batch, for crossovers also half of them, a quarter, ...; default: 32",
    )
    parser.add_argument(
        "--beta",
        nargs="+",
        type=share,
        default=BETAS,
        metavar="RATIO",
        help="active channels over all channels, for crossovers of windows; default: 0.2 0.5 0.8",
    )
    parser.add_argument("--ops", nargs="+", default=tuple(KINDS), choices=KINDS, metavar="OP", help=", ".join(KINDS))
    parser.add_argument("--seconds", type=positive, help="start nothing more after as long, and keep what is tuned")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to add to; default: in the user's cache")


def main(arguments: argparse.Namespace) -> int:
    """Tune, and return the exit status: 0; 1 if something could not be tuned; 130 after Ctrl-C.

    Raises:
        ValueError: if there is no GPU, no model of a given name, or nothing can be added to the file.
    """
    problems = problems_of(arguments.model, arguments.dtype, arguments.ops, arguments.batch, arguments.beta)
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
    """Return the user's file for a GPU.

    Raises:
        ValueError: if the user's home, and so the file's place, is unknown.
    """
    path = tuned_tiles.user_file(gpu)
    if path.parts[0] == "~":
        raise ValueError(
            "the home folder is unknown, and with it the user's cache; set DTR_KERNELS_CACHE to a folder, "
            "or choose a file with --out"
        )
    return path


def problems_of(
    models: Sequence[str], precisions: Sequence[str], names: Sequence[str], batch: int, betas: Sequence[float]
) -> list[Problem]:
    """List the problems without duplicates; the crossovers of a model in a dtype follow its tiles, those of windows for
    each beta.

    Raises:
        ValueError: if there is no model of a given name.
    """
    problems: dict[tuple[Any, ...], Problem] = {}
    names = sorted(names, key=lambda op: op in crossovers())
    for model, precision, op in itertools.product(models, precisions, names):
        if model not in DiT_models:
            raise ValueError(f"argument --model: there is no {model}; there are {', '.join(DiT_models)}")
        size = DiT_models[model].keywords  # type: ignore[attr-defined]
        # Tokens of 32 x 32 latents, which images of 256 x 256 have.
        problem = Problem(op, DTYPES[precision], size["hidden_size"], (32 // size["patch_size"]) ** 2, batch)
        for beta in betas if op in get_args(WindowsOp) else [problem.beta]:
            tuned = replace(problem, beta=beta)
            problems.setdefault(tuned.key, tuned)
    return list(problems.values())


def measurement_on(device: torch.device) -> Measurement:
    """Describe a measurement on ``device`` now, as a file of tiles stores it."""
    facts = environment.describe(device)
    modules = sorted({kernel.inputs.__module__ for op in KINDS for kernel, _ in kernels_of(op)})
    return Measurement(
        gpu=facts["device"],
        capability=capability(torch.empty(0, device=device)),
        triton=triton.__version__,
        sources=sources.fingerprint_of(*modules),
        **{name: facts[name] for name in ("torch", "commit", "date", "command")},
    )


@dataclass
class Tuning:
    """A file to which tuned tiles are added as they are found; entries of other problems stay.

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
            what = f"{self.path}: {error.strerror}" if isinstance(error, OSError) else error
            raise ValueError(f"{what}; delete it, or choose another file with --out") from error

    def run(
        self, problems: Sequence[Problem], choose: Callable[[Problem], Choice], seconds: float | None = None
    ) -> None:
        """Solve problems until Ctrl-C, or until ``seconds`` have passed before the next one."""
        start = time.perf_counter()
        progress = tqdm(problems, "tuning", **BAR)
        try:
            for problem in progress:
                if seconds is not None and time.perf_counter() - start > seconds:
                    return
                progress.set_postfix_str(str(problem))
                try:
                    with instead_of_users(self.path):
                        choice = choose(problem)
                except (NotTuned, RuntimeError) as error:  # such as too little memory
                    self.failures[problem] = str(error).strip().partition("\n")[0]
                else:
                    op, dtype, channels, rows, active = problem.key
                    self.found.append(Tuned(op, dtype, channels, rows, active, *choice, self.measurement))
                    # Read again, since another process may have added to it.
                    tuned_tiles.write(self.path, tuned_tiles.merged(self._stored(), self.found))
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            progress.close()


def table(found: Sequence[Tuned]) -> str:
    """Format the results as a table, a line for each problem."""
    lines = [
        f"{'op':22} {'dtype':9} {'width':>5} {'rows':>4} {'active':>6} {'default':>10} {'best':>10} {'gain':>6}  tile"
    ]
    for entry in found:
        default, best = (f"{1e6 * seconds:.1f} µs" for seconds in (entry.default_seconds, entry.seconds))
        gain = f"{entry.default_seconds / entry.seconds - 1:.1%}"
        tile = " ".join(f"{name} {value}" for name, value in entry.tile._asdict().items())
        if isinstance(entry.tile, Crossover):
            tile = str(entry.tile)
        op, dtype, width, rows, active = entry.key
        lines.append(f"{op:22} {dtype:9} {width:5} {rows:4} {active:5}% {default:>10} {best:>10} {gain:>6}  {tile}")
    return "\n".join(lines)


# --- choosing --------------------------------------------------------------------------------------------------------


def choose(default: Tile, tiles: Sequence[Tile], bound: float, trial: TrialOnGpu) -> Choice:
    """Return the fastest usable and correct tile if it clearly beats the default, else the default.

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
    problem: Problem, default: Crossover, bound: float, trial_of: Callable[[Problem], TrialOnGpu]
) -> Choice:
    """Return the fewest tokens from which on our GEMM is clearly faster; never, if it is not for the whole batch.

    Tries the problem's batch, half of it, a quarter, ... until our GEMM is no longer faster. Seconds are those of the
    whole batch.

    Raises:
        NotTuned: if our GEMM or cuBLAS does not run, or is wrong.
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
        # The power of two between half of these tokens and all of them.
        found = Crossover(1 << ((smaller.tokens * smaller.batch).bit_length() - 1))
        del trial  # free its memory before the next one
    largest = problem.tokens * problem.batch
    taken, by_default = (medians[OURS if way.tokens <= largest else CUBLAS] for way in (found, default))
    return Choice(found, taken, by_default)


def _require(what: str, tile: Tile, unusable: dict[Tile, str], bound: float, trial: TrialOnGpu) -> None:
    """Raise NotTuned unless a tile runs and is right; spilled registers make a kernel slow, not wrong."""
    if unusable.get(tile, SPILLS) != SPILLS:
        raise NotTuned(f"{what} does not run: {unusable[tile]}")
    if not (error := trial.error(tile)) <= bound:
        raise NotTuned(f"{what} is wrong: error {error:.1e}, allowed {bound:.1e}")


def _clearly_faster(seconds: Sequence[float], than: Sequence[float]) -> bool:
    return ratio(than, seconds).p20 > 1 + MARGIN


def alternating(timers: dict[Tile, Callable[[], float]], rounds: int) -> dict[Tile, list[float]]:
    """Time every tile in every round, with another tile first each time, after a warm-up round for the clocks."""
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
    """Return tiles worth a try: tiles with which a kernel can run and that fit a multiprocessor.

    Args:
        problem: of an op whose kernel has a tile.
        arch: compute capability, 80, 90, ...
        shared_memory: bytes that one program may have.
    """
    op, _, channels, rows, _ = problem.key
    kind = KINDS[op].type
    tiles: Iterator[Tile]
    if kind is GemmTile:
        tiles = _gemm_tiles(op, problem.dtype, rows, arch, shared_memory)
    elif kind is RowTile:
        tiles = _row_tiles(channels)
    else:
        tiles = _sum_tiles()
    return [tile for tile in tiles if KINDS[op].problem(tile, rows, channels) is None]


def _gemm_tiles(op: str, dtype: torch.dtype, rows: int, arch: int, shared_memory: int) -> Iterator[GemmTile]:
    sides, most_accumulators = [64, 128, 256], 128
    if dtype == torch.float32:  # fused multiply-adds keep operands in registers too
        sides, most_accumulators = [32, 64, 128], 64
        loads = [(16, 2), (16, 3), (32, 2)]  # contraction depth, and loads in flight or in use
    elif 90 <= arch < 110:  # larger, like the defaults: warpgroup instructions, much shared memory
        loads = [(64, 3), (64, 4), (128, 2), (128, 3)]
    else:
        loads = [(32, 3), (32, 4), (64, 2), (64, 3)]
    # Tokens of one sample share a window, and no tile extends beyond them.
    if op == "weight_gradient":
        heights, loads = sides, [(min(depth, rows), buffers) for depth, buffers in loads]
    else:
        heights = [min(side, rows) for side in sides]
    for m, n, (k, buffers), warps in dict.fromkeys(itertools.product(heights, sides, loads, (4, 8))):
        accumulators = m * n // (32 * warps)
        # At least half of the registers' capacity keeps a thread busy; samples of few tokens have less to do.
        busy = min(most_accumulators, max(heights)) // 2 <= accumulators <= most_accumulators
        if busy and buffers * (m + n) * k * dtype.itemsize <= shared_memory:
            # A step of the weight gradient first loads its sample's start, which doubles the stages.
            yield GemmTile(m, n, k, warps, 2 * buffers - 1 if op == "weight_gradient" else buffers)


def _sum_tiles() -> Iterator[SumTile]:
    for block, warps in itertools.product((64, 128, 256, 512, 1024), (2, 4, 8, 16)):
        if 16 <= block // warps <= 64:  # elements per thread, over a part of 32 tokens
            yield SumTile(block, warps)


def _row_tiles(channels: int) -> Iterator[RowTile]:
    block = tuned_tiles.power_of_two(channels)
    for rows, warps in itertools.product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16)):
        if 4 <= rows * block // (32 * warps) <= 64:
            yield RowTile(rows, block, warps)


# --- on a GPU --------------------------------------------------------------------------------------------------------

SPILLS = "it spills registers"


def choose_on(problem: Problem, device: torch.device, stopwatch: Stopwatch) -> Choice:
    """Solve a problem on a GPU."""
    arch, bound = capability(torch.empty(0, device=device)), BOUNDS[problem.dtype]
    default = problem.default(arch)
    if isinstance(default, Crossover):
        return choose_crossover(problem, default, bound, lambda smaller: TrialOnGpu(smaller, device, stopwatch))
    tiles = candidates(problem, arch, max_shared_mem(device.index))
    return choose(default, tiles, bound, TrialOnGpu(problem, device, stopwatch))


def bytes_of(launch: Launch) -> int:
    """Count the bytes of the tensors that a launch reads and writes."""
    tensors = [getattr(arg, "base", arg) for arg in launch.args]  # a descriptor's tensor
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


class TrialOnGpu:
    """Runs the tiles of a problem in every mode in which training and sampling call its kernels, on buffers larger than
    the L2 cache."""

    def __init__(self, problem: Problem, device: torch.device, stopwatch: Stopwatch) -> None:
        self._op, self._device, self._stopwatch = problem.op, device, stopwatch
        self._calls = self._rotation = calls_of(problem, device)
        self._exact = [
            exact_of(kernel, call) for (kernel, _), call in zip(kernels_of(problem.op), self._calls, strict=True)
        ]
        with recording() as launches:
            for call in self._calls:
                call()
        for _ in range(copies(device, sum(map(bytes_of, launches))) - 1):
            self._rotation = self._rotation + calls_of(problem, device)

    def unusable(self, tiles: Sequence[Tile]) -> dict[Tile, str]:
        """Return why some of the tiles cannot be used: they do not compile, do not fit, or spill registers.

        Compiles as many tiles at a time as there are cores.
        """
        cores = os.cpu_count() or 1
        reasons: dict[Tile, str] = {}
        pool = ThreadPoolExecutor(cores)
        try:
            # The first tile alone: it initialises state that the others share.
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
        """Return the largest error of an element, for ``BOUNDS``."""
        found = [results(self._run(call, tile)) for call in self._calls]
        return largest_error(list(itertools.chain(*found)), list(itertools.chain(*self._exact)))

    def timer(self, tile: Tile) -> Callable[[], float]:
        """Return a function that runs the tile and returns the seconds of a call."""
        return self._stopwatch.timer([partial(self._run, call, tile) for call in self._rotation])

    def _run(self, call: Callable[[], Any], tile: Tile) -> Any:
        with forced(self._op, tile), _by_our_gemm(self._op):
            return call()

    def _launches(self, tile: Tile) -> list[Launch]:
        with recording() as launches:
            for call in self._calls:
                self._run(call, tile)
        return launches

    def _compile(self, launches: Sequence[Launch]) -> None:
        # ``_try`` compiles again what fails here: Python's parser, which Triton calls, can fail in threads.
        with suppress(Exception), torch.cuda.device(self._device):  # each thread has its own current device
            for kernel, programs, args, options in launches:
                kernel.warmup(*args, grid=(programs,), **options)

    def _try(self, launches: Sequence[Launch]) -> str | None:
        """Launch a tile and return why it cannot be used; only loaded kernels report spills."""
        try:
            compiled = [kernel[(programs,)](*args, **options) for kernel, programs, args, options in launches]
        except Exception as error:  # mostly too much shared memory
            return one_line(error)
        return SPILLS if any(kernel.n_spills for kernel in compiled) else None


def largest_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest error of an element over the sum of its size and its tensor's root mean square, or NaN."""

    def error(a: Tensor, b: Tensor) -> Tensor:
        if not b.is_floating_point():  # an index, u's first channel
            return (a != b).any().double()
        return ((a.double() - b).abs() / (b.abs() + b.square().mean().sqrt())).max()

    return torch.stack([error(a, b) for a, b in zip(found, exact, strict=True)]).max().item()


# --- kernels of an op ------------------------------------------------------------------------------------------------


def kernels_of(op: str) -> list[tuple[Kernel, Mode]]:
    """Return the first declared kernel that runs with the op's tile or has its crossover, in its modes. Other such
    kernels, the layers over heads, use its result."""
    for kernel in ops.KERNELS:
        modes = [mode for mode in kernel.modes if kernel.timed(**mode)]
        found = [mode for mode in modes if op in kernel.tiles(**mode) or op == kernel.crossover]
        if found:
            return [(kernel, mode) for mode in found]
    return []


def calls_of(problem: Problem, device: torch.device) -> list[partial[Any]]:
    """Return calls of these kernels, each on its own arguments."""
    draw = Draw(problem.sizes, Precision(problem.dtype, problem.dtype), device)
    return [partial(kernel.launch, **kernel.inputs(draw, **mode)) for kernel, mode in kernels_of(problem.op)]


def exact_of(kernel: Kernel, call: partial[Any]) -> list[Tensor]:
    """Compute the exact result of a call in fp64."""
    return results(kernel.exact(**widened(call.keywords)))


@contextmanager
def _by_our_gemm(op: str) -> Iterator[None]:
    """Run a tile's kernel for any number of tokens while the context is open."""
    with ExitStack() as stack:
        for crossover in {kernel.crossover for kernel, mode in kernels_of(op) if op in kernel.tiles(**mode)}:
            if crossover is not None:
                stack.enter_context(forced(crossover, OURS))
        yield
