"""Reports: tables, verdicts, comparisons, pictures, and that the docs and the README say what the results do."""

from __future__ import annotations

import argparse
import builtins
import functools
import json
from itertools import product

import pytest
import torch

from benchmarks import floors, plots, report, sources
from benchmarks.cases import Goal
from benchmarks.counts import Work
from benchmarks.results import CaseResult, Ceiling, Run, SideResult
from benchmarks.suite import BENCHMARKS
from benchmarks.suite.block import FUSED
from benchmarks.tables import case_table, goals_table, overview, run_markdown, summary_table, table, verdict

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPEEDUPS = {
    "reference": 1.0,
    "reference, compiled": 1.2,
    "reference, autocast": 0.8,
    "unrouted": 1.1,
    "unrouted, compiled": 1.3,
    FUSED: 1.5,
}


def environment(**others) -> dict:
    """Made-up output of ``benchmarks.environment.describe``."""
    known = {"device": "A CPU", "cpu": "A CPU", "driver": None, "cores": 2, "threads": 2, "torch": "2.13.0"}
    versions = {"extension": {"compiler": "12.2", "architectures": ["sm_90", "sm_100"]}, "commit": COMMIT}
    rest = {"uncommitted changes": False, "date": "2026-11-21T03:14:59+00:00", "command": "python -m benchmarks run"}
    return {**known, **versions, **rest, **others}


