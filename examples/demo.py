"""Train a small DTR-DiT on scikit-learn's 1,797 handwritten digits, draw new ones, and check the fused blocks.

    python -m examples.demo --out out/demo

Two CPU cores take about two minutes. --out then holds:

    windows.png     the active channels at each timestep
    loss.png        the training loss
    samples.png     new digits, one column per class
    comparison.md   time, memory and accuracy of a training step: plain PyTorch blocks and fused blocks
    metrics.json    every number, and the machine it was measured on

The exit status is 1 if the trained model's output or gradients are less accurate than fp32 allows. Ctrl-C ends training
early and continues with the model trained so far. Needs ``pip install "dtr_kernels[demo]"``.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import dtr_kernels as dtr
from dtr_kernels.files import replacing
from examples import digits
from examples.train import Recipe, Training

ROUTING = dtr.DenoisingTaskRouting(digits.TIMESTEPS)


def train(training: Training) -> None:
    """Train to the end, or until Ctrl-C."""
    progress = tqdm(range(training.recipe.steps), "training", **digits.BAR)
    try:
        for step in progress:
            training.step()
            if step % 50 == 49:
                progress.set_postfix(loss=f"{training.losses[step - 49 : step + 1].mean():.3f}", refresh=False)
    except KeyboardInterrupt:
        progress.close()
        print(f"interrupted after {training.done} of {training.recipe.steps} steps")


def plain_forward(model: dtr.nn.DiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Run the model in plain PyTorch, where routing multiplies by masks."""
    return dtr.reference.dit(model, x, t, y, ROUTING.window(t, model.hidden_size).mask())


FORWARDS: dict[str, Callable[..., Tensor]] = {"plain": plain_forward, "fused": dtr.nn.DiT.__call__}


def bytes_saved(forward: Callable[..., Tensor], model: dtr.nn.DiT, x: Tensor, t: Tensor, y: Tensor) -> int:
    """Count the bytes that autograd keeps for the backward pass: every storage once, without parameters."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _graph = forward(model, x, t, y)  # held until the sum, as freed memory would be reused and counted again
    for parameter in model.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def compare(model: dtr.nn.DiT, batch: tuple[Tensor, ...], repeats: int = 25, warmup: int = 3) -> dict[str, dict]:
    """Measure time and memory of a training step with plain and with fused blocks, alternating; return medians."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters())
    x, t, y, velocity = batch
    seconds: dict[str, list[float]] = {name: [] for name in FORWARDS}
    for _ in tqdm(range(warmup + repeats), "comparing", **digits.BAR):
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
    """Return the errors of plain and fused fp32 against plain fp64, relative to the largest entry of each tensor."""

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


def machine(device: torch.device) -> dict[str, str | int | None]:
    """Describe the machine and the versions; commit is None outside a git checkout."""
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


def parse_arguments() -> tuple[argparse.Namespace, Recipe]:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        usage="%(prog)s [options]",
        description="Train a small DTR-DiT on handwritten digits, draw new ones, and check the fused blocks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the results")
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument("--batch-size", type=int, default=128, help="images per training step")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, the batches and the samples")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train")
    parser.add_argument("--scope", choices=dtr.reference.SCOPES, default="block", help="what the routing masks")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: PyTorch finds no CUDA device here; use --device cpu")
    if arguments.out.exists() and not arguments.out.is_dir():
        parser.error(f"argument --out: {arguments.out} exists and is not a folder")
    shared = {field.name for field in fields(Recipe)} & vars(arguments).keys()
    try:
        return arguments, Recipe(**{name: getattr(arguments, name) for name in shared})
    except ValueError as error:
        parser.error(str(error))


def main() -> int:
    arguments, recipe = parse_arguments()
    out, device = arguments.out, torch.device(arguments.device)
    images, labels = digits.load_images(device)
    training = Training(recipe, images, labels)
    digits.save_figure(dtr.plot_routing(ROUTING, channels=recipe.hidden_size), out / "windows.png")

    start = time.perf_counter()
    train(training)
    training_seconds = time.perf_counter() - start
    if not training.done:
        return 130
    model, losses = training.averaged, training.losses[: training.done]
    digits.save_losses(losses, out / "loss.png")
    each_class = torch.arange(digits.CLASSES, device=device).repeat(8)
    digits.save_samples(digits.sample(model, each_class, guidance=1.5), out / "samples.png")

    chosen, t = torch.randint(len(images), (recipe.batch_size,)), torch.randint(digits.TIMESTEPS, (recipe.batch_size,))
    x, velocity = digits.noisy(images[chosen.to(device)], t := t.to(device))
    batch = x, t, labels[chosen.to(device)], velocity
    comparison, errors = compare(model, batch), check(model, batch)
    metrics = {
        "arguments": vars(arguments) | {"out": str(out)},
        "machine": machine(device),
        "training": {"seconds": training_seconds, "losses": losses.tolist()},
        "comparison": comparison | errors,
    }
    texts = {"comparison.md": table(comparison | errors), "metrics.json": json.dumps(metrics, indent=2) + "\n"}
    for name, text in texts.items():
        with replacing(out / name) as draft:
            draft.write_text(text)
    print(f"\n{table(comparison | errors)}\nresults are in {out}")
    if any(error["fused"] > 2 * error["plain"] + 1e-6 for error in errors.values()):
        print("FAILED: the fused blocks are less accurate than fp32 allows", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # after training: written files stay
        sys.exit(130)
    except OSError as error:
        sys.exit(f"--out cannot be written to: {error}; give another folder, or free some space")
