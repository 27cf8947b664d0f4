"""The static report: occupancy, what is read from binaries, complaints, tables."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_report import rows_of

from benchmarks import static
from dtr_kernels.ops import extension
from dtr_kernels.ops.tuned_tiles import Crossover, packaged

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- occupancy, by hand


@pytest.mark.parametrize(
    "arch, threads, registers, shared, tensor_columns, expected",
    [
        # 64 x 32 = 2048 registers a warp: 8 warps on each of 4 schedulers, 4 warps a block.
        (80, 128, 64, 0, 0, (8, 32, "registers")),
        # 80 x 32 = 2560: 6 warps fit the 16384 registers of a scheduler, though 25 fit 65536.
        (80, 32, 80, 0, 0, (24, 24, "registers")),
        # 33 x 32 = 1056, rounded up to 1280: 12 warps a scheduler, 48 in all.
        (90, 64, 33, 0, 0, (24, 48, "registers")),
        (90, 256, 32, 0, 0, (8, 64, "registers and warps")),
        (90, 32, 16, 0, 0, (32, 32, "blocks")),
        # A block of 33 threads takes two warps.
        (100, 33, 32, 0, 0, (32, 64, "registers and warps and blocks")),
        # (164 - 1) KiB and 1 KiB for the system: all of it.
        (80, 128, 32, 163 << 10, 0, (1, 4, "shared memory")),
        (80, 128, 32, (163 << 10) + 1, 0, (0, 0, "shared memory")),
        # 45 KiB + 1 KiB: 3 on sm_80, 4 on sm_90; 124 x 32 = 3968 is 4096: 16 warps, 3 blocks of 5.
        (80, 160, 124, 45 << 10, 0, (3, 15, "registers and shared memory")),
        (90, 160, 124, 45 << 10, 0, (3, 15, "registers")),
        (90, 160, 32, 45 << 10, 0, (4, 20, "shared memory")),
        # 1 byte takes 128, and 1024 more: 202 blocks would fit.
        (90, 512, 32, 1, 0, (4, 64, "registers and warps")),
        (90, 1024, 72, 0, 0, (0, 0, "registers")),
        (100, 128, 32, 0, 256, (2, 8, "tensor memory")),
        (100, 128, 32, 0, 512, (1, 4, "tensor memory")),
    ],
)
def test_occupancy(arch, threads, registers, shared, tensor_columns, expected):
    usage = static.Usage(threads, registers, 0, 0, shared, tensor_columns, {}, {}, 0, 0)
    found = usage.occupancy(arch)
    assert found == expected
    assert found.share == expected[1] / 64


# ---- rows


def row(**changes):
    usage = {"threads": 256, "registers": 100, "spilled": 0, "shared": 1024, "tensor_columns": 0, "buffers": 3}
    usage |= {"instructions": 900, "narrow": 1}
    usage |= {"matrix": {"wgmma": 4}, "copies": {"cp.async.bulk": 2}}
    usage |= {name: changes.pop(name) for name in list(changes) if name in usage}
    tile = {"m": 128, "n": 256, "k": 64, "warps": 8, "stages": 3}
    facts = {"arch": 90, "language": "Triton", "kernel": "window_forward", "dtype": "bf16", "tile": tile}
    facts |= {"chosen": "default", "tokens": [256], "widths": [384], "modes": ["routed"]}
    return static.Row(**facts | changes, usage=static.Usage(**usage))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, []),
        ({"spilled": 8}, ["spills: 100 registers and 8 bytes"]),
        ({"narrow": 16, "kernel": "gated_norm_forward"}, ["16 times single elements of 16 bits"]),
        ({"shared": 1 << 18}, ["does not fit"]),
        ({"matrix": {"mma.sync": 4}}, ["has no wgmma"]),
        ({"matrix": {"wgmma": 4}, "arch": 100}, ["has no tcgen05"]),
        ({"matrix": {}, "copies": {"cp.async": 2}}, ["has no wgmma", "does not load through tensor descriptors"]),
        ({"matrix": {"mma.sync": 4}, "tile": {"m": 16}}, []),
        ({"matrix": {"mma.sync": 4}, "copies": {}, "arch": 80}, []),
        ({"matrix": {}, "copies": {}, "arch": 80}, ["has no mma.sync"]),
        ({"matrix": {}, "dtype": "fp32"}, []),
        ({"matrix": {}, "dtype": "tf32"}, ["has no matrix instructions"]),
        ({"matrix": {"mma.sync": 4}, "dtype": "tf32"}, []),
        ({"matrix": {}, "copies": {}, "kernel": "gated_norm_forward"}, []),
        ({"matrix": {}, "copies": {}, "kernel": "gram_tiled"}, ["does not copy asynchronously"]),
    ],
)
def test_complaints(changes, said):
    found = row(**changes).complaints
    assert len(found) == len(said)
    for complaint, part in zip(found, said, strict=True):
        assert part in complaint and row(**changes).kernel in complaint


def test_equal_rows_of_other_sizes_are_joined():
    sizes = [(tokens, width) for width in (384, 768) for tokens in (256, 16)]
    rows = [row(tokens=[tokens], widths=[width]) for tokens, width in sizes]
    rows += [row(modes=["unrouted"], tokens=[tokens], widths=[width]) for tokens, width in sizes]
    rows += [row(registers=90), row(dtype="fp16", tokens=[16])]
    assert static.joined(rows) == [
        row(tokens=[16, 256], widths=[384, 768], modes=["routed", "unrouted"]),
        row(registers=90),
        row(dtype="fp16", tokens=[16]),
    ]
    # These are no product of tokens and widths: none may claim a size that was not compiled.
    assert len(static.joined([row(tokens=[16], widths=[384]), row(tokens=[256], widths=[768])])) == 2


def report(*rows):
    return static.Report("3.7.1", "13.0.88", None, "0123456789abcdef", list(rows))


def test_report_is_stored_and_read(tmp_path):
    written = report(row(), row(arch=80, copies={}), row(language="CUDA", kernel="gram", tile={"K": 5}, matrix={}))
    (tmp_path / "static.json").write_text(written.as_json())
    assert static.Report.load(tmp_path / "static.json") == written
    stored = json.loads(written.as_json())["rows"][0]
    assert stored["occupancy"] == {"blocks": 2, "warps": 16, "limit": "registers", "share": 0.25}


def test_markdown_has_a_line_for_each_configuration():
    rows = [row(modes=["routed"]), row(modes=["unrouted"], registers=130, widths=[1152])]
    rows += [replace(each, dtype="fp16") for each in rows]
    text = report(*rows).markdown()
    assert "No kernel spills" in text and "13.0.88" in text and "0123456789abcdef" in text
    (line,) = rows_of(text)
    assert line["dtype"] == "bf16, fp16" and line["widths"] == "384, 1152" and line["modes"] == "2"
    assert line["tile"] == "128 x 256 x 64, 8 warps, 3 stages"
    assert (line["registers"], line["occupancy"]) == ("100 to 130", "12.5% to 25%")
    assert (line["instructions"], line["16-bit accesses"]) == ("900", "1")
    assert (line["matrix"], line["copies"], line["buffers"]) == ("wgmma", "cp.async.bulk", "3")
    assert "sm_90" in text and "sm_80" not in text
    assert "**window_forward (routed), bf16" in report(row(spilled=8)).markdown()


# ---- the built extension


def built_for(arch):
    """The extension; without any CUDA kernels nothing has been compiled by nvcc, and that is no pass."""
    assert extension.kernels, extension.unavailable
    config = extension.kernels.build_config()
    assert config["cuda"], f"{config['no_cuda_reason']}; nvcc comes from PyPI too: see NVCC in the Makefile"
    if f"sm_{arch}" not in config["architectures"]:
        pytest.skip(f"NOT RUN: the extension was built without kernels for sm_{arch}")
    return Path(extension.kernels.__file__)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_cuda_kernels_of_the_extension(arch):
    rows = static.rows_of_extension(built_for(arch), arch)
    assert [complaint for each in rows for complaint in each.complaints] == []
    assert len(rows) == 2 + 3 * (8 + 1 + 4 + 8)
    threads = {"coefficients": 32, "sum_partials": 256, "gram": 256, "gram_tiled": 160, "combine": 128}
    for each in rows:
        assert each.usage.registers <= 255 and each.usage.shared <= 48 << 10, each
        assert each.usage.threads == threads.get(each.kernel, 128)
        assert each.usage.buffers == (3 if each.kernel == "gram_tiled" else 0)
        if each.kernel == "combine":  # its coefficients
            assert each.usage.shared == 4 * each.tile["K"] ** 2
    assert {each.tile["K"] for each in rows if each.kernel == "gram"} == set(range(1, 9))
    assert {each.dtype for each in rows} == {"", "fp32", "bf16", "fp16"}


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_rows_are_loaded_as_vectors(arch):
    seen = set()
    for name, function in static.functions(built_for(arch), arch).items():
        kernel = re.search(r"(coefficients|sum_partials|gram_tiled|gram|combine|weighted_sum)_kernel", name)[1]
        if kernel == "gram_tiled":
            assert function.count(r"LDGSTS\b.*\.128"), (name, function)
        elif kernel in ("gram", "weighted_sum") or "combine_kernelIfLi8" in name:
            assert function.count(r"LDG\..*\.128"), (name, function)
        if kernel == "weighted_sum" or "combine_kernelIfLi8" in name:
            assert function.count(r"STG\..*\.128"), (name, function)
        if kernel == "combine":
            assert function.count(r"LDG\.E(\.64|\.128)?$"), (name, function)
        seen.add(kernel)
    assert seen == {"coefficients", "sum_partials", "gram_tiled", "gram", "combine", "weighted_sum"}


# ---- command line and the committed report


def run(monkeypatch, tmp_path, *command_line, found=()):
    monkeypatch.setattr(static, "REPORT", tmp_path / "committed")
    monkeypatch.setattr(
        static.Report, "collect", lambda architectures: report(*(row(arch=a) for a in architectures), *found)
    )
    parser = argparse.ArgumentParser()
    static.add_arguments(parser)
    return static.main(parser.parse_args(command_line))


def test_command_line_stores_the_whole_report(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path) == 1, "sm_100 has no tcgen05 in these rows"
    assert "tcgen05" in capsys.readouterr().err
    stored = static.Report.load(tmp_path / "committed/static.json")
    assert {each.arch for each in stored.rows} == {80, 90, 100}
    assert (tmp_path / "committed/static.md").read_text() == stored.markdown()


def test_command_line_prints_a_part(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path, "--arch", "90") == 0
    assert "sm_90" in capsys.readouterr().out and not (tmp_path / "committed").exists()
    assert run(monkeypatch, tmp_path, "--arch", "90", "--out", str(tmp_path / "there")) == 0
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"static.json", "static.md"}
    assert run(monkeypatch, tmp_path, "--arch", "90", found=[row(spilled=8)]) == 1
    assert not (tmp_path / "committed").exists()


def test_committed_report_is_the_json_in_words():
    stored = static.Report.load(static.REPORT / "static.json")
    assert (static.REPORT / "static.md").read_text() == stored.markdown()
    assert {each.arch for each in stored.rows} == set(static.PROCESSORS)
    assert {width for each in stored.rows for width in each.widths} >= set(static.WIDTHS)
    assert {each.language for each in stored.rows} == {"Triton", "CUDA"}
    assert stored.complaints == []


def test_committed_report_knows_every_packaged_tile():
    """After a file of tuned tiles comes ``python -m benchmarks static``, which fails if one of them spills."""
    stored = static.Report.load(static.REPORT / "static.json")
    known = [(each.arch, each.chosen, each.tile) for each in stored.rows]
    for entry in packaged():
        if entry.measurement.capability in static.PROCESSORS and not isinstance(entry.tile, Crossover):
            assert (entry.measurement.capability, entry.measurement.gpu, entry.tile._asdict()) in known, entry


# ---- compiling ahead

AHEAD = """
from functools import partial
from benchmarks import ahead

if __name__ == "__main__":
    name = "gated_residual_forward"
    ahead.jobs = lambda: [partial(ahead.smoke, name), partial(ahead.checks, name, "fp32")]
    ahead.main()
    ahead.main()
"""


def test_what_is_compiled_ahead_is_found_by_other_processes(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(static.sources.ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    said = subprocess.check_output([sys.executable, "-c", AHEAD], env=environment, text=True)
    assert re.fullmatch(r"(\d\d?) (.*): 0 found, \1 compiled\n\1 \2: \1 found, 0 compiled\n", said), said
