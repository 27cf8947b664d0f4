"""The benchmarks of declared kernels: that every side is checked, can be found wrong, and counts its work.

No figure of time is asserted.
"""

from __future__ import annotations

import pytest
import torch
from refusals import refused
from test_whole_benchmarks import assert_every_tensor_counts

from benchmarks.cases import Options
from benchmarks.suite import kernels, whole
from dtr_kernels import ops
from dtr_kernels.ops.declaration import ALL_CHANNELS, ONE_SLICE

CPU = torch.device("cpu")
BENCHMARKS = {benchmark.name: benchmark for benchmark in kernels.BENCHMARKS}


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch, one_thread):
    """Leave functions uncompiled, since the compiler is tested elsewhere."""
    monkeypatch.setattr(whole, "compiled", lambda function, mode=None: function)


def built(name, device=CPU, **options):
    return [build() for build in BENCHMARKS[name].cases(Options(device, quick=True, **options))]


def check(cases):
    """Every side is right, and would be wrong if one of its tensors were 5% too large, or not a number."""
    assert len({case.name for case in cases}) == len({str(case.cell) for case in cases}) == len(cases) > 0
    for case in cases:
        names = [side.name for side in case.sides]
        assert len(set(names)) == len(names) and case.speedup_over in names
        for side in case.sides:
            same = side.name.startswith((whole.MASKED, case.cell["what"].partition(",")[0]))
            if same or side.work.bytes:  # else it is another function
                assert side.work.bytes > 0 and (side.work.flops > 0) == (case.matrix_dtype is not None)
            side.before()
            assert side.error(side.call()) <= side.bound, (case.name, side.name)
            assert_every_tensor_counts(side, 1.05)


def test_every_kernel_that_counts_its_work_has_a_benchmark():
    what = {case.cell["what"].partition(",")[0] for name in BENCHMARKS for case in built(name)}
    assert what == {kernel.name for kernel in ops.KERNELS if kernel.work}


@pytest.mark.parametrize("options", [{}, {"precisions": ["bf16"]}], ids=str)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_side(name, options):
    check(built(name, **options))


@pytest.mark.parametrize("options", [{"windows": ["shared"], "batches": [1, 3]}, {"betas": [0.3]}], ids=str)
def test_every_side_of_other_grids(options):
    check(built("window_linear", **options))


def test_autocast_is_an_fp32_stream():
    cases = built("gated_norm", precisions=["autocast"])
    check(cases)
    case = next(case for case in cases if case.cell["what"] == "gated_norm_forward, routed, update")
    stream, u, *_ = case.sides[-1].call()
    assert (stream.dtype, u.dtype) == (torch.float32, torch.bfloat16)


def test_the_work_of_another_function_is_not_counted():
    def counted(name, what):
        case = next(case for case in built(name) if case.cell["what"] == what)
        return {side.name: side.work == case.sides[-1].work for side in case.sides}

    norm = counted("gated_norm", "gated_norm_forward, routed, update")
    assert not norm.pop("F.layer_norm of x") and all(norm.values())
    layer = counted("window_linear", "window_linear_forward, bias")
    assert layer[ALL_CHANNELS] and not layer[ONE_SLICE]


def test_what_is_written_to_is_brought_back():
    case = next(case for case in built("combine") if case.cell["what"] == "combine_")
    ours = case.sides[-1]
    for _ in range(2):
        ours.before()
        assert ours.error(ours.call()) <= ours.bound
    assert not ours.error(ours.call()) <= ours.bound


def test_all_channels_may_be_active():
    """Then some gradients are exactly zero."""
    for case in built("window_linear", betas=[1.0]):
        assert all(side.error(side.call()) <= side.bound for side in case.sides)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("gram_matrix", {"betas": [0.5]}, "gram_matrix has no betas to choose; got 0.5"),
        ("gated_norm", {"scopes": ["branch"]}, "gated_norm has no scopes to choose; got branch"),
        ("window_linear", {"precisions": ["autocast"]}, "--dtype must be one of fp32, bf16, fp16 for window_linear"),
    ],
)
def test_refused_options(name, options, message):
    refused(lambda: built(name, **options), ValueError, [message])


@pytest.mark.gpu
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_side_on_a_gpu(name):
    cases = built(name, torch.device("cuda", torch.cuda.current_device()))
    assert all(len(side.rotation) > 0 for case in cases for side in case.sides)
    check(cases)
