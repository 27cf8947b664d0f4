"""Allocations fail in the CPU kernels and in steps of gradient surgery, and extensions are damaged on the disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from dtr_kernels.ops import extension
from tests.faults.fault import Fault

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "g++").split()
CAN_RUN = extension.kernels is not None and shutil.which(COMPILER[0]) is not None


def short_of_memory(kind: str, seed: int, folder: Path) -> Iterator[tuple[str, str | None]]:
    """Yield what tests/faults/short_of_memory.py prints: what was tried, and what was lost."""
    preloaded = folder / "failing_allocations.so"
    source = Path(__file__).with_name("failing_allocations.cpp")
    subprocess.run([*COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", source, "-o", preloaded, "-ldl"], check=True)
    assert extension.kernels is not None
    yield from _lines("short_of_memory", kind, seed, extension.kernels.__file__, LD_PRELOAD=preloaded)


def _lines(module: str, *arguments: object, **settings: object) -> Iterator[tuple[str, str | None]]:
    command = [sys.executable, "-m", f"tests.faults.{module}", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "2"} | {name: str(value) for name, value in settings.items()}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    name, said = "the start", []
    try:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("["):
                name, lost = json.loads(line)
                yield name, lost
            else:
                said.append(line.strip())
        yield module, f"{' '.join(command)} ended with {process.wait()} soon after {name}: {' '.join(said[-5:])}"
    finally:
        process.kill()
        process.wait()


def _failed_allocations(kind: str) -> Callable[[random.Random, Path], Iterator[str | None]]:
    def tries(rng: random.Random, folder: Path) -> Iterator[str | None]:
        for _, lost in short_of_memory(kind, rng.randrange(10**6), folder):
            yield lost

    return tries


def _damaged_extensions(rng: random.Random, folder: Path) -> Iterator[str | None]:
    for _, lost in _lines("damaged_extension", rng.randrange(10**6), DTR_KERNELS_CACHE=folder / "cache"):
        yield lost


# Without a compiler or the extension nothing is there to fail.
FAULTS = [
    Fault(
        "an allocation of a CPU kernel fails",
        "MemoryError; nothing is written, and the next call is right",
        _failed_allocations("extension"),
    ),
    Fault(
        "an allocation in a step of `GradientSurgery` fails",
        "every `p.grad` is as before, and the next step is right",
        _failed_allocations("surgery"),
    ),
    Fault(
        "the extension in the user's cache is cut short, or has other bits",
        "it is not loaded, with a warning",
        _damaged_extensions,
    ),
] * CAN_RUN
