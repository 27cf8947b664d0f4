"""Swapping blocks in place: a swapped module only changes its class, to one derived from its own class.

So parameters, attributes, hooks, isinstance and state_dict stay unchanged, and undoing only changes the class back.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dtr_kernels.nn.block import check_hidden, check_scope
from dtr_kernels.ops.activations import parts_of
from dtr_kernels.routing import DenoisingTaskRouting, RandomRouting
from dtr_kernels.swap.classes import (
    TIMESTEP_NAMES,
    BlockState,
    ModelState,
    NoiseLevel,
    RoutedModel,
    Swapped,
    active_channels,
    block_class,
    model_class,
    routed_channels,
    timestep_argument,
)
from dtr_kernels.swap.family import Family
from dtr_kernels.swap.registry import FAMILIES, family_of
from dtr_kernels.swap.trial import swap_problem
from dtr_kernels.swap.views import Layers

Model = TypeVar("Model", bound=nn.Module)
Blocks = dict[str, tuple[Any, type[Family]]]


def swap_blocks(
    model: Model,
    routing: DenoisingTaskRouting | RandomRouting | None = None,
    scope: str = "block",
    noise_level: NoiseLevel | None = None,
) -> Model:
    """Make the DiT blocks of a model, or the residual blocks of a U-Net, run through the fused kernels, in place.

    Supported are the blocks of facebookresearch/DiT and its descendants (SiT), of LightningDiT and JiT, with RMSNorm,
    rotary embeddings and SwiGLU, of diffusers' DiTTransformer2DModel and of the DTR paper's public code, and the
    ResBlocks of guided-diffusion's U-Net (ADM), whose attention blocks stay unchanged.
    ``dtr_kernels.swap.register_family`` adds others. Parameters, hooks, state_dict keys and existing optimizers stay
    valid, and ``restore_blocks`` undoes the swap. Everything is checked before anything is changed, also by comparing
    the output of each block with the reference on a small random input.

    Args:
        model: the model, or a module around it (DDP). Call swap_blocks before torch.compile.
        routing: selects the active channels of a timestep among those of each block's input, whose number differs
            between the blocks of a U-Net. None keeps the model's own routing (the masks of the public DTR code), and
            leaves a model without one unrouted. The forward of a routed model must take its timesteps as the argument
            t, timestep or timesteps; for nested modules, the forward of the innermost one that runs all blocks.
        scope: "block" masks the whole residual block, as in the paper; "branch" masks the inputs of attention and MLP
            of a DiT block; "inner", this library's own, masks attention heads and the hidden channels of the MLP that
            go with them, so that inactive heads and channels are not computed anywhere.
        noise_level: a function [B] to [B] that maps the model's timesteps to those of the routing, if they differ. A
            routing takes integers 0..T-1, or floating-point noise levels in [0, 1], where 1 is noise, or with its
            ``float_timesteps`` floating-point timesteps 0..T-1. SiT counts the other way round, from noise at 0 to data
            at 1: ``def noise_level(t): return 1 - t``. The function must be importable, for copies of the model in
            other processes; a lambda is not.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: if routing or noise_level is something else.
        ValueError: if scope is unknown or one that a block does not have; if noise_level cannot be imported or there is
            no routing for it; if the model has no such block, is compiled or already swapped, has a block that computes
            something else or so few channels that the routing leaves none active, or is routed but takes no timesteps.
            The message names the block and says what was found, why it prevents the swap and what to do.
    """
    check_scope(scope)
    if not isinstance(routing, DenoisingTaskRouting | RandomRouting | None):
        raise TypeError(f"routing must be DenoisingTaskRouting, RandomRouting or None, got {routing!r}")
    _check_noise_level(noise_level, routing)
    _check_untouched(model)
    blocks = _find_blocks(model)
    _check_settings(blocks, routing, scope)
    channels = tuple(sorted({routed_channels(block, family, scope) for block, family in blocks.values()}))
    state = ModelState(routing, scope, channels, noise_level)

    swaps: list[tuple[Any, type, ModelState | BlockState]] = []
    routed = False
    for name, (block, family) in blocks.items():
        source = state if routing is not None else family.windows(block)
        new_class = block_class(block.__class__, family)  # type: ignore[arg-type]  # mypy takes no class for hashable
        swaps.append((block, new_class, BlockState(name, family, state, source)))
        routed = routed or source is not None
    if routed:
        owner = _find_owner(model, {block for block, _ in blocks.values()})
        swaps.append((owner, model_class(owner.__class__), state))

    for module, new_class, module_state in swaps:
        module._dtr = module_state
        module.__class__ = new_class
        if isinstance(module_state, BlockState):
            module_state.attach(module)
    return model


def restore_blocks(model: Model) -> Model:
    """Undo ``swap_blocks`` exactly: each module of ``model`` gets its own class and its own attributes back.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: if nothing in ``model`` is swapped; if a forward was patched since, which would still call the
            swapped one; or if a class was changed since, as ``fully_shard`` does.
    """
    swapped: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, Swapped)}
    if not swapped:
        raise ValueError(f"nothing to restore: no block of this {type(model).__name__} is swapped")
    for name, module in swapped.items():
        if module._dtr_method in vars(module):
            raise ValueError(
                f"cannot restore {_label(name, module)}: its {module._dtr_method} was patched since; unpatch it first"
            )
        if "_dtr_original" not in vars(type(module)):
            raise ValueError(
                f"cannot restore {_label(name, module)}: its class was changed since, as fully_shard does, which would "
                "be lost; restore the model before it is sharded"
            )
    for module in swapped.values():
        del module._dtr
        module.__class__ = module._dtr_original
    return model


def one_timestep(model: nn.Module) -> Callable[[Tensor, int | float, Mapping[str, Any]], Any]:
    """Return a function that calls a swapped model at one timestep that the host knows, as in sampling.

    The host then knows the window of the routing given to ``swap_blocks`` too, so that U-Nets convolve only the groups
    that it touches.

    Args:
        model: after ``swap_blocks``; the module whose own forward takes the timesteps, not one around it.

    Returns:
        A function of the model's first argument beside the timesteps, x [B, ...], the timestep, and the other arguments
        by name; it returns the model's output.

    Raises:
        TypeError: if no block of the model is swapped.
        ValueError: if the model takes no timesteps, or contains the module whose timesteps route it.
    """
    swapped_blocks: list[Any] = [module for module in model.modules() if is_block(module)]
    if not swapped_blocks:
        raise TypeError(f"no block of this {model._get_name()} is swapped; call swap_blocks first")
    argument = timestep_argument(type(model))
    if argument is None or any(isinstance(module, RoutedModel) and module is not model for module in model.modules()):
        raise ValueError(
            f"this {model._get_name()} is not the module that takes the timesteps of its blocks, as "
            f"{', '.join(TIMESTEP_NAMES)}; give the model inside it"
        )
    state: ModelState = swapped_blocks[0]._dtr.model
    times, _ = argument
    images = next(name for name in list(inspect.signature(type(model).forward).parameters)[1:] if name != times)

    def call(x: Tensor, t: int | float, conditioning: Mapping[str, Any]) -> Any:
        state.call.shared_t = t
        try:
            return model(**{images: x, times: torch.full((x.shape[0],), t, device=x.device)}, **conditioning)
        finally:
            state.call.shared_t = None

    return call


def is_block(module: object) -> bool:
    """Return whether a module is a swapped block; the model that routes blocks has a swapped class too, but is none."""
    return isinstance(module, Swapped) and isinstance(module._dtr, BlockState)


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is called through torch.compile: wrapped by it, or by its own ``compile()``."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _label(name: str, module: Any) -> str:
    kind = module._get_name()
    return f"{name!r} ({kind})" if name else f"this {kind}"


def _check_noise_level(noise_level: Any, routing: Any) -> None:
    if noise_level is None:
        return
    if not callable(noise_level):
        raise TypeError(f"noise_level must be a function of the timesteps or None, got {noise_level!r}")
    if routing is None:
        raise ValueError("noise_level says what a given routing takes for the model's timesteps; give a routing too")
    try:
        pickle.dumps(noise_level)
    except Exception as error:
        raise ValueError(
            f"noise_level must be a function that can be imported, as saved models find it by its name, got "
            f"{noise_level!r} ({error}); define it by def at the top of a module"
        ) from None


def _check_untouched(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Swapped):
            raise ValueError(f"cannot swap {_label(name, module)}: it is swapped already; call restore_blocks first")
        if is_compiled(module):
            raise ValueError(f"cannot swap {_label(name, module)}: it is compiled; swap first, then compile")


def _find_blocks(model: nn.Module) -> Blocks:
    """Return the blocks of a model and their families by name, after checking that all can be swapped."""
    blocks: Blocks = {}
    for name, module in model.named_modules():
        family = family_of(module)
        if family is None:
            continue
        problem = swap_problem(module, family)
        if problem is not None:
            raise ValueError(f"cannot swap block {_label(name, module)}: {problem}")
        blocks[name] = module, family
    if not blocks:
        known = ((family.name, family.anatomy or f"such as {family.__qualname__} matches") for family in FAMILIES)
        kinds = dict.fromkeys(f"no {name}, {anatomy}" for name, anatomy in known)
        raise ValueError(f"cannot swap {_label('', model)}: it has {'; and '.join(kinds)}")
    return blocks


def _check_settings(blocks: Blocks, routing: DenoisingTaskRouting | RandomRouting | None, scope: str) -> None:
    """Raise ValueError if a block does not have this scope, or if the routing leaves none of its channels active."""
    for name, (block, family) in blocks.items():
        if scope not in family.scopes:
            raise ValueError(
                f"cannot swap block {_label(name, block)}: a {family.name} has no scope {scope!r}; use "
                f"{' or '.join(map(repr, family.scopes))}"
            )
        try:
            if scope == "inner":
                _check_inner(family.layers(block), routing is None and family.windows(block) is not None)
            if routing is not None:
                t = torch.zeros(1, dtype=torch.long, device="cpu")
                active_channels(routing, t, routed_channels(block, family, scope))
        except ValueError as error:
            raise ValueError(f"cannot swap block {_label(name, block)}: {error}") from None


def _check_inner(layers: Layers, has_masks: bool) -> None:
    hidden = layers.mlp.fc1.out_features // parts_of(layers.kind.activation)
    check_hidden(hidden, layers.attn.num_heads, "those of its MLP")
    if has_masks:
        raise ValueError("its own masks are of channels, but scope 'inner' routes heads; give swap_blocks a routing")


def _find_owner(model: nn.Module, blocks: set[nn.Module]) -> Any:
    """Return the innermost module that contains all blocks and takes timesteps."""
    containers = {
        name: module
        for name, module in model.named_modules()
        if module not in blocks and blocks <= set(module.modules())
    }
    timed = {name: module for name, module in containers.items() if timestep_argument(type(module))}
    if not timed:
        raise ValueError(
            f"cannot route {_label('', model)}: no forward that runs all its blocks has an argument named "
            f"{', '.join(TIMESTEP_NAMES)}, looked for in {', '.join(_label(*item) for item in containers.items())}; "
            "rename the argument that holds the timesteps, and swap each model of a container separately"
        )
    name, owner = timed.popitem()
    if "forward" in vars(owner):
        raise ValueError(f"cannot route {_label(name, owner)}: its forward was patched; swap first, then patch it")
    return owner
