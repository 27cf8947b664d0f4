"""The units of a study: each is done once, and its findings are kept, so that an interrupted study can continue."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dtr_kernels as dtr
from benchmarks import environment
from benchmarks.study import findings, inner, page
from benchmarks.study.judge import Judge, load_weights, split, trained_classifier
from benchmarks.study.plan import METHODS, TIMED_STEPS, VANILLA, WARM_UP, Plan, unit
from benchmarks.timing import Spread, Stopwatch
from dtr_kernels.files import expecting, read_json, read_tensors, replacing, write_tensors
from dtr_kernels.quoting import quoted
from examples import digits
from examples.train import Recipe, Training, run

# Shares of the training after which the gradients of the timesteps are compared.
AFFINITY_AT = (0.1, 0.3, 1.0)


class Interrupted(Exception):
    """Ctrl-C came while a model was trained; its checkpoint is saved."""


class Study:
    """The units of a study, in a folder that keeps the findings of each.

    Args:
        plan: the size.
        folder: of the findings; created if needed.
        device: where to train.
        methods: the methods to compare, with their changes to the recipe.

    Raises:
        ValueError: if the folder holds a study of another plan, or a file in it is damaged.
    """

    def __init__(
        self, plan: Plan, folder: Path, device: torch.device, methods: Mapping[str, Mapping[str, Any]] = METHODS
    ) -> None:
        self.plan, self.folder, self.device, self.methods = plan, folder, device, methods
        # Describe the checkout now: later commits do not change the running code.
        self._environment = environment.describe(device)
        folder.mkdir(parents=True, exist_ok=True)
        self._check_plan()
        self.clusters = dtr.interval_clusters(digits.TIMESTEPS, plan.clusters)
        self.training, self.held_out = split(*digits.load_images(device, plan.size))
        dtr.GradientSurgery([torch.zeros(1, requires_grad=True)], 1, "nash")  # raises at once if TorchJD is missing
        self.judge = Judge(
            self.training,
            self.held_out,
            trained_classifier(self.training, folder / "classifier.pt", plan.epochs),
            plan.samples,
            plan.sampling_steps,
            torch.arange(plan.loss_every // 2, digits.TIMESTEPS, plan.loss_every),
        )

    def _check_plan(self) -> None:
        path, here = self.folder / "plan.json", asdict(self.plan) | {"methods": self.methods}
        if not path.exists():
            _write(here, path)
        there = _read(path)
        for name in here:
            if there.get(name) != here[name]:
                raise ValueError(
                    f"{self.folder} holds a study with {name} {quoted(there.get(name))}, and this one has "
                    f"{here[name]!r}; give another --out, or delete that folder"
                )

    def units(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """Yield names and functions of units, seed by seed, each after the units that it needs."""
        yield "real", self.real
        for seed in range(self.plan.seeds):
            for method in self.methods:
                yield self._training(method, seed)
            for k in range(self.plan.clusters):
                yield unit(f"specialist {k}", seed), partial(self.specialist, k, seed)
            yield unit("transfer", seed), partial(self.transfer, seed)
        yield "affinity", self.affinity
        yield "seconds", self.seconds

    def _training(self, method: str, seed: int) -> tuple[str, Callable[[], dict[str, Any]]]:
        name = unit(method, seed)
        return name, partial(self.train, name, self._recipe(seed, **self.methods[method]))

    def findings(self) -> dict[str, dict[str, Any]]:
        """Read the findings of the units that are done, by name."""
        names = (name for name, _ in self.units())
        return {name: _read(self._path(name)) for name in names if self._path(name).exists()}

    def collected(self) -> dict[str, Any]:
        """Return everything that the pages are made from."""
        return findings.collect(self.plan, self.findings(), self.clusters.bounds)

    def markdown(self, found: dict[str, Any]) -> str:
        """Write the page in words."""
        return findings.markdown(found)

    def sentences(self, found: dict[str, Any]) -> list[str]:
        """Return the findings, a sentence each."""
        return findings.sentences(found)

    def draw(self, found: dict[str, Any], path: Path) -> None:
        """Save the page of pictures."""
        page.draw(found, self.samples(), path)

    def samples(self) -> dict[str, Tensor]:
        """Return two images of each class from a model of each method, [20, 1, size, size]."""
        return {method: self._images(unit(method, 0)) for method in self.methods}

    def _images(self, name: str) -> Tensor:
        path, shape = self.folder / f"{name} images.pt", (2 * digits.CLASSES, 1, self.plan.size, self.plan.size)
        advice = f"delete {self._path(name)}, and the same command draws them again"
        with expecting("the images of this study", path, advice):
            if not path.exists():
                raise ValueError("it is not there")
            images = read_tensors(path)
            if not isinstance(images, Tensor) or images.shape != shape:
                raise ValueError(f"it is no tensor of shape {list(shape)}")
            return images

    def do(self, name: str, function: Callable[[], dict[str, Any]]) -> None:
        """Run a unit and keep its findings."""
        _write(function() | {"environment": self._environment}, self._path(name))

    def done(self, name: str) -> bool:
        return self._path(name).exists()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def real(self) -> dict[str, Any]:
        """Judge real images."""
        return {
            "training images": len(self.training.labels),
            "held-out images": len(self.held_out.labels),
            "accuracy": self.judge.accuracy(*self.held_out),
            "distance of as many": self.judge.distance_of_images(self.held_out.images[: self._few]),
            "as many": self._few,
        }

    def train(self, name: str, recipe: Recipe) -> dict[str, Any]:
        """Train a model of a unit and judge it."""
        model = self._trained(name, recipe)
        images = self.judge.draw(model)
        write_tensors(images[: 2 * digits.CLASSES].cpu().clone(), self.folder / f"{name} images.pt")
        return {
            "steps": recipe.steps,
            "losses": self.judge.losses(model).tolist(),
            "distance": self.judge.distance_of_images(images),
            "distance of as many": self.judge.distance_of_images(images[: self._few]),
            "recognised": self.judge.accuracy(images, self.judge.classes),
        }

    def specialist(self, k: int, seed: int) -> dict[str, Any]:
        """Train a vanilla model on one interval alone, for equally many steps, and return its losses there."""
        recipe = self._recipe(seed, **METHODS[VANILLA], cluster=k)
        losses = self.judge.losses(self._trained(unit(f"specialist {k}", seed), recipe))
        return {"losses": losses[self.clusters.assign(self.judge.timesteps) == k].tolist()}

    def transfer(self, seed: int) -> dict[str, Any]:
        """Return the negative transfer gaps of the vanilla model, by denoising loss and by the distance of samples."""
        shared = self._trained(unit(VANILLA, seed), self._recipe(seed, **METHODS[VANILLA]))
        recipes = [self._recipe(seed, **METHODS[VANILLA], cluster=k) for k in range(self.plan.clusters)]
        specialists = [self._trained(unit(f"specialist {k}", seed), recipe) for k, recipe in enumerate(recipes)]

        def distance(model: Any) -> float:
            return self.judge.distance_of_images(self.judge.draw(model))

        return {"distance": dtr.negative_transfer_gaps(distance, shared, specialists, self.clusters).tolist()}

    def affinity(self) -> dict[str, Any]:
        """Return the affinity of denoising tasks along a vanilla training, averaged over its checkpoints."""
        timesteps = range(self.plan.affinity_every // 2, digits.TIMESTEPS, self.plan.affinity_every)
        training = Training(self._recipe(0, **METHODS[VANILLA]), *self.training)
        found = []
        moments = self._moments()
        for until, weights in moments.items():
            load_weights(training.model, weights)
            loss, path = self._mean_loss(training), self.folder / f"affinity at step {until}.pt"
            found.append(dtr.task_affinity(loss, training.model.parameters(), timesteps, path=path))
        matrix = dtr.TaskAffinity.average(found).matrix.tolist()
        return {"steps": list(moments), "timesteps": list(timesteps), "matrix": matrix}

    def _moments(self) -> dict[int, Path]:
        """Return files of vanilla's weights after some steps of its first training, which is run again for them."""
        steps = [max(round(part * self.plan.steps), 1) for part in AFFINITY_AT]
        paths = {until: self.folder / f"vanilla at step {until}.pt" for until in steps}
        training = Training(self._recipe(0, **METHODS[VANILLA]), *self.training)
        for until, path in paths.items():
            while training.done < until and not all(path.exists() for path in paths.values()):
                training.step()
            if not path.exists():
                write_tensors(training.model.state_dict(), path)
        return paths

    def _mean_loss(self, training: Training) -> Callable[[int], Tensor]:
        """Return the loss at a timestep over all training images, with its own noise."""
        images, labels = self.training

        def loss(t: int) -> Tensor:
            times = torch.full((len(images),), t, device=self.device)
            x, velocity = digits.noisy(images, times)
            return training.objective.losses(x, times, labels, velocity).mean()

        return loss

    def seconds(self) -> dict[str, Any]:
        """Return the seconds of some training steps of every method, in rounds in which all take turns."""
        trainings = {
            method: Training(self._recipe(0, **{**changes, "steps": 2 * TIMED_STEPS}), *self.training)
            for method, changes in self.methods.items()
        }
        stopwatch = Stopwatch(self.device)
        timers = {method: stopwatch.timer([training.step], graph=False) for method, training in trainings.items()}
        rounds = [{method: timer() for method, timer in timers.items()} for _ in range(WARM_UP + TIMED_STEPS)]
        return {"seconds": {method: [taken[method] for taken in rounds[WARM_UP:]] for method in self.methods}}

    @property
    def _few(self) -> int:
        """The number of images that are held out, or drawn if those are fewer."""
        return min(len(self.held_out.labels), self.plan.samples)

    def _recipe(self, seed: int, **changes: Any) -> Recipe:
        return Recipe(**{"seed": seed} | self.plan.settings() | changes)

    def _trained(self, name: str, recipe: Recipe) -> dtr.nn.DiT:
        """Return the moving average of a training, which continues if it was interrupted."""
        checkpoint, weights = self.folder / f"{name} checkpoint.pt", self.folder / f"{name}.pt"
        if weights.exists():
            return self._averaged(name, recipe)
        training = Training(recipe, *self.training)
        if checkpoint.exists():
            training.load(checkpoint)
        if not run(training, checkpoint, save_every=200):
            raise Interrupted
        write_tensors(training.averaged.state_dict(), weights)
        checkpoint.unlink()
        return training.averaged

    def _averaged(self, name: str, recipe: Recipe) -> dtr.nn.DiT:
        """Return the model that ``_trained`` kept."""
        model = Training(recipe, *self.training).averaged
        load_weights(model, self.folder / f"{name}.pt")
        return model


