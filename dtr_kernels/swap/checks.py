"""Checks that families make of a block before it is swapped; each yields problems, like ``Family.problems``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from dtr_kernels import reference
from dtr_kernels.ops.activations import parts_of
from dtr_kernels.swap.views import Layers, linear_layers

# Attributes of torch.nn.Module that hold the hooks around its forward.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has(block: Any, path: str) -> bool:
    """Return whether the block has an attribute, given as a dotted path."""
    try:
        attrgetter(path)(block)
    except AttributeError:
        return False
    return True


def is_within(name: str, paths: tuple[str, ...]) -> bool:
    """Return whether a module's path is one of ``paths`` or below one."""
    return any(name == path or name.startswith(path + ".") for path in paths)


# --- of any block


def missing_problems(block: Any, needed: tuple[str, ...], name: str) -> Iterator[str]:
    """Report the attributes, given as dotted paths, that the block lacks."""
    missing = [path for path in needed if not has(block, path)]
    if missing:
        parents = dict.fromkeys(path.rpartition(".")[0] for path in missing)
        kinds = [f"{path} is {type(attrgetter(path)(block)).__name__}" for path in parents if path and has(block, path)]
        found = f" ({', '.join(kinds)})" if kinds else ""
        yield f"it has no {', '.join(missing)}{found}, which a {name} has; leave this model unswapped"


def argument_problems(block: nn.Module, arguments: Callable, method: str) -> Iterator[str]:
    """Report ``forward``, and the method that swapping replaces, if their arguments differ from ``arguments``."""
    expected = list(inspect.signature(arguments).parameters.values())
    required = [parameter for parameter in expected if parameter.default is parameter.empty]
    optional = [parameter.name for parameter in expected[len(required) :]]
    for name in dict.fromkeys(("forward", method)):
        names = list(inspect.signature(getattr(type(block), name)).parameters)[1:]
        if len(names) < len(required) or names[len(required) :] != optional[: len(names) - len(required)]:
            rotary = " (rotary position embedding, RoPE)" if any("rope" in argument for argument in names) else ""
            yield (
                f"its {name} takes ({', '.join(names)}){rotary}, but the one that would replace it takes "
                f"({', '.join(parameter.name for parameter in expected)}); leave it unswapped"
            )


def patch_problems(block: nn.Module, called: tuple[str, ...], method: str) -> Iterator[str]:
    """Report code attached to modules that would not be called."""
    if not hasattr(block, "_dtr"):  # a patch of a swapped block calls the fused method
        for patched in dict.fromkeys(("forward", method)):
            if patched in vars(block):
                yield f"the {patched} of its instance was patched, which would be lost; swap first, then patch it"
    for name, module in block.named_modules():
        if not name or is_within(name, called):
            continue
        if "forward" in vars(module):
            yield f"the forward of {name} was patched, which would be lost; leave this model unswapped"
        if any(getattr(module, hooks) for hooks in HOOKS):
            yield f"{name} has hooks, which would never run; remove them, or put them on the block itself"


