"""Data of the examples and the study: scikit-learn's 1,797 handwritten digits, under a cosine diffusion process.

At timestep t a model sees ``x_t = cos(phi) * image + sin(phi) * noise``, where phi grows evenly from almost 0 to
pi / 2, pure noise. It learns the velocity ``dx_t / dphi = cos(phi) * noise - sin(phi) * image``.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

import dtr_kernels as dtr
from dtr_kernels.files import replacing

CLASSES, TIMESTEPS = 10, 1000
NULL_CLASS = CLASSES  # stands for "any digit"
# Redraw often for a person, but leave few lines in a log.
BAR: dict[str, Any] = {"unit": "step", "mininterval": 0.2 if sys.stderr.isatty() else 15.0}


def load_images(device: torch.device | str = "cpu", size: int = 8) -> tuple[Tensor, Tensor]:
    """Return all images [1797, 1, size, size] in [-1, 1], enlarged from 8 x 8 if needed, and their classes [1797]."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    if size != 8:
        images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    return images.to(device), torch.tensor(digits.target, device=device)


def make_model(
    routing: dtr.DenoisingTaskRouting | dtr.RandomRouting | None,
    scope: str = "block",
    *,
    size: int = 8,
    hidden_size: int = 128,
    depth: int = 4,
    num_heads: int = 4,
) -> dtr.nn.DiT:
    """Build a DiT that predicts the velocity of images [B, 1, size, size] of one of ten classes, or of the null class.

    Batches already contain null labels, so the model drops none itself (class_dropout_prob 0).
    """
    return dtr.nn.DiT(
        input_size=size,
        patch_size=2,
        in_channels=1,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=CLASSES + 1,
        class_dropout_prob=0.0,
        learn_sigma=False,
        routing=routing,
        scope=scope,
    )


def angle(t: Tensor) -> Tensor:
    """Return phi at integer timesteps t [B], as [B, 1, 1, 1]: from pi / 2000 to pi / 2; at -1 it is 0, no noise."""
    return (math.pi / 2 * (t + 1) / TIMESTEPS)[:, None, None, None]


def snr(t: Tensor) -> Tensor:
    """Return the signal-to-noise ratio [B] at integer timesteps t [B]."""
    return angle(t).flatten().tan() ** -2


def noisy(images: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return x_t of images under fresh noise, and the velocity to predict from it, both shaped like images."""
    phi, noise = angle(t), torch.randn_like(images)
    return phi.cos() * images + phi.sin() * noise, phi.cos() * noise - phi.sin() * images


@torch.no_grad()
def sample(model: Any, labels: Tensor, *, size: int = 8, steps: int = 50, guidance: float = 1.0) -> Tensor:
    """Draw images [B, 1, size, size] in [-1, 1] of the classes ``labels`` [B] by DDIM.

    Args:
        model: called as ``model(x, t, y)`` with t a Python number; for guidance also needs ``forward_with_cfg``.
        labels: int [B], on the model's device.
        size: height and width.
        steps: of DDIM.
        guidance: above 1, classifier-free guidance of that scale, at twice the work.
    """
    x = torch.randn(len(labels), 1, size, size, device=labels.device)
    labels_and_null = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
    times = torch.linspace(TIMESTEPS - 1, -1, steps + 1).round().long()
    phis = angle(times).to(labels.device)
    for t, phi, next_phi in zip(tqdm(times[:-1].tolist(), "sampling", **BAR), phis[:-1], phis[1:], strict=True):
        # t is a Python number, so the host knows the window and nothing waits for the device.
        if guidance == 1:
            velocity = model(x, t, labels)
        else:
            velocity = model.forward_with_cfg(torch.cat([x, x]), t, labels_and_null, guidance)[: len(labels)]
        image = (phi.cos() * x - phi.sin() * velocity).clamp(-1, 1)
        noise = (x - phi.cos() * image) / phi.sin()
        x = next_phi.cos() * image + next_phi.sin() * noise
    return x


def save_samples(images: Tensor, path: Path) -> None:
    """Save a picture of images [n * CLASSES, 1, size, size], in n rows of one digit of each class."""
    framed = F.pad(images.cpu(), (1, 1, 1, 1), value=-1)
    rows = framed.view(-1, CLASSES, *framed.shape[2:])
    figure = Figure(figsize=(CLASSES, len(rows)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(rows.transpose(1, 2).flatten(2, 3).flatten(0, 1).numpy(), cmap="gray_r", vmin=-1, vmax=1)
    axes.set_axis_off()
    save_figure(figure, path, dpi=80)


def save_losses(losses: Tensor, path: Path) -> None:
    """Save a plot of the loss of every training step, [steps], and its moving average."""
    width = max(len(losses) // 20, 1)
    smooth = losses.cpu().unfold(0, width, 1).mean(dim=1).tolist()
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses.tolist(), color="tab:blue", alpha=0.25, linewidth=0.7, label="each step")
    axes.plot(range(width // 2, width // 2 + len(smooth)), smooth, color="tab:blue", label=f"mean of {width} steps")
    axes.set(xlabel="training step", ylabel="mean squared error of the velocity", ylim=(0, None))
    axes.legend()
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a PNG, as a whole or not at all."""
    with replacing(path) as draft:
        figure.savefig(draft, dpi=dpi, format="png")
