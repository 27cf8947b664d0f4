"""The classes of swapped modules, each derived from the module's own class, and the state they share."""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from dtr_kernels.nn.torchscript import NoTorchScript
from dtr_kernels.quoting import quoted
from dtr_kernels.routing import ChannelWindow, DenoisingTaskRouting, RandomRouting, window_width
from dtr_kernels.swap.family import Family, WindowSource
from dtr_kernels.swap.parts import Parts
from dtr_kernels.swap.trial import swap_problem

Routing = DenoisingTaskRouting | RandomRouting
NoiseLevel = Callable[[Tensor], Tensor]

TIMESTEP_NAMES = ("t", "timestep", "timesteps")


@dataclass
class _Call:
    """A model's forward that a thread runs.

    Attributes:
        windows: the active channels, for each number of channels of the blocks; None between forwards.
        traced: the forward itself is being compiled, not only its blocks.
        shared_t: the timestep of the whole batch, if the host knows it beside the tensor that the model takes.
    """

    windows: dict[int, ChannelWindow | Tensor] | None = None
    traced: bool = False
    shared_t: int | float | None = None


class _Calls(threading.local):
    """The call of each thread, as threads may share a model. (torch.compile loses writes to a thread-local itself.)"""

    def __init__(self) -> None:
        self.current = _Call()


@dataclass(eq=False)
class ModelState:
    """Settings that a model and its swapped blocks share, and the windows while the model's forward runs.

    With a routing it is its blocks' ``WindowSource``; without one, every block has its own source or is unrouted.
    """

    routing: Routing | None
    scope: str
    channels: tuple[int, ...]
    noise_level: NoiseLevel | None

    def __post_init__(self) -> None:
        self._calls = _Calls()

    @property
    def call(self) -> _Call:
        """The forward that the calling thread runs."""
        return self._calls.current

    def __reduce__(self) -> tuple[type, tuple]:
        return ModelState, (self.routing, self.scope, self.channels, self.noise_level)

    def make_windows(self, t: Tensor | int | float) -> dict[int, ChannelWindow | Tensor]:
        """Return the channels that the routing activates at t [B], for each number of channels of the blocks.

        A Python number is the timestep of the whole batch; the host then knows the window.
        """
        if self.routing is None:
            return {}
        if self.call.shared_t is not None:
            t = self.call.shared_t
        shared = not isinstance(t, Tensor)
        time: Any = torch.tensor([t], device="cpu") if shared else torch.atleast_1d(t)  # type: ignore[arg-type]
        if self.noise_level is not None:
            time = self.noise_level(time)
        if shared and isinstance(self.routing, DenoisingTaskRouting):
            time = t if self.noise_level is None else time.item()
        return {C: active_channels(self.routing, time, C) for C in self.channels}

    def channels_of(self, block: Any) -> int:
        """Return how many channels, in scope "inner" attention heads, a routing of the block chooses from."""
        return routed_channels(block, block._dtr.family, self.scope)

    def window_of(self, block: Any) -> ChannelWindow | Tensor:
        assert self.call.windows is not None
        return self.call.windows[self.channels_of(block)]

    def width_of(self, block: Any) -> int | None:
        if not isinstance(self.routing, DenoisingTaskRouting):
            return None
        return window_width(self.routing.beta, self.channels_of(block))


def routed_channels(block: Any, family: type[Family], scope: str) -> int:
    """Return how many channels, in scope "inner" attention heads, a routing in this scope chooses from."""
    return family.layers(block).attn.num_heads if scope == "inner" else family.channels(block)


def active_channels(routing: Routing, t: Any, channels: int) -> ChannelWindow | Tensor:
    """Return the window of each sample at t [B], or at one t; a mask [B, C] if channels are not neighbours."""
    return routing.mask(t, channels) if isinstance(routing, RandomRouting) else routing.window(t, channels)


# Swapped blocks by number, for an op that takes only numbers and tensors.
_BLOCKS: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
_NUMBERS = itertools.count()