def made_up_case(speedups: dict[str, float], base: float = 0.02, rounds: int = 6, noise: float = 0.03, **facts):
    """A case whose sides are so many times as fast as ``base`` seconds, give or take noise."""
    case = CaseResult(facts.pop("name", "a case"), Ceiling(1 << 30), Ceiling(2 * 2048**3), **facts)
    work = Work(flops=10**9, bytes=10**8)
    for number, side in enumerate(speedups):
        error, memory = 10.0 ** (-5 - number), 10**8 * (number + 1)
        case.sides[side] = SideResult(1e-3, work, error=error, peak_bytes=memory, saved_bytes=memory // 2)
    for _ in range(rounds):
        shared = base * (1 + 0.1 * torch.rand(()).item())  # a machine's slow moments, which all sides share
        around = (1 + noise * torch.randn(len(speedups))).clamp(min=0.5).tolist()
        seconds = {side: shared / by * factor for (side, by), factor in zip(speedups.items(), around, strict=True)}
        case.add_round(seconds, 0.1, 0.1)
    return case


def made_up_blocks(
    models=("DiT-S/2",),
    batches=(1, 4),
    precisions=("fp32", "bf16"),
    passes=("forward", "training"),
    **others,
) -> Run:
    """A run of the benchmark "block" with a cell for each combination; all share scope and beta."""
    cases = []
    goals = [
        Goal("speed-up", FUSED, over="reference", at_least=1),
        Goal("bytes saved", FUSED, over="reference", at_most=0.57),
    ]
    for model, batch, precision, what in product(models, batches, precisions, passes):
        cell = {"model": model, "batch": batch, "precision": precision, "pass": what}
        cell |= {"scope": "block", "window": "per sample", "beta": 0.8}
        speedups = {side: by * (0.7 + 0.5 * torch.rand(()).item()) for side, by in SPEEDUPS.items()}
        name = f"{model}, batch {batch}, {precision}, {what}"
        case = made_up_case(speedups, name=name, cell=cell, goals=goals, speedup_over="reference")
        case.sides[FUSED].saved_bytes = case.sides["reference"].saved_bytes // 2
        cases.append(case)
    return run_of("block", cases, **others)


def made_up_scopes() -> list[Run]:
    """The cases that the README's table of scopes quotes."""
    block, inner = made_up_blocks(batches=(16,)), made_up_blocks(("DiT-B/2",), (16,))
    branch = made_up_blocks(batches=(16,))
    for case in branch.cases:
        case.cell["scope"] = "branch"
    for case in inner.cases:
        case.cell |= {"scope": "inner", "beta": 0.75}
    return [run_of("block", [*block.cases, *branch.cases]), run_of("inner", inner.cases)]


def made_up_norms() -> Run:
    """A run whose goals are about the machine's limits, with another baseline in half of its cases."""
    cases = []
    for what, width in product(("forward", "backward"), (384, 768, 1152)):
        speedups = {"eager": 1.0, "torch.compile": 2.2, "F.layer_norm": 1.8, "gated_norm": 2.4}
        case = made_up_case(
            speedups,
            name=f"{what}, {width} channels",
            cell={"pass": what, "channels": width},
            goals=[Goal("share of copy", "gated_norm", at_least=0.9)],
            speedup_over="eager" if what == "forward" else None,
        )
        for side in case.sides.values():
            side.work = Work(bytes=80_000_000)
        cases.append(case)
    return run_of("gated_norm", cases)


fingerprint = functools.cache(sources.fingerprint)


def run_of(benchmark: str, cases: list[CaseResult], stale: bool = False, interrupted: bool = False, **facts) -> Run:
    known = BENCHMARKS.get(benchmark)
    source = "older" if stale or known is None else fingerprint(known)
    return Run(benchmark, f"What {benchmark} measures.", source, environment(**facts), cases, interrupted)


def made_up_surgery() -> list[Run]:
    """PCGrad alone, and the step that the README quotes."""
    projections = [
        made_up_case(
            {"the loop": 1.0, "torch.mm": by, "torch.bmm in chunks": 11.0, "pcgrad_sum": 15.0, "pcgrad_": 19.0},
            base=2.0,
            name=f"projection, K {K}",
            cell={"what": "projection", "clusters": K, "parameters": 33_000_000, "precision": "fp32"},
            speedup_over="the loop",
        )
        for K, by in ((5, 5.0), (8, 13.0))
    ]
    step = made_up_case(
        {"ordinary step": 1.0, "GradientSurgery, one_pass": 0.9, "TorchJD, autogram": 0.4},
        cell={"model": "DiT-S/2", "batch": 20, "clusters": 5, "precision": "fp32"},
        time_over="ordinary step",
    )
    return [run_of("surgery_projection", projections), run_of("surgery_step", [step])]


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def rows_of(markdown: str) -> list[dict[str, str]]:
    """The rows of a Markdown table, by the titles of its columns."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    head = cells_of(lines[0])
    return [dict(zip(head, cells_of(line), strict=True)) for line in lines[2:]]


def exact(seconds: dict[str, list[float]], **facts) -> CaseResult:
    """A case of exactly these seconds of each side."""
    case = CaseResult(facts.pop("name", "a case"), Ceiling(8_000_000), **facts)
    case.sides = {side: SideResult(1e-3, error=1e-6) for side in seconds}
    for i in range(len(next(iter(seconds.values())))):
        case.add_round({side: values[i] for side, values in seconds.items()}, 2e-3)
    return case


def arguments(*folders, against=None, out=None, check=False) -> argparse.Namespace:
    return argparse.Namespace(folders=list(folders), against=against, out=out, check=check)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of nothing but the pages with all their blocks, results of a CPU and a file of another kind."""
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    blocks = "\n\n".join(
        f"<!-- begin {name} -->\ntyped by hand\n<!-- end {name} -->" for name in ("scopes", "steps", "study")
    )
    (tmp_path / "README.md").write_text(f"# Title\n\n{blocks}\n\nThe end.\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/performance.md").write_text("<!-- begin floors -->\n<!-- end floors -->\n")
    inner = "".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in ("inner", "inner study"))
    (tmp_path / "docs/inner.md").write_text(inner)
    front = "".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in ("scopes", "steps"))
    (tmp_path / "docs/index.md").write_text(front)
    (tmp_path / "docs/methods.md").write_text("<!-- begin methods study -->\n<!-- end methods study -->\n")
    for run in (made_up_blocks(), *made_up_surgery()):
        run.save(tmp_path / report.RESULTS / "cpu")
    static = tmp_path / report.STATIC
    static.parent.mkdir()
    static.write_text("# Registers\n")
    static.with_suffix(".json").write_text("[]")
    return tmp_path


