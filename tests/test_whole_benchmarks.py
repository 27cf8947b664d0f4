"""The benchmarks of whole pieces: every side is checked against the right oracle, and wrong results do not pass.

No figure of time is asserted, and nothing is compiled.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch
from refusals import refused
from torch import Tensor

from benchmarks.cases import AUTOCAST, Case, Cell, Options, Side
from benchmarks.measure import Bench, Rounds
from benchmarks.memory import saved_bytes
from benchmarks.suite import block, cpu_limits, inner, model, whole
from benchmarks.suite.models import LIGHTNING, dit_channels
from benchmarks.suite.whole import Gate
from dtr_kernels import reference
from dtr_kernels.nn import BlockKind
from dtr_kernels.ops import declaration, dispatch, window_linear
from dtr_kernels.routing import ChannelWindow

CPU = torch.device("cpu")
CENTRE = Cell("tiny", 5, "fp32", "block", "per sample", 0.8, "training")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def nothing_compiles(monkeypatch):
    monkeypatch.setattr(whole, "compiled", lambda forward, mode=None: forward)


@pytest.fixture
def fresh(seed, monkeypatch):
    """Other parameters and inputs in every run."""
    for module in (whole, block, model, cpu_limits):
        monkeypatch.setattr(module, "SEED", seed)


def quick(benchmark, device, **options) -> list[Case]:
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())  # as the command line names it
    return [build() for build in benchmark.cases(Options(device, quick=True, **options))]


def sides_of(case: Case) -> dict[str, Side]:
    return {side.name: side for side in case.sides}


def assert_right(case: Case) -> None:
    for side in case.sides:
        side.before()
        assert side.error(side.call()) <= side.bound, (case.name, side.name)
        assert side.bound < 0.1 and side.work.flops > 0 and side.work.bytes > 0
        assert (side.forward is not None) == (case.cell["pass"] in ("training", "step"))
    for goal in case.goals:
        assert {goal.side, goal.over} <= set(sides_of(case))


def assert_every_tensor_counts(side: Side, factor: float) -> None:
    """A side's result would be wrong if one of its tensors were so many times as large, or not a number."""
    side.before()
    found = declaration.results(side.call())
    for i, tensor in enumerate(found):
        for wrong in (factor * tensor, math.nan * tensor):
            assert not side.error([*found[:i], wrong, *found[i + 1 :]]) <= side.bound, (side.name, i)


@pytest.mark.parametrize("precision", ["fp32", "bf16", AUTOCAST])
def test_every_side_of_a_block_is_right(fresh, device, precision):
    cases = quick(block, device, precisions=[precision])
    assert [(case.cell["batch"], case.cell["pass"]) for case in cases] == [
        (batch, pass_) for batch in (2, 16) for pass_ in ("forward", "training")
    ]
    for case in cases:
        assert_right(case)
        sides = sides_of(case)
        assert sides["unrouted"].work.flops > sides["reference"].work.flops == sides["RoutedDiTBlock"].work.flops
        assert ("reference, autocast" in sides) == (device.type == "cuda" and precision == "bf16")
        assert ("reference, max-autotune" in sides) == (device.type == "cuda")


@pytest.mark.parametrize("routing", [{"scopes": ["branch"]}, {"windows": ["shared"]}, {"betas": [1.0]}], ids=str)
def test_every_routing_of_a_block_is_right(fresh, routing):
    for case in quick(block, CPU, batches=[3], **routing):
        assert_right(case)


def test_a_block_of_lightning_dit(fresh):
    """RMSNorm, SwiGLU, query and key norms, and queries and keys that are turned."""
    piece = block.Piece.of(replace(CENTRE, model=LIGHTNING, batch=2, pass_="training"), CPU)
    assert piece.module.kind == BlockKind("rms", True, "swiglu", True) and piece.x.shape == (2, 256, 1152)
    assert [p.shape for p in piece.module.mlp.parameters() if p.dim() == 2] == [(6144, 1152), (1152, 3072)]
    side = piece.routed("RoutedDiTBlock", piece.fused)
    assert side.error(side.call()) <= side.bound < 1e-3
    still = replace(piece, rope=None)
    assert side.error(still.call(still.fused)()) > side.bound


