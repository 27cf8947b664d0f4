"""Compile the extension ``dtr_kernels._C``, for setup.py and ``python -m dtr_kernels build``.

Needs a C++17 compiler, ninja and pybind11, and nvcc for the CUDA kernels, but no PyTorch, GPU or network. This module
imports only Python's standard library, so that setup.py can load it by its path before anything is installed.

Environment variables: CXX, CXXFLAGS, LDFLAGS; CUDA_HOME; TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX"); MAX_JOBS;
DTR_CUDA (0: no CUDA kernels; 13.0: CUDA kernels of that version, or the build fails).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

USUAL_ARCHITECTURES = ("sm_80", "sm_90", "sm_100")  # Ampere, Hopper, Blackwell; and PTX of the last for later GPUs
# OpenMP is compiled in but not linked: the symbols come from the runtime that PyTorch has loaded.
CXX_FLAGS = "-std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden -fopenmp -fno-math-errno -fno-trapping-math"
NVCC_FLAGS = "-std=c++17 -O3 -DNDEBUG -Xcompiler=-fPIC,-fvisibility=hidden -Xfatbin=-compress-all --threads=4"
AGAIN = "run python -m dtr_kernels build, or install this package again (pip install -v --force-reinstall --no-deps)"


EXTRA = 'pip install "dtr_kernels[build]", or ninja and "pybind11>=2.13" where dtr_kernels is not installed'


@dataclass
class Cuda:
    """The CUDA compiler and options of a build; ``missing`` says why CUDA kernels are not built."""

    missing: str | None = None
    nvcc: str = ""
    version: str | None = None
    architectures: list[str] = field(default_factory=list)  # as nvcc names them: sm_90, and compute_90 for PTX
    libraries: list[Path] = field(default_factory=list)


def sources(root: Path) -> list[str]:
    """Return the files to compile, relative to the folder that holds csrc. CUDA comes first, as it takes longest."""
    found = sorted((root / "csrc").rglob("*.c*"), reverse=True)
    return [str(path.relative_to(root)) for path in found if path.suffix in (".cpp", ".cu")]


def build(root: Path, folder: Path, target: Path, cuda: Cuda) -> str | None:
    """Compile the changed sources of root in ``folder`` and link ``target``; return an error message, or None.

    Both paths must be absolute, or root the working folder: nvcc fails on absolute paths that hold quotes.
    """
    if sys.platform != "linux":
        return "they need Linux"
    try:
        import pybind11
    except ImportError:
        return f"pybind11 is missing; {EXTRA}"
    if not (ninja := find_ninja()):
        return f"ninja is missing; {EXTRA}"
    if not (compiler := find_compiler()):
        return f"no C++ compiler was found; install g++ or set CXX, and {AGAIN}"
    folder.mkdir(parents=True, exist_ok=True)
    header = folder / "build_config.h"
    if not header.exists() or header.read_text() != config_header(cuda):
        header.write_text(config_header(cuda))
    rules = commands(compiler, [str(folder), sysconfig.get_path("include"), pybind11.get_include()], cuda)
    (folder / "build.ninja").write_text(ninja_file(sources(root), folder, target, rules))
    done = subprocess.run([ninja, "-f", str(folder / "build.ninja"), "-j", str(jobs())], cwd=root)
    return f"{compiler} failed; see what it says and {AGAIN}" if done.returncode else None


def commands(compiler: str, includes: list[str], cuda: Cuda) -> dict[str, str]:
    """Return the command of each ninja rule, in which $in and $out stand for files."""
    # Each word is quoted, since ninja passes the command to a shell.
    compiler, cxx_flags, link_flags = (
        shlex.join(shlex.split(words))
        for words in (compiler, os.environ.get("CXXFLAGS", ""), os.environ.get("LDFLAGS", ""))
    )
    cxx = f"{compiler} {CXX_FLAGS} {cxx_flags}"
    # Link libgcc statically for conversions of fp16: the shared libgcc has them only since GCC 12.
    link = f"-shared {link_flags} -lgcc"
    rules = {
        "cxx": f"{cxx} -MMD -MF $out.d -c $in -o $out",
        "binding": f"{cxx} {shlex.join(f'-I{path}' for path in includes)} -MMD -MF $out.d -c $in -o $out",
    }
    if not cuda.missing:
        program = [word for word in shlex.split(compiler) if not word.startswith("-")][-1]  # "ccache g++ -pthread"
        host = "" if os.environ.get("NVCC_CCBIN") else f"-ccbin {shlex.quote(program)}"
        codes = " ".join(f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in cuda.architectures)
        rules["nvcc"] = f"{shlex.quote(cuda.nvcc)} {host} {NVCC_FLAGS} {codes} -MD -MF $out.d -c $in -o $out"
        # The CUDA runtime is linked statically and hidden, so that no other one in the process is called in its place.
        link += f" {shlex.join(f'-L{path}' for path in cuda.libraries)} -lcudart_static -Wl,--exclude-libs,ALL"
        link += " -ldl -lrt -lpthread"
    return rules | {"link": f"{compiler} $in -o $out {link}"}


def ninja_file(sources: list[str], folder: Path, target: Path, rules: dict[str, str]) -> str:
    """Return the text of build.ninja: an object for each source, all linked into target."""

    def escaped(path: str | Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    lines = [f"builddir = {escaped(folder)}"]
    for name, command in rules.items():
        literal = re.sub(r"\$(?!(in|out)\b)", "$$", command)
        lines += [f"rule {name}", f"  command = {literal}"]
        if name != "link":
            lines += ["  depfile = $out.d", "  deps = gcc"]
    objects = []
    for source in sources:
        rule = "nvcc" if source.endswith(".cu") else "binding" if source.endswith("bindings.cpp") else "cxx"
        if rule in rules:
            objects += [escaped(folder / f"{source}.o")]
            lines += [f"build {objects[-1]}: {rule} {escaped(source)}"]
    lines += [f"build {escaped(target)}: link {' '.join(objects)}"]
    return "\n".join(lines) + "\n"


def config_header(cuda: Cuda) -> str:
    """Return the text of build_config.h, from which csrc/bindings.cpp describes its own build."""
    strings = {
        "kCudaVersion": cuda.version,
        "kArchitectures": " ".join(cuda.architectures),
        "kNoCudaReason": cuda.missing,
    }
    lines = [] if cuda.missing else ["#define DTR_CUDA"]
    for name, text in strings.items():
        literal = "nullptr" if text is None else json.dumps(text, ensure_ascii=False)
        lines += [f"constexpr const char* {name} = {literal};"]
    return "\n".join(lines) + "\n"


def find_ninja() -> str | None:
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    # In an isolated build BIN_DIR belongs to another environment, and the PATH leads to ninja.
    return shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")


def find_compiler() -> str | None:
    for command in [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++"]:
        if shutil.which(shlex.split(command)[0]):
            return command
    return None


def jobs() -> int:
    """Return how many compilers to run at once: MAX_JOBS, or one for each core and each 2 GB of memory."""
    if asked := os.environ.get("MAX_JOBS"):
        if not asked.isdecimal() or not int(asked):
            sys.exit(f"MAX_JOBS={asked!r} must be a whole number, 1 or more")
        return int(asked)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2_000_000_000))


def output(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


# --- CUDA ------------------------------------------------------------------------------------------------------------


def asked_cuda() -> str | None:
    """Read DTR_CUDA: "0" for no CUDA kernels, a version like "13.0" that they must be built with, or None if it is
    unset. Exits on any other value."""
    asked = os.environ.get("DTR_CUDA") or None
    if asked and not re.fullmatch(r"0|[1-9]\d*\.\d+", asked):
        sys.exit(f"DTR_CUDA={asked!r} must be 0, or a CUDA version like 13.0")
    return asked


def find_cuda(listed: str | None = None) -> Cuda:
    """Find nvcc and the architectures to compile for. Exits if the version that DTR_CUDA asks for is not available.

    ``listed`` replaces TORCH_CUDA_ARCH_LIST and has the same format.
    """
    asked = asked_cuda()
    if asked == "0":
        return Cuda(missing=f"DTR_CUDA=0 was set for the build; {AGAIN}")
    if nvcc := find_nvcc(asked):
        cuda = _cuda_of(nvcc, os.environ.get("TORCH_CUDA_ARCH_LIST", "") if listed is None else listed)
    else:
        which = f"nvcc of CUDA {asked}" if asked else "nvcc"
        cuda = Cuda(missing=f"{which} was not found; put it on the PATH or set CUDA_HOME, and {AGAIN}")
    if asked and cuda.missing:
        sys.exit(f"DTR_CUDA={asked}: {cuda.missing}")
    return cuda


def _cuda_of(nvcc: str, listed: str) -> Cuda:
    try:
        version = re.search(r"V([\d.]+)", output(nvcc, "--version"))[1]  # type: ignore[index]
        supported = output(nvcc, "--list-gpu-code").split()
        # The real location; the nvcc that was found may be a wrapper.
        root = Path(re.search(r"TOP=(.*)", output(nvcc, "--dryrun", "-c", "none.cu"))[1])  # type: ignore[index]
    except (OSError, subprocess.CalledProcessError, TypeError) as error:
        return Cuda(missing=f"{nvcc} does not work ({error}); repair it or set CUDA_HOME, and {AGAIN}")
    architectures = asked_architectures(listed, nvcc, supported) or usual_architectures(supported)
    if not architectures:
        too_old = f"{nvcc} is too old for {USUAL_ARCHITECTURES[0]}"
        return Cuda(missing=f"{too_old}; set CUDA_HOME to a newer one, and {AGAIN}")
    libraries = [folder for name in ("lib64", "lib", "targets/*/lib") for folder in sorted(root.glob(name))]
    return Cuda(None, nvcc, version, architectures, libraries)


def find_nvcc(version: str | None = None) -> str | None:
    """Find the first nvcc, or the first of a version like 13.0: from CUDA_HOME, the PATH, /usr/local/cuda-13.0, or the
    compiler packages on PyPI (nvidia-cuda-nvcc and its companions)."""
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else []
    folders.append(os.environ.get("PATH", os.defpath))
    if version:
        folders.append(f"/usr/local/cuda-{version}/bin")
    # In an isolated build sys.path lacks the environment that the package is installed into.
    for packages in [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]:
        folders += map(str, Path(packages).glob("nvidia/cu*/bin"))
    for folder in folders:
        found = shutil.which("nvcc", path=folder)
        if found and (version is None or _is_of_version(found, version)):
            return found
    return None


def _is_of_version(nvcc: str, version: str) -> bool:
    try:
        return f" V{version}." in output(nvcc, "--version")
    except (OSError, subprocess.CalledProcessError):
        return False


def usual_architectures(supported: list[str]) -> list[str]:
    usual = [name for name in USUAL_ARCHITECTURES if name in supported]
    return usual + [name.replace("sm", "compute") for name in usual[-1:]]


def asked_architectures(listed: str, nvcc: str, supported: list[str]) -> list[str]:
    """Translate a TORCH_CUDA_ARCH_LIST into nvcc's names. Exits if it is malformed or nvcc does not support it."""
    architectures = []
    for name in re.findall(r"[^;\s]+", listed):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not parts:
            sys.exit(f"TORCH_CUDA_ARCH_LIST={listed!r}: {name!r} is not an architecture like 8.0, 9.0a or 10.0+PTX")
        number = parts[1] + parts[2]
        if f"sm_{number}" not in supported:
            sys.exit(f"TORCH_CUDA_ARCH_LIST={listed!r}: {nvcc} does not support {name}, only {' '.join(supported)}")
        architectures += [f"sm_{number}{parts[3]}"] + [f"compute_{number}{parts[3]}"] * bool(parts[4])
    return list(dict.fromkeys(architectures))


def has_code_for(major: int, minor: int, architectures: Iterable[str]) -> bool:
    """Return whether a GPU of this compute capability runs code compiled for any of ``architectures`` ("sm_90", ...).

    A binary (sm_) runs on the same major version with the same or a later minor one, PTX (compute_) on everything
    later. Code for an "a" architecture runs on that one alone, code for an "f" on later minor versions of its family.
    """
    for name in architectures:
        kind, number, suffix = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", name).groups()  # type: ignore[union-attr]
        compiled = divmod(int(number), 10)
        if suffix == "a":
            runs = compiled == (major, minor)
        elif kind == "compute" and not suffix:
            runs = compiled <= (major, minor)
        else:
            runs = compiled[0] == major and compiled[1] <= minor
        if runs:
            return True
    return False
