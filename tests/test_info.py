"""``python -m dtr_kernels info``: whatever was built and whatever device there is, it says what runs and why."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from test_tiles import GPU, files  # noqa: F401  # a fixture

import dtr_kernels
import dtr_kernels.__main__ as command_line
from benchmarks import environment
from dtr_kernels import info
from dtr_kernels.ops import dispatch, extension, tiles, triton_version, tuned_tiles
from dtr_kernels.ops.tuned_tiles import KINDS, NEVER, Crossover, GemmTile, Measurement, Tuned

ROOT = Path(__file__).parent.parent
WITHOUT_CUDA = {"compiler": "1.2", "instruction_set": "baseline", "cuda": None, "architectures": []}
WITHOUT_CUDA |= {"no_cuda_reason": "nvcc was lost"}
WITH_CUDA = WITHOUT_CUDA | {"cuda": "13.0", "architectures": ["sm_90", "compute_90"], "no_cuda_reason": None}


@pytest.mark.parametrize(
    "installed_torch, installed_triton, fitting",
    [
        ("2.13.0+cpu", "3.9.0", "3.7"),
        ("2.13.0+cpu", "3.7.1", None),
        ("2.10.0", "3.6.1", None),
        ("2.10.0", "3.10.0", "3.6"),
        ("2.8.0a0+git1234", "3.7.0", "3.4"),
        ("2.15.0", "3.8.0", "3.9"),
        ("2.99.0", "3.9.0", None),
        ("3.0.0", "4.0.0", None),
    ],
)
def test_names_the_triton_that_fits_pytorch(monkeypatch, capsys, installed_torch, installed_triton, fitting):
    monkeypatch.setattr(torch, "__version__", installed_torch)
    monkeypatch.setattr(triton, "__version__", installed_triton)
    info.show()
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("problems"))
    if fitting is None:
        assert shown == "problems     none"
    else:
        assert f"triton {installed_triton} does not fit torch {installed_torch}" in shown
        assert shown.endswith(f'pip install "triton=={fitting}.*"')


def test_the_triton_of_each_pytorch_is_the_one_in_the_docs():
    page = (ROOT / "docs" / "install.md").read_text()
    releases = re.search(r"^\| PyTorch \| (.*) \|$", page, re.MULTILINE)[1].split(" | ")
    tritons = re.search(r"^\| Triton \| (.*) \|$", page, re.MULTILINE)[1].split(" | ")
    documented = {
        release: triton for together, triton in zip(releases, tritons, strict=True) for release in together.split(", ")
    }
    table = {".".join(map(str, t)): ".".join(map(str, fits)) for t, fits in triton_version._TRITON_OF_TORCH.items()}
    assert documented == table


def test_the_first_launch_warns_of_a_triton_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    monkeypatch.setattr(dispatch, "_INTERPRETED", True)
    triton_version.warn_of_mismatch.cache_clear()
    launched = []
    kernel = {(2,): lambda x: launched.append(x)}
    with pytest.warns(RuntimeWarning, match=r"does not fit torch 2\.13\.0") as warned:
        for _ in range(2):
            dispatch.launch(kernel, 2, torch.ones(1))
    assert len(launched) == 2 and len(warned) == 1
    triton_version.warn_of_mismatch.cache_clear()


def test_covers_every_op_device_and_dtype():
    ops = json.loads(json.dumps(info.collect()))["ops"]
    helpers = {"pcgrad_coefficients", "random_order"}  # K x K numbers, not gradients
    assert set(ops) == set(dtr_kernels.ops.__all__) - helpers
    for by_device in ops.values():
        assert len(by_device) == 1 + torch.cuda.device_count()
        for by_dtype in by_device.values():
            assert set(by_dtype) == {"float32", "bfloat16", "float16", "float64"}


@pytest.mark.parametrize(
    ("config", "says"),
    [(WITH_CUDA, "CUDA 13.0 for sm_90 compute_90"), (WITHOUT_CUDA, "no CUDA kernels: nvcc was lost")],
)
def test_shows_the_cuda_build_or_why_there_is_none(monkeypatch, capsys, config, says):
    if extension.kernels is None:
        pytest.skip("NOT RUN: the extension is not built")
    monkeypatch.setattr(extension.kernels, "build_config", lambda: config)
    info.show()
    assert says in capsys.readouterr().out


def test_says_why_pytorch_runs(monkeypatch, capsys):
    monkeypatch.setattr(extension, "unavailable", "the extension was lost")
    monkeypatch.setattr(extension, "kernels", None)
    facts = info.collect()
    assert facts["extension"] == "the extension was lost"
    assert facts["ops"]["gram"]["cpu"]["float32"] == "PyTorch ops: the extension was lost"
    assert "fp64" in facts["ops"]["gram"]["cpu"]["float64"]
    info.show()
    shown = capsys.readouterr().out
    assert "extension    the extension was lost" in shown
    assert "plain PyTorch (the reference): the extension was lost" in shown


def tuned(capability=90, commit="0123456789abcdef", date="2026-11-01"):
    measurement = Measurement(GPU, capability, "2.13.0", "3.7.1", commit, date, "tune", "0")
    return Tuned("forward", "bfloat16", 1152, 128, 100, GemmTile(64, 64, 32, 4, 3), 1e-5, 2e-5, measurement)


ONE = "1 entry, forward in bfloat16 of 1152 channels"


@pytest.mark.parametrize(
    "packaged, user, says",
    [
        ([], [], "defaults: not tuned for NVIDIA H200; run python -m benchmarks tune"),
        ([tuned(capability=80)], [], "defaults: not tuned for NVIDIA H200; run python -m benchmarks tune"),
        ([tuned()], [], f"packaged file (2026-11-01, 0123456789ab): {ONE}; defaults otherwise"),
        ([tuned(commit=None)], [], f"packaged file (2026-11-01): {ONE}; defaults otherwise"),
        ([], [tuned()], f"user's file ({{user}}): {ONE}; defaults otherwise"),
        (
            [tuned()],
            [tuned()],
            f"user's file ({{user}}): {ONE}; packaged file (2026-11-01, 0123456789ab): {ONE}; defaults otherwise",
        ),
    ],
)
@pytest.mark.usefixtures("files")
def test_says_where_a_gpus_tiles_are_from(packaged, user, says):
    for path, entries in ((tuned_tiles.packaged_file(GPU), packaged), (tuned_tiles.user_file(GPU), user)):
        if entries:
            tuned_tiles.write(path, entries)
    said = info._tiles(0).removesuffix(" from a checkout")
    assert said == says.format(user=tuned_tiles.user_file(GPU))


def test_says_what_is_tuned():
    entry = tuned()
    gemms = ("forward", "forward_gelu", "input_gradient", "gelu_input_gradient")
    entries = [replace(entry, op=op, channels=channels) for op in gemms for channels in (1152, 384)]
    entries += [replace(entry, op=op, dtype="float32") for op in gemms[:2]]
    entries.append(replace(entry, rows=64))
    assert info._summary(entries) == (
        f"11 entries, 4 of {len(KINDS)} ops in bfloat16 of 384 and 1152 channels, "
        "forward and forward_gelu in float32 of 1152 channels"
    )


@pytest.mark.usefixtures("files")
def test_says_from_how_many_tokens_on_our_gemms_run_and_which_are_tuned_where():
    assert info._crossovers(0) == [
        "windows_forward at beta 0.2 in bfloat16 and float16: from 65,536 tokens on (default) with 384 channels, "
        "from 8,192 tokens on (default) with 768 channels, from 4,096 tokens on (default) with 1024 channels, "
        "from 2,048 tokens on (default) with 1152 channels",
        "windows_forward at beta 0.5 in bfloat16 and float16: never (default) with 384 channels, "
        "from 16,384 tokens on (default) with 768 channels, from 8,192 tokens on (default) with 1024 channels, "
        "from 4,096 tokens on (default) with 1152 channels",
        "windows_forward at beta 0.8 and windows_backward at beta 0.5 and 0.8 in bfloat16 and float16: never (default)",
        "windows_forward, windows_backward, gelu_forward and gelu_backward in float32: never (default)",
        "windows_backward at beta 0.2 in bfloat16 and float16: never (default) with 384 channels, "
        "from 524,288 tokens on (default) with 768 channels, from 131,072 tokens on (default) with 1024 and "
        "1152 channels",
        "gelu_forward and gelu_backward in bfloat16 and float16: always (default)",
    ]
    tiles.forget()
    forward = replace(tuned(), op="windows_forward", active=50, tile=Crossover(2048))
    packaged = [forward, replace(forward, channels=384, tile=Crossover(16384))]
    user = [replace(forward, tile=Crossover(1024))]
    user += [replace(forward, op="gelu_forward", active=100, tile=Crossover(NEVER))]
    user += [replace(forward, op="windows_backward", active=80, tile=Crossover(NEVER))]
    user += [replace(forward, op="windows_backward", active=20, tile=Crossover(64))]
    other_samples = replace(forward, op="gelu_backward", active=100, rows=64, tile=Crossover(64))
    tuned_tiles.write(tuned_tiles.packaged_file(GPU), packaged)
    tuned_tiles.write(tuned_tiles.user_file(GPU), [*user, other_samples])
    said = info._crossovers(0)
    assert (
        "windows_forward at beta 0.5 in bfloat16: from 16,384 tokens on (packaged file) with 384 channels, "
        "from 1,024 tokens on (user's file) with 768, 1024 and 1152 channels"
    ) in said
    assert "windows_backward at beta 0.2 in bfloat16: from 64 tokens on (user's file)" in said
    assert "windows_backward at beta 0.8 and gelu_forward in bfloat16: never (user's file)" in said
    assert "gelu_backward in bfloat16 and float16: always (default)" in said


@pytest.mark.usefixtures("files")
def test_a_broken_file_makes_a_warning_and_is_not_called_tuned():
    tuned_tiles.write(tuned_tiles.user_file(GPU), [tuned()])
    tuned_tiles.user_file(GPU).write_text("{}")
    with pytest.warns(RuntimeWarning, match="nvidia-h200.json"):
        assert info._tiles(0).startswith("defaults: ")


def test_shows_tiles_and_crossovers_of_each_gpu_and_nothing_without_one(monkeypatch, capsys):
    facts = info.collect()
    given = {"tiles": ["as tuned", "defaults"], "crossovers": [["one: always", "other: never"], ["one"]]}
    monkeypatch.setattr(info, "collect", lambda: facts | given)
    info.show()
    shown = capsys.readouterr().out
    assert "tiles        cuda:0: as tuned\n" in shown and "tiles        cuda:1: defaults\n" in shown
    first, second = shown.split("crossovers   ")[1:]
    assert first.startswith("cuda:0, tokens of a batch from which on our GEMM runs instead of cuBLAS, 256 a sample:\n")
    assert "             one: always\n             other: never\n" in first
    assert second.startswith("cuda:1, ") and "             one\n" in second
    monkeypatch.setattr(info, "collect", lambda: facts | {"tiles": [], "crossovers": []})
    info.show()
    shown = capsys.readouterr().out
    assert "tiles" not in shown and "crossovers " not in shown


@pytest.mark.usefixtures("files")
def test_results_say_which_tiles_they_ran_with(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    facts = info.collect()
    monkeypatch.setattr(info, "collect", lambda: facts | {"tiles": [info._tiles(0), "of another"]})
    on_gpus = [environment.describe(torch.device(name))["tiles"] for name in ("cuda", "cuda:1")]
    assert on_gpus == [info._tiles(0), "of another"]
    assert "tiles" not in environment.describe(torch.device("cpu"))


@pytest.mark.gpu
def test_says_of_a_gpu_where_its_tiles_are_from_and_that_cuda_kernels_run_or_why_not():
    facts = info.collect()
    assert len(facts["tiles"]) == len(facts["crossovers"]) == torch.cuda.device_count()
    for dtype, path in facts["ops"]["gram"]["cuda:0"].items():
        assert path == "CUDA kernels" or path.startswith("PyTorch ops: "), (dtype, path)


def test_the_version_on_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dtr-kernels", "--version"])
    with pytest.raises(SystemExit, match="0"):
        command_line.main()
    assert capsys.readouterr().out == f"dtr_kernels {dtr_kernels.__version__}\n"
