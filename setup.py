"""Builds the extension ``dtr_kernels._C``; everything else is declared in pyproject.toml.

The build needs a C++17 compiler and no PyTorch. Without a compiler the package still installs and runs its CPU path
through plain PyTorch; ``python -m dtr_kernels info`` says so.
"""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "dtr_kernels._C",
            ["csrc/bindings.cpp", "csrc/cpu/baseline.cpp", "csrc/cpu/avx2.cpp", "csrc/cpu/avx512.cpp"],
            depends=["csrc/cpu/kernels.h", "csrc/cpu/kernels.inl"],
            cxx_std=17,
            # OpenMP is compiled in but not linked: the symbols come from the runtime that PyTorch has loaded.
            extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
            optional=True,
        )
    ]
)
