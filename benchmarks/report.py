"""Reports of stored results: their tables and pictures, comparisons, and all figures of the docs and the README."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from benchmarks import floors, plots, sources
from benchmarks.cases import Goal
from benchmarks.results import CaseResult, Run, SideResult, load_all
from benchmarks.study import findings, inner
from benchmarks.suite import block, kernels
from benchmarks.suite.block import COMPILED, FUSED, MASKED, UNROUTED
from benchmarks.suite.surgery_projection import BMM, LOOP, MM
from benchmarks.suite.surgery_projection import COMPILED as COMPILED_SUMS
from benchmarks.tables import (
    MET,
    NOT_MEASURED,
    VERDICTS,
    caveats,
    commit_of,
    comparable,
    goals_table,
    label,
    marked,
    milliseconds,
    overview,
    run_markdown,
    table,
    times,
    verdict,
)
from dtr_kernels.files import replacing
from dtr_kernels.ops import KERNELS

# The results of each device, "cpu" first, by the name of its folder.
Results = Mapping[str, Sequence[Run]]

RESULTS = Path("benchmarks/results")
STATIC = RESULTS / "static/static.md"
DOCS = Path("docs/benchmarks.md")
PICTURES = Path("docs/benchmarks")
SHARES = PICTURES / "cpu-inner-shares.png"
README = Path("README.md")
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
    """Return the results of each device's folder in a checkout, without the compilers' report."""
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
    blocks = {
        README: readme_blocks(root, results),
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


_INTRODUCTION = """\
# Benchmarks

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
- Times are medians, in brackets the 20th and 80th percentiles. A ratio is the ratio of medians, in brackets the
  percentiles of the ratios round by round.
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

# The sides that the README compares the routed block with.
_PEERS_ON_CPU = (MASKED, UNROUTED + COMPILED)
_PEERS_ON_GPU = (MASKED + COMPILED, UNROUTED + COMPILED, f"{MASKED}, autocast")
_USUAL_ROUTING = {"scope": "block", "window": "per sample", "beta": 0.8}


def _goals_on_gpu() -> list[tuple[str, Goal]]:
    """Return the goals on an H200 in bf16, each with the block or kernel that has to reach it."""
    return [
        *(("a routed block, scope block", goal) for goal in block.goals_on_gpu("block")),
        ("a routed block, scope branch", block.goals_on_gpu("branch")[0]),
        *((kernel.name, goal) for kernel in KERNELS for goal in kernels.goals(kernel, "cuda")),
    ]


def docs_page(results: Results, static: bool) -> str:
    """Write all goals and overviews, for each device, and how they were measured.

    Args:
        results: of all devices.
        static: whether there is a static report to point to.
    """
    parts = [_INTRODUCTION]
    for device, runs in results.items():
        parts += [f"## {device}: {_machine(runs[0])}", "### Goals", goals_table(runs)]
        for run in runs:
            parts += [f"### {run.benchmark}", run.summary, *_bold_caveats(run), overview(run)]
            parts += [_picture(f"benchmarks/{device}-{run.benchmark}.png", run)] if plots.drawable(run) else []
            full = f"[All figures](../{(RESULTS / device / run.benchmark).as_posix()}.md)"
            when = f"measured on {str(run.environment.get('date'))[:10]} on commit {commit_of(run)}"
            parts.append(f"{full}, {when} by `{run.environment.get('command')}`.")
    if not results:
        parts.append("No results are stored in benchmarks/results yet.")
    if not results.keys() - {"cpu"}:
        parts += ["## GPU", _gpu(results)]
    if static:
        parts += [
            "## Without a GPU",
            f"What compilers say of every kernel for sm_80, sm_90 and sm_100: [static report](../{STATIC.as_posix()}).",
        ]
    return "\n\n".join([*parts, _METHOD, _REPRODUCE]) + "\n"


def readme_blocks(root: Path, results: Results) -> dict[str, str]:
    """Write the README's blocks from a checkout's results, by name."""
    of_results = {name: write(results) for name, write in BLOCKS.items()}
    of_inner = inner.committed(root)
    return of_results | {"study": findings.readme_block(root, [] if of_inner is None else [inner.sentence(of_inner)])}


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


