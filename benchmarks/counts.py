"""Counts of the least operations and bytes of a function: the floor for measured times.

Counts belong to the function, not to one way to compute it. A multiply-add is two operations; element-wise arithmetic
and sums over tokens are not counted, since they never take most of the time. Masked channels are not counted either,
even if an implementation multiplies them: the function needs only its window.

Bytes assume kernels that fuse everything between two matrix products: a matrix product reads its operands once and
writes its result once, and so does the kernel between. Values that the backward pass can reuse are not computed twice,
but a value that the forward pass writes only for the backward pass is counted.

Kernels have their counts in their declarations. Sizes have the usual names: B samples, N tokens, C channels, W of them
active (W = C is the unrouted function; in scope "inner" the channels of active heads), O outputs of a linear layer, H
hidden channels of the MLP.
"""

from __future__ import annotations

from typing import NamedTuple

from dtr_kernels.ops.activations import parts_of
from dtr_kernels.ops.declaration import AUTOCAST, PRECISIONS, STATISTIC, Itemsizes, Work
from dtr_kernels.ops.gated_norm import backward_work as norm_backward
from dtr_kernels.ops.gated_norm import forward_work as norm_forward
from dtr_kernels.ops.residual import backward_work as gated_residual_backward
from dtr_kernels.ops.residual import forward_work as gated_residual_forward
from dtr_kernels.ops.window_linear import forward_work as window_linear_forward
from dtr_kernels.ops.window_linear import gradients_work as window_linear_gradients
from dtr_kernels.ops.window_linear import linear_gradients_work as linear_gradients
from dtr_kernels.ops.window_linear import linear_work as linear_forward
from dtr_kernels.ops.window_linear import mlp_backward_work as mlp_backward
from dtr_kernels.ops.window_linear import mlp_forward_work as mlp_forward
from dtr_kernels.reference.transformer import BlockKind

#: For sides that are only timed.
NOT_COUNTED = Work()

#: By the precision's name on the command line.
ITEMSIZES = {name: precision.items for name, precision in PRECISIONS.items()} | {"autocast": AUTOCAST.items}


def adamw_step(P: int, itemsize: int) -> Work:
    """Count AdamW on P parameters: it reads parameter, gradient and both moments, and writes all but the gradient."""
    return Work(bytes=7 * P * itemsize)


def linear_weight_gradient(M: int, K: int, O: int, items: Itemsizes) -> Work:
    """Count the gradients of a linear layer's weight and bias: the forward pass with reads and writes swapped."""
    return linear_forward(M, K, O, items)


def attention_forward(B: int, N: int, C: int, items: Itemsizes) -> Work:
    """Count softmax attention between linear layers, for any number of heads: queries with keys, then with values."""
    return Work(4 * B * N * N * C, 4 * B * N * C * items.operand)


def attention_backward(B: int, N: int, C: int, heads: int, items: Itemsizes) -> Work:
    """Count the gradients of queries, keys and values.

    There are five products. One repeats the forward pass's first, which takes less time than storing N numbers for
    every token and head; only one number is stored for each, the softmax's denominator.
    """
    return Work(10 * B * N * N * C, 8 * B * N * C * items.operand + B * heads * N * STATISTIC)


