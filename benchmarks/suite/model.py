"""A whole DiT: its prediction, its gradients, a training step, and a guided step of sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import PASSES, Benchmark, Case, Cell, Options
from benchmarks.counts import ITEMSIZES, Dit, Work, adamw_step, dit_forward, dit_modulations, dit_training
from benchmarks.suite import whole
from benchmarks.suite.models import TINY, dit_channels, make_dit
from benchmarks.suite.whole import MASKED, SEED, SHARED_TIMESTEP, Axes, Forward, Whole
from dtr_kernels import reference
from dtr_kernels.sampling import Sampler

FUSED = "DiT"
REMEMBERED = "Sampler"
# Strength of guidance, and the label that means no label: the models here have no class for it.
GUIDANCE, NO_LABEL = 4.0, 0

_COMMON: Axes = {"precision": ("fp32",), "scope": ("block",), "window": ("per sample",), "beta": (0.8,)}
_CENTRE: dict[str, Axes] = {
    "quick": {**_COMMON, "model": (TINY,), "batch": (4,), "pass_": PASSES},
    "cpu": {**_COMMON, "model": ("DiT-S/2",), "batch": (8,), "pass_": ("training", "step")},
    "cuda": {**_COMMON, "model": ("DiT-XL/2",), "batch": (32,), "precision": ("bf16",), "pass_": ("step",)},
}
_STAR: dict[str, Sequence[Axes]] = {
    "quick": (),
    "cpu": ({"pass_": ("sampling",), "batch": (1, 8), "precision": ("fp32", "bf16")},),
    "cuda": ({"pass_": ("sampling",), "batch": (1, 32)}, {"model": ("DiT-S/2",), "batch": (256,)}),
}


def cases(options: Options) -> list[Callable[[], Case]]:
    """Return steps of training and of sampling; with options, all their combinations."""
    options.check("model", "a model")
    if "sampling" in options.asked.get("pass_", ()) and "per sample" in options.asked.get("window", ()):
        raise ValueError("--window must be shared for --pass sampling, whose samples all have one timestep")
    cells = whole.grid(options, dit_channels, _CENTRE[options.size], _STAR[options.size])
    fitting = (replace(cell, window="shared") if cell.pass_ == "sampling" else cell for cell in cells)
    return [partial(build, cell, options.device) for cell in dict.fromkeys(fitting)]


def build(cell: Cell, device: torch.device) -> Case:
    """Build one pass of a model by every side, all with the same parameters."""
    torch.compiler.reset()  # each case compiles anew, below PyTorch's limit of recompilations
    piece = (GuidedStep if cell.pass_ == "sampling" else Prediction).of(cell, device)
    sides = piece.sides(FUSED)
    notes = [
        whole.ABOUT_PEERS,
        f"{FUSED} finds the windows from the timesteps in every call; {MASKED} is given its masks",
    ]
    if cell.pass_ == "step":
        notes.append(
            "a step is forward, backward and fused AdamW with a learning rate of 0, so that every side and every round "
            "finds the same parameters; peak MB is above parameters, gradients and the optimizer's state"
        )
    if isinstance(piece, GuidedStep):
        remembered = piece.routed(REMEMBERED, piece.remembered())
        sides.append(replace(remembered, work=remembered.work - piece.modulations()))
        notes += [
            f"batch {cell.batch} is {2 * cell.batch} samples for the model: with labels, and without",
            f"{REMEMBERED} has met this timestep before: it reads the modulations it has remembered instead of the "
            "weights that make them, which is less work than the others have",
        ]
    return piece.case(f"{cell.model}, {cell}", sides, notes)


@dataclass(frozen=True)
class Prediction(Whole):
    """A model of x, timesteps and labels."""

    t: Tensor | int  # the timesteps as passed to our model

    @classmethod
    def of(cls, cell: Cell, device: torch.device) -> Prediction:
        """Draw random parameters and inputs."""
        torch.manual_seed(SEED)
        model = make_dit(cell.model, device, cell.dtype, cell.routing, cell.scope)
        whole.draw(model)
        with torch.no_grad():
            # Tokens get a mean, for the reason in ``whole.tokens``.
            model.get_parameter("x_embedder.proj.bias").add_(1)
        t = whole.timesteps(cell, device)
        x = torch.randn(cell.batch, model.in_channels, model.input_size, model.input_size).to(device, cell.dtype)
        y = torch.randint(model.y_embedder.num_classes, (cell.batch,)).to(device)
        window = cell.routing.window(t, model.routed_channels)
        cotangent = torch.randn(cell.batch, model.out_channels, *x.shape[2:]).to(device, cell.dtype)
        batch = (x, torch.as_tensor(t, device=device).expand(cell.batch), y)
        return cls(cell, model, batch, cotangent, window, whole.mask_of(window, x), t)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """An AdamW with learning rate 0, which changes nothing."""
        capturable = self.x.device.type == "cuda"
        return torch.optim.AdamW(whole.trainable(self.module), lr=0.0, fused=True, capturable=capturable)

    def plain(self, module: Any, *batch: Any) -> Tensor:
        return reference.dit(module, *batch)

    def fused(self) -> Tensor:
        return self.module(self.x, self.t, self.batch[2])

    def exact(self, mask: Tensor | None) -> list[Tensor]:
        exact = super().exact(mask)
        return exact[1:] if self.cell.pass_ == "step" else exact  # a step leaves only gradients

    def work(self, active: int) -> Work:
        model = self.module
        samples = 2 * len(self.x) if self.cell.pass_ == "sampling" else len(self.x)
        dit = Dit(
            self.sizes(model.blocks[0], samples, model.pos_embed.shape[1], active),
            depth=len(model.blocks),
            patch_inputs=model.x_embedder.proj.weight[0].numel(),
            patch_outputs=model.final_layer.linear.out_features,
        )
        if self.cell.pass_ == "step":
            parameters = sum(p.numel() for p in whole.trainable(model))
            return dit_training(dit) + adamw_step(parameters, ITEMSIZES[self.cell.precision].stream)
        return dit_training(dit) if self.trains else dit_forward(dit)

    def call(self, forward: Forward) -> Callable[[], list[Tensor]]:
        if self.cell.pass_ != "step":
            return super().call(forward)

        def step() -> list[Tensor]:
            self.optimizer.zero_grad()
            forward().backward(self.cotangent)
            self.optimizer.step()
            return [p.grad for p in whole.trainable(self.module) if p.grad is not None]

        return step


class GuidedStep(Prediction):
    """A guided step from noise at one timestep to noise at the next, with classifier-free guidance."""

    def plain(self, module: Any, *batch: Any) -> Tensor:
        x, t, y, mask = batch
        masks = None if mask is None else torch.cat([mask, mask])
        labels = torch.cat([y, torch.full_like(y, NO_LABEL)])
        out = reference.dit(module, torch.cat([x, x]), torch.cat([t, t]), labels, masks)
        conditional, unconditional = out[:, : module.in_channels].chunk(2)
        return ddim(x, unconditional + GUIDANCE * (conditional - unconditional))

    @property
    def _labels(self) -> Tensor:
        y = self.batch[2]
        return torch.cat([y, torch.full_like(y, NO_LABEL)])

    def fused(self) -> Tensor:
        out = self.module.forward_with_cfg(torch.cat([self.x, self.x]), self.t, self._labels, GUIDANCE)
        return ddim(self.x, out[: len(self.x), : self.module.in_channels])

    def remembered(self) -> Forward:
        """Return the step by a ``Sampler``. (On a GPU the stopwatch records it as a graph, like the other sides.)"""
        sampler = Sampler(self.module.eval(), guidance_scale=GUIDANCE, y=self._labels)
        return lambda: ddim(self.x, sampler(self.x, self.t)[:, : self.module.in_channels])

    def modulations(self) -> Work:
        """Count the part of a step that a ``Sampler`` remembers."""
        model, items = self.module, ITEMSIZES[self.cell.precision]
        return dit_modulations(2 * len(self.x), model.hidden_size, len(model.blocks), items)


def _signal(t: int) -> float:
    """Return the share of the image's variance left at timestep t, with DDPM's linear schedule."""
    return math.prod(1 - (1e-4 + (0.02 - 1e-4) * step / 999) for step in range(t + 1))


# One of ten steps from 999 to 0: steps so large that errors of the prediction show.
_NOW, _NEXT = _signal(SHARED_TIMESTEP), _signal(SHARED_TIMESTEP - 100)


def ddim(x: Tensor, noise: Tensor) -> Tensor:
    """Apply DDIM's deterministic update (Song et al., 2021): x at the next timestep, given the predicted noise."""
    image = (x - math.sqrt(1 - _NOW) * noise) / math.sqrt(_NOW)
    return math.sqrt(_NEXT) * image + math.sqrt(1 - _NEXT) * noise


BENCHMARK = Benchmark(
    "model",
    "A whole DiT, routed by our kernels, by the masked reference, and unrouted: training and guided sampling.",
    cases,
)
