"""The benchmarks' own machinery: what is checked, counted and kept; and the benchmarks of gradient surgery.

No figure of time is asserted.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

import dtr_kernels as dtr
from benchmarks import __main__ as command_line
from benchmarks import measure, memory, sources
from benchmarks.cases import Benchmark, Case, Goal, Options, Side
from benchmarks.counts import Work
from benchmarks.measure import Rounds
from benchmarks.results import CaseResult, Run, SideResult, load_all
from benchmarks.suite import surgery, surgery_projection
from benchmarks.timing import MatrixProduct, Spread, Stopwatch, copies, ratio
from dtr_kernels import ops
from dtr_kernels.ops.declaration import Gradients, Itemsizes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sizes that take no time, one thread, and no compiler."""
    threads = torch.get_num_threads()
    monkeypatch.setitem(measure.COPY_BYTES, "quick", 1 << 20)
    monkeypatch.setitem(measure.MATRIX_SIZE, "quick", 64)
    monkeypatch.setattr(surgery_projection, "QUICK_ELEMENTS", 40_003)
    monkeypatch.setattr(surgery_projection, "compiled", lambda function: function)
    yield
    torch.set_num_threads(threads)


def run(folder: Path, *arguments: str) -> tuple[int, dict]:
    """The exit status and the saved results of one benchmark."""
    status = command_line.main(["run", *arguments, "--quick", "--rounds", "2", "--threads", "1", "--out", str(folder)])
    return status, json.loads((folder / f"{arguments[0]}.json").read_text())


def sides_of(case: dict) -> dict[str, dict]:
    return {side["name"]: side for side in case["sides"]}


def fake(monkeypatch, *cases: Case) -> None:
    """A benchmark "fake" of the given cases."""
    benchmark = Benchmark("fake", "made up", lambda options: [lambda case=case: case for case in cases])
    monkeypatch.setitem(command_line.BENCHMARKS, "fake", benchmark)


def good_side(name: str = "good", **more) -> Side:
    return Side(name, lambda: None, lambda _: 0.0, bound=1e-5, **more)


def raising(error: Exception):
    def call():
        raise error

    return call


def test_the_package_runs_from_the_checkout():
    command = [sys.executable, "-m", "benchmarks", "list"]
    root = Path(__file__).parent.parent
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(command_line.BENCHMARKS)


def test_projection(tmp_path, device):
    status, results = run(tmp_path, "surgery_projection", "--dtype", "fp32", "--device", device.type)
    assert [case["name"] for case in results["cases"]] == [f"projection, K {K}, P 0.040003M, fp32" for K in (5, 8)]
    for case in results["cases"]:
        for side in case["sides"]:
            if side["name"].startswith("TorchJD") and side["status"] == "unavailable":
                continue
            assert side["status"] == "right" and side["error"] < 1e-5, side
            assert len(side["seconds"]) == len(case["copy"]["seconds"]) == 2
    assert status == 0
    # Counted by hand, of 4 bytes: gram reads 5 x 40003; combine_ reads and writes them; weighted_sum reads them and
    # writes 40003; pcgrad_sum is gram and weighted_sum, pcgrad_ gram and combine_.
    declared = {kernel.name: kernel.work for kernel in ops.KERNELS}
    moved = [
        declared[name](Gradients(5, 40_003), Itemsizes(4, 4)).bytes for name in ("gram", "combine_", "weighted_sum")
    ]
    assert moved == [800_060, 1_600_120, 960_072]
    bytes_moved = {name: side["work"]["bytes"] for name, side in sides_of(results["cases"][0]).items()}
    assert bytes_moved["pcgrad_sum"] == bytes_moved["the loop"] == 1_760_132
    assert bytes_moved["pcgrad_"] == 2_400_180
    part, copy_rate = sides_of(results["cases"][0])["pcgrad_sum"], results["cases"][0]["copy"]["rate"]
    assert part["bytes_per_second"] == pytest.approx(1_760_132 / part["summary"]["median"])
    share = pytest.approx(part["bytes_per_second"] / copy_rate)
    assert part["share_of_floor"] == share and part["share_of_copy"] == share
    assert {"device", "torch", "commit", "command", "threads", "date"} <= set(results["environment"])


