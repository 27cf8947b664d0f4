"""Activations of an MLP as separate kernels; GELU in its tanh form is also an epilogue of the neighbouring GEMMs.

    "gelu_tanh":  x * sigmoid(2 y),   y = sqrt(2 / pi) * (x + 0.044715 x^3)
    "gelu":       x * Phi(x),         Phi the normal distribution
    "silu":       x * sigmoid(x)
    "swiglu":     silu(a) * b         of the two halves a, b of the channels

"gelu_tanh" is the usual x/2 * (1 + tanh(y)) without the cancellation of 1 + tanh(y) for large negative x.
``reference.activate`` is the reference. The backward pass reads the input only, and recomputes the activation.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton's language has no types.
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtr_kernels import reference
from dtr_kernels.ops import extension
from dtr_kernels.ops.declaration import Draw, Gradient, Kernel, modes
from dtr_kernels.ops.dispatch import launch, runs_on_cpu

# Coefficients of 2 y, for exp and for exp2.
_LINEAR, _CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi)), tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)
_LINEAR_2, _CUBIC_2 = tl.constexpr(_LINEAR.value * math.log2(math.e)), tl.constexpr(_CUBIC.value * math.log2(math.e))
_LOG2_E, _SQRT_HALF = tl.constexpr(math.log2(math.e)), tl.constexpr(math.sqrt(0.5))
_DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit
def gelu(x):
    """Compute GELU of an fp32 tile, in its tanh form."""
    # exp2 and rsqrt are one instruction each, exp and a division five and more.
    r = tl.rsqrt(1.0 + tl.exp2(x * (-_LINEAR_2 - _CUBIC_2 * (x * x))))
    return x * (r * r)


@triton.jit
def gelu_and_slope(x):
    """Compute (GELU, its derivative) of an fp32 tile, in its tanh form."""
    y = tl.minimum(tl.maximum(x, -10.0), 10.0)  # beyond, GELU is 0 or x; the clamp keeps the results finite
    square = y * y
    e = tl.exp2(y * (-_LINEAR_2 - _CUBIC_2 * square))
    r = tl.rsqrt(1.0 + e)
    gate = r * r
    # e * gate is 1 - gate without its cancellation.
    slope = gate + x * gate * (e * gate) * (_LINEAR + 3.0 * _CUBIC * square)
    return x * gate, slope


@triton.jit
def _value_and_slope(x, KIND: tl.constexpr):
    """Compute (the activation, its derivative) of an fp32 tile; for "swiglu", those of SiLU(a)."""
    if KIND == "gelu_tanh":
        value, slope = gelu_and_slope(x)
    elif KIND == "gelu":
        share = 0.5 + 0.5 * tl.erf(x * _SQRT_HALF)
        value, slope = x * share, share + x * (_DENSITY * tl.exp2(x * x * (-0.5 * _LOG2_E)))
    else:
        r = tl.rsqrt(1.0 + tl.exp2(x * -_LOG2_E))
        value, slope = x * (r * r), r * r + x * (r * r) * (1.0 - r * r)
    return value, slope


@triton.jit
def activation_forward_kernel(pre_ptr, act_ptr, width, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    into = row * width + c
    pre = pre_ptr + (into + row * width if GATED else into)
    x = tl.load(pre, mask=inside, other=0.0).to(tl.float32)
    value = gelu(x) if KIND == "gelu_tanh" else _value_and_slope(x, KIND)[0]
    if GATED:
        value *= tl.load(pre + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(act_ptr + into, value.to(act_ptr.dtype.element_ty), mask=inside)


@triton.jit
def activation_backward_kernel(
    dact_ptr, pre_ptr, dpre_ptr, act_ptr, width, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    into = row * width + c
    of_pre = into + row * width if GATED else into
    dact = tl.load(dact_ptr + into, mask=inside, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(tl.load(pre_ptr + of_pre, mask=inside, other=0.0).to(tl.float32), KIND)
    if GATED:
        other = tl.load(pre_ptr + of_pre + width, mask=inside, other=0.0).to(tl.float32)
        tl.store(dpre_ptr + of_pre + width, (dact * value).to(dpre_ptr.dtype.element_ty), mask=inside)
        value *= other
        slope *= other
    tl.store(dpre_ptr + of_pre, (dact * slope).to(dpre_ptr.dtype.element_ty), mask=inside)
    tl.store(act_ptr + into, value.to(act_ptr.dtype.element_ty), mask=inside)


# Elements per program: two vectors of 16 bytes per thread in 16-bit dtypes.
_BLOCK = 2048


def parts_of(kind: str) -> int:
    """Return how many input channels each output channel of the activation has."""
    return 2 if kind == "swiglu" else 1


def activation_forward(pre: Tensor, kind: str, keep_pre: bool = True) -> Tensor:
    """Return the activation [..., H] of pre [..., parts * H], contiguous. Unless ``keep_pre``, it overwrites pre if the
    shapes agree."""
    shape = (*pre.shape[:-1], pre.shape[-1] // parts_of(kind))
    act = pre if pre.shape == shape and not keep_pre else pre.new_empty(shape)
    rows, width = _shape(act, kind)
    if runs_on_cpu(pre):
        _run_on_cpu(kind, rows, width, pre, act)
    elif act.numel() > 0:
        options = dict(KIND=kind, GATED=parts_of(kind) > 1, BLOCK=_BLOCK)
        launch(activation_forward_kernel, rows * triton.cdiv(width, _BLOCK), pre, act, width, **options)
    return act


def activation_backward(dact: Tensor, pre: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return the gradient of pre, which overwrites dact if the shapes agree, and the recomputed activation; both
    arguments must be contiguous."""
    dpre = dact if dact.shape == pre.shape else torch.empty_like(pre)
    act = torch.empty_like(dact)
    rows, width = _shape(act, kind)
    if runs_on_cpu(pre):
        _run_on_cpu(kind, rows, width, pre, act, dact, dpre)
    elif act.numel() > 0:
        options = dict(KIND=kind, GATED=parts_of(kind) > 1, BLOCK=_BLOCK)
        programs = rows * triton.cdiv(width, _BLOCK)
        launch(activation_backward_kernel, programs, dact, pre, dpre, act, width, **options)
    return dpre, act


