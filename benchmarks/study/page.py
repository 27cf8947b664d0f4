"""A study on one page of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.study.findings import changes, loss_gaps, setup, step_seconds, step_time
from benchmarks.study.plan import METHODS, VANILLA
from dtr_kernels.files import replacing
from examples import digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = dict(zip(METHODS, ["black", *(f"C{k}" for k in range(10)), "navy"], strict=True))
BINS = 10  # of the timesteps, for losses


def draw(study: Mapping[str, Any], samples: Mapping[str, Tensor], path: Path) -> None:
    """Save the page.

    Args:
        study: the result of ``findings.collect``.
        samples: for each method two images of each class, [20, 1, size, size].
        path: of the PNG file.
    """
    import textwrap

    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 13.5), layout="constrained")
    places = figure.add_gridspec(3, 6)
    _losses(figure.add_subplot(places[0, :3]), study)
    _samples(figure.add_subplot(places[0, 3:]), samples)
    above = {method: [100 * change for change in changes(study, method)[0].each] for method in METHODS}
    losses = figure.add_subplot(places[1, :2])
    _per_method(losses, "Denoising loss", "above vanilla with the same seed, %", above)
    losses.axvline(0, color="black", linewidth=0.8)
    distances = {method: study["methods"][method]["distance"] for method in METHODS}
    axes = figure.add_subplot(places[1, 2:4])
    _per_method(axes, "Frechet distance of samples", "to the training images", distances)
    _seconds(figure.add_subplot(places[1, 4:]), study)
    _affinity(figure.add_subplot(places[2, :2]), study)
    of_losses, of_samples = 100 * loss_gaps(study), torch.tensor(study["transfer"], dtype=torch.float64)
    for place, gaps, what, label in (
        (places[2, 2:4], of_losses, "denoising loss", "specialist - shared, % of the interval's loss"),
        (places[2, 4:], of_samples, "samples", "with specialist - shared, Frechet distance"),
    ):
        _gaps(figure.add_subplot(place), study, gaps, f"Negative transfer gap, {what}", label)
    figure.suptitle("What the methods do on real digits\n" + textwrap.fill(setup(study), 160), fontsize=11)
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=100)


def _losses(axes: Axes, study: Mapping[str, Any]) -> None:
    """Draw losses over those of vanilla, in bins of timesteps: the mean over seeds, and their range."""
    plan = study["plan"]
    count = digits.TIMESTEPS // plan["loss_every"]
    bins = torch.arange(count) * min(BINS, count) // count

    def binned(method: str) -> Tensor:
        losses = torch.tensor(study["methods"][method]["losses"], dtype=torch.float64)
        return torch.stack([losses[:, bins == k].mean(dim=1) for k in range(int(bins[-1]) + 1)], dim=1)

    vanilla = binned(VANILLA)
    width = digits.TIMESTEPS / vanilla.shape[1]
    others = [method for method in METHODS if method != VANILLA]
    for number, method in enumerate(others):
        over = binned(method) / vanilla
        t = [(k + 0.2 + 0.6 * number / len(others)) * width for k in range(vanilla.shape[1])]
        axes.plot(t, over.mean(0).tolist(), "o-", color=COLOURS[method], markersize=3, linewidth=1, label=method)
        axes.vlines(t, over.amin(0).tolist(), over.amax(0).tolist(), color=COLOURS[method], linewidth=1, alpha=0.7)
    axes.axhline(1, color=COLOURS[VANILLA], linewidth=1)
    for bound in study["bounds"]:
        axes.axvline(bound, color="0.85", linewidth=0.8, zorder=0)
    axes.set(
        xlabel="timestep t (0: clean image, right: noise); grey lines: the clusters",
        ylabel="over that of vanilla; bars: range over seeds",
        title="Denoising loss by timestep, held-out images",
        xlim=(0, digits.TIMESTEPS),
    )
    axes.legend(fontsize=8, ncols=4)


def _samples(axes: Axes, samples: Mapping[str, Tensor]) -> None:
    """Draw two digits of each class from each method, in one row."""
    rows = []
    for images in samples.values():
        by_class = images.unflatten(0, (-1, digits.CLASSES)).transpose(0, 1).flatten(0, 1)
        rows.append(torch.cat(list(F.pad(by_class[:, 0], (1, 1, 1, 1), value=-1)), dim=1))
    picture = torch.cat(rows)
    height = len(picture) / len(rows)
    axes.imshow(picture.numpy(), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest", aspect="equal")
    axes.set_yticks([(row + 0.5) * height - 0.5 for row in range(len(rows))], list(samples), fontsize=9)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_title("Samples, seed 0, the same noise in each column")


def _per_method(axes: Axes, title: str, label: str, of_methods: Mapping[str, Sequence[float]]) -> None:
    """Draw a dot for each seed, and the mean."""
    for row, (method, values) in enumerate(of_methods.items()):
        axes.plot(values, [row] * len(values), "o", color=COLOURS[method], markersize=4, alpha=0.6)
        axes.plot(sum(values) / len(values), row, "|", color=COLOURS[method], markersize=16, markeredgewidth=2)
    _method_rows(axes)
    axes.set(xlabel=f"{label}; dots: seeds, bar: their mean", title=title)


def _seconds(axes: Axes, study: Mapping[str, Any]) -> None:
    for row, method in enumerate(METHODS):
        spread = step_time(study, method)
        axes.barh(row, spread.median, color=COLOURS[method], alpha=0.6, height=0.6)
        axes.hlines(row, spread.p20, spread.p80, color="black", linewidth=1)
    _method_rows(axes)
    axes.axvline(1, color="black", linewidth=0.8)
    milliseconds = step_seconds(study, VANILLA) * 1e3
    axes.set(xlabel=f"over vanilla's {milliseconds:.3g} ms; line: p20 to p80", title="Time of a training step")


def _method_rows(axes: Axes) -> None:
    axes.set_yticks(range(len(METHODS)), list(METHODS))
    axes.set_ylim(len(METHODS) - 0.5, -0.7)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)


def _affinity(axes: Axes, study: Mapping[str, Any]) -> None:
    image = axes.imshow(
        study["affinity"]["matrix"],
        origin="lower",
        extent=(0, digits.TIMESTEPS) * 2,
        cmap="RdBu_r",
        vmin=-1,
        vmax=1,
        interpolation="nearest",
    )
    axes.figure.colorbar(image, ax=axes, label="cosine of gradients")
    steps = ", ".join(str(step) for step in study["affinity"]["steps"])
    axes.set(xlabel="timestep", ylabel="timestep", title=f"Task affinity, steps {steps}")


def _gaps(axes: Axes, study: Mapping[str, Any], gaps: Tensor, title: str, label: str) -> None:
    """Draw a bar for each interval, and a dot for each seed."""
    bounds = torch.tensor(study["bounds"])
    centres, widths = ((bounds[1:] + bounds[:-1]) / 2).tolist(), (0.9 * bounds.diff()).tolist()
    means = gaps.mean(0).tolist()
    colours = ["tab:red" if gap < 0 else "tab:blue" for gap in means]
    axes.bar(centres, means, width=widths, color=colours, alpha=0.5)
    for of_seed in gaps.tolist():
        axes.plot(centres, of_seed, "o", color="black", markersize=3.5)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.1)
    axes.set(xlabel="interval of timesteps (red: negative transfer)", ylabel=label, title=title)