def test_half_precision_counts_two_bytes(device):
    build = surgery_projection.cases(Options(device, quick=True, precisions=["bf16"]))[0]
    assert {side.name: side.work.bytes for side in build().sides}["pcgrad_sum"] == 880_066


def test_step(tmp_path, device):
    status, results = run(tmp_path, "surgery_step", "--batch", "10", "--device", device.type)
    (case,) = results["cases"]
    sides = sides_of(case)
    for name, side in sides.items():
        if side["status"] == "unavailable":
            assert name.startswith("TorchJD"), side
            continue
        assert side["status"] == "right" and side["error"] < 1e-5, side
        assert len(side["seconds"]) == 2 and side["peak_bytes"] > 0
    assert status == 0
    cost = sides["GradientSurgery, functions"]["time over ordinary step"]["median"]
    seconds = [sides[name]["seconds"] for name in ("GradientSurgery, functions", "ordinary step")]
    assert cost == pytest.approx(ratio(*seconds).median)
    assert any("pairs conflict" in note and " 0 of" not in note for note in case["notes"])


def test_wrong_results_have_an_error_and_no_time(tmp_path, monkeypatch, capsys):
    sides = [
        good_side(),
        Side("wrong", lambda: None, lambda _: 0.25, bound=1e-5),
        Side("nan", lambda: None, lambda _: math.nan, bound=1e-5),
        Side("infinite", lambda: None, lambda _: math.inf, bound=1e-5),
        Side("broken", raising(RuntimeError("it | broke\nin many lines")), lambda _: 0.0, bound=1e-5),
        Side("missing", raising(ImportError("not installed")), lambda _: 0.0, bound=1e-5),
    ]
    goal = Goal("speed-up", "wrong", over="good", at_least=1)
    fake(monkeypatch, Case("case", sides, speedup_over="good", goals=[goal]))
    status, results = run(tmp_path, "fake")
    assert status == 1
    found = sides_of(results["cases"][0])
    assert {name: side["status"] for name, side in found.items()} == {
        "good": "right",
        "wrong": "wrong",
        "nan": "wrong",
        "infinite": "wrong",
        "broken": "failed",
        "missing": "unavailable",
    }
    assert [name for name, side in found.items() if side["seconds"]] == ["good"]
    assert found["nan"]["error"] is None and found["infinite"]["error"] is None
    lines = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("|")}
    assert "error 2.5e-01, allowed 1.0e-05" in lines["wrong"] and "x" not in lines["wrong"]
    assert r"RuntimeError: it \| broke" in lines["broken"] and "not installed" in lines["missing"]
    assert results["cases"][0]["goals"][0]["met"] is None


def test_a_side_that_cannot_run_here_is_no_failure(tmp_path, monkeypatch):
    missing = raising(NotImplementedError("not here"))
    fake(monkeypatch, Case("case", [Side("missing", missing, lambda _: 0.0, bound=1e-5)]))
    status, results = run(tmp_path, "fake")
    assert status == 0 and results["cases"][0]["sides"][0]["message"] == "NotImplementedError: not here"


def test_sides_can_be_left_out(tmp_path, monkeypatch):
    fake(monkeypatch, Case("case", [good_side(name) for name in ("reference", "reference, compiled", "ours")]))
    _, results = run(tmp_path, "fake", "--skip", "compiled", "max-autotune")
    assert list(sides_of(results["cases"][0])) == ["reference", "ours"]


def interrupted_at_call(last: int):
    """Ctrl-C in the call of that number: the check is the first, the warm-up the second, then come the rounds."""
    calls = iter(range(1, last + 1))

    def call():
        if next(calls) == last:
            raise KeyboardInterrupt

    return call


