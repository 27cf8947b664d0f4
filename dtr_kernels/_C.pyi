"""Types of the compiled extension; csrc/cpu/kernels.h and csrc/surgery.h describe its functions.

Addresses are bare. Mistakes that csrc/checks.h finds in addresses, sizes, strides and types raise ValueError before
anything is read or written; the caller guarantees that memory of that size lies behind each address.

The environment variable DTR_ISA (baseline, avx2, avx512) chooses the instruction set, once in a process.
"""

from enum import Enum
from typing import TypedDict

class Type(Enum):
    f32 = 0
    f64 = 1
    bf16 = 2
    f16 = 3

Rows = tuple[int, Type, int]  # address, type, elements from row to row
Shape = tuple[int, int, int, int, int, int]  # B, N, C, address of the windows' starts, width, tokens of a chunk

def norm_forward(
    shape: Shape,
    eps: float,
    compact: bool,
    keep_branch: bool,
    rms: bool,
    stream_type: Type,
    x: Rows,
    branch: Rows,
    stream: Rows,
    u: Rows,
    gate: Rows,
    shift: Rows,
    scale: Rows,
    mean: Rows,
    rstd: Rows,
) -> None: ...
def norm_backward(
    shape: Shape,
    compact: bool,
    keep_branch: bool,
    rms: bool,
    x_is_stream: bool,
    du: Rows,
    dstream: Rows,
    x: Rows,
    branch: Rows,
    dx: Rows,
    dbranch: Rows,
    gate: Rows,
    scale: Rows,
    mean: Rows,
    rstd: Rows,
    inactive: Rows,
    sums: Rows,
) -> None: ...
def residual_forward(shape: Shape, x: Rows, branch: Rows, out: Rows, gate: Rows) -> None: ...
def residual_backward(shape: Shape, dout: Rows, branch: Rows, dbranch: Rows, gate: Rows, sums: Rows) -> None: ...
def activation(kind: str, rows: int, width: int, pre: Rows, act: Rows, dact: Rows, dpre: Rows) -> None: ...

class Gradients:
    sizes: list[int]
    @staticmethod
    def at(type: Type, clusters: int, pointers: list[int], sizes: list[int]) -> Gradients: ...
    @staticmethod
    def of(rows: list | tuple, tensor: type, parameter: type) -> Gradients | None: ...

def gram(gradients: Gradients, out: int) -> None: ...
def combine(gradients: Gradients, coefficients: int) -> None: ...
def weighted_sum(gradients: Gradients, weights: int, out_pointers: list[int]) -> None: ...
def pcgrad_coefficients(clusters: int, gram: int, order: int, out: int) -> None: ...

class BuildConfig(TypedDict):
    compiler: str
    instruction_set: str
    cuda: str | None
    architectures: list[str]
    no_cuda_reason: str | None

def build_config() -> BuildConfig: ...

class cuda:  # a submodule; absent where the extension was built without CUDA
    @staticmethod
    def gram_workspace(gradients: Gradients) -> int: ...
    @staticmethod
    def gram(gradients: Gradients, out: int, workspace: int, stream: int) -> None: ...
    @staticmethod
    def pcgrad_coefficients(clusters: int, gram: int, order: int, out: int, stream: int) -> None: ...
    @staticmethod
    def combine(gradients: Gradients, coefficients: int, stream: int) -> None: ...
    @staticmethod
    def weighted_sum(gradients: Gradients, weights: int, out_pointers: list[int], stream: int) -> None: ...
    @staticmethod
    def unsupported() -> str | None: ...
