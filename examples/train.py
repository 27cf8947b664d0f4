"""A complete training loop to copy: DTR, gradient surgery or uncertainty weighting between timestep clusters, a moving
average of the weights, autocast, checkpoints, and several processes.

    python -m examples.train --out out/train --weighting pcgrad
    torchrun --standalone --nproc-per-node 2 -m examples.train --out out/train --weighting uw --precision bf16

A run that was killed at any moment continues when the same command is given again, and ends with the same weights as an
uninterrupted one, bit for bit on a CPU with as many threads: everything random in a step follows from the seed and the
step's number, and the rest of a run's state is in its checkpoint. Any number of processes trains the same model, up to
rounding.

--out, of the first process only, then holds checkpoint.pt, averaged.pt (the weights to use), loss.png and samples.png.
Needs ``pip install "dtr_kernels[demo]"``, and "dtr_kernels[torchjd]" for --weighting nash.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import dtr_kernels as dtr
from dtr_kernels.files import locked, read_tensors, write_tensors
from dtr_kernels.quoting import shortened
from examples import digits

ROUTINGS: dict[str, Callable[[Recipe], Any]] = {
    "none": lambda recipe: None,
    "random": lambda recipe: dtr.RandomRouting(digits.TIMESTEPS, recipe.beta, recipe.seed),
    "dtr": lambda recipe: dtr.DenoisingTaskRouting(digits.TIMESTEPS, recipe.alpha, recipe.beta),
}
ANOTHER = "delete the file, or give another folder"  # for a checkpoint that cannot be used
WEIGHTINGS = ("none", "uw", "pcgrad", "nash", "min-snr", "edm2")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHOICES = {"routing": ROUTINGS, "scope": dtr.reference.SCOPES, "weighting": WEIGHTINGS, "precision": PRECISIONS}
# Upper bounds; beyond them memory runs out. Whole numbers are at least 1, a seed at least 0.
LARGEST = {"clusters": digits.TIMESTEPS, "size": 256, "hidden_size": 2**14, "depth": 1000, "num_heads": 2**10}
LARGEST |= {"steps": 10**7, "batch_size": 10**6, "seed": 2**32 - 1}


@dataclass(frozen=True)
class Recipe:
    """The settings of a training. A checkpoint continues only under the recipe that it was made with.

    Attributes:
        routing: "none", "random" (the DTR paper's R-TR) or "dtr".
        scope: what the routing masks, see ``dtr.nn.RoutedDiTBlock``.
        alpha, beta: of the routing, see ``dtr.DenoisingTaskRouting``.
        weighting: "none" (the mean loss); weights of the clusters' losses: "uw" (uncertainty weighting), or "pcgrad" or
            "nash" (gradient surgery); or weights of each sample's loss by its noise level: "min-snr", or "edm2", which
            is learned.
        clusters: K. Every batch is spread evenly over K intervals of timesteps, for every weighting.
        cluster: train only on the timesteps of this cluster; None trains on all.
        size, hidden_size, depth, num_heads: of the images and of the model.
        steps, batch_size (of all processes together), learning_rate (its peak), precision, seed: of the training.

    Raises:
        ValueError: if an attribute is not as described.
    """

    routing: str = "dtr"
    scope: str = "block"
    alpha: float = 4.0
    beta: float = 0.8
    weighting: str = "none"
    clusters: int = 5
    cluster: int | None = None
    size: int = 8
    hidden_size: int = 128
    depth: int = 4
    num_heads: int = 4
    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 2e-3
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in list(allowed):
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, largest in LARGEST.items():
            least, value = int(name != "seed"), getattr(self, name)
            if type(value) is not int or not least <= value <= largest:
                raise ValueError(f"{name} must be a whole number in {least}..{largest}, got {shortened(repr(value))}")
        if type(self.learning_rate) not in (int, float) or not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a number above 0, and finite, got {self.learning_rate!r}")
        dtr.DenoisingTaskRouting(digits.TIMESTEPS, self.alpha, self.beta)  # raises, whatever the routing
        if self.batch_size < self.clusters:
            raise ValueError(
                f"batch_size must be at least clusters ({self.clusters}), so that none is ever empty, "
                f"got {self.batch_size}"
            )
        alone = type(self.cluster) is int and 0 <= self.cluster < self.clusters and self.weighting == "none"
        if self.cluster is not None and not alone:
            raise ValueError(
                f"cluster must be in 0..{self.clusters - 1} and needs weighting='none', because one cluster has "
                f"nothing to be weighted against; got {self.cluster!r} and {self.weighting!r}"
            )


class MinSNR(nn.Module):
    """Min-SNR-gamma of the velocity's error, called like ``dtr.NoiseLevelUncertainty``."""

    def forward(self, losses: Tensor, snr: Tensor) -> Tensor:
        """Return the weighted losses [B]."""
        return dtr.min_snr_weights(snr, "v") * losses


class Objective(nn.Module):
    """The model and the weighting of its losses in one module, so that DDP averages all their gradients."""

    def __init__(self, model: nn.Module, weighting: nn.Module | None, precision: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.weighting = weighting
        self.precision = precision

    def losses(self, x: Tensor, t: Tensor, y: Tensor, velocity: Tensor) -> Tensor:
        """Return the mean squared error of each sample [B], fp32."""
        with torch.autocast(x.device.type, self.precision, enabled=self.precision != torch.float32):
            predicted = self.model(x, t, y)
        return (predicted.float() - velocity).square().mean(dim=(1, 2, 3))

    def forward(self, clusters: Tensor, shares: Tensor, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss to differentiate, and the mean loss.

        Args:
            clusters: int [B], of each sample.
            shares: [B], the weight of each sample in the mean of its cluster.
            batch: the arguments of ``losses``.
        """
        losses = self.losses(*batch)
        if self.weighting is None:
            return losses.mean(), losses.mean()
        if isinstance(self.weighting, dtr.UncertaintyWeighting):
            means = losses.new_zeros(len(self.weighting.s)).index_add(0, clusters, losses * shares)
            return self.weighting(means), losses.mean()
        _, t, *_ = batch
        return self.weighting(losses, digits.snr(t)).mean(), losses.mean()


class Training:
    """A run: call ``step`` until ``done`` is ``recipe.steps``, and ``save`` and ``load`` at any time.

    Args:
        recipe: the settings.
        images, labels: the training data, [M, 1, size, size] and [M], on the device to train on.

    With an initialised ``torch.distributed`` every process makes one run and calls the same methods.

    Raises:
        ValueError: if the batch cannot be divided evenly among the processes.
    """

    def __init__(self, recipe: Recipe, images: Tensor, labels: Tensor) -> None:
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if recipe.batch_size % self.world:
            raise ValueError(f"batch_size must be divisible by {self.world} processes, got {recipe.batch_size}")
        self.recipe, self.images, self.labels = recipe, images, labels
        self.done = 0
        self.losses = torch.full((recipe.steps,), torch.nan, device=images.device)  # read without waiting for a GPU
        self.clusters = dtr.interval_clusters(digits.TIMESTEPS, recipe.clusters)

        torch.manual_seed(recipe.seed)
        self.model = digits.make_model(
            ROUTINGS[recipe.routing](recipe),
            recipe.scope,
            size=recipe.size,
            hidden_size=recipe.hidden_size,
            depth=recipe.depth,
            num_heads=recipe.num_heads,
        ).to(images.device)
        self.averaged = copy.deepcopy(self.model).eval()

        groups: list[dict[str, Any]] = [{"params": list(self.model.parameters())}]
        weighting: nn.Module | None = None
        if recipe.weighting == "uw":
            weighting = dtr.UncertaintyWeighting(recipe.clusters).to(images.device)
            groups.append(weighting.param_group())
        elif recipe.weighting == "min-snr":
            weighting = MinSNR()
        elif recipe.weighting == "edm2":
            weighting = dtr.NoiseLevelUncertainty().to(images.device)
            groups.append({"params": list(weighting.parameters()), "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
        for parameter in (p for group in groups for p in group["params"] if p.requires_grad):
            # Like AdamW's in its first step; with them, every checkpoint has the same keys.
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0)} | moments
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(images.device.type, enabled=recipe.precision == "fp16")
        self.objective = Objective(self.model, weighting, PRECISIONS[recipe.precision])
        self.surgery = None
        self._parallel: nn.Module = self.objective
        if recipe.weighting in ("pcgrad", "nash"):
            # Name the engine: "auto" measures, and two runs could choose differently.
            self.surgery = dtr.GradientSurgery(
                self.model.named_parameters(),
                recipe.clusters,
                recipe.weighting,
                engine="per_cluster",
                process_group=dist.group.WORLD if self.world > 1 else None,
            )
        elif self.world > 1:
            self._parallel = DistributedDataParallel(self.objective)

    def step(self) -> None:
        """Take one optimizer step, on a batch that follows from the seed and the step's number."""
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.done + 1)  # + 1: the weights used the first
        clusters, shares, *batch = self._batch()
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * self._schedule()
        self.optimizer.zero_grad()
        if self.surgery is None:
            loss, mean = self._parallel(self._on_device(clusters), shares, *batch)
            self.scaler.scale(loss).backward()
        else:
            of_clusters = self.surgery.backward_batch(self.objective.losses, clusters, *batch, scaler=self.scaler)
            parts = self._on_device(clusters.bincount(minlength=self.recipe.clusters) / len(clusters))
            mean = torch.where(parts > 0, of_clusters * parts, 0).sum()  # a rank may lack a cluster
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._update_average()
        self.losses[self.done] = mean.detach()
        self.done += 1

    @torch.no_grad()
    def _update_average(self) -> None:
        """Update a moving average of the weights over about the last tenth of the training."""
        for average, parameter in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
            average.lerp_(parameter, min(10 / self.recipe.steps, 1))

    def _schedule(self) -> float:
        """Return a linear warm-up over a twentieth of the steps, then a cosine to 0."""
        warmup = math.ceil(0.05 * self.recipe.steps)
        return min((self.done + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * self.done / self.recipe.steps))

    def _batch(self) -> tuple[Tensor, ...]:
        """Return this process's part of the batch: clusters, on the CPU, shares, and the arguments of
        ``Objective.losses``.

        Every process draws the whole batch and takes its part, so the number of processes makes no difference.
        """
        recipe, device = self.recipe, self.images.device
        if recipe.cluster is None:
            t = self.clusters.sample(recipe.batch_size)
        else:
            first, end = self.clusters.bounds[recipe.cluster : recipe.cluster + 2]
            t = torch.randint(first, end, (recipe.batch_size,))
        clusters = self.clusters.assign(t)
        # DDP divides by the number of processes.
        shares = self._on_device(self.world / clusters.bincount(minlength=recipe.clusters)[clusters])
        t = self._on_device(t)
        chosen = torch.randint(len(self.images), (recipe.batch_size,), device=device)
        unlabelled = torch.rand(recipe.batch_size, device=device) < 0.1  # for classifier-free guidance
        y = torch.where(unlabelled, digits.NULL_CLASS, self.labels[chosen])
        x, velocity = digits.noisy(self.images[chosen], t)
        return tuple(tensor[self.rank :: self.world] for tensor in (clusters, shares, x, t, y, velocity))

    def _on_device(self, tensor: Tensor) -> Tensor:
        """Return a copy that the host does not wait for."""
        device = self.images.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    def save(self, path: Path) -> None:
        """Write a checkpoint in the first process; an OSError is raised in all, and leaves an old file as it was."""
        if self.world > 1:  # each process has seen its part of the batches
            total = self.losses.double()  # in fp64 repeated means of equal numbers are exact
            dist.all_reduce(total)
            self.losses.copy_(total / self.world)
        by_the_first(lambda: write_tensors(self._state(), path))

    def load(self, path: Path) -> None:
        """Continue from a checkpoint, which the first process reads for all.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is damaged, or was made with another recipe. The run is then unchanged.
        """
        state = by_the_first(lambda: self._read(path))
        if self.surgery is not None:
            self.surgery.load_state_dict(state["surgery"])  # first, as only this call may still raise
        self.done = state["done"]
        self.losses.copy_(state["losses"])
        self.objective.load_state_dict(state["objective"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]["state"]})
        self.scaler.load_state_dict(state["scaler"])

    def _state(self) -> dict[str, Any]:
        return {
            "recipe": asdict(self.recipe),
            "done": self.done,
            "losses": self.losses,
            "objective": self.objective.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "surgery": None if self.surgery is None else self.surgery.state_dict(),
        }

    def _read(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint, checked to have the keys, types and shapes of this training."""
        state, here = read_tensors(path), self._state()
        if not isinstance(state, dict) or not isinstance(state.get("recipe"), dict):
            raise ValueError(f"{path} is no checkpoint of a training; {ANOTHER}")
        recipe = state.pop("recipe")
        for name, value in here.pop("recipe").items():
            if isinstance(recipe.get(name), Tensor) or recipe.get(name) != value:
                raise ValueError(
                    f"{path} was made with {name} {shortened(repr(recipe.get(name)))}, but this run has {value!r}; "
                    "give the same arguments, or another folder"
                )
        _check_alike(state, here, str(path))
        if not 0 <= state["done"] <= self.recipe.steps:
            raise ValueError(f"{path}['done'] must be in 0..{self.recipe.steps}, got {state['done']}; {ANOTHER}")
        return state


def by_the_first(function: Callable[[], Any]) -> Any:
    """Call a function in the first process only; all return its result, or raise its OSError or ValueError."""
    outcome: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except (OSError, ValueError) as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _check_alike(found: Any, here: Any, name: str) -> None:
    """Raise a ValueError if a checkpoint has other keys, types or shapes than one made here."""
    if isinstance(found, dict) and isinstance(here, dict):
        for key in here | found:
            _check_alike(found.get(key), here.get(key), f"{name}[{shortened(repr(key))}]")
        return
    kinds = [
        f"{x.layout} {x.dtype} {x.shape}{' meta' * x.is_meta}" if isinstance(x, Tensor) else type(x).__name__
        for x in (found, here)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{name} must be {kinds[1]}, got {kinds[0]}; {ANOTHER}")


def run(training: Training, checkpoint: Path, save_every: int) -> bool:
    """Train to the end and save; return False if Ctrl-C or SIGTERM came.

    A single process then finishes its step and saves it. Several cannot learn of each other's signals in time: they
    stop where they are, and continue from the last multiple of ``save_every`` steps.
    """
    total = training.recipe.steps
    with (
        _signals(training.world == 1) as received,  # tqdm prints a traceback if its constructor is interrupted
        tqdm(total=total, initial=training.done, desc="training", disable=training.rank > 0, **digits.BAR) as bar,
    ):
        while training.done < total and not received:
            training.step()
            bar.update()
            if training.done % save_every == 0 or training.done == total:
                training.save(checkpoint)
                recent = training.losses[max(training.done - 50, 0) : training.done]
                bar.set_postfix(loss=f"{recent.mean():.3f}")
        if received:
            training.save(checkpoint)
    return not received


@contextmanager
def _signals(kept: bool) -> Iterator[list[int]]:
    """If ``kept``, append Ctrl-C and SIGTERM to the list instead of ending the process while the context is open."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM) if kept else ()
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def draw(training: Training, out: Path) -> None:
    """Write the averaged weights, and pictures of the losses and of new digits."""
    write_tensors(training.averaged.state_dict(), out / "averaged.pt")
    digits.save_losses(training.losses, out / "loss.png")
    labels = torch.arange(digits.CLASSES, device=training.images.device).repeat(8)
    images = digits.sample(training.averaged, labels, size=training.recipe.size, guidance=1.5)
    digits.save_samples(images, out / "samples.png")


def parse_arguments(command_line: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Parse the recipe's attributes, except ``cluster``, and where to train."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.train", usage="%(prog)s [options]", description="Train a small DTR-DiT on digits."
    )
    parser.add_argument("--out", type=Path, default=Path("out/train"), help="folder of the run (default: out/train)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS", help="default: 100")
    for field in (field for field in fields(Recipe) if field.name != "cluster"):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            choices=CHOICES.get(field.name),
            metavar=None if field.name in CHOICES else field.name.upper(),
            help=f"default: {field.default}",
        )
    return parser, parser.parse_args(command_line)


def main(command_line: list[str] | None = None) -> int:
    parser, arguments = parse_arguments(command_line)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: PyTorch finds no CUDA device here; use --device cpu")
    if arguments.save_every < 1:
        parser.error(f"argument --save-every: must be at least 1, got {arguments.save_every}")
    if "RANK" in os.environ:  # torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    checkpoint, held = arguments.out / "checkpoint.pt", ExitStack()
    busy = f"another process trains in {arguments.out}; wait until it ends, or give another folder"
    with held:
        try:
            given = {field.name: getattr(arguments, field.name) for field in fields(Recipe) if field.name != "cluster"}
            training = Training(Recipe(**given), *digits.load_images(device, arguments.size))
            by_the_first(lambda: held.enter_context(locked(checkpoint, busy)))
            if by_the_first(checkpoint.exists):
                training.load(checkpoint)
            training.save(checkpoint)  # fails now rather than after an hour of training
        except OSError as error:
            parser.error(f"argument --out: {error}; give another folder")
        except ValueError as error:
            parser.error(str(error))
        try:
            if not run(training, checkpoint, arguments.save_every):
                steps = f"{training.done} of {training.recipe.steps} steps"
                print(f"stopped after {steps}; the same command goes on from there")
                return 130
            if training.rank == 0:
                draw(training, arguments.out)
                print(f"results are in {arguments.out}")
        except OSError as error:
            print(f"{error}; the last checkpoint is whole, and the same command goes on from it", file=sys.stderr)
            return 1
    if dist.is_initialized():
        del training  # if DDP released the process group last, PyTorch could wait forever
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