def test_ctrl_c_keeps_complete_rounds(tmp_path, monkeypatch):
    last = Side("last", interrupted_at_call(4), lambda _: 0.0, bound=1e-5)
    fake(monkeypatch, Case("first", [good_side()]), Case("second", [good_side(), last]), Case("third", [good_side()]))
    status, results = run(tmp_path, "fake")
    assert status == 130 and results["interrupted"]
    rounds = [[len(side["seconds"]) for side in case["sides"]] for case in results["cases"]]
    assert rounds == [[2], [1, 1]]


@pytest.mark.parametrize("call", [1, 4])
def test_ctrl_c_does_not_replace_what_was_measured_to_its_end(tmp_path, monkeypatch, call):
    """Before there is any figure, and after a round."""
    fake(monkeypatch, Case("case", [good_side()]))
    run(tmp_path, "fake")
    fake(monkeypatch, Case("case", [Side("late", interrupted_at_call(call), lambda _: 0.0, bound=1e-5)]))
    status, results = run(tmp_path, "fake")
    assert status == 130 and not results["interrupted"]
    assert call == 1 or json.loads((tmp_path / "fake.json.unfinished").read_text())["interrupted"]
    assert [run.interrupted for run in load_all(tmp_path)] == [False]


def test_a_folder_is_of_one_run_at_a_time(tmp_path, monkeypatch, capsys):
    def second():
        with pytest.raises(SystemExit, match="2"):
            run(tmp_path / ".." / tmp_path.name, "fake")
        return good_side()

    fake(monkeypatch, Case("first", [good_side()]))
    benchmark = Benchmark("fake", "made up", lambda options: [lambda: Case("first", [second()])])
    monkeypatch.setitem(command_line.BENCHMARKS, "fake", benchmark)
    assert run(tmp_path, "fake")[0] == 0
    said = capsys.readouterr().err
    assert f"another run puts its results into {tmp_path}" in said and "Traceback" not in said
    assert [file.name for file in tmp_path.iterdir()] == ["fake.json"]


def test_a_case_that_cannot_be_built_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    builders = [raising(RuntimeError("out of memory\nin many lines")), lambda: Case("good", [good_side()])]
    benchmark = Benchmark("fake", "made up", lambda options: builders)
    monkeypatch.setitem(command_line.BENCHMARKS, "fake", benchmark)
    status, results = run(tmp_path, "fake")
    assert status == 1
    assert [case["problem"] for case in results["cases"]] == ["could not be built: RuntimeError: out of memory", None]
    assert len(load_all(tmp_path)[0].cases) == 2 and "Traceback" in capsys.readouterr().err


def test_benchmarks_that_options_do_not_fit_are_left_out_unless_named(monkeypatch, capsys, tmp_path):
    kept = {name: command_line.BENCHMARKS[name] for name in ("surgery_projection", "cpu_limits")}
    monkeypatch.setattr(command_line, "BENCHMARKS", kept)
    fake(monkeypatch, Case("case", [good_side()]))
    arguments = ["--batch", "8", "--quick", "--rounds", "1", "--out", str(tmp_path)]
    assert command_line.main(["run", *arguments]) == 0
    assert (
        "surgery_projection is left out: surgery_projection has no batches to choose; got 8" in capsys.readouterr().out
    )
    assert [path.name for path in tmp_path.glob("*")] == ["fake.json"]
    with pytest.raises(SystemExit):
        command_line.main(["run", "cpu_limits", *arguments])


