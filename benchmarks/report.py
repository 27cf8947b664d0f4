"""Reports of stored results: their tables and pictures, comparisons, and all figures of the docs and the README."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import floors, plots, sources
from benchmarks.results import CaseResult, Run, SideResult, load_all, quotient
from benchmarks.study import findings, inner
from benchmarks.suite import block, kernels
from benchmarks.suite.block import COMPILED, FUSED, MASKED, UNROUTED
from benchmarks.suite.model import REMEMBERED
from benchmarks.tables import (
    caveats,
    commit_of,
    goals_table,
    marked,
    milliseconds,
    overview,
    run_markdown,
    summary_table,
    table,
    times,
)
from dtr_kernels.files import replacing
from dtr_kernels.ops import KERNELS

# The results of each device and PyTorch, "cpu" first, by the name of their folder.
Results = Mapping[str, Sequence[Run]]

RESULTS = Path("benchmarks/results")
STATIC = RESULTS / "static/static.md"
DOCS, TABLES = Path("docs/benchmarks.md"), Path("docs/benchmark_tables.md")
PICTURES = Path("docs/benchmarks")
SHARES = PICTURES / "cpu-inner-shares.png"
README, FRONT = Path("README.md"), Path("docs/index.md")
PERFORMANCE = Path("docs/performance.md")
INNER = Path("docs/inner.md")
METHODS = Path("docs/methods.md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``report``."""
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="DIR",
        help="folders of results; default: all in benchmarks/results, for the docs and the README",
    )
    parser.add_argument("--against", type=Path, metavar="DIR", help="other results, to compare those of each DIR with")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes; default: into the DIR itself")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if docs or README would change")


def main(arguments: argparse.Namespace) -> int:
    """Report, and return the exit status: 1 if ``--check`` finds text that would change.

    Raises:
        ValueError: if the arguments do not fit together, a folder has no results, or the README has an unknown marker.
    """
    if arguments.folders and arguments.check:
        raise ValueError("--check is about the docs and the README, which come from benchmarks/results: give it no DIR")
    if not arguments.folders and (arguments.against or arguments.out):
        raise ValueError("--against and --out are for the report of a DIR, which is missing")
    if not arguments.folders:
        return report_of_checkout(sources.ROOT, arguments.check)
    for folder in arguments.folders:
        apart = arguments.out is not None and len(arguments.folders) > 1
        target = arguments.out / folder.name if apart else arguments.out or folder
        if arguments.against is None:
            report_of_folder(folder, target)
        else:
            text = compare(load_all(folder), load_all(arguments.against), str(folder), str(arguments.against))
            _write(target / "comparison.md", text)
            print(text)
    return 0


def report_of_folder(folder: Path, target: Path) -> None:
    """Print the tables of all results in a folder, and write them with pictures to ``target``."""
    runs = load_all(folder)
    pictures = {target / f"{run.benchmark}.png": run for run in runs if plots.drawable(run)}
    drawn = _draw(pictures)
    parts = ["# Goals", goals_table(runs)]
    for run in runs:
        picture = [_picture(f"{run.benchmark}.png", run)] if drawn and plots.drawable(run) else []
        parts += [f"# {marked(run)}", overview(run), *picture, run_markdown(run)]
    text = "\n\n".join(part.rstrip() for part in parts) + "\n"
    _write(target / "report.md", text)
    print(text)


def report_of_checkout(root: Path, check: bool) -> int:
    """Write all text generated from the committed results, and the pictures; with ``check`` only compare the text.

    Returns:
        1 if ``check`` finds text that would change, else 0.
    """
    results = committed_results(root)
    texts = generated_texts(root, results)
    changed = [path for path, text in texts.items() if not path.is_file() or path.read_text() != text]
    if check:
        for path in changed:
            print(f"{path.relative_to(root)} does not say what the results do; run python -m benchmarks report")
        return int(bool(changed))
    for path in changed:
        _write(path, texts[path])
        print(f"wrote {path.relative_to(root)}")
    drawable = [(device, run) for device, runs in results.items() for run in runs if plots.drawable(run)]
    drawn = _draw({root / PICTURES / f"{device}-{run.benchmark}.png": run for device, run in drawable})
    if drawn and (of_inner := _run(results, "cpu", "inner")) is not None and plots.shares_of_heads(of_inner):
        plots.draw_shares_of_heads(of_inner, root / SHARES)
    return 0