# The README's names of sides.
_PROJECTIONS = {
    LOOP: "the public code's loop",
    MM: "Gram matrix by `torch.mm`",
    BMM: "Gram matrix by `torch.bmm`, in chunks",
    COMPILED_SUMS: "sums of products, `torch.compile`",
    "pcgrad_sum": "`ops.pcgrad_sum`",
    "pcgrad_": "`ops.pcgrad_` (all K projected)",
}
_STEPS = {
    "ordinary step": "ordinary step",
    "GradientSurgery, one_pass": '`engine="one_pass"`',
    "GradientSurgery, per_cluster": '`engine="per_cluster"`',
    "GradientSurgery, low_memory": '`engine="low_memory"`',
    "TorchJD, autogram": "TorchJD, autogram",
    "TorchJD, in parallel": "TorchJD, autojac",
    "retained graph and loop": "K backward passes of one graph, and the loop",
}


_ABOUT_IN_PLACE = """\
`ops.pcgrad_` works in place and may be faster than `ops.pcgrad_sum`, which moves fewer bytes but returns a new tensor,
whose pages the system provides at the first touch."""


def _surgery(results: Results) -> str:
    """Write the times of PCGrad alone and of whole training steps, side by side."""
    projection, step = (_run(results, "cpu", name) for name in ("surgery_projection", "surgery_step"))
    five, eight = (_case(projection, what="projection", clusters=K, precision="fp32") for K in (5, 8))
    whole = _case(step, model="DiT-S/2", batch=20, clusters=5, precision="fp32")
    if projection is None or step is None or five is None or eight is None or whole is None:
        alone = five and eight
        return _not_stored([n for n, case in (("surgery_projection", alone), ("surgery_step", whole)) if case is None])
    left = [
        *([name, *(_rounded_ms(case, side) for case in (five, eight))] for side, name in _PROJECTIONS.items()),
        ["`ops.pcgrad_sum` over `torch.mm`", *(times(case.speedup("pcgrad_sum", MM)) for case in (five, eight))],
        ["`ops.pcgrad_sum` over PyTorch's fastest", *(_over_fastest(case) for case in (five, eight))],
    ]
    right = [[name, times(whole.time(side, "ordinary step"))] for side, name in _STEPS.items() if whole.timed(side)]
    size = f"{label(five, 'parameters')} parameters"
    rows = [[f"PCGrad of {size}", "K 5", "K 8", "", "a step of DiT-S/2, batch 20, K 5", "time"]]
    for one, other in zip_longest((row for row in left if any(row[1:])), right):
        rows.append([*(one or [""] * 3), "", *(other or [""] * 2)])
    said = f"{_machines(projection, step)}, fp32, medians (p20 to p80 of ratios) of alternatives that take turns"
    caption = f"{said} in one process ({_links('cpu', projection, step)}):"
    return "\n\n".join([*_bold_caveats(projection, step), caption, table(rows), _ABOUT_IN_PLACE])


def _over_fastest(case: CaseResult) -> str:
    """Return the speed-up of our sum over the fastest way that needs only PyTorch, and the name of that way."""
    timed = [side for side in (MM, BMM, COMPILED_SUMS) if case.timed(side)]
    if not timed:
        return ""
    fastest = min(timed, key=lambda side: case.sides[side].spread.median)
    speedup = times(case.speedup("pcgrad_sum", fastest))
    return speedup and f"{speedup}, {fastest}"


def _machines(first: Run, second: Run) -> str:
    """Name the machines of two runs; one name if they are the same."""
    if _machine(first) == _machine(second):
        return f"On {_machine(first)}"
    return f"{first.benchmark} on {_machine(first)}; {second.benchmark} on {_machine(second)}"


def _inner(results: Results) -> str:
    """Write the results of scope "inner" on a CPU, for a page of the docs."""
    run = _run(results, "cpu", "inner")
    if run is None:
        return _not_stored(["inner"])
    said = f"On {_machine(run)} ([all figures](../{(RESULTS / 'cpu' / run.benchmark).as_posix()}.md)):"
    picture = f"![Time against the active share](benchmarks/{SHARES.name})"
    return "\n\n".join([*_bold_caveats(run), said, overview(run), *([picture] if plots.shares_of_heads(run) else [])])


def _blocks(results: Results) -> str:
    """Write the results of the routed block on a CPU."""
    run = _run(results, "cpu", "block")
    return _not_stored(["block"]) if run is None else _speed_of_blocks("cpu", run, _PEERS_ON_CPU)


def _gpu(results: Results) -> str:
    """Write the results on GPUs, or the goals on an H200 if there are none."""
    found = {device: runs for device, runs in results.items() if device != "cpu"}
    if not found:
        rows = [["to reach on an H200, in bf16", "", "measured"]]
        return table([*rows, *([what, goal.text, "not yet measured"] for what, goal in _goals_on_gpu())])
    parts = []
    for device, runs in found.items():
        parts.append(f"On {_machine(runs[0])}:")
        if block := _run(found, device, "block"):
            parts.append(_speed_of_blocks(device, block, _PEERS_ON_GPU))
        parts.append(goals_table(runs))
    return "\n\n".join(parts)


