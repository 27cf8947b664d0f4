"""What a family of blocks says about itself, so that nothing else in this package knows one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from dtr_kernels.routing import ChannelWindow

RandomTensor = Callable[..., Tensor]


class WindowSource(Protocol):
    """Where a block finds the channels it computes, while the forward of its model runs."""

    def window_of(self, block: Any) -> ChannelWindow | Tensor | None:
        """The window of each sample; or a mask [B, C] (1 = active), which runs the plain PyTorch path."""


class Unfit(Exception):
    """Raised while a trial is prepared: why the block cannot be swapped."""


class Family:
    """A kind of blocks that can be swapped. To add one, derive from this and put the class into ``core.FAMILIES``.

    Never instantiated: a block belongs to the class itself, which copies and pickles of the block find by its name.

    Attributes:
        name: what its blocks are called in messages.
        anatomy: what such a block is known by.
        scopes: what its routing can mask, see ``swap_blocks``.
    """

    name: str
    anatomy: str
    scopes: tuple[str, ...]

    @staticmethod
    def matches(block: nn.Module) -> bool:
        """Whether the module is meant to be a block of this family; ``problems`` says whether it can be swapped."""
        raise NotImplementedError

    @staticmethod
    def problems(block: Any) -> Iterator[str]:
        """Why the block cannot be swapped: what was found, why it is in the way, what to do; nothing for a good block.

        Only the first is asked for, so that a question may rely on those before it.
        """
        raise NotImplementedError

    @staticmethod
    def channels(block: Any) -> int:
        """The number of channels C that a routing chooses from: those of the block's input."""
        raise NotImplementedError

    @staticmethod
    def weight(block: Any) -> Tensor:
        """The weight that the block's input meets first, which is of the dtype and on the device of that input."""
        raise NotImplementedError

    @staticmethod
    def method(kind: type) -> str:
        """The method of blocks of class ``kind`` that computes a block, and that swapping replaces."""
        return "forward"

    @staticmethod
    def checkpoints(block: Any) -> bool:
        """Whether the block itself, and not its model, sees to it that the backward pass runs ``method`` again."""
        return False

    @staticmethod
    def windows(block: Any) -> WindowSource | None:
        """The source of the block's own windows, None where the block is unrouted."""
        return None

    @staticmethod
    def run(block: Any, x: Tensor, c: Tensor, window: ChannelWindow | None, scope: str) -> Tensor:
        """The block's output for input x and conditioning c, by the fused kernels."""
        raise NotImplementedError

    @staticmethod
    def run_plain(block: Any, x: Tensor, c: Tensor, mask: Tensor | None, scope: str) -> Tensor:
        """The same in plain PyTorch; mask [B, C], 1 where active."""
        raise NotImplementedError

    @staticmethod
    def trial_input(copy: Any, random: RandomTensor) -> tuple[Tensor, Tensor]:
        """Small inputs x and c of two samples; ``random(*shape)`` is normally distributed, in the block's dtype."""
        raise NotImplementedError

    @staticmethod
    def prepare_trial(copy: Any, c: Tensor, random: RandomTensor) -> Tensor | None:
        """Opens in a copy of a block whatever is closed before training, and would hide all differences behind it.

        Returns:
            The mask [2, C] of the block's own routing for two samples, None where it has none.

        Raises:
            Unfit: if something is in the way that only a trial shows.
        """
        raise NotImplementedError
