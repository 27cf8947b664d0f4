"""How many operations and bytes a function needs at least: the floor that measured times are held against.

Counts are of the function, not of one way to compute it. A multiply-add is two operations; element-wise arithmetic is
not counted, since it never is what takes the time, nor are sums over tokens. Masked channels are not counted either,
also where an implementation multiplies them: the function needs its window alone.

Bytes are those of kernels with everything between two matrix products in one of them: a matrix product reads its
operands once and writes its result once, and so does the kernel between. What the backward pass can use again is not
computed twice, but where the forward pass writes something for that purpose only, it counts.

Kernels have their counts in their declarations. Sizes have the names that tensors have everywhere here: B samples, N
tokens, C channels, W of them active (W = C is the unrouted function; in scope "inner" the channels of active heads), O
outputs of a linear layer, H hidden channels of the MLP.
"""

from __future__ import annotations

from typing import NamedTuple

from dtr_kernels.ops.declaration import AUTOCAST, PRECISIONS, STATISTIC, Itemsizes, Work
from dtr_kernels.ops.gated_norm import backward_work as norm_backward
from dtr_kernels.ops.gated_norm import forward_work as norm_forward
from dtr_kernels.ops.residual import backward_work as gated_residual_backward
from dtr_kernels.ops.residual import forward_work as gated_residual_forward
from dtr_kernels.ops.window_linear import forward_work as window_linear_forward
from dtr_kernels.ops.window_linear import gelu_backward_work as gelu_linear_backward
from dtr_kernels.ops.window_linear import gelu_forward_work as gelu_linear_forward
from dtr_kernels.ops.window_linear import gradients_work as window_linear_gradients
from dtr_kernels.ops.window_linear import linear_gradients_work as linear_gradients
from dtr_kernels.ops.window_linear import linear_work as linear_forward

#: For what is timed only.
NOT_COUNTED = Work()

#: By the precision's name on the command line.
ITEMSIZES = {name: precision.items for name, precision in PRECISIONS.items()} | {"autocast": AUTOCAST.items}


def adamw_step(P: int, itemsize: int) -> Work:
    """AdamW of P parameters: reads parameter, gradient and both moments, writes all but the gradient."""
    return Work(bytes=7 * P * itemsize)


def linear_weight_gradient(M: int, K: int, O: int, items: Itemsizes) -> Work:
    """The gradients of a linear layer's weight and bias: the tensors of its forward pass, read where that writes."""
    return linear_forward(M, K, O, items)


def attention_forward(B: int, N: int, C: int, items: Itemsizes) -> Work:
    """Softmax attention between linear layers, whatever the number of heads: queries with keys, then with values."""
    return Work(4 * B * N * N * C, 4 * B * N * C * items.operand)


def attention_backward(B: int, N: int, C: int, heads: int, items: Itemsizes) -> Work:
    """Gradients of queries, keys and values.

    Five products: one is the forward pass's first again, which takes less time than keeping N numbers for every token
    and head. Kept is one, the softmax's denominator.
    """
    return Work(10 * B * N * N * C, 8 * B * N * C * items.operand + B * heads * N * STATISTIC)


# --- a block ---------------------------------------------------------------------------------------------------------


class _Active(NamedTuple):
    """Channels that are active: behind norms, in the attention, and hidden ones."""

    seen: int
    attended: int
    hidden: int


