"""Pictures of a routing (figure 3 of the DTR paper), of clusters of timesteps (ANT, section 4.1), of the affinity of
denoising tasks (ANT, observation O1) and of the conflicts between clusters in a training."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtr_kernels.clusters import Clusters, IntervalClusters, check_snr, real_numbers
from dtr_kernels.continuous import ContinuousClusters
from dtr_kernels.quoting import quoted
from dtr_kernels.routing import DenoisingTaskRouting, RandomRouting
from dtr_kernels.surgery import conflict_fractions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dtr_kernels.analysis import TaskAffinity

__all__ = ["plot_affinity", "plot_clusters", "plot_conflicts", "plot_routing"]


def plot_routing(
    routing: DenoisingTaskRouting | RandomRouting, path: str | Path | None = None, channels: int = 1152
) -> Figure:
    """Draw the active channels (vertical) of every timestep (horizontal).

    Args:
        routing: whose masks to draw.
        path: where to save the picture (PNG, PDF, SVG by its ending); None returns it only.
        channels: number of channels C; default: that of DiT-XL.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: if matplotlib is not installed (``pip install matplotlib``).
        TypeError: if path is a number: before version 0.2 channels came second.
        ValueError: if the routing leaves no channel active.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if isinstance(path, int):
        raise TypeError(f"path must name a file or be None, got {path}; give channels={path} by name")
    t = torch.arange(routing.num_timesteps)
    if isinstance(routing, RandomRouting):
        mask, name = routing.mask(t, channels), "random routing"
    else:
        mask, name = routing.window(t, channels).mask(), f"DTR, alpha {routing.alpha:g}"
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    shades = ListedColormap(["white", "#4a98c9"])
    axes.imshow(mask.T.numpy(), aspect="auto", origin="lower", cmap=shades, vmin=0, vmax=1, interpolation="nearest")
    axes.set(
        xlabel=_TIMESTEPS,
        ylabel="channel",
        title=f"Active channels: {name}, beta {routing.beta:g}, {int(mask[0].sum())} of {channels}",
        xticks=_timestep_ticks(len(t)),
    )
    patches = [Patch(facecolor=shades(value), edgecolor="0.6") for value in (1, 0)]
    figure.legend(patches, ["active", "inactive"], loc="outside right upper", fontsize=8)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


_TIMESTEPS = "timestep t (0: clean image, right: noise)"


