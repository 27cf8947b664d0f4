"""Blocks of facebookresearch/DiT and its descendants: timm's Attention and Mlp between adaLN modulations."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtr_kernels import reference
from dtr_kernels.nn.block import RoutedDiTBlock, Stream, advance
from dtr_kernels.routing import ChannelWindow
from dtr_kernels.swap.checks import call_problems, dropout_problems, has, missing_problems, parameter_problems
from dtr_kernels.swap.family import Family, RandomTensor, Unfit

_NEEDED = ("norm1", "attn.qkv", "attn.num_heads", "attn.proj", "norm2", "mlp.fc1", "mlp.act", "mlp.fc2")
# Of these the fused forward calls the first, whatever they are, and reads the parameters of the second.
_CALLED = ("attn.proj", "attn.q_norm", "attn.k_norm", "adaLN_modulation")
_READ = ("attn.qkv", "mlp.fc1", "mlp.fc2")


class DiT(Family):
    """The family of facebookresearch/DiT: blocks without a routing of their own."""

    name = "DiT block"
    anatomy = (
        "a module with children norm1, attn (with qkv and proj), norm2, mlp (with fc1, act and fc2) and "
        "adaLN_modulation"
    )
    scopes = reference.SCOPES

    @staticmethod
    def matches(block: nn.Module) -> bool:
        children = dict(block.named_children())
        return "attn" in children and "adaLN_modulation" in children

    @staticmethod
    def problems(block: Any) -> Iterator[str]:
        if isinstance(block, RoutedDiTBlock):
            yield "it runs the fused kernels as it is; give dtr_kernels.nn.DiT its routing when constructing it"
        yield from missing_problems(block, _NEEDED, DiT.name)
        yield from call_problems(block, ("forward",), _CALLED)
        yield from _linear_problems(block)
        yield from _norm_problems(block)
        yield from _extra_problems(block)

    @staticmethod
    def channels(block: Any) -> int:
        return block.attn.qkv.in_features

    @staticmethod
    def weight(block: Any) -> Tensor:
        return block.attn.qkv.weight

    @staticmethod
    def run(block: Any, x: Tensor, c: Tensor, window: ChannelWindow | None, scope: str) -> Tensor:
        return advance(block, Stream(x), c, window, scope).sum()

    @staticmethod
    def run_plain(block: Any, x: Tensor, c: Tensor, mask: Tensor | None, scope: str) -> Tensor:
        return reference.dit_block(block, x, c, mask, scope)

    @staticmethod
    def trial_input(copy: Any, random: RandomTensor) -> tuple[Tensor, Tensor]:
        C = DiT.channels(copy)
        return random(2, 3, C), random(2, C)

    @staticmethod
    def prepare_trial(copy: Any, c: Tensor, random: RandomTensor) -> Tensor | None:
        C = DiT.channels(copy)
        modulation = list(copy.adaLN_modulation(c).shape)
        if modulation != [2, 6 * C]:
            raise Unfit(f"adaLN_modulation makes {modulation} of c [2, {C}], not six vectors [2, {C}]; do not swap it")
        copy.adaLN_modulation = _OpenGates(copy.adaLN_modulation, random(2, 6 * C))
        return None


class _OpenGates(nn.Module):
    """An adaLN modulation and something random on top: that of a fresh DiT is zero, which would hide any difference."""

    def __init__(self, modulation: nn.Module, random: Tensor) -> None:
        super().__init__()
        self.modulation = modulation
        self.random = random

    def forward(self, c: Tensor) -> Tensor:
        return self.modulation(c) + self.random + c.repeat(1, 6)


def _linear_problems(block: Any) -> Iterator[str]:
    attn, mlp = block.attn, block.mlp
    for name in _READ:
        layer = attrgetter(name)(block)
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            yield f"{name} is {type(layer).__name__}, but the kernels read an nn.Linear's weight; merge it into one"
    C = attn.qkv.in_features
    if attn.num_heads < 1 or C % attn.num_heads:
        yield f"attn.num_heads is {attn.num_heads}, which does not divide the hidden size {C}"
    expected = {"attn.qkv": (C, 3 * C), "mlp.fc1": (C, mlp.fc1.out_features), "mlp.fc2": (mlp.fc1.out_features, C)}
    if isinstance(attn.proj, nn.Linear):
        expected["attn.proj"] = (C, C)
    for name, (inputs, outputs) in expected.items():
        layer = attrgetter(name)(block)
        if (layer.in_features, layer.out_features) != (inputs, outputs):
            yield (
                f"{name} maps {layer.in_features} features to {layer.out_features}, but attn.qkv reads a hidden size "
                f"of {C}, for which it must map {inputs} to {outputs}; leave this model unswapped"
            )


def _norm_problems(block: Any) -> Iterator[str]:
    C = block.attn.qkv.in_features
    for name in ("norm1", "norm2"):
        norm = getattr(block, name)
        if not isinstance(norm, nn.LayerNorm):
            yield f"{name} is {type(norm).__name__}; the fused norm is nn.LayerNorm without affine parameters"
        elif norm.weight is not None or norm.bias is not None:
            yield f"{name} has affine parameters, which the fused norm has not; use elementwise_affine=False"
        elif tuple(norm.normalized_shape) != (C,):
            yield f"{name} normalises shape {list(norm.normalized_shape)}, but the hidden size is {C}"
    # Norms that some versions of timm put elsewhere. q_norm and k_norm are called, so those may be anything.
    for name in ("attn.norm", "mlp.norm"):
        if has(block, name) and not isinstance(attrgetter(name)(block), nn.Identity):
            yield f"{name} is not nn.Identity, and the fused forward leaves it out; construct the block without it"


def _extra_problems(block: Any) -> Iterator[str]:
    for name in ("gate", "rope"):
        if getattr(block.attn, name, None) is not None:
            yield f"attn.{name} is set, which the fused attention leaves out; construct the attention without it"
    yield from dropout_problems(block)
    yield from parameter_problems(block, _CALLED + _READ)
    z = torch.linspace(-4, 4, 33, device="cpu")
    if not torch.allclose(block.mlp.act(z), F.gelu(z, approximate="tanh"), atol=1e-5):
        yield f'mlp.act is {block.mlp.act}, but the fused MLP computes nn.GELU(approximate="tanh")'
