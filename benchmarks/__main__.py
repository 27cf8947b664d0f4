"""Command line: ``python -m benchmarks list`` and ``python -m benchmarks run [names...]``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import environment, surgery_projection, surgery_step
from benchmarks.cases import DTYPES, Benchmark, Case, Options
from benchmarks.measure import Rounds, measure
from benchmarks.results import CaseResult, Run
from benchmarks.timing import Copy

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (surgery_projection.BENCHMARK, surgery_step.BENCHMARK)
}
# Bytes that the measured copy moves; a quick run does not wait for more.
COPY_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30, "quick": 1 << 28}
_RESULTS = Path(__file__).parent / "results"
_QUICK_RESULTS = Path("out/benchmarks")


def main(command_line: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0; 1 if a side was wrong or broke; 130 after Ctrl-C."""
    parser = _parser()
    arguments = parser.parse_args(command_line)
    if arguments.command == "list":
        for benchmark in BENCHMARKS.values():
            print(f"{benchmark.name:24} {benchmark.summary}")
        return 0
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]}; there are {', '.join(BENCHMARKS)}")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: PyTorch finds no CUDA device here; use --device cpu")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    options = Options(device, dtype, arguments.quick, arguments.model, arguments.batch)
    results = _QUICK_RESULTS if arguments.quick else _RESULTS
    folder = arguments.out or results / environment.folder_name(device)
    benchmarks = [BENCHMARKS[name] for name in arguments.names or BENCHMARKS]
    try:
        builders = [benchmark.cases(options) for benchmark in benchmarks]
    except ValueError as error:
        parser.error(str(error))
    fixed = arguments.rounds or (3 if options.quick else None)
    rounds = Rounds(fixed, fixed, 0) if fixed else Rounds(least=5, most=50, seconds=60)
    status = 0
    for benchmark, build in zip(benchmarks, builders, strict=True):
        run = run_benchmark(benchmark, build, options, rounds, folder)
        if run.interrupted:
            return 130
        status |= run.failed
    return status


def run_benchmark(
    benchmark: Benchmark, builders: Sequence[Callable[[], Case]], options: Options, rounds: Rounds, folder: Path
) -> Run:
    """Measures cases, prints their tables and saves them as they come."""
    run = Run(benchmark.name, benchmark.summary, environment.describe(options.device))
    copy = Copy(options.device, COPY_BYTES["quick" if options.quick else options.device.type])
    try:
        for build in builders:
            case = build()
            run.cases.append(result := CaseResult(case, copy.bytes_moved))
            measure(case, result, rounds, options.device, copy)
            del case  # its tensors make room for the next case's
            print(result.markdown(), flush=True)
            run.save(folder)
    except KeyboardInterrupt:
        run.interrupted = True
        if run.cases:
            print(run.cases[-1].markdown())
        print("interrupted", file=sys.stderr)
    # What an interrupt left without a figure does not replace what an earlier run measured.
    if not run.interrupted or any(case.copy_seconds for case in run.cases):
        run.save(folder)
        print(f"{benchmark.name}: results are in {folder}")
    return run


def _parser() -> argparse.ArgumentParser:
    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
        return int(text)

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure the library on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what can be measured")
    run = commands.add_parser("run", help="check, time and compare; Ctrl-C keeps what was measured")
    run.add_argument("names", nargs="*", help="benchmarks; default: all")
    run.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    run.add_argument("--dtype", choices=list(DTYPES), help="of gradients and models; default: the benchmark's own")
    run.add_argument("--quick", action="store_true", help="small sizes and few rounds, to see that everything works")
    run.add_argument("--rounds", type=positive, help="how often every side is timed; default: 5 or for a minute")
    run.add_argument("--threads", type=positive, help="CPU threads; default: PyTorch's choice")
    run.add_argument("--model", help="for training steps: tiny, DiT-S/2, ...")
    run.add_argument("--batch", type=positive, help="for training steps: samples in a batch")
    run.add_argument(
        "--out",
        type=Path,
        help="folder for the results; default: the device's in benchmarks/results, or in out/benchmarks with --quick",
    )
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit keeps what was measured, as Ctrl-C does
    sys.exit(main())
