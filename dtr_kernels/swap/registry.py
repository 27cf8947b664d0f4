"""The families that ``swap_blocks`` knows."""

from __future__ import annotations

import inspect
from typing import TypeVar

from torch import nn

from dtr_kernels.swap.diffusers import Diffusers
from dtr_kernels.swap.dit import DiT
from dtr_kernels.swap.family import Family
from dtr_kernels.swap.jit import JiT
from dtr_kernels.swap.lightning_dit import LightningDiT
from dtr_kernels.swap.public_dtr import PublicDTR
from dtr_kernels.swap.unet import ADM

NewFamily = TypeVar("NewFamily", bound=type[Family])

# A block belongs to the first family that matches it.
FAMILIES: list[type[Family]] = [PublicDTR, JiT, LightningDiT, DiT, ADM, Diffusers]


def register_family(family: NewFamily) -> NewFamily:
    """Make ``swap_blocks`` support another family of blocks; also a decorator. Later families are tried first.

    A family of the same name from the same module replaces the earlier one, so a module may be imported again.

    Example::

        @dtr.swap.register_family
        class MyBlocks(dtr.swap.Family):
            @classmethod
            def matches(cls, block):
                return isinstance(block, MyBlock)

            @classmethod
            def layers(cls, block):
                attn = dtr.swap.AttentionLayers(block.att.qkv, block.att.out, block.att.heads)
                mlp = dtr.swap.MlpLayers(block.ffn[0], block.ffn[1], block.ffn[2])
                return dtr.swap.Layers(block.ln1, attn, block.ln2, mlp, block.ada)

    Args:
        family: a class derived from ``Family``, defined in a module, where pickles of swapped models find it.

    Returns:
        ``family`` itself.

    Raises:
        TypeError: if family is no such class.
        ValueError: if it is defined inside a function, does not define ``matches``, or has a method with other
            arguments than ``Family``'s.
    """
    if not isinstance(family, type) or not issubclass(family, Family):
        raise TypeError(f"family must be a class derived from dtr_kernels.swap.Family, got {family!r}")
    name = f"{family.__module__}.{family.__qualname__}"
    if "<locals>" in family.__qualname__:
        raise ValueError(f"{name} is defined inside a function, where no pickle could find it; define it in a module")
    if all("matches" not in vars(base) for base in family.__mro__[: family.__mro__.index(Family)]):
        raise ValueError(f"{name} has no method matches(block), which says whether a module is one of its blocks")
    for method, default in inspect.getmembers(Family, inspect.ismethod):
        expected, own = (list(inspect.signature(f).parameters) for f in (default, getattr(family, method)))
        bound = inspect.ismethod(getattr(family, method))
        if not bound or (method != "arguments" and len(own) != len(expected)):
            raise ValueError(
                f"{name}.{method} takes ({', '.join(own)}), but is called with ({', '.join(expected)}), and on the "
                "class: make it a class method"
            )
    names = [f"{known.__module__}.{known.__qualname__}" for known in FAMILIES]
    if name in names:
        FAMILIES[names.index(name)] = family
    else:
        FAMILIES.insert(0, family)
    return family


def family_of(module: nn.Module) -> type[Family] | None:
    """Return the family whose block a module is meant to be; None if there is none."""
    return next((family for family in FAMILIES if family.matches(module)), None)
