"""Trains a small DTR-DiT on scikit-learn's 1,797 handwritten digits, draws new ones, and checks the fused blocks.

    python examples/digits.py --out out/demo

Two CPU cores take about two minutes. What --out then holds:

    windows.png     which channels are active at which timestep
    loss.png        the training loss
    samples.png     new digits, one column per class
    comparison.md   time, memory and accuracy of a training step: plain PyTorch blocks and fused blocks
    metrics.json    every number, and the machine it was measured on

The exit status is 1 if the trained model's output or gradients are less accurate than fp32 allows. Ctrl-C ends training
early and goes on with what was trained. Needs ``pip install "dtr_kernels[demo]"``.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

import dtr_kernels as dtr

CLASSES, TIMESTEPS = 10, 1000
# Bars redraw often for a person and leave few lines in a log.
BAR: dict[str, Any] = {"unit": "step", "mininterval": 0.2 if sys.stderr.isatty() else 15.0}
ROUTING = dtr.DenoisingTaskRouting(TIMESTEPS)


def load_images(device: torch.device) -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in [-1, 1] and their classes [1797]."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device)[:, None] / 8 - 1
    return images, torch.tensor(digits.target, device=device)


def make_model(scope: str) -> dtr.nn.DiT:
    return dtr.nn.DiT(
        input_size=8,
        patch_size=2,
        in_channels=1,
        hidden_size=128,
        depth=4,
        num_heads=4,
        num_classes=CLASSES,
        learn_sigma=False,
        routing=ROUTING,
        scope=scope,
    )


def angle(t: Tensor) -> Tensor:
    """The cosine schedule: x_t = cos(angle) * image + sin(angle) * noise, pure noise at the last timestep."""
    return (math.pi / 2 * (t + 1) / TIMESTEPS)[:, None, None, None]


def draw_batch(images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random x_t, t and class, and the velocity that the model learns to predict from them."""
    chosen = torch.randint(len(images), (size,), device=images.device)
    t = torch.randint(TIMESTEPS, (size,), device=images.device)
    image, phi = images[chosen], angle(t)
    noise = torch.randn_like(image)
    return phi.cos() * image + phi.sin() * noise, t, labels[chosen], phi.cos() * noise - phi.sin() * image


def train(
    model: dtr.nn.DiT, images: Tensor, labels: Tensor, steps: int, batch_size: int
) -> tuple[dtr.nn.DiT, list[float]]:
    """Trains in place; returns a model with the moving average of the weights, and the loss of every step."""
    averaged = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    warmup = math.ceil(0.05 * steps)
    losses: list[float] = []
    progress = tqdm(range(steps), "training", **BAR)
    try:
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            x, t, y, velocity = draw_batch(images, labels, batch_size)
            loss = F.mse_loss(model(x, t, y), velocity)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for average, parameter in zip(averaged.parameters(), model.parameters(), strict=True):
                    average.lerp_(parameter, 1 / min(step + 1, 200))
            losses.append(loss.item())
            progress.set_postfix(loss=f"{statistics.fmean(losses[-50:]):.3f}", refresh=False)
    except KeyboardInterrupt:
        progress.close()
        print(f"interrupted after {len(losses)} of {steps} steps")
    return averaged, losses


@torch.no_grad()
def sample(model: dtr.nn.DiT, labels: Tensor, steps: int = 50, guidance: float = 1.5) -> Tensor:
    """DDIM with classifier-free guidance: images [B, 1, 8, 8] in [-1, 1] of the classes ``labels`` [B]."""
    x = torch.randn(len(labels), 1, 8, 8, device=labels.device)
    labels_and_null = torch.cat([labels, torch.full_like(labels, CLASSES)])
    times = torch.linspace(TIMESTEPS - 1, -1, steps + 1).round().long()  # at -1 the angle is 0: no noise
    phis = angle(times).to(labels.device)
    for t, phi, next_phi in zip(tqdm(times[:-1].tolist(), "sampling", **BAR), phis[:-1], phis[1:], strict=True):
        # t is a Python number, so the host knows the window and nothing waits for the device.
        velocity = model.forward_with_cfg(torch.cat([x, x]), t, labels_and_null, guidance)[: len(labels)]
        image = (phi.cos() * x - phi.sin() * velocity).clamp(-1, 1)
        noise = (x - phi.cos() * image) / phi.sin()
        x = next_phi.cos() * image + next_phi.sin() * noise
    return x


