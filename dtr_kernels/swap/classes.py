"""The classes that swapped modules take on, each derived from the module's own, and the state they share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dtr_kernels import reference
from dtr_kernels.nn.block import Stream, advance
from dtr_kernels.routing import ChannelWindow, DenoisingTaskRouting, RandomRouting
from dtr_kernels.swap.dit import WindowSource

Routing = DenoisingTaskRouting | RandomRouting

TIMESTEP_NAMES = ("t", "timestep", "timesteps")


class ModelState:
    """What a model and its swapped blocks share: the settings, and the window while the model's forward runs.

    With a routing it is its blocks' ``WindowSource``; without, every block has its own or is unrouted.
    """

    def __init__(self, routing: Routing | None, scope: str, channels: int) -> None:
        self.routing = routing
        self.scope = scope
        self.channels = channels
        self.running = False
        self.window: ChannelWindow | Tensor | None = None

    def __reduce__(self) -> tuple[type, tuple]:
        return ModelState, (self.routing, self.scope, self.channels)

    def make_window(self, t: Tensor) -> ChannelWindow | Tensor | None:
        """The channels that the routing activates at t [B]."""
        if isinstance(self.routing, RandomRouting):
            return self.routing.mask(t, self.channels)
        return None if self.routing is None else self.routing.window(t, self.channels)

    def window_of(self, block: Any) -> ChannelWindow | Tensor | None:
        return self.window


class BlockState:
    """What a swapped block knows: where its windows come from, and those of forwards whose backward may be to come."""

    def __init__(self, name: str, model: ModelState, source: WindowSource | None) -> None:
        self.name = name
        self.model = model
        self.source = source
        # Gradient checkpointing runs a block again in the backward pass, when the model may have run for other
        # timesteps since. The memory of the conditioning vector tells the forwards apart: checkpointing holds it until
        # then, while the tensor it passes may be a detached view.
        self._windows: WeakKeyDictionary[torch.UntypedStorage, ChannelWindow | Tensor | None] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type, tuple]:
        return BlockState, (self.name, self.model, self.source)

    def window(self, block: Any, c: Tensor) -> ChannelWindow | Tensor | None:
        """The window of the forward that c [B, C] belongs to."""
        if self.source is None:
            return None
        if self.model.running:
            window = self.source.window_of(block)
            if not torch.compiler.is_compiling():  # a compiled graph recomputes without calling the block
                self._windows[c.untyped_storage()] = window
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
    _dtr_factory: Callable[[type], type]
    _dtr_original: type

    def __reduce_ex__(self, protocol: Any) -> tuple:
        attributes: Any = super().__reduce_ex__(2)[2]
        return _rebuild, (self._dtr_factory, self._dtr_original), attributes


def _rebuild(factory: Callable[[type], type], original: type) -> object:
    return object.__new__(factory(original))


def _derive(base: type, original: type, factory: Callable[[type], type], **methods: Any) -> type:
    namespace = {
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "_dtr_factory": staticmethod(factory),
        "_dtr_original": original,
    }
    return type(f"Fused{original.__name__}", (base, original), namespace | methods)


class _FusedBlock(Swapped):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        state: BlockState = self._dtr
        window, scope = state.window(self, c), state.model.scope
        if isinstance(window, Tensor):
            return reference.dit_block(self, x, c, window, scope)
        return advance(self, Stream(x), c, window, scope).sum()


@functools.cache
def block_class(original: Any) -> type:
    """The class of a swapped block of class ``original``; its ``_dtr`` is a ``BlockState``."""
    return _derive(_FusedBlock, original, block_class)


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
        outer = state.running, state.window
        state.running, state.window = True, state.make_window(kwargs[name] if name in kwargs else args[position])
        try:
            return original.forward(self, *args, **kwargs)
        finally:
            state.running, state.window = outer

    return _derive(_RoutedModel, original, model_class, forward=forward)


def timestep_argument(original: type[nn.Module]) -> tuple[str, int] | None:
    """Name and position (after self) of the timesteps among the arguments of a module's forward; None without any."""
    names = list(inspect.signature(original.forward).parameters)
    return next(((name, names.index(name) - 1) for name in TIMESTEP_NAMES if name in names), None)
