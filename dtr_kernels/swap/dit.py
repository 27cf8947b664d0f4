"""Blocks of facebookresearch/DiT and its descendants: timm's Attention and Mlp between adaLN modulations."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from operator import attrgetter
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtr_kernels.nn.block import RoutedDiTBlock
from dtr_kernels.routing import ChannelWindow

# Attributes of torch.nn.Module that hold the hooks around its forward.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_NEEDED = ("norm1", "attn.qkv", "attn.num_heads", "attn.proj", "norm2", "mlp.fc1", "mlp.act", "mlp.fc2")
# Of these the fused forward calls the first, whatever they are, and reads the parameters of the second.
_CALLED = ("attn.proj", "attn.q_norm", "attn.k_norm", "adaLN_modulation")
_READ = ("attn.qkv", "mlp.fc1", "mlp.fc2")


class WindowSource(Protocol):
    """Where a block finds the channels it computes, while the forward of its model runs."""

    def window_of(self, block: Any) -> ChannelWindow | Tensor | None:
        """The window of each sample; or a mask [B, C] (1 = active), which runs the plain PyTorch path."""


class DiT:
    """The family of facebookresearch/DiT: blocks without a routing of their own."""

    @staticmethod
    def matches(block: nn.Module) -> bool:
        """Whether the module is meant to be a block of this family; ``problems`` says whether it can be swapped."""
        children = dict(block.named_children())
        return "attn" in children and "adaLN_modulation" in children

    @staticmethod
    def windows(block: nn.Module) -> WindowSource | None:
        """The source of the block's own windows, None where the block is unrouted."""
        return None

    @staticmethod
    def set_trial_tasks(block: Any) -> Tensor | None:
        """Readies a copy of a block for a trial batch of two; returns the mask [2, C] it applies, None for none."""
        return None

    @staticmethod
    def problems(block: Any) -> Iterator[str]:
        """Why the block cannot be swapped: what was found, why it is in the way, what to do.

        Ends with the first problem that keeps the later questions from being asked; yields nothing for a good block.
        """
        if isinstance(block, RoutedDiTBlock):
            yield "it runs the fused kernels as it is; give dtr_kernels.nn.DiT its routing when constructing it"
            return
        missing = [path for path in _NEEDED if not _has(block, path)]
        if missing:
            yield f"it has no {', '.join(missing)}, which a DiT block has; leave this model unswapped"
            return
        yield from _call_problems(block)
        yield from _linear_problems(block)
        yield from _norm_problems(block)
        yield from _extra_problems(block)


def _has(block: nn.Module, path: str) -> bool:
    try:
        attrgetter(path)(block)
    except AttributeError:
        return False
    return True


def _within(name: str, paths: tuple[str, ...]) -> bool:
    return any(name == path or name.startswith(path + ".") for path in paths)


def _call_problems(block: nn.Module) -> Iterator[str]:
    """A forward that takes something else than (x, c), and code attached to modules that would no longer be called."""
    parameters = list(inspect.signature(type(block).forward).parameters)[1:]
    if len(parameters) != 2:
        yield f"its forward takes ({', '.join(parameters)}), but only forward(x, c) can be replaced; leave it unswapped"
    for name, module in block.named_modules():
        if "forward" in vars(module):
            yield f"the forward of {name or 'its instance'} was patched, which would be lost; swap first, then patch it"
        if name and any(getattr(module, hooks) for hooks in HOOKS) and not _within(name, _CALLED):
            yield f"{name} has hooks, which would never run; remove them, or put them on the block itself"


def _linear_problems(block: Any) -> Iterator[str]:
    attn, mlp = block.attn, block.mlp
    for name in _READ:
        layer = attrgetter(name)(block)
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            yield f"{name} is {type(layer).__name__}, but the kernels read an nn.Linear's weight; merge it into one"
            return
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
        if _has(block, name) and not isinstance(attrgetter(name)(block), nn.Identity):
            yield f"{name} is not nn.Identity, and the fused forward leaves it out; construct the block without it"


def _extra_problems(block: Any) -> Iterator[str]:
    for name in ("gate", "rope"):
        if getattr(block.attn, name, None) is not None:
            yield f"attn.{name} is set, which the fused attention leaves out; construct the attention without it"
    for name, module in block.named_modules():
        rate = getattr(module, "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "drop_prob", 0)
        if rate:
            yield f"{name} drops with probability {rate}, which the fused forward never does; set it to 0"
    for name, _ in block.named_parameters():
        if not _within(name, _CALLED + _READ):
            yield f"it has a parameter {name}, which the fused forward would not use; leave this model unswapped"
    z = torch.linspace(-4, 4, 33, device="cpu")
    if not torch.allclose(block.mlp.act(z), F.gelu(z, approximate="tanh"), atol=1e-5):
        yield f'mlp.act is {block.mlp.act}, but the fused MLP computes nn.GELU(approximate="tanh")'