def dropout_problems(block: nn.Module, called: tuple[str, ...] = ()) -> Iterator[str]:
    """Report dropout in parts that are not called."""
    for name, module in block.named_modules():
        rate = getattr(module, "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "drop_prob", 0)
        if rate and not is_within(name, called):
            yield f"{name} drops with probability {rate}, which the fused forward never does; set it to 0"


def parameter_problems(block: nn.Module, used: tuple[str, ...]) -> Iterator[str]:
    """Report parameters outside the parts that are used."""
    for name, _ in block.named_parameters():
        if not is_within(name, used):
            yield f"it has a parameter {name}, which the fused forward would not use; leave this model unswapped"


# --- of the layers of a DiT block; ``names`` maps the id of each module to its path within the block

PARTS = ("norm1", "attn.qkv", "attn.num_heads", "attn.proj", "norm2", "mlp.fc1", "mlp.act", "mlp.fc2")


def linear_problems(layers: Layers, names: dict[int, str]) -> Iterator[str]:
    attn, mlp = layers.attn, layers.mlp
    named = {
        path: [(names.get(id(layer), path), layer) for layer in linear_layers(attrgetter(path)(layers))]
        for path in ("attn.qkv", "mlp.fc1", "mlp.fc2", "attn.proj")
    }
    for name, layer in (*named["attn.qkv"], *named["mlp.fc1"], *named["mlp.fc2"]):
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
            yield f"{name} is {kind}, but the kernels read an nn.Linear's weight; merge it into one"
    C = attn.qkv.in_features
    if attn.num_heads < 1 or C % attn.num_heads:
        yield f"attn.num_heads is {attn.num_heads}, which does not divide the hidden size {C}"
    hidden = mlp.fc1.out_features // parts_of(layers.kind.activation)
    expected = {"attn.qkv": (C, 3 * C), "mlp.fc1": (C, mlp.fc1.out_features), "mlp.fc2": (hidden, C)}
    if isinstance(attn.proj, nn.Linear):
        expected["attn.proj"] = (C, C)
    for path, (inputs, outputs) in expected.items():
        for name, layer in named[path]:
            part = outputs // len(named[path])
            if (layer.in_features, layer.out_features) != (inputs, part):
                yield (
                    f"{name} maps {layer.in_features} features to {layer.out_features}, but {named['attn.qkv'][0][0]} "
                    f"reads a hidden size of {C}, for which it must map {inputs} to {part}; leave this model unswapped"
                )
    for path in ("attn.qkv", "mlp.fc1"):
        if len({layer.bias is None for _, layer in named[path]}) > 1:
            yield f"some of {', '.join(name for name, _ in named[path])} have a bias and some not; give all one"


def norm_kind_problems(layers: Layers, names: dict[int, str]) -> Iterator[str]:
    for path in ("norm1", "norm2"):
        norm = getattr(layers, path, None)
        if norm is None:
            continue
        name = names.get(id(norm), path)
        if layers.kind.norm == "layer" and not isinstance(norm, nn.LayerNorm):
            yield f"{name} is {type(norm).__name__}; the fused norm is nn.LayerNorm"
        if layers.kind.norm == "rms" and "RMSNorm" not in type(norm).__name__:
            yield f"{name} is {type(norm).__name__}; the fused norms are nn.LayerNorm and RMSNorm, and both the same"


def norm_problems(layers: Layers, names: dict[int, str]) -> Iterator[str]:
    C = layers.attn.qkv.in_features
    for path, norm in (("norm1", layers.norm1), ("norm2", layers.norm2)):
        name = names.get(id(norm), path)
        if not isinstance(getattr(norm, "eps", None), float):
            yield f"{name} has no number eps, so that it depends on the dtype; construct the norm with one"
        elif layers.kind.affine:
            if norm.weight is None or tuple(norm.weight.shape) != (C,):
                found = None if norm.weight is None else list(norm.weight.shape)
                yield f"{name} has a weight of shape {found}, but must have one of the hidden size, [{C}]"
        elif norm.weight is not None or getattr(norm, "bias", None) is not None:
            yield f"{name} has affine parameters, which the fused norm has not; use elementwise_affine=False"
        elif isinstance(norm, nn.LayerNorm) and tuple(norm.normalized_shape) != (C,):
            yield f"{name} normalises shape {list(norm.normalized_shape)}, but the hidden size is {C}"
    # Norms that some versions of timm put elsewhere. q_norm and k_norm are called, so they may be anything.
    for path, part in (("attn.norm", layers.attn), ("mlp.norm", layers.mlp)):
        if not isinstance(getattr(part, "norm", nn.Identity()), nn.Identity):
            yield f"{path} is not nn.Identity, and the fused forward leaves it out; construct the block without it"
    for name in ("gate", "rope"):
        if getattr(layers.attn, name, None) is not None:
            yield f"attn.{name} is set, which the fused attention leaves out; construct the attention without it"


def function_problems(layers: Layers, names: dict[int, str]) -> Iterator[str]:
    act, z = layers.mlp.act, torch.linspace(-4, 4, 33, device="cpu")
    kind = "silu" if layers.kind.activation == "swiglu" else layers.kind.activation
    if not torch.allclose(act(z), reference.activate(z, kind), atol=1e-5):
        expected = {"gelu_tanh": 'nn.GELU(approximate="tanh")', "gelu": "nn.GELU()", "silu": "nn.SiLU()"}[kind]
        yield f"{names.get(id(act), 'mlp.act')} is {act}, but the fused MLP computes {expected}"
