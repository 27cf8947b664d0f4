"""How many operations and bytes a function needs at least: the floor that measured times are held against.

Counts are of the function, not of one way to compute it. A multiply-add is two operations; element-wise arithmetic is
not counted, since it never is what takes the time, nor are sums over tokens. Masked channels are not counted either,
also where an implementation multiplies them: the function needs its window alone.

Bytes are those of kernels with everything between two matrix products in one of them: a matrix product reads its
operands once and writes its result once, and so does the kernel between. What the backward pass can use again is not
computed twice, but where the forward pass writes something for that purpose only, it counts.

Sizes have the names that tensors have everywhere here: B samples, N tokens, C channels, W of them active (W = C is
the unrouted function), O outputs of a linear layer, H hidden channels of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Work:
    """Floating-point operations of matrix products, and bytes that must be read or written."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __sub__(self, other: Work) -> Work:
        return Work(self.flops - other.flops, self.bytes - other.bytes)

    def __rmul__(self, times: int) -> Work:
        return Work(times * self.flops, times * self.bytes)


#: For what is timed only.
NOT_COUNTED = Work()


class Itemsizes(NamedTuple):
    """Bytes of an element.

    Attributes:
        operand: of what matrix products read and write, and of modulation.
        stream: of the residual stream, of parameters and of the gradients of both. Under autocast it is larger.
    """

    operand: int
    stream: int


#: By the precision's name on the command line.
ITEMSIZES = {
    "fp32": Itemsizes(4, 4),
    "bf16": Itemsizes(2, 2),
    "fp16": Itemsizes(2, 2),
    "autocast": Itemsizes(2, 4),
}

# Means, sums over tokens and the like are fp32 in every precision; the first channel of a window is an int32.
_STATISTIC = 4
_START = 4


# --- element-wise kernels --------------------------------------------------------------------------------------------


def norm_forward(B: int, N: int, C: int, W: int, items: Itemsizes, branch: bool = False, compact: bool = False) -> Work:
    """``gated_norm_forward``: the stream (with a branch), the next layer's input on all channels (on active ones if
    ``compact``), and each token's mean and rstd."""
    T, written = B * N, W if compact else C
    work = T * (C if branch else W) * items.stream  # x
    work += (T + 2 * B) * written * items.operand  # u, shift and scale
    work += 2 * T * _STATISTIC + _starts(B, C, W)
    if branch:
        work += T * C * (items.operand + items.stream) + B * C * items.operand  # branch, stream, gate
    return Work(bytes=work)


def norm_backward(
    B: int,
    N: int,
    C: int,
    W: int,
    items: Itemsizes,
    branch: bool = False,
    compact: bool = False,
    dstream: bool = True,
) -> Work:
    """``gated_norm_backward``: gradients of x, branch, gate, shift and scale.

    Args:
        compact: whether the gradient that it is given has active channels only, and of the others their sum.
        dstream: whether the gradient of the stream is added, on the way to that of x.
    """
    T, seen = B * N, W if compact else C
    work = T * (W + C) * items.stream  # x and its gradient
    work += (T + B) * seen * items.operand  # du, scale
    work += 2 * T * _STATISTIC + _starts(B, C, W)
    work += 2 * B * C * _STATISTIC  # gradients of shift and scale
    if seen < C:
        work += T * _STATISTIC  # what deactivated channels sum up to
    if dstream:
        work += T * C * items.stream
    if branch:
        work += (2 * T + B) * C * items.operand + B * C * _STATISTIC  # branch and its gradient, gate and its gradient
    return Work(bytes=work)


def layer_norm_forward(B: int, N: int, C: int, itemsize: int) -> Work:
    """``F.layer_norm`` without affine parameters, and without anything around it."""
    return Work(bytes=B * N * (2 * C * itemsize + 2 * _STATISTIC))


def layer_norm_backward(B: int, N: int, C: int, itemsize: int) -> Work:
    """The gradient of its input."""
    return Work(bytes=B * N * (3 * C * itemsize + 2 * _STATISTIC))


def gated_residual_forward(B: int, N: int, C: int, items: Itemsizes) -> Work:
    """x + gate * branch."""
    return Work(bytes=B * N * C * (2 * items.stream + items.operand) + B * C * items.operand)


def gated_residual_backward(B: int, N: int, C: int, items: Itemsizes) -> Work:
    """Gradients of branch and gate; that of x is the gradient of the sum itself."""
    return Work(bytes=B * N * C * (items.stream + 2 * items.operand) + 2 * B * C * items.operand)


def adamw_step(P: int, itemsize: int) -> Work:
    """AdamW of P parameters: reads parameter, gradient and both moments, writes all but the gradient."""
    return Work(bytes=7 * P * itemsize)


# --- linear layers and attention -------------------------------------------------------------------------------------


def linear_forward(M: int, K: int, O: int, items: Itemsizes) -> Work:
    """A linear layer with bias, of M rows of K channels."""
    return Work(2 * M * K * O, M * (K + O) * items.operand + (K + 1) * O * items.stream)