def committed_results(root: Path) -> dict[str, list[Run]]:
    """Return the results of each folder in a checkout, without the compilers' report."""
    folders = [folder for folder in (root / RESULTS).glob("*") if folder.is_dir() and folder != (root / STATIC).parent]
    with_results = [folder for folder in folders if any(folder.glob("*.json"))]
    return {folder.name: load_all(folder) for folder in sorted(with_results, key=lambda f: (f.name != "cpu", f.name))}


def generated_texts(root: Path, results: Results) -> dict[Path, str]:
    """Return all text of a checkout that is generated from results, by its path."""
    texts = {
        root / RESULTS / device / f"{run.benchmark}.md": run_markdown(run)
        for device, runs in results.items()
        for run in runs
    }
    for study in findings.committed(root):
        texts[root / findings.DOCS / f"{study['plan']['name']}.md"] = findings.markdown(study)
    of_inner = inner.committed(root)
    if of_inner is not None:
        texts[root / inner.PAGE.with_suffix(".md")] = inner.markdown(of_inner)
    texts[root / DOCS] = docs_page(results, static=(root / STATIC).is_file())
    texts[root / TABLES] = tables_page(results)
    front = {"scopes": _scopes(results), "steps": _steps(results)}
    blocks = {
        README: {**front, "study": findings.readme_block(root)},
        FRONT: front,
        PERFORMANCE: {"floors": floors.markdown()},
        INNER: {"inner": _inner(results), "inner study": inner.block(of_inner)},
        METHODS: {"methods study": findings.methods_block(root)},
    }
    for path, of_path in blocks.items():
        texts[root / path] = with_blocks((root / path).read_text(), of_path, path)
    return texts


def _write(path: Path, text: str) -> None:
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _draw(pictures: Mapping[Path, Run]) -> bool:
    """Draw runs; return False, and print why, if that is not possible here."""
    try:
        for path, run in pictures.items():
            plots.draw(run, path)
    except ImportError as error:
        print(f"no pictures were drawn: {error}; pip install matplotlib")
        return False
    return True


def _picture(path: str, run: Run) -> str:
    return f"![Figures of {run.benchmark}]({path})"


def compare(now: Sequence[Run], then: Sequence[Run], now_name: str, then_name: str) -> str:
    """Write the times of each side in two sets of results, as Markdown.

    A side is faster or slower if the ranges from p20 to p80 of its two times do not overlap. It is neither if only one
    of them is the time of a replayed graph.
    """
    before = {run.benchmark: run for run in then}
    parts = [f"# {now_name} (now) against {then_name} (then)"]
    for run in now:
        if run.benchmark in before:
            parts += _compare_runs(run, before.pop(run.benchmark))
        else:
            parts += [f"## {run.benchmark}", "Only now."]
    for name in before:
        parts += [f"## {name}", "Only then."]
    return "\n\n".join(parts) + "\n"


# Times are not comparable if any of these differ.
_MACHINE = ("device", "driver", "cpu", "cores", "threads", "platform", "torch", "cuda", "triton")


def _compare_runs(now: Run, then: Run) -> list[str]:
    rows = [["case", "side", "now, ms (p20 to p80)", "then, ms (p20 to p80)", "then / now", "now is"]]
    only = []
    cases_then = {case.name: case for case in then.cases}
    for case in now.cases:
        if (earlier := cases_then.pop(case.name, None)) is None:
            only.append(f"- only now: {case.name}")
            continue
        names = list(dict.fromkeys([*case.sides, *earlier.sides]))
        found = [[side, *_compare_sides(case.sides.get(side), earlier.sides.get(side))] for side in names]
        rows += [[case.name if i == 0 else "", *row] for i, row in enumerate(found)]
    only += [f"- only then: {name}" for name in cases_then]
    verdicts = [row[-1] for row in rows[1:]]
    counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in ("faster", "slower", "same") if kind in verdicts)
    parts = [f"## {now.benchmark}" + (f": {counts}" if counts else "")]
    parts += [f"**{when}: {caveat}**" for when, run in (("Now", now), ("Then", then)) for caveat in caveats(run)]
    if differ := [name for name in _MACHINE if now.environment.get(name) != then.environment.get(name)]:
        facts = [f"- {name}: {now.environment.get(name)} now, {then.environment.get(name)} then" for name in differ]
        parts += [
            "**The ratios compare machines or their software, not only two states of the code:**",
            "\n".join(facts),
        ]
    if len(rows) > 1:
        parts.append(table(rows))
    return [*parts, "\n".join(only)] if only else parts


