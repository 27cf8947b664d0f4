"""Which tile a kernel runs with: the defaults, the files that go before them, and forced ones."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import environment
from dtr_kernels.ops import dispatch, residual, tiles, tuned_tiles, window_linear
from dtr_kernels.ops.tiles import KINDS, NEVER, Crossover, GemmTile, RowTile, SumTile, forced
from dtr_kernels.ops.tuned_tiles import Measurement, Tuned
from dtr_kernels.ops.window_linear import Band

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
GPU = "NVIDIA H200"
MEASUREMENT = Measurement(
    GPU, 90, "2.13.0", "3.7.1", "a" * 40, "2026-11-01T00:00:00+00:00", "python -m benchmarks", "0"
)
SPECIAL = GemmTile(64, 64, 32, 4, 5)  # no default


def entry(op="forward", dtype="bfloat16", channels=1152, rows=128, tile=SPECIAL, measurement=MEASUREMENT, active=100):
    return Tuned(op, dtype, channels, rows, active, tile, 1e-5, 2e-5, measurement)


def ask(op="forward", dtype=bf16, rows=256, channels=1152, active=100):
    """Return the tile that a launcher on an H200 gets."""
    x = SimpleNamespace(device=torch.device("cuda"), get_device=lambda: 0, dtype=dtype)
    return KINDS[op].tile(x, rows, channels, active)


def forget():
    tiles.forget()
    dispatch.capability_of.cache_clear()


@pytest.fixture
def files(monkeypatch, tmp_path):
    """Paths of the user's and of the package's file of a GPU that there seems to be. Neither exists."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tuned_tiles, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(tiles, "_forced", {})  # what tests of kernels want
    monkeypatch.setenv("DTR_KERNELS_CACHE", str(tmp_path / "cache"))
    forget()
    yield SimpleNamespace(user=tuned_tiles.user_file(GPU), packaged=tuned_tiles.packaged_file(GPU))
    forget()


# --- defaults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op, dtype, rows, channels, arch, tile",
    [
        ("forward", bf16, 256, 1152, 90, GemmTile(128, 256, 64, 8, 3)),
        ("forward", bf16, 256, 1152, 80, GemmTile(64, 128, 32, 8, 3)),
        ("forward", fp32, 256, 384, 90, GemmTile(64, 64, 16, 8, 2)),
        ("forward_gelu", fp16, 16, 384, 100, GemmTile(16, 128, 64, 4, 3)),
        ("input_gradient", fp32, 20, 384, 80, GemmTile(32, 64, 16, 4, 2)),
        ("gelu_input_gradient", bf16, 8192, 1152, 90, GemmTile(128, 256, 64, 8, 3)),
        ("gelu_input_gradient", bf16, 8192, 1152, 120, GemmTile(64, 128, 32, 8, 3)),
        ("weight_gradient", bf16, 256, 1152, 90, GemmTile(128, 256, 64, 8, 5)),
        ("weight_gradient", bf16, 20, 1152, 90, GemmTile(128, 256, 32, 8, 5)),
        ("weight_gradient", fp16, 256, 1152, 80, GemmTile(128, 128, 32, 8, 3)),
        ("weight_gradient", fp32, 256, 384, 100, GemmTile(64, 64, 16, 8, 2)),
        ("token_sums", bf16, 256, 3456, 90, SumTile(256, 4)),
        ("token_sums", bf16, 256, 100, 90, SumTile(128, 4)),
        ("norm_forward", bf16, 256, 384, 90, RowTile(4, 512, 4)),
        ("norm_forward_update", bf16, 256, 1152, 90, RowTile(2, 2048, 16)),
        ("norm_backward", fp32, 256, 40, 80, RowTile(4, 64, 1)),
        ("norm_backward", bf16, 256, 1152, 90, RowTile(1, 2048, 8)),
        ("norm_backward_update", bf16, 256, 1152, 90, RowTile(1, 2048, 16)),
        ("residual_forward", bf16, 256, 1152, 90, RowTile(4, 2048, 16)),
        ("residual_backward", fp32, 64, 1024, 80, RowTile(4, 1024, 8)),
        ("gelu_forward", fp16, 16, 1152, 80, Crossover(NEVER)),
        ("gelu_forward", bf16, 256, 384, 120, Crossover(NEVER)),
        ("gelu_forward", bf16, 256, 384, 90, Crossover(1)),
        ("gelu_backward", fp16, 256, 1152, 100, Crossover(1)),
        ("gelu_backward", fp32, 256, 1152, 100, Crossover(NEVER)),
    ],
)
def test_defaults(op, dtype, rows, channels, arch, tile):
    """Written down, so that no change of a default goes unnoticed: it makes every result stale."""
    assert KINDS[op].default(dtype, rows, channels, arch) == tile