@pytest.mark.parametrize(
    "options, folder", [((), "results"), (("--dtype", "fp32"), "other"), (("--skip", "x"), "other")]
)
def test_only_whole_benchmarks_replace_what_the_checkout_keeps(tmp_path, monkeypatch, options, folder):
    monkeypatch.setattr(command_line, "_RESULTS", tmp_path / "results")
    monkeypatch.setattr(command_line, "_OTHER_RESULTS", tmp_path / "other")
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 1 << 20)
    fake(monkeypatch, Case("case", [good_side()]))
    assert command_line.main(["run", "fake", "--rounds", "1", *options]) == 0
    assert [path.parent.parent.name for path in tmp_path.rglob("fake.json")] == [folder]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fake_name"], "there is no benchmark fake_name"),
        (["surgery_step", "--batch", "7"], "--batch must be a multiple of the 5 clusters, got 7"),
        (["surgery_step", "--model", "DiT-Z"], "--model must be one of tiny, DiT-S/2"),
        (["surgery_step", "--rounds", "0"], "must be a whole number of at least 1"),
        (
            ["surgery_step", "--dtype", "autocast"],
            "--dtype must be one of fp32, bf16, fp16 for gradients, got autocast",
        ),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command_line.main(["run", *arguments])
    assert message in capsys.readouterr().err


def test_inputs_are_restored_before_every_call(tmp_path, monkeypatch):
    value = torch.zeros(1)
    seen = []
    side = Side(
        "adds", lambda: seen.append(value.add_(1).item()), lambda _: 0.0, bound=1.0, before=lambda: value.zero_()
    )
    fake(monkeypatch, Case("case", [side]))
    run(tmp_path, "fake")
    assert seen == [1.0] * 4  # the check, the warm-up, two rounds


def test_where_memory_is_measured_the_check_warms_up(tmp_path, monkeypatch):
    """A step of surgery takes a minute with all of its sides: only what compiles is called twice before the rounds."""
    called = []
    sides = [
        Side("eager", lambda: called.append("eager"), lambda _: 0.0, bound=1.0),
        Side("compiled", lambda: called.append("compiled"), lambda _: 0.0, bound=1.0, compiles=True),
    ]
    fake(monkeypatch, Case("case", sides, memory=True))
    _, results = run(tmp_path, "fake")
    assert called[:3] == ["eager", "compiled", "compiled"] and len(called) == 3 + 2 * 2
    assert all(side["peak_bytes"] is not None for side in sides_of(results["cases"][0]).values())


def test_a_quick_run_captures_graphs_and_compiles_no_code(tmp_path, monkeypatch):
    inductor = pytest.importorskip("torch._inductor.compile_fx")
    monkeypatch.setattr(inductor, "compile_fx", lambda *_, **__: pytest.fail("the C++ compiler would run"))
    traced = []

    def function(x):
        traced.append(torch.compiler.is_compiling())
        return x + 1

    call = torch.compile(function, fullgraph=True)
    fake(
        monkeypatch,
        Case("case", [Side("compiled", lambda: call(torch.ones(3)), lambda x: (x - 2).sum().item(), bound=0.0)]),
    )
    status, _ = run(tmp_path, "fake")
    assert status == 0 and set(traced) == {True}


def test_statistics():
    spread = Spread.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (spread.median, spread.p20, spread.p80) == (3.5, 2.0, 5.0)
    compared = ratio([10.0, 60.0, 90.0], [10.0, 20.0, 90.0])  # 1, 3 and 1, not 60 / 20
    assert (compared.median, compared.p20, compared.p80) == pytest.approx((1.0, 1.0, 2.2))


def results_of_rounds(*sides: Side, **case) -> CaseResult:
    """Three rounds in which the first side takes 4, 6 and 8 ms and the others 1 ms; the copy moves 4 GB/s, and the
    matrix product does 5 GFLOP/s."""
    result = CaseResult.of(Case("case", sides, **case), copy_bytes=8_000_000, matrix_flops=20_000_000)
    result.sides = {side.name: SideResult(side.bound, side.work, error=1e-7) for side in sides}
    for slow in (4e-3, 6e-3, 8e-3):
        result.add_round({side.name: 1e-3 if i else slow for i, side in enumerate(sides)}, 2e-3, 4e-3)
    return result