def _compare_sides(now: SideResult | None, then: SideResult | None) -> list[str]:
    """Return both times, their ratio and the verdict."""
    if now is None or then is None or not (now.seconds and then.seconds):
        return [_time_or_reason(now), _time_or_reason(then), "", ""]
    a, b = now.spread, then.spread
    if now.graph != then.graph:
        return [milliseconds(a), milliseconds(b), "", f"a {'replayed graph' if now.graph else 'launch'} only now"]
    change = "faster" if a.p80 < b.p20 else "slower" if a.p20 > b.p80 else "same"
    return [milliseconds(a), milliseconds(b), f"{b.median / a.median:.2f}x", change]


def _time_or_reason(side: SideResult | None) -> str:
    if side is None:
        return "not there"
    return milliseconds(side.spread) if side.seconds else side.message or "not timed"


_GENERATED = """\
Generated by `python -m benchmarks report` from [benchmarks/results](../benchmarks/results); not edited by hand."""

_METHOD = """\
## Method

- A side that is wrong has no time. Every side's outputs and gradients are first compared with the plain PyTorch oracle;
  beyond its bound a side's error is printed in place of figures.
- All sides of a case run in one process, in rounds. After one that does not count, each round times every side once and
  begins with another side than the last. A busy machine slows all of them.
- Benchmarks of single kernels call the launcher, also where the library's op would choose a dense product or plain
  PyTorch at that size; `explain` and `info` say what it chooses. A backward kernel is compared with the backward pass
  alone.
- On a GPU calls are recorded into a CUDA graph, which is replayed between two device events. What cannot be recorded is
  launched call by call: its `graph` is "no", or the table has no such column. Replayed and launched sides of one case
  are "not comparable": only launches contain the host's time. The graph of a single op calls it on as many sets of
  buffers as it takes that none is found in the L2 cache. Blocks, models and gradient surgery have one set of buffers;
  before each replay or call other data is read into the L2 cache. On a CPU it is the wall clock, and
  inputs may be found in a cache.
- Times are medians, in brackets the 20th and 80th percentiles. A ratio is that of two sides' times in one round,
  so that what slows a whole round cancels; again the median and these percentiles are given.
- The floor is max(FLOPs / matrix rate, bytes / memory bandwidth), both measured in the same rounds: by a large matrix
  product, and by a copy of a tensor far larger than any cache, of which bytes read and bytes written count. A CPU also
  reads what a copy overwrites, so that what only reads, or writes where it has read, can be faster than this floor.
  FLOPs and bytes of a side are what its function needs at least; a multiply-add counts as two.
- Peak memory is of a call that compiles nothing, above what was there before the first, on a CPU with what a compiler
  has left. Saved bytes are what autograd keeps for the backward pass, parameters left out.
- A goal is met or not by the median; where its limit lies between the percentiles, the verdict is "within the spread".
- STALE: the source that the figures depend on has changed since they were measured. Comments do not count."""

_REPRODUCE = """\
## How to reproduce

```bash
python -m benchmarks list                        # what can be measured
python -m benchmarks run                         # all of it on the CPU, into benchmarks/results/cpu
python -m benchmarks run --device cuda           # on the GPU, into the folder of its name; make gpu tests the kernels
python -m benchmarks run block --model DiT-S/2 --batch 4 --out out/mine
python -m benchmarks report out/mine             # its tables and pictures
python -m benchmarks report out/mine --against benchmarks/results/cpu
python -m benchmarks report                      # this page and the README's figures; --check: are they up to date?
```"""


def _goals_on_gpu() -> str:
    """Write a table of the goals on an H200 in bf16, each with the block or kernel that has to reach it."""
    goals = [
        *(("a routed block, scope block", goal) for goal in block.goals_on_gpu("block")),
        ("a routed block, scope branch", block.goals_on_gpu("branch")[0]),
        *((kernel.name, goal) for kernel in KERNELS for goal in kernels.goals(kernel, "cuda")),
    ]
    return table([["", "goal"], *([what, goal.text] for what, goal in goals)])