def test_columns_line_up_and_bars_are_escaped():
    text = table([["", "ms"], ["a | b", "1"], ["c", "1234567"]])
    assert text.splitlines() == [
        "|        | ms      |",
        "|--------|---------|",
        "| a \\| b | 1       |",
        "| c      | 1234567 |",
    ]


def test_tables_survive_the_way_through_json(seed, tmp_path):
    for run in (made_up_blocks(), made_up_norms(), *made_up_surgery()):
        run.save(tmp_path)
        loaded = Run.load(tmp_path / f"{run.benchmark}.json")
        assert run_markdown(loaded) == run_markdown(run)
        assert overview(loaded) == overview(run)


def test_figures_of_a_case():
    case = exact(
        {"slow": [4e-3, 6e-3, 8e-3], "fast": [1e-3, 1e-3, 1e-3], "wrong": [1.0, 1.0, 1.0]}, speedup_over="slow"
    )
    case.matrix = Ceiling(10**9, [0.1, 0.1, 0.1])
    case.sides["fast"].work = Work(flops=2_000_000, bytes=3_000_000)
    case.sides["wrong"].seconds, case.sides["wrong"].message = [], "error 2.5e-01, allowed 1.0e-03"
    case.sides["slow"].saved_bytes = 5_000_000
    case.notes = ["a note"]
    text = case_table(case)
    slow, fast, wrong = rows_of(text)
    assert fast == {
        "": "fast",
        "ms (p20 to p80)": "1 (1 to 1)",
        "speed-up over slow": "6.00x (4.80 to 7.20)",
        "GB/s": "3",
        "of bandwidth": "75%",
        "TFLOP/s": "0.002",
        "of matrix rate": "20%",
        "of floor": "75%",
        "error": "1.0e-06",
        "saved MB": "",
    }
    assert slow["saved MB"] == "5" and slow["GB/s"] == ""
    assert wrong["ms (p20 to p80)"] == "error 2.5e-01, allowed 1.0e-03" and not any(list(wrong.values())[2:])
    assert "- in the same 3 rounds: memory bandwidth 4 GB/s, read and written; matrix products 0.01 TFLOP/s" in text
    assert text.splitlines()[0] == "### a case" and text.endswith("- a note")


def test_columns_only_where_there_is_something_to_show():
    case = exact({"one": [1e-3]})
    assert list(rows_of(case_table(case))[0]) == ["", "ms (p20 to p80)", "error"]
    case.sides["one"].graph = True
    assert rows_of(case_table(case))[0]["graph"] == "yes"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"at_least": 1.9}, "met"),
        ({"at_least": 4.5}, "NOT met"),
        ({"at_least": 2.2}, "within the spread"),
        ({"at_least": 1.9, "at_most": 4.5}, "met"),
        ({"at_most": 2.5}, "within the spread"),
        ({"at_most": 1.5}, "NOT met"),
    ],
)
def test_verdicts(limits, expected):
    # By round 2, 2, 3, 4, 4 times as fast; medians 3.
    case = exact({"fast": [1.0] * 5, "slow": [2.0, 2.0, 3.0, 4.0, 4.0], "missing": [1.0] * 5})
    goal = Goal("speed-up", "fast", over="slow", **limits)
    case.goals = [goal]
    assert verdict(case, goal) == expected
    line = f"- goal {expected}: {goal.text}, measured 3 (2 to 4)"
    assert line in case_table(case).splitlines()
    case.sides["slow"].seconds = []
    assert verdict(case, goal) == "not measured"
    assert f"- goal not measured: {goal.text}" in case_table(case).splitlines()


@pytest.mark.parametrize("quantity", ["speed-up", "time"])
def test_a_replayed_graph_is_not_compared_with_launches(quantity):
    goal = Goal(quantity, "fast", over="slow", at_least=0.1, at_most=9)
    case, alike = (exact({"slow": [2.0] * 3, "fast": [1.0] * 3}, name=n, goals=[goal]) for n in ("one", "two"))
    case.sides["fast"].graph = True
    for side in alike.sides.values():
        side.graph = True
    assert verdict(case, goal) == "not comparable" and verdict(alike, goal) == "met"
    text = case_table(case)
    assert "- goal not comparable (one is a replayed graph, the other is launched): " in text
    assert [row["graph"] for row in rows_of(text)] == ["no", "yes"]
    (row,) = rows_of(goals_table([run_of("block", [case, alike])]))
    assert (row["met"], row["not comparable"]) == ("1", "1") and row["worst"].endswith(": two")
    rows = rows_of(overview(run_of("block", [case, alike])))
    assert [row["launched, not replayed"] for row in rows] == ["slow", ""]
    assert rows[0]["goals"].startswith("not comparable: ") and rows[1]["goals"] == "met"


