"""The linear layer that contracts over each sample's window only, with tanh-GELU in its epilogue.

Its input is the compact u [B, N, W] of ``gated_norm``. Deactivated channels reach a dense layer as
-mean * rstd * (1 + scale) + shift, so per sample their whole contribution is a rank-one term and a constant:

    p   = W_lin[:, inactive] @ (1 + scale[inactive])              # [B, O], once per sample
    q   = W_lin[:, inactive] @ shift[inactive] + bias             # [B, O], once per sample
    out = u @ W_lin[:, window]^T - (mean * rstd) * p + q          # = Linear(modulate(LN(m * x))) exactly

and with G = dL/dout the gradients never touch a deactivated channel per token either:

    du       = G @ W_lin[:, window]
    inactive = G @ p                                              # what the norm's backward pass needs of them
    dp, dq   = -sum_n (mean * rstd)_n G_n ,  sum_n G_n            # per sample
    dW       = sum_b G_b^T u_b at b's window  +  dp^T (1 + scale) + dq^T shift at the deactivated channels
    dscale, dshift = dp @ W_lin, dq @ W_lin                       # at the deactivated channels; dbias = sum_b dq_b

Three GEMM kernels (forward, input gradient, weight gradient) and one that reads G once for the sums over tokens. Tensor
descriptors take any element offset, so a window that starts anywhere needs no realigned copy of the weight, and
what a tile reads outside of u comes back as zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dtr_kernels.ops import _cpu
from dtr_kernels.ops._launch import (
    TOKENS_PER_SUM,
    chunks_of,
    descriptor,
    dot_precision,
    empty_rows,
    kernel_path,
    launch,
    matmul_accumulated,
    row_stride,
)
from dtr_kernels.ops._tiles import capability, tile_for
from dtr_kernels.ops.gelu import gelu, gelu_and_slope, gelu_backward, gelu_forward

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a program's tile; GROUP rows of tiles go together so that they share columns in L2."""
    per_group = GROUP * tiles_n
    group = pid // per_group
    first = group * GROUP
    size = min(tiles_m - first, GROUP)
    return first + (pid % per_group) % size, (pid % per_group) // size