def test_figures_follow_from_the_rounds():
    empty = CaseResult.of(Case("case", []), copy_bytes=1)
    assert empty.speedup("a", over="b") is empty.share_of_copy("a") is empty.floor_seconds("a") is None
    result = results_of_rounds(
        good_side("slow"),
        good_side("copies", work=Work(0, 3_000_000)),
        good_side("multiplies", work=Work(4_000_000, 1)),
    )
    assert result.speedup("copies", over="slow").median == pytest.approx(6)
    assert result.time("slow", over="copies").median == pytest.approx(6)
    assert result.bandwidth("copies") == pytest.approx(3e9)
    assert result.share_of_copy("copies") == result.share_of_floor("copies") == pytest.approx(0.75)
    assert result.floor_seconds("multiplies") == pytest.approx(0.8e-3)  # 4 MFLOP at 5 GFLOP/s
    assert result.flop_rate("multiplies") == pytest.approx(4e9)
    assert result.bandwidth("slow") is result.flop_rate("slow") is result.floor_seconds("slow") is None


def test_goals_are_measured():
    sides = [good_side("slow", work=Work(10, 1000)), good_side("fast", work=Work(5, 3_000_000))]
    result = results_of_rounds(*sides)
    result.sides["slow"].saved_bytes, result.sides["fast"].saved_bytes = 200, 110
    assert result.value(Goal("speed-up", "fast", over="slow")) == pytest.approx(6)
    assert result.value(Goal("time", "fast", over="slow")) == pytest.approx(1 / 6)
    assert result.value(Goal("FLOP rate", "fast", over="slow")) == pytest.approx(3)
    assert result.value(Goal("share of copy", "fast")) == pytest.approx(0.75)
    assert result.value(Goal("bytes saved", "fast", over="slow")) == pytest.approx(0.55)
    assert result.value(Goal("error", "fast")) == 1e-7
    assert result.value(Goal("peak", "fast")) is None
    assert result.value(Goal("speed-up", "fast", over="missing")) is None
    goal = Goal("bytes saved", "fast", over="slow", at_most=0.57)
    assert goal.text == "bytes saved of fast over slow at most 0.57"
    assert (goal.met(0.55), goal.met(0.58), goal.met(None)) == (True, False, None)


def test_results_survive_their_file(tmp_path):
    sides = [good_side("slow"), good_side("fast", work=Work(5, 3_000_000))]
    goals = [Goal("speed-up", "fast", over="slow", at_least=2), Goal("error", "fast", at_most=1e-5)]
    result = results_of_rounds(*sides, goals=goals, cell={"batch": 3}, notes=["a note"], speedup_over="slow")
    result.sides["broken"] = SideResult(1e-5, status="failed", message="why")
    run = Run("fake", "made up", "0123", {"device": "none"}, [result], interrupted=True)
    run.save(tmp_path)
    assert load_all(tmp_path) == [run]
    stored = json.loads((tmp_path / "fake.json").read_text())["cases"][0]
    assert stored["goals"][0]["met"] and stored["sides"][1]["speed-up over slow"]["median"] == pytest.approx(6)


def test_files_that_hold_no_results(tmp_path, capsys):
    with pytest.raises(ValueError, match="there are no results"):
        load_all(tmp_path)
    result = results_of_rounds(good_side("slow"), goals=[Goal("error", "slow")])
    Run("x", "", "", {}, [result]).save(tmp_path)
    good = (tmp_path / "x.json").read_text()
    load_all(tmp_path)
    broken = [
        good.replace('"environment": {}', '"environment": []'),
        good.replace("0.004", "0"),
        good.replace("0.004", '"a"'),
        good.replace('"quantity": "error"', '"quantity": "beauty"'),
        good.replace("0.004,", "", 1),
        good.replace("0.004", "1e-320"),
        good.replace('"environment": {}', '"environment": {"commit": 5}'),
        good.replace('"environment": {}', '"environment": {"commit": NaN}'),
        good.replace('"bound": 1e-05', '"bound": true'),
        good.replace('"notes": []', '"notes": "abc"'),
        good.replace('"benchmark": "x"', '"benchmark": "../x"'),
        good.replace('"flops": 0', '"flops": 1' + 400 * "0"),
        good.replace('"name": "case"', '"name": ' + "[" * 100_000),
        good.replace('"summary": ""', '"summary": ["' + "a" * 1_000_000 + '"]'),
    ]
    for text in (
        "",
        "[]",
        "{}",
        '{"benchmark": "x", "summary": "", "environment": {}, "cases": [{"name": "old"}]}',
        *broken,
    ):
        assert text != good
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=r"x\.json does not hold results of this version") as caught:
            load_all(tmp_path)
        assert len(str(caught.value)) < 1000
        with pytest.raises(SystemExit, match="2"):
            command_line.main(["report", str(tmp_path)])
        assert "or delete the file" in capsys.readouterr().err


