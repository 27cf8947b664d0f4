"""``python -m benchmarks static``: the compilers' report of every kernel. Needs no GPU.

Every Triton kernel is compiled for each architecture in the configurations that the launchers choose, and the CUDA
kernels are read from the built extension. The report fails if a kernel spills registers, or lacks the matrix or
bulk-copy instructions that it is written for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from benchmarks import sources
from benchmarks.cases import DTYPES, dtype_name
from benchmarks.measure import BAR
from benchmarks.stored import misfit
from benchmarks.tables import grouped, table
from dtr_kernels import ops, verify
from dtr_kernels.files import expecting, read_json, replacing
from dtr_kernels.ops import extension
from dtr_kernels.ops.declaration import SIZES, Draw, Precision, Sizes, mode_name
from dtr_kernels.ops.dispatch import recording
from dtr_kernels.ops.tiles import forced
from dtr_kernels.ops.tuned_tiles import Crossover, Tuned, packaged

WIDTHS = (384, 768, 1024, 1152)  # of DiT-S, B, L and XL
TOKENS = (256, 16)  # for patches of 2 and of 8, in latents of 32 x 32
# Loads of single elements of a bias are allowed.
_MOST_NARROW = 2
GEMMS = ("window_forward", "window_input_gradient", "window_weight_gradient", "closed_form")
_RELATIVE = "benchmarks/results/static"
REPORT = sources.ROOT / _RELATIVE
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

# --- occupancy -------------------------------------------------------------------------------------------------------

# Limits of one multiprocessor, the same for every architecture here.
_WARPS, _BLOCKS, _REGISTERS, _SCHEDULERS = 64, 32, 65536, 4
# Registers are allocated to warps, shared memory to blocks, in multiples of these; the system takes a KiB per block.
_REGISTER_UNIT, _SHARED_UNIT, _SHARED_RESERVED = 256, 128, 1024


class Multiprocessor(NamedTuple):
    """The names of its GPUs; bytes of shared memory, in total and at most per block; and columns of tensor memory."""

    name: str
    shared: int
    shared_per_block: int
    tensor_columns: int = 0


PROCESSORS = {
    80: Multiprocessor("Ampere: A100", 164 << 10, 163 << 10),
    90: Multiprocessor("Hopper: H100, H200", 228 << 10, 227 << 10),
    100: Multiprocessor("Blackwell: B200", 228 << 10, 227 << 10, tensor_columns=512),
}


class Occupancy(NamedTuple):
    """Blocks and warps that run on a multiprocessor at a time, and the resource that limits them."""

    blocks: int
    warps: int
    limit: str

    @property
    def share(self) -> float:
        """The share of the most warps that a multiprocessor takes."""
        return self.warps / _WARPS


def _rounded_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


# --- binaries --------------------------------------------------------------------------------------------------------

# Instructions by name, with regular expressions that find them in PTX, and their opcodes in machine code, one a line.
MATRIX = {
    "mma.sync": (r"\bmma\.sync\b", r"^[HI]MMA\b"),
    "wgmma": (r"\bwgmma\.mma_async\b", r"^[HIQ]GMMA\b"),
    "tcgen05": (r"\btcgen05\.mma\b", r"^UTC[HIQO]MMA\b"),
}
COPIES = {
    "cp.async.bulk": (r"\bcp\.async\.bulk\.tensor\b", r"^(?:UTMALDG|UBLKCP)\b"),
    "cp.async": (r"\bcp\.async\.c[ag]\b", r"^LDGSTS\b"),
}


@dataclass(frozen=True)
class Usage:
    """The resources that one kernel takes of a multiprocessor, and the instructions that use them.

    Attributes:
        threads: of a block. registers: of a thread. instructions: of its code.
        spilled: bytes of a thread's stack and local memory, where registers are spilled to.
        shared: bytes of a block. tensor_columns: of Blackwell's tensor memory that a block allocates.
        matrix, copies: counts of the instructions in ``MATRIX`` and ``COPIES``.
        buffers: tiles of an operand that are in flight to shared memory or in use; 0 if loads are synchronous.
        narrow: number of instructions that load or store single elements of 16 bits in global memory.
    """

    threads: int
    registers: int
    instructions: int
    spilled: int
    shared: int
    tensor_columns: int
    matrix: Mapping[str, int]
    copies: Mapping[str, int]
    buffers: int
    narrow: int

    def occupancy(self, arch: int) -> Occupancy:
        """Return how many of its blocks run on a multiprocessor of this architecture at a time."""
        processor = PROCESSORS[arch]
        warps = -(-self.threads // 32)
        registers_of_warp = _rounded_up(32 * self.registers, _REGISTER_UNIT)
        # A warp's registers all belong to one scheduler.
        warps_with_registers = _SCHEDULERS * (_REGISTERS // _SCHEDULERS // max(1, registers_of_warp))
        blocks = {
            "registers": warps_with_registers // warps,
            "shared memory": processor.shared // (_rounded_up(self.shared, _SHARED_UNIT) + _SHARED_RESERVED),
            "warps": _WARPS // warps,
            "blocks": _BLOCKS,
        }
        if self.tensor_columns:
            blocks["tensor memory"] = processor.tensor_columns // self.tensor_columns
        if self.shared > processor.shared_per_block:
            blocks["shared memory"] = 0
        fewest = min(blocks.values())
        limit = " and ".join(name for name, number in blocks.items() if number == fewest)
        return Occupancy(fewest, fewest * warps, limit)


class Function(NamedTuple):
    """A CUDA kernel in a binary: its usage, and its opcodes, one a line."""

    usage: Usage
    opcodes: str

    def count(self, opcode: str) -> int:
        """Count instructions whose opcodes begin with a match of the regular expression."""
        return len(re.findall(f"^(?:{opcode})", self.opcodes, re.MULTILINE))


def functions(path: Path, arch: int) -> dict[str, Function]:
    """Return the CUDA kernels for an architecture in an object file or a library, by mangled name.

    Raises:
        subprocess.CalledProcessError: if the file holds no kernels at all.
    """
    for_arch = f"--gpu-architecture=sm_{arch}"
    threads = {
        name: int(attributes, 16)
        for name, attributes in re.findall(
            r"^\.nv\.info\.(\S+)$.*?EIATTR_MAX_THREADS.*?Value:\s*(0x[0-9a-f]+)",
            cuobjdump("--dump-elf", for_arch, path),
            re.DOTALL | re.MULTILINE,
        )
    }
    code = dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", cuobjdump("--dump-sass", for_arch, path), re.S))
    found = {}
    for name, *numbers in _resource_usage(cuobjdump("--dump-resource-usage", for_arch, path)):
        registers, stack, shared, local = map(int, numbers)
        if arch >= 90 and shared:  # here the figure includes the system's part
            shared -= _SHARED_RESERVED
        opcodes = opcodes_of(code[name])
        matrix, copies = (_found(known, opcodes, in_code=True) for known in (MATRIX, COPIES))
        # It waits until this many groups, issued after the tile in use, are left; one more is issued next.
        groups = [int(group, 16) for group in re.findall(r"\bDEPBAR\.LE SB0, (0x[0-9a-f]+)", code[name])]
        buffers = max(groups, default=0) + 2 if copies else 0
        narrow = len(re.findall(r"^(?:LDG|STG)\.E\.[US]16\b", opcodes, re.MULTILINE))
        usage = Usage(
            threads[name],
            registers,
            len(opcodes.splitlines()),
            stack + local,
            shared,
            0,
            matrix,
            copies,
            buffers,
            narrow,
        )
        found[name] = Function(usage, opcodes)
    return found


def opcodes_of(code: str) -> str:
    """Return the opcodes of a kernel's machine code, one a line."""
    return "\n".join(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+ )?([A-Z][\w.]*)", code, re.MULTILINE))