def _shape(act: Tensor, kind: str) -> tuple[int, int]:
    """Return the rows and channels of a launch; an activation without halves takes all rows as one."""
    width = act.shape[-1] if parts_of(kind) > 1 else act.numel()
    return act.numel() // max(width, 1), width


def _run_on_cpu(kind: str, rows: int, width: int, *tensors: Tensor) -> None:
    flat = [extension.rows(tensor.view(rows, -1) if rows else None) for tensor in tensors]
    extension.kernels.activation(kind, rows, width, *flat, *[extension.rows(None)] * (4 - len(flat)))


# --- declarations ----------------------------------------------------------------------------------------------------


def _of_backward(dact: Tensor, pre: Tensor, kind: str) -> tuple[Any, list[Tensor], list[Tensor]]:
    return lambda pre: [reference.activate(pre, kind)], [pre], [dact]


def _plain_backward(dact: Tensor, pre: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return *Gradient(_of_backward)(dact=dact, pre=pre, kind=kind), reference.activate(pre, kind)  # type: ignore


def _drawn(draw: Draw, kind: str) -> Tensor:
    """Draw values that reach to where GELU is 0 or its argument."""
    B, N, C, _ = draw.sizes
    return draw(B, N, parts_of(kind) * 4 * C, std=4)


KERNELS = [
    Kernel(
        "activation_forward",
        activation_forward,
        lambda pre, kind, keep_pre: reference.activate(pre, kind),
        lambda draw, kind, keep_pre: dict(pre=_drawn(draw, kind), kind=kind, keep_pre=keep_pre),
        modes(kind=reference.ACTIVATIONS, keep_pre=(True, False)),
        timed=lambda keep_pre, **_: keep_pre,
        in_place=True,
    ),
    Kernel(
        "activation_backward",
        activation_backward,
        _plain_backward,
        lambda draw, kind: dict(dact=draw(*draw.sizes[:2], 4 * draw.sizes.C), pre=_drawn(draw, kind), kind=kind),
        modes(kind=reference.ACTIVATIONS),
        in_place=True,
    ),
]