def test_a_case_that_could_not_be_built(seed, tmp_path, capsys):
    run = made_up_blocks(batches=(1,))
    run.cases.append(CaseResult("case 5 of 6", Ceiling(8), problem="could not be built: OutOfMemoryError: too large"))
    alone = run_of("model", run.cases[-1:])
    for each in (run, alone):
        each.save(tmp_path)
        assert "### case 5 of 6\n\n- could not be built: OutOfMemoryError" in run_markdown(each)
        assert "- case 5 of 6: could not be built: OutOfMemoryError" in overview(each)
        assert goals_table([each])
    assert overview(alone) == "- case 5 of 6: could not be built: OutOfMemoryError: too large"
    assert "1 of 5 cases could not be built." in report.tables_page({"cpu": [run]})
    assert report.main(arguments(tmp_path)) == 0
    assert "**1 of 1 cases could not be built.**" in capsys.readouterr().out
    assert report.main(arguments(tmp_path, against=tmp_path)) == 0


def test_figures_that_are_measured_once_have_no_spread():
    case = exact({"fast": [1.0, 2.0, 3.0]}, goals=[Goal("error", "fast", at_most=1e-6)])
    assert verdict(case, case.goals[0]) == "met"
    assert "- goal met: error of fast at most 1e-06, measured 1e-06" in case_table(case).splitlines()


def test_goals_are_counted_over_cases_and_the_worst_is_named():
    goal = Goal("speed-up", "fast", over="slow", at_least=2)
    cases = [
        exact({"slow": slow, "fast": [1.0] * 3}, name=name, goals=[goal])
        for name, slow in {"easy": [3.0] * 3, "close": [1.5, 2.1, 2.5], "hard": [1.5] * 3, "easier": [9.0] * 3}.items()
    ]
    (row,) = rows_of(goals_table([run_of("block", cases)]))
    counts = {kind: row[kind] for kind in ("cases", "met", "within the spread", "NOT met")}
    assert counts == {"cases": "4", "met": "2", "within the spread": "1", "NOT met": "1"}
    assert row["worst"] == "1.5 (1.5 to 1.5): hard" and "not measured" not in row


def test_overview_has_a_column_for_what_varies_and_names_the_rest(seed):
    run = made_up_blocks(models=["DiT-S/2", "DiT-B/2"])
    text = overview(run)
    said, rows = text.splitlines()[0], rows_of(text)
    assert said == "Speed-up over reference, scope block, window per sample, beta 0.8:"
    assert list(rows[0])[:5] == ["model", "batch", "precision", "pass", "reference, ms"]
    assert not {"scope", "window", "beta", "reference"} & set(rows[0])
    for row, case in zip(rows, run.cases, strict=True):
        assert [row["model"], row["batch"]] == [case.cell["model"], str(case.cell["batch"])]
        ours = case.speedup(FUSED, "reference")
        assert row[FUSED] == f"{ours.median:.2f}x ({ours.p20:.2f} to {ours.p80:.2f})"
        assert row["unrouted"] == f"{case.speedup('unrouted', 'reference').median:.2f}x"
        assert row["of floor"] == f"{case.share_of_floor(FUSED):.0%}" and row["saved"] == "0.50x"
        assert (row["goals"] == "met") == all(verdict(case, goal) == "met" for goal in case.goals)


