"""Builds the extension ``dtr_kernels._C`` as dtr_kernels/compilation.py says; pyproject.toml declares everything else.

Where a compiler is missing or fails, the package installs with what could be built and says so here;
``python -m dtr_kernels info`` says it later. With DTR_CUDA=13.0 it is built with CUDA 13.0 or not at all, and the
version says so.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# By its path: the package imports PyTorch, which the build does not need.
spec = importlib.util.spec_from_file_location("compilation", "dtr_kernels/compilation.py")
compilation = sys.modules["compilation"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compilation)


class BuildExtension(build_ext):
    def build_extension(self, extension: Extension) -> None:
        # setuptools builds editable installs in a folder that it deletes; a lasting one recompiles only what changed.
        folder = Path("build/editable" if self.editable_mode else self.build_temp)
        target = Path(self.get_ext_fullpath(extension.name))
        cuda = compilation.find_cuda()
        error = compilation.build(Path(), folder, target, cuda)
        if error and required:
            sys.exit(f"DTR_CUDA={required}: {error}")
        if error and not cuda.missing:
            cuda = compilation.Cuda(
                missing=f"{cuda.nvcc} {cuda.version} failed; see what it says and {compilation.AGAIN}"
            )
            error = compilation.build(Path(), folder, target, cuda)
        if error:
            target.unlink(missing_ok=True)  # an older build's
            print(f"dtr_kernels: built without compiled kernels: {error}", flush=True)
        elif cuda.missing:
            print(f"dtr_kernels: built without CUDA kernels: {cuda.missing}", flush=True)

    def copy_extensions_to_source(self) -> None:
        for extension in self.extensions:
            Path(self.get_ext_filename(extension.name)).unlink(missing_ok=True)  # an older build's
        super().copy_extensions_to_source()


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # the sources go with the package, for python -m dtr_kernels build
            copy = Path(self.build_lib, "dtr_kernels", "csrc")
            shutil.rmtree(copy, ignore_errors=True)  # an older build's
            shutil.copytree("csrc", copy)


required = None if compilation.asked_cuda() == "0" else compilation.asked_cuda()
version = re.search(r'^__version__ = "(.+)"', Path("dtr_kernels/__init__.py").read_text(), re.MULTILINE)[1]
if required and "sdist" not in sys.argv:  # a source distribution is for every CUDA version
    version += f"+cu{required.replace('.', '')}"
setup(
    version=version,
    license="MIT",
    ext_modules=[Extension("dtr_kernels._C", compilation.sources(Path()), optional=True)],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