def test_fingerprints_follow_what_the_code_says(tmp_path):
    def of(python: str) -> str:
        (tmp_path / "dtr_kernels").mkdir(exist_ok=True)
        (tmp_path / "dtr_kernels/a.py").write_text(python)
        return sources.fingerprint_of("dtr_kernels.a", root=tmp_path)

    python = 'def f(x):\n    """Doc."""\n    return x + 1  # why\n'
    first = of(python)
    assert of('def f(x):\n\n    """Another\n    docstring."""\n\n    return (\n        x  +  1)\n') == first
    for other in (python.replace("1", "2"), python.replace("x + 1", "f'{x}' + 1"), python.replace("1", "0")):
        assert of(other) != first
    assert of("x = 0\n") != of("x = False\n") and of("x = 0\n") != of("x = None\n")
    assert of("if x:\n    y()\nz()\n") != of("if x:\n    y()\n    z()\n")
    assert of('f("""x""")\n') != of('f("""y""")\n')


BLOCKS, SURGERY = {"block", "model", "surgery_step"}, {"surgery_projection", "surgery_step"}
EVERY = {*BLOCKS, *SURGERY, "res_block"}
CODE, DEFINITION = "\nCHANGED = True\n", "\n#define CHANGED\n"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of all that results can depend on."""
    root = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for folder in ("dtr_kernels", "csrc", "benchmarks"):
        shutil.copytree(sources.ROOT / folder, root / folder, ignore=ignored)
    return root


@pytest.mark.parametrize(
    ("path", "added", "stale"),
    [
        ("csrc/bindings.cpp", DEFINITION, EVERY),
        ("csrc/checks.h", DEFINITION, EVERY),
        ("csrc/cpu/kernels.inl", DEFINITION, EVERY),
        ("csrc/cuda/gram.cuh", DEFINITION, SURGERY),
        ("dtr_kernels/compilation.py", 'CXX_FLAGS += "-O2"', EVERY),
        ("dtr_kernels/ops/extension.py", CODE, EVERY),
        ("dtr_kernels/ops/registration.py", CODE, {*BLOCKS, *SURGERY}),
        ("dtr_kernels/ops/gated_norm.py", CODE, BLOCKS),
        ("dtr_kernels/ops/conv.py", CODE, {"res_block", "model"}),
        ("dtr_kernels/surgery/segments.py", CODE, {"surgery_step"}),
        ("dtr_kernels/sampling.py", CODE, {"model"}),
        ("dtr_kernels/tuned/gpu.json", "{}", BLOCKS),
        # Neither comments, re-exports, the rest of the build, other parts of the library nor benchmarks count.
        ("csrc/cpu/kernels.inl", "// changed\n/* twice */", set()),
        ("dtr_kernels/ops/gated_norm.py", "# changed", set()),
        ("dtr_kernels/__init__.py", CODE, set()),
        ("dtr_kernels/compilation.py", CODE, set()),
        ("dtr_kernels/info.py", CODE, set()),
        ("benchmarks/suite/block.py", CODE, set()),
    ],
)
def test_results_are_stale_when_what_they_depend_on_has_changed(checkout, path, added, stale):
    def fingerprints() -> dict[str, str]:
        return {name: sources.fingerprint(command_line.BENCHMARKS[name], checkout) for name in EVERY}

    file = checkout / path
    original = file.read_text() if file.exists() else None
    before = fingerprints()
    file.write_text((original or "") + added)
    try:
        changed = {name for name, now in fingerprints().items() if now != before[name]}
    finally:
        file.unlink() if original is None else file.write_text(original)
    assert changed == stale


def test_fingerprints_of_a_package_and_of_modules_leave_tuned_tiles_out(checkout):
    before = [sources.fingerprint_of(name, root=checkout) for name in ("dtr_kernels.ops", "dtr_kernels.ops.gated_norm")]
    (checkout / "dtr_kernels/tuned/gpu.json").write_text("{}")
    path = checkout / "dtr_kernels/ops/pcgrad.py"
    path.write_text(path.read_text() + CODE)
    after = [sources.fingerprint_of(name, root=checkout) for name in ("dtr_kernels.ops", "dtr_kernels.ops.gated_norm")]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True]


def test_rotation_and_ceilings(device):
    called = []
    timer = Stopwatch(device).timer([lambda: called.append(0), lambda: called.append(1)], graph=False)
    for _ in range(3):
        assert timer() >= 0
    assert called == [0, 1, 0] and not timer.graph
    product = MatrixProduct(device, torch.bfloat16, 32)
    assert product.amount == 65536 and product().dtype == torch.bfloat16
    assert copies(CPU, 1) == 1


@pytest.mark.gpu
def test_graphs_are_replayed_and_refused():
    device = torch.device("cuda")
    x, y = torch.zeros(1000, device=device), torch.zeros(1000, device=device)
    timer = Stopwatch(device).timer([lambda: x.add_(1), lambda: y.add_(1)])
    assert timer.graph
    before = x.sum().item()
    assert timer() > 0
    assert x.sum().item() == before + 1000 and torch.equal(x, y)
    assert not Stopwatch(device).timer([lambda: x.sum().item()]).graph
    assert copies(device, 1 << 40) == 1 and copies(device, 1 << 20) > 1


def test_saved_bytes_count_every_storage_once():
    x, weight = torch.randn(10, 7, requires_grad=True), torch.randn(7, 7, requires_grad=True)

    def forward():
        z = x @ weight  # saves x and the weight
        return (z * z).sin()  # z, and z * z

    assert memory.saved_bytes(forward, [weight]) == 3 * 70 * 4
    assert memory.saved_bytes(forward) == 3 * 70 * 4 + 49 * 4


def test_rounds_end_with_the_time():
    assert list(Rounds(least=3, most=10, seconds=0)) == [0, 1, 2]
    assert list(Rounds(least=3, most=10, seconds=60)) == list(range(10))


def test_stopwatch_sees_the_work_and_frees_its_result(device):
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def work():
        time.sleep(0.01)
        alive.add(result := torch.ones(1, device=device))
        return result

    assert Stopwatch(device).timer([work], graph=False)() >= 0.0099
    assert not alive


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_peak_memory_counts_what_was_freed_again(device):
    def forty_megabytes_then_one():
        _freed = torch.ones(10_000_000, device=device)
        return torch.ones(250_000, device=device)

    for _ in range(2):
        level = memory.in_use(device)
        assert 39e6 < memory.peak(forty_megabytes_then_one, device) - level < 60e6


@pytest.mark.parametrize("K", [1, 2, 5])
def test_oracle_is_the_loop_in_fp64(seed, monkeypatch, K):
    monkeypatch.setattr(surgery, "_CHUNK", 100)
    grads = surgery_projection.conflicting_gradients(K, 1003, torch.float32, CPU)
    order = dtr.ops.random_order(K)
    oracle = surgery.Oracle(grads, order)
    projected = dtr.reference.pcgrad(grads.double(), order)
    assert oracle.error_of_projected(projected) < 1e-12
    assert oracle.error_of_update(projected.sum(0)) < 1e-12
    assert oracle.error_of_sum(grads.double().sum(0)) < 1e-12
    assert oracle.error_of_update(projected.sum(0) * 1.001) == pytest.approx(1e-3)
    if K == 5:
        assert oracle.conflicts == "6 of 10 pairs conflict"
