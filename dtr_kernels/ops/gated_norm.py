"""Residual + gate, routed layer norm and modulation in one pass, and its backward pass.

For each token, over channels c, with m the sample's window (all ones when unrouted), W its width:

    stream = x + gate * branch                                  (x itself without a branch)
    v      = m * stream,   or m * x + gate * branch             (``keep_branch``: only x is masked)
    mean   = sum(v) / C,   var = sum((v - mean)^2) / C,   rstd = (var + eps)^(-1/2)
    u      = (v - mean) * rstd * (1 + scale) + shift

Deactivated channels leave the norm as -mean * rstd, the same for all of them. So u may be compact, [B, N, W] of active
channels only, and the linear layer that follows adds what deactivated channels contribute in closed form
(``window_linear``); or it has all C channels, for a dense GEMM where that is faster, and with ``keep_branch`` always.
The sums over C need only the window: the C - W zeros add (C - W) * mean^2 to the variance.

``reference.routed_norm`` is the oracle. These functions are not differentiable by themselves; ``routed_linear`` and
``routed_mlp`` build the autograd ops from them and recompute u in the backward pass instead of storing it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtr_kernels.ops import extension
from dtr_kernels.ops.dispatch import (
    TOKENS_PER_SUM,
    chunks_of,
    compute_dtype,
    empty_rows,
    kernel_path,
    launch,
    modulation,
    row_stride,
    rows_contiguous,
)
from dtr_kernels.ops.tiles import tile_for


class NormOutput(NamedTuple):
    """stream [B, N, C] (None without a branch), u [B, N, W] (or C), mean and rstd [B, N] in the compute dtype."""

    stream: Tensor | None
    u: Tensor
    mean: Tensor
    rstd: Tensor


class NormGradients(NamedTuple):
    """x, branch [B, N, C] in the inputs' dtypes; gate, shift, scale [B, C] in the compute dtype; None without a
    branch."""

    x: Tensor
    branch: Tensor | None
    gate: Tensor | None
    shift: Tensor
    scale: Tensor


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _near(c, first, width):
    """The channels of a window and what shares a vector of 8 with them: it starts anywhere, and masks that change
    within a vector would split loads into single channels."""
    return (c // 8 >= first // 8) & (c // 8 <= (first + width - 1) // 8)


@triton.jit
def gated_norm_forward_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    start_ptr,
    stream_ptr,
    u_ptr,
    mean_ptr,
    rstd_ptr,
    N,
    C,
    width,
    gate_stride,
    shift_stride,
    scale_stride,
    u_stride,
    eps,
    HAS_BRANCH: tl.constexpr,
    KEEP_BRANCH: tl.constexpr,
    WINDOWED: tl.constexpr,
    COMPACT: tl.constexpr,
    WRITE_STREAM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(N, ROWS)
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    n = (pid % tiles) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    token = b * N + n
    here = (n < N)[:, None]
    exists = c < C
    active = exists
    read = exists
    first = 0
    if WINDOWED:
        first = tl.load(start_ptr + b)
        active = (c >= first) & (c < first + width) & exists
        if not HAS_BRANCH:  # only a residual update has to touch deactivated channels
            read = _near(c, first, width) & exists
    offsets = token[:, None] * C + c[None, :]
    v = tl.load(x_ptr + offsets, mask=here & read[None, :], other=0.0).to(tl.float32)
    seen = active if COMPACT else exists
    if HAS_BRANCH:
        gate = tl.load(gate_ptr + b * gate_stride + c, mask=exists, other=0.0).to(tl.float32)
        branch = tl.load(branch_ptr + offsets, mask=here & exists[None, :], other=0.0).to(tl.float32)
        # An explicit fma here and in the backward pass: where the sum nearly cancels, both must round it the same way.
        stream = tl.fma(branch, gate[None, :], v).to(stream_ptr.dtype.element_ty)
        if WRITE_STREAM:
            tl.store(stream_ptr + offsets, stream, mask=here & exists[None, :])
        if not KEEP_BRANCH:
            v = stream.to(tl.float32)
    v = tl.where(active[None, :], v, 0.0)
    if KEEP_BRANCH:
        v = tl.fma(branch, gate[None, :], v)
    mean = tl.sum(v, 1) / C
    centred = tl.where(seen[None, :], v - mean[:, None], 0.0)
    squares = tl.sum(centred * centred, 1)
    if COMPACT:
        squares += (C - width) * mean * mean
    rstd = 1.0 / tl.sqrt(squares / C + eps)
    shift = tl.load(shift_ptr + b * shift_stride + c, mask=exists, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + b * scale_stride + c, mask=exists, other=0.0).to(tl.float32)
    u = centred * rstd[:, None] * (1.0 + scale[None, :]) + shift[None, :]
    column = c
    if COMPACT:
        column = c - first
    u_offsets = token[:, None] * u_stride + column[None, :]
    tl.store(u_ptr + u_offsets, u.to(u_ptr.dtype.element_ty), mask=here & seen[None, :])
    tl.store(mean_ptr + token, mean, mask=n < N)
    tl.store(rstd_ptr + token, rstd, mask=n < N)


@triton.jit
def gated_norm_backward_kernel(
    du_ptr,
    dstream_ptr,
    inactive_ptr,
    x_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    start_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dbranch_ptr,
    sums_ptr,
    B,
    N,
    C,
    width,
    gate_stride,
    scale_stride,
    du_stride,
    HAS_BRANCH: tl.constexpr,
    KEEP_BRANCH: tl.constexpr,
    X_IS_STREAM: tl.constexpr,
    WINDOWED: tl.constexpr,
    COMPACT: tl.constexpr,
    HAS_DSTREAM: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(N, TOKENS)
    pid = tl.program_id(0)
    b = (pid // chunks).to(tl.int64)
    chunk = pid % chunks
    c = tl.arange(0, BLOCK)
    exists = c < C
    active = exists
    read = exists
    first = 0
    if WINDOWED:
        first = tl.load(start_ptr + b)
        active = (c >= first) & (c < first + width) & exists
        read = _near(c, first, width) & exists
    seen = active if COMPACT else exists
    column = c
    if COMPACT:
        column = c - first
    scale = tl.load(scale_ptr + b * scale_stride + c, mask=exists, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        gate = tl.load(gate_ptr + b * gate_stride + c, mask=exists, other=0.0).to(tl.float32)
    shift_sum = tl.zeros([BLOCK], tl.float32)
    scale_sum = tl.zeros([BLOCK], tl.float32)
    gate_sum = tl.zeros([BLOCK], tl.float32)
    for step in range(0, TOKENS, ROWS):
        n = chunk * TOKENS + step + tl.arange(0, ROWS)
        token = b * N + n
        here = (n < N)[:, None]
        offsets = token[:, None] * C + c[None, :]
        mean = tl.load(mean_ptr + token, mask=n < N, other=0.0)
        rstd = tl.load(rstd_ptr + token, mask=n < N, other=0.0)
        v = tl.load(x_ptr + offsets, mask=here & read[None, :], other=0.0).to(tl.float32)
        if HAS_BRANCH:
            branch = tl.load(branch_ptr + offsets, mask=here & exists[None, :], other=0.0).to(tl.float32)
            if KEEP_BRANCH:
                v = tl.fma(branch, gate[None, :], tl.where(active[None, :], v, 0.0))
            elif not X_IS_STREAM:
                v = tl.fma(branch, gate[None, :], v).to(x_ptr.dtype.element_ty).to(tl.float32)
        if not KEEP_BRANCH:
            v = tl.where(active[None, :], v, 0.0)
        z = tl.where(here & seen[None, :], (v - mean[:, None]) * rstd[:, None], 0.0)
        du_offsets = token[:, None] * du_stride + column[None, :]
        du = tl.load(du_ptr + du_offsets, mask=here & seen[None, :], other=0.0).to(tl.float32)
        shift_sum += tl.sum(du, 0)
        scale_sum += tl.sum(du * z, 0)
        dz = du * (1.0 + scale[None, :])
        total = tl.sum(dz, 1)
        along = tl.sum(dz * z, 1)
        if COMPACT:
            inactive = tl.load(inactive_ptr + token, mask=n < N, other=0.0)
            total += inactive
            along -= mean * rstd * inactive
        dv = rstd[:, None] * (dz - (total[:, None] + z * along[:, None]) / C)
        # Of an update that is not masked every channel was seen; x is masked below.
        dv = tl.where((exists if KEEP_BRANCH else active)[None, :], dv, 0.0)
        dstream = tl.zeros([ROWS, BLOCK], tl.float32)
        if HAS_DSTREAM:
            dstream = tl.load(dstream_ptr + offsets, mask=here & exists[None, :], other=0.0).to(tl.float32)
        dupdate = dstream + dv
        dx = dupdate
        if KEEP_BRANCH:
            dx = dstream + tl.where(active[None, :], dv, 0.0)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=here & exists[None, :])
        if HAS_BRANCH:
            gate_sum += tl.sum(dupdate * branch, 0)
            dbranch = dupdate * gate[None, :]
            tl.store(dbranch_ptr + offsets, dbranch.to(dbranch_ptr.dtype.element_ty), mask=here & exists[None, :])
    # Stage one of the sums over tokens, in a fixed order; the launcher adds the chunks.
    part = (b * chunks + chunk) * C + c
    plane = (b * 0 + B) * chunks * C  # 64-bit through b; B itself is a constant where it is 1
    tl.store(sums_ptr + part, shift_sum, mask=exists)
    tl.store(sums_ptr + plane + part, scale_sum, mask=exists)
    if HAS_BRANCH:
        tl.store(sums_ptr + 2 * plane + part, gate_sum, mask=exists)


# --- launchers -------------------------------------------------------------------------------------------------------


def gated_norm_forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    start: Tensor | None,
    width: int,
    eps: float,
    dtype: torch.dtype,
    compact: bool = False,
    keep_branch: bool = False,
    write_stream: bool = True,
) -> NormOutput:
    """Runs the forward pass.

    Args:
        x: [B, N, C]. branch: [B, N, C] or None. gate, shift, scale: [B, C], rows may be strided.
        start: int32 [B], or None when unrouted. width: active channels W (C when unrouted).
        eps: added to the variance.
        dtype: of u, the dtype of the GEMM that reads it.
        compact: write active channels only.
        keep_branch: mask x alone, not compact.
        write_stream: False in the backward pass, which recomputes u only.
    """
    B, N, C = x.shape
    x = x.contiguous()
    branch = None if branch is None else branch.contiguous()
    gate = None if gate is None else modulation(gate, x)
    shift, scale = modulation(shift, x), modulation(scale, x)
    stream = torch.empty_like(x) if branch is not None and write_stream else None
    u = empty_rows(B, N, width, like=x, dtype=dtype) if compact else torch.empty(B, N, C, device=x.device, dtype=dtype)
    mean = torch.empty(B, N, device=x.device, dtype=compute_dtype(x))
    rstd = torch.empty_like(mean)
    output = NormOutput(stream, u, mean, rstd)
    if B * N == 0:
        return output
    if kernel_path(x) == "cpu":
        tensors = (x, branch, stream, u, gate, shift, scale, mean, rstd)
        shape = extension.shape(B, N, C, start, width)
        extension.kernels.norm_forward(
            shape, eps, compact, keep_branch, extension.dtype_code(x.dtype), *map(extension.rows, tensors)
        )
        return output
    tile = tile_for("norm_forward" if branch is None else "norm_forward_update", x, N, C)
    launch(
        gated_norm_forward_kernel,
        B * triton.cdiv(N, tile.rows),
        x,
        branch,
        gate,
        shift,
        scale,
        start,
        x if stream is None else stream,  # gives the kernel the dtype to round the sum to
        u,
        mean,
        rstd,
        N,
        C,
        width,
        0 if gate is None else gate.stride(0),
        shift.stride(0),
        scale.stride(0),
        row_stride(u),
        eps,
        HAS_BRANCH=branch is not None,
        KEEP_BRANCH=keep_branch,
        WINDOWED=start is not None,
        COMPACT=compact,
        WRITE_STREAM=stream is not None,
        ROWS=tile.rows,
        BLOCK=tile.block,
        num_warps=tile.warps,
    )
    return output


def gated_norm_backward(
    du: Tensor,
    dstream: Tensor | None,
    inactive: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    start: Tensor | None,
    width: int,
    compact: bool = False,
    keep_branch: bool = False,
    x_is_stream: bool = False,
) -> NormGradients:
    """Runs the backward pass.

    Args:
        du: gradient of u, shaped like it. dstream: gradient of the stream [B, N, C], or None.
        inactive: [B, N] in the compute dtype, per token the sum over deactivated channels of the gradient of the norm's
            output, which the linear layer knows in closed form; None unless compact.
        x_is_stream: x holds the forward pass's stream instead of its input (not with ``keep_branch``).
        The rest as in ``gated_norm_forward``.
    """
    B, N, C = x.shape
    x, du = x.contiguous(), rows_contiguous(du)
    dstream = None if dstream is None else dstream.contiguous()
    branch = None if branch is None else branch.contiguous()
    gate = None if gate is None else modulation(gate, x)
    scale = modulation(scale, x)
    dx = torch.empty_like(x)
    dbranch = None if branch is None else torch.empty_like(branch)
    sums = torch.empty(2 if branch is None else 3, B, chunks_of(N), C, device=x.device, dtype=compute_dtype(x))
    if B * N > 0 and kernel_path(x) == "cpu":
        tensors = (du, dstream, x, branch, dx, dbranch, gate, scale, mean, rstd, inactive, sums)
        shape = extension.shape(B, N, C, start, width, TOKENS_PER_SUM)
        extension.kernels.norm_backward(shape, compact, keep_branch, x_is_stream, *map(extension.rows, tensors))
    elif B * N > 0:
        tile = tile_for("norm_backward" if branch is None else "norm_backward_update", x, N, C)
        launch(
            gated_norm_backward_kernel,
            B * chunks_of(N),
            du,
            dstream,
            inactive,
            x,
            branch,
            gate,
            scale,
            start,
            mean,
            rstd,
            dx,
            dbranch,
            sums,
            B,
            N,
            C,
            width,
            0 if gate is None else gate.stride(0),
            scale.stride(0),
            row_stride(du),
            HAS_BRANCH=branch is not None,
            KEEP_BRANCH=keep_branch,
            X_IS_STREAM=x_is_stream,
            WINDOWED=start is not None,
            COMPACT=compact,
            HAS_DSTREAM=dstream is not None,
            TOKENS=TOKENS_PER_SUM,
            ROWS=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
    # Stage two of the sums over tokens; separate tensors, as an op's outputs must be.
    shift_sum, scale_sum, *gate_sum = (plane.sum(1) for plane in sums)
    return NormGradients(dx, dbranch, gate_sum[0] if gate_sum else None, shift_sum, scale_sum)