@pytest.mark.parametrize(
    "channels, active, forward, backward",
    [
        # Forward: 0.9 x 243 steps less 14 x 6 are 6.2 ns a token, and 10 µs are 1,600 of them. Backward: 0.9 x 2.16
        # products less 1.73 are 2.4 ns, and 185 µs are 77,000.
        (1152, 20, 2048, 1 << 17),
        (1152, 50, 4096, NEVER),  # 14 x 11 of 243 steps; 2.22 of 2.16 products
        (1152, 80, NEVER, NEVER),  # 14 x 17 of 243 steps
        (1152, 100, NEVER, NEVER),
        (768, 20, 8192, 1 << 19),  # 9 x 5 of 108 steps; 1.95 of 2.24 products, which saves 0.3 ns of 152 µs
        (768, 50, 16384, NEVER),  # 9 x 8
        (768, 80, NEVER, NEVER),  # 9 x 12
        (384, 20, 1 << 16, NEVER),  # 5 x 4 of 27 steps
        (384, 50, NEVER, NEVER),  # 5 x 5
        (384, 80, NEVER, NEVER),
        (4096, 80, 2048, NEVER),  # 48 x 54 of 3,072 steps: of a long contraction a tile's ends are a small part
        (40, 1, NEVER, NEVER),
    ],
)
def test_windows_run_by_default_where_they_are_predicted_to_take_a_tenth_less(channels, active, forward, backward):
    for op, tokens in (("windows_forward", forward), ("windows_backward", backward)):
        for dtype, arch in ((bf16, 90), (fp16, 100)):
            assert KINDS[op].default(dtype, 256, channels, arch, active) == Crossover(tokens)
        for dtype, arch in ((fp32, 90), (bf16, 80), (bf16, 120)):
            assert KINDS[op].default(dtype, 256, channels, arch, active) == Crossover(NEVER)


def test_every_default_could_be_an_entry(seed):
    random.seed(seed)
    for op in KINDS:
        for dtype in (bf16, fp16, fp32):
            for arch in (75, 80, 89, 90, 100, 120):
                rows, channels = random.choice([1, 16, 17, 100, 128, 5000]), random.randint(1, 5000)
                tile = KINDS[op].default(dtype, rows, channels, arch, random.randint(1, 100))
                problem = KINDS[op].problem(tile, tuned_tiles.rows_class(rows), channels)
                assert problem is None, (op, rows, channels)


def test_without_a_gpu_no_file_is_read(files, monkeypatch):
    """In Triton's interpreter, where a CPU stands in for a GPU, and where kernels are compiled for another machine."""
    monkeypatch.setattr(tiles, "read", lambda path: pytest.fail(f"{path} was read"))
    assert KINDS["forward"].tile(torch.empty(1, dtype=bf16), 256, 1152) == GemmTile(128, 256, 64, 8, 3)
    with dispatch.recording(80):
        x = torch.empty(1, dtype=bf16, device="meta")
        assert KINDS["forward"].tile(x, 256, 1152) == GemmTile(64, 128, 32, 8, 3)


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_users_entry_goes_before_the_packages_and_both_before_the_default(files):
    default = KINDS["forward"].default(bf16, 256, 1152, 90)
    assert ask() == default
    tuned_tiles.write(files.packaged, [entry(tile=GemmTile(128, 64, 32, 4, 3)), entry(channels=384, tile=default)])
    forget()
    assert ask() == GemmTile(128, 64, 32, 4, 3)
    tuned_tiles.write(files.user, [entry(tile=SPECIAL)])
    forget()
    assert ask() == SPECIAL
    assert ask(channels=384) == default  # which only the package has; the user's is of another width


def test_the_nearest_width_in_proportion(files):
    narrow, wide = GemmTile(64, 64, 32, 4, 3), GemmTile(64, 128, 32, 4, 3)
    tuned_tiles.write(files.user, [entry(channels=384, tile=narrow), entry(channels=1152, tile=wide)])
    asked = {channels: ask(channels=channels) for channels in (1, 384, 660, 670, 1152, 9000)}
    assert asked == {1: narrow, 384: narrow, 660: narrow, 670: wide, 1152: wide, 9000: wide}