class BlockState:
    """The source of a swapped block's windows, the windows of forwards that may still run backward, and its parts."""

    def __init__(self, name: str, family: type[Family], model: ModelState, source: WindowSource | None) -> None:
        self.name = name
        self.family = family
        self.model = model
        self.source = source
        # A tensor, so that graphs of compiled blocks differ in an input and not in a constant.
        self._number = torch.tensor(next(_NUMBERS), device="cpu")
        self._parts: Parts | None = None
        # Gradient checkpointing runs a block again in the backward pass, perhaps after forwards at other timesteps. The
        # conditioning's memory identifies the forward: checkpointing holds it, though its tensor may be a detached
        # view.
        self._windows: WeakKeyDictionary[torch.UntypedStorage, dict[tuple, ChannelWindow | Tensor | None]]
        self._windows = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type, tuple]:
        return BlockState, (self.name, self.family, self.model, self.source)

    def attach(self, block: Any) -> None:
        """Start tracking a block that was just found fit to be swapped."""
        _BLOCKS[int(self._number)] = block
        self._parts = Parts(block, self.family)

    def refuse_changes(self, block: Any) -> None:
        """Raise RuntimeError if the block has changed since the swap and would now compute something else.

        A layer may have been wrapped by an adapter (LoRA), patched, given hooks or replaced.
        """
        if self._parts is not None and self._parts.unchanged(block):
            return
        if torch.compiler.is_compiling():  # no trial runs here; without fullgraph torch.compile retries uncompiled
            raise RuntimeError(
                f"swapped block {self.name!r} was changed since it was checked; call the model once before it is "
                "compiled, so that the block is checked again"
            )
        problem = swap_problem(block, self.family)
        if problem is not None:
            raise RuntimeError(f"swapped block {self.name!r} was changed: {problem}; or call restore_blocks")
        self._parts = Parts(block, self.family)

    def window(self, block: Any, marker: Tensor) -> ChannelWindow | Tensor | None:
        """Return the window of the forward to which the conditioning with this marker belongs."""
        if self.source is None:
            return None
        call = self.model.call
        if torch.compiler.is_compiling() and not call.traced:
            return self._window_of_compiled(block, marker)
        if call.windows is not None:
            window = self.source.window_of(block)
            if self._may_run_again(block):
                storage, view = _memory(marker)
                self._windows.setdefault(storage, {})[view] = window  # breaks the graph, if there is one
            return window
        try:
            storage, view = _memory(marker)
            return self._windows[storage][view]
        except KeyError:
            raise RuntimeError(
                f"block {self.name!r} was called outside its model's forward, with a conditioning that no forward has "
                "passed it, so its timesteps are unknown; call the model instead"
            ) from None

    def _window_of_compiled(self, block: Any, marker: Tensor) -> ChannelWindow | Tensor:
        """Return the window for a block compiled by itself: its graph asks at each run, also of a checkpoint."""
        assert self.source is not None
        width, channels = self.source.width_of(block), routed_channels(block, self.family, self.model.scope)
        found = torch.ops.dtr_kernels.window_of_block(marker, self._number, width or 0, channels)
        return found if width is None else ChannelWindow(found, width, channels)

    def _may_run_again(self, block: Any) -> bool:
        """Return whether the backward pass may call the block again. A compiled graph recomputes without calling it,
        unless the block checkpoints itself; torch.func has no checkpointing, and its tensors have no memory."""
        if torch.compiler.is_compiling():
            return self.family.checkpoints(block)
        return torch._C._functorch.peek_interpreter_stack() is None


@torch.library.custom_op("dtr_kernels::window_of_block", mutates_args=())
def _window_of_block(marker: Tensor, number: Tensor, width: int, channels: int) -> Tensor:
    """Return the starts int32 [B] of windows of this width, or for width 0 masks, bool [B, channels]."""
    block: Any = _BLOCKS[int(number)]
    window = block._dtr.window(block, marker)
    if isinstance(window, ChannelWindow) and window.width == width:
        return window.start.to(marker.device).expand(len(marker)).clone()  # on the CPU if the host knows it
    if isinstance(window, Tensor) and not width:
        return window.bool().clone()
    raise RuntimeError(f"the routing of block {block._dtr.name!r} was changed since it was compiled; compile it again")


@_window_of_block.register_fake
def _(marker: Tensor, number: Tensor, width: int, channels: int) -> Tensor:
    if width:
        return marker.new_empty(len(marker), dtype=torch.int32)
    return marker.new_empty(len(marker), channels, dtype=torch.bool)


def _memory(marker: Tensor) -> tuple[torch.UntypedStorage, tuple]:
    """Return a tensor's memory, and its place there: microbatches may be slices of one tensor of timesteps."""
    return marker.untyped_storage(), (marker.storage_offset(), marker.shape, marker.stride())


class Swapped(NoTorchScript):
    """Base of the classes made here. Copies and pickles are made from the module's own class, which can be imported.

    These classes have the names of the modules' own classes: other libraries find classes by name and store the names.
    """

    _dtr: Any
    _dtr_original: type
    _dtr_method: str
    _dtr_recipe: tuple

    def __reduce_ex__(self, protocol: Any) -> tuple:
        attributes: Any = super().__reduce_ex__(2)[2]
        return _rebuild, self._dtr_recipe, attributes

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]  # that of torch.nn.Module
        if isinstance(self._dtr, BlockState) and swap_problem(self, self._dtr.family) is None:  # type: ignore[arg-type]
            self._dtr.attach(self)

    def _get_name(self) -> str:
        return f"Fused{type(self).__name__}"


