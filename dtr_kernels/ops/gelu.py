"""GELU in its tanh form, as the epilogue of the GEMMs around it and as a pass of its own where they are not ours.

    GELU(x) = x * sigmoid(2 y),   y = sqrt(2 / pi) * (x + 0.044715 x^3)

is the usual x/2 * (1 + tanh(y)) without the cancellation of 1 + tanh(y) for large negative x.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton's language has no types.
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dtr_kernels.ops import extension
from dtr_kernels.ops.declaration import Draw, Kernel
from dtr_kernels.ops.dispatch import launch, runs_on_cpu

# The terms of 2 y, for exp and for exp2.
_LINEAR, _CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi)), tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)
_LINEAR_2, _CUBIC_2 = tl.constexpr(_LINEAR.value * math.log2(math.e)), tl.constexpr(_CUBIC.value * math.log2(math.e))


@triton.jit
def gelu(x):
    """GELU of an fp32 tile."""
    # exp2 and rsqrt are an instruction each, where exp and a division are five and more.
    r = tl.rsqrt(1.0 + tl.exp2(x * (-_LINEAR_2 - _CUBIC_2 * (x * x))))
    return x * (r * r)


@triton.jit
def gelu_and_slope(x):
    """(GELU, its derivative) of an fp32 tile."""
    y = tl.minimum(tl.maximum(x, -10.0), 10.0)  # GELU is 0 or x beyond, and what is made of y is finite
    square = y * y
    e = tl.exp2(y * (-_LINEAR_2 - _CUBIC_2 * square))
    r = tl.rsqrt(1.0 + e)
    gate = r * r
    # e * gate is 1 - gate without its cancellation.
    slope = gate + x * gate * (e * gate) * (_LINEAR + 3.0 * _CUBIC * square)
    return x * gate, slope


@triton.jit
def gelu_forward_kernel(pre_ptr, out_ptr, elements, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    pre = tl.load(pre_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, gelu(pre).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward_kernel(dact_ptr, pre_ptr, act_ptr, elements, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    act, slope = gelu_and_slope(tl.load(pre_ptr + i, mask=inside, other=0.0).to(tl.float32))
    dact = tl.load(dact_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(dact_ptr + i, (dact * slope).to(dact_ptr.dtype.element_ty), mask=inside)
    tl.store(act_ptr + i, act.to(act_ptr.dtype.element_ty), mask=inside)


# Elements of a program: two vectors of 16 bytes a thread in 16-bit dtypes.
_BLOCK = 2048


def gelu_forward(pre: Tensor, out: Tensor) -> Tensor:
    """Writes GELU(pre) to out, which may be pre itself; both contiguous. Returns out."""
    if runs_on_cpu(pre):
        extension.kernels.gelu(
            pre.numel(), extension.rows(pre), extension.rows(out), extension.rows(None), extension.rows(None)
        )
    elif pre.numel() > 0:
        launch(gelu_forward_kernel, triton.cdiv(pre.numel(), _BLOCK), pre, out, pre.numel(), BLOCK=_BLOCK)
    return out


def gelu_backward(dact: Tensor, pre: Tensor) -> Tensor:
    """Turns dact into the gradient of pre, in place, and returns GELU(pre), recomputed beside it; both contiguous."""
    act = torch.empty_like(pre)
    if runs_on_cpu(pre):
        extension.kernels.gelu(pre.numel(), *map(extension.rows, (pre, act, dact, dact)))
    elif pre.numel() > 0:
        launch(gelu_backward_kernel, triton.cdiv(pre.numel(), _BLOCK), dact, pre, act, pre.numel(), BLOCK=_BLOCK)
    return act


# --- declarations ----------------------------------------------------------------------------------------------------


def plain_gelu(x: Tensor) -> Tensor:
    """GELU in plain PyTorch."""
    return F.gelu(x, approximate="tanh")


def _backward(dact: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    act = gelu_backward(dact, pre)
    return dact, act


def _plain_backward(dact: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.gelu_backward(dact, pre, approximate="tanh"), plain_gelu(pre)


def _drawn(draw: Draw) -> Tensor:
    """Values out to where GELU is 0 or its argument."""
    B, N, C, _ = draw.sizes
    return draw(B, N, 4 * C, std=4)


KERNELS = [
    Kernel(
        "gelu_forward",
        gelu_forward,
        lambda pre, out: plain_gelu(pre),
        lambda draw: dict(pre=(pre := _drawn(draw)), out=torch.empty_like(pre)),
    ),
    Kernel(
        "gelu_backward",
        _backward,
        _plain_backward,
        lambda draw: dict(dact=draw(*(pre := _drawn(draw)).shape), pre=pre),
        in_place=True,
    ),
]
