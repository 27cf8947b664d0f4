"""Every declared kernel, in each mode, size and precision, against plain PyTorch in fp64.

Runs three times: with the compiled CPU kernels, with the Triton kernels in Triton's interpreter (TRITON_INTERPRET=1),
and on a GPU. A few results are computed by hand here, so that a declaration cannot be wrong everywhere at once.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dtr_kernels import __main__, ops, reference, verify
from dtr_kernels.ops import extension, tiles
from dtr_kernels.ops.declaration import SIZES, Draw, Gradient, Gradients, Kernel, Precision, Sizes, mode_name, results
from dtr_kernels.ops.dispatch import recording
from dtr_kernels.ops.gated_norm import Norm, NormInputs, NormWindow, gated_norm_forward, kept_channels
from dtr_kernels.ops.window_linear import ClosedForm, window_linear_forward

INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
FP64 = Precision(torch.float64, torch.float64)
KERNELS = {kernel.name: kernel for kernel in ops.KERNELS}
if INTERPRETED:  # it has Triton kernels alone, and takes its time
    few = SIZES[0], SIZES[1]._replace(B=2, N=20), SIZES[3]
    KERNELS = {name: replace(k, sizes=few) for name, k in KERNELS.items() if k.sizes is SIZES}
MODES = [
    pytest.param(kernel, mode, id=f"{kernel.name}-{mode_name(mode) or 'only'}")
    for kernel in KERNELS.values()
    for mode in kernel.modes
]


def failures(kernel: Kernel, mode, precision: Precision, device: torch.device) -> list[str]:
    calls = list(verify.calls(device, [replace(kernel, modes=[mode])]))
    if not calls:
        pytest.skip("NOT RUN: only Triton has it as a kernel of its own")
    return [
        f"{call}: {comparison}"
        for call in calls
        for comparison in verify.check(call, precision, device)
        if not comparison.passed
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "autocast", "fp64"])
@pytest.mark.parametrize("kernel, mode", MODES)
def test_agrees_with_plain_pytorch(seed, kernel, mode, precision, device, request):
    if precision != "fp32":  # which has the tiles of a GPU
        request.getfixturevalue("tall_tiles")
    if precision == "fp64" and (device.type == "cuda" or INTERPRETED):
        return  # fp64 has no Triton kernels
    if precision in kernel.precisions or precision == "fp64":
        assert failures(kernel, mode, kernel.precisions.get(precision, FP64), device) == []


@pytest.mark.parametrize("kernel, mode", MODES)
def test_what_is_slightly_wrong_is_found(seed, kernel, mode, device):
    """A thousandth in one element of any result, and NaN."""
    if INTERPRETED:
        return  # it is about the check, whatever computes

    def wrong_by(change):
        def launch(**arguments):
            found = results(kernel.launch(**arguments))
            changed[0] = sum(t.numel() for t in found) > 0
            victim = max(found, key=Tensor.numel)
            victim = victim.clone()
            if victim.numel():
                i = int(victim.double().abs().argmax())
                victim.view(-1)[i] = change(victim.view(-1)[i])
            return [victim if t.shape == victim.shape and t is max(found, key=Tensor.numel) else t for t in found]

        return launch

    changed = [False]
    for change in (lambda x: 1.001 * x, lambda x: x * math.nan):
        wrong = replace(kernel, launch=wrong_by(change), sizes=kernel.sizes[:1])
        assert failures(wrong, mode, kernel.precisions["fp32"], device) or not changed[0]


# --- by hand ---------------------------------------------------------------------------------------------------------


def by_hand(x, branch, gate, shift, scale, start, width, keep_branch, eps, norm):
    """The second norm of a block, token by token: (stream, u, mean, rstd) as nested lists."""
    B, N, C = x.shape
    stream, u, mean, rstd = (
        torch.zeros(*shape, dtype=torch.float64) for shape in ((B, N, C), (B, N, C), (B, N), (B, N))
    )
    for b in range(B):
        for n in range(N):
            v = []
            for c in range(C):
                update = float(gate[b, c]) * float(branch[b, n, c])
                stream[b, n, c] = float(x[b, n, c]) + update
                active = start[b] <= c < start[b] + width
                v.append((float(x[b, n, c]) * active + update) if keep_branch else float(stream[b, n, c]) * active)
            mean[b, n] = 0 if norm == "rms" else sum(v) / C
            rstd[b, n] = (sum((value - float(mean[b, n])) ** 2 for value in v) / C + eps) ** -0.5
            for c in range(C):
                z = (v[c] - float(mean[b, n])) * float(rstd[b, n])
                u[b, n, c] = z * (1 + float(scale[b, c])) + float(shift[b, c])
    return stream, u, mean, rstd


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("keep_branch", [False, True])
def test_the_norm_by_hand(seed, keep_branch, norm, device):
    B, N, C, W = 2, 3, 8, 5
    x, branch = (torch.randn(B, N, C, device=device) for _ in range(2))
    gate, shift, scale = torch.randn(B, 3 * C, device=device).chunk(3, dim=1)
    start = torch.tensor([0, 3], dtype=torch.int32, device=device)
    inputs, window = NormInputs(x, shift, scale, branch, gate), NormWindow(start, W, False, keep_branch)
    found = gated_norm_forward(inputs, window, Norm(1e-6, norm), torch.float32)
    expected = by_hand(*(t.cpu() for t in (x, branch, gate, shift, scale)), start.tolist(), W, keep_branch, 1e-6, norm)
    declared = KERNELS["gated_norm_forward"].exact(inputs, window, Norm(1e-6, norm), torch.float32)
    assert found.first is None and declared.first is None
    assert (found.mean is None) == (declared.mean is None) == (norm == "rms")
    for a, b, c in zip(found[:4], expected, declared[:4], strict=True):
        if a is None:
            continue
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(c.cpu().double(), b, rtol=1e-5, atol=1e-5)


def test_the_layer_over_a_window_by_hand(seed, device):
    B, N, C, W, O = 2, 3, 8, 5, 4
    u, mean_rstd = torch.randn(B, N, W, device=device), torch.randn(B, N, device=device)
    shift, scale = torch.randn(2, B, C, device=device)
    weight, bias = torch.randn(O, C, device=device), torch.randn(O, device=device)
    start = torch.tensor([3, 1], dtype=torch.int32, device=device)
    expected = torch.zeros(B, N, O, dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            for o in range(O):
                total = float(bias[o])
                for c in range(C):
                    inside = c - int(start[b])
                    known = -float(mean_rstd[b, n]) * (1 + float(scale[b, c])) + float(shift[b, c])
                    total += float(weight[o, c]) * (float(u[b, n, inside]) if 0 <= inside < W else known)
                expected[b, n, o] = total
    closed = ClosedForm(mean_rstd, shift, scale, start)
    for function in (window_linear_forward, KERNELS["window_linear_forward"].exact):
        found = function(u, closed, weight, bias).cpu().double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def activation_by_hand(kind, v):
    if kind == "gelu":
        return v / 2 * (1 + math.erf(v / math.sqrt(2)))
    if kind == "gelu_tanh":
        return v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    return v / (1 + math.exp(-v))


@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
def test_activations_by_hand(kind):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    expected = torch.tensor([activation_by_hand(kind, v) for v in x.tolist()], dtype=torch.float64)
    exact, backward = KERNELS["activation_forward"].exact, KERNELS["activation_backward"].exact
    if kind == "swiglu":
        b = torch.linspace(-2, 3, 101, dtype=torch.float64)
        torch.testing.assert_close(exact(torch.cat([x, b]), kind, True), expected * b)
        dpre, _ = backward(dact=torch.ones_like(x), pre=torch.cat([x, b]), kind=kind)
        torch.testing.assert_close(dpre[101:], expected)
        return
    torch.testing.assert_close(exact(x, kind, True), expected)
    for value in (-2.0, 0.3, 1.7):
        pre, step = torch.tensor([value], dtype=torch.float64), 1e-6
        slope = (activation_by_hand(kind, value + step) - activation_by_hand(kind, value - step)) / (2 * step)
        found = backward(dact=torch.ones_like(pre), pre=pre, kind=kind)[0]
        torch.testing.assert_close(found, torch.tensor([slope], dtype=torch.float64))


def test_a_compact_window_begins_at_a_whole_vector_and_has_every_active_channel():
    """For every width of a window and every place of it, as far as the last step of a GEMM has room."""
    for C in (1, 7, 63, 64, 65, 80, 127, 128, 136, 192, 200, 384):
        x = torch.empty(1, 1, C, device="meta")
        for width in range(1, C + 1):
            window = NormWindow(torch.zeros(1, dtype=torch.int32), width, compact=True)
            with recording(90):
                kept, alignment = kept_channels(x, window)
            starts = torch.arange(C - width + 1)
            first = (starts // alignment * alignment).clamp_max(C - kept)
            assert kept == min(-(-width // 64) * 64, C) and not (first % alignment).any()
            assert (first <= starts).all() and (first + kept >= starts + width).all()
            # Twice as much would leave a channel out, or end after the last one.
            assert 2 * alignment > kept - width + 1 or (C - kept) % (2 * alignment)


def directional_derivative(function, leaves, directions, cotangents, step=1e-5):
    """Differentiate the projection of a function's outputs on their cotangents, by differences."""

    def projected(step):
        moved = [leaf + step * way for leaf, way in zip(leaves, directions, strict=True)]
        outputs = zip(results(function(*moved)), cotangents, strict=True)
        return sum((out * g).sum() for out, g in outputs if g is not None)

    return (projected(step) - projected(-step)) / (2 * step)