def linear_input_gradient(M: int, K: int, O: int, items: Itemsizes) -> Work:
    """The gradient of its input."""
    return Work(2 * M * K * O, M * (K + O) * items.operand + K * O * items.stream)


def linear_weight_gradient(M: int, K: int, O: int, items: Itemsizes) -> Work:
    """The gradients of its weight and bias."""
    return linear_forward(M, K, O, items)  # the same tensors, read where the other writes


def linear_weight_product(M: int, K: int, O: int, items: Itemsizes) -> Work:
    """The gradient of its weight alone."""
    return linear_input_gradient(M, K, O, items)  # the same tensors again


def linear_gradients(M: int, K: int, O: int, items: Itemsizes) -> Work:
    """All of its gradients, by two matrix products."""
    return linear_input_gradient(M, K, O, items) + linear_weight_gradient(M, K, O, items)


def window_linear_forward(B: int, N: int, C: int, W: int, O: int, items: Itemsizes) -> Work:
    """``window_linear_forward``: the product over each sample's window, and p and q over its deactivated channels."""
    inactive = C - W
    vectors = 2 * B * inactive * items.operand  # shift, scale
    others = Work(4 * B * inactive * O, inactive * O * items.stream + vectors)
    return linear_forward(B * N, W, O, items) + others + _known_of_tokens(B, N, C, W)


def window_linear_input_gradient(B: int, N: int, C: int, W: int, O: int, items: Itemsizes) -> Work:
    """``window_linear_backward`` without parameters: gradients of the window, and of what deactivated channels are.

    The products of the latter are p, which the gradient of every token is multiplied with, and those with dp and dq.
    """
    inactive = C - W
    vectors = B * inactive * (items.operand + 2 * _STATISTIC)  # scale; gradients of shift and scale
    others = Work(6 * B * inactive * O, inactive * O * items.stream + vectors)
    if inactive:
        others += Work(bytes=B * N * _STATISTIC)  # what deactivated channels sum up to in each token
    return linear_input_gradient(B * N, W, O, items) + others + _known_of_tokens(B, N, C, W)


def window_linear_weight_gradient(B: int, N: int, C: int, W: int, O: int, items: Itemsizes) -> Work:
    """Gradients of its weight, on all channels, and bias."""
    inactive = C - W
    vectors = 2 * B * inactive * items.operand  # shift, scale
    others = Work(4 * B * inactive * O, inactive * O * items.stream + vectors)
    return linear_weight_gradient(B * N, W, O, items) + others + _known_of_tokens(B, N, C, W)


def window_linear_weight_product(B: int, N: int, C: int, W: int, O: int, items: Itemsizes) -> Work:
    """What the windows add to its weight's gradient: a sum on all channels, in fp32, since more is added to it."""
    T = B * N
    if W == C:
        return linear_weight_product(T, C, O, items)
    return Work(2 * T * W * O, T * (W + O) * items.operand + C * O * _STATISTIC + _starts(B, C, W))


def window_linear_gradients(B: int, N: int, C: int, W: int, O: int, items: Itemsizes) -> Work:
    """All of its gradients, by two matrix products."""
    sizes = B, N, C, W, O, items
    return window_linear_input_gradient(*sizes) + window_linear_weight_gradient(*sizes)


def gelu_linear_forward(B: int, N: int, C: int, W: int, H: int, items: Itemsizes, write_pre: bool) -> Work:
    """``linear_gelu_forward``: GELU of a window's linear layer, and before GELU if ``write_pre``."""
    pre = Work(bytes=B * N * H * items.operand if write_pre else 0)
    return window_linear_forward(B, N, C, W, H, items) + pre


def gelu_linear_backward(B: int, N: int, H: int, O: int, items: Itemsizes, write_act: bool) -> Work:
    """``gelu_linear_backward`` of Linear(GELU(pre)), from H to O channels: the gradient of pre, and GELU(pre) again if
    ``write_act``."""
    pre = Work(bytes=(1 + write_act) * B * N * H * items.operand)
    return linear_input_gradient(B * N, H, O, items) + pre


def attention_forward(B: int, N: int, C: int, items: Itemsizes) -> Work:
    """Softmax attention between linear layers, whatever the number of heads: queries with keys, then with values."""
    return Work(4 * B * N * N * C, 4 * B * N * C * items.operand)


def attention_backward(B: int, N: int, C: int, heads: int, items: Itemsizes) -> Work:
    """Gradients of queries, keys and values.

    Five products: one is the forward pass's first again, which takes less time than keeping N numbers for every token
    and head. Kept is one, the softmax's denominator.
    """
    return Work(10 * B * N * N * C, 8 * B * N * C * items.operand + B * heads * N * _STATISTIC)


def _starts(B: int, C: int, W: int) -> int:
    return B * _START if W < C else 0


def _known_of_tokens(B: int, N: int, C: int, W: int) -> Work:
    """mean * rstd of each token, and the windows: what the closed form reads where there are deactivated channels."""
    return Work(bytes=B * N * _STATISTIC + B * _START if W < C else 0)


# --- a block ---------------------------------------------------------------------------------------------------------