@triton.jit
def _halves(acc):
    """The left and right half of a tile's columns: half a tile at a time keeps an epilogue in registers."""
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _finish_forward(
    acc,
    b,
    row,
    column,
    mean_rstd_ptr,
    p_ptr,
    q_ptr,
    out_ptr,
    act_ptr,
    N,
    O,
    WINDOWED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    WRITE_OUT: tl.constexpr,
):
    """Adds what deactivated channels (or the bias) contribute, applies GELU and stores."""
    n = row + tl.arange(0, acc.shape[0])
    o = column + tl.arange(0, acc.shape[1])
    token = b.to(tl.int64) * N + n
    if WINDOWED:
        mean_rstd = tl.load(mean_rstd_ptr + token, mask=n < N, other=0.0)
        p = tl.load(p_ptr + b.to(tl.int64) * O + o, mask=o < O, other=0.0)
        q = tl.load(q_ptr + b.to(tl.int64) * O + o, mask=o < O, other=0.0)
        acc += q[None, :] - mean_rstd[:, None] * p[None, :]
    elif HAS_BIAS:
        acc += tl.load(q_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    offsets = token[:, None] * O + o[None, :]
    inside = (n < N)[:, None] & (o < O)[None, :]
    out = acc.to(out_ptr.dtype.element_ty)
    if WRITE_OUT:
        tl.store(out_ptr + offsets, out, mask=inside)
    if GELU:
        # Of the rounded value, so that the backward pass, which has only that, recomputes the same activation.
        tl.store(act_ptr + offsets, gelu(out.to(tl.float32)).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _finish_input_gradient(acc, b, row, column, pre_ptr, du_ptr, act_ptr, N, K, du_stride, GELU: tl.constexpr):
    """Multiplies with GELU's derivative, recomputes the activation beside it, and stores."""
    n = row + tl.arange(0, acc.shape[0])
    c = column + tl.arange(0, acc.shape[1])
    token = b.to(tl.int64) * N + n
    offsets = token[:, None] * du_stride + c[None, :]
    inside = (n < N)[:, None] & (c < K)[None, :]
    if GELU:
        pre = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        act, slope = gelu_and_slope(pre)
        acc = acc.to(du_ptr.dtype.element_ty).to(tl.float32) * slope
        tl.store(act_ptr + offsets, act.to(act_ptr.dtype.element_ty), mask=inside)
    tl.store(du_ptr + offsets, acc.to(du_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward_kernel(
    u_desc,
    weight_desc,
    start_ptr,
    mean_rstd_ptr,
    p_ptr,
    q_ptr,
    out_ptr,
    act_ptr,
    B,
    N,
    O,
    K,
    WINDOWED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    WRITE_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_per_sample = tl.cdiv(N, BLOCK_M)
    m, n_tile = _tile_of(tl.program_id(0), B * tiles_per_sample, tl.cdiv(O, BLOCK_N), 8)
    b = m // tiles_per_sample
    row = (m % tiles_per_sample) * BLOCK_M
    column = n_tile * BLOCK_N
    first = 0
    if WINDOWED:
        first = tl.load(start_ptr + b)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        # Past the window's end u reads as zero, whatever the weight holds there.
        u = u_desc.load([b, row, k]).reshape(BLOCK_M, BLOCK_K)
        w = weight_desc.load([column, first + k])
        acc = tl.dot(u, w.T, acc, input_precision=PRECISION)
    if BLOCK_N <= 128:
        _finish_forward(
            acc,
            b,
            row,
            column,
            mean_rstd_ptr,
            p_ptr,
            q_ptr,
            out_ptr,
            act_ptr,
            N,
            O,
            WINDOWED,
            HAS_BIAS,
            GELU,
            WRITE_OUT,
        )
    else:
        left, right = _halves(acc)
        _finish_forward(
            left,
            b,
            row,
            column,
            mean_rstd_ptr,
            p_ptr,
            q_ptr,
            out_ptr,
            act_ptr,
            N,
            O,
            WINDOWED,
            HAS_BIAS,
            GELU,
            WRITE_OUT,
        )
        column += BLOCK_N // 2
        _finish_forward(
            right,
            b,
            row,
            column,
            mean_rstd_ptr,
            p_ptr,
            q_ptr,
            out_ptr,
            act_ptr,
            N,
            O,
            WINDOWED,
            HAS_BIAS,
            GELU,
            WRITE_OUT,
        )


@triton.jit
def _input_gradient_kernel(
    g_desc,
    weight_desc,
    start_ptr,
    pre_ptr,
    du_ptr,
    act_ptr,
    B,
    N,
    O,
    K,
    du_stride,
    WINDOWED: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_per_sample = tl.cdiv(N, BLOCK_M)
    m, n_tile = _tile_of(tl.program_id(0), B * tiles_per_sample, tl.cdiv(K, BLOCK_N), 8)
    b = m // tiles_per_sample
    row = (m % tiles_per_sample) * BLOCK_M
    column = n_tile * BLOCK_N
    first = 0
    if WINDOWED:
        first = tl.load(start_ptr + b)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for o in range(0, O, BLOCK_K):
        g = g_desc.load([b, row, o]).reshape(BLOCK_M, BLOCK_K)
        w = weight_desc.load([o, first + column])
        acc = tl.dot(g, w, acc, input_precision=PRECISION)
    if BLOCK_N <= 128:
        _finish_input_gradient(acc, b, row, column, pre_ptr, du_ptr, act_ptr, N, K, du_stride, GELU)
    else:
        left, right = _halves(acc)
        _finish_input_gradient(left, b, row, column, pre_ptr, du_ptr, act_ptr, N, K, du_stride, GELU)
        column += BLOCK_N // 2
        _finish_input_gradient(right, b, row, column, pre_ptr, du_ptr, act_ptr, N, K, du_stride, GELU)


@triton.jit
def _weight_gradient_kernel(
    g_desc,
    u_desc,
    start_ptr,
    dweight_ptr,
    B,
    N,
    O,
    C,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m, n_tile = _tile_of(tl.program_id(0), tl.cdiv(O, BLOCK_M), tl.cdiv(C, BLOCK_N), 8)
    row = m * BLOCK_M
    column = n_tile * BLOCK_N
    steps = tl.cdiv(N, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # One loop over the tokens of all samples, in order: the compiler pipelines it across samples.
    for step in range(0, B * steps):
        b = step // steps
        n = (step % steps) * BLOCK_K
        first = tl.load(start_ptr + b)
        g = g_desc.load([b, n, row]).reshape(BLOCK_K, BLOCK_M)
        # Columns outside the sample's window, negative ones too, read as zero.
        u = u_desc.load([b, n, column - first]).reshape(BLOCK_K, BLOCK_N)
        acc = tl.dot(g.T, u, acc, input_precision=PRECISION)
    o = row + tl.arange(0, BLOCK_M)
    c = column + tl.arange(0, BLOCK_N)
    offsets = o.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(dweight_ptr + offsets, acc, mask=(o < O)[:, None] & (c < C)[None, :])


@triton.jit
def _token_sums_kernel(
    g_ptr,
    mean_rstd_ptr,
    p_ptr,
    inactive_ptr,
    dp_ptr,
    dq_ptr,
    N,
    O,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(N, TOKENS)
    pid = tl.program_id(0)
    b = (pid // chunks).to(tl.int64)
    n = (pid % chunks) * TOKENS + tl.arange(0, TOKENS)
    token = b * N + n
    mean_rstd = tl.load(mean_rstd_ptr + token, mask=n < N, other=0.0)
    inactive = tl.zeros([TOKENS], tl.float32)
    for first in range(0, O, BLOCK):
        o = first + tl.arange(0, BLOCK)
        inside = (n < N)[:, None] & (o < O)[None, :]
        g = tl.load(g_ptr + token[:, None] * O + o[None, :], mask=inside, other=0.0).to(tl.float32)
        p = tl.load(p_ptr + b * O + o, mask=o < O, other=0.0)
        inactive += tl.sum(g * p[None, :], 1)
        part = pid.to(tl.int64) * O + o
        tl.store(dp_ptr + part, -tl.sum(g * mean_rstd[:, None], 0), mask=o < O)
        tl.store(dq_ptr + part, tl.sum(g, 0), mask=o < O)
    tl.store(inactive_ptr + token, inactive, mask=n < N)


# --- launchers -------------------------------------------------------------------------------------------------------


class LinearGradients(NamedTuple):
    """u as u; inactive [B, N] and shift, scale [B, C] of deactivated channels in the compute dtype; weight, bias as
    given.

    inactive, shift and scale are None when unrouted; weight and bias are None when not asked for.
    """

    u: Tensor
    inactive: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _Inactive(NamedTuple):
    """The deactivated channels of a batch: mask [B, C], and 1 + scale, shift [B, C] with active channels zeroed."""

    mask: Tensor
    factor: Tensor
    shift: Tensor


def _inactive_channels(shift: Tensor, scale: Tensor, start: Tensor, width: int, compute: torch.dtype) -> _Inactive:
    offset = torch.arange(scale.shape[1], device=scale.device) - start[:, None]
    mask = (offset < 0) | (offset >= width)
    return _Inactive(mask, (1 + scale.to(compute)) * mask, shift.to(compute) * mask)


def _contributions(inactive: _Inactive, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """p and q [B, O] in the compute dtype."""
    rows = torch.cat([inactive.factor, inactive.shift]).to(weight.dtype)
    p, q = matmul_accumulated(rows, weight.t()).chunk(2)
    return p, q if bias is None else q + bias


def prefers_cublas(start: Tensor | None, shared_start: int | None, weight: Tensor) -> bool:
    """Whether the GPU runs cuBLAS on a slice of the weight instead of our GEMM.

    cuBLAS needs one window for the whole batch, known to the host, and is fast only where the slice is aligned for
    its vector loads. An unrouted layer is the same question with a window of all channels. Not yet measured on a GPU.
    """
    if start is None:
        return True
    return shared_start is not None and shared_start * weight.element_size() % 16 == 0


def gemm_path(x: Tensor, start: Tensor | None, shared_start: int | None, weight: Tensor) -> str:
    """Which GEMM computes a routed layer of x [B, N, C], and why not the faster one, for people."""
    if kernel_path(x) == "cpu":
        if start is None:
            return "a dense GEMM: every channel is read"
        if weight.element_size() < 4:
            return "a dense GEMM: in 16-bit dtypes a CPU repacks a slice of the weight at every call"
        elements = _elements_of_a_slice(x, start.tolist(), x.shape[-1])
        if elements < _LEAST_ELEMENTS_OF_A_SLICE:
            return (
                f"a dense GEMM: a slice of the weight would be for {elements:,} elements, and pays from "
                f"{_LEAST_ELEMENTS_OF_A_SLICE:,} on; use a larger batch at one timestep, or more tokens"
            )
        return "GEMMs on slices of the weight"
    if start is None:
        return "cuBLAS: every channel is read"
    if prefers_cublas(start, shared_start, weight):
        return "cuBLAS on a slice of the weight"
    if shared_start is None:
        return "the Triton window GEMM: cuBLAS needs one timestep for the batch, given as a Python number"
    return (
        f"the Triton window GEMM: cuBLAS is slow on a slice that starts at channel {shared_start}, which is unaligned"
    )


def window_linear_forward(
    u: Tensor,
    mean_rstd: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor | None,
    shared_start: int | None = None,
) -> Tensor:
    """out [B, N, O] in weight's dtype.

    Args:
        u: [B, N, W] in weight's dtype, from ``gated_norm_forward``. mean_rstd: mean * rstd [B, N]; None when unrouted.
        shift, scale: [B, C]. weight: [O, C]. bias: [O] or None.
        start: int32 [B], or None when unrouted (W = C). shared_start: the common start where the host knows it.
    """
    if start is None or mean_rstd is None:
        return F.linear(u, weight, bias)
    if kernel_path(u) == "cpu":
        return _cpu_forward(u, mean_rstd, shift, scale, weight, bias, start)
    p, q = _contributions(_inactive_channels(shift, scale, start, u.shape[-1], mean_rstd.dtype), weight, bias)
    if prefers_cublas(start, shared_start, weight):
        out = torch.baddbmm(q[:, None], mean_rstd[:, :, None], p[:, None], alpha=-1).to(u.dtype)
        return _add_slice_product(out, u, weight, shared_start or 0)
    return _launch_forward(u, weight, q, start, mean_rstd, p, gelu=False, write_out=True)[0]


def linear_gelu_forward(
    u: Tensor,
    mean_rstd: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor | None,
    write_pre: bool,
) -> tuple[Tensor, Tensor]:
    """(pre, GELU(pre)) [B, N, O] of the same layer; pre is left empty unless ``write_pre`` (training) asks for it."""
    if kernel_path(u) == "cpu":
        pre = window_linear_forward(u, mean_rstd, shift, scale, weight, bias, start)
        return (
            (pre, gelu_forward(pre, torch.empty_like(pre))) if write_pre else (pre.new_empty(0), gelu_forward(pre, pre))
        )
    if start is None or mean_rstd is None:
        return _launch_forward(u, weight, bias, None, None, None, gelu=True, write_out=write_pre)
    p, q = _contributions(_inactive_channels(shift, scale, start, u.shape[-1], mean_rstd.dtype), weight, bias)
    return _launch_forward(u, weight, q, start, mean_rstd, p, gelu=True, write_out=write_pre)


def _launch_forward(
    u: Tensor,
    weight: Tensor,
    q: Tensor | None,
    start: Tensor | None,
    mean_rstd: Tensor | None,
    p: Tensor | None,
    gelu: bool,
    write_out: bool,
) -> tuple[Tensor, Tensor]:
    B, N, K = u.shape
    O = weight.shape[0]
    out = torch.empty(B, N, O, device=u.device, dtype=u.dtype) if write_out else u.new_empty(0)
    act = torch.empty(B, N, O, device=u.device, dtype=u.dtype) if gelu else None
    if start is None:  # all tokens share the weight: one long sample
        B, N, u = 1, B * N, u.reshape(1, B * N, K)
    tile = tile_for("forward_gelu" if gelu else "forward", u, N, weight.shape[1], capability(u))
    if B * N > 0:
        launch(
            _forward_kernel,
            B * triton.cdiv(N, tile.m) * triton.cdiv(O, tile.n),
            descriptor(u, [1, tile.m, tile.k]),
            descriptor(weight, [tile.n, tile.k]),
            start,
            mean_rstd,
            p,
            q,
            out,
            act,
            B,
            N,
            O,
            K,
            WINDOWED=start is not None,
            HAS_BIAS=q is not None,
            GELU=gelu,
            WRITE_OUT=write_out,
            PRECISION=dot_precision(u.dtype),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out, u.new_empty(0) if act is None else act


def window_linear_backward(
    g: Tensor,
    u: Tensor,
    mean_rstd: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    start: Tensor | None,
    shared_start: int | None = None,
    need_weight: bool = True,
    need_bias: bool = True,
) -> LinearGradients:
    """Gradients of ``window_linear_forward``; g [B, N, O] is the gradient of its output, in weight's dtype."""
    B, N, O = g.shape
    C = weight.shape[1]
    if start is None or mean_rstd is None:
        flat = g.reshape(B * N, O)
        dweight = flat.t() @ u.reshape(B * N, C) if need_weight else None
        return LinearGradients(g @ weight, None, None, None, dweight, flat.sum(0) if need_bias else None)
    if kernel_path(u) == "cpu":
        return _cpu_backward(g, u, mean_rstd, shift, scale, weight, start, need_weight, need_bias)
    g = g.contiguous()
    inactive = _inactive_channels(shift, scale, start, u.shape[-1], mean_rstd.dtype)
    p, _ = _contributions(inactive, weight, None)
    summed, dp, dq = _launch_token_sums(g, mean_rstd, p)
    if prefers_cublas(start, shared_start, weight):
        part = weight[:, shared_start or 0 :][:, : u.shape[-1]]
        du = g @ part
    else:
        du, _ = _launch_input_gradient(g, weight, start, empty_rows(*u.shape, like=u, dtype=u.dtype), None)
    dweight = _launch_weight_gradient(g, u, start, C) if need_weight else None
    return _with_inactive(du, summed, dp, dq, dweight, inactive, weight, need_bias)


def _with_inactive(
    du: Tensor,
    summed: Tensor,
    dp: Tensor,
    dq: Tensor,
    dweight: Tensor | None,
    inactive: _Inactive,
    weight: Tensor,
    need_bias: bool,
) -> LinearGradients:
    """Adds what deactivated channels contribute, from dp and dq [B, O] alone."""
    rows = torch.cat([dp, dq])
    # Sums over tokens can be too large for fp16.
    narrow = rows.to(weight.dtype) if weight.dtype != torch.float16 else rows
    dscale, dshift = matmul_accumulated(narrow, weight.to(narrow.dtype)).chunk(2)
    if dweight is not None:
        dweight = dweight.addmm_(rows.t(), torch.cat([inactive.factor, inactive.shift])).to(weight.dtype)
    dbias = dq.sum(0).to(weight.dtype) if need_bias else None
    return LinearGradients(du, summed, dshift * inactive.mask, dscale * inactive.mask, dweight, dbias)


def gelu_linear_backward(g: Tensor, pre: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(dpre, act) of out = GELU(pre) @ weight^T: the gradient of pre [B, N, K] and the activation, recomputed beside
    it.

    Args:
        g: gradient of out [B, N, O]. pre: [B, N, K]. weight: [O, K], in g's dtype.
    """
    if kernel_path(g) == "cpu":
        dpre = g @ weight
        return dpre, gelu_backward(dpre, pre)
    B, N, K = pre.shape
    pre = pre.view(1, B * N, K)
    dpre, act = _launch_input_gradient(g.reshape(1, B * N, g.shape[-1]), weight, None, torch.empty_like(pre), pre)
    return dpre.view(B, N, K), act.view(B, N, K)


def _launch_input_gradient(
    g: Tensor, weight: Tensor, start: Tensor | None, du: Tensor, pre: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, N, O = g.shape
    act = torch.empty_like(du) if pre is not None else du
    if pre is None:
        tile = tile_for("input_gradient", g, N, weight.shape[1], capability(g))
    else:
        tile = tile_for("gelu_input_gradient", g, N, weight.shape[0], capability(g))
    if B * N > 0:
        launch(
            _input_gradient_kernel,
            B * triton.cdiv(N, tile.m) * triton.cdiv(du.shape[-1], tile.n),
            descriptor(g, [1, tile.m, tile.k]),
            descriptor(weight, [tile.k, tile.n]),
            start,
            pre,
            du,
            act,
            B,
            N,
            O,
            du.shape[-1],
            row_stride(du),
            WINDOWED=start is not None,
            GELU=pre is not None,
            PRECISION=dot_precision(g.dtype),
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return du, act


def _launch_weight_gradient(g: Tensor, u: Tensor, start: Tensor, channels: int) -> Tensor:
    B, N, O = g.shape
    dweight = torch.empty(O, channels, device=g.device, dtype=torch.float32)
    if B * N == 0:
        return dweight.zero_()
    tile = tile_for("weight_gradient", g, N, channels, capability(g))
    launch(
        _weight_gradient_kernel,
        triton.cdiv(O, tile.m) * triton.cdiv(channels, tile.n),
        descriptor(g, [1, tile.k, tile.m]),
        descriptor(u, [1, tile.k, tile.n]),
        start,
        dweight,
        B,
        N,
        O,
        channels,
        PRECISION=dot_precision(g.dtype),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dweight


def _launch_token_sums(g: Tensor, mean_rstd: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(inactive [B, N], dp [B, O], dq [B, O]) in fp32: everything else that one read of g gives."""
    B, N, O = g.shape
    inactive = torch.empty(B, N, device=g.device, dtype=torch.float32)
    parts = torch.empty(2, B, chunks_of(N), O, device=g.device, dtype=torch.float32)
    if B * N > 0:
        tile = tile_for("token_sums", g, N, O)
        launch(
            _token_sums_kernel,
            B * chunks_of(N),
            g,
            mean_rstd,
            p,
            inactive,
            parts[0],
            parts[1],
            N,
            O,
            TOKENS=TOKENS_PER_SUM,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
    dp, dq = parts.sum(2)
    return inactive, dp, dq


# --- CPU -------------------------------------------------------------------------------------------------------------

# Elements of the input, C for each token that one slice of the weight is for, below which a dense GEMM on a CPU beats
# GEMMs on slices plus the closed form (`python -m benchmarks run cpu_limits` measures it).
_LEAST_ELEMENTS_OF_A_SLICE = 3 << 17


def _slices(u: Tensor, start: Tensor, channels: int) -> list[tuple[slice, int]] | None:
    """Groups of samples with the start of their weight slice; None where one dense GEMM is faster.

    In 16-bit dtypes a CPU's matrix units want the weight repacked at every call, which costs more than a window saves.
    """
    if u.element_size() < 4:
        return None
    starts = start.tolist()
    if _elements_of_a_slice(u, starts, channels) < _LEAST_ELEMENTS_OF_A_SLICE:
        return None
    shared = len(set(starts)) == 1
    return [(slice(0, len(starts)), starts[0])] if shared else [(slice(b, b + 1), s) for b, s in enumerate(starts)]


def _elements_of_a_slice(u: Tensor, starts: list[int], channels: int) -> int:
    return channels * u.shape[1] * (u.shape[0] if len(set(starts)) == 1 else 1)


def _add_slice_product(out: Tensor, u: Tensor, weight: Tensor, start: int) -> Tensor:
    """out += u @ weight[:, start : start + W]^T, in place."""
    W = u.shape[-1]
    out.view(-1, weight.shape[0]).addmm_(u.reshape(-1, W), weight[:, start : start + W].t())
    return out


def _dense_input(u: Tensor, mean_rstd: Tensor, shift: Tensor, scale: Tensor, start: Tensor) -> Tensor:
    """modulate(LN(m * x)) on all C channels [B, N, C], from its window u."""
    B, N, W = u.shape
    compute = mean_rstd.dtype
    factor, shift = (1 + scale.to(compute)).contiguous(), shift.to(compute).contiguous()
    dense = u.new_empty(B, N, scale.shape[1])
    shape = _cpu.shape(B, N, dense.shape[-1], start, W)
    _cpu.kernels.expand(shape, *map(_cpu.rows, (u, dense, mean_rstd, factor, shift)))
    return dense


def _cpu_forward(
    u: Tensor,
    mean_rstd: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor,
) -> Tensor:
    slices = _slices(u, start, weight.shape[1])
    if slices is None:
        return F.linear(_dense_input(u, mean_rstd, shift, scale, start), weight, bias)
    p, q = _contributions(_inactive_channels(shift, scale, start, u.shape[-1], mean_rstd.dtype), weight, bias)
    out = torch.baddbmm(q[:, None], mean_rstd[:, :, None], p[:, None], alpha=-1)
    for part, s in slices:
        _add_slice_product(out[part], u[part], weight, s)
    return out


def _cpu_backward(
    g: Tensor,
    u: Tensor,
    mean_rstd: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    start: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> LinearGradients:
    B, N, W = u.shape
    O, C = weight.shape
    slices = _slices(u, start, C)
    flat = g.reshape(B * N, O)
    du = torch.empty(B, N, W, dtype=u.dtype)
    if slices is None:
        compute = mean_rstd.dtype
        dense, factor = flat @ weight, (1 + scale.to(compute)).contiguous()
        summed = torch.empty(B, N, dtype=compute)
        sums = torch.empty(2, B, chunks_of(N), C, dtype=compute)
        shape = _cpu.shape(B, N, C, start, W, TOKENS_PER_SUM)
        _cpu.kernels.split(shape, *map(_cpu.rows, (dense, du, mean_rstd, factor, summed, sums)))
        dshift, dscale = sums.sum(2)
        dweight = flat.t() @ _dense_input(u, mean_rstd, shift, scale, start).view(B * N, C) if need_weight else None
        return LinearGradients(du, summed, dshift, dscale, dweight, flat.sum(0) if need_bias else None)
    inactive = _inactive_channels(shift, scale, start, W, mean_rstd.dtype)
    p, _ = _contributions(inactive, weight, None)
    summed = torch.bmm(g, p[:, :, None])[..., 0]
    dp, dq = torch.bmm(torch.stack([-mean_rstd, torch.ones_like(mean_rstd)], 1), g).unbind(1)
    dweight = weight.new_zeros(O, C) if need_weight else None
    for part, s in slices:
        rows = g[part].reshape(-1, O)
        du[part] = (rows @ weight[:, s : s + W]).view(-1, N, W)
        if dweight is not None:
            dweight[:, s : s + W].addmm_(rows.t(), u[part].reshape(-1, W))
    return _with_inactive(du, summed, dp, dq, dweight, inactive, weight, need_bias)
