"""The classes that swapped modules take on, each derived from the module's own, and the state they share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dtr_kernels.nn._torchscript import NoTorchScript
from dtr_kernels.routing import ChannelWindow, DenoisingTaskRouting, RandomRouting
from dtr_kernels.swap.family import Family, WindowSource

Routing = DenoisingTaskRouting | RandomRouting
NoiseLevel = Callable[[Tensor], Tensor]

TIMESTEP_NAMES = ("t", "timestep", "timesteps")


class ModelState:
    """What a model and its swapped blocks share: the settings, and the windows while the model's forward runs.

    With a routing it is its blocks' ``WindowSource``; without, every block has its own or is unrouted.
    """

    def __init__(
        self, routing: Routing | None, scope: str, channels: tuple[int, ...], noise_level: NoiseLevel | None
    ) -> None:
        self.routing = routing
        self.scope = scope
        self.channels = channels
        self.noise_level = noise_level
        self.running = False
        self.windows: dict[int, ChannelWindow | Tensor] = {}
        # The timestep of the whole batch, where the host knows it.
        self.shared_t: int | float | None = None

    def __reduce__(self) -> tuple[type, tuple]:
        return ModelState, (self.routing, self.scope, self.channels, self.noise_level)

    def make_windows(self, t: Tensor) -> dict[int, ChannelWindow | Tensor]:
        """The channels that the routing activates at t [B], for each number of channels that blocks have."""
        if self.routing is None:
            return {}
        time: Any = t
        known = self.shared_t is not None and isinstance(self.routing, DenoisingTaskRouting)
        if known:
            time = torch.tensor([self.shared_t], device="cpu")
        if self.noise_level is not None:
            time = self.noise_level(time)
        if known:
            time = time.item()
        return {C: active_channels(self.routing, time, C) for C in self.channels}

    def window_of(self, block: Any) -> ChannelWindow | Tensor:
        return self.windows[block._dtr.family.channels(block)]


def active_channels(routing: Routing, t: Any, channels: int) -> ChannelWindow | Tensor:
    """The window of each sample at t [B], or at one t; their mask [B, C] where active channels are not neighbours.

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
        # timesteps since. The memory of the conditioning tells the forwards apart: checkpointing holds it until then,
        # while the tensor it passes may be a detached view.
        self._windows: WeakKeyDictionary[torch.UntypedStorage, dict[tuple, ChannelWindow | Tensor | None]]
        self._windows = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type, tuple]:
        return BlockState, (self.name, self.family, self.model, self.source)

    def window(self, block: Any, c: Any) -> ChannelWindow | Tensor | None:
        """The window of the forward that the conditioning c belongs to."""
        if self.source is None:
            return None
        if self.model.running:
            window = self.source.window_of(block)
            if self._may_run_again(block):
                storage, view = _memory(self.family.marker(c))
                self._windows.setdefault(storage, {})[view] = window  # breaks the graph, if there is one
            return window
        try:
            storage, view = _memory(self.family.marker(c))
            return self._windows[storage][view]
        except KeyError:
            raise RuntimeError(
                f"block {self.name!r} was called outside its model's forward, with a conditioning that no forward has "
                "passed it, so its timesteps are unknown; call the model instead, and where checkpointed blocks are "
                "compiled, compile the whole model"
            ) from None

    def _may_run_again(self, block: Any) -> bool:
        """Whether the backward pass may call the block. A compiled graph recomputes without, but where the block itself
        sees to it; torch.func knows no checkpointing, and its tensors have no memory."""
        if torch.compiler.is_compiling():
            return self.family.checkpoints(block)
        return torch._C._functorch.peek_interpreter_stack() is None


def _memory(marker: Tensor) -> tuple[torch.UntypedStorage, tuple]:
    """Where a tensor lives, and which part of that it is: microbatches may be slices of one tensor of timesteps."""
    return marker.untyped_storage(), (marker.storage_offset(), marker.shape, marker.stride())


class Swapped(NoTorchScript):
    """Base of the classes made here. Copies and pickles are made from the module's own class, which can be imported.

    These classes have the names of the modules' own: other libraries find classes by them and write them into files.
    """

    _dtr: Any
    _dtr_original: type
    _dtr_method: str
    _dtr_recipe: tuple

    def __reduce_ex__(self, protocol: Any) -> tuple:
        attributes: Any = super().__reduce_ex__(2)[2]
        return _rebuild, self._dtr_recipe, attributes

    def _get_name(self) -> str:
        return f"Fused{type(self).__name__}"


def _rebuild(factory: Callable[..., type], *arguments: Any) -> object:
    return object.__new__(factory(*arguments))


def _derive(base: type, original: Any, method: str, replacement: Any, recipe: tuple) -> type:
    """A class like ``original`` with another ``method``; ``recipe`` is the function that made it and its arguments."""

    @functools.wraps(original.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self.__class__ = original  # a new instance, such as from_pretrained makes, is not swapped
        self.__init__(*args, **kwargs)

    namespace = {
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__init__": __init__,
        "_dtr_original": original,
        "_dtr_method": method,
        "_dtr_recipe": recipe,
        method: functools.wraps(getattr(original, method))(replacement),
    }
    return type(original.__name__, (base, original), namespace)


@functools.cache
def block_class(original: Any, family: type[Family]) -> type:
    """The class of a swapped block of class ``original``; its ``_dtr`` is a ``BlockState``."""

    def fused(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        x, c = block_input(self, args, kwargs)
        state: BlockState = self._dtr
        window, scope = state.window(self, c), state.model.scope
        if isinstance(window, Tensor):
            return family.run_plain(self, x, c, window, scope)
        return family.run(self, x, c, window, scope)

    method = family.method(original)
    own_names = list(inspect.signature(getattr(original, method)).parameters)[1:]
    block: Any = _derive(Swapped, original, method, fused, (block_class, original, family))
    block._dtr_names = dict(zip(own_names, inspect.signature(family.arguments).parameters, strict=False))
    return block


def block_input(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """The input x and the conditioning of a swapped block that was called with these arguments."""
    names = block._dtr_names  # what the family calls the arguments of the block's own method
    return block._dtr.family.arguments(*args, **{names.get(name, name): value for name, value in kwargs.items()})


class RoutedModel(Swapped):
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

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        t = kwargs[name] if name in kwargs else args[position] if position < len(args) else None
        if t is None:
            raise TypeError(f"{original.__name__}.forward is routed by its argument {name!r}, which is missing")
        state: ModelState = self._dtr
        outer = state.running, state.windows
        state.running, state.windows = True, state.make_windows(t)
        try:
            return original.forward(self, *args, **kwargs)
        finally:
            state.running, state.windows = outer

    return _derive(RoutedModel, original, "forward", forward, (model_class, original))


def timestep_argument(original: Any) -> tuple[str, int] | None:
    """Name and position (after self) of the timesteps among the arguments of a module's forward; None without any."""
    names = list(inspect.signature(original.forward).parameters)
    return next(((name, names.index(name) - 1) for name in TIMESTEP_NAMES if name in names), None)
