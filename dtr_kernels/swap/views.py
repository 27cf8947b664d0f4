"""A DiT block's parts under the names that the fused forward and the reference read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dtr_kernels.reference.transformer import BlockKind


class Layers(NamedTuple):
    """The parts of a DiT block: the block's own, or objects that represent them.

    Attributes:
        norm1: the norm before the attention. Its ``eps`` is read, and if it is affine its ``weight`` and ``bias``.
        attn: ``AttentionLayers``, or the block's own attention with these attributes; its ``q_norm`` and ``k_norm``, if
            any, are called.
        norm2: the norm before the MLP, read like ``norm1``.
        mlp: ``MlpLayers``, or the block's own MLP with these attributes.
        adaLN_modulation: maps the conditioning to shift, scale and gate of attention and MLP, [B, 6C]. To supply them
            instead, use ``layers._replace(adaLN_modulation=lambda c: vectors)``.
        kind: of the norms and the activation; ``qk_norm`` is not read.
    """

    norm1: Any
    attn: Any
    norm2: Any
    mlp: Any
    adaLN_modulation: Callable[[Any], Tensor]
    kind: BlockKind = BlockKind()


class AttentionLayers(NamedTuple):
    """Self-attention: ``qkv`` is an nn.Linear from C to 3C features or a ``StackedLinear``, ``proj`` any module."""

    qkv: Any
    proj: nn.Module
    num_heads: int


class RMSNormLayer(NamedTuple):
    """RMSNorm over the last dimension, eps added to the mean square."""

    weight: Tensor | None
    eps: float


class MlpLayers(NamedTuple):
    """fc2(act(fc1(x))). fc1 is an nn.Linear or a ``StackedLinear``. ``act`` is not called, but compared with the kind's
    activation, with SiLU for "swiglu"."""

    fc1: Any
    act: Callable[[Tensor], Tensor]
    fc2: Any


class StackedLinear(NamedTuple):
    """Linear layers with the same input as a single one, such as separate queries, keys and values, or SwiGLU's two.

    The weights are copied into one tensor at each use, and the gradients are split.
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
    """Return the layers that hold the weights of ``layer``."""
    return layer.layers if isinstance(layer, StackedLinear) else (layer,)
