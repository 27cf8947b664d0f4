"""GELU in its tanh form, as the epilogue of the GEMMs around it and as the CPU's element-wise pass.

    GELU(x) = x * sigmoid(2 y),   y = sqrt(2 / pi) * (x + 0.044715 x^3)

is the usual x/2 * (1 + tanh(y)) without the cancellation of 1 + tanh(y) for large negative x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtr_kernels.ops import _cpu

# 2 * sqrt(2 / pi), and its product with 0.044715.
_LINEAR = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.07135481627260025)


@triton.jit
def gelu(x):
    """GELU of an fp32 tile."""
    return x * tl.sigmoid(x * (_LINEAR + _CUBIC * x * x))


@triton.jit
def gelu_and_slope(x):
    """(GELU, its derivative) of an fp32 tile."""
    e = tl.exp(tl.minimum(-x * (_LINEAR + _CUBIC * x * x), 80.0))  # finite, so that e * gate is 1 and not NaN
    gate = 1.0 / (1.0 + e)
    # e * gate is 1 - gate without its cancellation.
    slope = gate + x * gate * (e * gate) * (_LINEAR + 3.0 * _CUBIC * x * x)
    return x * gate, slope


def gelu_forward(pre: Tensor, out: Tensor) -> Tensor:
    """Writes GELU(pre) to out, which may be pre itself; contiguous CPU tensors. Returns out."""
    _cpu.kernels.gelu(pre.numel(), _cpu.rows(pre), _cpu.rows(out), _cpu.rows(None), _cpu.rows(None))
    return out


def gelu_backward(dact: Tensor, pre: Tensor) -> Tensor:
    """Turns dact into the gradient of pre, in place, and returns GELU(pre), recomputed beside it; contiguous CPU
    tensors."""
    act = torch.empty_like(pre)
    _cpu.kernels.gelu(pre.numel(), *map(_cpu.rows, (pre, act, dact, dact)))
    return act