@pytest.mark.parametrize("kernel, mode", [each for each in MODES if isinstance(each.values[0].exact, Gradient)])
def test_gradients_of_backward_kernels_are_differences(seed, kernel, mode):
    arguments = kernel.inputs(Draw(Sizes(2, 3, 10), FP64, torch.device("cpu")), **mode)
    function, leaves, cotangents = kernel.exact.of(**arguments)
    directions = [torch.randn_like(leaf) for leaf in leaves]
    slope = directional_derivative(function, leaves, directions, cotangents)
    found = sum((g * way).sum() for g, way in zip(kernel.exact(**arguments), directions, strict=True))
    torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-6)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED or extension.kernels is None, reason="NOT RUN: the launchers have no kernels here")
def test_verify_names_the_kernels_that_are_wrong(capsys):
    """``python -m dtr_kernels verify --kernels``."""
    right = KERNELS["gated_residual_forward"]
    small = [replace(right, sizes=[Sizes(2, 3, 20)]), replace(KERNELS["gram"], sizes=[Gradients(3, 50)])]
    cpu = torch.device("cpu")
    assert verify.run(cpu, small) and verify.run(cpu, small, "bf16")
    said = capsys.readouterr().out
    assert "10 calls of 2 kernels, 0 wrong" in said and "\n3 calls of 2 kernels, 0 wrong" in said
    small[0] = replace(small[0], launch=lambda **inputs: right.launch(**inputs) * 1.1)
    assert not verify.run(cpu, small)
    said = capsys.readouterr().out
    assert said.count("FAILED") == 4 and "10 calls of 2 kernels, 4 wrong" in said and "gram" not in said
    small[0] = replace(small[0], launch=lambda **inputs: torch.empty_like(right.launch(**inputs)))
    assert not verify.run(cpu, small), "what is left unwritten is NaN"
    small[0] = replace(small[0], launch=lambda **inputs: 1 / 0)
    assert not verify.run(cpu, small)
    said = capsys.readouterr().out
    assert said.count("ZeroDivisionError: division by zero  FAILED") == 4 and "10 calls of 2 kernels, 4 wrong" in said