def test_the_nearest_share_of_active_channels_in_proportion(files):
    """A share that is half as large again says nothing; of another width of the stream counts what is nearer in all."""
    narrow, wide, other = Crossover(256), Crossover(1 << 20), Crossover(512)
    found = [entry("windows_forward", active=20, tile=narrow), entry("windows_forward", active=80, tile=wide)]
    tuned_tiles.write(files.user, found)
    asked = {active: ask("windows_forward", active=active) for active in (1, 14, 20, 29, 40, 54, 80, 100)}
    default = KINDS["windows_forward"].default(bf16, 256, 1152, 90, 40)
    assert asked | {1: default} == dict(zip(asked, [default, *[narrow] * 3, default, *[wide] * 3], strict=True))
    tuned_tiles.write(files.user, [found[1], entry("windows_forward", channels=384, active=60, tile=other)])
    forget()
    assert [ask("windows_forward", channels=C, active=active) for C, active in ((1152, 60), (384, 80))] == [wide, other]


def test_rows_dtype_and_op_must_be_the_same(files):
    tuned_tiles.write(files.user, [entry(rows=64, tile=SPECIAL)])
    assert [ask(rows=rows) == SPECIAL for rows in (32, 33, 64, 65, 256)] == [False, True, True, False, False]
    assert ask(rows=64, dtype=fp16) != SPECIAL
    assert ask("input_gradient", rows=64) != SPECIAL


def test_a_row_kernel_takes_no_tile_for_longer_or_shorter_rows(files):
    """Its registers hold whole rows: what fits twice as many channels would spill, or leave half of them idle."""
    tile = RowTile(1, 2048, 8)
    tuned_tiles.write(files.user, [entry("norm_forward", channels=1152, tile=tile)])
    assert ask("norm_forward", channels=1152) == ask("norm_forward", channels=1025) == tile
    assert ask("norm_forward", channels=1024) == RowTile(4, 1024, 8)


def test_a_tuned_crossover_goes_before_the_default(files):
    found = [entry("windows_forward", tile=Crossover(512)), entry("gelu_forward", tile=Crossover(NEVER))]
    tuned_tiles.write(files.user, [*found, entry("gelu_backward", dtype="float32", tile=Crossover(64))])
    asked = [ask(op) for op in ("windows_forward", "windows_backward", "gelu_forward", "gelu_backward")]
    assert asked == [Crossover(512), Crossover(NEVER), Crossover(NEVER), Crossover(1)]
    assert ask("gelu_backward", dtype=fp32) == Crossover(64)