def _timestep_ticks(T: int) -> list[int]:
    """Return about five even steps, always with the last timestep."""
    step = max(1, T // 5)
    return [*range(0, T - step // 2 - 1, step), T - 1]


def plot_affinity(
    affinity: TaskAffinity, path: str | Path | None = None, clusters: IntervalClusters | None = None
) -> Figure:
    """Draw the cosines of the gradients at every two timesteps, along axes of timesteps.

    Args:
        affinity: the affinity to draw. Each timestep's cell reaches halfway to its neighbours.
        path: where to save the picture (PNG, PDF, SVG by its ending); None returns it only.
        clusters: drawn as squares on top; the axes then cover all of their timesteps.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: if matplotlib is not installed (``pip install matplotlib``).
        TypeError: if clusters are of continuous time.
        ValueError: if clusters end before the last timestep of affinity.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    if clusters and not isinstance(clusters, IntervalClusters):
        raise TypeError(f"clusters must be IntervalClusters, of timesteps as affinity is, got {quoted(clusters)}")
    if clusters and clusters.num_timesteps <= affinity.timesteps[-1]:
        raise ValueError(
            f"clusters must reach the last timestep of affinity, {int(affinity.timesteps[-1])}, but are of "
            f"{clusters.num_timesteps} timesteps"
        )
    edges = _cell_edges(affinity.timesteps.double(), clusters).numpy()
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    cosines = affinity.matrix.numpy()
    cells = axes.pcolormesh(edges, edges, cosines, cmap="RdBu_r", vmin=-1, vmax=1, rasterized=True)
    figure.colorbar(cells, cax=axes.inset_axes((1.04, 0, 0.05, 1)), label="cosine of gradients")
    for first, end in pairwise(clusters.bounds) if clusters else ():
        axes.add_patch(Rectangle((first - 0.5, first - 0.5), end - first, end - first, fill=False))
    limits = float(edges[0]), float(edges[-1])
    axes.set(xlim=limits, ylim=limits, aspect="equal", title="Affinity of denoising tasks")
    axes.set(xlabel=_TIMESTEPS, ylabel="timestep t")
    if clusters:
        axes.set(xticks=_timestep_ticks(clusters.num_timesteps), yticks=_timestep_ticks(clusters.num_timesteps))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _cell_edges(timesteps: Tensor, clusters: IntervalClusters | None) -> Tensor:
    """Return the n + 1 edges of cells around ascending timesteps [n]: halfway between two, the outer two as far beyond.

    With clusters the outer cells reach to the first and the last of their timesteps, as in ``TaskAffinity.resized``.
    """
    between = (timesteps[1:] + timesteps[:-1]) / 2
    ends = timesteps[[0, -1]] + timesteps.new_tensor([-0.5, 0.5])
    if clusters:
        ends = timesteps.new_tensor([-0.5, clusters.num_timesteps - 0.5])
    elif len(timesteps) > 1:
        ends = (2 * timesteps[[0, -1]] - between[[0, -1]]).clamp_min(-0.5)
    return torch.cat([ends[:1], between, ends[1:]])


# A training is drawn in at most so many parts.
_MOST_PARTS = 50


def plot_conflicts(grams: Iterable[Tensor], path: str | Path | None = None) -> Figure:
    """Draw how often each pair of clusters conflicts over a training, which is cut into at most 50 parts.

    Pairs are ordered by the distance between their clusters, neighbours at the bottom. A part is grey if one of the
    two clusters never has a gradient in it.

    Args:
        grams: the Gram matrices of all steps, as for ``conflict_fractions``, with at least two clusters.
        path: where to save the picture (PNG, PDF, SVG by its ending); None returns it only.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: if matplotlib is not installed (``pip install matplotlib``).
        TypeError, ValueError: if grams are not as described.
    """
    from matplotlib.figure import Figure

    grams = list(grams)
    K = len(conflict_fractions(grams))
    pairs = sorted(combinations(range(K), 2), key=lambda pair: (pair[1] - pair[0], pair))
    if not pairs:
        raise ValueError("grams must be of at least two clusters, got those of one")
    parts = torch.stack(grams).tensor_split(min(len(grams), _MOST_PARTS))
    fractions = torch.stack([conflict_fractions(part) for part in parts]).cpu().numpy()
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("silver")  # parts without a share; white would look like 0
    image = axes.imshow(
        [[fraction[pair] for fraction in fractions] for pair in pairs],
        aspect="auto",
        origin="lower",
        cmap="Reds",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(0, len(grams), -0.5, len(pairs) - 0.5),
    )
    figure.colorbar(image, label="share of steps in conflict")
    few = pairs if len(pairs) <= _MOST_LABELS else []
    axes.set_yticks(range(len(few)), [f"{i} and {j}" for i, j in few], fontsize=7)
    axes.set(xlabel="training step", ylabel="clusters", title=f"Conflicts between the gradients of {K} clusters")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


# In pictures of clusters, in inches: the height of a line and the width of a character, and the wedges' height.
_LINE, _CHARACTER, _WEDGE = 0.11, 0.055, 0.35
# Boxes have labels up to this number of clusters.
_MOST_LABELS = 64


def plot_clusters(
    clusters: IntervalClusters | ContinuousClusters, path: str | Path | None = None, values: Any = None
) -> Figure:
    """Draw the intervals over the timesteps, with the curve or the matrix that they were made from.

    Every cluster has a box above with its number, its first and last timestep and its size (in continuous time its
    bounds and its length), and a wedge from the box to its interval, so that a cluster of a single timestep is
    readable too. With more than 64 clusters the boxes have no labels.

    Args:
        clusters: the clusters to draw.
        path: where to save the picture (PNG, PDF, SVG by its ending); None returns it only.
        values: as for ``interval_clusters``: the SNR at every timestep, [T], is drawn as a curve on a logarithmic
            scale, which leaves out zeros; the affinity of all pairs of timesteps, [T, T], as a heat map with the
            clusters as squares. None draws the intervals only, and must be None for continuous time.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: if matplotlib is not installed (``pip install matplotlib``).
        ValueError: if values have another shape, or are NaN, infinite, or an SNR that is negative, or are given for
            continuous time.
        TypeError: if values are not real numbers.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_clusters needs matplotlib: pip install matplotlib") from error

    K, edges = clusters.num_clusters, _edges(clusters)
    if isinstance(clusters, IntervalClusters):
        T, time = clusters.num_timesteps, "timestep t"
        title = f"Interval clusters: cost {clusters.cost}, K {K}, T {T}"
    elif values is None:
        time, title = "time t", f"Clusters of continuous time: K {K}"
    else:
        raise ValueError("values must be None for clusters of continuous time")
    is_matrix = values is not None and np.ndim(values) == 2
    width = max(5.0, _LINE * min(K, _MOST_LABELS))
    height = width if is_matrix else 0.4 if values is None else 2.2
    labels = _labels(clusters, width / K)
    figure = Figure()
    boxes, axes = figure.subplots(2, sharex=True, height_ratios=(labels.height + _WEDGE, height))
    _fit(figure, width, labels.height + _WEDGE + height, right=1.15 if is_matrix else 0.15)
    if is_matrix:
        _draw_affinity(axes, clusters, real_numbers(values, (T, T), "the affinity of all pairs of timesteps"))
    else:
        _draw_bands(axes, clusters)
        _draw_snr(axes, None if values is None else real_numbers(values, (T,), "the SNR at every timestep"))
    _draw_boxes(boxes, clusters, labels)
    boxes.set_title(title)
    axes.set(xlim=(edges[0], edges[-1]), xlabel=f"{time} (0: clean image, right: noise)")
    if isinstance(clusters, IntervalClusters):
        axes.set_xticks(_timestep_ticks(clusters.num_timesteps))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _edges(clusters: Clusters) -> list[float]:
    """Return the edges of the drawn intervals: their bounds, for timesteps shifted to halfway between two."""
    return [bound - 0.5 * isinstance(clusters, IntervalClusters) for bound in clusters.bounds]


class _Labels(NamedTuple):
    """The caption and the text of each box; the rotation of the texts in degrees; the boxes' height in inches."""

    caption: str
    texts: list[str]
    rotation: int
    height: float


def _labels(clusters: IntervalClusters | ContinuousClusters, box_width: float) -> _Labels:
    if isinstance(clusters, ContinuousClusters):
        times = "times"
        spans = [(f"{first:.3g}\N{EN DASH}{end:.3g}", f"{end - first:.3g}") for first, end in pairwise(clusters.bounds)]
    else:
        times = "timesteps"
        spans = [
            (str(first) if end == first + 1 else f"{first}\N{EN DASH}{end - 1}", str(end - first))
            for first, end in pairwise(clusters.bounds)
        ]
    rows = [(str(k), *span) for k, span in enumerate(spans)]
    if len(rows) > _MOST_LABELS:
        return _Labels("", [""] * len(rows), 0, _LINE)
    if max(len(text) for row in rows for text in row) * _CHARACTER < box_width - 0.06:
        return _Labels(f"cluster\n{times}\nlength", ["\n".join(row) for row in rows], 0, 3.6 * _LINE)
    caption, texts = f"cluster:\n{times} (length)", ["{}: {} ({})".format(*row) for row in rows]
    return _Labels(caption, texts, 90, max(18, *map(len, texts)) * _CHARACTER + 0.06)


def _fit(figure: Figure, width: float, height: float, right: float) -> None:
    """Resize the figure so that its axes, one on the other, have this width and height in inches."""
    left, below, above = 0.75, 0.55, 0.35
    W, H = left + width + right, below + height + above
    figure.set_size_inches(W, H)
    figure.subplots_adjust(left=left / W, right=1 - right / W, bottom=below / H, top=1 - above / H, hspace=0)


def _draw_affinity(axes: Axes, clusters: Clusters, affinity: np.ndarray) -> None:
    """Draw the heat map, white where tasks neither help nor hinder each other, and a square for each cluster."""
    from matplotlib.patches import Rectangle

    largest = max(1.0, np.abs(affinity).max())
    image = axes.imshow(affinity, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-largest, vmax=largest)
    for first, end in pairwise(_edges(clusters)):
        axes.add_patch(Rectangle((first, first), end - first, end - first, fill=False, linewidth=1))
    axes.figure.colorbar(image, cax=axes.inset_axes((1.02, 0, 0.03, 1)), label="affinity")
    axes.set_ylabel("timestep t")


def _draw_snr(axes: Axes, snr: np.ndarray | None) -> None:
    if snr is None:
        axes.set_yticks([])
        return
    check_snr(snr, "snr")
    axes.plot(snr, color="black", linewidth=1.5)
    axes.set(ylabel="SNR", yscale="log")


def _draw_bands(axes: Axes, clusters: Clusters) -> None:
    for (first, end), colour in zip(pairwise(_edges(clusters)), _colours(clusters), strict=True):
        axes.axvspan(first, end, color=colour, linewidth=0.6)


def _draw_boxes(axes: Axes, clusters: Clusters, labels: _Labels) -> None:
    """Draw boxes of one width, and a wedge from each down to its interval."""
    edges, K = _edges(clusters), clusters.num_clusters
    length = edges[-1] - edges[0]
    middle, top = _WEDGE + labels.height / 2, _WEDGE + labels.height

    def write(x: float, text: str, **where: Any) -> None:
        axes.text(x, middle, text, va="center", rotation=labels.rotation, fontsize=7, **where)

    write(-0.01, labels.caption, ha="right", transform=axes.get_yaxis_transform())
    for k, ((first, end), colour) in enumerate(zip(pairwise(edges), _colours(clusters), strict=True)):
        left, right = (edges[0] + length * (k + part) / K for part in (0.03, 0.97))
        x = [first, end, right, right, left, left]
        # The outline keeps an interval visible that is narrower than a line.
        axes.fill(x, [0, 0, _WEDGE, top, top, _WEDGE], facecolor=colour, edgecolor=colour, linewidth=0.6)
        write((left + right) / 2, labels.texts[k], ha="center")
    axes.set_ylim(0, top)
    axes.set_axis_off()


def _colours(clusters: Clusters) -> list[np.ndarray]:
    """Return pale colours, on which black is readable, alternately darker and lighter so that neighbours differ."""
    from matplotlib import colormaps

    colours = colormaps["viridis"](np.linspace(0, 1, clusters.num_clusters))[:, :3]
    return [1 - (0.5, 0.3)[k % 2] * (1 - colour) for k, colour in enumerate(colours)]