def test_overview_of_cases_that_have_no_coordinates_or_another_baseline(seed):
    case = made_up_case({"one": 1.0, "two": 2.0}, name="alone")
    other = made_up_case({"one": 1.0}, name="another")
    case.sides["two"].status, case.sides["two"].seconds = "wrong", []
    rows = rows_of(overview(run_of("block", [case, other])))
    assert [row["case"] for row in rows] == ["alone", "another"]
    assert [row["two"] for row in rows] == ["wrong", ""] and float(rows[0]["one"]) > 0
    forward, backward = overview(made_up_norms()).split("\n\n|")[0], overview(made_up_norms()).split("\n\n")[2]
    assert forward == "Speed-up over eager, pass forward:" and backward == "ms, pass backward:"


def test_overview_of_a_case_alone_has_a_row_for_each_side(seed):
    _, step = made_up_surgery()
    step.cases[0].goals = [Goal("time", "GradientSurgery, one_pass", over="ordinary step", at_most=9)]
    text = overview(step)
    assert [row[""] for row in rows_of(text)] == list(step.cases[0].sides)
    assert text.startswith("a case:\n\n") and "- goal met: time of GradientSurgery, one_pass" in text


def test_what_a_reader_must_know_of_a_run(seed, tmp_path):
    fresh, old = made_up_blocks(), made_up_blocks(stale=True)
    assert not fresh.stale and old.stale
    assert run_of("gone", []).stale
    careless = made_up_blocks(interrupted=True, **{"uncommitted changes": True})
    results = {"cpu": [old]}
    for text in (
        run_markdown(old),
        report.tables_page(results),
        report.compare([fresh], [old], "a", "b"),
        goals_table([old]),
    ):
        assert "STALE" in text and COMMIT[:10] in text
    assert ", STALE |" in report.docs_page(results, static=False)
    for text in (run_markdown(careless), report.tables_page({"cpu": [careless]})):
        assert "STALE" not in text and "uncommitted changes" in text and "Interrupted" in text
    assert "| block (uncommitted changes, interrupted) |" in goals_table([careless])
    assert "STALE" not in report.docs_page({"cpu": [fresh]}, static=False).split("## Method")[0]
    title = plots.figure(old).get_suptitle()
    assert "STALE" in title and "A CPU" in title and "torch 2.13.0" in title and "2026-11-21" in title


def test_environment_without_pythons_punctuation():
    text = run_markdown(run_of("block", []))
    assert "- extension: compiler 12.2, architectures sm_90 sm_100" in text
    assert "- uncommitted changes: no" in text and "driver" not in text


def test_two_sets_of_results_are_compared():
    def cases(**medians):
        sides = {side: [median * 0.9, median, median * 1.1] for side, median in medians.items()}
        return exact(sides, name="shared")

    now = run_of("block", [cases(quicker=1.0, slower=1.0, alike=1.0, new=1.0), exact({"a": [1.0]}, name="new case")])
    then = run_of("block", [cases(quicker=2.0, slower=0.5, alike=1.05, old=1.0), exact({"a": [1.0]}, name="old case")])
    text = report.compare([now, *made_up_surgery()[:1]], [then, made_up_norms()], "A", "B")
    rows = {row["side"]: row for row in rows_of(text)}
    assert {side: row["now is"] for side, row in rows.items()} == {
        "quicker": "faster",
        "slower": "slower",
        "alike": "same",
        "new": "",
        "old": "",
    }
    assert rows["quicker"]["then / now"] == "2.00x" and rows["slower"]["then / now"] == "0.50x"
    assert rows["new"]["then, ms (p20 to p80)"] == rows["old"]["now, ms (p20 to p80)"] == "not there"
    assert [row["case"] for row in rows.values()] == ["shared", "", "", "", ""]
    assert "- only now: new case" in text and "- only then: old case" in text
    assert "## block: 1 faster, 1 slower, 1 same" in text
    assert "## surgery_projection\n\nOnly now." in text and "## gated_norm\n\nOnly then." in text
    assert "compare machines" not in text
    elsewhere = run_of("block", then.cases, threads=8, torch="2.14.0")
    text = report.compare([now], [elsewhere], "A", "B")
    assert "The ratios compare machines" in text
    assert "- threads: 2 now, 8 then" in text and "- torch: 2.13.0 now, 2.14.0 then" in text and "- cores" not in text