def _active(C: int, W: int, H: int, scope: str) -> _Active:
    return _Active(C, W, H * W // C) if scope == "inner" else _Active(W, C, H)


def block_forward(B: int, N: int, C: int, W: int, H: int, items: Itemsizes, scope: str) -> Work:
    """A routed block that stands alone, from its input to its output, both [B, N, C]."""
    return (
        norm_forward(B, N, C, _active(C, W, H, scope).seen, items, compact=True)
        + _between_norms_forward(B, N, C, W, H, items, scope)
        + gated_residual_forward(B, N, C, items)
    )


def block_training(B: int, N: int, C: int, W: int, H: int, heads: int, items: Itemsizes, scope: str) -> Work:
    """Its forward pass, and gradients of its input, its conditioning and its parameters."""
    return (
        block_forward(B, N, C, W, H, items, scope)
        + _kept_for_backward(B, N, C, W, H, heads, items, scope)
        + gated_residual_backward(B, N, C, items)
        + _between_norms_backward(B, N, C, W, H, heads, items, scope)
        + norm_backward(B, N, C, _active(C, W, H, scope).seen, items, compact=True)
    )


def _between_norms_forward(B: int, N: int, C: int, W: int, H: int, items: Itemsizes, scope: str) -> Work:
    """All of a block but what joins it to its neighbours: its first norm and its last gated residual."""
    W, A, H = _active(C, W, H, scope)
    fc1_width = W if scope == "branch" else C
    return (
        linear_forward(B, C, 6 * C, items)
        + window_linear_forward(B, N, C, W, 3 * A, items)
        + attention_forward(B, N, A, items)
        + linear_forward(B * N, A, C, items)
        + norm_forward(B, N, C, W, items, branch=True, compact=scope == "branch")
        + gelu_linear_forward(B, N, C, fc1_width, H, items, write_pre=False)
        + linear_forward(B * N, H, C, items)
    )


def _kept_for_backward(B: int, N: int, C: int, W: int, H: int, heads: int, items: Itemsizes, scope: str) -> Work:
    """What a block's forward pass writes for the backward pass alone: before GELU, and the softmax's denominators."""
    _, attended, hidden = _active(C, W, H, scope)
    return Work(bytes=B * N * hidden * items.operand + B * (heads * attended // C) * N * STATISTIC)


def _between_norms_backward(B: int, N: int, C: int, W: int, H: int, heads: int, items: Itemsizes, scope: str) -> Work:
    W, A, H = _active(C, W, H, scope)
    fc1_width = W if scope == "branch" else C
    return (
        linear_weight_gradient(B * N, H, C, items)
        + gelu_linear_backward(B, N, H, C, items, write_act=False)
        + window_linear_gradients(B, N, C, fc1_width, H, items)
        + norm_backward(B, N, C, W, items, branch=True, compact=scope == "branch")
        + linear_gradients(B * N, A, C, items)
        + attention_backward(B, N, A, heads * A // C, items)
        + window_linear_gradients(B, N, C, W, 3 * A, items)
        + linear_gradients(B, C, 6 * C, items)
    )


# --- a whole DiT -----------------------------------------------------------------------------------------------------

# Frequencies, as sines and cosines, that a timestep is embedded with.
_FREQUENCIES = 256


class Dit(NamedTuple):
    """The sizes of a DiT; a patch has ``patch_inputs`` numbers at the input and ``patch_outputs`` at the output."""

    B: int
    N: int
    C: int
    W: int
    H: int
    heads: int
    depth: int
    patch_inputs: int
    patch_outputs: int
    items: Itemsizes
    scope: str


def dit_forward(dit: Dit) -> Work:
    """A DiT from images, timesteps and labels to its prediction; its blocks are one chain, without a kernel to end
    one."""
    B, N, C, W, H, _, depth, patch_inputs, patch_outputs, items, scope = dit
    seen = _active(C, W, H, scope).seen
    return (
        _embedding_forward(B, N, C, patch_inputs, items)
        + norm_forward(B, N, C, seen, items, compact=True)
        + (depth - 1) * norm_forward(B, N, C, seen, items, branch=True, compact=True)
        + depth * _between_norms_forward(B, N, C, W, H, items, scope)
        + linear_forward(B, C, 2 * C, items)
        + norm_forward(B, N, C, C, items, branch=True)
        + linear_forward(B * N, C, patch_outputs, items)
    )


def dit_modulations(B: int, C: int, depth: int, items: Itemsizes) -> Work:
    """Of a DiT's forward pass what makes the vectors that its blocks and its final layer are modulated with."""
    return depth * linear_forward(B, C, 6 * C, items) + linear_forward(B, C, 2 * C, items)


def dit_training(dit: Dit) -> Work:
    """Its forward pass, and from the gradient of the prediction that of every parameter. The optimizer's step is
    ``adamw_step``."""
    B, N, C, W, H, heads, depth, patch_inputs, patch_outputs, items, scope = dit
    seen = _active(C, W, H, scope).seen
    block = _kept_for_backward(B, N, C, W, H, heads, items, scope)
    block += _between_norms_backward(B, N, C, W, H, heads, items, scope)
    return (
        dit_forward(dit)
        + linear_gradients(B * N, C, patch_outputs, items)
        + norm_backward(B, N, C, C, items, branch=True, dstream=False)
        + linear_gradients(B, C, 2 * C, items)
        + depth * block
        + (depth - 1) * norm_backward(B, N, C, seen, items, branch=True, compact=True)
        + norm_backward(B, N, C, seen, items, compact=True)
        + _embedding_backward(B, N, C, patch_inputs, items)
    )


def _embedding_forward(B: int, N: int, C: int, patch_inputs: int, items: Itemsizes) -> Work:
    """Patches with their positions, timesteps through an MLP, and labels by a table."""
    positions, labels = N * C * items.stream, B * C * items.stream
    return (
        linear_forward(B * N, patch_inputs, C, items)
        + linear_forward(B, _FREQUENCIES, C, items)
        + linear_forward(B, C, C, items)
        + Work(bytes=positions + labels)
    )


def _embedding_backward(B: int, N: int, C: int, patch_inputs: int, items: Itemsizes) -> Work:
    """Gradients of its parameters; images and timesteps have none."""
    labels = B * C * items.stream
    return (
        linear_weight_gradient(B * N, patch_inputs, C, items)
        + linear_weight_gradient(B, _FREQUENCIES, C, items)
        + linear_gradients(B, C, C, items)
        + Work(bytes=labels)
    )