@pytest.mark.parametrize("precision", ["fp32", "bf16", AUTOCAST])
@pytest.mark.parametrize("pass_", ["forward", "training"])
def test_another_function_does_not_pass_for_a_block(fresh, precision, pass_):
    cell = replace(CENTRE, precision=precision, pass_=pass_)
    sides = sides_of(block.build(cell, CPU))
    wrong = {
        "unrouted": sides["unrouted"].call(),
        "other scope": sides_of(block.build(replace(cell, scope="branch"), CPU))["RoutedDiTBlock"].call(),
        "other windows": sides_of(block.build(replace(cell, beta=0.7), CPU))["RoutedDiTBlock"].call(),
    }
    for name in ("reference", "RoutedDiTBlock"):
        for what, result in wrong.items():
            assert sides[name].error(result) > sides[name].bound, (name, what)
    assert sides["unrouted"].error(sides["RoutedDiTBlock"].call()) > sides["unrouted"].bound


@pytest.mark.parametrize(
    "form, pass_",
    [
        (block.Piece, "training"),
        (model.Prediction, "forward"),
        (model.Prediction, "step"),
        (model.GuidedStep, "sampling"),
    ],
)
def test_the_same_values_under_autocast(fresh, form, pass_):
    """A peer of a GPU's bf16 blocks and models, held to the oracle of their values; a step is of its own parameters."""
    window = "shared" if pass_ == "sampling" else "per sample"
    piece = form.of(replace(CENTRE, precision="bf16", pass_=pass_, window=window), CPU)
    wide = piece.under_autocast()
    assert type(wide) is form and wide.x.requires_grad == piece.x.requires_grad == (form is block.Piece)
    assert {p.dtype for p in wide.module.parameters()} == {wide.x.dtype} == {torch.float32}
    exact = piece.exact(piece.mask)
    side = wide.side("reference, autocast", wide.masked, wide.gate(exact, wide.masked), wide.work(102))
    assert 1e-4 < side.error(side.call()) <= side.bound < 0.1
    if form is not block.Piece:
        assert set(wide.optimizer.state) == (set(whole.trainable(wide.module)) if pass_ == "step" else set())
        assert not piece.optimizer.state


def test_every_side_of_scope_inner_is_right(fresh, device):
    cases = quick(inner, device)
    assert [(case.cell["window"], case.cell["pass"]) for case in cases] == [
        *(("shared", pass_) for pass_ in block.PASSES),
        *(("per sample", pass_) for pass_ in block.PASSES),
        ("shared", "sampling"),
    ]
    for case in cases:
        assert_right(case)
        ours = sides_of(case)["Sampler" if case.cell["pass"] == "sampling" else "RoutedDiTBlock"]
        # Half of the heads, in all that is large.
        assert 1.6 < sides_of(case)[inner.PEER].work.flops / ours.work.flops < 2.2
        assert case.speedup_over == inner.PEER and not {"unrouted", "reference, compiled"} & set(sides_of(case))


@pytest.mark.parametrize("change", [{"beta": 0.75}, {"scope": "branch"}, {"window": "shared"}], ids=str)
def test_other_heads_do_not_pass(fresh, change):
    cell = replace(CENTRE, scope="inner", beta=0.5, precision="bf16")
    right, other = (sides_of(block.build(each, CPU)) for each in (cell, replace(cell, **change)))
    for name in ("reference", "RoutedDiTBlock"):
        assert right[name].error(other[name].call()) > right[name].bound


@pytest.mark.parametrize(
    "device, change, expected",
    [
        ("cpu", {}, [("speed-up", 1.15), ("bytes saved", 0.46)]),
        ("cpu", {"beta": 0.5, "window": "shared", "pass_": "forward"}, [("speed-up", 1.75)]),
        ("cpu", {"beta": 0.5, "window": "shared", "pass_": "sampling"}, [("speed-up", 1.6)]),
        ("cuda", {}, [("speed-up", 1.15), ("bytes saved", 0.46)]),
        ("cuda", {"window": "host", "pass_": "forward"}, [("speed-up", 1.25)]),
        ("cpu", {"beta": 0.25}, []),
    ],
)
def test_goals_of_scope_inner(device, change, expected):
    cell = replace(CENTRE, model="DiT-B/2", scope="inner", beta=0.75)
    goals = inner.goals(replace(cell, **change), torch.device(device))
    assert [(goal.quantity, max(goal.at_least, 0) or goal.at_most) for goal in goals] == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16", AUTOCAST])
