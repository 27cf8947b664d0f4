"""Measurements, the figures that follow from them, and how they are stored as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from benchmarks import sources
from benchmarks.cases import Case, Goal
from benchmarks.counts import NOT_COUNTED, Work
from benchmarks.stored import misfit
from benchmarks.suite import BENCHMARKS
from benchmarks.timing import Spread, ratio
from dtr_kernels.files import expecting, read_json, replacing
from dtr_kernels.quoting import quoted

Status = Literal["right", "wrong", "unavailable", "failed"]
_Fact = str | int | float | bool | None | list[str]
_FACTS = dict[str, _Fact | dict[str, _Fact]]


@dataclass
class SideResult:
    """The result of one side. If ``seconds`` is empty, ``message`` says why."""

    bound: float
    work: Work = NOT_COUNTED
    status: Status = "right"
    message: str | None = None
    error: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    graph: bool = False
    seconds: list[float] = field(default_factory=list)

    @property
    def spread(self) -> Spread:
        """The spread of the seconds; there must be at least one."""
        return Spread.of(self.seconds)


@dataclass
class Ceiling:
    """A physical limit, measured in the rounds of a case: a copy's bytes, or a matrix product's FLOPs."""

    amount: int
    seconds: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float | None:
        """The amount per second; None before the first round."""
        return self.amount / Spread.of(self.seconds).median if self.seconds else None


@dataclass
class CaseResult:
    """The figures of one case; ``seconds`` of sides and ceilings have one entry for each complete round.

    ``copy`` counts bytes read and bytes written; ``matrix`` is None if no side counts FLOPs. ``problem`` says why the
    case could not be built; there are then no sides.
    """

    name: str
    copy: Ceiling
    matrix: Ceiling | None = None
    problem: str | None = None
    cell: dict[str, str | int | float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    speedup_over: str | None = None
    time_over: str | None = None
    sides: dict[str, SideResult] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case, copy_bytes: int, matrix_flops: int | None = None) -> CaseResult:
        """Return an empty result for a case."""
        matrix = None if matrix_flops is None else Ceiling(matrix_flops)
        lists = dict(case.cell), list(case.notes), list(case.goals)
        return cls(case.name, Ceiling(copy_bytes), matrix, None, *lists, case.speedup_over, case.time_over)

    @property
    def ceilings(self) -> list[Ceiling]:
        """The copy, and the matrix product if there is one."""
        return [self.copy] if self.matrix is None else [self.copy, self.matrix]

    def add_round(self, seconds: dict[str, float], *ceilings: float) -> None:
        """Add the seconds of one call of every timed side, of the copy and of the matrix product."""
        for name, value in seconds.items():
            self.sides[name].seconds.append(value)
        for ceiling, value in zip(self.ceilings, ceilings, strict=True):
            ceiling.seconds.append(value)

    def _rounds(self) -> list[list[float]]:
        """Return all lists of seconds, of timed sides and ceilings."""
        return [side.seconds for side in self.sides.values() if side.seconds] + [c.seconds for c in self.ceilings]

    def drop_incomplete_round(self) -> None:
        """Remove the round that an interrupt cut short."""
        complete = min(map(len, self._rounds()))
        for values in self._rounds():
            del values[complete:]

    def timed(self, *sides: str | None) -> bool:
        """Return whether all of these sides have times."""
        return all(side in self.sides and self.sides[side].seconds for side in sides)

    def speedup(self, side: str, over: str) -> Spread | None:
        """Return how many times as fast ``side`` is as ``over``."""
        return ratio(self.sides[over].seconds, self.sides[side].seconds) if self.timed(side, over) else None

    def time(self, side: str, over: str) -> Spread | None:
        """Return how many times as long ``side`` takes as ``over``."""
        return self.speedup(over, side)

    def compared(self, kind: str, side: str, over: str | None) -> Spread | None:
        """Return the side's speed-up, or time, over another side; None for other quantities, not measured by round."""
        measure = {"speed-up": self.speedup, "time": self.time}.get(kind)
        return None if over is None or measure is None else measure(side, over)

    def bandwidth(self, side: str) -> float | None:
        """Return the bytes per second that the side's function needs; None if they were not counted."""
        return self._per_second(side, self.sides[side].work.bytes) if side in self.sides else None

    def flop_rate(self, side: str) -> float | None:
        """Return the FLOPs per second that the side's function needs; None if they were not counted."""
        return self._per_second(side, self.sides[side].work.flops) if side in self.sides else None

    def share_of_copy(self, side: str) -> float | None:
        """Return the side's bandwidth over that of the copy."""
        return quotient(self.bandwidth(side), self.copy.rate)

    def floor_seconds(self, side: str) -> float | None:
        """Return max(FLOPs / matrix rate, bytes / copy bandwidth), about the time of a perfect implementation."""
        if not self.timed(side):
            return None
        work = self.sides[side].work
        matrix_rate = None if self.matrix is None else self.matrix.rate
        times = [quotient(work.bytes, self.copy.rate), quotient(work.flops, matrix_rate)]
        return max((time for time in times if time), default=None)

    def share_of_floor(self, side: str) -> float | None:
        """Return the floor over the measured time: 1 is perfect."""
        floor = self.floor_seconds(side)
        return None if floor is None else floor / self.sides[side].spread.median

    def value(self, goal: Goal) -> float | None:
        """Return the figure that a goal limits; None if a side that it needs has none."""
        side, over = goal.side, goal.over
        if side not in self.sides or (over is not None and over not in self.sides):
            return None
        if spread := self.spread(goal):
            return spread.median
        figure = {
            "error": lambda name: self.sides[name].error,
            "share of copy": self.share_of_copy,
            "share of floor": self.share_of_floor,
            "FLOP rate": self.flop_rate,
            "bytes saved": lambda name: self.sides[name].saved_bytes,
            "peak": lambda name: self.sides[name].peak_bytes,
        }.get(goal.quantity, lambda name: None)
        return figure(side) if over is None else quotient(figure(side), figure(over))

    def spread(self, goal: Goal) -> Spread | None:
        """Return the spread of the figure that a goal limits, if it was measured round by round."""
        return self.compared(goal.quantity, goal.side, goal.over)

    def as_json(self) -> dict[str, Any]:
        """Return everything, in bytes, seconds and FLOPs, together with the derived figures for readers of the file."""
        kept = {name: getattr(self, name) for name in _KEPT}
        goals = [self._goal_as_json(goal) for goal in self.goals]
        copy, matrix = (ceiling and asdict(ceiling) | {"rate": ceiling.rate} for ceiling in (self.copy, self.matrix))
        sides = [self._side_as_json(name) for name in self.sides]
        return {**kept, "goals": goals, "copy": copy, "matrix": matrix, "sides": sides}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> CaseResult:
        """Read the result of ``as_json``."""
        copy, matrix = (
            facts and Ceiling(facts["amount"], facts["seconds"]) for facts in (stored["copy"], stored["matrix"])
        )
        result = cls(copy=copy, matrix=matrix, **{key: stored[key] for key in _KEPT})
        for facts in stored["goals"]:
            limits = {key: facts[key] for key in ("at_least", "at_most") if facts[key] is not None}
            result.goals.append(Goal(facts["quantity"], facts["side"], facts["over"], **limits))
        for facts in stored["sides"]:
            known = {key: value for key, value in facts.items() if key in SideResult.__dataclass_fields__}
            result.sides[facts["name"]] = SideResult(**known | {"work": Work(**facts["work"])})
        return result

    def _goal_as_json(self, goal: Goal) -> dict[str, Any]:
        facts = {key: value if value not in (math.inf, -math.inf) else None for key, value in asdict(goal).items()}
        value = self.value(goal)
        return facts | {"measured": value, "met": goal.met(value)}

    def _side_as_json(self, name: str) -> dict[str, Any]:
        side = self.sides[name]
        follows: dict[str, Any] = {}
        if side.seconds:
            follows = {
                "summary": asdict(side.spread),
                "bytes_per_second": self.bandwidth(name),
                "flops_per_second": self.flop_rate(name),
                "share_of_copy": self.share_of_copy(name),
                "share_of_floor": self.share_of_floor(name),
            }
            for kind, over in (("speed-up", self.speedup_over), ("time", self.time_over)):
                if spread := self.compared(kind, name, over):
                    follows[f"{kind} over {over}"] = asdict(spread)
        return {"name": name, **asdict(side), **follows}

    def _per_second(self, side: str, amount: int) -> float | None:
        return amount / self.sides[side].spread.median if amount and self.timed(side) else None

    def check(self) -> None:
        """Raise ValueError if figures could not follow from the values read."""
        lists = self._rounds()
        if any(len(seconds) != len(lists[0]) for seconds in lists):
            raise ValueError(f"{self.name} has rounds of which something is missing")
        if not all(_SHORTEST <= seconds <= _LONGEST for each in lists for seconds in each):
            raise ValueError(f"{self.name} has times that are not positive")
        if any(ceiling.amount < 1 for ceiling in self.ceilings):
            raise ValueError(f"{self.name} has ceilings that are not positive")