def docs_page(results: Results, static: bool) -> str:
    """Write the page of pictures: a summary and charts for each device, and how they were measured.

    Args:
        results: of all devices.
        static: whether there is a static report to point to.
    """
    parts = ["# Benchmarks", f"{_GENERATED} [All tables]({TABLES.name})."]
    for device, runs in results.items():
        parts += [f"## {device}: {_machine(runs[0])}", summary_table(runs)]
        drawn = (run for run in runs if plots.drawable(run))
        parts += [f"{run.summary}\n\n{_picture(f'benchmarks/{device}-{run.benchmark}.png', run)}" for run in drawn]
    if not results:
        parts.append("No results are stored in benchmarks/results yet.")
    if all(_on_cpu(run) for runs in results.values() for run in runs):
        parts += ["## GPU", "No kernel has run on a GPU yet. To reach on an H200, in bf16:", _goals_on_gpu()]
    if static:
        parts += [
            "## Without a GPU",
            f"What compilers say of every kernel for sm_80, sm_90 and sm_100: [static report](../{STATIC.as_posix()}).",
        ]
    return "\n\n".join([*parts, _METHOD, _REPRODUCE]) + "\n"


def tables_page(results: Results) -> str:
    """Write the page of tables: goals and overviews, for each device."""
    parts = ["# All tables", f"{_GENERATED} [Charts and method]({DOCS.name})."]
    for device, runs in results.items():
        parts += [f"## {device}: {_machine(runs[0])}", "### Goals", goals_table(runs)]
        for run in runs:
            parts += [f"### {run.benchmark}", run.summary, *_bold_caveats(run), overview(run)]
            full = f"[All figures](../{(RESULTS / device / run.benchmark).as_posix()}.md)"
            when = f"measured on {str(run.environment.get('date'))[:10]} on commit {commit_of(run)}"
            parts.append(f"{full}, {when} by `{run.environment.get('command')}`.")
    return "\n\n".join(parts) + "\n"


def with_blocks(text: str, blocks: Mapping[str, str], where: Path) -> str:
    """Return a text with each ``<!-- begin NAME --> ... <!-- end NAME -->`` filled with the block of that name.

    Args:
        where: the file of the text, for error messages.

    Raises:
        ValueError: if a block is unknown, has no end, or has no beginning.
    """
    pieces = re.split(r"<!-- (begin|end) (.+?) -->", text)
    filled, open_block = pieces[0], None
    for kind, name, following in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        if name not in blocks:
            raise ValueError(f"{where}: no block is named {name!r}; there are {', '.join(blocks)}")
        if kind == "begin" and open_block is None:
            open_block = name
            filled += f"<!-- begin {name} -->\n{blocks[name]}\n<!-- end {name} -->"
        elif kind == "end" and open_block == name:
            open_block = None
            filled += following
        else:
            context = f"within block {open_block!r}" if open_block else "and no block has begun"
            raise ValueError(f"{where}: <!-- {kind} {name} --> stands {context}")
    if open_block is not None:
        raise ValueError(f"{where}: block {open_block!r} has no <!-- end {open_block} -->")
    return filled


# The README's rows: a scope, the masked and the skipped parts, and the benchmark and sizes that represent it.
_SCOPES: Sequence[tuple[str, str, str, str, dict[str, str | int | float]]] = (
    ("block", "a block's input: the DTR paper", "QKV", "block", {"model": "DiT-S/2", "beta": 0.8}),
    ("branch", "the inputs of attention and MLP", "QKV, fc1", "block", {"model": "DiT-S/2", "beta": 0.8}),
    ("inner", "heads and hidden channels", "everything but modulation", "inner", {"model": "DiT-B/2", "beta": 0.75}),
)


def _scopes(results: Results) -> str:
    """Write a table of the speed and memory of each scope on a CPU."""
    rows = [["scope", "masks", "skips in part", "measured with", "forward", "training", "kept for backward"]]
    used = {}
    for scope, masks, skips, benchmark, sizes in _SCOPES:
        run = _run(results, "cpu", benchmark)
        common = {"scope": scope, "batch": 16, "precision": "fp32", "window": "per sample", **sizes}
        forward, training = (_case(run, **common, **{"pass": what}) for what in ("forward", "training"))
        if run is None or forward is None or training is None:
            return _not_stored([benchmark])
        used[benchmark] = run
        speeds = (times(case.speedup(FUSED, UNROUTED + COMPILED)) for case in (forward, training))
        saved = quotient(training.sides[FUSED].saved_bytes, training.sides[MASKED].saved_bytes)
        measured = ", ".join(f"{name} {value}" if name == "beta" else str(value) for name, value in sizes.items())
        kept = "" if saved is None else f"{saved:.2f}x"
        rows.append([f'`"{scope}"`', masks, skips, measured, *speeds, kept])
    said = (
        "Speed-up of a routed block over the ordinary one under `torch.compile`, and the bytes that autograd keeps "
        "over those of the plain masked block; batch 16, fp32, a window for each sample"
    )
    return f"{said} ({_measured(*used.values())}):\n\n{table(rows)}"


