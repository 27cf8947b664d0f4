"""What was measured, as numbers, as JSON and as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmarks.cases import Case, Goal
from benchmarks.timing import Spread, ratio

Status = Literal["right", "wrong", "unavailable", "failed"]
# From the names of a side and of the one that it is compared with.
Comparison = Callable[[str, str], Spread | None]


@dataclass
class SideResult:
    """What became of one side. Without ``seconds``, ``message`` says why."""

    bound: float
    bytes_moved: int | None
    status: Status = "right"
    message: str | None = None
    error: float = math.nan
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)


class CaseResult:
    """The figures of one case; the sides' ``seconds`` and ``copy_seconds`` have one entry for each complete round."""

    def __init__(self, case: Case, copy_bytes: int) -> None:
        self.name = case.name
        self.notes = list(case.notes)
        self.sides: dict[str, SideResult] = {}
        self.copy_seconds: list[float] = []
        self._copy_bytes = copy_bytes
        self._speedup_over, self._time_over, self._goals = case.speedup_over, case.time_over, case.goals

    def add_round(self, seconds: dict[str, float], copying: float) -> None:
        """Seconds of one call of every side that is timed, and of the copy."""
        for name, value in seconds.items():
            self.sides[name].seconds.append(value)
        self.copy_seconds.append(copying)

    def error(self, side: str) -> float | None:
        """The error of a side; None if it is not a number, or the side did not run to the end."""
        error = self.sides[side].error if side in self.sides else math.nan
        return error if math.isfinite(error) else None

    def speedup(self, side: str, over: str) -> Spread | None:
        """How many times as fast ``side`` is as ``over``."""
        return ratio(self._seconds(over), self._seconds(side)) if self._timed(side, over) else None

    def time(self, side: str, over: str) -> Spread | None:
        """How many times as long ``side`` takes as ``over``."""
        return self.speedup(over, side)

    def bandwidth(self, side: str) -> float | None:
        """Bytes that the side's work must move, per second."""
        moved = self.sides[side].bytes_moved if self._timed(side) else None
        return None if moved is None else moved / Spread.of(self._seconds(side)).median

    def copy_bandwidth(self) -> float | None:
        """Bytes per second of a plain copy in the same rounds, read and written ones counted."""
        return self._copy_bytes / Spread.of(self.copy_seconds).median if self.copy_seconds else None

    def share_of_copy(self, side: str) -> float | None:
        """The side's bandwidth over that of the copy."""
        bandwidth, ceiling = self.bandwidth(side), self.copy_bandwidth()
        return None if bandwidth is None or ceiling is None else bandwidth / ceiling

    def goals(self) -> list[tuple[Goal, float | None]]:
        """The case's goals and what was measured for them."""
        return [(goal, goal.measured(self)) for goal in self._goals]

    def as_json(self) -> dict[str, Any]:
        """Everything, in bytes, seconds and bytes per second."""
        return {
            "name": self.name,
            "notes": self.notes,
            "copy": {
                "bytes": self._copy_bytes,
                "seconds": self.copy_seconds,
                "bytes_per_second": self.copy_bandwidth(),
            },
            "sides": [self._side_as_json(name) for name in self.sides],
            "goals": [
                {"text": goal.text, "wanted": goal.wanted, "measured": value, "met": goal.met(value)}
                for goal, value in self.goals()
            ],
        }

    def _side_as_json(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            **asdict(self.sides[name]),
            "error": self.error(name),
            "summary": asdict(Spread.of(self._seconds(name))) if self._timed(name) else None,
            "bytes_per_second": self.bandwidth(name),
            "share_of_copy": self.share_of_copy(name),
            **{
                f"{kind} over {over}": asdict(spread) if (spread := measured(name, over)) else None
                for kind, over, measured in self._comparisons()
            },
        }

    def _comparisons(self) -> list[tuple[str, str, Comparison]]:
        asked_for = [("speed-up", self._speedup_over, self.speedup), ("time", self._time_over, self.time)]
        return [(kind, over, measured) for kind, over, measured in asked_for if over is not None]

    def markdown(self) -> str:
        """A table of the sides, and a list of the goals and notes."""
        columns = self._columns()
        rows = [["", *columns]]
        for name, side in self.sides.items():
            if side.seconds:
                rows.append([name, *(cell(name) for cell in columns.values())])
            else:
                rows.append([name, side.message or "not timed", *[""] * (len(columns) - 1)])
        lines = [f"### {self.name}", "", *_table(rows), ""]
        lines += [_goal_line(goal, value) for goal, value in self.goals()]
        if self.copy_seconds:
            lines.append(f"- a copy in the same rounds: {_number(self.copy_bandwidth(), 1e-9)} GB/s, read and written")
        lines += [f"- {note}" for note in self.notes]
        return "\n".join(lines).rstrip() + "\n"

    def _columns(self) -> dict[str, Callable[[str], str]]:
        """For each column's title a function from the name of a side to its cell."""
        columns = {"ms (p20 to p80)": lambda name: _milliseconds(self._seconds(name))}
        for kind, over, measured in self._comparisons():
            columns[f"{kind} over {over}"] = partial(_times, measured, over)
        if any(side.bytes_moved for side in self.sides.values()):
            columns["GB/s"] = lambda name: _number(self.bandwidth(name), 1e-9)
            columns["of copy"] = lambda name: _percent(self.share_of_copy(name))
        columns["error"] = lambda name: f"{self.sides[name].error:.1e}"
        if any(side.peak_bytes is not None for side in self.sides.values()):
            columns["peak MB"] = lambda name: _number(self.sides[name].peak_bytes, 1e-6)
        return columns

    def _timed(self, *sides: str) -> bool:
        return all(side in self.sides and self.sides[side].seconds for side in sides)

    def _seconds(self, side: str) -> list[float]:
        return self.sides[side].seconds