# Seconds: shorter or longer times were not measured, and have no ratios.
_SHORTEST, _LONGEST = 1e-12, 1e12
# Fields of a case, and of a run, that a file holds unchanged.
_KEPT = ("name", "problem", "cell", "notes", "speedup_over", "time_over")
_KEPT_OF_RUN = ("benchmark", "summary", "sources", "interrupted", "environment")


@dataclass
class Run:
    """The cases of one benchmark, and the environment in which they were measured."""

    benchmark: str
    summary: str
    sources: str
    environment: dict[str, Any]
    cases: list[CaseResult] = field(default_factory=list)
    interrupted: bool = False

    @cached_property
    def stale(self) -> bool:
        """True if the source that the run depends on has changed since, or its benchmark is gone."""
        known = BENCHMARKS.get(self.benchmark)
        return known is None or self.sources != sources.fingerprint(known)

    @property
    def failed(self) -> bool:
        """True if a case could not be built, or a side failed or was wrong; one that cannot run here is no failure."""
        sides = (side for case in self.cases for side in case.sides.values())
        return any(case.problem for case in self.cases) or any(side.status in ("wrong", "failed") for side in sides)

    def save(self, folder: Path, unfinished: bool = False) -> Path:
        """Write <benchmark>.json.unfinished or, to replace it, <benchmark>.json; return the path.

        Raises:
            OSError: if the file cannot be written. The old file stays as it was.
        """
        facts = {key: getattr(self, key) for key in _KEPT_OF_RUN}
        head = json.dumps(facts, indent=1, allow_nan=False).removesuffix("\n}")
        cases = ",\n".join(f"  {json.dumps(case.as_json(), allow_nan=False)}" for case in self.cases)
        text = f'{head},\n "cases": [\n{cases}\n ]\n}}'  # one line per case, so that files can be compared
        partial, final = folder / f"{self.benchmark}.json.unfinished", folder / f"{self.benchmark}.json"
        with replacing(partial if unfinished else final) as draft:
            draft.write_text(text + "\n", encoding="utf-8")
        if not unfinished:
            partial.unlink(missing_ok=True)
        return partial if unfinished else final

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read a file that ``save`` has written.

        Raises:
            OSError: if the file cannot be read.
            ValueError: naming the file, if it holds anything else.
        """
        advice = f"measure again with python -m benchmarks run {path.stem} --out {path.parent}, or delete the file"
        with expecting("results of this version of the benchmarks", path, advice):
            stored = read_json(path)
            cases = [CaseResult.from_json(case) for case in stored["cases"]]
            run = cls(cases=cases, **{key: stored[key] for key in _KEPT_OF_RUN})
            wrong = misfit(run, Run, "run") or misfit(run.environment, _FACTS, "run.environment")
            if wrong := wrong or misfit(run.environment.get("commit"), str | None, "run.environment['commit']"):
                raise ValueError(f"{wrong} is of another type")
            if run.benchmark != path.stem:
                raise ValueError(f"it is named after another benchmark than {quoted(run.benchmark)}")
            for case in cases:
                case.check()
            return run


def load_all(folder: Path) -> list[Run]:
    """Return the results in a folder, by name.

    Raises:
        ValueError: if there are none, or a file holds something else.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        below = ", ".join(sorted({str(path.parent) for path in folder.glob("*/*.json")}))
        advice = f"give one of {below}" if below else f"python -m benchmarks run --out {folder} makes some"
        raise ValueError(f"there are no results (*.json) in {folder}; {advice}")
    return [Run.load(path) for path in paths]


def quotient(a: float | None, b: float | None) -> float | None:
    """Return a / b if both are known, else None."""
    return a / b if a is not None and b else None
