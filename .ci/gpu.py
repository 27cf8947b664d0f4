#!/usr/bin/env python3
"""Run everything that needs a GPU, in two parts of less than seven minutes each.

Usage: .ci/gpu.py OUT prepare     on any machine, before: build and compile for Hopper, into build/gpu
       .ci/gpu.py OUT checks      run every kernel, compute-sanitizer and the GPU tests
       .ci/gpu.py OUT benchmarks  measure, and tune, what the checks have not found wrong

Needs CUDA PyTorch, Triton, pytest and nvcc, and installs nothing. A step that fails or reaches its time limit does not
stop the others, and the exit status is 1. After each, OUT/<part>.json says what became of its commands, and
OUT/<part>.tar.xz has their logs and results.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
GRACE = 10.0  # seconds from SIGINT to SIGKILL: pytest-xdist takes six to report failures
KEPT = ROOT / "build/gpu"  # from one part to the next
# Triton writes absolute paths into its cache, which so can only be unpacked where it was.
CACHE, ARCHIVE = Path("/tmp/dtr-kernels-triton"), KEPT / "triton-cache.tar.xz"
UNPACK = f"{PYTHON} -m tarfile --filter data -e {ARCHIVE} {CACHE.parent}"
OPS = "\n".join(path.read_text() for path in sorted((ROOT / "dtr_kernels/ops").glob("*.py")))
# Parts of kernel names: the CUDA kernels' namespace as C++ mangles it, and Triton's kernels.
OUR_KERNELS = ["dtr4cuda", *re.findall(r"^def (\w+_kernel)\(", OPS, re.MULTILINE)]
DECLARED = re.findall(r'^    Kernel\(\s+"(\w+)"', OPS, re.MULTILINE)
SURGERY = [name for name in DECLARED if re.match("gram|combine|weighted|pcgrad", name)]
BANDS = [name for name in DECLARED if "band" in name]  # of scope "inner" alone
BLOCKS = [name for name in DECLARED if name not in SURGERY + BANDS]
EVERY_KERNEL = [PYTHON, "-m", "dtr_kernels", "verify", "--device", "cuda", "--kernels"]
# DiT-XL/2; and samples smaller than a tile, where tensor descriptors have boxes larger than their tensor.
SMOKE = ["--dtype", "bf16", "--sizes", "4x256x1152", "4x33x1152", "4x1x1152"]
WRONG_AT_XL, WRONG = r"^(?!.* 4 x (?:33|1) x ).* FAILED$", KEPT / "checks/wrong.json"


class Step(NamedTuple):
    """Commands by name, how many run at a time, and regular expressions that say what their output means."""

    name: str
    seconds: float  # and what earlier steps have left
    commands: Mapping[str, Sequence[str]]
    at_once: int = 8
    fails: str = "(?!)"
    unable: str = "^env: .*: No such file.*"  # cannot run here, which is no failure
    results: Path | None = None  # folder of a benchmark, which need not end if it has left something there
    rests_on: Sequence[str] = ()  # kernels of which none may be wrong


def run(step: Step, until: float, logs: Path) -> list[dict[str, Any]]:
    """Run a step's commands, interrupt those that still run at a time, and return what became of each."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": str(CACHE)}
    waiting, running, outcomes = dict(step.commands), {}, []
    try:
        while (waiting or running) and time.monotonic() < until:
            for name in list(waiting)[: step.at_once - len(running)]:
                log = logs / (f"{step.name} {name}".strip().replace(" ", "-") + ".log")
                with log.open("wb") as output:
                    streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
                    options = {"cwd": ROOT, "env": environment, "start_new_session": True, **streams}
                    running[name] = log, time.monotonic(), subprocess.Popen(waiting.pop(name), **options)
            time.sleep(0.05)
            for name, (*_, child) in list(running.items()):
                if child.poll() is not None:
                    outcomes.append(outcome(step, name, "ok", *running.pop(name)))
    finally:  # also when this script is interrupted
        end([child for *_, child in running.values()])
    outcomes += [outcome(step, name, "stopped at its limit", *facts) for name, facts in running.items()]
    for name in waiting:
        print(f"{'not started':20} {step.name} {name}", flush=True)
        outcomes.append({"step": step.name, "name": name, "state": "not started", "failed": True, "wrong": False})
    return outcomes