# --- a block ---------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """The sizes of a routed block; H is the number of the activation's output channels.

    Parameters of norms are not counted, as they are single vectors for all samples.
    """

    B: int
    N: int
    C: int
    W: int
    H: int
    heads: int
    items: Itemsizes
    scope: str
    kind: BlockKind = BlockKind()

    def forward(self) -> Work:
        """Count the block alone, from its input to its output, both [B, N, C]."""
        B, N, C = self[:3]
        return self.first_norm() + self.between_norms() + gated_residual_forward(B, N, C, self.items)

    def training(self) -> Work:
        """Count the forward pass, and gradients of input, conditioning and parameters."""
        B, N, C = self[:3]
        return (
            self.forward()
            + gated_residual_backward(B, N, C, self.items)
            + self.between_norms_backward()
            + self.first_norm_backward()
        )

    def first_norm(self, branch: bool = False) -> Work:
        """Count the first norm; with ``branch`` also the residual before it."""
        return norm_forward(*self._seen, self.items, branch, compact=True, rms=self._rms)

    def first_norm_backward(self, branch: bool = False) -> Work:
        """Count the gradients of the first norm."""
        return norm_backward(*self._seen, self.items, branch, compact=True, rms=self._rms)

    def between_norms(self) -> Work:
        """Count the forward pass without the parts that join the block to its neighbours, the first norm and the last
        gated residual."""
        B, N, C, _, H, _, items, scope, _ = self
        *_, W = self._seen
        _, A, H = self._computed
        return (
            linear_forward(B, C, 6 * C, items)
            + window_linear_forward(B, N, C, W, 3 * A, items, self._rms)
            + attention_forward(B, N, A, items)
            + linear_forward(B * N, A, C, items)
            + norm_forward(B, N, C, W, items, branch=True, compact=scope == "branch", rms=self._rms)
            + mlp_forward(B, N, C, self._fc1_width, H, items, False, self._parts, self._rms)
            + linear_forward(B * N, H, C, items)
        )

    def between_norms_backward(self) -> Work:
        """Count the gradients of ``between_norms``, and the values that its forward pass writes only for them: the
        activation's input, and the softmax's denominators."""
        B, N, C, _, H, _, items, scope, _ = self
        *_, W = self._seen
        heads, A, H = self._computed
        parts, rms = self._parts, self._rms
        return (
            Work(bytes=B * N * parts * H * items.operand + B * heads * N * STATISTIC)
            + linear_weight_gradient(B * N, H, C, items)
            + mlp_backward(B, N, H, C, items, write_act=False, parts=parts)
            + window_linear_gradients(B, N, C, self._fc1_width, parts * H, items, rms=rms)
            + norm_backward(B, N, C, W, items, branch=True, compact=scope == "branch", rms=rms)
            + linear_gradients(B * N, A, C, items)
            + attention_backward(B, N, A, heads, items)
            + window_linear_gradients(B, N, C, W, 3 * A, items, rms=rms)
            + linear_gradients(B, C, 6 * C, items)
        )

    @property
    def _seen(self) -> tuple[int, int, int, int]:
        """B, N, C, and the number of channels that norms see: in scope "inner" all."""
        return self.B, self.N, self.C, self.C if self.scope == "inner" else self.W

    @property
    def _computed(self) -> tuple[int, int, int]:
        """Heads, their channels, and hidden channels: in scope "inner" the share W / C of each."""
        if self.scope != "inner":
            return self.heads, self.C, self.H
        return self.heads * self.W // self.C, self.W, self.H * self.W // self.C

    @property
    def _fc1_width(self) -> int:
        return self.W if self.scope == "branch" else self.C

    @property
    def _parts(self) -> int:
        return parts_of(self.kind.activation)

    @property
    def _rms(self) -> bool:
        return self.kind.norm == "rms"


# --- a whole DiT -----------------------------------------------------------------------------------------------------

# Frequencies, as sines and cosines, in the embedding of a timestep.
_FREQUENCIES = 256


class Dit(NamedTuple):
    """The sizes of a DiT; a patch has ``patch_inputs`` numbers at the input and ``patch_outputs`` at the output."""

    block: Block
    depth: int
    patch_inputs: int
    patch_outputs: int


def dit_forward(dit: Dit) -> Work:
    """Count a DiT from images, timesteps and labels to its prediction; its blocks form one chain, without kernels to
    end each block."""
    block, depth, patch_inputs, patch_outputs = dit
    B, N, C, items = *block[:3], block.items
    return (
        _embedding_forward(B, N, C, patch_inputs, items)
        + block.first_norm()
        + (depth - 1) * block.first_norm(branch=True)
        + depth * block.between_norms()
        + linear_forward(B, C, 2 * C, items)
        + norm_forward(B, N, C, C, items, branch=True)
        + linear_forward(B * N, C, patch_outputs, items)
    )


def dit_modulations(B: int, C: int, depth: int, items: Itemsizes) -> Work:
    """Count the layers that compute modulations, of all blocks and the final layer, in a DiT's forward pass."""
    return depth * linear_forward(B, C, 6 * C, items) + linear_forward(B, C, 2 * C, items)


def dit_training(dit: Dit) -> Work:
    """Count the forward pass, and the gradients of every parameter from that of the prediction. The optimizer's step is
    ``adamw_step``."""
    block, depth, patch_inputs, patch_outputs = dit
    B, N, C, items = *block[:3], block.items
    return (
        dit_forward(dit)
        + linear_gradients(B * N, C, patch_outputs, items)
        + norm_backward(B, N, C, C, items, branch=True, dstream=False)
        + linear_gradients(B, C, 2 * C, items)
        + depth * block.between_norms_backward()
        + (depth - 1) * block.first_norm_backward(branch=True)
        + block.first_norm_backward()
        + _embedding_backward(B, N, C, patch_inputs, items)
    )


def _embedding_forward(B: int, N: int, C: int, patch_inputs: int, items: Itemsizes) -> Work:
    """Count patches with their positions, timesteps through an MLP, and labels by a table."""
    positions, labels = N * C * items.stream, B * C * items.stream
    return (
        linear_forward(B * N, patch_inputs, C, items)
        + linear_forward(B, _FREQUENCIES, C, items)
        + linear_forward(B, C, C, items)
        + Work(bytes=positions + labels)
    )


def _embedding_backward(B: int, N: int, C: int, patch_inputs: int, items: Itemsizes) -> Work:
    """Count the gradients of the embedding's parameters; images and timesteps have none."""
    labels = B * C * items.stream
    return (
        linear_weight_gradient(B * N, patch_inputs, C, items)
        + linear_weight_gradient(B, _FREQUENCIES, C, items)
        + linear_gradients(B, C, C, items)
        + Work(bytes=labels)
    )
