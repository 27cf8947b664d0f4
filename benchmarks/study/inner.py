"""Scope "inner" against the ordinary model, and against narrower models with as many operations: after equally many
steps, and after equally much time."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.study.findings import (
    DOCS,
    Change,
    as_table,
    changes,
    commits_of,
    mean_losses,
    of_methods,
    over_seeds,
    read,
    setup,
    step_seconds,
    step_time,
)
from benchmarks.study.plan import PLANS, VANILLA, Plan, unit
from benchmarks.tables import table
from dtr_kernels.files import replacing

#: Sizes of the study, with numbers of heads divisible by four.
INNER_PLANS = {
    "quick": replace(PLANS["quick"], name="inner quick", num_heads=4),
    "cpu": replace(PLANS["cpu"], name="inner", num_heads=8),
}


_SHARES = {"75%": 0.75, "50%": 0.5}


def methods(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the changes that each method makes to the recipe.

    A model of c times the channels needs about c^2 of the operations.
    """
    found: dict[str, dict[str, Any]] = {VANILLA: {"routing": "none"}}
    for name, share in _SHARES.items():
        for alpha in (4.0, 2.0, 1.0):
            changed = {"routing": "dtr", "scope": "inner", "alpha": alpha, "beta": share}
            found[f"inner {name}, alpha {alpha:g}"] = changed
    for share in _SHARES.values():
        width = _narrower(plan, share)
        found[f"{width} channels"] = {"routing": "none", "hidden_size": width}
    return found


def _narrower(plan: Plan, share: float) -> int:
    """Return the nearest number of channels that is divisible by the number of heads."""
    heads = plan.num_heads
    return heads * round(plan.hidden_size * share**0.5 / heads)


def at_equal_time(plan: Plan) -> list[str]:
    """Return the methods that are also trained for as long as vanilla."""
    return [method for method in methods(plan) if method.endswith(("alpha 1", "channels"))]


def as_long(method: str, seed: int) -> str:
    """Return the name of a training that takes as long as vanilla's."""
    return unit(f"{method}, as long", seed)


def collect(plan: Plan, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return everything that a page and the README are made from, as JSON."""
    return {
        "plan": asdict(plan),
        "environment": found["seconds"]["environment"],
        "commits": commits_of(found),
        "real": {name: value for name, value in found["real"].items() if name != "environment"},
        "methods": of_methods(plan, found, methods(plan)),
        "as long": {
            method: [
                {name: found[as_long(method, seed)][name] for name in ("steps", "losses", "distance")}
                for seed in range(plan.seeds)
            ]
            for method in at_equal_time(plan)
        },
    }


def _changes_as_long(study: Mapping[str, Any], method: str) -> tuple[Change, Change]:
    """Return how losses and distances differ from vanilla's after equally much time."""
    runs, vanilla = study["as long"][method], study["methods"][VANILLA]
    losses = Change.of(mean_losses([run["losses"] for run in runs]), mean_losses(vanilla["losses"]))
    return losses, Change.of([run["distance"] for run in runs], vanilla["distance"])


def _table_as_long(study: Mapping[str, Any]) -> str:
    rows = [["", "steps", "denoising loss", "against vanilla", "Frechet distance", "against vanilla"]]
    for method, runs in study["as long"].items():
        loss, distance = map(str, _changes_as_long(study, method))
        losses = over_seeds(mean_losses([run["losses"] for run in runs]), "{:.4f}")
        distances = over_seeds([run["distance"] for run in runs], "{:.2f}")
        rows.append([method, str(runs[0]["steps"]), losses, loss, distances, distance])
    return table(rows)


def sentence(study: Mapping[str, Any]) -> str:
    """Write the findings as a sentence, for the README."""

    def said(found: Callable[[str], tuple[Change, Change]], method: str) -> str:
        loss, distance = found(method)
        return f"{method}: loss {loss.mean:+.1%} ({loss.verdict}), distance {distance.mean:+.1%} ({distance.verdict})"

    compared = study["as long"]
    after_steps = "; ".join(
        f"{said(partial(changes, study), method)}, {step_time(study, method).median:.2f}x the time of a step"
        for method in compared
    )
    after_time = "; ".join(said(partial(_changes_as_long, study), method) for method in compared)
    what = f'**Scope "inner", {study["plan"]["num_heads"]} heads.**'
    return f"{what} After as many steps, {after_steps}. After as much training time, {after_time}."


#: The committed study's files, without their suffixes.
PAGE = DOCS / "inner"


def committed(root: Path) -> dict[str, Any] | None:
    """Read the study whose figures are in a checkout's docs; ValueError, naming the file, if it holds anything else."""
    path = root / PAGE.with_suffix(".json")
    return read(path, markdown) if path.exists() else None


def block(study: Mapping[str, Any] | None) -> str:
    """Write the block of ``docs/inner.md`` on the committed study."""
    if study is None:
        return "The study has not been run: `python -m benchmarks study --inner`."
    return "\n\n".join([f"{setup(study)}.", f"- {sentence(study)}", "![The study in a picture](study/inner.png)"])


def markdown(study: Mapping[str, Any]) -> str:
    """Write the page beside the picture."""
    parts = [
        '# What scope "inner" does on real digits',
        f"{setup(study)}. Made by `{study['environment']['command']}`.",
        f"![The study in a picture]({study['plan']['name']}.png)",
        f"- {sentence(study)}",
        "## After as many steps",
        as_table(study),
        "## After as much time",
        _table_as_long(study),
        _METHOD,
    ]
    return "\n\n".join(parts) + "\n"


_METHOD = """\
## How to read this

- "inner 75%, alpha 1" computes three quarters of the attention heads, and of the hidden channels that go with them, at
  every timestep, a window that slides with t ** alpha; "112 channels" is an ordinary model of about as many operations.
- Losses and distances are those of [the large study](cpu.md), seed by seed. With three seeds "in every seed" is a hint
  and no proof.
- After as much time: a method takes as many steps as fit into vanilla's training, by the median step of this machine,
  with a learning rate that falls to zero at its own end. Tokens are few and channels too, so a step saves less than
  that of a large model."""


def draw(study: Mapping[str, Any], path: Path) -> None:
    """Save a picture of loss and distance against the time of training, with arrows from equally many steps to equally
    much time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    for axes, number, label in zip(
        figure.subplots(1, 2), (0, 1), ("Denoising loss", "Frechet distance of samples"), strict=True
    ):
        for index, method in enumerate(study["methods"]):
            if method == VANILLA:
                continue
            change, time = changes(study, method)[number], step_time(study, method).median
            colour = f"C{index}"
            axes.plot([time] * len(change.each), [100 * each for each in change.each], ".", color=colour, alpha=0.5)
            axes.plot(time, 100 * change.mean, "o", color=colour, label=method)
            if method in study["as long"]:
                later = _changes_as_long(study, method)[number]
                axes.plot([1] * len(later.each), [100 * each for each in later.each], ".", color=colour, alpha=0.5)
                axes.annotate(
                    "",
                    (1, 100 * later.mean),
                    (time, 100 * change.mean),
                    arrowprops={"arrowstyle": "->", "color": colour},
                )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(
            xlabel=f"time of training over vanilla's ({step_seconds(study, VANILLA) * 1e3:.3g} ms a step)",
            ylabel="% above vanilla; small dots: seeds",
            title=label,
        )
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle('Scope "inner" on real digits\n' + textwrap.fill(setup(study), 150), fontsize=10)
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=100)