@dataclass
class Run:
    """One benchmark's cases, where and with what they were measured."""

    benchmark: str
    summary: str
    environment: dict[str, Any]
    cases: list[CaseResult] = field(default_factory=list)
    interrupted: bool = False

    @property
    def failed(self) -> bool:
        """Whether a side gave a wrong result or broke; one that cannot run here at all is no failure."""
        return any(side.status in ("wrong", "failed") for case in self.cases for side in case.sides.values())

    def save(self, folder: Path) -> None:
        """Writes <benchmark>.json and <benchmark>.md."""
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"benchmark": self.benchmark, "interrupted": self.interrupted, "environment": self.environment}
        text = json.dumps(facts | {"cases": [case.as_json() for case in self.cases]}, indent=2, allow_nan=False)
        (folder / f"{self.benchmark}.json").write_text(text + "\n")
        (folder / f"{self.benchmark}.md").write_text(self.markdown())

    def markdown(self) -> str:
        """All cases' tables, and below them the environment."""
        facts = [f"- {name}: {value}" for name, value in self.environment.items()]
        cut = ["", "Interrupted: cases are missing or have fewer rounds."] if self.interrupted else []
        head = [f"## {self.benchmark}", "", self.summary, *cut, ""]
        return "\n".join([*head, *(case.markdown() for case in self.cases), "### Measured with", "", *facts]) + "\n"


def _goal_line(goal: Goal, value: float | None) -> str:
    met = {None: "not measured", True: "met", False: "NOT met"}[goal.met(value)]
    return f"- goal {met}: {goal.text} {goal.wanted}" + ("" if value is None else f", measured {value:.3g}")


def _milliseconds(seconds: Sequence[float]) -> str:
    spread = Spread.of(seconds)
    median, p20, p80 = (_number(value, 1e3) for value in (spread.median, spread.p20, spread.p80))
    return f"{median} ({p20} to {p80})"


def _times(measured: Comparison, over: str, name: str) -> str:
    spread = measured(name, over)
    return "" if spread is None else f"{spread.median:.2f}x ({spread.p20:.2f} to {spread.p80:.2f})"


def _number(value: float | None, scale: float) -> str:
    if value is None:
        return ""
    return f"{value * scale:.4g}" if abs(value * scale) < 1e4 else f"{value * scale:.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns line up as plain text too."""
    rows = [[text.replace("|", "\\|") for text in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]
