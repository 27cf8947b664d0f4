"""Swapping blocks in place: a swapped module only changes its class, to one derived from its own.

So parameters, attributes, hooks, isinstance and state_dict stay what they were, and undoing is changing the class back.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from dtr_kernels.nn.block import check_scope
from dtr_kernels.routing import DenoisingTaskRouting, RandomRouting
from dtr_kernels.swap.classes import (
    TIMESTEP_NAMES,
    BlockState,
    ModelState,
    Swapped,
    active_channels,
    block_class,
    model_class,
    timestep_argument,
)
from dtr_kernels.swap.dit import DiT
from dtr_kernels.swap.family import Family
from dtr_kernels.swap.public_dtr import PublicDTR
from dtr_kernels.swap.trial import trial_problem
from dtr_kernels.swap.unet import ADM

Model = TypeVar("Model", bound=nn.Module)
Blocks = dict[str, tuple[Any, type[Family]]]

# A block belongs to the first family that matches it.
FAMILIES: list[type[Family]] = [PublicDTR, DiT, ADM]


def swap_blocks(
    model: Model, routing: DenoisingTaskRouting | RandomRouting | None = None, scope: str = "block"
) -> Model:
    """Lets the DiT blocks of a model, or the residual blocks of a U-Net, run through the fused kernels, in place.

    Known are the blocks of facebookresearch/DiT and its descendants, those of the DTR paper's public code, and the
    ResBlocks of guided-diffusion's U-Net (ADM), whose attention blocks stay as they are. Parameters, hooks, state_dict
    keys and optimizers made before stay too, and ``restore_blocks`` undoes it. Everything is checked before anything is
    changed, also by comparing the output of each block with that of the plain one on a small random input.

    Args:
        model: the model, or a module around it (DDP). Call swap_blocks before torch.compile.
        routing: which channels a timestep activates, out of those of each block's input, which in a U-Net are more in
            some blocks than in others. None keeps the model's own routing (the masks of the public DTR code) and leaves
            a model that has none unrouted. A routed model must take its timesteps as the argument t, timestep or
            timesteps of its forward: of the innermost one that runs all blocks.
        scope: what the routing masks: "block", the whole residual block as in the paper, or "branch", what attention
            and MLP of a DiT block each see.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: if routing is something else.
        ValueError: if scope is unknown or one that a block does not have, if the model has no such block, is compiled
            or already swapped, has a block that computes something else or so few channels that the routing leaves none
            active, or is routed but takes no timesteps. The message names the block and says what was found, why it is
            in the way and what to do.
    """
    check_scope(scope)
    if not isinstance(routing, DenoisingTaskRouting | RandomRouting | None):
        raise TypeError(f"routing must be DenoisingTaskRouting, RandomRouting or None, got {routing!r}")
    _check_untouched(model)
    blocks = _find_blocks(model)
    _check_settings(blocks, routing, scope)
    state = ModelState(routing, scope, tuple(sorted({family.channels(block) for block, family in blocks.values()})))

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
    return model


def restore_blocks(model: Model) -> Model:
    """Undoes ``swap_blocks`` exactly: each module of ``model`` is of its own class and has its own attributes again.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: if nothing in ``model`` is swapped, or if a forward was patched since, which would go on calling
            the swapped one.
    """
    swapped: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, Swapped)}
    if not swapped:
        raise ValueError(f"nothing to restore: no block of this {type(model).__name__} is swapped")
    for name, module in swapped.items():
        if module._dtr_method in vars(module):
            raise ValueError(
                f"cannot restore {_label(name, module)}: its {module._dtr_method} was patched since; unpatch it first"
            )
    for module in swapped.values():
        del module._dtr
        module.__class__ = module._dtr_original
    return model


def _label(name: str, module: object) -> str:
    return f"{name!r} ({type(module).__name__})" if name else f"this {type(module).__name__}"


def _check_untouched(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Swapped):
            raise ValueError(f"cannot swap {_label(name, module)}: it is swapped already; call restore_blocks first")
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise ValueError(f"cannot swap {_label(name, module)}: it is compiled; swap first, then compile")


def _find_blocks(model: nn.Module) -> Blocks:
    """The blocks of a model and their families by name, all of them found fit to be swapped."""
    blocks: Blocks = {}
    for name, module in model.named_modules():
        family = next((family for family in FAMILIES if family.matches(module)), None)
        if family is None:
            continue
        problem = next(family.problems(module), None) or trial_problem(module, family)
        if problem is not None:
            raise ValueError(f"cannot swap block {_label(name, module)}: {problem}")
        blocks[name] = module, family
    if not blocks:
        kinds = dict.fromkeys(f"no {family.name}, {family.anatomy}" for family in FAMILIES)
        raise ValueError(f"cannot swap {_label('', model)}: it has {'; and '.join(kinds)}")
    return blocks


def _check_settings(blocks: Blocks, routing: DenoisingTaskRouting | RandomRouting | None, scope: str) -> None:
    """Raises ValueError if a block has not this scope, or if the routing leaves none of its channels active."""
    for name, (block, family) in blocks.items():
        if scope not in family.scopes:
            raise ValueError(
                f"cannot swap block {_label(name, block)}: a {family.name} has no scope {scope!r}; use "
                f"{' or '.join(map(repr, family.scopes))}"
            )
        if routing is None:
            continue
        try:
            active_channels(routing, torch.zeros(1, dtype=torch.long, device="cpu"), family.channels(block))
        except ValueError as error:
            raise ValueError(f"cannot swap block {_label(name, block)}: {error}") from None


def _find_owner(model: nn.Module, blocks: set[nn.Module]) -> Any:
    """The innermost module that contains all blocks and takes timesteps."""
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
