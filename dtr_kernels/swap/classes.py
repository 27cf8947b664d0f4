"""The classes that swapped modules take on, each derived from the module's own, and the state they share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dtr_kernels.routing import ChannelWindow, DenoisingTaskRouting, RandomRouting
from dtr_kernels.swap.family import Family, WindowSource

Routing = DenoisingTaskRouting | RandomRouting

TIMESTEP_NAMES = ("t", "timestep", "timesteps")


class ModelState:
    """What a model and its swapped blocks share: the settings, and the windows while the model's forward runs.

    With a routing it is its blocks' ``WindowSource``; without, every block has its own or is unrouted.
    """

    def __init__(self, routing: Routing | None, scope: str, channels: tuple[int, ...]) -> None:
        self.routing = routing
        self.scope = scope
        self.channels = channels
        self.running = False
        self.windows: dict[int, ChannelWindow | Tensor] = {}

    def __reduce__(self) -> tuple[type, tuple]:
        return ModelState, (self.routing, self.scope, self.channels)

    def make_windows(self, t: Tensor) -> dict[int, ChannelWindow | Tensor]:
        """The channels that the routing activates at t [B], for each number of channels that blocks have."""
        return {} if self.routing is None else {C: active_channels(self.routing, t, C) for C in self.channels}

    def window_of(self, block: Any) -> ChannelWindow | Tensor:
        return self.windows[block._dtr.family.channels(block)]


def active_channels(routing: Routing, t: Tensor, channels: int) -> ChannelWindow | Tensor:
    """The window of each sample at t [B]; their mask [B, C] where the active channels are not neighbours.

    Raises:
        ValueError: if the routing leaves none of so few channels active.
    """
    return routing.mask(t, channels) if isinstance(routing, RandomRouting) else routing.window(t, channels)


class BlockState:
    """What a swapped block knows: where its windows come from, and those of forwards whose backward may be to come."""

    def __init__(self, name: str, family: type[Family], model: ModelState, source: WindowSource | None) -> None:
        self.name = name
        self.family = family
        self.model = model
        self.source = source
        # Gradient checkpointing runs a block again in the backward pass, when the model may have run for other
        # timesteps since. The memory of the conditioning vector tells the forwards apart: checkpointing holds it until
        # then, while the tensor it passes may be a detached view.
        self._windows: WeakKeyDictionary[torch.UntypedStorage, ChannelWindow | Tensor | None] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type, tuple]:
        return BlockState, (self.name, self.family, self.model, self.source)

    def window(self, block: Any, c: Tensor) -> ChannelWindow | Tensor | None:
        """The window of the forward that the conditioning c belongs to."""
        if self.source is None:
            return None
        if self.model.running:
            window = self.source.window_of(block)
            # A compiled graph recomputes without calling the block, but not where the block does so itself.
            if not torch.compiler.is_compiling() or self.family.checkpoints(block):
                self._windows[c.untyped_storage()] = window  # breaks the graph, if there is one
            return window
        try:
            return self._windows[c.untyped_storage()]
        except KeyError:
            raise RuntimeError(
                f"block {self.name!r} was called outside its model's forward, with a conditioning vector that no "
                "forward has passed it, so its timesteps are unknown; call the model instead, and where checkpointed "
                "blocks are compiled, compile the whole model"
            ) from None


class Swapped:
    """Base of the classes made here. Copies and pickles are made from the module's own class, which can be imported."""

    _dtr: Any
    _dtr_original: type
    _dtr_method: str
    _dtr_recipe: tuple

    def __reduce_ex__(self, protocol: Any) -> tuple:
        attributes: Any = super().__reduce_ex__(2)[2]
        return _rebuild, self._dtr_recipe, attributes


def _rebuild(factory: Callable[..., type], *arguments: Any) -> object:
    return object.__new__(factory(*arguments))


def _derive(base: type, original: type, method: str, replacement: Any, recipe: tuple) -> type:
    """A class like ``original`` with another ``method``; ``recipe`` is the function that made it and its arguments."""
    namespace = {
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "_dtr_original": original,
        "_dtr_method": method,
        "_dtr_recipe": recipe,
        method: replacement,
    }
    return type(f"Fused{original.__name__}", (base, original), namespace)


@functools.cache
def block_class(original: Any, family: type[Family]) -> type:
    """The class of a swapped block of class ``original``; its ``_dtr`` is a ``BlockState``."""

    def fused(self: Any, x: Tensor, c: Tensor) -> Tensor:
        state: BlockState = self._dtr
        window, scope = state.window(self, c), state.model.scope
        if isinstance(window, Tensor):
            return family.run_plain(self, x, c, window, scope)
        return family.run(self, x, c, window, scope)

    return _derive(Swapped, original, family.method(original), fused, (block_class, original, family))


class _RoutedModel(Swapped):
    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "nn.DataParallel would run threads that share one routing window; use DistributedDataParallel"
        )


@functools.cache
def model_class(original: Any) -> type:
    """The class of a routed model of class ``original``; its ``_dtr`` is a ``ModelState``.

    Its forward makes the window of its timesteps and runs the original's. (A forward pre-hook would miss calls of
    ``model.forward``, such as facebookresearch/DiT's forward_with_cfg makes.)
    """
    argument = timestep_argument(original)
    assert argument is not None
    name, position = argument

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name not in kwargs and position >= len(args):
            raise TypeError(f"{original.__name__}.forward is routed by its argument {name!r}, which is missing")
        state: ModelState = self._dtr
        outer = state.running, state.windows
        state.running, state.windows = True, state.make_windows(kwargs[name] if name in kwargs else args[position])
        try:
            return original.forward(self, *args, **kwargs)
        finally:
            state.running, state.windows = outer

    return _derive(_RoutedModel, original, "forward", forward, (model_class, original))


def timestep_argument(original: type[nn.Module]) -> tuple[str, int] | None:
    """Name and position (after self) of the timesteps among the arguments of a module's forward; None without any."""
    names = list(inspect.signature(original.forward).parameters)
    return next(((name, names.index(name) - 1) for name in TIMESTEP_NAMES if name in names), None)