@pytest.mark.parametrize("scope", ["block", "branch"])
def test_a_block_without_its_deactivated_channels_is_found(fresh, monkeypatch, scope, precision):
    """By slices of the weight in fp32, by a dense GEMM in the others, where it is hardest: what they add to each token
    is small, and so is the precision."""
    cell = replace(CENTRE, model="DiT-S/2", batch=2, precision=precision, scope=scope, pass_="forward")
    side = sides_of(block.build(cell, CPU))["RoutedDiTBlock"]
    assert side.error(side.call()) <= side.bound
    forget_deactivated_channels(monkeypatch)
    assert side.error(side.call()) > 1.5 * side.bound


def test_a_model_without_its_deactivated_channels_is_found(fresh, monkeypatch):
    cases = quick(model, CPU, precisions=["bf16"], passes=["forward", "sampling"])
    forget_deactivated_channels(monkeypatch)
    for case in cases:
        side = sides_of(case)["DiT"]
        assert side.error(side.call()) > 1.5 * side.bound, case.name


def forget_deactivated_channels(monkeypatch):
    """The forward pass leaves out what deactivated channels are to each token: of the closed form, and of the input of
    a dense GEMM."""
    # The package has functions of the modules' names.
    routed_linear, routed_mlp = (importlib.import_module(f"dtr_kernels.ops.{name}") for name in ("linear", "mlp"))
    layer, norm = window_linear.window_linear_forward, routed_linear.gated_norm_forward

    def wrong_layer(u, closed, *rest):
        return layer(u, closed and closed._replace(mean_rstd=torch.zeros_like(closed.mean_rstd)), *rest)

    def wrong_norm(inputs, window, *rest, **others):
        out = norm(inputs, window, *rest, **others)
        if window.start is not None and not window.compact and not window.keep_branch:
            inactive = ~ChannelWindow(window.start, window.width, inputs.x.shape[-1]).mask()
            out.u.copy_(torch.where(inactive[:, None], inputs.shift[:, None], out.u))
        return out

    for module in (window_linear, routed_linear):
        monkeypatch.setattr(module, "window_linear_forward", wrong_layer)
    for module in (routed_linear, routed_mlp):
        monkeypatch.setattr(module, "gated_norm_forward", wrong_norm)


def test_every_gradient_of_a_block_counts(fresh):
    side = sides_of(block.build(CENTRE, CPU))["RoutedDiTBlock"]
    assert len(side.call()) == 3 + 10  # output, x and c; weight and bias of five linear layers
    assert_every_tensor_counts(side, 1.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16", AUTOCAST])
def test_every_side_of_a_model_is_right(fresh, device, precision):
    cases = quick(model, device, precisions=[precision])
    assert [case.cell["pass"] for case in cases] == ["forward", "training", "step", "sampling"]
    for case in cases:
        assert_right(case)
        sides = sides_of(case)
        wrong = [tensor.clone() for tensor in sides["unrouted"].call()]
        for name in ("reference", "reference, compiled", "DiT", "DiT, compiled"):
            assert sides[name].error(wrong) > sides[name].bound, (case.name, name)
        assert ("reference, autocast" in sides) == (device.type == "cuda" and precision == "bf16")
        assert ("reference, max-autotune" in sides) == (device.type == "cuda")
        assert case.memory == (case.cell["pass"] in ("training", "step"))
        assert case.cell["window"] == ("shared" if case.cell["pass"] == "sampling" else "per sample")


def test_a_training_batch_may_share_its_window(fresh):
    for case in quick(model, CPU, windows=["shared"], scopes=["branch"], passes=["forward", "training"]):
        assert_right(case)
        assert case.cell["window"] == "shared"


def test_a_step_leaves_the_parameters_where_they_were(fresh):
    """So that every side and every round finds the same ones; the optimizer works all the same."""
    (case,) = quick(model, CPU, passes=["step"])
    piece = model.Prediction.of(replace(CENTRE, pass_="step"), CPU)
    before = [p.clone() for p in piece.module.parameters()]
    gate = piece.gate(piece.exact(piece.mask), piece.masked)
    side = piece.side("DiT", piece.fused, gate, piece.work(102))
    first, second = ([g.clone() for g in side.call()] for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(piece.module.parameters(), before, strict=True))
    assert all(torch.equal(g, h) for g, h in zip(first, second, strict=True))
    assert {state["step"].item() for state in piece.optimizer.state.values()} == {3}  # with the gate's
    forward, training = (quick(model, CPU, passes=[pass_])[0].sides[0].work for pass_ in ("forward", "training"))
    parameters = sum(p.numel() for p in whole.trainable(piece.module))
    assert case.sides[0].work.bytes == training.bytes + 7 * 4 * parameters and training.flops > 2.9 * forward.flops


def test_sampling_is_guided_ddim(fresh):
    """By the formulas, of the model's two predictions one after the other."""
    piece = model.GuidedStep.of(replace(CENTRE, pass_="sampling", window="shared"), CPU)
    assert piece.t == 800
    with torch.no_grad():
        conditional, unconditional = (
            piece.module(piece.x, 800, y)[:, :4] for y in (piece.batch[2], 0 * piece.batch[2])
        )
        noise = unconditional + 4.0 * (conditional - unconditional)
        signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()
        image = (piece.x - (1 - signal[800]).sqrt() * noise) / signal[800].sqrt()
        expected = signal[700].sqrt() * image + (1 - signal[700]).sqrt() * noise
        for step in (piece.fused, piece.masked):
            torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-4)