def plain_forward(model: dtr.nn.DiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The model in plain PyTorch, where routing multiplies by masks."""
    return dtr.reference.dit(model, x, t, y, ROUTING.window(t, model.hidden_size).mask())


FORWARDS: dict[str, Callable[..., Tensor]] = {"plain": plain_forward, "fused": dtr.nn.DiT.__call__}


def bytes_saved(forward: Callable[..., Tensor], model: dtr.nn.DiT, x: Tensor, t: Tensor, y: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass: every storage once, parameters not counted."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _graph = forward(model, x, t, y)  # held until the sum, or freed memory would be handed out and counted again
    for parameter in model.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def compare(model: dtr.nn.DiT, batch: tuple[Tensor, ...], repeats: int = 25, warmup: int = 3) -> dict[str, dict]:
    """Time and memory of a training step with plain and with fused blocks: they alternate, and medians count."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters())
    x, t, y, velocity = batch
    seconds: dict[str, list[float]] = {name: [] for name in FORWARDS}
    for _ in tqdm(range(warmup + repeats), "comparing", **BAR):
        for name, forward in FORWARDS.items():
            start = time.perf_counter()
            optimizer.zero_grad()
            F.mse_loss(forward(model, x, t, y), velocity).backward()
            optimizer.step()
            if x.is_cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {
        "seconds per training step": {name: statistics.median(s[warmup:]) for name, s in seconds.items()},
        "MB saved for backward": {name: bytes_saved(f, model, x, t, y) / 1e6 for name, f in FORWARDS.items()},
    }


def check(model: dtr.nn.DiT, batch: tuple[Tensor, ...]) -> dict[str, dict[str, float]]:
    """Errors of plain and fused fp32 against plain fp64, relative to the largest entry of each tensor."""

    def output_and_gradients(name: str, model: dtr.nn.DiT, x: Tensor, t: Tensor, y: Tensor, velocity: Tensor) -> list:
        out = FORWARDS[name](model, x, t, y)
        trained = [p for p in model.parameters() if p.requires_grad]
        return [out, *torch.autograd.grad(F.mse_loss(out, velocity), trained)]

    double_batch = (tensor.double() if tensor.is_floating_point() else tensor for tensor in batch)
    exact = output_and_gradients("plain", copy.deepcopy(model).double(), *double_batch)
    errors: dict[str, dict[str, float]] = {"error of the output": {}, "largest error of a gradient": {}}
    for name in FORWARDS:
        found = output_and_gradients(name, model, *batch)
        relative = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True)]
        errors["error of the output"][name] = relative[0]
        errors["largest error of a gradient"][name] = max(relative[1:])
    return errors


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = ["| | plain PyTorch | fused | plain / fused |", "|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['plain']:.3g} | {row['fused']:.3g} | {row['plain'] / row['fused']:.2f} |")
    return "\n".join(lines) + "\n"


def save_samples(images: Tensor, path: Path) -> None:
    """Draws images [8 * CLASSES, 1, 8, 8] in rows of one digit of each class."""
    framed = F.pad(images.cpu(), (1, 1, 1, 1), value=-1).view(-1, CLASSES, 10, 10)
    figure = Figure(figsize=(CLASSES, len(framed)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(framed.transpose(1, 2).flatten(2, 3).flatten(0, 1), cmap="gray_r", vmin=-1, vmax=1)
    axes.set_axis_off()
    figure.savefig(path, dpi=80)


def save_losses(losses: list[float], path: Path) -> None:
    width = max(len(losses) // 20, 1)
    smooth = [statistics.fmean(losses[i : i + width]) for i in range(len(losses) - width + 1)]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color="tab:blue", alpha=0.25, linewidth=0.7, label="each step")
    axes.plot(range(width // 2, width // 2 + len(smooth)), smooth, color="tab:blue", label=f"mean of {width} steps")
    axes.set(xlabel="training step", ylabel="mean squared error of the velocity", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


def machine(device: torch.device) -> dict[str, str | int | None]:
    """Where and with what the numbers were measured; commit is None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dtr_kernels": dtr.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def parse_arguments() -> argparse.Namespace:
    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
        return int(text)

    parser = argparse.ArgumentParser(
        description="Train a small DTR-DiT on handwritten digits, draw new ones, and check the fused blocks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the results")
    parser.add_argument("--steps", type=positive, default=1000, help="training steps")
    parser.add_argument("--batch-size", type=positive, default=128, help="images per training step")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, the batches and the samples")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train")
    parser.add_argument("--scope", choices=dtr.reference.SCOPES, default="block", help="what the routing masks")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: PyTorch finds no CUDA device here; use --device cpu")
    if arguments.out.exists() and not arguments.out.is_dir():
        parser.error(f"argument --out: {arguments.out} exists and is not a folder")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    out, device = arguments.out, torch.device(arguments.device)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    images, labels = load_images(device)
    model = make_model(arguments.scope).to(device)
    dtr.plot_routing(ROUTING, model.hidden_size, out / "windows.png")

    start = time.perf_counter()
    model, losses = train(model, images, labels, arguments.steps, arguments.batch_size)
    training_seconds = time.perf_counter() - start
    if not losses:
        return 130
    save_losses(losses, out / "loss.png")
    save_samples(sample(model, torch.arange(CLASSES, device=device).repeat(8)), out / "samples.png")

    batch = draw_batch(images, labels, arguments.batch_size)
    comparison, errors = compare(model, batch), check(model, batch)
    (out / "comparison.md").write_text(table(comparison | errors))
    metrics = {
        "arguments": vars(arguments) | {"out": str(out)},
        "machine": machine(device),
        "training": {"seconds": training_seconds, "losses": losses},
        "comparison": comparison | errors,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"\n{table(comparison | errors)}\nresults are in {out}")
    if any(error["fused"] > 2 * error["plain"] + 1e-6 for error in errors.values()):
        print("FAILED: the fused blocks are less accurate than fp32 allows", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # after training: what was written stays
        sys.exit(130)
