"""Pictures of results: the sides against the baseline, and against the machine's limits."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.results import CaseResult, Run
from benchmarks.tables import compared, comparison, coordinates, grouped, is_ours, label, marked, percent
from dtr_kernels.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A side looks the same in all pictures: its colour shows the computed function, its marker the way.
OURS, OTHERS = "tab:blue", "tab:brown"
COLOURS = {
    "reference|eager|loop|plain": "tab:orange",
    "unrouted": "tab:green",
    "TorchJD": "tab:red",
    r"\bF\.|matmul|dense|torch\.(mm|mv|bmm)": "tab:purple",
}
MARKERS = {
    "compile": "s",
    "max-autotune": "^",
    "autocast": "D",
    "in chunks|weights of": "p",
    "in parallel|per_cluster|_$|alone": "v",
    "one by one|one_pass": "<",
    "autogram|functions": "P",
    "low_memory|not in place": "X",
    "dispatched": "d",
    "slices|fused block": ">",
    "Sampler": "*",
}

# Inches.
COLUMN, BETWEEN_ROWS, AROUND_PANEL, LINE, LEGEND_LINE, TITLE_LINE = 7.0, 0.14, 0.5, 0.14, 0.2, 0.19
# Characters that fit beside a row, above a column, into an inch of the legend, and onto a share's axis.
ROW_LABEL, COLUMN_TITLE, LEGEND_CHARACTERS, BAR_CHARACTERS = 34, 88, 15, 75
# With more rows than these, cases are split into panels, and panels into two columns.
ROWS_OF_PANEL, ROWS_OF_COLUMN = 12, 18
# Benchmarks of whole pieces, and of choices between them: only tables show their shares of the floor.
WITHOUT_SHARES = ("block", "model", "inner", "cpu_limits")


@dataclass(frozen=True)
class Panel:
    """Cells that share one pair of axes: dots at the sides' ``shares`` of the floor, or at their speed-up or time."""

    shares: bool
    what: str
    title: str
    cases: Sequence[CaseResult]
    labels: Sequence[str]

    @property
    def sides(self) -> list[str]:
        """The sides with something to draw."""
        return list(dict.fromkeys(side for case in self.cases for side in drawn_sides(case, self.shares)))

    @property
    def row_height(self) -> float:
        """The height of a row in inches."""
        lines = max(text.count("\n") + 1 for text in self.labels)
        return BETWEEN_ROWS + max(lines * LINE, len(self.sides) * (0.13 if self.shares else 0.075))

    @property
    def height(self) -> float:
        """The height in inches, with title and the axis's labels."""
        return AROUND_PANEL + LINE * self.title.count("\n") + len(self.cases) * self.row_height


def drawable(run: Run) -> bool:
    """Return whether there is anything to draw."""
    return bool(panels(run))


def draw(run: Run, path: Path) -> None:
    """Save the picture of a run as a PNG file.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is nothing to draw.
    """
    drawn = figure(run)
    with replacing(path) as draft:
        drawn.savefig(draft, format="png", dpi=110)