def test_oracle_takes_a_few_samples_at_a_time(fresh):
    """More than one chunk, the last of them smaller, and the same as all at once."""
    piece = block.Piece.of(CENTRE, CPU)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (*piece.batch, piece.mask)]
    found = piece.exact(piece.mask)
    module = piece.module.double()
    out = reference.dit_block(module, *wide, "block")
    gradients = torch.autograd.grad(out, [*wide[:2], *module.parameters()], piece.cotangent.double())
    for f, e in zip(found, [out, *gradients], strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)


def test_gates():
    exact = [torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)]
    gate = Gate(exact, [torch.tensor([3.0, 4.5]), torch.tensor([1.05])], "fp32")
    assert gate.bound == pytest.approx(2 * 0.1 + 1e-5)
    assert gate.error([torch.tensor([3.0, 4.0]), torch.tensor([0.5])]) == pytest.approx(0.5)
    for position in (0, 1):
        found = [torch.tensor([3.0, 4.0]), torch.tensor([1.0])]
        found[position][0] = math.nan
        assert math.isnan(gate.error(found))


def test_bytes_saved_where_the_block_is_fused(fresh):
    """The goal of the benchmark, at the size of a published model."""
    case = block.build(replace(CENTRE, model="DiT-S/2", batch=2), CPU)
    saved = {name: saved_bytes(side.forward, side.parameters) for name, side in sides_of(case).items()}
    (goal,) = (goal for goal in case.goals if goal.quantity == "bytes saved")
    assert goal.met(saved[goal.side] / saved[goal.over])
    assert saved[goal.side] >= 11 * 2 * 256 * 384 * 4 and goal.at_most == 0.57