def block_forward(B: int, N: int, C: int, W: int, H: int, items: Itemsizes, scope: str) -> Work:
    """A routed block that stands alone, from its input to its output, both [B, N, C]."""
    return (
        norm_forward(B, N, C, W, items, compact=True)
        + _between_norms_forward(B, N, C, W, H, items, scope)
        + gated_residual_forward(B, N, C, items)
    )


def block_training(B: int, N: int, C: int, W: int, H: int, heads: int, items: Itemsizes, scope: str) -> Work:
    """Its forward pass, and gradients of its input, its conditioning and its parameters."""
    return (
        block_forward(B, N, C, W, H, items, scope)
        + _kept_for_backward(B, N, H, heads, items)
        + gated_residual_backward(B, N, C, items)
        + _between_norms_backward(B, N, C, W, H, heads, items, scope)
        + norm_backward(B, N, C, W, items, compact=True)
    )


def _between_norms_forward(B: int, N: int, C: int, W: int, H: int, items: Itemsizes, scope: str) -> Work:
    """All of a block but what joins it to its neighbours: its first norm and its last gated residual."""
    fc1_width = W if scope == "branch" else C
    return (
        linear_forward(B, C, 6 * C, items)
        + window_linear_forward(B, N, C, W, 3 * C, items)
        + attention_forward(B, N, C, items)
        + linear_forward(B * N, C, C, items)
        + norm_forward(B, N, C, W, items, branch=True, compact=scope == "branch")
        + gelu_linear_forward(B, N, C, fc1_width, H, items, write_pre=False)
        + linear_forward(B * N, H, C, items)
    )


def _kept_for_backward(B: int, N: int, H: int, heads: int, items: Itemsizes) -> Work:
    """What a block's forward pass writes for the backward pass alone: before GELU, and the softmax's denominators."""
    return Work(bytes=B * N * H * items.operand + B * heads * N * _STATISTIC)


def _between_norms_backward(B: int, N: int, C: int, W: int, H: int, heads: int, items: Itemsizes, scope: str) -> Work:
    fc1_width = W if scope == "branch" else C
    return (
        linear_weight_gradient(B * N, H, C, items)
        + gelu_linear_backward(B, N, H, C, items, write_act=False)
        + window_linear_gradients(B, N, C, fc1_width, H, items)
        + norm_backward(B, N, C, W, items, branch=True, compact=scope == "branch")
        + linear_gradients(B * N, C, C, items)
        + attention_backward(B, N, C, heads, items)
        + window_linear_gradients(B, N, C, W, 3 * C, items)
        + linear_gradients(B, C, 6 * C, items)
    )


# --- a whole DiT -----------------------------------------------------------------------------------------------------

# Frequencies, as sines and cosines, that a timestep is embedded with.
_FREQUENCIES = 256


def dit_forward(
    *,
    B: int,
    N: int,
    C: int,
    W: int,
    H: int,
    depth: int,
    patch_inputs: int,
    patch_outputs: int,
    items: Itemsizes,
    scope: str,
) -> Work:
    """A DiT from images, timesteps and labels to its prediction; its blocks are one chain, without a kernel to end
    one.

    Args:
        patch_inputs, patch_outputs: numbers that a patch has at the input and at the output.
    """
    return (
        _embedding_forward(B, N, C, patch_inputs, items)
        + norm_forward(B, N, C, W, items, compact=True)
        + (depth - 1) * norm_forward(B, N, C, W, items, branch=True, compact=True)
        + depth * _between_norms_forward(B, N, C, W, H, items, scope)
        + linear_forward(B, C, 2 * C, items)
        + norm_forward(B, N, C, C, items, branch=True)
        + linear_forward(B * N, C, patch_outputs, items)
    )


def dit_modulations(B: int, C: int, depth: int, items: Itemsizes) -> Work:
    """Of a DiT's forward pass what makes the vectors that its blocks and its final layer are modulated with."""
    return depth * linear_forward(B, C, 6 * C, items) + linear_forward(B, C, 2 * C, items)


def dit_training(
    *,
    B: int,
    N: int,
    C: int,
    W: int,
    H: int,
    heads: int,
    depth: int,
    patch_inputs: int,
    patch_outputs: int,
    items: Itemsizes,
    scope: str,
) -> Work:
    """Its forward pass, and from the gradient of the prediction that of every parameter. The optimizer's step is
    ``adamw_step``."""
    forward = dit_forward(
        B=B,
        N=N,
        C=C,
        W=W,
        H=H,
        depth=depth,
        patch_inputs=patch_inputs,
        patch_outputs=patch_outputs,
        items=items,
        scope=scope,
    )
    block = _kept_for_backward(B, N, H, heads, items) + _between_norms_backward(B, N, C, W, H, heads, items, scope)
    return (
        forward
        + linear_gradients(B * N, C, patch_outputs, items)
        + norm_backward(B, N, C, C, items, branch=True, dstream=False)
        + linear_gradients(B, C, 2 * C, items)
        + depth * block
        + (depth - 1) * norm_backward(B, N, C, W, items, branch=True, compact=True)
        + norm_backward(B, N, C, W, items, compact=True)
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