def test_a_crossover_in_words():
    words = {1: "always", 2: "from 2 tokens on", NEVER // 2: "from 536,870,912 tokens on", NEVER: "never"}
    assert {tokens: str(Crossover(tokens)) for tokens in words} == words


def test_what_was_measured_with_another_capability_is_ignored(files):
    tuned_tiles.write(files.user, [entry(measurement=replace(MEASUREMENT, capability=100))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask() != SPECIAL


def broken(change):
    """The text of a file with one entry that ``change`` was applied to."""

    def text(path):
        tuned_tiles.write(path, [entry()])
        stored = json.loads(path.read_text())
        change(stored)
        return json.dumps(stored).encode()

    return text


def change_entry(**fields):
    return broken(lambda stored: stored["entries"][0].update(fields))


def change_crossover(tokens):
    return change_entry(op="gelu_forward", tile={"tokens": tokens})


def change_tile(**sides):
    return broken(lambda stored: stored["entries"][0]["tile"].update(sides))


@pytest.mark.parametrize(
    "text, reason",
    [
        (lambda path: b"", "does not hold JSON"),
        (lambda path: b"\xff\xfe", "does not hold JSON"),
        (lambda path: b"[" * 100_000, "does not hold JSON"),
        (lambda path: b"[" * 30_000_000, "does not hold JSON"),
        (lambda path: b'{"format": 1' + b"0" * 5000 + b"}", "more than 64 bits"),
        (lambda path: b'{"format": 1e400}', "larger than a float"),
        (lambda path: b'{"' + b"long" * 8_000_000 + b'": 1}', "KeyError: 'format'"),
        (lambda path: b"[1, 2]", "does not hold tuned tiles"),
        (lambda path: b"NaN", "does not hold tuned tiles"),
        (lambda path: b'{"format": 2, "entries": []}', "measurements"),
        (broken(lambda stored: stored.update(format=1)), "format is version 1, and this dtr_kernels reads 2"),
        (broken(lambda stored: stored["measurements"][0].update(date=7)), "date"),
        (broken(lambda stored: stored["measurements"].clear()), "IndexError"),
        (change_entry(op="backward"), "no op 'backward'"),
        (change_entry(op="forward" * 1_000_000), "no op 'forward"),
        (change_entry(op=["forward"]), "unhashable"),
        (change_entry(op="norm_forward"), "does not hold tuned tiles"),  # with the tile of a GEMM
        (change_entry(dtype="float64"), "dtype"),
        (change_entry(channels=0), "channels"),
        (change_entry(rows=48), "rows"),
        (change_entry(active=0), "active must be a whole number of per cent between 1 and 100, got 0"),
        (change_entry(active=101), "between 1 and 100, got 101"),
        (change_entry(active=0.5), "between 1 and 100, got 0.5"),
        (change_entry(rows=32), "more than its 32 rows"),
        (change_entry(op="weight_gradient", rows=16), "k of its tile, 32, is more than its 16 rows"),
        (change_entry(channels=10**400), "more than 64 bits"),
        (change_entry(channels=2**63 - 1), "channels"),
        (change_entry(channels=math.nan), "channels"),
        (change_entry(seconds=-1.0), "seconds"),
        (change_entry(seconds=math.nan), "seconds"),
        (change_entry(default_seconds=math.inf), "seconds"),
        (change_entry(surplus=1), "surplus"),
        (change_tile(n=96), "n of its tile must be a power of two"),
        (change_tile(k=8), "k of its tile must be a power of two between 16 and 256, got 8"),
        (change_tile(m="64"), "m of its tile"),
        (change_tile(warps=64), "warps"),
        (change_tile(stages=0), "stages of its tile must be a whole number between 1 and 8"),
        (
            change_entry(op="norm_forward", tile={"rows": 1, "block": 1024, "warps": 8}),
            "block of its tile must be 2048",
        ),
        (change_entry(op="norm_forward", tile={"rows": 64, "block": 2048, "warps": 8}), "rows of its tile"),
        (change_crossover(0), "tokens of its tile must be a power of two between 1 and 1073741824, got 0"),
        (change_crossover(3 << 8), "tokens of its tile must be a power of two between 1 and 1073741824, got 768"),
        (change_crossover(2 * NEVER), "between 1 and 1073741824, got 2147483648"),
        (change_crossover(True), "tokens of its tile must be a power of two between 1 and 1073741824, got True"),
        (change_crossover(64.0), "tokens of its tile must be a power of two between 1 and 1073741824, got 64.0"),
        (change_crossover("never"), "got 'never'"),
        (change_crossover("never" * 1_000_000), "tokens of its tile must be"),
        (change_entry(op="gelu_forward"), "does not hold tuned tiles"),  # with the tile of a GEMM
        (change_entry(tile={"tokens": 64}), "does not hold tuned tiles"),  # of a GEMM
        (os.mkdir, "is not a file"),
        (os.mkfifo, "is not a file"),
    ],
)
def test_a_file_that_cannot_be_used_makes_one_warning(files, text, reason):
    files.user.parent.mkdir(parents=True)
    tuned_tiles.write(files.packaged, [entry(tile=GemmTile(128, 64, 32, 4, 3))])
    if text in (os.mkdir, os.mkfifo):
        text(files.user)
    else:
        files.user.write_bytes(text(files.user))
    with pytest.warns(RuntimeWarning) as caught:
        assert ask() == GemmTile(128, 64, 32, 4, 3)
        assert ask("weight_gradient") == GemmTile(128, 256, 64, 8, 5)
    (warning,) = caught
    message = str(warning.message)
    assert str(files.user) in message and "python -m benchmarks tune" in message
    assert reason.lower() in message.lower() and len(message) < 800


def test_where_no_file_can_be_there_is_nothing_to_warn_of(files, monkeypatch):
    monkeypatch.setenv("DTR_KERNELS_CACHE", "/dev/null/.cache")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask() == GemmTile(128, 256, 64, 8, 3)


def test_files_are_read_once_and_not_before_the_first_launch(files):
    code = "import dtr_kernels.ops.tiles as t; print(t.configuration.cache_info().misses, t._tile.cache_info().misses)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0"]
    tuned_tiles.write(files.user, [entry()])
    assert ask() == SPECIAL
    files.user.unlink()
    assert ask() == ask(rows=300) == SPECIAL


def test_a_file_is_read_as_it_was_written(files):
    later = replace(MEASUREMENT, date="2027-01-01", commit=None)
    entries = [
        entry(),
        entry(channels=384, measurement=later),
        entry("norm_backward", "float32", 1152, 16, RowTile(1, 2048, 16), later),
        entry("token_sums", "float16", 3456, 64, SumTile(512, 8)),
        entry("windows_forward", tile=Crossover(4096), active=20),
        entry("windows_forward", tile=Crossover(NEVER), active=80),
        entry("gelu_backward", "float32", tile=Crossover(NEVER)),
    ]
    tuned_tiles.write(files.user, entries)
    assert sorted(tuned_tiles.read(files.user), key=str) == sorted(entries, key=str)
    assert len(json.loads(files.user.read_text())["measurements"]) == 2


def test_an_interrupted_write_leaves_the_file_as_it_was(files, monkeypatch):
    tuned_tiles.write(files.user, [entry()])
    before = files.user.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tuned_tiles.write(files.user, [entry(channels=384)])
    assert files.user.read_bytes() == before
    assert list(files.user.parent.iterdir()) == [files.user]


def test_where_the_users_file_is(monkeypatch, tmp_path):
    name = Path("tuned/nvidia-h200.json")
    monkeypatch.delenv("DTR_KERNELS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned_tiles.user_file(GPU) == tmp_path / ".cache" / "dtr_kernels" / name
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuned_tiles.user_file(GPU) == tmp_path / "xdg" / "dtr_kernels" / name
    monkeypatch.setenv("DTR_KERNELS_CACHE", str(tmp_path / "own"))
    assert tuned_tiles.user_file(GPU) == tmp_path / "own" / name


@pytest.mark.parametrize(
    "gpu, slug", [(GPU, "nvidia-h200"), ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb"), ("Tesla T4 ", "tesla-t4")]
)
def test_files_are_named_as_folders_of_results_are(monkeypatch, gpu, slug):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    assert tuned_tiles.slug(gpu) == environment.folder_name(torch.device("cuda")) == slug


def test_packaged_files_can_be_read_and_have_their_gpus_name():
    for path in tuned_tiles.PACKAGED.glob("*.json"):
        for entry in tuned_tiles.read(path):
            assert path == tuned_tiles.packaged_file(entry.measurement.gpu)


def test_packaged_gives_the_entries_of_all_files(files):
    assert tuned_tiles.packaged() == []
    other = entry(measurement=replace(MEASUREMENT, gpu="NVIDIA B200", capability=100))
    tuned_tiles.write(files.packaged, [entry()])
    tuned_tiles.write(tuned_tiles.packaged_file("NVIDIA B200"), [other])
    assert tuned_tiles.packaged() == [other, entry()]


# --- forced tiles ----------------------------------------------------------------------------------------------------


@pytest.fixture
def launched():
    """The launches of an H200, which are not made."""
    with dispatch.recording(90) as launches:
        yield launches


def weight_gradient(dtype=bf16, tokens=256):
    g, u = torch.zeros(2, tokens, 96, dtype=dtype), torch.zeros(2, tokens, 48, dtype=dtype)
    window_linear.weight_gradient(g, u, Band(torch.zeros(2, dtype=torch.int32), u.shape[2]), 64)


def test_a_launch_makes_a_context_current_before_descriptors_are_encoded(monkeypatch):
    """Triton makes one current too, but later, which is too late on a thread that has not used the GPU."""
    done = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: done.append("context"))
    kernel = {(3,): lambda *args, **options: done.append((args, options))}
    descriptor = SimpleNamespace(base=SimpleNamespace(device=torch.device("cuda")))
    dispatch.launch(kernel, 3, descriptor, 7, BLOCK=16)
    assert done == ["context", ((descriptor, 7), {"BLOCK": 16})]


def test_a_forced_tile_reaches_the_launch(launched):
    tile = GemmTile(64, 32, 16, 2, 5)
    weight_gradient()
    with forced("weight_gradient", tile), forced("forward", SPECIAL):
        weight_gradient()
    weight_gradient()
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    default = GemmTile(128, 256, 64, 8, 5)
    assert [tuple(launch.options[name] for name in names) for launch in launched] == [default, tile, default]


def test_forcing_ends_with_its_block_whatever_happens_there(files):
    default = ask()
    with pytest.raises(ZeroDivisionError), forced("forward", SPECIAL):
        with forced("forward", default):
            assert ask() == default
        assert ask() == SPECIAL
        raise ZeroDivisionError
    assert ask() == default


def choose_gemm(tokens, width, op="windows_forward"):
    """Return what a launcher chooses for so many tokens of two samples."""
    x, weight = (torch.empty(shape, dtype=bf16, device="meta") for shape in ((2, tokens // 2, 1152), (3456, 1152)))
    return window_linear.choose_gemm(op, x, torch.zeros(2, dtype=torch.int32), width, weight)


def contracts_windows(tokens, op="windows_forward"):
    """Return whether it chooses windows of 0.8."""
    return choose_gemm(tokens, 921, op).path == "windows"


@pytest.mark.parametrize(
    "op, width, tokens, path",
    [
        ("windows_forward", 230, 2048, "windows"),
        ("windows_forward", 230, 2046, "dense"),
        ("windows_forward", 576, 2048, "dense"),
        ("windows_forward", 576, 4096, "windows"),
        ("windows_forward", 921, 1 << 20, "dense"),
        ("windows_backward", 230, 65536, "dense"),
        ("windows_backward", 230, 1 << 17, "windows"),
        ("windows_backward", 576, 1 << 20, "dense"),
    ],
)
def test_how_wide_a_window_is_decides_which_gemm_runs_by_default(launched, files, op, width, tokens, path):
    choice = choose_gemm(tokens, width, op)
    assert choice.path == path
    said = f"with {width} of 1152 channels active, GEMMs over windows are not known to be faster for {tokens:,} tokens"
    assert (said in choice.why) == (path == "dense")


def test_a_forced_crossover_decides_which_gemm_runs(launched, files):
    assert not contracts_windows(1024)
    with forced("windows_forward", Crossover(512)):
        assert [contracts_windows(tokens) for tokens in (510, 512, 1024)] == [False, True, True]
        assert not contracts_windows(1024, "windows_backward")
    with forced("windows_forward", Crossover(NEVER)):
        assert not contracts_windows(1024)


@pytest.mark.parametrize(
    "op, tile, reason",
    [
        ("weight_gradient", GemmTile(64, 64, 64, 4, 3), "k of its tile, 64, is more than its 32 rows"),
        ("weight_gradient", GemmTile(64, 48, 16, 4, 3), "n of its tile must be a power of two"),
        ("weight_gradient", RowTile(1, 64, 4), r"weight_gradient of 20 rows .* its tile must be a GemmTile"),
        ("weight_gradient", Crossover(64), r"its tile must be a GemmTile, got Crossover\(tokens=64\)"),
        ("windows_forward", Crossover(0), "tokens of its tile must be a power of two between 1 and 1073741824, got 0"),
        ("windows_forward", Crossover(100), "power of two .* got 100"),
        ("windows_forward", SPECIAL, r"its tile must be a Crossover, got GemmTile\(m=64"),
    ],
)
def test_what_no_kernel_can_run_with_is_refused(launched, op, tile, reason):
    with forced(op, tile), pytest.raises(ValueError, match=reason):
        weight_gradient(tokens=20) if op == "weight_gradient" else contracts_windows(1024)
    assert not launched


def test_only_what_has_a_tile_can_be_forced():
    with (
        pytest.raises(ValueError, match=r"op must be one of .*\bforward, .*, got 'backward'"),
        forced("backward", SPECIAL),
    ):
        pass


def test_torch_compile_traces_no_lookup(monkeypatch):
    """Inside a compiled function an op is one node of the graph, and asks for its tile when it runs."""
    asked, graphs, ask = [], [], tiles.Tiles.tile
    monkeypatch.setattr(tiles.Tiles, "tile", lambda kind, *args: asked.append(kind.name) or ask(kind, *args))

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        assert not asked
        return graph.forward

    x = torch.zeros(2, 16, 32)
    with dispatch.recording(90):
        torch.compile(residual._op, backend=backend, fullgraph=True)(x, x.clone(), torch.zeros(2, 32))
    assert graphs == [["dtr_kernels.gated_residual.default"]]
    assert asked == ["residual_forward"]
