"""A DiT block by the names that the fused forward and the reference read, whatever the block itself calls its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dtr_kernels.reference.transformer import BlockKind


class Layers(NamedTuple):
    """The parts of a DiT block. They are the block's own, or stand for some of them.

    Attributes:
        norm1: the norm before the attention, of which ``eps`` is read, and of an affine one ``weight`` and ``bias``.
        attn: ``AttentionLayers``, or the block's own attention with these attributes; also ``q_norm`` and ``k_norm``
            where it has them, which are called.
        norm2: the norm before the MLP, of which the same is read.
        mlp: ``MlpLayers``, or the block's own MLP with these attributes.
        adaLN_modulation: makes shift, scale and gate of attention and MLP, [B, 6C], of the conditioning. To supply
            them instead, ``layers._replace(adaLN_modulation=lambda c: vectors)``.
        kind: of the norms and the activation; ``qk_norm`` is not read.
    """

    norm1: Any
    attn: Any
    norm2: Any
    mlp: Any
    adaLN_modulation: Callable[[Any], Tensor]
    kind: BlockKind = BlockKind()


class AttentionLayers(NamedTuple):
    """Self-attention: ``qkv`` an nn.Linear of C to 3C features or a ``StackedLinear``, ``proj`` any module."""

    qkv: Any
    proj: nn.Module
    num_heads: int


class RMSNormLayer(NamedTuple):
    """RMSNorm over the last dimension, eps added to the mean square."""

    weight: Tensor | None
    eps: float


class MlpLayers(NamedTuple):
    """fc2(act(fc1(x))), fc1 an nn.Linear or a ``StackedLinear``; ``act`` is compared with the kind's activation, with
    SiLU for "swiglu", and not called."""

    fc1: Any
    act: Callable[[Tensor], Tensor]
    fc2: Any


class StackedLinear(NamedTuple):
    """Linear layers of one input as a single one, such as separate queries, keys and values, or SwiGLU's two.

    The weights are copied into one tensor at each use, and the gradients split.
    """

    layers: tuple[nn.Linear, ...]

    @property
    def in_features(self) -> int:
        return self.layers[0].in_features

    @property
    def out_features(self) -> int:
        return sum(layer.out_features for layer in self.layers)

    @property
    def weight(self) -> Tensor:
        return torch.cat([*(layer.weight for layer in self.layers)])

    @property
    def bias(self) -> Tensor | None:
        return None if self.layers[0].bias is None else torch.cat([*(layer.bias for layer in self.layers)])

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


def linear_layers(layer: Any) -> tuple[Any, ...]:
    """Return the layers whose weights are read where ``layer`` is."""
    return layer.layers if isinstance(layer, StackedLinear) else (layer,)