class InnerStudy(Study):
    """The units of the study of scope "inner"; at equal time, a model takes as many steps as fit by the time of a step
    on this machine."""

    def __init__(self, plan: Plan, folder: Path, device: torch.device) -> None:
        super().__init__(plan, folder, device, inner.methods(plan))

    def units(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        yield "real", self.real
        yield "seconds", self.seconds
        for seed in range(self.plan.seeds):
            for method in self.methods:
                yield self._training(method, seed)
            for method in inner.at_equal_time(self.plan):
                yield inner.as_long(method, seed), partial(self.train_as_long, method, seed)

    def train_as_long(self, method: str, seed: int) -> dict[str, Any]:
        """Train a model of a method for as long as vanilla's training, and judge it."""
        seconds = _read(self._path("seconds"))["seconds"]
        share = Spread.of(seconds[VANILLA]).median / Spread.of(seconds[method]).median
        steps = round(self.plan.steps * share)
        return self.train(inner.as_long(method, seed), self._recipe(seed, **{**self.methods[method], "steps": steps}))

    def collected(self) -> dict[str, Any]:
        return inner.collect(self.plan, self.findings())

    def markdown(self, found: dict[str, Any]) -> str:
        return inner.markdown(found)

    def sentences(self, found: dict[str, Any]) -> list[str]:
        return [inner.sentence(found)]

    def draw(self, found: dict[str, Any], path: Path) -> None:
        inner.draw(found, path)


def _write(found: Mapping[str, Any], path: Path) -> None:
    with replacing(path) as draft:
        draft.write_text(json.dumps({**found, "checksum": _checksum(found)}) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    """Read a file that ``_write`` has written, exact to the last bit.

    Raises:
        ValueError: naming the file, if it is damaged or holds anything else.
    """
    with expecting("what this study has found", path, "delete it, and the same command makes it anew"):
        found = read_json(path)
        if found.pop("checksum") != _checksum(found):
            raise ValueError("its checksum is wrong")
        return found


def _checksum(found: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(found).encode())
