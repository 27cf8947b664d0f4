"""A whole DiT: its prediction, its gradients, a training step, and a guided step of sampling."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import sources
from benchmarks.cases import AUTOCAST, PASSES, Benchmark, Case, Options
from benchmarks.counts import ITEMSIZES, Work, adamw_step, dit_forward, dit_modulations, dit_training
from benchmarks.suite import _peers
from benchmarks.suite._models import TINY, make_dit
from benchmarks.suite._peers import (
    AUTOTUNED,
    COMPILED,
    MASKED,
    MAX_AUTOTUNE,
    SEED,
    SHARED_TIMESTEP,
    UNDER_AUTOCAST,
    UNROUTED,
    Axes,
    Cell,
    Forward,
    Gate,
)
from dtr_kernels import nn, reference
from dtr_kernels.sampling import Sampler

FUSED = "DiT"
REMEMBERED = "Sampler"
# Strength of guidance, and the label that stands for no label: the models here have no class for it.
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
    """Steps of training and of sampling. With options, all combinations of what they give."""
    _peers.check_passes(options, PASSES, "a model")
    if "sampling" in options.passes and "per sample" in options.windows:
        raise ValueError("--window must be shared for --pass sampling, whose samples all have one timestep")
    size = "quick" if options.quick else options.device.type
    cells = _peers.grid(options, _CENTRE[size], _STAR[size])
    fitting = (replace(cell, window="shared") if cell.pass_ == "sampling" else cell for cell in cells)
    return [partial(build, cell, options.device) for cell in dict.fromkeys(fitting)]


def build(cell: Cell, device: torch.device) -> Case:
    """One pass of a model by every side, all of which use the same parameters."""
    torch.compiler.reset()  # each case compiles for itself, and none is the one too many for PyTorch's limit
    piece = (GuidedStep if cell.pass_ == "sampling" else Prediction).of(cell, device)
    active, channels = cell.routing.window(piece.t, piece.model.hidden_size).width, piece.model.hidden_size
    exact = piece.exact(piece.mask)
    routed = partial(piece.side, gate=piece.gate(exact, piece.masked), work=piece.work(active))
    unrouted = partial(piece.side, gate=piece.gate(piece.exact(None), piece.unrouted), work=piece.work(channels))

    sides = [routed(MASKED, piece.masked), routed(MASKED + COMPILED, _peers.compiled(piece.masked))]
    if device.type == "cuda":
        sides.append(routed(MASKED + AUTOTUNED, _peers.compiled(piece.masked, MAX_AUTOTUNE)))
    if device.type == "cuda" and cell.precision == "bf16":
        wide = piece.under_autocast()
        sides.append(wide.side(UNDER_AUTOCAST, wide.masked, wide.gate(exact, wide.masked), wide.work(active)))
    sides += [
        unrouted(UNROUTED, piece.unrouted),
        unrouted(UNROUTED + COMPILED, _peers.compiled(piece.unrouted)),
        routed(FUSED, piece.fused),
        routed(FUSED + COMPILED, _peers.compiled(piece.fused)),
    ]
    if isinstance(piece, GuidedStep):
        sides.append(routed(REMEMBERED, piece.remembered(), work=piece.work(active) - piece.modulations()))

    notes = [
        _peers.ABOUT_PEERS,
        f"{FUSED} finds the windows from the timesteps in every call; {MASKED} is given its masks",
    ]
    if device.type == "cuda":
        notes.append(_peers.ABOUT_AUTOTUNED)
    if cell.pass_ == "step":
        notes.append(
            "a step is forward, backward and fused AdamW with a learning rate of 0, so that every side and every round "
            "finds the same parameters; peak MB is above parameters, gradients and the optimizer's state"
        )
    if cell.pass_ == "sampling":
        notes += [
            f"batch {cell.batch} is {2 * cell.batch} samples for the model: with labels, and without",
            f"{REMEMBERED} has met this timestep before: it reads the modulations it has remembered instead of the "
            "weights that make them, which is less work than the others have",
        ]
    return Case(
        f"{cell.model}, {cell}",
        sides,
        cell.coordinates,
        speedup_over=MASKED,
        matrix_dtype=cell.matrix_dtype,
        memory=piece.trains,
        notes=notes,
    )


@dataclass(frozen=True)
class Prediction(_peers.Whole):
    """A model, a batch, and what is computed of them."""

    cell: Cell
    model: nn.DiT
    optimizer: torch.optim.Optimizer
    x: Tensor
    t: Tensor | int
    times: Tensor
    y: Tensor
    mask: Tensor
    cotangent: Tensor

    plain = staticmethod(reference.dit)

    @classmethod
    def of(cls, cell: Cell, device: torch.device) -> Prediction:
        """Random parameters and inputs."""
        torch.manual_seed(SEED)
        model = make_dit(cell.model, device, cell.dtype, cell.routing, cell.scope)
        _peers.draw(model)
        with torch.no_grad():
            # Tokens get a mean, for the reason that ``_peers.tokens`` gives.
            model.get_parameter("x_embedder.proj.bias").add_(1)
        t = _peers.timesteps(cell, device)
        x = torch.randn(cell.batch, model.in_channels, model.input_size, model.input_size).to(device, cell.dtype)
        return cls(
            cell,
            model,
            _adamw(model, device),
            x,
            t,
            torch.as_tensor(t, device=device).expand(cell.batch),
            torch.randint(model.y_embedder.num_classes, (cell.batch,)).to(device),
            _peers.mask_of(cell.routing.window(t, model.hidden_size), x),
            torch.randn(cell.batch, model.out_channels, *x.shape[2:]).to(device, cell.dtype),
        )

    def under_autocast(self) -> Prediction:
        """The same values, with parameters and stream in fp32."""
        model = copy.deepcopy(self.model).float()
        return replace(
            self,
            cell=replace(self.cell, precision=AUTOCAST),
            model=model,
            optimizer=_adamw(model, self.x.device),
            x=self.x.float(),
            mask=self.mask.float(),
            cotangent=self.cotangent.float(),
        )

    @property
    def module(self) -> nn.DiT:
        return self.model

    def masked(self) -> Tensor:
        return self.plain(self.model, self.x, self.times, self.y, self.mask)

    def unrouted(self) -> Tensor:
        return self.plain(self.model, self.x, self.times, self.y)

    def fused(self) -> Tensor:
        return self.model(self.x, self.t, self.y)

    def exact(self, mask: Tensor | None) -> list[Tensor]:
        """In fp64 what a call returns."""
        inputs = self.x, self.times, self.y, mask
        exact = _peers.exact(self.plain, self.model, inputs, self.cotangent if self.trains else None)
        if self.cell.pass_ == "step":
            del exact[0]  # a step leaves gradients only
        return exact

    def gate(self, exact: Sequence[Tensor], eager: Forward) -> Gate:
        """For results in this precision, of which ``eager`` makes one."""
        return Gate(exact, self.call(self.in_precision(eager))(), self.cell.precision)

    def work(self, active: int) -> Work:
        """What the function of as many active channels needs."""
        model: Any = self.model
        block, items = model.blocks[0], ITEMSIZES[self.cell.precision]
        sizes: dict[str, Any] = {
            "B": 2 * len(self.x) if self.cell.pass_ == "sampling" else len(self.x),
            "N": model.pos_embed.shape[1],
            "C": model.hidden_size,
            "W": active,
            "H": block.mlp.fc1.out_features,
            "depth": len(model.blocks),
            "patch_inputs": model.x_embedder.proj.weight[0].numel(),
            "patch_outputs": model.final_layer.linear.out_features,
            "items": items,
            "scope": self.cell.scope,
        }
        if not self.trains:
            return dit_forward(**sizes)
        work = dit_training(heads=block.attn.num_heads, **sizes)
        if self.cell.pass_ == "step":
            work += adamw_step(sum(p.numel() for p in _peers.trainable(model)), items.stream)
        return work

    def call(self, forward: Forward) -> Callable[[], list[Tensor]]:
        parameters = _peers.trainable(self.model)

        def step() -> list[Tensor]:
            self.optimizer.zero_grad()
            forward().backward(self.cotangent)
            self.optimizer.step()
            return [p.grad for p in parameters if p.grad is not None]

        if self.cell.pass_ == "step":
            return step
        if self.cell.pass_ == "training":
            return _peers.with_gradients(forward, parameters, self.cotangent)
        return _peers.without_graph(forward)


def _adamw(model: nn.DiT, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_peers.trainable(model), lr=0.0, fused=True, capturable=device.type == "cuda")


def guided_step(model: nn.DiT, x: Tensor, t: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """A step of DDIM with classifier-free guidance in plain PyTorch: ``DiT.forward_with_cfg``, then ``ddim``."""
    masks = None if mask is None else torch.cat([mask, mask])
    labels = torch.cat([y, torch.full_like(y, NO_LABEL)])
    out = reference.dit(model, torch.cat([x, x]), torch.cat([t, t]), labels, masks)
    conditional, unconditional = out[:, : model.in_channels].chunk(2)
    return ddim(x, unconditional + GUIDANCE * (conditional - unconditional))


class GuidedStep(Prediction):
    """The step from noise at one timestep to noise at the next."""

    plain = staticmethod(guided_step)

    def fused(self) -> Tensor:
        labels = torch.cat([self.y, torch.full_like(self.y, NO_LABEL)])
        out = self.model.forward_with_cfg(torch.cat([self.x, self.x]), self.t, labels, GUIDANCE)
        return ddim(self.x, out[: len(self.x), : self.model.in_channels])

    def remembered(self) -> Forward:
        """The step by a ``Sampler``. (On a GPU the stopwatch makes a CUDA graph of it, as of the other sides.)"""
        labels = torch.cat([self.y, torch.full_like(self.y, NO_LABEL)])
        sampler = Sampler(self.model.eval(), guidance_scale=GUIDANCE, y=labels)
        return lambda: ddim(self.x, sampler(self.x, self.t)[:, : self.model.in_channels])

    def modulations(self) -> Work:
        """The part of a step that a ``Sampler`` remembers."""
        model = self.model
        return dit_modulations(2 * len(self.x), model.hidden_size, len(model.blocks), ITEMSIZES[self.cell.precision])


def _signal(t: int) -> float:
    """What is left of the image's variance at timestep t, with DDPM's linear schedule."""
    return math.prod(1 - (1e-4 + (0.02 - 1e-4) * step / 999) for step in range(t + 1))


# In ten steps from 999 to 0: large ones, so that errors of the prediction are seen.
_NOW, _NEXT = _signal(SHARED_TIMESTEP), _signal(SHARED_TIMESTEP - 100)


def ddim(x: Tensor, noise: Tensor) -> Tensor:
    """The deterministic update of DDIM (Song et al., 2021): x at the next timestep, given the noise predicted in it."""
    image = (x - math.sqrt(1 - _NOW) * noise) / math.sqrt(_NOW)
    return math.sqrt(_NEXT) * image + math.sqrt(1 - _NEXT) * noise


BENCHMARK = Benchmark(
    "model",
    "A whole DiT, routed by our kernels, by the masked reference, and unrouted: training and guided sampling.",
    cases,
    sources=(*sources.BLOCKS, "dtr_kernels/sampling.py"),
)