# Blocks of the README by name: functions that write them from the results of all devices.
BLOCKS: dict[str, Callable[[Results], str]] = {"surgery": _surgery, "blocks": _blocks, "gpu": _gpu}


def _speed_of_blocks(device: str, run: Run, peers: Sequence[str]) -> str:
    """Write the usual routing's cells by model, batch, precision and pass, and name the worst of all cells."""
    usual = [case for case in run.cases if _USUAL_ROUTING.items() <= case.cell.items()]
    models = list(dict.fromkeys(case.cell["model"] for case in usual))
    usual.sort(key=lambda case: (models.index(case.cell["model"]), case.cell["batch"]))
    columns = list(dict.fromkeys((label(case, "precision"), label(case, "pass")) for case in usual))
    sizes: dict[str, dict[tuple[str, str], str]] = {}
    for case in usual:
        cells = sizes.setdefault(f"{label(case, 'model')}, batch {label(case, 'batch')}", {})
        found = [case.speedup(FUSED, peer) if _comparable(case, peer) else None for peer in peers]
        cells[label(case, "precision"), label(case, "pass")] = " / ".join(times(s, False) or "-" for s in found)
    rows = [["", *(", ".join(column) for column in columns)]]
    rows += [[size, *(cells.get(column, "") for column in columns)] for size, cells in sizes.items()]
    routing = ", ".join(f"{name} {value}" for name, value in _USUAL_ROUTING.items())
    said = f"Speed-up of `{FUSED}` over {' / over '.join(peers)} ({routing}), on {_machine(run)}, of medians"
    worst = "\n".join(line for peer in peers if (line := _cells_against(run.cases, peer)))
    return "\n\n".join([*_bold_caveats(run), f"{said} ({_links(device, run)}):", table(rows), worst])


def _cells_against(cases: Sequence[CaseResult], peer: str) -> str:
    """Say in how many cells our block is at least as fast as ``peer``; empty if nothing was measured."""
    as_fast = Goal("speed-up", FUSED, over=peer, at_least=1.0)
    verdicts = [kind for case in cases if (kind := verdict(case, as_fast)) != NOT_MEASURED]
    if not verdicts:
        return ""
    every = "all" if set(verdicts) == {MET} else "not all"
    counts = ", ".join(f"{kind} in {verdicts.count(kind)}" for kind in VERDICTS if kind in verdicts)
    line = f"- {every} of {len(verdicts)} cells reach 1.0x over {peer}: {counts}"
    found = [(spread, case.name) for case in cases if _comparable(case, peer) and (spread := case.speedup(FUSED, peer))]
    if not found:
        return line
    worst, name = min(found, key=lambda pair: pair[0].median)
    return f"{line}; the worst is {name}: {times(worst)}"


def _comparable(case: CaseResult, peer: str) -> bool:
    return case.timed(FUSED, peer) and comparable(case, FUSED, peer)


def _run(results: Results, device: str, name: str) -> Run | None:
    return next((run for run in results.get(device, ()) if run.benchmark == name), None)


def _case(run: Run | None, **cell: str | int) -> CaseResult | None:
    """Return the case with these coordinates; None if there is none."""
    return next((case for case in (run.cases if run else ()) if cell.items() <= case.cell.items()), None)


def _not_stored(names: Sequence[str]) -> str:
    return f"{RESULTS.as_posix()}/cpu holds no figures of {' and '.join(names)} for this table yet."


def _machine(run: Run) -> str:
    facts = run.environment
    cores = f"{facts.get('threads')} threads of " if facts.get("device") == facts.get("cpu") else ""
    return f"{cores}{facts.get('device')}, torch {facts.get('torch')}"


def _bold_caveats(*runs: Run) -> list[str]:
    return [f"**{run.benchmark}: {caveat}**" for run in runs for caveat in caveats(run)]


def _links(device: str, *runs: Run) -> str:
    return ", ".join(f"[{run.benchmark}]({(RESULTS / device / run.benchmark).as_posix()}.md)" for run in runs)


def _rounded_ms(case: CaseResult, side: str) -> str:
    if not case.timed(side):
        return ""
    median = case.sides[side].spread.median * 1e3
    return f"{median:.0f} ms" if median >= 100 else f"{median:.3g} ms"
