"""The benchmarks of single routed ops: that every side is checked, can be found wrong, and counts its work.

No figure of time is asserted.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from refusals import refused

from benchmarks import counts
from benchmarks.cases import Case, Options, Side
from benchmarks.counts import ITEMSIZES
from benchmarks.suite import _peers, _routing, gated_norm, gelu_linear, window_linear
from dtr_kernels import ops
from dtr_kernels.ops import window_linear as linear_ops
from dtr_kernels.routing import ChannelWindow

CPU = torch.device("cpu")
BENCHMARKS = {module.BENCHMARK.name: module.BENCHMARK for module in (gated_norm, window_linear, gelu_linear)}


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch, one_thread):
    """What is compiled is what is compiled nowhere else; here it is the function itself."""
    monkeypatch.setattr(_peers, "compiled", lambda function, mode=None: function)


def builders(name: str, **options) -> list[Callable[[], Case]]:
    return list(BENCHMARKS[name].cases(Options(CPU, quick=True, **options)))


def built(name: str, **options) -> list[Case]:
    return [build() for build in builders(name, **options)]


def only(cases: list[Case], *words: str) -> Case:
    """The case whose name begins with the first word and holds the others."""
    (case,) = (case for case in cases if case.name.startswith(words[0]) and all(word in case.name for word in words))
    return case


def side_of(case: Case, name: str) -> Side:
    return next(side for side in case.sides if side.name == name)


def never_on_a_cpu(case: Case, side: Side) -> bool:
    """Whether the side has a launcher for GPUs only, and stands for a CPU."""
    if not case.name.startswith("weight gradient") or side.name != window_linear.FUSED:
        return False
    (layer,) = side.call.args
    return layer.start is not None and layer.u.device.type == "cpu"


def check(cases: list[Case]) -> None:
    """Every side is right, and would be wrong if one of its tensors were 5% too large, or not a number."""
    assert len({case.name for case in cases}) == len({str(case.cell) for case in cases}) == len(cases)
    for case in cases:
        assert len({side.name for side in case.sides}) == len(case.sides)
        assert case.speedup_over in {side.name for side in case.sides}
        for side in case.sides:
            assert side.work.bytes > 0 and (side.work.flops > 0) == (case.matrix_dtype is not None)
            if never_on_a_cpu(case, side):
                with pytest.raises(
                    NotImplementedError, match="on a CPU the weight gradient is computed with the other"
                ):
                    side.call()
                continue
            found = side.call()
            assert side.error(found) <= side.bound, (case.name, side.name)
            for i, tensor in enumerate(found):
                for wrong in (1.05 * tensor, tensor * float("nan")):
                    error = side.error([*found[:i], wrong, *found[i + 1 :]])
                    assert not error <= side.bound, (case.name, side.name, i)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_side_of_the_default_grid(name):
    cases = built(name)
    check(cases)
    assert {case.cell["precision"] for case in cases} == {"fp32", "bf16"}


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize(
    "options",
    [
        {"betas": [0.3, 1.0], "precisions": ["fp16"]},
        {"windows": ["shared"], "batches": [1, 3], "precisions": ["fp32"], "passes": ["training"]},
    ],
)
def test_every_side_of_other_grids(name, options):
    check(built(name, **options))


def test_autocast_is_an_fp32_stream():
    cases = built("gated_norm", precisions=["autocast"])
    check(cases)
    stream, u = side_of(only(cases, "keep_branch, forward"), gated_norm.FUSED).call()
    assert (stream.dtype, u.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    "precision, least, library",
    [("fp32", 1, "as the library's op does"), ("fp32", 1 << 20, "dense"), ("bf16", 1, "dense")],
)
def test_our_linear_layers_contract_over_windows_whatever_the_library_does(precision, least, library, monkeypatch):
    monkeypatch.setattr(linear_ops, "_LEAST_GAIN", least)
    cases = [
        *built("window_linear", precisions=[precision]),
        *built("gelu_linear", precisions=[precision], scopes=["branch"]),
    ]
    check(cases)
    routed = [case for case in cases if "unrouted" not in case.name]
    assert len(routed) > 4
    for case in routed:
        assert "slices of the weight" in case.notes[0] and library in case.notes[1], case.notes


def choose(monkeypatch, compact: bool, compact_gradient: bool) -> None:
    """What the library is said to give the linear layer, and to take from it: active channels, or all."""
    chosen = {"windows_forward": compact, "windows_backward": compact_gradient}
    monkeypatch.setattr(gated_norm, "contracts_windows", lambda op, x, start, width, weight: chosen[op])


CHOICES = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize("compact, compact_gradient", CHOICES)
def test_norms_of_either_kind(compact, compact_gradient, monkeypatch):
    choose(monkeypatch, compact, compact_gradient)
    cases = built("gated_norm", precisions=["fp32", "bf16"])
    check(cases)
    for case in cases:
        *_, u = side_of(case, "gated_norm").call()[: 1 if case.name.startswith("no branch") else 2]
        keeps = case.name.startswith("keep_branch")
        assert u.shape[-1] == (102 if compact and not keeps else 128)
        said = {"u": compact} | ({"the gradient of u": compact_gradient} if "training" in case.name else {})
        found = [note for note in case.notes if "as in the library's op" in note]
        assert len(found) == (0 if keeps else len(said))
        for note, (tensor, active) in zip(found, said.items(), strict=not keeps):
            assert note.startswith(f"{tensor} has {'active' if active else 'all'} channels")


@pytest.mark.parametrize("precision, least, width", [("fp32", 1, 102), ("fp32", 1 << 20, 128), ("bf16", 1, 128)])
def test_norms_write_what_those_of_the_library_do(precision, least, width, monkeypatch):
    monkeypatch.setattr(linear_ops, "_LEAST_GAIN", least)
    written = []
    op = importlib.import_module("dtr_kernels.ops.linear")  # the package has a function of its name
    original = op.gated_norm_forward
    monkeypatch.setattr(op, "gated_norm_forward", lambda *args: written.append(original(*args)) or written[-1])
    case = only(built("gated_norm", precisions=[precision], passes=["forward"], scopes=["branch"]), "branch, forward")
    (norm,) = side_of(case, "gated_norm").call.args
    weight = norm.x.new_zeros(384, 128)
    ops.routed_linear(norm.x, norm.shift, norm.scale, weight, None, norm.window, norm.branch, norm.gate)
    stream, u = side_of(case, "gated_norm").call()
    assert torch.equal(stream, written[0].stream) and torch.equal(u, written[0].u) and u.shape[-1] == width


@pytest.mark.parametrize("compact, compact_gradient", CHOICES)
def test_work_of_the_norms(compact, compact_gradient, monkeypatch):
    choose(monkeypatch, compact, compact_gradient)
    sizes = 2, 64, 128, 102  # "tiny" at batch 2, W = int(0.8 * 128)
    for precision in ("fp32", "bf16", "autocast"):
        items = ITEMSIZES[precision]
        cases = built("gated_norm", precisions=[precision])
        for name, branch, keep_branch in gated_norm.FORMS["block"]:
            forward, training = only(cases, f"{name}, forward"), only(cases, f"{name}, training")
            work = counts.norm_forward(*sizes, items, branch, compact and not keep_branch)
            backward = counts.norm_backward(*sizes, items, branch, compact_gradient and not keep_branch, dstream=branch)
            assert side_of(forward, "gated_norm").work == side_of(forward, "reference").work == work
            assert side_of(training, "gated_norm").work == side_of(training, "reference").work == work + backward
            assert side_of(training, "gated_norm, backward alone").work == backward
            layer_norm = counts.layer_norm_forward(2, 64, 128, items.stream)
            assert side_of(forward, "F.layer_norm of x").work == layer_norm
            layer_norm += counts.layer_norm_backward(2, 64, 128, items.stream)
            assert side_of(training, "F.layer_norm of x").work == layer_norm


def test_work_of_the_window_linear():
    cases = built("window_linear", precisions=["bf16"], windows=["per sample"])
    sizes, items = (2, 64, 128, 102, 384), ITEMSIZES["bf16"]
    # 102 channels rounded up to a multiple of 8.
    product = 128, 104, 384, items
    for name, work, slice_work in (
        ("forward", counts.window_linear_forward, counts.linear_forward),
        ("input gradient", counts.window_linear_input_gradient, counts.linear_input_gradient),
        ("weight gradient", counts.window_linear_weight_product, counts.linear_weight_product),
        ("all gradients", counts.window_linear_gradients, counts.linear_gradients),
    ):
        case = only(cases, name)
        assert case.matrix_dtype == torch.bfloat16
        found = {side.name: side.work for side in case.sides}
        assert found == {
            "window_linear": work(*sizes, items),
            "F.linear, all channels": work(*sizes, items),
            "F.linear, one slice": slice_work(*product),
        }


def test_work_of_the_gelu_linear():
    cases, items = built("gelu_linear", precisions=["bf16"]), ITEMSIZES["bf16"]
    for scope, width in (("block", 128), ("branch", 102)):
        for name, write_pre in (("forward,", False), ("forward with pre,", True)):
            work = counts.gelu_linear_forward(2, 64, 128, width, 512, items, write_pre)
            assert {side.work for side in only(cases, f"{name} scope {scope}").sides} == {work}
    assert {side.work for side in only(cases, "backward").sides} == {
        counts.gelu_linear_backward(2, 64, 512, 128, items, write_act=True)
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_windows_that_are_off_by_one_are_found(name, precision):
    """Our side, the last one, with windows that start a channel too early or too late."""
    case = next(case for case in built(name, scopes=["branch"], precisions=[precision]) if "unrouted" not in case.name)
    side = case.sides[-1]
    (inputs,) = side.call.args
    start = inputs.window.start
    start += torch.where(start > 0, -1, 1)
    assert side.error(side.call()) > side.bound


def test_the_weight_gradient_is_that_of_the_windows(seed, monkeypatch):
    """Sample by sample, and not what deactivated channels add."""
    monkeypatch.setattr(_peers, "SEED", seed)
    for options in ({"windows": ["per sample"]}, {"windows": ["shared"]}):
        case = only(built("window_linear", precisions=["fp32"], passes=["training"], **options), "weight gradient")
        side = side_of(case, window_linear.FUSED)
        (layer,) = side.call.args
        expected = torch.zeros_like(layer.weight)
        for b, first in enumerate(layer.start.tolist()):
            expected[:, first : first + layer.u.shape[-1]] += layer.g[b].t() @ layer.u[b]
        assert side.error([expected]) <= side.bound
        everything = window_linear._product_gradients(layer.dense, layer.weight, layer.bias, layer.g, parameters=True)
        assert side.error(everything[1:2]) > side.bound


def without_deactivated_channels(monkeypatch):
    """The forward pass of the linear layers without what they add to each token."""
    original = linear_ops.window_linear_forward

    def wrong(u, mean_rstd, *rest):
        return original(u, None if mean_rstd is None else torch.zeros_like(mean_rstd), *rest)

    monkeypatch.setattr(linear_ops, "window_linear_forward", wrong)


@pytest.mark.parametrize("name", ["window_linear", "gelu_linear"])
def test_a_layer_without_its_deactivated_channels_is_found(name, monkeypatch):
    without_deactivated_channels(monkeypatch)
    cases = built(name, precisions=["fp32", "bf16"], passes=["forward"], scopes=["branch"])
    for case in cases:
        assert case.sides[-1].error(case.sides[-1].call()) > 2 * case.sides[-1].bound, case.name


@pytest.mark.parametrize("compact, where", [(True, "active"), (False, "active"), (False, "deactivated")])
def test_a_norm_that_forgets_the_mean_is_found(compact, where, monkeypatch):
    choose(monkeypatch, compact, compact)
    original = gated_norm.gated_norm_forward

    def wrong(*args, **more):
        out = original(*args, **more)
        scale, start, width = args[4:7]
        window = ChannelWindow(start, width, scale.shape[1])
        assert more["compact"] == compact
        mean = (out.mean * out.rstd)[..., None] * (1 + scale[:, None])
        mean = mean * (window.mask() if where == "active" else ~window.mask())[:, None]
        return out._replace(u=out.u + (_routing.in_window(mean, window) if compact else mean).to(out.u.dtype))

    monkeypatch.setattr(gated_norm, "gated_norm_forward", wrong)
    for case in built("gated_norm", precisions=["bf16"], passes=["forward"], scopes=["branch"]):
        assert case.sides[-1].error(case.sides[-1].call()) > 2 * case.sides[-1].bound, case.name


@pytest.mark.parametrize("compact, compact_gradient", CHOICES)
def test_a_note_says_what_is_outside_the_clock(compact, compact_gradient, monkeypatch):
    choose(monkeypatch, compact, compact_gradient)
    for case in built("gated_norm", precisions=["fp32"]):
        told = any("computed outside the clock" in note for note in case.notes)
        expected = compact_gradient and "training" in case.name and not case.name.startswith("keep_branch")
        assert told == expected, case.name


@pytest.mark.parametrize("name", BENCHMARKS)
def test_calls_on_buffers_of_their_own(name, monkeypatch):
    """On a GPU every side rotates: the same work on other tensors."""
    monkeypatch.setattr(_routing, "copies", lambda device, size: 3)
    for case in built(name, precisions=["fp32"]):
        for side in case.sides:
            if never_on_a_cpu(case, side):
                continue
            results = [call() for call in (side.call, *side.rotation)]
            assert len(results) == 3
            for others in zip(*results, strict=True):
                assert len({tensor.shape for tensor in others}) == 1
                assert not torch.equal(others[0], others[1]) and not torch.equal(others[1], others[2])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_without_kernels_our_side_says_so(name, monkeypatch):
    monkeypatch.setattr("dtr_kernels.ops.dispatch.kernel_path", lambda x: "plain")
    for case in built(name, precisions=["fp32"]):
        ours = [side for side in case.sides if side.name.startswith(("gated", "window", "linear_gelu", "gelu_linear"))]
        assert ours
        for side in case.sides:
            if side in ours:
                with pytest.raises(NotImplementedError, match=r"no kernels|missing"):
                    side.call()
            else:
                assert side.error(side.call()) <= side.bound


def test_inputs_are_those_of_a_block():
    """A window for each sample, and modulation as views of one tensor of six times as many channels."""
    (case, *_) = built("gated_norm", precisions=["bf16"], batches=[4])
    (norm,) = side_of(case, "gated_norm").call.args
    assert len(norm.window.start.unique()) > 1
    assert norm.shift.stride() == norm.scale.stride() == (6 * 128, 1)
    assert norm.shift.untyped_storage().data_ptr() == norm.scale.untyped_storage().data_ptr()
    (case, *_) = built("window_linear", precisions=["bf16"], batches=[4], windows=["shared"])
    (layer,) = side_of(case, "window_linear").call.args
    assert layer.start.tolist() == [layer.shared_start] * 4


def test_scopes_that_mean_something():
    forms = [case.cell["what"] for case in built("gated_norm", precisions=["fp32"], scopes=["branch"])]
    assert forms == ["no branch, forward", "branch, forward", "no branch, training", "branch, training"]
    scopes = [case.name for case in built("gelu_linear", precisions=["fp32"], scopes=["branch"])]
    assert not any("scope block" in name for name in scopes)


def test_a_note_says_where_the_library_would_run_plain_pytorch(monkeypatch):
    monkeypatch.setattr("dtr_kernels.ops.dispatch.LEAST_ELEMENTS_ON_CPU", 3 << 16)
    for name in BENCHMARKS:
        (case, *_) = built(name, precisions=["fp32"])
        assert "runs plain PyTorch at this size (16384 elements)" in case.notes[-1]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_refused_options(name):
    for options, fragments in (
        ({"models": ["DiT-M/2"]}, ["--model", "DiT-M/2", "DiT-XL/2"]),
        ({"precisions": ["fp64"]}, ["--dtype", "fp64", "fp32, bf16, fp16", name]),
        ({"passes": ["sampling"]}, ["--pass", "sampling", "forward, training", name]),
        ({"windows": ["none"]}, ["--window", "none", "per sample, shared", name]),
        ({"scopes": ["mlp"]}, ["--scope", "mlp", "block, branch", name]),
        ({"betas": [1.5]}, ["beta", "1.5", "(0, 1]"]),
        ({"betas": [0.001]}, ["beta", "0.001", "at least"]),
    ):
        refused(lambda options=options: builders(name, **options), ValueError, fragments)


@pytest.mark.parametrize("name", ["window_linear", "gelu_linear"])
def test_autocast_is_refused_where_a_launcher_has_one_dtype(name):
    refused(
        lambda: builders(name, precisions=["autocast"]), ValueError, ["--dtype", "autocast", "fp32, bf16, fp16", name]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_side_on_a_gpu(name):
    cases = [build() for build in BENCHMARKS[name].cases(Options(torch.device("cuda", 0), quick=True))]
    check(cases)
    assert all(side.rotation for case in cases for side in case.sides)
    assert all(case.goals for case in cases) or name == "gelu_linear"


@pytest.mark.gpu
@pytest.mark.parametrize("window", ["per sample", "shared"])
def test_windows_on_a_gpu_with_and_without_its_index(window):
    cell = _peers.Cell("tiny", 3, "bf16", "block", window, 0.8, "forward")
    for device in (torch.device("cuda"), torch.device("cuda", torch.cuda.current_device())):
        found = _routing.window_of(cell, device)
        assert found.start.shape == (3,) and found.start.device.type == "cuda"
