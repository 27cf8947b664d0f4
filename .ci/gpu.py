#!/usr/bin/env python3
"""Run everything that needs a GPU, in two parts of less than ten minutes each.

Usage: .ci/gpu.py OUT checks      build the extension, run every kernel, compute-sanitizer and the GPU tests
       .ci/gpu.py OUT benchmarks  build the extension, measure, make the tables

Needs CUDA PyTorch, Triton, pytest and nvcc, and installs nothing. A step that fails or reaches its time limit does not
stop the others, and the exit status is 1. After each, OUT/<part>.json has its output; OUT/results/<GPU> has results.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
TOTAL, GRACE = 560.0, 10.0  # seconds for a part; from SIGINT to SIGKILL: pytest-xdist takes six to report failures
EVERY_KERNEL = [PYTHON, "-m", "dtr_kernels", "verify", "--kernels", "--device", "cuda"]
TRITON = "\n".join(path.read_text() for path in sorted((ROOT / "dtr_kernels" / "ops").glob("*.py")))
# Parts of kernel names: the CUDA kernels' namespace as C++ mangles it, and Triton's kernels.
OUR_KERNELS = ["dtr4cuda", *re.findall(r"^def (\w+_kernel)\(", TRITON, re.MULTILINE)]
BENCHMARKS = {"block": 170, "window_linear": 36, "gated_norm": 24, "surgery_projection": 24, "model": 60}
BENCHMARKS |= {"gelu_linear": 12, "surgery_step": 24}  # by importance; seconds if each takes all of its time


class Step(NamedTuple):
    """A command, its weight in sharing the time, and regular expressions that say what its output means."""

    name: str
    command: Sequence[str]
    weight: float = 1
    fails: str = "(?!)"
    unable: str = "(?!)"  # cannot run here, which is no failure
    results: Path | None = None  # a benchmark that has written this file need not end


def run(step: Step, limit: float) -> dict[str, Any]:
    """Run a step, interrupt it at its limit, end all processes that it has started, and return what became of it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    start, state, why = time.monotonic(), "ok", ""
    with tempfile.TemporaryFile() as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        child = subprocess.Popen(step.command, cwd=ROOT, env=environment, start_new_session=True, **streams)
        try:
            child.wait(limit)
        except subprocess.TimeoutExpired:
            state = "stopped at its limit"
        finally:  # also when this script is interrupted
            with suppress(subprocess.TimeoutExpired, ProcessLookupError):
                os.killpg(child.pid, signal.SIGINT)
                child.wait(GRACE)
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - 200_000))
        log = re.sub(r"(?m)^[^\n]*\r(?!\n)", "", output.read().decode(errors="replace"))  # overwritten progress bars
    if state == "ok" and child.returncode:
        state, why = "FAILED", f"exit status {child.returncode}"
    for pattern, meaning in (step.fails, "FAILED"), (step.unable, "missing"):
        if found := re.search(pattern, log, re.MULTILINE):
            state, why = meaning, found[0].strip()
    failed = state == "FAILED" or (state == "stopped at its limit" and not (step.results and step.results.exists()))
    print(f"{state:20} {step.name:20} {time.monotonic() - start:6.1f} s  {why}", flush=True)
    facts = {"name": step.name, "state": state, "why": why, "failed": failed, "command": step.command}
    return facts | {"log": log.splitlines()}


def checks() -> list[Step]:
    """Return the steps by importance."""
    workers = ["-n", "8", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    tests = ["env", "OMP_NUM_THREADS=1", PYTHON, "-m", "pytest", "-q", "-rfEs", "-m", "gpu", *workers, "tests"]
    return [
        Step("info", [PYTHON, "-m", "dtr_kernels", "info", "--json"], 40),
        Step("every kernel", EVERY_KERNEL, 80),
        sanitizer("memcheck", "--report-api-errors", "no"),  # PyTorch asks the driver for what it may not have
        Step("gpu tests", tests, 140, "^(FAILED|ERROR) .*|NOT RUN: needs an NVIDIA GPU"),
        Step("verify", [PYTHON, "-m", "dtr_kernels", "verify", "--device", "cuda"], 50),
        sanitizer("racecheck", "--racecheck-detect-level", "error"),
    ]


def sanitizer(tool: str, *options: str) -> Step:
    """Return the step that runs every kernel under a tool of compute-sanitizer."""
    beside_nvcc = os.path.dirname(os.path.realpath(shutil.which("nvcc") or ""))
    path = os.pathsep.join([os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '')}/bin", beside_nvcc])
    # Each tensor is an allocation of its own, so that accesses beyond it are found.
    program = ["env", f"PATH={path}", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool, *options]
    # Python takes long to import PyTorch; the processes that Triton starts are ptxas.
    program += ["--error-exitcode", "99", "--launch-timeout", "60", "--target-processes", "application-only"]
    kernels = [word for name in OUR_KERNELS for word in ("--kernel-name", f"kns={name}")]
    # Errors are printed at once, the summary at the end, which a tool that is stopped does not reach.
    fails = r"^=+ (Invalid __|Misaligned |Error: |Race reported ).*|SUMMARY: [1-9].*"
    unable = "Device not supported.*|env: .*compute-sanitizer.*: No such file.*"
    return Step(tool, [*program, *kernels, *EVERY_KERNEL], 45, fails, unable)


def benchmarks(out: Path, scratch: str) -> list[Step]:
    """Return the steps by importance; the report, which can be made again, goes to ``scratch``."""
    script = "import torch; from benchmarks.environment import folder_name; print(folder_name(torch.device('cuda')))"
    named = subprocess.run([PYTHON, "-c", script], cwd=ROOT, capture_output=True, text=True)
    results = out / "results" / (named.stdout.strip() or "unknown-gpu")
    command, steps = [PYTHON, "-m", "benchmarks"], []
    for name, weight in BENCHMARKS.items():
        for earlier in results.glob(f"{name}.json*"):
            earlier.unlink()
        # Compiling with max-autotune takes as long as the rest of a case, and compiling a whole model longer.
        skipped = ["max-autotune", "compiled"] if name == "model" else ["max-autotune"]
        options = ["--device", "cuda", "--seconds", "5", "--skip", *skipped, "--out", str(results)]
        steps.append(Step(name, [*command, "run", name, *options], weight, results=results / f"{name}.json"))
    return [*steps, Step("report", [*command, "report", str(results), "--out", scratch], 30)]


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2 or arguments[0].startswith("-") or arguments[1] not in ("checks", "benchmarks"):
        sys.exit(__doc__)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore SIGINT, and so would children
        signal.signal(number, signal.default_int_handler)
    start, out, part = time.monotonic(), Path(arguments[0]).resolve(), arguments[1]
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        build = Step("build", [PYTHON, "setup.py", "build_ext", "--inplace"], 90, "dtr_kernels: built without .*")
        steps = [build, *(checks() if part == "checks" else benchmarks(out, scratch))]
        for number, step in enumerate(steps):
            # A step may take its share of the time that is left; later steps get what it does not need.
            left = TOTAL - (time.monotonic() - start) - GRACE * len(steps[number:])
            outcomes.append(run(step, left * step.weight / sum(later.weight for later in steps[number:])))
            (out / f"{part}.json").write_text(json.dumps(outcomes, indent=1) + "\n")
    bad = [outcome for outcome in outcomes if outcome["failed"]]
    for outcome in bad:
        print(f"\n--- the end of the output of {outcome['name']}", *outcome["log"][-10:], sep="\n")
    print(f"\n{len(bad)} of {len(outcomes)} steps failed or did not end; {out / part}.json has their output")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