def test_blocks_are_replaced_and_the_rest_stays():
    blocks = {"one": "first", "two": "second"}
    text = "before\n<!-- begin one -->\nold\n<!-- end one -->\n<!-- a comment -->\n"
    text += "<!-- begin two --><!-- end two -->after\n"
    expected = (
        "before\n<!-- begin one -->\nfirst\n<!-- end one -->\n<!-- a comment -->\n"
        "<!-- begin two -->\nsecond\n<!-- end two -->after\n"
    )
    assert report.with_blocks(text, blocks, report.README) == expected
    assert report.with_blocks(expected, blocks, report.README) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- begin nonsense --><!-- end nonsense -->", "no block is named 'nonsense'; there are gpu, blocks"),
        ("<!-- begin gpu -->\n", "block 'gpu' has no <!-- end gpu -->"),
        ("<!-- end gpu -->\n", "<!-- end gpu --> stands and no block has begun"),
        ("<!-- begin gpu --><!-- begin blocks --><!-- end gpu -->", "<!-- begin blocks --> stands within block 'gpu'"),
        ("<!-- begin gpu --><!-- end blocks -->", "<!-- end blocks --> stands within block 'gpu'"),
    ],
)
def test_markers_that_do_not_fit(text, message):
    with pytest.raises(ValueError) as caught:
        report.with_blocks(text, {"gpu": "", "blocks": ""}, report.README)
    assert message in str(caught.value) and "README.md" in str(caught.value)


def test_floors_of_a_block():
    """In XL, fc2 is 2 * 65536 * 4608 * 1152 operations; the first norm reads x and writes u on 921 channels."""
    cells = {tuple(cells[:2]): cells[2:] for cells in map(cells_of, floors.markdown().splitlines()) if len(cells) > 2}
    assert cells["forward", "fc2"] == ["0.696", "0.77", "0.881", "operations"]
    tflop, gigabytes, milliseconds, bound = cells["forward", "first norm, active channels"]
    assert (tflop, bound) == ("0.000", "bytes") and float(gigabytes) == pytest.approx(4 * 921 * 65536 / 1e9, rel=0.02)
    assert float(milliseconds) == pytest.approx(float(gigabytes) / 4.3, abs=0.002)
    both = [float(cells["backward", f"QKV over {which}"][0]) for which in ("windows", "all channels")]
    assert both[0] == pytest.approx(0.8 * both[1], rel=0.01)


def test_pages_without_results_say_so():
    assert "no figures of block" in report._scopes({}) and "no figures of surgery_step" in report._steps({})
    page = report.docs_page({"cpu": made_up_surgery(), "cpu-torch-9": [made_up_blocks()]}, static=False)
    assert "## cpu-torch-9: 2 threads of A CPU, torch 2.13.0" in page
    goals = rows_of(page.partition("## GPU")[2])
    assert len(goals) > 7 and "speed-up of RoutedDiTBlock over unrouted, compiled at least 1" in [
        row["goal"] for row in goals
    ]
    assert "## GPU" not in report.docs_page({"nvidia-h200": [made_up_blocks(device="NVIDIA H200")]}, static=False)


def test_the_readmes_scopes(seed):
    runs = made_up_scopes()
    text = report._scopes({"cpu": runs})
    rows = rows_of(text)
    assert [row["scope"] for row in rows] == ['`"block"`', '`"branch"`', '`"inner"`']
    first = [0, 4, 0]  # of each scope the first case is fp32, forward, and the second its training
    for row, run, number in zip(rows, (runs[0], *runs), first, strict=True):
        for name, case in zip(("forward", "training"), run.cases[number:], strict=False):
            assert row[name].startswith(f"{case.speedup(FUSED, 'unrouted, compiled').median:.2f}x (")
        assert row["kept for backward"] == "0.50x"
    assert text.count("2 threads of A CPU, torch 2.13.0, 2026-11-21, commit 0123456") == 1
    runs[1].cases = runs[1].cases[:1]
    assert "no figures of inner" in report._scopes({"cpu": runs})


