"""Base of the families of blocks: a family describes its blocks, so that no other module depends on their kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from dtr_kernels import reference
from dtr_kernels.nn.block import RoutedDiTBlock, Stream, advance
from dtr_kernels.routing import ChannelWindow
from dtr_kernels.swap import checks
from dtr_kernels.swap.views import Layers, linear_layers

RandomTensor = Callable[..., Tensor]
# Enough tokens to expose attention that sees only neighbours.
TRIAL_TOKENS = 48


class WindowSource(Protocol):
    """Source of the channels that a block computes, while its model's forward runs."""

    def window_of(self, block: Any) -> ChannelWindow | Tensor | None:
        """Return the window of each sample; or a mask [B, C] (1 = active), which runs the plain PyTorch path."""

    def width_of(self, block: Any) -> int | None:
        """Return the width of the block's windows; None for masks."""


class Unfit(Exception):
    """Raised while a trial is prepared, with the reason why the block cannot be swapped."""


class Family:
    """A kind of block that can be swapped. To add one, derive from this class and decorate it with ``register_family``.

    The methods here suit blocks that compute the same as a DiT block, so for these ``matches`` and ``layers`` are
    enough. A family is never instantiated: a block refers to the class itself, which its copies and pickles find by
    name.

    Attributes:
        name: the blocks' name in messages.
        anatomy: the features that identify such a block.
        scopes: the scopes that its routing supports, see ``swap_blocks``.
        called: parts of a block, as paths within it, that a function among its ``layers`` calls. Modules among the
            ``layers`` need not be named.
    """

    name: str = "DiT block"
    anatomy: str = ""
    scopes: tuple[str, ...] = reference.SCOPES
    called: tuple[str, ...] = ()

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        """Return whether a module is meant to be a block of this family; ``problems`` says if it can be swapped."""
        raise NotImplementedError

    @classmethod
    def layers(cls, block: Any) -> Layers:
        """Return the block's parts under the names of facebookresearch/DiT."""
        return Layers(block.norm1, block.attn, block.norm2, block.mlp, block.adaLN_modulation)

    @classmethod
    def arguments(cls, x: Any, c: Any) -> tuple[Tensor, Any]:
        """Return the block's arguments as its input x and its conditioning c, which ``adaLN_modulation`` takes.

        Override it with the arguments of the blocks' own method; arguments without a default may have other names
        there.
        """
        return x, c

    @classmethod
    def marker(cls, c: Any) -> Tensor:
        """Return the tensor of the conditioning that identifies a forward of the model; forwards at other timesteps
        pass another tensor. By this marker a block that gradient checkpointing runs again finds its window."""
        return c

    @classmethod
    def problems(cls, block: Any) -> Iterator[str]:
        """Yield the reasons why the block cannot be swapped: what was found, why it prevents the swap, what to do.

        Only the first is used, so a check may rely on those before it.
        """
        if isinstance(block, RoutedDiTBlock):
            yield "it runs the fused kernels as it is; give dtr_kernels.nn.DiT its routing when constructing it"
        try:
            layers = cls.layers(block)
        except Exception as error:
            yield f"it is not made as a {cls.name} is ({error}); leave this model unswapped"
            return
        names, method = _names(block), cls.method(type(block))
        # List all signs of another kind of block together, as a single one would mislead.
        kind = [
            *checks.missing_problems(layers, checks.PARTS, cls.name),
            *checks.argument_problems(block, cls.arguments, method),
            *checks.norm_kind_problems(layers, names),
        ]
        if kind:
            yield "; ".join(kind)
        called = cls.calls(block)
        yield from checks.patch_problems(block, called, method)
        yield from checks.linear_problems(layers, names)
        yield from checks.norm_problems(layers, names)
        yield from checks.dropout_problems(block, called)
        parts = (layers.attn.qkv, layers.mlp.fc1, layers.mlp.fc2)
        read = [names[id(layer)] for part in parts for layer in linear_layers(part) if id(layer) in names]
        if layers.kind.affine:
            of_norms = {id(getattr(norm, p, None)) for norm in (layers.norm1, layers.norm2) for p in ("weight", "bias")}
            read += [name for name, parameter in block.named_parameters() if id(parameter) in of_norms]
        yield from checks.parameter_problems(block, (*called, *read))
        yield from checks.function_problems(layers, names)

    @classmethod
    def calls(cls, block: Any) -> tuple[str, ...]:
        """Return the modules, as paths within the block, that the fused block calls, whatever they are.

        It reads at most the parameters of all other modules, so these must not be wrapped or patched.
        """
        layers, names = cls.layers(block), _names(block)
        norms = (getattr(layers.attn, norm, None) for norm in ("q_norm", "k_norm"))
        parts = (layers.attn.proj, *norms, layers.adaLN_modulation)
        return (*cls.called, *(names[id(part)] for part in parts if id(part) in names))

    @classmethod
    def channels(cls, block: Any) -> int:
        """Return the number of channels C that a routing chooses from: the channels of the block's input."""
        return cls.layers(block).attn.qkv.in_features

    @classmethod
    def weight(cls, block: Any) -> Tensor:
        """Return the first weight that the block's input meets; it has the input's dtype and device."""
        return linear_layers(cls.layers(block).attn.qkv)[0].weight

    @classmethod
    def conditioned(cls, block: Any) -> tuple[nn.Module, ...]:
        """Return the parts of a block that see the conditioning alone; a ``Sampler`` remembers their results."""
        modulation = cls.layers(block).adaLN_modulation
        return (modulation,) if isinstance(modulation, nn.Module) else ()

    @classmethod
    def method(cls, kind: type) -> str:
        """Return the method of blocks of class ``kind`` that computes a block, and that swapping replaces."""
        return "forward"

    @classmethod
    def checkpoints(cls, block: Any) -> bool:
        """Return whether the block itself, not its model, makes the backward pass run ``method`` again."""
        return False

    @classmethod
    def windows(cls, block: Any) -> WindowSource | None:
        """Return the source of the block's own windows; None if the block is unrouted."""
        return None

    @classmethod
    def run(cls, block: Any, x: Tensor, c: Any, window: ChannelWindow | None, scope: str) -> Tensor:
        """Return the block's output for input x and conditioning c, by the fused kernels."""
        return advance(cls.layers(block), Stream(x), c, window, scope).sum()

    @classmethod
    def run_plain(cls, block: Any, x: Tensor, c: Any, mask: Tensor | None, scope: str) -> Tensor:
        """Return the output of ``run`` by the reference; mask [B, C], 1 where active."""
        return reference.dit_block(cls.layers(block), x, c, mask, scope)

    @classmethod
    def trial_input(cls, copy: Any, random: RandomTensor) -> tuple[Any, ...]:
        """Return small arguments of the block for two samples; ``random(*shape)`` is normally distributed, in the
        block's dtype and on its device."""
        C, modulation = cls.channels(copy), cls.layers(copy).adaLN_modulation
        width = inputs_of(modulation) if isinstance(modulation, nn.Module) else None  # narrower in MaskDiT's decoder
        return random(2, TRIAL_TOKENS, C), random(2, width or C)

    @classmethod
    def prepare_trial(cls, copy: Any, c: Any, random: RandomTensor) -> Tensor | None:
        """Open in a copy of a block the gates that are closed before training, and would hide all differences.

        Returns:
            The mask [2, C] of the block's own routing for two samples; None if it has none.

        Raises:
            Unfit: if the trial shows a reason not to swap the block.
        """
        modulation, C = cls.layers(copy).adaLN_modulation, cls.channels(copy)
        shape = list(modulation(c).shape)
        if shape != [2, 6 * C]:
            raise Unfit(
                f"adaLN_modulation makes {shape} of c {list(c.shape)}, not six vectors [2, {C}]; do not swap it"
            )
        path = next((name for name, module in copy.named_modules() if module is modulation), None)
        if path is None:
            raise Unfit(
                "its family makes adaLN_modulation a function, in which gates that are zero before training would hide "
                "all differences; override prepare_trial, which opens them"
            )
        open_gates(copy, path, random(2, 6 * C))
        return None


def _names(block: nn.Module) -> dict[int, str]:
    """Return the paths of modules within a block by their ids, for layers that have other names."""
    return {id(module): name for name, module in block.named_modules()}


def inputs_of(modulation: nn.Module) -> int | None:
    """Return the number of features that the first linear layer within a module reads; None if it has none."""
    layers = (module for module in modulation.modules() if isinstance(module, nn.Linear))
    return next((layer.in_features for layer in layers), None)


def open_gates(copy: nn.Module, path: str, noise: Tensor) -> None:
    """Add noise [2, 6C] and its own input to the output of the module at ``path``, for two samples.

    The output in a fresh DiT is zero, and would hide any difference.
    """
    parent, _, name = path.rpartition(".")
    setattr(copy.get_submodule(parent), name, _OpenGates(copy.get_submodule(path), noise))


class _OpenGates(nn.Module):
    def __init__(self, modulation: nn.Module, noise: Tensor) -> None:
        super().__init__()
        self.modulation = modulation
        self.noise = noise

    def forward(self, c: Tensor) -> Tensor:
        width = self.noise.shape[1]
        return self.modulation(c) + self.noise + c.repeat(1, -(-width // c.shape[1]))[:, :width]
