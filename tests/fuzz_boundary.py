"""Calls the compiled extension at random under AddressSanitizer and UndefinedBehaviorSanitizer: `make test-sanitize`.

The extension is built for it in build/sanitized, the CUDA kernels for the CPU too (cuda_shim). Every instruction set of
this processor gets its share of the time. Half of the calls are right, on memory of exactly the size they need, and
their results are checked; the others are wrong, each in one respect, and must be refused. What fails is printed with
the case to repeat it by.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import secrets
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from fuzz_cases import Draw, calls, issue, wrong

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "sanitized"
EXTENSION = FOLDER / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
COMPILER = os.environ.get("CXX", "g++").split()
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
FLAGS = [*SANITIZERS, "-fno-omit-frame-pointer", "-g", "-O1", "-U_FORTIFY_SOURCE", "-std=c++17", "-fPIC", "-fopenmp"]
# The shim's threads are fibers on stacks of their own, which AddressSanitizer does not know (and says so): of what they
# touch, heap memory alone is guarded.
SHIM_FLAGS = ["--param=asan-stack=0", "-Wno-unknown-pragmas", "-x", "c++"]
CONFIG = """#define DTR_CUDA
constexpr const char *kCudaVersion = "shim", *kArchitectures = "", *kNoCudaReason = nullptr;
"""


def build() -> None:
    """Compiles what is older than a source. Raises CalledProcessError where the compiler fails."""
    import pybind11

    sources = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "tests" / "cuda_shim").iterdir(), Path(__file__)]
    if EXTENSION.exists() and EXTENSION.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "build_config.h").write_text(CONFIG)
    includes = [f"-I{path}" for path in (FOLDER, sysconfig.get_path("include"), pybind11.get_include())]
    units = {path.stem: [*includes, path] for path in (ROOT / "csrc").rglob("*.cpp")}
    units["surgery_cu"] = [f"-I{ROOT / 'tests' / 'cuda_shim'}", *SHIM_FLAGS, ROOT / "csrc" / "cuda" / "surgery.cu"]
    # The shim fills all thread-local variables of its library with NaN; pybind11's live in the other one.
    libraries = {
        FOLDER / "libcuda_on_cpu.so": (["surgery_cu"], []),
        EXTENSION: (sorted(units.keys() - {"surgery_cu"}), [f"-L{FOLDER}", "-lcuda_on_cpu", f"-Wl,-rpath,{FOLDER}"]),
    }
    assert len(units) == len(list((ROOT / "csrc").rglob("*.cpp"))) + 1, "two sources have one name"

    def compiled(name: str) -> None:
        subprocess.run([*COMPILER, *FLAGS, "-c", *units[name], "-o", FOLDER / f"{name}.o"], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, units))
    for library, (names, needs) in libraries.items():
        objects = [FOLDER / f"{name}.o" for name in names]
        subprocess.run([*COMPILER, *FLAGS, "-shared", *objects, *needs, "-o", library], check=True)


def sanitized_environment(instruction_set: str) -> dict[str, str]:
    """For a Python that loads the extension: the sanitizer must come first, and know of C++ exceptions."""

    def path(library: str) -> str:
        command = [*COMPILER, f"-print-file-name={library}"]
        return subprocess.run(command, check=True, text=True, capture_output=True).stdout.strip()

    return os.environ | {
        "LD_PRELOAD": f"{path('libasan.so')} {path('libstdc++.so.6')}",
        "PYTHONMALLOC": "malloc",
        # Uninitialised memory is NaN.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:"
        "max_malloc_fill_size=16777216:malloc_fill_byte=255",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
        "DTR_ISA": instruction_set,
    }


def load(path: Path) -> ModuleType:
    """The extension from a file."""
    spec = importlib.util.spec_from_file_location("dtr_kernels._C", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_case(kernels: ModuleType, case: str) -> None:
    """One random call, and, or instead, some wrong ones like it. Raises AssertionError."""
    draw = Draw(case)
    makers = calls(kernels)
    call = makers[draw.choice.choice(sorted(makers))](draw)
    if draw.flag():
        if draw.choice.random() < 0.2:
            call.scramble(draw)
        call.run(kernels)
        return
    everything = list(wrong(call))
    for what, arguments in draw.choice.sample(everything, min(12, len(everything))):
        try:
            issue(kernels, call.function, arguments)
        except (ValueError, TypeError):
            continue
        raise AssertionError(f"{call.function} accepts this: {what}")


def work(seed: str, seconds: float, progress: Path) -> None:
    """Runs cases until the time is over; progress always holds the one that runs."""
    kernels = load(EXTENSION)
    end, number = time.monotonic() + seconds, 0
    with progress.open("w") as file:
        while time.monotonic() < end:
            file.seek(0)
            file.write(f"{seed}-{number}\n")
            file.flush()
            run_case(kernels, f"{seed}-{number}")
            number += 1
    print(f"{os.environ['DTR_ISA']}: {number} cases, nothing found", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of all instruction sets together")
    parser.add_argument("--seed", default=secrets.token_hex(4))
    parser.add_argument("--case", help="this one alone, as a failure names it")
    parser.add_argument("--isa", choices=INSTRUCTION_SETS, help="this instruction set alone")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.seed, options.seconds, options.worker)
        return 0
    build()
    chosen = [options.isa] if options.isa else INSTRUCTION_SETS
    failed = False
    for isa in chosen:
        environment, progress = sanitized_environment(isa), FOLDER / f"case-{isa}"
        asked = subprocess.run(python("kernels.build_config()"), env=environment, capture_output=True, text=True)
        if "none of the instruction sets" in asked.stderr:
            print(f"NOT RUN: this processor has no {isa}", flush=True)
            continue
        progress.write_text(options.case or f"{options.seed}-0")
        if options.case:
            command = python(f"fuzz_boundary.run_case(kernels, {options.case!r})")
        else:
            limits = ["--seed", options.seed, "--seconds", str(options.seconds / len(chosen))]
            command = [sys.executable, __file__, *limits, "--worker", str(progress)]
        if subprocess.run(command, env=environment).returncode:
            failed = True
            case = progress.read_text().strip()
            print(f"FAILED: {sys.executable} {__file__} --isa {isa} --case {case}", flush=True)
    return int(failed)


def python(statement: str) -> list[str]:
    """A command that runs a statement with the extension loaded."""
    start = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import fuzz_boundary"
    return [sys.executable, "-c", f"{start}; kernels = fuzz_boundary.load(fuzz_boundary.EXTENSION); {statement}"]


if __name__ == "__main__":
    sys.exit(main())