def test_the_speeds_of_scope_inner(seed):
    three_quarters, half = made_up_scopes()[1], made_up_scopes()[1]
    for case in half.cases:
        case.cell["beta"] = 0.5
    sampling = made_up_case({"unrouted, compiled": 1.0, "Sampler": 1.8}, cell=half.cases[0].cell | {"pass": "sampling"})
    rows = rows_of(report._inner({"cpu": [run_of("inner", [*three_quarters.cases, *half.cases, sampling])]}))
    assert [row["pass"] for row in rows] == ["forward", "training"] * 2 + ["sampling"]
    for row, wide, narrow in zip(rows, three_quarters.cases, half.cases, strict=False):
        for share, case in (("beta 0.75", wide), ("beta 0.5", narrow)):
            assert row[share].startswith(f"{case.speedup(FUSED, 'unrouted, compiled').median:.2f}x (")
    assert rows[-1]["beta 0.75"] == "" and rows[-1]["beta 0.5"].startswith("1.")


def test_the_readmes_steps(seed):
    _, run = made_up_surgery()
    text = report._steps({"cpu": [run]})
    cost = run.cases[0].time("GradientSurgery, one_pass", "ordinary step")
    rows = {row[""]: row["time of a step"] for row in rows_of(text)}
    assert list(rows) == ["ordinary step", '`engine="one_pass"`', "TorchJD, autogram"]
    assert rows['`engine="one_pass"`'].startswith(f"{cost.median:.2f}x (")


def test_the_summary_has_a_row_for_each_baseline(seed):
    norms = made_up_norms()
    for case in norms.cases[3:]:
        case.speedup_over = "torch.compile"
    blocks = made_up_blocks(stale=True)
    rows = rows_of(summary_table([blocks, norms, *made_up_surgery()]))
    assert [row["ours, in all cases"] for row in rows] == [
        "speed-up over reference",
        "speed-up over eager",
        "speed-up over torch.compile",
        "speed-up over the loop",
        "time over ordinary step",
    ]
    found = sorted(case.speedup(FUSED, "reference").median for case in blocks.cases)
    assert rows[0]["median"] == f"{(found[3] + found[4]) / 2:.2f}x"
    assert rows[0]["least to most"] == f"{found[0]:.2f}x to {found[-1]:.2f}x"
    verdicts = [verdict(case, goal) for case in blocks.cases for goal in case.goals]
    assert rows[0]["goals met"].split(", ")[0] == f"{verdicts.count('met')} of 16"
    assert ("within" in rows[0]["goals met"]) == ("within the spread" in verdicts)
    assert [row["measured"] for row in rows[:2]] == ["2026-11-21, STALE", "2026-11-21"]


def test_report_of_a_folder(seed, tmp_path, capsys):
    made_up_blocks().save(tmp_path / "a")
    assert report.main(arguments(tmp_path / "a", out=tmp_path / "b")) == 0
    text = (tmp_path / "b/report.md").read_text()
    assert text in capsys.readouterr().out
    assert "](block.png)" in text and "Speed-up over reference" in text and "### Measured with" in text
    assert (tmp_path / "b/block.png").stat().st_size > 10_000
    assert report.main(arguments(tmp_path / "a", against=tmp_path / "a")) == 0
    printed = capsys.readouterr().out
    assert "## block: 48 same" in printed and (tmp_path / "a/comparison.md").read_text() in printed


