"""The linear layer that contracts over each sample's window only, with tanh-GELU in its epilogue.

Its input is the compact u [B, N, W] of ``gated_norm``; where a dense GEMM is faster (``contracts_windows``), the norm
writes all channels and the layer is an ordinary one. Deactivated channels reach a dense layer as
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

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dtr_kernels.ops.dispatch import (
    TOKENS_PER_SUM,
    chunks_of,
    compute_dtype,
    descriptor,
    dot_precision,
    empty_rows,
    kernel_path,
    launch,
    matmul_accumulated,
    row_stride,
)
from dtr_kernels.ops.gelu import gelu, gelu_and_slope, gelu_backward, gelu_forward
from dtr_kernels.ops.tiles import CrossoverOp, capability, multiprocessors, tile_for

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
    """The left and right half of a tile's columns."""
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _pieces(acc):
    """A tile's columns in pieces of 64 or fewer: one at a time, an epilogue needs few registers beside them."""
    if acc.shape[1] <= 64:
        pieces = (acc,)
    elif acc.shape[1] <= 128:
        pieces = _halves(acc)
    else:
        left, right = _halves(acc)
        pieces = _halves(left) + _halves(right)
    return pieces


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
def window_forward_kernel(
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
    pieces = _pieces(acc)
    for i in tl.static_range(len(pieces)):
        _finish_forward(
            pieces[i],
            b,
            row,
            column + i * pieces[i].shape[1],
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
def window_input_gradient_kernel(
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
    pieces = _pieces(acc)
    for i in tl.static_range(len(pieces)):
        first_column = column + i * pieces[i].shape[1]
        _finish_input_gradient(pieces[i], b, row, first_column, pre_ptr, du_ptr, act_ptr, N, K, du_stride, GELU)


@triton.jit
def window_weight_gradient_kernel(
    g_desc,
    u_desc,
    start_ptr,
    parts_ptr,
    B,
    N,
    O,
    C,
    parts,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(O, BLOCK_M), tl.cdiv(C, BLOCK_N)
    part = tl.program_id(0) // (tiles_m * tiles_n)
    m, n_tile = _tile_of(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, 8)
    row = m * BLOCK_M
    column = n_tile * BLOCK_N
    steps = tl.cdiv(N, BLOCK_K)
    each = tl.cdiv(B * steps, parts)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # One loop over the tokens of all samples, in order: the compiler pipelines it across samples.
    for step in range(part * each, min((part + 1) * each, B * steps)):
        b = step // steps
        n = (step % steps) * BLOCK_K
        first = tl.load(start_ptr + b)
        g = g_desc.load([b, n, row]).reshape(BLOCK_K, BLOCK_M)
        # Columns outside the sample's window, negative ones too, read as zero.
        u = u_desc.load([b, n, column - first]).reshape(BLOCK_K, BLOCK_N)
        # In fp32 a sum for each step, then their sum: one long sum would round as often as there are tokens.
        if g.dtype == tl.float32:
            acc += tl.dot(g.T, u, input_precision=PRECISION)
        else:
            acc = tl.dot(g.T, u, acc, input_precision=PRECISION)
    o = row + tl.arange(0, BLOCK_M)
    c = column + tl.arange(0, BLOCK_N)
    offsets = (part.to(tl.int64) * O + o)[:, None] * C + c[None, :]
    tl.store(parts_ptr + offsets, acc, mask=(o < O)[:, None] & (c < C)[None, :])


@triton.jit
def token_sums_kernel(
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

WindowsOp = Literal["windows_forward", "windows_backward"]
# Parts that a weight gradient's sum over tokens is split into at most, and steps of the contraction in each at least.
_MOST_PARTS, _LEAST_STEPS = 8, 32


class LinearGradients(NamedTuple):
    """u as u; inactive [B, N] and shift, scale [B, C] of deactivated channels in the compute dtype; weight, bias as
    given.

    inactive, shift and scale are None if u has all channels; weight and bias are None when not asked for.
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


def contracts_windows(op: WindowsOp, x: Tensor, start: Tensor | None, width: int, weight: Tensor) -> bool:
    """Whether a pass of the layer contracts over windows only; else a dense GEMM over all channels is faster.

    Args:
        op: which pass. x: the stream [B, N, C]. start: int32 [B], or None when unrouted. width: W. weight: [O, C].
    """
    if start is None:
        return False
    if kernel_path(x) == "cpu":
        # In 16-bit dtypes a CPU's matrix units want a slice repacked at every call, which costs more than it saves.
        gain = slice_gain(op, _tokens_of_a_slice(x, start), x.shape[-1], width)
        return weight.element_size() >= 4 and gain >= _LEAST_GAIN
    return _pays(op, x, weight, weight.shape[1])


def _pays(op: CrossoverOp, x: Tensor, weight: Tensor, channels: int) -> bool:
    """Whether a GPU runs our GEMM for the tokens of x [B, N, ...] and a stream of ``channels``, not cuBLAS."""
    B, N, _ = x.shape
    return tile_for(op, weight, N, channels, capability(weight)).tokens <= B * N


def gelu_in_epilogue(op: Literal["gelu_forward", "gelu_backward"], x: Tensor, weight: Tensor, channels: int) -> bool:
    """Whether our GEMM computes GELU, or its gradient, for the tokens of x [B, N, ...]; else a pass of its own does.

    Args:
        op: which pass. weight: the GEMM's. channels: C of the residual stream.
    """
    return kernel_path(x) != "cpu" and _pays(op, x, weight, channels)


def gemm_path(x: Tensor, start: Tensor | None, width: int, weight: Tensor) -> str:
    """Which GEMM computes a routed layer of x [B, N, C] in the forward pass, and why not over windows, for people."""
    if kernel_path(x) == "cpu":
        if start is None:
            return "a dense GEMM: every channel is read"
        if weight.element_size() < 4:
            return "a dense GEMM: in 16-bit dtypes a CPU repacks a slice of the weight at every call"
        if not contracts_windows("windows_forward", x, start, width, weight):
            return (
                f"a dense GEMM: with {width} of {x.shape[-1]} channels active, a slice of the weight for "
                f"{_tokens_of_a_slice(x, start)} tokens saves less than it costs; use more tokens, or a larger batch "
                "at one timestep"
            )
        return "GEMMs on slices of the weight"
    if start is None:
        return "cuBLAS: every channel is read"
    if not contracts_windows("windows_forward", x, start, width, weight):
        return (
            "cuBLAS over all channels: GEMMs over windows are not known to be faster here; measure it with "
            "python -m benchmarks tune from a checkout"
        )
    return "the Triton window GEMM"


def gelu_gemm_path(x: Tensor, start: Tensor | None, width: int, weight: Tensor) -> str:
    """The same of a routed layer with GELU behind it."""
    if gelu_in_epilogue("gelu_forward", x, weight, weight.shape[1]):
        windows = contracts_windows("windows_forward", x, start, width, weight)
        return f"the Triton GEMM over {'windows' if windows else 'all channels'}, with GELU in its epilogue"
    return f"{gemm_path(x, start, width, weight)}; GELU in a pass of its own"


def window_linear_forward(
    u: Tensor,
    mean_rstd: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    """out [B, N, O] in weight's dtype.

    Args:
        u: [B, N, W] in weight's dtype, from ``gated_norm_forward``; or [B, N, C] for a dense GEMM.
        mean_rstd: mean * rstd [B, N]; None if u has all channels.
        shift, scale: [B, C]. weight: [O, C]. bias: [O] or None.
        start: int32 [B]; None if u has all channels.
    """
    if start is None or mean_rstd is None:
        return F.linear(u, weight, bias)
    p, q = _contributions(_inactive_channels(shift, scale, start, u.shape[-1], mean_rstd.dtype), weight, bias)
    if kernel_path(u) == "cpu":
        out = torch.baddbmm(q[:, None], mean_rstd[:, :, None], p[:, None], alpha=-1).to(u.dtype)
        for samples, channels in _slices(start, u.shape[-1]):
            out[samples].view(-1, len(weight)).addmm_(u[samples].flatten(0, 1), weight[:, channels].t())
        return out
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
    if not gelu_in_epilogue("gelu_forward", u, weight, weight.shape[1]):
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
            window_forward_kernel,
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
    g = g.contiguous()
    inactive = _inactive_channels(shift, scale, start, u.shape[-1], mean_rstd.dtype)
    p, _ = _contributions(inactive, weight, None)
    if kernel_path(u) == "cpu":
        wide = g.to(mean_rstd.dtype)
        summed = torch.bmm(wide, p[:, :, None])[..., 0]
        # In parts: one long sum would round as often as there are tokens.
        rows = torch.stack([-mean_rstd, torch.ones_like(mean_rstd)], 1).split(256, 2)
        parts = [torch.bmm(*part) for part in zip(rows, wide.split(256, 1), strict=True)]
        dp, dq = torch.stack(parts).sum(0).unbind(1)
        du, dweight = _backward_on_slices(g, u, weight, start, need_weight)
    else:
        summed, dp, dq = _launch_token_sums(g, mean_rstd, p)
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
    if not gelu_in_epilogue("gelu_backward", g, weight, weight.shape[0]):
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
            window_input_gradient_kernel,
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
    if B * N == 0:
        return torch.zeros(O, channels, device=g.device, dtype=torch.float32)
    tile = tile_for("weight_gradient", g, N, channels, capability(g))
    tiles = triton.cdiv(O, tile.m) * triton.cdiv(channels, tile.n)
    parts = _parts(tiles, B * triton.cdiv(N, tile.k), multiprocessors(g))
    sums = torch.empty(parts, O, channels, device=g.device, dtype=torch.float32)
    launch(
        window_weight_gradient_kernel,
        tiles * parts,
        descriptor(g, [1, tile.k, tile.m]),
        descriptor(u, [1, tile.k, tile.n]),
        start,
        sums,
        B,
        N,
        O,
        channels,
        parts,
        PRECISION=dot_precision(g.dtype),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return sums[0] if parts == 1 else sums.sum(0)


def _parts(tiles: int, steps: int, processors: int) -> int:
    """In how many parts the tokens of a weight gradient are summed.

    A weight has few tiles, each a long sum: 135 of them on 132 multiprocessors would take as long as 264. The fewest
    parts that keep the multiprocessors nearly as busy as any number up to ``_MOST_PARTS`` does, each of
    ``_LEAST_STEPS`` steps or more.
    """

    def busy(parts: int) -> float:
        rounds = triton.cdiv(tiles * parts, processors)
        return tiles * parts / (rounds * processors)

    choices = range(1, max(1, min(_MOST_PARTS, steps // _LEAST_STEPS)) + 1)
    enough = 0.95 * max(map(busy, choices))
    return next(parts for parts in choices if busy(parts) >= enough)


def _launch_token_sums(g: Tensor, mean_rstd: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(inactive [B, N], dp [B, O], dq [B, O]) in fp32: everything else that one read of g gives."""
    B, N, O = g.shape
    inactive = torch.empty(B, N, device=g.device, dtype=torch.float32)
    parts = torch.empty(2, B, chunks_of(N), O, device=g.device, dtype=torch.float32)
    if B * N > 0:
        tile = tile_for("token_sums", g, N, O)
        launch(
            token_sums_kernel,
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

# Per cent of what a slice of the weight costs that it must save (`python -m benchmarks run cpu_limits` measures it).
_LEAST_GAIN = 100
# A slice costs a CPU as much as this many more tokens would, since it is repacked for few of them; and the closed form,
# which reads the gradient three times more in the backward pass, as much as this share of all channels.
_COSTS_OF_A_SLICE: dict[WindowsOp, tuple[int, float]] = {"windows_forward": (45, 0), "windows_backward": (32, 0.25)}


def slice_gain(op: WindowsOp, tokens: int, channels: int, width: int) -> int:
    """What GEMMs on slices of the weight save on a CPU, in per cent of what they cost, for that many tokens a slice."""
    repacked, closed_form = _COSTS_OF_A_SLICE[op]
    return int(100 * (channels - width) / (repacked * width / max(tokens, 1) + closed_form * channels))


def _tokens_of_a_slice(x: Tensor, start: Tensor) -> int:
    """Tokens that share a window."""
    return x.shape[1] * (x.shape[0] if len(set(start.tolist())) == 1 else 1)


def _slices(start: Tensor, width: int) -> list[tuple[slice, slice]]:
    """Groups of samples with the channels of their window: one for all if they share it."""
    starts = start.tolist()
    if len(set(starts)) == 1:
        return [(slice(None), slice(starts[0], starts[0] + width))]
    return [(slice(b, b + 1), slice(s, s + width)) for b, s in enumerate(starts)]


def _backward_on_slices(
    g: Tensor, u: Tensor, weight: Tensor, start: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """du, and the weight gradient of active channels in the accumulator's dtype."""
    du = torch.empty_like(u)
    dweight = weight.new_zeros(weight.shape, dtype=compute_dtype(weight)) if need_weight else None
    for samples, channels in _slices(start, u.shape[-1]):
        rows, inputs = g[samples].flatten(0, 1), u[samples].flatten(0, 1)
        torch.mm(rows, weight[:, channels], out=du[samples].view_as(inputs))
        if dweight is not None:
            dweight[:, channels].addmm_(rows.t().to(dweight.dtype), inputs.to(dweight.dtype))
    return du, dweight
