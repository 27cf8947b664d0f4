"""Results as Markdown tables whose columns also line up as plain text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any, TypeVar

from benchmarks.cases import Goal
from benchmarks.results import CaseResult, Run, quotient
from benchmarks.timing import Spread

Item = TypeVar("Item")
MET, WITHIN, NOT_MET = "met", "within the spread", "NOT met"
NOT_COMPARABLE, NOT_MEASURED = "not comparable", "not measured"
VERDICTS = (MET, WITHIN, NOT_MET, NOT_COMPARABLE, NOT_MEASURED)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table of rows of equal length; the first row is the head."""
    rows = [[text.replace("|", "\\|") for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def grouped(items: Iterable[Item], key: Callable[[Item], Any]) -> list[list[Item]]:
    """Group items with equal keys, in the order of the first of each."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def run_markdown(run: Run) -> str:
    """Write all cases' tables, followed by the environment in which they were measured."""
    facts = [f"- {name}: {_plainly(value)}" for name, value in run.environment.items() if value is not None]
    head = [f"## {run.benchmark}", run.summary, *(f"**{caveat}**" for caveat in caveats(run))]
    cases = [case_table(case).rstrip() for case in run.cases]
    return "\n\n".join([*head, *cases, "### Measured with", "\n".join(facts)]) + "\n"


def caveats(run: Run) -> list[str]:
    """Return the sentences that a reader of any figure of this run must see."""
    commit, unbuilt = commit_of(run), sum(case.problem is not None for case in run.cases)
    told = {
        f"STALE: measured on commit {commit}; the source that the figures depend on has changed since.": run.stale,
        f"Measured with uncommitted changes on top of commit {commit}.": run.environment.get("uncommitted changes"),
        "Interrupted: cases are missing or have fewer rounds.": run.interrupted,
        f"{unbuilt} of {len(run.cases)} cases could not be built.": unbuilt,
    }
    return [sentence for sentence, holds in told.items() if holds]


def commit_of(run: Run) -> str:
    """Return the first digits of the measured commit."""
    return (run.environment.get("commit") or "unknown")[:10]


def case_table(case: CaseResult) -> str:
    """Write the sides, the goals, the ceilings measured in the same rounds, and the notes."""
    lines = [f"- {case.problem}"] if case.problem else []
    lines += [_goal_line(case, goal) for goal in case.goals]
    if rounds := len(case.copy.seconds):
        ceilings = f"memory bandwidth {_number(case.copy.rate, 1e-9)} GB/s, read and written"
        if case.matrix is not None:
            ceilings += f"; matrix products {_number(case.matrix.rate, 1e-12)} TFLOP/s"
        lines.append(f"- in the same {rounds} round{'s' if rounds > 1 else ''}: {ceilings}")
    lines += [f"- {note}" for note in case.notes]
    return "\n\n".join(part for part in (f"### {case.name}", _sides_table(case), "\n".join(lines)) if part)


def _sides_table(case: CaseResult) -> str:
    """Write one row for each side; empty if there is none."""
    if not case.sides:
        return ""
    columns = _columns(case)
    rows = [["", *columns]]
    for name, side in case.sides.items():
        if side.seconds:
            rows.append([name, *(cell(name) for cell in columns.values())])
        else:
            rows.append([name, side.message or "not timed", *[""] * (len(columns) - 1)])
    return table(_without_empty_columns(rows))


def _columns(case: CaseResult) -> dict[str, Callable[[str], str]]:
    """Return, for each column's title, a function from the name of a side with figures to its cell."""
    sides, matrix = case.sides, case.matrix
    columns: dict[str, Callable[[str], str]] = {"ms (p20 to p80)": lambda side: milliseconds(sides[side].spread)}
    if speedup_over := case.speedup_over:
        columns[f"speed-up over {speedup_over}"] = lambda side: times(case.speedup(side, speedup_over))
    if time_over := case.time_over:
        columns[f"time over {time_over}"] = lambda side: times(case.time(side, time_over))
    columns |= {
        "GB/s": lambda side: _number(case.bandwidth(side), 1e-9),
        "of bandwidth": lambda side: percent(case.share_of_copy(side)),
    }
    if matrix:  # without FLOPs the floor is the bandwidth alone
        columns |= {
            "TFLOP/s": lambda side: _number(case.flop_rate(side), 1e-12),
            "of matrix rate": lambda side: percent(quotient(case.flop_rate(side), matrix.rate)),
            "of floor": lambda side: percent(case.share_of_floor(side)),
        }
    columns |= {
        "error": lambda side: "" if sides[side].error is None else f"{sides[side].error:.1e}",
        "peak MB": lambda side: _number(sides[side].peak_bytes, 1e-6),
        "saved MB": lambda side: _number(sides[side].saved_bytes, 1e-6),
    }
    if any(side.graph for side in sides.values()):
        columns["graph"] = lambda side: "yes" if sides[side].graph else "no"
    return columns


def _without_empty_columns(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Drop columns that are empty below their head, except the first two."""
    shown = [i for i, column in enumerate(zip(*rows, strict=True)) if i < 2 or any(column[1:])]
    return [[row[i] for i in shown] for row in rows]


def verdict(case: CaseResult, goal: Goal) -> str:
    """Say whether a goal was reached. A limit inside p20 to p80 of the ratio by round decides nothing."""
    met = goal.met(case.value(goal))
    if met is None:
        return NOT_MEASURED
    if goal.over is not None and goal.quantity in _OF_TIMES and not comparable(case, goal.side, goal.over):
        return NOT_COMPARABLE
    spread = case.spread(goal)
    if spread is not None and any(spread.p20 < limit < spread.p80 for limit in (goal.at_least, goal.at_most)):
        return WITHIN
    return MET if met else NOT_MET


# Quantities that depend on the time of a side.
_OF_TIMES = ("speed-up", "time", "FLOP rate", "share of copy", "share of floor")


def comparable(case: CaseResult, side: str, over: str) -> bool:
    """Return whether both or neither of two sides replay a graph, which leaves out the host's time to launch."""
    return case.sides[side].graph == case.sides[over].graph


def _goal_line(case: CaseResult, goal: Goal) -> str:
    measured, found = goal_figure(case, goal), verdict(case, goal)
    if found == NOT_COMPARABLE:
        found += " (one is a replayed graph, the other is launched)"
    return f"- goal {found}: {goal.text}" + (f", measured {measured}" if measured else "")


def goal_figure(case: CaseResult, goal: Goal) -> str:
    """Format the figure that a goal limits, in the unit of its limits; empty if nothing was measured."""
    value, spread = case.value(goal), case.spread(goal)
    if value is None:
        return ""
    return f"{value:.3g}" if spread is None else f"{value:.3g} ({spread.p20:.3g} to {spread.p80:.3g})"


def goals_table(runs: Iterable[Run]) -> str:
    """Write one row for each goal of a benchmark, over all of its cases, with the worst of them."""
    rows = [["benchmark", "goal", "cases", *VERDICTS, "worst"]]
    for run in runs:
        of_run = [(case, goal) for case in run.cases for goal in case.goals]
        for pairs in grouped(of_run, lambda pair: pair[1].text):
            verdicts = [verdict(case, goal) for case, goal in pairs]
            counts = [str(verdicts.count(kind) or "") for kind in VERDICTS]
            rows.append([marked(run), pairs[0][1].text, str(len(pairs)), *counts, _worst(pairs)])
    return table(_without_empty_columns(rows)) if len(rows) > 1 else "No goals are set for these benchmarks."


def marked(run: Run) -> str:
    """Return the benchmark's name, with a mark if a caveat holds."""
    marks = [f"STALE, commit {commit_of(run)}"] if run.stale else []
    marks += ["uncommitted changes"] if run.environment.get("uncommitted changes") else []
    marks += ["interrupted"] if run.interrupted else []
    return run.benchmark + (f" ({', '.join(marks)})" if marks else "")


def _worst(pairs: Sequence[tuple[CaseResult, Goal]]) -> str:
    """Return the figure farthest on the wrong side of a goal, and its case."""

    def distance(pair: tuple[CaseResult, Goal]) -> float:
        case, goal = pair
        value = case.value(goal)
        assert value is not None
        return min(value - goal.at_least, goal.at_most - value)

    measured = [pair for pair in pairs if verdict(*pair) not in (NOT_MEASURED, NOT_COMPARABLE)]
    if not measured:
        return ""
    case, goal = min(measured, key=distance)
    return goal_figure(case, goal) + (f": {case.name}" if len(pairs) > 1 else "")


def summary_table(runs: Iterable[Run]) -> str:
    """Return one row for each benchmark: how it compares with the baseline over all cases, and the goals met."""
    rows = [["benchmark", "ours, in all cases", "median", "least to most", "goals met", "measured"]]
    for run in runs:
        for cases in grouped((case for case in run.cases if comparison(case)[1]), comparison):
            kind, baseline = comparison(cases[0])
            found = [spread.median for case in cases for side in ours_in([case]) if (spread := compared(case, side))]
            if not found:
                continue
            goals = [verdict(case, goal) for case in cases for goal in case.goals]
            met = f"{goals.count(MET)} of {len(goals)}" if goals else ""
            met += f", {goals.count(WITHIN)} {WITHIN}" if WITHIN in goals else ""
            middle, least, most = (f"{value:.2f}x" for value in (median(found), min(found), max(found)))
            measured = str(run.environment.get("date"))[:10] + (", STALE" if run.stale else "")
            rows.append([run.benchmark, f"{kind} over {baseline}", middle, f"{least} to {most}", met, measured])
    return table(_without_empty_columns(rows))


def overview(run: Run) -> str:
    """Write one row for each case: the sides against the baseline, and whether the goals are met.

    Sides with goals, or else our sides, are shown with their spread. Cases with another baseline have their own table;
    a single case has a row for each side. Cases that could not be built are listed with the reason.
    """
    built = [case for case in run.cases if case.problem is None]
    groups = grouped(built, lambda case: (case.speedup_over, case.time_over))
    parts = [_overview_of(cases) if len(cases) > 1 else _overview_of_one(*cases) for cases in groups]
    reasons = "\n".join(f"- {case.name}: {case.problem}" for case in run.cases if case.problem)
    return "\n\n".join([*parts, reasons] if reasons else parts)


def _overview_of_one(case: CaseResult) -> str:
    goals = "\n".join(_goal_line(case, goal) for goal in case.goals)
    return "\n\n".join(part for part in (f"{case.name}:", _sides_table(case), goals) if part)


def _overview_of(cases: Sequence[CaseResult]) -> str:
    kind, baseline = comparison(cases[0])
    fixed, varying = coordinates(cases)
    sides = list(dict.fromkeys(side for case in cases for side in case.sides if side != baseline))
    ours = ours_in(cases)
    labels = [[label(case, key) for key in varying] for case in cases]
    if len(set(map(tuple, labels))) < len(cases):
        varying, labels = ["case", *varying], [[case.name, *row] for case, row in zip(cases, labels, strict=True)]

    def of_ours(what: str) -> list[str]:
        return [what if len(ours) == 1 else f"{what}: {side}" for side in ours]

    head = [*varying, *([f"{baseline}, ms"] if baseline else []), *sides, *of_ours("of floor"), *of_ours("saved")]
    rows = [[*head, "launched, not replayed", "goals"]]
    for case, row in zip(cases, labels, strict=True):
        figures = [_median_ms(case, baseline)] if baseline else []
        figures += [_compared(case, side, side in ours) for side in sides]
        figures += [percent(case.share_of_floor(side)) if side in case.sides else "" for side in ours]
        figures += [_saved(case, side, baseline) for side in ours]
        rows.append([*row, *figures, _launched(case), _goals_in_short(case)])
    said = f"{kind} over {baseline}" if baseline else "ms"
    fixed_text = "".join(f", {key} {value}" for key, value in fixed.items())
    shown = f"{said[0].upper()}{said[1:]}" if baseline else said
    return f"{shown}{fixed_text}:\n\n{table(_without_empty_columns(rows))}"


def ours_in(cases: Sequence[CaseResult]) -> list[str]:
    """Return the sides with goals, or else those of this library; never the baseline."""
    sides = list(dict.fromkeys(side for case in cases for side in case.sides if side != comparison(case)[1]))
    with_goals = [side for side in sides if any(goal.side == side for case in cases for goal in case.goals)]
    return with_goals or [side for side in sides if is_ours(side)]


def is_ours(side: str) -> bool:
    """Return whether a side is this library's, not one that it is compared with."""
    return re.search(r"reference|eager|loop|unrouted|TorchJD|torch\.|\bF\.|matmul|plain|dense", side) is None


def comparison(case: CaseResult) -> tuple[str, str | None]:
    """Return the quantity by which the sides of a case are compared, and the side that is the baseline."""
    return ("speed-up", case.speedup_over) if case.speedup_over or not case.time_over else ("time", case.time_over)


def compared(case: CaseResult, side: str) -> Spread | None:
    """Return the speed-up of a side over the baseline, or its time if the case asks for that."""
    kind, baseline = comparison(case)
    return case.compared(kind, side, baseline)


def coordinates(cases: Sequence[CaseResult]) -> tuple[dict[str, str], list[str]]:
    """Return the coordinates that all cases share, with their values, and the names of those that vary."""
    names = list(dict.fromkeys(name for case in cases for name in case.cell))
    values = {name: list(dict.fromkeys(label(case, name) for case in cases)) for name in names}
    fixed = {name: found[0] for name, found in values.items() if len(found) == 1}
    return fixed, [name for name in names if name not in fixed]


def label(case: CaseResult, coordinate: str) -> str:
    """Return a coordinate of a case in words; empty if the case does not have it."""
    value = case.cell.get(coordinate, "")
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _compared(case: CaseResult, side: str, with_spread: bool) -> str:
    if side not in case.sides:
        return ""
    if not case.timed(side):
        return case.sides[side].status if case.sides[side].status != "right" else "not timed"
    if comparison(case)[1] is None:
        return _median_ms(case, side)
    return times(compared(case, side), with_spread)


def _saved(case: CaseResult, side: str, baseline: str | None) -> str:
    if baseline not in case.sides or side not in case.sides:
        return ""
    share = quotient(case.sides[side].saved_bytes, case.sides[baseline].saved_bytes)
    return "" if share is None else f"{share:.2f}x"


def _launched(case: CaseResult) -> str:
    """Name the sides whose time contains launches, if that of others does not."""
    timed = {name: side for name, side in case.sides.items() if side.seconds}
    launched = [name for name, side in timed.items() if not side.graph]
    return ", ".join(launched) if len(launched) < len(timed) else ""


def _goals_in_short(case: CaseResult) -> str:
    """Return "met", or the goals that are not met with their figures."""
    short = []
    for goal in case.goals:
        if (found := verdict(case, goal)) != MET:
            over = f" over {goal.over}" if goal.over else ""
            short.append(f"{found}: {goal.quantity} of {goal.side}{over} {goal_figure(case, goal)}".rstrip())
    return "; ".join(short) if short or not case.goals else MET


def _median_ms(case: CaseResult, side: str) -> str:
    return _number(case.sides[side].spread.median, 1e3) if case.timed(side) else ""


def milliseconds(spread: Spread) -> str:
    """Format seconds as milliseconds, from p20 to p80."""
    median, p20, p80 = (_number(value, 1e3) for value in (spread.median, spread.p20, spread.p80))
    return f"{median} ({p20} to {p80})"


def times(spread: Spread | None, with_spread: bool = True) -> str:
    """Format a ratio; empty for None."""
    if spread is None:
        return ""
    return f"{spread.median:.2f}x" + (f" ({spread.p20:.2f} to {spread.p80:.2f})" if with_spread else "")


def percent(value: float | None) -> str:
    """Format a share; empty for None."""
    return "" if value is None else f"{value:.0%}"


def _number(value: float | None, scale: float) -> str:
    if value is None:
        return ""
    return f"{value * scale:.4g}" if abs(value * scale) < 1e4 else f"{value * scale:.0f}"


def _plainly(value: Any) -> str:
    """Format a fact of the environment without Python's punctuation."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plainly(part)}" for name, part in value.items() if part is not None)
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