def test_small_blocks_on_a_cpu_say_that_they_are_plain(monkeypatch):
    monkeypatch.setattr(dispatch, "LEAST_ELEMENTS_ON_CPU", 1 << 30)
    case = block.build(CENTRE, CPU)
    assert any("is plain PyTorch" in note for note in case.notes)
    (goal,) = case.goals
    assert (goal.quantity, goal.side, goal.over, goal.at_least) == ("speed-up", "RoutedDiTBlock", "reference", 1.0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_grid_is_a_star(device):
    centre, star = block._CENTRE[device], block._STAR[device]
    cells = whole.grid(Options(torch.device(device)), dit_channels, centre, star)
    middle = whole.grid(Options(torch.device(device)), dit_channels, centre)
    assert not [cell for cell, times in Counter(cells).items() if times > 1]
    assert cells[: len(middle)] == middle

    def distance(a: Cell, b: Cell) -> int:
        return sum(x != y for x, y in zip(asdict(a).values(), asdict(b).values(), strict=True))

    # On a CPU larger models have a smaller batch, and are compared with the small model at that batch.
    centres = [*middle, *(cell for cell in cells if cell.batch == 4 and cell.model == "DiT-S/2")]
    for cell in cells[len(middle) :]:
        assert min(distance(cell, one) for one in centres if one != cell) == 1
    varied = {axis for cell in cells for axis, value in asdict(cell).items() if value not in centre[axis]}
    assert varied >= {"model", "batch", "scope", "window", "beta"}
    assert {cell.pass_ for cell in cells} == {"forward", "training"}


def test_options_replace_an_axis():
    asked = Options(CPU, batches=[2, 3, 2], betas=[0.5])
    cells = whole.grid(asked, dit_channels, block._CENTRE["cpu"], block._STAR["cpu"])
    assert {(c.batch, c.precision, c.pass_) for c in cells} == {
        (batch, precision, pass_) for batch in (2, 3) for precision in ("fp32", "bf16") for pass_ in block.PASSES
    }
    assert {(c.model, c.scope, c.window, c.beta) for c in cells} == {("DiT-S/2", "block", "per sample", 0.5)}
    assert len(cells) == 8
    assert cells[0].coordinates == {
        "model": "DiT-S/2",
        "batch": 2,
        "precision": "fp32",
        "scope": "block",
        "window": "per sample",
        "beta": 0.5,
        "pass": "forward",
    }


@pytest.mark.parametrize(
    ("suite", "options", "fragments"),
    [
        (block, {"passes": ["step"]}, ["--pass must be one of forward, training for a block", "got step"]),
        (block, {"models": ["DiT-Z"]}, ["--model must be one of tiny, DiT-S/2", "got DiT-Z"]),
        (block, {"betas": [1.5]}, ["beta", "got 1.5"]),
        (block, {"betas": [0.001]}, ["beta 0.001", "leaves none active"]),
        (model, {"passes": ["sampling"], "windows": ["per sample"]}, ["--window must be shared for --pass sampling"]),
        (model, {"models": ["DiT-S"]}, ["--model must be one of tiny, DiT-S/2", "got DiT-S"]),
        (cpu_limits, {"precisions": [AUTOCAST]}, ["--dtype must be one of fp32, bf16, fp16", "got autocast"]),
        (cpu_limits, {"passes": ["sampling"]}, ["--pass must be one of forward, training", "got sampling"]),
        (cpu_limits, {"device": torch.device("cuda")}, ["--device must be cpu", "got cuda"]),
    ],
)
def test_options_that_do_not_fit(suite, options, fragments):
    refused(lambda: suite.cases(Options(**{"device": CPU, **options})), ValueError, fragments)


def test_a_failing_compiler_fails_its_own_sides(monkeypatch):
    def broken() -> Tensor:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(whole, "compiled", lambda forward, mode=None: broken)
    bench, case = Bench(CPU, quick=True), block.build(CENTRE, CPU)
    result = bench.result_of(case)
    bench.measure(case, result, Rounds(1, 1, 0))
    for name, side in result.sides.items():
        assert side.status == ("failed" if name.endswith(", compiled") else "right"), name


def test_limits_of_cpus(fresh, monkeypatch):
    """Either way is what its name says, and the library's limits are afterwards as before."""
    monkeypatch.setattr(dispatch, "LEAST_ELEMENTS_ON_CPU", 1000)
    monkeypatch.setattr(window_linear, "_LEAST_GAIN", 100)
    ran = []

    def watch(module, name, what):
        original = getattr(module, name)

        def watched(*args, **more):
            ran.append(what)
            return original(*args, **more)

        monkeypatch.setattr(module, name, watched)

    watch(window_linear, "_slices", "slices of the weight")
    watch(reference, "dit_block", "plain block")
    limits = [(limit.module, limit.name) for limit in (cpu_limits._ELEMENTS, cpu_limits._SLICES)]
    before = [getattr(*limit) for limit in limits]
    cases = quick(cpu_limits, CPU)
    assert Counter(case.cell["limit"] for case in cases) == dict.fromkeys(("LEAST_ELEMENTS_ON_CPU", "_LEAST_GAIN"), 4)
    for case in cases:
        (goal,) = case.goals
        chosen = next(side.name for side in case.sides if side.name not in ("as dispatched", goal.over))
        for side in case.sides:
            ran.clear()
            assert side.error(side.call()) <= side.bound, (case.name, side.name)
            way = chosen if side.name == "as dispatched" else side.name
            if case.cell["limit"] == "LEAST_ELEMENTS_ON_CPU":
                assert ("plain block" in ran) == (way == "plain block")
            else:
                assert ("slices of the weight" in ran) == (way == "slices of the weight"), (case.name, side.name)
            assert [getattr(*limit) for limit in limits] == before
    assert {case.goals[0].over for case in cases} == {"plain block", "slices of the weight", "dense weight"}


def test_a_limit_is_restored_after_an_error():
    limit = cpu_limits._SLICES
    before = getattr(limit.module, limit.name)
    with pytest.raises(ZeroDivisionError):
        limit.set_to(before + 7, lambda: 1 / 0)()
    assert getattr(limit.module, limit.name) == before
    assert limit.set_to(before + 7, lambda: getattr(limit.module, limit.name))() == before + 7


def test_a_shared_window_is_known_to_the_host():
    for benchmark_window, shared in (("shared", True), ("per sample", False)):
        window = block.Piece.of(replace(CENTRE, window=benchmark_window), CPU).window
        assert isinstance(window, ChannelWindow) and (window.shared_start is not None) == shared
        assert (len(window.start) == 5) == (not shared)
