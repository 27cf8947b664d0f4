"""What every family asks of a block before it is swapped: each yields problems, as ``Family.problems`` does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from operator import attrgetter

from torch import nn

# Attributes of torch.nn.Module that hold the hooks around its forward.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has(block: nn.Module, path: str) -> bool:
    """Whether the block has an attribute, given as a dotted path."""
    try:
        attrgetter(path)(block)
    except AttributeError:
        return False
    return True


def _within(name: str, paths: tuple[str, ...]) -> bool:
    return any(name == path or name.startswith(path + ".") for path in paths)


def missing_problems(block: nn.Module, needed: tuple[str, ...], name: str) -> Iterator[str]:
    """Attributes that the block has not."""
    missing = [path for path in needed if not has(block, path)]
    if missing:
        yield f"it has no {', '.join(missing)}, which a {name} has; leave this model unswapped"


def call_problems(block: nn.Module, methods: tuple[str, ...], called: tuple[str, ...]) -> Iterator[str]:
    """Methods of more or less than x and the conditioning, and code attached to modules that would not be called.

    ``methods`` are those through which the block is called, ``called`` the parts that still are when it is swapped.
    """
    for method in methods:
        parameters = list(inspect.signature(getattr(type(block), method)).parameters)[1:]
        if len(parameters) != 2:
            yield (
                f"its {method} takes ({', '.join(parameters)}), but only one that takes x and the conditioning can be "
                "replaced; leave it unswapped"
            )
        if method != "forward" and method in vars(block):
            yield f"the {method} of its instance was patched, which would be lost; swap first, then patch it"
    for name, module in block.named_modules():
        if "forward" in vars(module):
            yield f"the forward of {name or 'its instance'} was patched, which would be lost; swap first, then patch it"
        if name and any(getattr(module, hooks) for hooks in HOOKS) and not _within(name, called):
            yield f"{name} has hooks, which would never run; remove them, or put them on the block itself"


def dropout_problems(block: nn.Module, called: tuple[str, ...] = ()) -> Iterator[str]:
    """Dropout in parts that are not called."""
    for name, module in block.named_modules():
        rate = getattr(module, "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "drop_prob", 0)
        if rate and not _within(name, called):
            yield f"{name} drops with probability {rate}, which the fused forward never does; set it to 0"


def parameter_problems(block: nn.Module, used: tuple[str, ...]) -> Iterator[str]:
    """Parameters outside the parts that are used."""
    for name, _ in block.named_parameters():
        if not _within(name, used):
            yield f"it has a parameter {name}, which the fused forward would not use; leave this model unswapped"