def _rebuild(factory: Callable[..., type], *arguments: Any) -> object:
    return object.__new__(factory(*arguments))


def _derive(base: type, original: Any, method: str, replacement: Any, recipe: tuple) -> type:
    """Return a class like ``original`` with another ``method``; ``recipe`` is its maker and the maker's arguments."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self.__class__ = original  # a new instance, such as from_pretrained makes, is not swapped
        self.__init__(*args, **kwargs)

    namespace = {
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__init__": _disguised(__init__, original.__init__),
        "_dtr_original": original,
        "_dtr_method": method,
        "_dtr_recipe": recipe,
        method: _disguised(replacement, getattr(original, method)),
    }
    return type(original.__name__, (base, original), namespace)


def _disguised(replacement: Any, function: Any) -> Any:
    """Return ``replacement`` with the name, docstring and signature of ``function``.

    ``functools.wraps`` would also set ``__wrapped__``, through which tools would call the plain forward.
    """
    for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(replacement, attribute, getattr(function, attribute))
    replacement.__signature__ = inspect.signature(function)
    return replacement


@functools.cache
def block_class(original: Any, family: type[Family]) -> type:
    """Return the class of a swapped block of class ``original``; its ``_dtr`` is a ``BlockState``."""

    def fused(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        state: BlockState = self._dtr
        state.refuse_changes(self)
        x, c = block_input(self, args, kwargs)
        window, scope = state.window(self, family.marker(c)), state.model.scope
        if isinstance(window, Tensor):
            return family.run_plain(self, x, c, window, scope)
        return family.run(self, x, c, window, scope)

    method = family.method(original)
    own_names = list(inspect.signature(getattr(original, method)).parameters)[1:]
    block: Any = _derive(Swapped, original, method, fused, (block_class, original, family))
    block._dtr_names = dict(zip(own_names, inspect.signature(family.arguments).parameters, strict=False))
    return block


def block_input(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """Return the input x and the conditioning of a swapped block that was called with these arguments."""
    names = block._dtr_names  # the family's names of the method's arguments
    return block._dtr.family.arguments(*args, **{names.get(name, name): value for name, value in kwargs.items()})


class RoutedModel(Swapped):
    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "nn.DataParallel would copy the swapped blocks at every step, which is not supported; use "
            "DistributedDataParallel"
        )


@functools.cache
def model_class(original: Any) -> type:
    """Return the class of a routed model of class ``original``; its ``_dtr`` is a ``ModelState``.

    Its forward computes the window of its timesteps and runs the original's. (A forward pre-hook would miss calls of
    ``model.forward``, as in facebookresearch/DiT's forward_with_cfg.)
    """
    argument = timestep_argument(original)
    assert argument is not None
    name, position = argument
    wants_tensor = "Tensor" in str(inspect.signature(original.forward).parameters[name].annotation)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        t = kwargs[name] if name in kwargs else args[position] if position < len(args) else None
        if t is None:
            raise TypeError(f"{original.__name__}.forward is routed by its argument {name!r}, which is missing")
        if isinstance(t, bool) or not isinstance(t, Tensor | Real):
            raise TypeError(f"{name} must be a tensor of timesteps [B], or one number for the batch, got {quoted(t)}")
        if wants_tensor and not (isinstance(t, Tensor) and t.dim()):
            args, kwargs = _with_tensor(name, position, args, kwargs)
        call = self._dtr.call
        outer = call.windows, call.traced
        call.windows, call.traced = self._dtr.make_windows(t), torch.compiler.is_compiling()
        try:
            return original.forward(self, *args, **kwargs)
        finally:
            call.windows, call.traced = outer

    return _derive(RoutedModel, original, "forward", forward, (model_class, original))


def _with_tensor(name: str, position: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of a forward with its single timestep replaced by a tensor with one for each sample."""
    t = kwargs[name] if name in kwargs else args[position]
    images = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()), None)
    if images is None:
        raise TypeError(f"{name} must be a tensor of timesteps [B] where no other input is a tensor, got {quoted(t)}")
    each = t.expand(len(images)) if isinstance(t, Tensor) else torch.full((len(images),), t, device=images.device)
    if name in kwargs:
        return args, {**kwargs, name: each}
    return (*args[:position], each, *args[position + 1 :]), kwargs


def timestep_argument(original: Any) -> tuple[str, int] | None:
    """Return name and position (after self) of the timesteps in a module's forward; None if it takes none."""
    names = list(inspect.signature(original.forward).parameters)
    return next(((name, names.index(name) - 1) for name in TIMESTEP_NAMES if name in names), None)