def draw_shares_of_heads(run: Run, path: Path) -> None:
    """Save a picture of the time of the benchmark "inner" against the active share, beside the line of time in
    proportion to the share.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    picture = Figure(figsize=(COLUMN, 4.6), layout="constrained")
    axes = picture.add_subplot()
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, label="ideal: time in proportion to the active share")
    for (model, precision, window, pass_), cases in shares_of_heads(run).items():
        points = []
        for case in cases:
            spread = case.compared("time", "RoutedDiTBlock", case.speedup_over)
            assert spread is not None
            points.append((float(case.cell["beta"]), spread.median, spread.p20, spread.p80))
        share, median, low, high = zip(*sorted(points), strict=True)
        name = f"{model}, {precision}, window {window}, {pass_}"
        (line,) = axes.plot(share, median, "o-", markersize=4, linewidth=1, label=name)
        axes.vlines(share, low, high, color=line.get_color(), linewidth=1)
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set(
        xlim=(0, 1.02),
        ylim=(0, None),
        xlabel="active heads over all heads",
        ylabel="time over that of the unrouted block, compiled",
    )
    axes.grid(color="0.9")
    axes.legend(fontsize=8)
    axes.set_title("\n".join(_title(run)[:2]), fontsize=9)
    with replacing(path) as draft:
        picture.savefig(draft, format="png", dpi=110)


def shares_of_heads(run: Run) -> dict[tuple[str, ...], list[CaseResult]]:
    """Return groups of cases of blocks that differ only in the active share, with at least three timed cases."""
    found: dict[tuple[str, ...], list[CaseResult]] = {}
    for case in run.cases:
        if case.speedup_over and case.timed("RoutedDiTBlock") and case.timed(case.speedup_over):
            key = tuple(str(case.cell[name]) for name in ("model", "precision", "window", "pass"))
            found.setdefault(key, []).append(case)
    return {key: cases for key, cases in found.items() if len(cases) > 2}


def drawn_sides(case: CaseResult, shares: bool) -> list[str]:
    """Return the sides of a case that have a share of the floor, or can be compared with another side."""
    if shares:
        return [side for side in case.sides if case.share_of_floor(side) is not None]
    return [side for side in case.sides if side != comparison(case)[1] and compared(case, side) is not None]


def panels(run: Run) -> list[Panel]:
    """Return the panels of a run: comparisons first, then shares of the floor."""
    found = []
    for shares in (False,) if run.benchmark in WITHOUT_SHARES else (False, True):
        for cases in grouped([case for case in run.cases if drawn_sides(case, shares)], comparison):
            kind, baseline = comparison(cases[0])
            what = "share of the floor" if shares else f"{kind} over {baseline}"
            found += _panels_of(shares, what, cases, coordinates(run.cases)[0])
    beside = max((len(line) for panel in found for text in panel.labels for line in text.split("\n")), default=0)
    return [replace(panel, title=textwrap.fill(panel.title, COLUMN_TITLE - beside)) for panel in found]


def _panels_of(shares: bool, what: str, cases: Sequence[CaseResult], everywhere: Collection[str]) -> list[Panel]:
    """Return panels of cases that belong together. Coordinates that are the same ``everywhere`` are not named."""
    found = []
    for part in _parts_of(cases):
        fixed, varying = coordinates(part)
        title = what + "".join(f", {name} {value}" for name, value in fixed.items() if name not in everywhere)
        labels = [", ".join(_coordinate(case, name) for name in varying if name in case.cell) for case in part]
        if len(part) == 1:
            title = f"{what}: {part[0].name}"
        elif len(set(labels)) < len(part):
            title, labels = what, [case.name for case in part]
        labels = [textwrap.fill(text, ROW_LABEL) for text in labels]
        found.append(Panel(shares, what, title, part, labels))
    return found


def _parts_of(cases: Sequence[CaseResult]) -> list[Sequence[CaseResult]]:
    """Split the cases into smaller parts, each with one value of the coordinate that splits them best."""
    _, varying = coordinates(cases)
    best = [list(cases)]
    for name in varying:
        parts = grouped(cases, partial(label, coordinate=name))
        if len(parts) * 2 <= len(cases) and max(map(len, parts)) < max(map(len, best)):
            best = parts
    if len(cases) <= ROWS_OF_PANEL or len(best) == 1:
        return [cases]
    return [smaller for part in best for smaller in _parts_of(part)]


def _coordinate(case: CaseResult, name: str) -> str:
    """Return a coordinate in words; a number is preceded by its name and a no-break space."""
    text = label(case, name)
    return text if isinstance(case.cell[name], str) else f"{name}\N{NO-BREAK SPACE}{text}"


def figure(run: Run) -> Figure:
    """Draw all panels of a run, with one legend.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is nothing to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    drawn = panels(run)
    if not drawn:
        raise ValueError(f"there is nothing to draw in the results of {run.benchmark}: no side has a figure")

    def height_of(column: Sequence[Panel]) -> float:
        return sum(panel.height for panel in column)

    columns: list[list[Panel]] = [[] for _ in range(1 + (sum(len(panel.cases) for panel in drawn) > ROWS_OF_COLUMN))]
    for panel in drawn:
        min(columns, key=height_of).append(panel)
    named = list(dict.fromkeys(side for panel in drawn if not panel.shares for side in panel.sides))
    width = COLUMN * len(columns)
    in_a_line = max(1, int(width * LEGEND_CHARACTERS // max(len(side) + 6 for side in [*named, ""])))
    below_title = 0.2 + TITLE_LINE * len(_title(run))
    top = below_title + LEGEND_LINE * math.ceil(len(named) / in_a_line)
    highest = max(map(height_of, columns))
    height = highest + top

    picture = Figure(figsize=(width, height))
    picture.set_layout_engine("constrained", rect=(0, 0, 1, 1 - top / height))
    first_of: dict[str, Axes] = {}  # panels that show the same have the same scale
    places = picture.add_gridspec(1, len(columns))
    for number, column in enumerate(columns):
        # An empty row fills the shorter column.
        heights = [*(panel.height for panel in column), highest - height_of(column) + 1e-6]
        rows = places[0, number].subgridspec(len(heights), 1, height_ratios=heights)
        for row, panel in enumerate(column):
            axes = picture.add_subplot(rows[row, 0], sharex=first_of.get(panel.what))
            first_of.setdefault(panel.what, axes)
            (_draw_shares if panel.shares else _draw_comparison)(axes, panel)
            _label_rows(axes, panel)
            axes.set_title(panel.title, fontsize=9, loc="left")
    for what, axes in first_of.items():
        alike = [panel for panel in drawn if panel.what == what]
        (_scale_shares if alike[0].shares else _scale_comparison)(axes, alike)
    title = picture.suptitle("\n".join(_title(run)), fontsize=11, y=1 - 0.1 / height)
    title.set_in_layout(False)
    handles = []
    for side in named:
        colour, marker = style(side)
        handles.append(Line2D([], [], color=colour, marker=marker, linewidth=1, markersize=5, label=side))
    if handles:
        under_title = 0.5, 1 - (below_title - 0.1) / height
        legend = picture.legend(
            handles=handles, loc="upper center", bbox_to_anchor=under_title, ncols=in_a_line, fontsize=8, frameon=False
        )
        legend.set_in_layout(False)
    return picture


def _title(run: Run) -> list[str]:
    """Return the title's lines: the benchmark, device, PyTorch, date, and the coordinates that all cases share."""
    known = run.environment
    facts = [str(known.get("device", "unknown device")), f"torch {known.get('torch')}", str(known.get("date", ""))[:10]]
    if len(run.cases) > 1:
        facts += [f"{name} {value}" for name, value in coordinates(run.cases)[0].items()]
    return [marked(run), *textwrap.wrap(", ".join(facts), COLUMN_TITLE)]


def style(side: str) -> tuple[str, str]:
    """Return colour and marker of a side, which depend only on its name."""
    unknown = OURS if is_ours(side) else OTHERS
    colour = next((colour for words, colour in COLOURS.items() if re.search(words, side)), unknown)
    return colour, next((marker for words, marker in MARKERS.items() if re.search(words, side)), "o")


def _marks(panel: Panel) -> Iterator[tuple[CaseResult, str, float]]:
    """Yield each case with each of its sides, and the side's height: in rows, the first at 0."""
    sides = panel.sides
    step = (1 - BETWEEN_ROWS / panel.row_height) / len(sides)
    for row, case in enumerate(panel.cases):
        for side in drawn_sides(case, panel.shares):
            yield case, side, row + (sides.index(side) - (len(sides) - 1) / 2) * step


def _draw_comparison(axes: Axes, panel: Panel) -> None:
    """Draw dots with whiskers from p20 to p80."""
    for case, side, height in _marks(panel):
        spread = compared(case, side)
        assert spread is not None
        colour, marker = style(side)
        axes.plot([spread.p20, spread.p80], [height, height], color=colour, linewidth=1)
        axes.plot(spread.median, height, marker, color=colour, markersize=4.5)


def _scale_comparison(axes: Axes, alike: Sequence[Panel]) -> None:
    """Set a logarithmic scale with room for all panels."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    spreads = [compared(case, side) for panel in alike for case in panel.cases for side in drawn_sides(case, False)]
    ends = [1.0, *(end for spread in spreads if spread for end in (spread.p20, spread.median, spread.p80))]
    low, high = min(ends) / 1.08, max(ends) * 1.08
    ticks = _ticks(low, high)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{tick:g}x" for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())


def _draw_shares(axes: Axes, panel: Panel) -> None:
    """Draw bars with the sides' names."""
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.3}
    for case, side, height in _marks(panel):
        share = case.share_of_floor(side)
        assert share is not None
        axes.barh(height, share, height=0.11 / panel.row_height, color=style(side)[0], alpha=0.75)
        said, end = f"{percent(share)} {side}", (share, height)
        axes.annotate(said, end, (3, 0), textcoords="offset points", va="center", fontsize=7, bbox=behind)


def _scale_shares(axes: Axes, alike: Sequence[Panel]) -> None:
    """Set a scale from 0 on, with room for the names of sides."""
    ends = [1.0]
    for case in (case for panel in alike for case in panel.cases):
        for side in drawn_sides(case, shares=True):
            ends.append((case.share_of_floor(side) or 0) / (1 - len(f"100% {side}") / BAR_CHARACTERS))
    axes.set_xlim(0, 1.02 * max(ends))
    axes.xaxis.set_major_formatter(lambda share, _: percent(share))


def _label_rows(axes: Axes, panel: Panel) -> None:
    """Write the cases' names, and draw a line at the baseline or the floor."""
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(panel.cases)), panel.labels, fontsize=8)
    axes.set_ylim(len(panel.cases) - 0.5, -0.5)  # the first case on top
    for row in range(1, len(panel.cases), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="0.95", zorder=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two, as many as fit beside each other."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in (
        (1, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9),
        (1, 1.5, 2, 3, 5, 7),
        (1, 2, 5),
        (1,),
    ):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        within = [tick for tick in ticks if low <= tick <= high]
        if len(within) <= 10:
            break
    return within
