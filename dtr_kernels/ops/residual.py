"""x + gate * branch, the end of a block that is used alone.

Between blocks the sum is left to the next block's norm (``routed_linear``), which reads and writes the stream anyway.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton's language has no types.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtr_kernels import reference
from dtr_kernels.ops import extension
from dtr_kernels.ops.checks import check_stream
from dtr_kernels.ops.declaration import Draw, Gradient, Itemsizes, Kernel, Work
from dtr_kernels.ops.dispatch import (
    choose,
    chunks_of,
    compute_dtype,
    in_dtype_of,
    launch,
    modulation,
    runs_on_cpu,
)
from dtr_kernels.ops.registration import op
from dtr_kernels.ops.tiles import TOKENS_PER_SUM, RowTiles, options

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N"])
def gated_residual_forward_kernel(
    x_ptr, branch_ptr, gate_ptr, out_ptr, N, C, gate_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    tiles = tl.cdiv(N, ROWS)
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    n = (pid % tiles) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + b * gate_stride + c, mask=c < C, other=0.0).to(tl.float32)
    offsets = (b * N + n)[:, None] * C + c[None, :]
    inside = (n < N)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, (x + gate[None, :] * branch).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def gated_residual_backward_kernel(
    dout_ptr,
    branch_ptr,
    gate_ptr,
    dbranch_ptr,
    sums_ptr,
    N,
    C,
    gate_stride,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(N, TOKENS)
    pid = tl.program_id(0)
    b = (pid // chunks).to(tl.int64)
    c = tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + b * gate_stride + c, mask=c < C, other=0.0).to(tl.float32)
    gate_sum = tl.zeros([BLOCK], tl.float32)
    for step in range(0, TOKENS, ROWS):
        n = (pid % chunks) * TOKENS + step + tl.arange(0, ROWS)
        offsets = (b * N + n)[:, None] * C + c[None, :]
        inside = (n < N)[:, None] & (c < C)[None, :]
        dout = tl.load(dout_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        branch = tl.load(branch_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        gate_sum += tl.sum(dout * branch, 0)
        tl.store(dbranch_ptr + offsets, (dout * gate[None, :]).to(dbranch_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + pid.to(tl.int64) * C + c, gate_sum, mask=c < C)


# --- launchers -------------------------------------------------------------------------------------------------------

_FORWARD, _BACKWARD = RowTiles("residual_forward", tensors=2), RowTiles("residual_backward", tensors=2)


def gated_residual_forward(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Return x + gate * branch for x, branch [B, N, C] and gate [B, C]."""
    B, N, C = x.shape
    x, branch, (gate,) = x.contiguous(), branch.contiguous(), modulation(x, gate)
    out = torch.empty_like(x)
    if B * N == 0:
        return out
    if runs_on_cpu(x):
        shape = extension.shape(B, N, C, None, C)
        extension.kernels.residual_forward(shape, *map(extension.rows, (x, branch, out, gate)))
        return out
    tile = _FORWARD.tile(x, N, C)
    launch(
        gated_residual_forward_kernel,
        B * triton.cdiv(N, tile.rows),
        x,
        branch,
        gate,
        out,
        N,
        C,
        gate.stride(0),
        **options(tile),
    )
    return out


def gated_residual_backward(dout: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dbranch [B, N, C], dgate [B, C]) in the dtypes of branch and gate."""
    B, N, C = branch.shape
    dout, branch, (vector,) = dout.contiguous(), branch.contiguous(), modulation(dout, gate)
    dbranch = torch.empty_like(branch)
    sums = torch.empty(B, chunks_of(N), C, device=dout.device, dtype=compute_dtype(dout))
    if B * N > 0 and runs_on_cpu(dout):
        shape = extension.shape(B, N, C, None, C, TOKENS_PER_SUM)
        extension.kernels.residual_backward(shape, *map(extension.rows, (dout, branch, dbranch, vector, sums)))
    elif B * N > 0:
        tile = _BACKWARD.tile(dout, N, C)
        launch(
            gated_residual_backward_kernel,
            B * chunks_of(N),
            dout,
            branch,
            vector,
            dbranch,
            sums,
            N,
            C,
            vector.stride(0),
            TOKENS=TOKENS_PER_SUM,
            **options(tile),
        )
    return dbranch, sums.sum(1).to(gate.dtype)


# --- torch op --------------------------------------------------------------------------------------------------------


@op("gated_residual")
def _op(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return gated_residual_forward(x, branch, gate)


@_op.register_fake
def _(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@op("gated_residual_backward")
def _backward_op(dout: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return gated_residual_backward(dout, branch, gate)


@_backward_op.register_fake
def _(dout: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return branch.new_empty(branch.shape), gate.new_empty(gate.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return dout, *_backward_op(dout, *ctx.saved_tensors)


_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.refuse_autograd()


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Return x + gate * branch.

    Args:
        x: residual stream [B, N, C].
        branch: [B, N, C], any floating dtype.
        gate: [B, C], any floating dtype; rows may be strided.

    Returns:
        [B, N, C] in x's dtype.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes or devices do not fit x.
    """
    if branch is None or gate is None:
        raise ValueError("branch and gate must both be given, got None")
    check_stream(x, branch, gate)
    if choose(x).path == "plain":
        return reference.gated_residual(x, *in_dtype_of(x, branch, gate))
    return _op(x, branch, gate)


# --- declarations ----------------------------------------------------------------------------------------------------


def _forward_inputs(draw: Draw) -> dict[str, Tensor]:
    B, N, C, _ = draw.sizes
    return dict(x=draw.stream(B, N, C), branch=draw(B, N, C), gate=draw.vectors(3)[2])


def _backward_inputs(draw: Draw) -> dict[str, Tensor]:
    B, N, C, _ = draw.sizes
    return dict(dout=draw.stream(B, N, C), branch=draw(B, N, C), gate=draw.vectors(3)[2])


def _of_backward(dout: Tensor, branch: Tensor, gate: Tensor) -> tuple[Any, list[Tensor], list[Tensor]]:
    x = torch.zeros_like(dout)
    return lambda branch, gate: [reference.gated_residual(x, branch, gate)], [branch, gate], [dout]


def forward_work(B: int, N: int, C: int, items: Itemsizes) -> Work:
    """Count x, branch, gate and their sum."""
    return Work(bytes=B * N * C * (2 * items.stream + items.operand) + B * C * items.operand)


def backward_work(B: int, N: int, C: int, items: Itemsizes) -> Work:
    """Count gradients of branch and gate; the gradient of x is that of the sum itself."""
    return Work(bytes=B * N * C * (items.stream + 2 * items.operand) + 2 * B * C * items.operand)


KERNELS = [
    Kernel(
        "gated_residual_forward",
        gated_residual_forward,
        reference.gated_residual,
        _forward_inputs,
        work=lambda s, items: forward_work(s.B, s.N, s.C, items),
        tiles=lambda: ("residual_forward",),
        under_autocast=True,
    ),
    Kernel(
        "gated_residual_backward",
        gated_residual_backward,
        Gradient(_of_backward),
        _backward_inputs,
        work=lambda s, items: backward_work(s.B, s.N, s.C, items),
        tiles=lambda: ("residual_backward",),
        under_autocast=True,
    ),
]
