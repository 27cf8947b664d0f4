"""Command line: ``python -m benchmarks list | run | report | static | tune | study``."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, report, sources, static, study, tune
from benchmarks.arguments import positive
from benchmarks.cases import Benchmark, Case, Options, add_axes, asked
from benchmarks.measure import Bench, Rounds
from benchmarks.results import Run
from benchmarks.suite import BENCHMARKS
from benchmarks.tables import case_table
from dtr_kernels.files import locked

_RESULTS = Path(__file__).parent / "results"
_OTHER_RESULTS = Path("out/benchmarks")


def main(command_line: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0; 1 if a side was wrong or failed; 130 after Ctrl-C."""
    parser, commands = _parsers()
    arguments = parser.parse_args(command_line)
    try:
        return arguments.function(arguments)
    except (ValueError, OSError) as error:
        commands[arguments.command].error(str(error))


def list_benchmarks(_: argparse.Namespace) -> int:
    """Print the benchmarks' names and summaries."""
    for benchmark in BENCHMARKS.values():
        print(f"{benchmark.name:20} {benchmark.summary}")
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Run benchmarks.

    Raises:
        ValueError: before anything is measured, if the arguments do not fit a benchmark, or another run uses the
            folder.
        OSError: if results cannot be written.
    """
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        raise ValueError(f"there is no benchmark {unknown[0]}; there are {', '.join(BENCHMARKS)}")
    device = torch.device(arguments.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("argument --device: PyTorch finds no CUDA device here; use --device cpu")
        device = torch.device("cuda", torch.cuda.current_device())
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    options = Options(device, arguments.quick, **asked(arguments))
    builders = {}
    for name in arguments.names or BENCHMARKS:
        try:
            builders[name] = BENCHMARKS[name].cases(options)
        except ValueError as error:
            if arguments.names:
                raise
            print(f"{name} is left out: {error}")
    rounds = Rounds(3, 3, 0) if options.quick else Rounds(least=5, most=50, seconds=arguments.seconds)
    if arguments.rounds:
        rounds = Rounds(arguments.rounds, arguments.rounds, 0)
    # Only complete benchmarks replace the results in the checkout.
    partial_run = options.quick or options.asked or arguments.skip
    folder = arguments.out or (_OTHER_RESULTS if partial_run else _RESULTS) / environment.folder_name(device)
    bench = Bench(device, options.quick)
    status = 0
    # A quick run on a CPU captures graphs but skips the C++ compiler, which takes minutes.
    backend = "aot_eager" if options.quick and device.type == "cpu" else None
    busy = f"another run puts its results into {folder}; wait until it has ended, or give another --out"
    with locked(folder / "run", busy):
        for name, build in builders.items():
            cases = [partial(_without, arguments.skip, builder) for builder in build]
            with torch.compiler.set_stance("default", force_backend=backend):
                finished = run_benchmark(BENCHMARKS[name], cases, bench, rounds, folder, environment.describe(device))
            if finished.interrupted:
                return 130
            status |= finished.failed
    return status


def _without(skipped: Sequence[str], build: Callable[[], Case]) -> Case:
    """Return a case without the sides whose names contain one of ``skipped``."""
    case = build()
    return replace(case, sides=[side for side in case.sides if not any(text in side.name for text in skipped)])


def run_benchmark(
    benchmark: Benchmark,
    builders: Sequence[Callable[[], Case]],
    bench: Bench,
    rounds: Rounds,
    folder: Path,
    where: dict[str, Any],
) -> Run:
    """Measure cases, print their tables and save them as they complete."""
    run = Run(benchmark.name, benchmark.summary, sources.fingerprint(benchmark), where)
    try:
        for number, build in enumerate(builders, start=1):
            try:
                case = build()
            except Exception as error:  # mostly too little memory
                traceback.print_exc()
                run.cases.append(bench.not_built(f"case {number} of {len(builders)}", error))
                continue
            run.cases.append(result := bench.result_of(case))
            bench.measure(case, result, rounds)
            del case  # frees its tensors for the next case
            print(case_table(result), flush=True)
            run.save(folder, unfinished=True)
    except KeyboardInterrupt:
        run.interrupted = True
        if run.cases:
            run.cases[-1].drop_incomplete_round()
            print(case_table(run.cases[-1]))
        print("interrupted", file=sys.stderr)
    # An interrupted run does not replace the results of a complete one.
    earlier = (folder / f"{benchmark.name}.json").exists()
    if not run.interrupted or any(case.copy.seconds for case in run.cases):
        print(f"{benchmark.name}: results are in {run.save(folder, unfinished=run.interrupted and earlier)}")
    return run


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure the library on this machine.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    commands = {
        "list": ("what can be measured", lambda _: None, list_benchmarks),
        "run": ("check, time and compare; Ctrl-C keeps what was measured", _add_run_arguments, run),
        "report": ("tables and pictures of stored results", report.add_arguments, report.main),
        "static": ("what compilers say of every kernel; needs no GPU", static.add_arguments, static.main),
        "study": ("train with and without each method on real digits, and compare", study.add_arguments, study.main),
        "tune": ("find the fastest tiles for this machine's GPU", tune.add_arguments, tune.main),
    }
    made = {}
    for name, (what, add_arguments, function) in commands.items():
        made[name] = subparsers.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        add_arguments(made[name])
        made[name].set_defaults(function=function)
    return parser, made


_RUN_EXAMPLES = """\
examples:
  python -m benchmarks run                                          all of it, for benchmarks/results
  python -m benchmarks run block --model DiT-B/2 --batch 1 8        four cases, into out/benchmarks
  python -m benchmarks run block --scope branch --beta 0.2 0.5 --dtype bf16 --pass training
  python -m benchmarks run window_linear --device cuda --quick      small sizes: does everything work?
"""


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = _RUN_EXAMPLES, argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", help="benchmarks; default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small sizes, few rounds and on a CPU no C++ compiler: to see that everything works",
    )
    add_axes(parser)
    parser.add_argument(
        "--skip",
        nargs="+",
        default=(),
        metavar="TEXT",
        help="leave out sides with it in their names: max-autotune, ...",
    )
    parser.add_argument("--rounds", type=positive, help="how often every side is timed; default: 5, then --seconds")
    parser.add_argument("--seconds", type=positive, default=60, help="rounds go on for as long a case; default: 60")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: PyTorch's choice")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results; default: the device's in benchmarks/results, or in out/benchmarks where options "
        "choose only a part",
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit keeps the measurements, like Ctrl-C
    sys.exit(main())
