"""A quick check that the parts of a swapped block are as when the block was found fit to be swapped."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from dtr_kernels.swap.checks import is_within
from dtr_kernels.swap.family import Family

# Plain attributes that change what a module computes and that the fused forward does not read. _ADDITIONS ("forward"
# is a patch) are noticed also if they are new.
_ADDITIONS = ("forward", "gate", "rope")
_SETTINGS = ("p", "drop_prob", "approximate", "processor")
_SETTINGS_OF_BLOCKS = ("_chunk_size",)


class _Part(NamedTuple):
    module: nn.Module
    kind: type
    children: list[nn.Module | None]
    settings: list[tuple[str, Any]]
    absent: list[str]  # optional parameters, such as a norm's, that it lacks


def _differ(one: Any, other: Any) -> bool:
    """Return whether two settings differ; numbers may be other objects, as torch.compile(dynamic=True) makes them."""
    return one is not other and one != other


class Parts:
    """The modules of a block that its fused forward does not call, so that their own forwards must not change.

    Args:
        block: fit to be swapped.
        family: its family.
    """

    def __init__(self, block: nn.Module, family: type[Family]) -> None:
        called = family.calls(block)
        self._children = list(block._modules.values())
        self._settings = [(name, vars(block).get(name)) for name in _SETTINGS_OF_BLOCKS]
        self._parts = [
            _Part(
                module,
                type(module),
                list(module._modules.values()),
                [(name, vars(module).get(name)) for name in _ADDITIONS]
                + [(name, vars(module)[name]) for name in _SETTINGS if name in vars(module)],
                [parameter for parameter, value in module._parameters.items() if value is None],
            )
            for name, module in block.named_modules()
            if name and not is_within(name, called)
        ]

    def unchanged(self, block: nn.Module) -> bool:
        """Return whether all parts of the block are unchanged; the block itself may have hooks and be patched.

        Detects replaced, wrapped and patched modules, hooks and settings. Called at every forward, so it reads nothing
        else.
        """
        if list(block._modules.values()) != self._children:
            return False
        for name, value in self._settings:
            if _differ(block.__dict__.get(name), value):
                return False
        for module, kind, children, settings, absent in self._parts:
            state = module.__dict__
            if (
                type(module) is not kind
                or (children and list(state["_modules"].values()) != children)
                or state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or state["_backward_hooks"]
                or state["_backward_pre_hooks"]
            ):
                return False
            for name, value in settings:
                if _differ(state.get(name), value):
                    return False
            for name in absent:
                if state["_parameters"].get(name) is not None:
                    return False
        return True
