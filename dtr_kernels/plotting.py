"""Pictures of a routing: which channels are active at each timestep (figure 3 of the DTR paper)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dtr_kernels.routing import DenoisingTaskRouting, RandomRouting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_routing"]


def plot_routing(
    routing: DenoisingTaskRouting | RandomRouting, channels: int, path: str | Path | None = None
) -> Figure:
    """Draws the active channels (vertical) of every timestep (horizontal).

    Args:
        routing: whose masks to draw.
        channels: number of channels C.
        path: where to save the picture (PNG, PDF, SVG by its ending); None returns it only.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: if matplotlib is not installed (``pip install matplotlib``).
        ValueError: if the routing leaves no channel active.
    """
    from matplotlib.figure import Figure

    t = torch.arange(routing.num_timesteps)
    if isinstance(routing, RandomRouting):
        mask, name = routing.mask(t, channels), "random routing"
    else:
        mask, name = routing.window(t, channels).mask(), f"DTR, alpha {routing.alpha:g}"
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.imshow(mask.T.numpy(), aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
    axes.set(
        xlabel="timestep t (0: clean image, right: noise)",
        ylabel="channel",
        title=f"Active channels: {name}, beta {routing.beta:g}, {int(mask[0].sum())} of {channels}",
    )
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