def test_without_matplotlib_tables_are_written_all_the_same(seed, tmp_path, monkeypatch, capsys):
    original = builtins.__import__

    def without(name, *others, **more):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return original(name, *others, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    made_up_blocks().save(tmp_path)
    assert report.main(arguments(tmp_path)) == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    assert "Speed-up over reference" in text and "![" not in text


def test_a_checkout_is_brought_up_to_date(seed, checkout, capsys):
    assert report.main(arguments(check=True)) == 1
    assert "README.md does not say" in capsys.readouterr().out
    assert "typed by hand" in (checkout / "README.md").read_text()
    assert sorted(path.name for path in (checkout / "docs").iterdir()) == [
        "index.md",
        "inner.md",
        "methods.md",
        "performance.md",
    ]
    assert report.main(arguments()) == 0
    readme = (checkout / "README.md").read_text()
    assert "typed by hand" not in readme and readme.endswith("\n\nThe end.\n")
    assert floors.markdown() in (checkout / "docs/performance.md").read_text()
    docs, tables = ((checkout / f"docs/{name}.md").read_text() for name in ("benchmarks", "benchmark_tables"))
    assert "../benchmarks/results/static/static.md" in docs and "### surgery_step" in tables
    for name in ("block", "surgery_projection", "surgery_step"):
        assert (checkout / f"docs/benchmarks/cpu-{name}.png").stat().st_size > 5_000
        assert f"](benchmarks/cpu-{name}.png)" in docs
        assert (checkout / f"benchmarks/results/cpu/{name}.md").read_text().startswith(f"## {name}")
    assert report.main(arguments(check=True)) == 0
    made_up_blocks().save(checkout / report.RESULTS / "cpu")
    assert report.main(arguments(check=True)) == 1


def test_arguments_that_do_not_fit(tmp_path):
    for given, message in (
        (arguments(tmp_path, check=True), "--check"),
        (arguments(against=tmp_path), "--against"),
        (arguments(out=tmp_path), "--out"),
        (arguments(tmp_path), "there are no results"),
        (arguments(tmp_path / "mistyped"), "there are no results"),
    ):
        with pytest.raises(ValueError, match=message):
            report.main(given)
    assert not (tmp_path / "mistyped").exists()
    made_up_blocks().save(tmp_path / "cpu")
    with pytest.raises(ValueError, match=f"no results .* in {tmp_path}; give one of {tmp_path / 'cpu'}"):
        report.main(arguments(tmp_path))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"benchmark": "block"}', json.dumps({"cases": [], "interrupted": False})]
)
def test_a_file_of_another_kind_is_named_with_what_to_do(tmp_path, content):
    (tmp_path / "block.json").write_text(content)
    with pytest.raises(ValueError) as caught:
        report.main(arguments(tmp_path))
    for part in (str(tmp_path / "block.json"), "python -m benchmarks run block", "delete"):
        assert part in str(caught.value)


def test_pictures(seed, tmp_path):
    for run in (made_up_blocks(), made_up_norms(), *made_up_surgery()):
        plots.draw(run, tmp_path / f"{run.benchmark}.png")
        assert (tmp_path / f"{run.benchmark}.png").read_bytes()[1:4] == b"PNG"
    nothing = run_of("block", [exact({"a": [1.0]})])
    assert not plots.drawable(nothing)
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.draw(nothing, tmp_path / "nothing.png")


def test_a_side_looks_the_same_in_every_picture(seed):
    few, many = made_up_blocks(batches=[1], precisions=["fp32"]), made_up_blocks(models=["DiT-S/2", "DiT-B/2"])
    looks = []
    for run in (few, many):
        (legend,) = plots.figure(run).legends
        names = [text.get_text() for text in legend.get_texts()]
        looks.append({n: (h.get_color(), h.get_marker()) for n, h in zip(names, legend.legend_handles, strict=True)})
    assert looks[0] == looks[1] and len(set(looks[0].values())) == len(looks[0]) == 5


def test_sides_of_one_picture_look_different():
    projections = ["torch.mm", "torch.bmm in chunks", "torch.compile", "TorchJD PCGrad", "TorchJD weights of our Gram"]
    engines = [f"GradientSurgery, {engine}" for engine in ("functions", "per_cluster", "one_pass", "low_memory")]
    steps = [
        *engines,
        "retained graph and loop",
        *(f"TorchJD, {how}" for how in ("one by one", "in parallel", "autogram")),
    ]
    hows = ["", ", compiled", ", max-autotune", ", autocast"]
    blocks = [what + how for what in ("reference", "unrouted", FUSED) for how in hows]
    models = [what + how for what in ("reference", "unrouted", "DiT") for how in hows] + ["Sampler"]
    for sides in ([*projections, "pcgrad_sum", "pcgrad_"], steps, blocks, models):
        assert len({plots.style(side) for side in sides}) == len(sides)


def test_what_is_committed_says_what_the_results_do():
    """After a measurement: python -m benchmarks report."""
    assert report.report_of_checkout(sources.ROOT, check=True) == 0