def end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupt processes and all that they have started, then kill what is left of them."""
    until = time.monotonic() + GRACE
    for child in children:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGINT)
    for child in children:
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(0, until - time.monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def outcome(
    step: Step, name: str, state: str, log: Path, start: float, child: subprocess.Popen[bytes]
) -> dict[str, Any]:
    """Say what became of a command; of its log the end is kept, without overwritten progress bars."""
    end([child])
    text = log.read_bytes()[-200_000:].decode(errors="replace")
    log.write_text(text := re.sub(r"(?m)^[^\n]*\r(?!\n)", "", text))
    end_of_log, why = text.splitlines()[-4:], ""
    if state == "ok" and child.returncode:
        state, why = "FAILED", f"exit status {child.returncode}: {''.join(end_of_log[-1:])[:120]}"
    for pattern, meaning in (step.fails, "FAILED"), (step.unable, "missing"):
        if found := re.search(pattern, text, re.MULTILINE):
            state, why = meaning, found[0].strip()
    measured = step.results is not None and any(step.results.glob("*.json*"))
    failed = state == "FAILED" or (state == "stopped at its limit" and not measured)
    seconds = round(time.monotonic() - start, 1)
    print(f"{state:20} {f'{step.name} {name}':32} {seconds:6.1f} s  {why}", flush=True)
    # A crash; not what ended in time, with status 1 or, for want of a GPU, 2.
    crashed = state == "FAILED" and child.returncode not in (0, 1, 2)
    wrong = crashed or re.search(WRONG_AT_XL, text, re.MULTILINE) is not None
    facts = {"step": step.name, "name": name, "state": state, "why": why, "seconds": seconds, "failed": failed}
    return facts | {"wrong": wrong, "log": log.name, "end": end_of_log}


def ready() -> list[Step]:
    """Unpack what was prepared, and build the extension unless that was done from the same sources."""
    sources = b"".join(path.read_bytes() for path in sorted((ROOT / "csrc").rglob("*.*")))
    mark, built = f"{sys.implementation.cache_tag} {hashlib.sha256(sources).hexdigest()}", KEPT / "built"
    build = f"{PYTHON} setup.py build_ext --inplace && echo {mark} > {built}"
    steps = [Step("unpack", 20, {"": ["sh", "-c", UNPACK]})] if ARCHIVE.exists() else []
    if not built.exists() or built.read_text().strip() != mark:
        steps.append(Step("build", 30, {"": ["sh", "-c", build]}, fails="dtr_kernels: built without .*"))
    return steps


def prepare(found: Path) -> list[Step]:
    """Return the steps; the last sees whether a fresh process finds every kernel in the unpacked archive."""
    shutil.rmtree(CACHE, ignore_errors=True)
    for earlier in ARCHIVE, KEPT / "built":
        earlier.unlink(missing_ok=True)
    build = ["env", "TORCH_CUDA_ARCH_LIST=9.0", *ready()[0].commands[""]]
    compile_all = ["env", "TRITON_STORE_BINARY_ONLY=1", PYTHON, "-m", "benchmarks.ahead"]
    pack = ["tar", "-C", str(CACHE.parent), "--exclude", "*.source", "-cJf", str(ARCHIVE), CACHE.name]
    prove = f"rm -rf {CACHE} && {UNPACK} && exec {PYTHON} -m benchmarks.ahead"
    return [
        Step("build", 300, {"": build}, fails="dtr_kernels: built without .*"),
        Step("compile", 3000, {"": compile_all}),
        Step("pack", 300, {"": pack}),
        Step("prove", 900, {"": ["sh", "-c", prove]}, fails="[1-9][0-9]* compiled.*"),
    ]


def checks(found: Path) -> list[Step]:
    """Return the steps, which take six minutes."""
    facts = {"info": [PYTHON, "-m", "dtr_kernels", "info", "--json"], "packages": [PYTHON, "-m", "pip", "list"]}
    facts |= {"gpu": ["env", "nvidia-smi"], "nvcc": ["env", "nvcc", "--version"]}
    tests = ["env", "OMP_NUM_THREADS=1", PYTHON, "-m", "pytest", "-q", "-rfEs", "-m", "gpu", "--hypothesis-seed=0"]
    smoke = {"fresh thread": [*tests, "tests/test_ops.py", "-k", "fresh_thread"]}
    smoke |= {name: ["env", "CUDA_LAUNCH_BLOCKING=1", *EVERY_KERNEL, name, *SMOKE] for name in DECLARED}
    every = {
        f"{name} {part}": [*EVERY_KERNEL, *DECLARED[part::3], "--dtype", name]
        for name in ("bf16", "fp32", "fp16", "autocast")
        for part in range(3)
    }
    workers = ["-n", "8", "--maxschedchunk", "4"] if find_spec("xdist") else []
    workers += ["--timeout", "60", "--timeout-method", "thread"] if find_spec("pytest_timeout") else []
    # Files without GPU tests are not even read; one that cannot be read keeps none of the others from being run.
    on_gpu = re.compile(r"mark\.gpu|def test_\w+\([^)]*\bdevice\b")
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if on_gpu.search(path.read_text())]
    first = {"test_ops": 0, "test_compile": 1, "test_sampling": 2}
    files.sort(key=lambda path: first.get(path.stem, 3))
    workers += ["--continue-on-collection-errors", *map(str, files)]
    bad = r"^(FAILED|ERROR) .*|NOT RUN: needs an NVIDIA GPU|^\d+ calls of .*, [1-9]\d* wrong"
    return [
        *ready(),
        Step("facts", 30, facts),
        Step("smoke", 60, smoke, at_once=6, fails=bad),
        Step("every kernel", 80, every, at_once=12, fails=bad),
        memcheck(),
        Step("gpu tests", 130, {"": [*tests, *workers]}, fails=bad),
    ]


def memcheck() -> Step:
    """Return the step that runs every kernel, in one dtype and size, under compute-sanitizer."""
    beside_nvcc = os.path.dirname(os.path.realpath(shutil.which("nvcc") or ""))
    path = os.pathsep.join([os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '')}/bin", beside_nvcc])
    # Each tensor is an allocation of its own, so that accesses beyond it are found.
    program = ["env", f"PATH={path}", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", "memcheck"]
    # PyTorch asks the driver for what it may not have, and takes long to import; the processes of Triton are ptxas.
    program += ["--report-api-errors", "no", "--launch-timeout", "60", "--target-processes", "application-only"]
    program += ["--error-exitcode", "99", *(word for name in OUR_KERNELS for word in ("--kernel-name", f"kns={name}"))]
    one = ["--dtype", "bf16", "--sizes", "2x33x67"]
    commands = {"blocks": [*program, *EVERY_KERNEL, *BLOCKS, *BANDS, *one]}
    commands["surgery"] = [*program, *EVERY_KERNEL, *SURGERY, *one]
    # Errors are printed at once, the summary at the end, which a tool that is stopped does not reach.
    fails = r"^=+ (Invalid __|Misaligned |Error: ).*|SUMMARY: [1-9].*"
    unable = "Device not supported.*|env: .*compute-sanitizer.*: No such file.*"
    return Step("memcheck", 30, commands, fails=fails, unable=unable)


def benchmarks(found: Path) -> list[Step]:
    """Return the steps, which take six and a half minutes, without those that rest on a wrong kernel."""
    wrong = json.loads(WRONG.read_text()) if WRONG.exists() else []
    command = ["env", f"DTR_KERNELS_CACHE={found / 'tune'}", PYTHON, "-m", "benchmarks"]  # where tune leaves its tiles
    xl = ["--model", "DiT-XL/2", "--dtype", "bf16", "--batch", "256"]
    training = ["block", *xl, "--pass", "training", "--scope"]

    def measured(name: str, seconds: float, rests_on: Sequence[str], *what: str) -> Step:
        options = ["--device", "cuda", "--seconds", "5", "--skip", "max-autotune", "--out", str(found / name)]
        return Step(name, seconds, {"": [*command, "run", *what, *options]}, results=found / name, rests_on=rests_on)

    steps = [
        measured("block", 130, BLOCKS, "block", *xl, "32"),
        # It also times other numbers of stages.
        Step("tune", 160, {"": [*command, "tune", *xl, *tiles_without(wrong)]}, results=found / "tune/tuned"),
        measured("tuned", 35, BLOCKS, *training, "block", "branch"),
        measured("tuned-inner", 15, BLOCKS + BANDS, *training, "inner"),
        measured("surgery", 30, SURGERY, "surgery_projection"),
    ]
    spoilt = {step.name: [name for name in step.rests_on if name in wrong] for step in steps}
    for name in filter(spoilt.get, spoilt):
        print(f"{'left out':20} {name}, which needs {', '.join(spoilt[name])}", flush=True)
    return ready() + [step for step in steps if not spoilt[step.name]]


def tiles_without(wrong: Sequence[str]) -> list[str]:
    """Return the option that tunes the tiles and crossovers that no wrong kernel runs with."""
    if not wrong:
        return []
    sys.path.append(str(ROOT))
    from dtr_kernels import ops
    from dtr_kernels.ops.tiles import KINDS

    bad = [kernel for kernel in ops.KERNELS if kernel.name in wrong]
    spoilt = {op for kernel in bad for mode in kernel.modes for op in (*kernel.tiles(**mode), kernel.crossover)}
    print(f"{'left out':20} tune of {', '.join(op for op in KINDS if op in spoilt)}", flush=True)
    return ["--ops", *(op for op in KINDS if op not in spoilt)]


def main(arguments: Sequence[str]) -> int:
    parts = {"prepare": prepare, "checks": checks, "benchmarks": benchmarks}
    if len(arguments) != 2 or arguments[0].startswith("-") or arguments[1] not in parts:
        sys.exit(__doc__)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore SIGINT, and so would children
        signal.signal(number, signal.default_int_handler)
    out, part, until = Path(arguments[0]).resolve(), arguments[1], time.monotonic()
    shutil.rmtree(found := KEPT / part, ignore_errors=True)
    for folder in out, found / "logs":
        folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[dict[str, Any]] = []
    for step in parts[part](found):
        until += step.seconds
        outcomes += run(step, until, found / "logs")
        if step.name == "smoke":
            wrong = {facts["name"] for facts in outcomes if facts["wrong"]}
            WRONG.write_text(json.dumps([name for name in DECLARED if name in wrong]))
        (out / f"{part}.json").write_text(json.dumps(outcomes, indent=1) + "\n")
        with tarfile.open(draft := KEPT / f"{part}.tar.xz", "w:xz") as archive:
            archive.add(found, part)
        shutil.copy(draft, out)
    bad = [facts for facts in outcomes if facts["failed"]]
    print(f"\n{len(bad)} of {len(outcomes)} commands failed or did not end; their logs are in {out / part}.tar.xz")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