FAILING = """
import sys
from dataclasses import replace
from dtr_kernels import __main__, ops, verify

def launch(**inputs):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\\nand more")

first, second, *_ = ops.KERNELS
ops.KERNELS[:2] = [replace(first, launch=launch, modes=first.modes[:2]), second]
verify.usable = lambda device: False
sys.exit(__main__.main())
"""


@pytest.mark.skipif(INTERPRETED or extension.kernels is None, reason="NOT RUN: the launchers have no kernels here")
def test_verify_goes_on_in_a_new_process_after_a_cuda_error():
    names = [kernel.name for kernel in ops.KERNELS[:2]]
    options = ["--kernels", *names, "--dtype", "fp32", "--sizes", "2x3x20", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", FAILING, "verify", *options], capture_output=True, text=True)
    calls, seeds = 2 + len(ops.KERNELS[1].modes), set(re.findall(r"seed (\d+)", done.stdout))
    assert done.returncode == 1 and f"{calls} calls of 2 kernels, 2 wrong" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("illegal memory access was encountered  FAILED") == 2 and len(seeds) == 1
    assert done.stdout.count("closest to its bound") == 3, "each error ends a process"


@pytest.mark.parametrize(
    "options, said",
    [
        (["--dtype", "bf16"], "add --kernels"),
        (["--kernels", "norm"], "there is no norm; there are gated_norm_forward"),
        (["--kernels", "--sizes", "2x3"], "invalid sizes value: '2x3'"),
    ],
)
def test_verify_refuses(monkeypatch, capsys, options, said):
    monkeypatch.setattr(sys, "argv", ["dtr_kernels", "verify", *options])
    with pytest.raises(SystemExit, match="2"):
        __main__.main()
    assert said in capsys.readouterr().err


# --- what is declared ------------------------------------------------------------------------------------------------


def test_declarations_are_complete():
    assert len({kernel.name for kernel in ops.KERNELS}) == len(ops.KERNELS)
    used = {
        name for kernel in ops.KERNELS for mode in kernel.modes for name in (*kernel.tiles(**mode), kernel.crossover)
    }
    assert used - {None} == set(tiles.KINDS)
    for kernel in ops.KERNELS:
        assert any(kernel.timed(**mode) for mode in kernel.modes), kernel.name
        if kernel.sizes is SIZES:
            assert any(sizes.B * sizes.N == 0 for sizes in kernel.sizes)