_STEPS = {
    "ordinary step": "ordinary step",
    "GradientSurgery, one_pass": '`engine="one_pass"`',
    "GradientSurgery, per_cluster": '`engine="per_cluster"`',
    "GradientSurgery, low_memory": '`engine="low_memory"`',
    "TorchJD, autogram": "TorchJD, autogram",
    "TorchJD, in parallel": "TorchJD, autojac",
    "retained graph and loop": "the public code: K backward passes, and a loop over pairs",
}


def _steps(results: Results) -> str:
    """Write a table of the time of a training step with PCGrad on a CPU."""
    run = _run(results, "cpu", "surgery_step")
    case = _case(run, model="DiT-S/2", batch=20, clusters=5, precision="fp32")
    if run is None or case is None:
        return _not_stored(["surgery_step"])
    rows = [[name, times(case.time(side, "ordinary step"))] for side, name in _STEPS.items() if case.timed(side)]
    said = f"A step of DiT-S/2 with PCGrad of 5 clusters, batch 20, fp32 ({_measured(run)}):"
    return f"{said}\n\n{table([['', 'time of a step'], *rows])}"


def _measured(*runs: Run) -> str:
    """Return machine, versions, date and commit of runs."""
    facts = (f"{_machine(run)}, {str(run.environment.get('date'))[:10]}, commit {commit_of(run)[:7]}" for run in runs)
    return "; ".join(dict.fromkeys(facts))


def _inner(results: Results) -> str:
    """Write the speed of scope "inner" on a CPU, for a page of the docs; its picture has more shares of heads."""
    run = _run(results, "cpu", "inner")
    if run is None:
        return _not_stored(["inner"])
    rows: dict[tuple[str, ...], dict[float, str]] = {}
    for case in run.cases:
        sizes = tuple(str(case.cell[name]) for name in ("model", "batch", "window", "precision", "pass"))
        ours = REMEMBERED if case.cell["pass"] == "sampling" else FUSED
        rows.setdefault(sizes, {})[float(case.cell["beta"])] = times(case.speedup(ours, UNROUTED + COMPILED))
    header = ["model", "batch", "window", "precision", "pass", "beta 0.75", "beta 0.5"]
    speeds = table([header, *([*sizes, of.get(0.75, ""), of.get(0.5, "")] for sizes, of in rows.items())])
    figures = f"[all figures](../{(RESULTS / 'cpu' / run.benchmark).as_posix()}.md)"
    said = f"Speed-up over the unrouted block, or model, under `torch.compile` ({_measured(run)}; {figures}):"
    picture = f"![Time against the active share](benchmarks/{SHARES.name})"
    return "\n\n".join([*_bold_caveats(run), said, speeds, *([picture] if plots.shares_of_heads(run) else [])])


def _run(results: Results, device: str, name: str) -> Run | None:
    return next((run for run in results.get(device, ()) if run.benchmark == name), None)


def _case(run: Run | None, **cell: str | int | float) -> CaseResult | None:
    """Return the case with these coordinates; None if there is none."""
    return next((case for case in (run.cases if run else ()) if cell.items() <= case.cell.items()), None)


def _not_stored(names: Sequence[str]) -> str:
    return f"{RESULTS.as_posix()}/cpu holds no figures of {' and '.join(names)} for this table yet."


def _machine(run: Run) -> str:
    cores = f"{run.environment.get('threads')} threads of " if _on_cpu(run) else ""
    return f"{cores}{run.environment.get('device')}, torch {run.environment.get('torch')}"


def _on_cpu(run: Run) -> bool:
    return run.environment.get("device") == run.environment.get("cpu")


def _bold_caveats(*runs: Run) -> list[str]:
    return [f"**{run.benchmark}: {caveat}**" for run in runs for caveat in caveats(run)]