def usage_of_binary(binary: Binary) -> Usage:
    """Read the usage of a Triton kernel from its binary and its intermediate code."""
    compiled = binary.compiled
    registers, spilled = _registers(compiled.asm["cubin"])
    matrix, copies = (_found(known, compiled.asm["ptx"], in_code=False) for known in (MATRIX, COPIES))
    # The pipeliner adds a first dimension to a tile, of the number of buffers.
    buffers = re.findall(r"local_alloc : \(\) -> .*<(\d+)x\d+x(?:\d+x)+b?f\d+,.*\bmutable\b", compiled.asm["ttgir"])
    return Usage(
        threads=32 * compiled.metadata.num_warps,
        registers=registers,
        instructions=_instructions(compiled.asm["cubin"]),
        spilled=spilled,
        shared=compiled.metadata.shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", 0),
        matrix=matrix,
        copies=copies,
        buffers=max(map(int, buffers), default=0),
        narrow=len(re.findall(r"\b(?:ld|st)\.global\S*\.b16\b", compiled.asm["ptx"])),
    )


def _instructions(cubin: bytes) -> int:
    """Count the instructions of the one kernel in a binary, 16 bytes each, by the size of its section: disassembling
    takes longer than compiling."""
    (headers,) = struct.unpack_from("<Q", cubin, 40)
    size, number = struct.unpack_from("<HH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + size * i) for i in range(number)]
    return sum(length // 16 for _, _, flags, _, _, length in sections if flags & 4)  # executable


def _found(known: Mapping[str, tuple[str, str]], text: str, in_code: bool) -> dict[str, int]:
    """Count the occurrences of these instructions in machine code, or in PTX; missing ones are left out."""
    counts = {name: len(re.findall(patterns[in_code], text, re.MULTILINE)) for name, patterns in known.items()}
    return {name: number for name, number in counts.items() if number}


@cache
def _registers(cubin: bytes) -> tuple[int, int]:
    """Return registers, and bytes of stack and local memory, of a thread of the one kernel in a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        [(_, registers, stack, _, local)] = _resource_usage(cuobjdump("--dump-resource-usage", Path(file.name)))
    return int(registers), int(stack) + int(local)


def _resource_usage(text: str) -> list[tuple[str, ...]]:
    """Return (name, registers, stack, shared, local) of each kernel."""
    return re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)


def cuobjdump(*arguments: str | Path) -> str:
    """Return the output of a tool that comes with Triton."""
    # It calls nvdisasm by name.
    environment = os.environ | {"PATH": f"{_TOOLS}:{os.environ['PATH']}"}
    command = [_TOOLS / "cuobjdump", *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


# --- compiling instead of launching ----------------------------------------------------------------------------------


class Target:
    """Replaces Triton's GPU driver and names the architecture to compile for."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch  # Triton caches compiled kernels per device

    def get_current_stream(self, device: object = None) -> int:
        return 0


class Binary(NamedTuple):
    """A compiled Triton kernel: its name, the launch's mode, its constants with warps and stages, and the binary."""

    kernel: str
    mode: str
    options: Mapping[str, Any]
    compiled: Any


def binaries(arch: int, dtype: torch.dtype, sizes: Sizes, tile: str | None = None) -> list[Binary]:
    """Compile every declared Triton kernel in each of its modes for an architecture, without a GPU.

    Args:
        arch: compute capability, as 80, 90 or 100.
        dtype: of the operands.
        sizes: of the arguments, which have no storage.
        tile: compile only the kernels whose tile has this name.
    """
    draw = Draw(sizes, Precision(dtype, dtype), torch.device("meta"))
    kernels = [replace(kernel, sizes=[sizes]) for kernel in ops.KERNELS if kernel.sizes is SIZES]
    found = []
    triton.runtime.driver.set_active(Target(arch))
    try:
        with recording(arch) as launches:
            for call in verify.calls(draw.device, kernels):
                if tile is None or (tile in call.kernel.tiles(**call.mode) and call.way != verify.LIBRARY):
                    with call.forced():
                        call.kernel.launch(**call.kernel.inputs(draw, **call.mode))
                for kernel, programs, args, options in launches:
                    compiled = kernel.warmup(*args, grid=(programs,), **options)
                    name = kernel.__name__.removesuffix("_kernel")
                    found.append(Binary(name, mode_name(call.mode), options, compiled))
                launches.clear()
    finally:
        triton.runtime.driver.set_active(None)  # finds the real driver at the next use
    return found


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A kernel in one configuration, compiled for one architecture.

    Attributes:
        kernel: such as "window_forward"; for a CUDA kernel, its name in the source.
        language: "Triton" or "CUDA".
        dtype: of its operands; "" for a kernel with one type for all.
        tile: sides of the tile, warps and stages; for a CUDA kernel, its template's number K.
        chosen: the origin of the tile: "default", the GPU that it was tuned for, or "" if there is no choice.
        tokens, widths, modes: the samples' tokens and channels, and the launcher's modes, that share this ``usage``.
    """

    arch: int
    language: str
    kernel: str
    dtype: str
    tile: Mapping[str, int]
    chosen: str
    tokens: Sequence[int]
    widths: Sequence[int]
    modes: Sequence[str]
    usage: Usage

    @property
    def complaints(self) -> list[str]:
        """The faults of the kernel, as sentences."""
        usage, where = self.usage, f"{self.title} on sm_{self.arch}"
        said = []
        if usage.spilled:
            said.append(f"{where} spills: {usage.registers} registers and {usage.spilled} bytes of local memory")
        if usage.occupancy(self.arch).blocks == 0:
            said.append(f"{where} does not fit a multiprocessor")
        if self.kernel == "gram_tiled" and "cp.async" not in usage.copies:
            said.append(f"{where} does not copy asynchronously")
        # Without a copy engine, tensor descriptors become loads of unknown alignment.
        if self.language == "Triton" and self.arch >= 90 and usage.narrow > _MOST_NARROW:
            said.append(f"{where} loads or stores {usage.narrow} times single elements of 16 bits")
        if self.kernel not in GEMMS:
            return said
        # Warpgroup instructions take 64 rows; samples of fewer tokens use the older instructions.
        instruction = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}[self.arch if self.tile["m"] >= 64 else 80]
        if self.dtype == "tf32" and not usage.matrix:
            said.append(f"{where} has no matrix instructions")
        if self.dtype in ("bf16", "fp16") and instruction not in usage.matrix:
            said.append(f"{where} has no {instruction}")
        if self.arch >= 90 and "cp.async.bulk" not in usage.copies:
            said.append(f"{where} does not load through tensor descriptors")
        return said

    @property
    def title(self) -> str:
        """A line that distinguishes the row from the others of its architecture."""
        tile = " ".join(f"{name} {value}" for name, value in self.tile.items())
        sizes = f"{_listed(self.tokens)} tokens, {_listed(self.widths)} channels" if self.widths else ""
        modes = " or ".join(f"({mode})" for mode in self.modes if mode)
        return ", ".join(
            part for part in (f"{self.kernel} {modes}".strip(), self.dtype, tile, self.chosen, sizes) if part
        )

    def as_json(self) -> dict[str, Any]:
        """Return all fields, and the occupancy."""
        occupied = self.usage.occupancy(self.arch)
        return asdict(self) | {"occupancy": occupied._asdict() | {"share": occupied.share}}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Row:
        """Read the result of ``as_json``."""
        known = {name: value for name, value in stored.items() if name in cls.__dataclass_fields__}
        return cls(**known | {"usage": Usage(**stored["usage"])})


def rows_of_launchers(
    arch: int, dtype: torch.dtype, sizes: Sizes, tile: str | None = None, chosen: str = "default"
) -> list[Row]:
    """Return rows of the Triton kernels that the launchers run at these sizes.

    Args:
        arch, dtype, sizes, tile: as for ``binaries``.
        chosen: the origin of the tiles.
    """
    rows = []
    for binary in binaries(arch, dtype, sizes, tile):
        options = binary.options
        sides = {
            name.removeprefix("BLOCK_").lower(): value
            for name, value in options.items()
            if name.startswith(("BLOCK", "ROWS"))
        }
        sides |= {name: options[f"num_{name}"] for name in ("warps", "stages") if f"num_{name}" in options}
        rows.append(
            Row(
                arch,
                "Triton",
                binary.kernel,
                "tf32" if options.get("PRECISION") == "tf32" else dtype_name(dtype),
                sides,
                chosen,
                [sizes.N],
                [sizes.C],
                [binary.mode],
                usage_of_binary(binary),
            )
        )
    return rows


def rows_of_tuned(entry: Tuned) -> list[Row]:
    """Return the rows of the kernels of a tuned configuration."""
    # The sums over tokens read a gradient with the channels of q, k and v.
    channels = entry.channels // 3 if entry.op == "token_sums" else entry.channels
    # Rows of a closed form are samples.
    sizes = Sizes(entry.rows if entry.op == "closed_form" else 8, entry.rows, channels)
    where = entry.measurement
    with forced(entry.op, entry.tile):
        rows = rows_of_launchers(where.capability, getattr(torch, entry.dtype), sizes, entry.op, where.gpu)
    # Others are of kernels that run along with the tuned one.
    return [row for row in rows if row.tile == entry.tile._asdict()]


_CUDA_NAME = re.compile(r"_ZN3dtr4cuda\d+(\w+?)_kernel(?:I(f|6__half|13__nv_bfloat16)(?:Li(\d+)E)?E)?[Ev]")
_CUDA_DTYPES = {"": "", "f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}


def rows_of_extension(path: Path, arch: int) -> list[Row]:
    """Return the rows of the CUDA kernels in an object file or library."""
    rows = []
    for mangled, function in functions(path, arch).items():
        match = _CUDA_NAME.match(mangled)
        if match is None:
            raise ValueError(f"{path} holds a kernel with an unknown kind of name, {mangled}")
        name, dtype, number = match.groups("")
        tile = {"K": int(number)} if number else {}
        rows.append(Row(arch, "CUDA", name, _CUDA_DTYPES[dtype], tile, "", [], [], [], function.usage))
    return sorted(rows, key=lambda row: (row.kernel, row.dtype, *row.tile.values()))


def jobs_for(architectures: Sequence[int]) -> list[Callable[[], list[Row]]]:
    """Return functions that together return the rows of every Triton kernel, with default and with packaged tiles."""
    # Each width separately, with 8 samples: the tokens of all samples are the rows of a GEMM without windows.
    problems = itertools.product(architectures, DTYPES.values(), TOKENS, WIDTHS)
    jobs: list[Callable[[], list[Row]]] = [
        partial(rows_of_launchers, arch, dtype, Sizes(8, tokens, width)) for arch, dtype, tokens, width in problems
    ]
    tuned = [
        entry
        for entry in packaged()
        if entry.measurement.capability in architectures and not isinstance(entry.tile, Crossover)
    ]
    return jobs + [partial(rows_of_tuned, entry) for entry in tuned]


def joined(rows: Iterable[Row]) -> list[Row]:
    """Join rows that differ only in widths, then those that differ only in tokens, then in modes."""
    merged = list(rows)
    for name in ("widths", "tokens", "modes"):
        groups = grouped(merged, partial(_all_but, name))
        changes: list[Any] = [{name: sorted({x for row in alike for x in getattr(row, name)})} for alike in groups]
        merged = [replace(alike[0], **change) for alike, change in zip(groups, changes, strict=True)]
    return merged


def _all_but(name: str, row: Row) -> str:
    return json.dumps(asdict(row) | {name: []}, sort_keys=True)


# --- report ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """All rows, with the versions of the compilers and the fingerprint of the source.

    ``no_cuda`` says why there are no CUDA kernels among them; None if there are.
    """

    triton: str
    nvcc: str | None
    no_cuda: str | None
    sources: str
    rows: Sequence[Row]

    @classmethod
    def collect(cls, architectures: Sequence[int]) -> Report:
        """Compile and read everything, on all cores and with a progress bar."""
        no_cuda, nvcc = extension.unavailable, None
        if no_cuda is None:
            config = extension.kernels.build_config()
            no_cuda, nvcc = config["no_cuda_reason"], config["cuda"]
        jobs = jobs_for(architectures)
        if nvcc:
            jobs += [partial(rows_of_extension, Path(extension.kernels.__file__), arch) for arch in architectures]
        # Processes, since Triton's compiler parses Python, which is not safe in threads before Python 3.13.
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as workers:
            compiled = [workers.submit(job) for job in jobs]
            try:
                rows = [row for future in tqdm(compiled, "compiling", **BAR) for row in future.result()]
            except BaseException:
                workers.shutdown(cancel_futures=True)
                raise
        fingerprint = sources.fingerprint_of("dtr_kernels.ops")
        return cls(triton.__version__, nvcc, no_cuda, fingerprint, joined(rows))

    @property
    def complaints(self) -> list[str]:
        """The complaints of all rows."""
        return [complaint for row in self.rows for complaint in row.complaints]

    def as_json(self) -> str:
        """Return everything as JSON, one line for each row."""
        facts = {key: value for key, value in vars(self).items() if key != "rows"}
        rows = ",\n  ".join(json.dumps(row.as_json(), separators=(",", ":")) for row in self.rows)
        return json.dumps(facts)[:-1] + f', "rows": [\n  {rows}\n]}}\n'

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a file that holds the result of ``as_json``.

        Raises:
            OSError: if the file cannot be read.
            ValueError: naming the file, if it holds anything else.
        """
        with expecting("what compilers say of these kernels", path, "make it anew with python -m benchmarks static"):
            stored = read_json(path)
            report = cls(**stored | {"rows": [Row.from_json(row) for row in stored["rows"]]})
            if wrong := misfit(report, Report, "report"):
                raise ValueError(f"{wrong} is of another type")
            report.markdown()
            return report

    def markdown(self) -> str:
        """Write the report's tables."""
        said = [f"- **{complaint}**" for complaint in self.complaints]
        parts = [
            "# What compilers say of every kernel",
            f"Written by `python -m benchmarks static` without a GPU, with Triton {self.triton} and nvcc "
            f"{self.nvcc or '(none)'}; fingerprint of the source: `{self.sources}`.",
            _LEGEND,
            "\n".join(said or ["No kernel spills registers or lacks an instruction that it was written for."]),
        ]
        for arch, processor in PROCESSORS.items():
            rows = [row for row in self.rows if row.arch == arch]
            if not rows:
                continue
            parts += [f"## sm_{arch} ({processor.name})", _table_of_launchers(rows)]
            cuda = [row for row in rows if row.language == "CUDA"]
            if cuda:
                parts += [f"CUDA kernels of gradient surgery on sm_{arch}:", _table_of_cuda(cuda)]
            else:
                parts += [f"The extension has no CUDA kernels for sm_{arch}{f': {self.no_cuda}' * bool(self.no_cuda)}."]
        return "\n\n".join(parts) + "\n"


_LEGEND = """\
A line is a kernel in one configuration. A Triton kernel is compiled once for each mode of its launcher (routed or not,
with a residual update or without, ...), and a CUDA kernel for each dtype; cells give the smallest and largest figure.

- tile: rows x columns x depth of a GEMM, tokens x channels of others; then warps and pipeline stages
- instructions, 16-bit accesses: of all its code; those that load or store a single element of 16 bits in global memory
- spilled, shared: bytes of stack and local memory of a thread; of shared memory of a block
- blocks, occupancy: that run on a multiprocessor at a time, and their share of its 64 warps; what limits them
- buffers: tiles of an operand that are on their way to shared memory or in use; 0 where loads are waited for
- matrix, copies: instructions found, by their names in PTX"""


def _table_of_launchers(rows: Sequence[Row]) -> str:
    triton_rows = [row for row in rows if row.language == "Triton"]
    lines = []
    for members in grouped(triton_rows, lambda row: (row.kernel, row.dtype, tuple(row.tile.items()), row.chosen)):
        one, *_ = members
        widths, tokens, modes = (
            sorted({size for row in members for size in getattr(row, name)}) for name in ("widths", "tokens", "modes")
        )
        sides = {name: value for name, value in one.tile.items() if name not in ("warps", "stages")}
        others = [f"{value} {name}" for name, value in one.tile.items() if name not in sides]
        tile = ", ".join([" x ".join(map(str, sides.values())), *others])
        facts = [one.kernel, one.dtype, _listed(widths), _listed(tokens), tile, one.chosen, str(len(modes))]
        lines.append([*facts, *_figures(members)])
    head = ["kernel", "dtype", "widths", "tokens", "tile", "chosen", "modes", *_FIGURES]
    return table([head, *_with_dtypes_joined(sorted(lines, key=lambda line: line[0]))])


def _table_of_cuda(rows: Sequence[Row]) -> str:
    lines = [
        [one.kernel, " ".join(map(str, one.tile.values())), str(one.usage.threads), *_figures([one, *others])]
        for one, *others in grouped(rows, lambda row: (row.kernel, *row.tile.values()))
    ]
    return table([["kernel", "K", "threads", *_FIGURES], *lines])


_FIGURES = [
    "registers",
    "instructions",
    "16-bit accesses",
    "spilled",
    "shared",
    "blocks",
    "occupancy",
    "limited by",
    "buffers",
    "matrix",
    "copies",
]


def _figures(rows: Sequence[Row]) -> list[str]:
    usages = [row.usage for row in rows]
    occupied = [row.usage.occupancy(row.arch) for row in rows]
    return [
        _range(usage.registers for usage in usages),
        _range(usage.instructions for usage in usages),
        _range(usage.narrow for usage in usages),
        _range(usage.spilled for usage in usages),
        _range(usage.shared for usage in usages),
        _range(each.blocks for each in occupied),
        _range((100 * each.share for each in occupied), "%"),
        _distinct(each.limit for each in occupied),
        _range(usage.buffers for usage in usages),
        _distinct(" and ".join(usage.matrix) for usage in usages),
        _distinct(" and ".join(usage.copies) for usage in usages),
    ]


def _range(numbers: Iterable[float], unit: str = "") -> str:
    least, *_, most = (f"{number:.3g}{unit}" if unit else str(number) for number in sorted(numbers) * 2)
    return least if least == most else f"{least} to {most}"


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(sorted({text or "none" for text in texts}))


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _with_dtypes_joined(lines: Iterable[list[str]]) -> list[list[str]]:
    """Join lines that differ only in the dtype."""
    groups = grouped(lines, lambda line: (line[0], *line[2:]))
    return [[one[0], ", ".join(line[1] for line in (one, *others)), *one[2:]] for one, *others in groups]


# --- command line ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``static``."""
    parser.add_argument(
        "--arch", nargs="+", type=int, choices=PROCESSORS, default=(), help="default: all; a part is only printed"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"for {REPORT.name}.json and .md; default: {_RELATIVE}")


def main(arguments: argparse.Namespace) -> int:
    """Print and store the report; return 1 if a kernel spills or lacks instructions."""
    report = Report.collect(arguments.arch or tuple(PROCESSORS))
    print(report.markdown())
    if folder := arguments.out or (None if arguments.arch else REPORT):
        for name, text in ("static.json", report.as_json()), ("static.md", report.markdown()):
            with replacing(folder / name) as draft:
                draft.write_text(text, encoding="utf-8")
    for complaint in report.complaints:
        print(complaint, file=sys.stderr)
    return int(bool(report.complaints))
