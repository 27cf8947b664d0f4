"""Every Triton kernel, in every configuration that the launchers use, compiled for sm_80, sm_90 and sm_100 without a
GPU.

A kernel may not spill registers, a GEMM in a 16-bit dtype must use the matrix instructions of its architecture, and
from sm_90 on load through tensor descriptors: ``static.Row.complaints``.
"""

from __future__ import annotations

import itertools
import os
import random
import re
from pathlib import Path

import pytest
import torch
from triton.backends.nvidia.compiler import CUDABackend

from benchmarks import static
from dtr_kernels import ops
from dtr_kernels.ops import tuned_tiles, window_linear
from dtr_kernels.ops.declaration import Sizes
from dtr_kernels.ops.tiles import GemmTile, RowTile, Tuned

pytestmark = pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter compiles nothing")

# Every function that Triton compiles to be launched.
KERNELS = {
    name.removesuffix("_kernel")
    for path in Path(ops.__file__).parent.glob("*.py")
    for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GEMM_TILES = ("forward", "input_gradient", "weight_gradient")
MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def complaints(rows):
    return [complaint for row in rows for complaint in row.complaints]


def test_no_spills_and_matrix_instructions():
    rows = static.rows_of_launchers(90, torch.bfloat16, Sizes(2, 256, 1152))
    assert {row.kernel for row in rows} == KERNELS
    check(rows)


# Compiling everything takes minutes: ``python -m benchmarks static`` does, norms for these architectures included.
def test_a_problem_drawn_at_random(seed):
    choices = itertools.product((80, 100), DTYPES, (384, 768), (256, 16), GEMM_TILES)
    arch, dtype, channels, tokens, tile = random.Random(seed).choice(list(choices))
    print(f"sm_{arch}, {dtype}, {channels} channels, {tokens} tokens, {tile}")
    rows = static.rows_of_launchers(arch, dtype, Sizes(2, tokens, channels), tile)
    assert rows
    check(rows)


def check(rows):
    assert complaints(rows) == []
    for row in rows:
        assert (row.dtype != "fp32" and row.kernel in static.GEMMS) == bool(row.usage.matrix), row.title
        if row.tokens == [256] and row.kernel != "closed_form":  # whose rows are samples, of which there are two
            assert row.usage.matrix.keys() <= {MATRIX[row.arch]}, row.title
        if row.arch >= 90 and row.usage.matrix:
            assert row.usage.buffers >= 2, f"{row.title} does not load ahead"


@pytest.fixture(scope="module")
def hopper():
    """The kernels of DiT-XL/2 in bf16 for sm_90, with their machine code."""
    found = {}
    for binary in static.binaries(90, torch.bfloat16, Sizes(2, 256, 1152)):
        found.setdefault((binary.kernel, binary.compiled.hash), binary)
    return list(found.values())


def opcodes_of(binary, path):
    path.write_bytes(binary.compiled.asm["cubin"])
    opcodes = static.opcodes_of(static.cuobjdump("--dump-sass", path)).splitlines()
    assert len(opcodes) == static.usage_of_binary(binary).instructions
    return opcodes


def count(opcodes, pattern):
    return sum(re.match(pattern, opcode) is not None for opcode in opcodes)


# For each GEMM the most instructions after the last product, of which an epilogue consists, with GELU and without.
EPILOGUES = {"window_forward": (400, 1900), "window_input_gradient": (300, 3100), "window_weight_gradient": (300, 0)}


@pytest.mark.parametrize("kernel", EPILOGUES)
def test_gemms_store_by_the_copy_engine_and_load_three_steps_ahead(hopper, kernel, tmp_path):
    found = [each for each in hopper if each.kernel == kernel]
    assert found
    for binary in found:
        opcodes = opcodes_of(binary, tmp_path / "cubin")
        assert count(opcodes, "STG") == 0 < count(opcodes, "UTMASTG"), binary.mode
        length = next(n for n, opcode in enumerate(reversed(opcodes)) if "GMMA" in opcode)
        print(f"{kernel}, {binary.mode or 'only'}: {length} of {len(opcodes)} instructions after the last product")
        assert length <= EPILOGUES[kernel][bool(binary.options.get("GELU"))], f"{binary.mode}: {length}"
        assert static.usage_of_binary(binary).buffers == 3
        assert count(opcodes, "LDSM") == 0 or binary.options.get("GELU"), (
            f"{binary.mode}: operands go through registers"
        )


def test_norms_read_and_write_whole_vectors(hopper, tmp_path):
    """A compact u too, since it begins at a whole vector: neither loads nor stores are of 16 bits."""
    norms = [each for each in hopper if each.kernel.startswith("gated_norm")]
    assert [each.mode for each in norms if static.usage_of_binary(each).narrow] == []
    # Disassembling takes long: one mode of each kernel, with a compact u and without.
    disassembled = {(each.kernel, each.options["COMPACT"]): each for each in norms}
    assert len(disassembled) == 2 * len({each.kernel for each in norms})
    for binary in disassembled.values():
        opcodes = opcodes_of(binary, tmp_path / "cubin")
        assert count(opcodes, r"(LDG|STG)\.E\.U16") == 0, binary.mode
        # With two rows a thread's vectors have 8 bytes.
        assert count(opcodes, r"STG\.E\.(64|128)") > 0, binary.mode


def test_batches_and_long_samples_share_binaries():
    """Nothing that is compiled depends on them: 1 and multiples of 16 would else have binaries of their own."""
    sizes = [Sizes(1, 256, 1152), Sizes(2, 250, 1152), Sizes(16, 129, 1152)]
    found = [
        {(binary.kernel, binary.compiled.hash) for binary in static.binaries(90, torch.bfloat16, size)}
        for size in sizes
    ]
    # Those of activations are of all elements at once, and the rows of a closed form are samples.
    by_size = {"activation_forward", "activation_backward", "closed_form"}
    found = [{pair for pair in pairs if pair[0] not in by_size} for pairs in found]
    assert found[0] == found[1] == found[2]


@pytest.fixture
def without_machine_code(monkeypatch, tmp_path):
    """Triton ends with its IR for GPUs, and remembers nothing of it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(static.Target, "get_current_device", lambda _: -1)
    for stage in ("make_llir", "make_ptx"):
        monkeypatch.setattr(CUDABackend, stage, lambda _, ir, *args: ir)
    facts = {"name": "", "shared": 0}
    monkeypatch.setattr(CUDABackend, "make_cubin", lambda _, ir, metadata, *args: metadata.update(facts) or b"")


def test_sizes_of_one_compile(without_machine_code):
    """Triton makes an argument that is 1 a constant of another type, which the interpreter does not."""
    found = static.binaries(90, torch.bfloat16, Sizes(3, 1, 1))
    assert {binary.kernel for binary in found} == KERNELS
    assert all("ttg." in binary.compiled.asm["ttgir"] for binary in found)


def test_tf32_uses_the_matrix_units_where_pytorch_may(monkeypatch):
    monkeypatch.setattr(window_linear, "dot_precision", lambda dtype: "tf32")
    for tile in GEMM_TILES:
        rows = static.rows_of_launchers(90, torch.float32, Sizes(2, 256, 384), tile)
        assert {row.dtype for row in rows if row.kernel in static.GEMMS} == {"tf32"}
        assert complaints(rows) == []


def tuned(op, tile, rows, channels, dtype="float32"):
    measurement = tuned_tiles.Measurement("NVIDIA H0", 90, "2.13.0", "3.7.1", None, "2026-01-01", "tune", "0123")
    return Tuned(op, dtype, channels, rows, 100, tile, 1e-5, 2e-5, measurement)


def test_a_tuned_tile_that_spills_is_found(monkeypatch, tmp_path):
    small, large = RowTile(1, 1024, 8), RowTile(16, 1024, 1)
    entries = [tuned("residual_backward", small, 128, 768), tuned("residual_forward", large, 128, 768)]
    tuned_tiles.write(tmp_path / "nvidia-h0.json", entries)
    defaults = len(static.jobs_for([90]))
    monkeypatch.setattr(tuned_tiles, "PACKAGED", tmp_path)
    assert len(static.jobs_for([80])) == defaults, "the entries are of another architecture"
    rows = [row for job in static.jobs_for([90])[defaults:] for row in job()]
    assert {row.chosen for row in rows} == {"NVIDIA H0"}
    assert {(row.kernel, row.tile["rows"]) for row in rows} == {
        ("gated_residual_backward", 1),
        ("gated_residual_forward", 16),
    }
    found = complaints(rows)
    assert found and all("gated_residual_forward" in said and "spills" in said for said in found)


@pytest.mark.parametrize("op", ["forward_gelu", "closed_form", "token_sums"])
def test_a_tuned_tile_is_compiled_alone(op):
    tile = tuned_tiles.SumTile(128, 2) if op == "token_sums" else GemmTile(32, 64, 32, 4, 2)
    entry = tuned(op, tile, 32, 384 * (3 if op == "token_sums" else 1), "bfloat16")
    rows = static.rows_of_tuned(entry)
    assert {tuple(row.tile.values()) for row in rows} == {tuple(tile)}
    assert {row.usage.threads for row in rows} == {32 * tile.warps}
