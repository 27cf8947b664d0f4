"""The extension that ``python -m dtr_kernels build`` compiles for this machine, kept in the user's cache.

It serves a GPU that the installed extension has no code for, a machine with nvcc whose installed extension has no CUDA
kernels, and one where the installed extension does not load. It is loaded in place of that; nothing compiles at import.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import stat
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path

import torch

from dtr_kernels import compilation
from dtr_kernels.files import cache_folder, locked, read_json, replacing

PACKAGE = Path(__file__).parent
# The sources are in an installed package, or next to the package in a checkout.
ROOT = PACKAGE if (PACKAGE / "csrc").is_dir() else PACKAGE.parent
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def path() -> Path:
    """Return where the extension is, if it was built. The folder's name holds Python's ABI and a digest of the sources,
    so that an extension of other sources is never found."""
    digest = hashlib.sha256()
    for file in [Path(compilation.__file__), *sorted(ROOT.glob("csrc/**/*.*"))]:
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    folder = f"{sysconfig.get_config_var('SOABI')}-{digest.hexdigest()[:16]}"
    return cache_folder() / "extension" / folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def load() -> None:
    """Load the extension as ``dtr_kernels._C``, if there is one.

    Warns, and leaves the installed extension in use, if the file is damaged, does not load (as on a machine with older
    libraries that shares the folder), or could have been put there by another user.
    """
    if not os.path.isdir(
        cache_folder() / "extension"
    ):  # also False where this user may not look: HOME may be another's
        return
    file = path()
    if not os.path.exists(file):
        return
    try:
        _check_trusted(file)
        _check_complete(file)
        spec = importlib.util.spec_from_file_location("dtr_kernels._C", file)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        warnings.warn(f"the extension that was built here is not used: {error}", stacklevel=2)
    else:
        sys.modules[spec.name] = module


def _check_trusted(file: Path) -> None:
    for part in _parts(file):
        status = part.stat()
        if not part.is_absolute() or status.st_uid not in (0, os.getuid()) or status.st_mode & _WRITABLE_BY_OTHERS:
            raise ImportError(
                f"{part}: the path must be absolute, and nobody but its owner, you or root, may write to it; delete it "
                "or set DTR_KERNELS_CACHE to a folder of your own"
            )


def _check_complete(file: Path) -> None:
    """Raise ImportError unless the file is as it was built: loading half a file would crash Python."""
    try:
        if read_json(_description_of(file)) != _described(file):
            raise ValueError("its size or its checksum has changed")
    except (OSError, ValueError) as error:
        raise ImportError(f"{file} is not as it was built ({error}); run python -m dtr_kernels build again") from error


def _description_of(file: Path) -> Path:
    """Return the path of the file in which the build describes the extension."""
    return file.with_name(f"{file.name}.json")


def _described(file: Path) -> dict[str, int | str]:
    if not file.is_file():  # reading a pipe would wait forever
        raise ValueError("it is not a file")
    content = file.read_bytes()
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _parts(file: Path) -> tuple[Path, ...]:
    """Return the paths that no other user may own: the file and the folders made for it."""
    return file, file.parent, file.parent.parent


def build() -> Path:
    """Compile the extension for this machine's Python, GPUs and nvcc, to be used in place of the installed one.

    Takes a C++ compiler, ninja and pybind11 (pip install "dtr_kernels[build]"), and nvcc. Reads from the environment:

      CXX, CXXFLAGS, LDFLAGS   the C++ compiler, further options
      CUDA_HOME                whose nvcc to use; otherwise the one on the PATH, or that of PyPI's nvidia-cuda-nvcc
      TORCH_CUDA_ARCH_LIST     what to build for, like "8.0;9.0+PTX"; otherwise the GPUs of this machine
      DTR_CUDA                 0: without CUDA kernels; 13.0: with nvcc of that version
      MAX_JOBS                 how many compilers run at once
      DTR_KERNELS_CACHE        where it is kept; otherwise ~/.cache/dtr_kernels
    """
    if not compilation.sources(ROOT):
        sys.exit(f"the C++ sources are missing from {ROOT}; install this package again")
    cuda = compilation.find_cuda(os.environ.get("TORCH_CUDA_ARCH_LIST") or _architectures_here())
    if cuda.missing and compilation.asked_cuda() != "0":
        sys.exit(f"{cuda.missing}; set DTR_CUDA=0 to build without CUDA kernels")
    target = path()
    if not target.is_absolute():
        sys.exit(f"the cache must be an absolute path, got {cache_folder()}; set DTR_KERNELS_CACHE to one")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"the cache {cache_folder()} cannot be used ({error}); set DTR_KERNELS_CACHE to a folder of your own")
    try:
        with locked(target, f"another process is building {target}; wait until it has ended"):
            _build(target, cuda)
    except ValueError as error:
        sys.exit(f"dtr_kernels: not built: {error}")
    for part in _parts(target):
        part.chmod(part.stat().st_mode & ~_WRITABLE_BY_OTHERS)
    what = "without CUDA kernels" if cuda.missing else f"with CUDA {cuda.version} for {' '.join(cuda.architectures)}"
    print(f"built {what}: {target}\nIt is used in place of the installed one until that folder is deleted.")
    return target


def _build(target: Path, cuda: compilation.Cuda) -> None:
    with replacing(target) as unfinished, tempfile.TemporaryDirectory() as folder:
        if failure := compilation.build(ROOT, Path(folder), unfinished, cuda):
            raise ValueError(failure)
        with replacing(_description_of(target)) as description:
            description.write_text(json.dumps(_described(unfinished)))


def _architectures_here() -> str:
    """List this machine's GPUs as in TORCH_CUDA_ARCH_LIST, without those below 8.0 (Ampere), which have no kernels."""
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found) if major >= 8)
