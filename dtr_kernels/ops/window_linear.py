"""The linear layer that contracts over each sample's window only, with tanh-GELU in its epilogue.

Its input is the compact u [B, N, K] of ``gated_norm``, whose channels are the window here. If a dense GEMM is faster
(``choose_gemm``), the norm writes all channels instead and the layer is an ordinary one. A deactivated channel, which u
leaves out, would reach a dense layer as -mean * rstd * (1 + scale) + shift, so per sample the contribution of all of
them is a rank-one term and a constant:

    p   = W_lin[:, inactive] @ (1 + scale[inactive])              # [B, O], once per sample
    q   = W_lin[:, inactive] @ shift[inactive] + bias             # [B, O], once per sample
    out = u @ W_lin[:, window]^T - (mean * rstd) * p + q          # = Linear(modulate(LN(m * x))) exactly

(after RMSNorm, whose mean is 0, with q alone). With G = dL/dout the gradients never touch a deactivated channel per
token either:

    du       = G @ W_lin[:, window]
    inactive = G @ p                                              # for the norm's backward pass
    dp, dq   = -sum_n (mean * rstd)_n G_n ,  sum_n G_n            # per sample
    dW       = sum_b G_b^T u_b at b's window  +  dp^T (1 + scale) + dq^T shift at the deactivated channels
    dscale, dshift = dp @ W_lin, dq @ W_lin                       # at the deactivated channels; dbias = sum_b dq_b

There are three GEMM kernels (forward, input gradient, weight gradient), one kernel for p and q, and one that reads G
once for the sums over tokens. Tensor descriptors take any element offset, so a window that starts anywhere needs no
realigned copy of the weight; reads outside of u return zeros, and writes outside of a result are dropped.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton's language has no types.
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dtr_kernels import reference
from dtr_kernels.ops.activations import activation_backward, activation_forward, gelu, gelu_and_slope
from dtr_kernels.ops.declaration import (
    ALL_CHANNELS,
    ONE_SLICE,
    STATISTIC,
    Draw,
    Gradient,
    Itemsizes,
    Kernel,
    Work,
    in_window,
    modes,
    spread,
    starts,
)
from dtr_kernels.ops.dispatch import (
    Choice,
    chunks_of,
    compute_dtype,
    descriptor,
    dot_precision,
    empty_rows,
    launch,
    made,
    matmul_accumulated,
    multiprocessors,
    or_empty,
    rows_contiguous,
    runs_on_cpu,
)
from dtr_kernels.ops.tiles import (
    TOKENS_PER_SUM,
    Crossovers,
    GemmTile,
    GemmTiles,
    SumTiles,
    TokenGemmTiles,
    options,
    rows_class,
)
from dtr_kernels.ops.tuned_tiles import NEVER, active_share, power_of_two

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Return row and column of a program's tile; GROUP rows of tiles run together so that they share columns in L2."""
    per_group = GROUP * tiles_n
    group = pid // per_group
    first = group * GROUP
    size = min(tiles_m - first, GROUP)
    return first + (pid % per_group) % size, (pid % per_group) // size


@triton.jit
def _halves(acc):
    """Split a tile into the left and right half of its columns."""
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _pieces(acc):
    """Split a tile into pieces of at most 64 columns: one at a time, an epilogue needs few registers beside them."""
    if acc.shape[1] <= 64:
        pieces = (acc,)
    elif acc.shape[1] <= 128:
        pieces = _halves(acc)
    else:
        left, right = _halves(acc)
        pieces = _halves(left) + _halves(right)
    return pieces


@triton.jit
def _store(desc, b, part, row, column, tile):
    """Store the rows and columns of a tile that exist in a tensor of four dimensions."""
    desc.store([b, part, row, column], tile.reshape(1, 1, tile.shape[0], tile.shape[1]))


@triton.jit(do_not_specialize=["B", "N", "O", "K", "part_rows"])
def window_forward_kernel(
    u_desc,
    weight_desc,
    start_ptr,
    mean_rstd_ptr,
    p_ptr,
    q_ptr,
    out_desc,
    act_desc,
    B,
    N,
    O,
    K,
    part_rows,
    WINDOWED: tl.constexpr,
    CLOSED: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    WRITE_OUT: tl.constexpr,
    PARTS: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_per_sample = tl.cdiv(N, BLOCK_M)
    tiles_n = tl.cdiv(O, BLOCK_N)
    if PARTS:
        tiles_n *= PARTS
    m, n_tile = _tile_of(tl.program_id(0), B * tiles_per_sample, tiles_n, 8)
    b = m // tiles_per_sample
    row = (m % tiles_per_sample) * BLOCK_M
    column = n_tile * BLOCK_N
    first = 0
    if WINDOWED:
        first = tl.load(start_ptr + b) * UNIT
    part, to_weight = 0, 0
    if PARTS:
        part = n_tile // tl.cdiv(O, BLOCK_N)
        column = (n_tile % tl.cdiv(O, BLOCK_N)) * BLOCK_N
        to_weight = part * part_rows + tl.load(start_ptr + b) * UNIT
    # Load, and as far as registers allow add, the product's other summands first: epilogues would wait for the loads.
    o = column + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if CLOSED:
        sample = b.to(tl.int64)
        if CENTRED:
            n = row + tl.arange(0, BLOCK_M)
            mean_rstd = tl.load(mean_rstd_ptr + sample * N + n, mask=n < N, other=0.0)
            p = tl.load(p_ptr + sample * O + o, mask=o < O, other=0.0)
        acc += tl.load(q_ptr + sample * O + o, mask=o < O, other=0.0)[None, :]
    elif HAS_BIAS:
        # A window outside the weight reads nothing.
        rows = part_rows * PARTS
        known = (o < O) & (to_weight + o >= 0) & (to_weight + o < rows) if PARTS else o < O
        acc += tl.load(q_ptr + to_weight + o, mask=known, other=0.0).to(tl.float32)[None, :]
    for k in range(0, K, BLOCK_K):
        # Past the window's end u reads as zero, so the weight's values there do not matter.
        u = u_desc.load([b, row, k]).reshape(BLOCK_M, BLOCK_K)
        w = weight_desc.load([to_weight + column, first + k])
        acc = tl.dot(u, w.T, acc, input_precision=PRECISION)
    if CENTRED:
        acc -= mean_rstd[:, None] * p[None, :]
    pieces = _pieces(acc)
    for i in tl.static_range(len(pieces)):
        piece = column + i * pieces[i].shape[1]
        out = pieces[i].to(u_desc.dtype)
        if WRITE_OUT:
            _store(out_desc, b, part, row, piece, out)
        if GELU:
            # GELU of the rounded value: the backward pass has only that, and must recompute the same activation.
            _store(act_desc, b, part, row, piece, gelu(out.to(tl.float32)).to(u_desc.dtype))


@triton.jit(do_not_specialize=["B", "N", "O", "part_rows"])
def window_input_gradient_kernel(
    g_desc,
    weight_desc,
    start_ptr,
    pre_ptr,
    du_desc,
    act_desc,
    B,
    N,
    O,
    K,
    part_rows,
    WINDOWED: tl.constexpr,
    GELU: tl.constexpr,
    PARTS: tl.constexpr,
    UNIT: tl.constexpr,
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
        first = tl.load(start_ptr + b) * UNIT
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if PARTS:
        first_row = tl.load(start_ptr + b) * UNIT
        steps = tl.cdiv(O, BLOCK_K)
        for step in range(0, steps * PARTS):
            part = step // steps
            o = (step % steps) * BLOCK_K
            # Past the band's end g reads as zero, so the weight's values there do not matter.
            g = g_desc.load([b, part, row, o]).reshape(BLOCK_M, BLOCK_K)
            w = weight_desc.load([part * part_rows + first_row + o, column])
            acc = tl.dot(g, w, acc, input_precision=PRECISION)
    else:
        for o in range(0, O, BLOCK_K):
            g = g_desc.load([b, 0, row, o]).reshape(BLOCK_M, BLOCK_K)
            w = weight_desc.load([o, first + column])
            acc = tl.dot(g, w, acc, input_precision=PRECISION)
    pieces = _pieces(acc)
    for i in tl.static_range(len(pieces)):
        piece = column + i * pieces[i].shape[1]
        du = pieces[i].to(g_desc.dtype)
        if GELU:
            n = row + tl.arange(0, BLOCK_M)
            c = piece + tl.arange(0, pieces[i].shape[1])
            token = b.to(tl.int64) * N + n
            inside = (n < N)[:, None] & (c < K)[None, :]
            pre = tl.load(pre_ptr + token[:, None] * K + c[None, :], mask=inside, other=0.0)
            act, slope = gelu_and_slope(pre.to(tl.float32))
            du = (du.to(tl.float32) * slope).to(du.dtype)
            _store(act_desc, b, 0, row, piece, act.to(du.dtype))
        _store(du_desc, b, 0, row, piece, du)


@triton.jit(do_not_specialize=["B", "N", "O", "C", "splits"])
def window_weight_gradient_kernel(
    g_desc,
    u_desc,
    start_ptr,
    sums_desc,
    B,
    N,
    O,
    C,
    splits,
    PARTS: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(O, BLOCK_M), tl.cdiv(C, BLOCK_N)
    if PARTS:
        tiles_m *= PARTS
    split = tl.program_id(0) // (tiles_m * tiles_n)
    m, n_tile = _tile_of(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, 8)
    row = m * BLOCK_M
    column = n_tile * BLOCK_N
    part = 0
    if PARTS:
        part = m // tl.cdiv(O, BLOCK_M)
        row = (m % tl.cdiv(O, BLOCK_M)) * BLOCK_M
    steps = tl.cdiv(N, BLOCK_K)
    each = tl.cdiv(B * steps, splits)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # One loop over the tokens of all samples, in order: the compiler pipelines it across samples.
    for step in range(split * each, min((split + 1) * each, B * steps)):
        b = step // steps
        n = (step % steps) * BLOCK_K
        first = tl.load(start_ptr + b) * UNIT
        # Rows and columns outside the sample's window, negative ones too, read as zero.
        g = g_desc.load([b, part, n, row - first if PARTS else row]).reshape(BLOCK_K, BLOCK_M)
        u = u_desc.load([b, n, column if PARTS else column - first]).reshape(BLOCK_K, BLOCK_N)
        # In fp32, sum each step, then the steps: one long sum would round as often as there are tokens.
        if g.dtype == tl.float32:
            acc += tl.dot(g.T, u, input_precision=PRECISION)
        else:
            acc = tl.dot(g.T, u, acc, input_precision=PRECISION)
    pieces = _pieces(acc)
    for i in tl.static_range(len(pieces)):
        _store(sums_desc, split, part, row, column + i * pieces[i].shape[1], pieces[i])


@triton.jit(do_not_specialize=["N"])
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


@triton.jit(do_not_specialize=["B", "width"])
def closed_form_kernel(
    weight_desc,
    bias_ptr,
    shift_ptr,
    scale_ptr,
    start_ptr,
    p_ptr,
    q_ptr,
    B,
    O,
    C,
    width,
    shift_stride,
    scale_stride,
    HAS_BIAS: tl.constexpr,
    WRITE_P: tl.constexpr,
    WRITE_Q: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(O, BLOCK_N)
    b = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % tiles) * BLOCK_N
    sample = b.to(tl.int64)[:, None]
    start = tl.load(start_ptr + b, mask=b < B, other=0)[:, None]
    p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    q = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, C, BLOCK_K):
        c = (k + tl.arange(0, BLOCK_K))[None, :]
        exists = (c < C) & (b < B)[:, None]
        inactive = ((c < start) | (c >= start + width)) & exists
        w = weight_desc.load([column, k]).T
        if WRITE_P:
            scale = tl.load(scale_ptr + sample * scale_stride + c, mask=exists, other=0.0).to(tl.float32)
            p = tl.dot(tl.where(inactive, 1.0 + scale, 0.0).to(w.dtype), w, p, input_precision=PRECISION)
        if WRITE_Q:
            shift = tl.load(shift_ptr + sample * shift_stride + c, mask=exists, other=0.0)
            q = tl.dot(tl.where(inactive, shift, 0.0).to(w.dtype), w, q, input_precision=PRECISION)
    o = column + tl.arange(0, BLOCK_N)
    into = sample * O + o[None, :]
    inside = (b < B)[:, None] & (o < O)[None, :]
    if WRITE_P:
        tl.store(p_ptr + into, p, mask=inside)
    if WRITE_Q:
        if HAS_BIAS:
            q += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
        tl.store(q_ptr + into, q, mask=inside)


# --- launchers -------------------------------------------------------------------------------------------------------

WindowsOp = Literal["windows_forward", "windows_backward"]
GeluOp = Literal["gelu_forward", "gelu_backward"]
# Most splits of a weight gradient's sum over tokens, and least steps of the contraction in each.
_MOST_SPLITS, _LEAST_STEPS = 8, 32

# Columns of a tile that an epilogue handles at a time, see ``_pieces``.
_PIECE = 64

_FORWARD, _FORWARD_GELU = GemmTiles("forward"), GemmTiles("forward_gelu")
_INPUT_GRADIENT, _GELU_INPUT_GRADIENT = GemmTiles("input_gradient"), GemmTiles("gelu_input_gradient")
_WEIGHT_GRADIENT = TokenGemmTiles("weight_gradient")
_TOKEN_SUMS = SumTiles("token_sums")


class _ClosedFormTiles(GemmTiles):
    """Tiles of a GEMM whose rows are samples: few rows, each times the whole weight, so many small tiles."""

    def default(self, dtype: torch.dtype, rows: int, channels: int, arch: int, active: int = 100) -> GemmTile:
        return GemmTile(min(rows_class(rows), 64), 64, 16 if dtype == torch.float32 else 64, 4, 3)


_CLOSED_FORM = _ClosedFormTiles("closed_form")


# Predictions for QKV on an H200, derived in docs/performance.md, in steps of a tile of 128 x 256 outputs, 64 deep.


def _product(channels: int) -> float:
    """Return the steps that cuBLAS takes for 128 tokens."""
    return 3 * channels / 256 * channels / 64


def _pays_from(dense: float, windows: float, fixed: float) -> int:
    """Return the tokens from which on windows are predicted to take 10% less time than cuBLAS, the margin of error.

    Args:
        dense, windows: steps for 128 tokens. fixed: seconds that windows cost for any number of tokens.
    """
    # A step takes 0.78 µs, on each of 132 multiprocessors.
    saved = (0.9 * dense - windows) * 0.78e-6 / (128 * 132)
    return min(NEVER, power_of_two(math.ceil(fixed / saved))) if saved > 0 else NEVER


def _forward_pays_from(channels: int, active: int) -> int:
    tiles, steps = math.ceil(3 * channels / 256), math.ceil(channels * active / 6400)
    # A tile's start and end take as long as two of its steps, and two launches 5 µs each.
    return _pays_from(_product(channels), tiles * (steps + 2), fixed=10e-6)


def _backward_pays_from(channels: int, active: int) -> int:
    touched = 256 * math.ceil(channels * active / 25600) / channels  # share of columns in the input gradient's tiles
    # Sums, for the bias and over tokens, grow with the channels, products with their square.
    dense = 2 + 0.16 * 1152 / channels
    windows = 1.09 * touched + 1.29 + 0.20 * 1152 / channels
    # 25 launches, and the partial sums of the weight gradient.
    fixed = 125e-6 + 60e-6 * (channels / 1152) ** 2
    return _pays_from(dense * _product(channels), windows * _product(channels), fixed)


_CROSSOVERS = {
    "windows_forward": Crossovers("windows_forward", _forward_pays_from),
    "windows_backward": Crossovers("windows_backward", _backward_pays_from),
    # GELU costs about as much in an epilogue as in its own kernel, in half the launches.
    **{op: Crossovers(op, lambda channels, active: 1) for op in ("gelu_forward", "gelu_backward")},
}


class ClosedForm(NamedTuple):
    """Values of the norm from which the channels follow that u leaves out: mean * rstd [B, N], None for RMSNorm; shift,
    scale [B, C]; and u's first channel, start int32 [B]."""

    mean_rstd: Tensor | None
    shift: Tensor
    scale: Tensor
    start: Tensor


class Band(NamedTuple):
    """Neighbouring columns, or rows, of a weight that each sample uses.

    Attributes:
        start: int32 [B], in units of ``unit`` columns or rows.
        width: number of columns, or of rows in each part.
        unit: 1 for channels; the columns or rows of one attention head.
        parts: number of equal parts of the weight's rows, three for queries, keys and values; 0 for columns.
    """

    start: Tensor
    width: int
    unit: int = 1
    parts: int = 0


class LinearGradients(NamedTuple):
    """u like u; inactive [B, N] and shift, scale [B, C] of deactivated channels in the compute dtype; weight, bias as
    given.

    inactive, shift and scale are None if u has all channels; inactive and scale are None after RMSNorm; weight and bias
    are None if not asked for.
    """

    u: Tensor
    inactive: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _Inactive(NamedTuple):
    """The channels that a compact u leaves out: mask [B, C], and 1 + scale, shift [B, C], zero at u's channels."""

    mask: Tensor
    factor: Tensor
    shift: Tensor


def _inactive_channels(closed: ClosedForm, width: int, compute: torch.dtype) -> _Inactive:
    _, shift, scale, start = closed
    offset = torch.arange(scale.shape[1], device=scale.device) - start[:, None]
    mask = (offset < 0) | (offset >= width)
    return _Inactive(mask, (1 + scale.to(compute)) * mask, shift.to(compute) * mask)


def contributions(
    closed: ClosedForm, width: int, weight: Tensor, bias: Tensor | None, need_q: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Return p and q [B, O] in the compute dtype; p is None after RMSNorm, q if it is not needed.

    Args:
        closed: of the norm. width: number of u's channels. weight: [O, C]. bias: [O] or None.
    """
    need_p = closed.mean_rstd is not None
    if runs_on_cpu(weight):
        inactive = _inactive_channels(closed, width, compute_dtype(weight))
        rows = torch.cat([inactive.factor] * need_p + [inactive.shift] * need_q).to(weight.dtype)
        products = matmul_accumulated(rows, weight.t()).chunk(need_p + need_q)
        last = products[-1] if bias is None else products[-1] + bias
        return products[0] if need_p else None, last if need_q else None
    (B, C), O = closed.scale.shape, len(weight)
    shift, scale = rows_contiguous(closed.shift), rows_contiguous(closed.scale)
    p, q = (torch.empty(B, O, device=weight.device, dtype=torch.float32) if need else None for need in (need_p, need_q))
    tile = _CLOSED_FORM.tile(weight, B, C)
    if B > 0:
        launch(
            closed_form_kernel,
            triton.cdiv(B, tile.m) * triton.cdiv(O, tile.n),
            descriptor(weight, [tile.n, tile.k]),
            bias,
            shift,
            scale,
            closed.start,
            p,
            q,
            B,
            O,
            C,
            width,
            shift.stride(0),
            scale.stride(0),
            HAS_BIAS=bias is not None,
            WRITE_P=need_p,
            WRITE_Q=need_q,
            PRECISION=dot_precision(weight.dtype),
            **options(tile),
        )
    return p, q


def choose_gemm(op: WindowsOp, x: Tensor, start: Tensor | None, width: int, weight: Tensor) -> Choice:
    """Choose whether a pass of the layer contracts over "windows", or is "dense" because that is faster.

    Args:
        op: the pass. x: the stream [B, N, C]. start: int32 [B], or None when unrouted. width: W. weight: [O, C].
    """
    return made((_choose_on_cpu if runs_on_cpu(x) else _choose_on_gpu)(op, x, start, width, weight))


def _choose_on_cpu(op: WindowsOp, x: Tensor, start: Tensor | None, width: int, weight: Tensor) -> Choice:
    if start is None:
        return Choice("dense", "a dense GEMM: every channel is read")
    # In 16-bit dtypes a CPU's matrix units need a slice repacked at every call, which costs more than it saves.
    if weight.element_size() < 4:
        return Choice("dense", "a dense GEMM: in 16-bit dtypes a CPU repacks a slice of the weight at every call")
    # Samples that share a window share a slice.
    tokens = x.shape[1] * (x.shape[0] if len(set(start.tolist())) == 1 else 1)
    if slice_gain(op, tokens, x.shape[-1], width) < _LEAST_GAIN:
        return Choice(
            "dense",
            f"a dense GEMM: with {width} of {x.shape[-1]} channels active, a slice of the weight for {tokens} tokens "
            "saves less than it costs; use more tokens, or a larger batch at one timestep",
        )
    return Choice("windows", "GEMMs on slices of the weight")


def _choose_on_gpu(op: WindowsOp, x: Tensor, start: Tensor | None, width: int, weight: Tensor) -> Choice:
    if start is None:
        return Choice("dense", "cuBLAS: every channel is read")
    B, N, C = x.shape
    if not _pays(op, x, weight, C, active_share(width, C)):
        return Choice(
            "dense",
            f"cuBLAS over all channels: with {width} of {C} channels active, GEMMs over windows are not known to be "
            f"faster for {B * N:,} tokens; measure it with python -m benchmarks tune from a checkout",
        )
    return Choice("windows", "the Triton window GEMM")


def _pays(op: str, x: Tensor, weight: Tensor, channels: int, active: int = 100) -> bool:
    """Return whether a GPU runs our GEMM, not cuBLAS, for the tokens of x [B, N, ...] and a stream of ``channels``."""
    B, N, _ = x.shape
    return _CROSSOVERS[op].tile(weight, N, channels, active).tokens <= B * N


_NAMES = {"gelu_tanh": "GELU", "gelu": "exact GELU", "silu": "SiLU", "swiglu": "SwiGLU"}


def choose_activation(
    op: GeluOp, kind: str, x: Tensor, closed: ClosedForm | None, weight: Tensor, channels: int
) -> Choice:
    """Choose whether our GEMM computes tanh-GELU, or its gradient, in its "epilogue", or a separate "pass" does, as
    always for other activations.

    Args:
        op: the pass. kind: of the activation. x: [B, N, ...], for its tokens. closed: None for a dense layer.
        weight: of the GEMM. channels: C of the residual stream.
    """
    if kind != "gelu_tanh" or runs_on_cpu(x) or not _pays(op, x, weight, channels):
        return made(Choice("pass", f"{_NAMES[kind]} in a pass of its own"))
    read = "all channels" if closed is None else "windows"
    return made(Choice("epilogue", f"the Triton GEMM over {read}, with GELU in its epilogue"))


def window_linear_forward(u: Tensor, closed: ClosedForm | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return out [B, N, O] in weight's dtype.

    Args:
        u: compact [B, N, K] in weight's dtype, from ``gated_norm_forward``; or [B, N, C] for a dense GEMM.
        closed: None if u has all channels.
        weight: [O, C]. bias: [O] or None.
    """
    if closed is None:
        return F.linear(u, weight, bias)
    p, q = contributions(closed, u.shape[-1], weight, bias)
    if runs_on_cpu(u):
        assert q is not None
        if p is None or closed.mean_rstd is None:
            out = q[:, None].to(u.dtype).repeat(1, u.shape[1], 1)
        else:
            out = torch.baddbmm(q[:, None], closed.mean_rstd[:, :, None], p[:, None], alpha=-1).to(u.dtype)
        for samples, channels in _slices(closed.start, u.shape[-1]):
            out[samples].view(-1, len(weight)).addmm_(u[samples].flatten(0, 1), weight[:, channels].t())
        return out
    return product(u, weight, q, Band(closed.start, u.shape[-1]), closed.mean_rstd, p, gelu=False, write_out=True)[0]


def linear_activation_forward(
    u: Tensor, closed: ClosedForm | None, weight: Tensor, bias: Tensor | None, kind: str, write_pre: bool
) -> tuple[Tensor, Tensor]:
    """Return pre [B, N, O] of the same layer and its activation; pre is empty unless ``write_pre`` (training)."""
    if choose_activation("gelu_forward", kind, u, closed, weight, weight.shape[1]).path == "pass":
        pre = window_linear_forward(u, closed, weight, bias)
        return or_empty(pre if write_pre else None, pre), activation_forward(pre, kind, write_pre)
    if closed is None:
        return product(u, weight, bias, None, None, None, gelu=True, write_out=write_pre)
    p, q = contributions(closed, u.shape[-1], weight, bias)
    return product(u, weight, q, Band(closed.start, u.shape[-1]), closed.mean_rstd, p, gelu=True, write_out=write_pre)


def product(
    u: Tensor,
    weight: Tensor,
    q: Tensor | None,
    band: Band | None,
    mean_rstd: Tensor | None,
    p: Tensor | None,
    gelu: bool,
    write_out: bool,
) -> tuple[Tensor, Tensor]:
    """Launch u @ weight[:, band]^T - mean_rstd * p + q, or u @ weight[band]^T + q for a band of rows, and with ``gelu``
    its GELU; return both, empty if not asked for.

    Args:
        u: [B, N, K]; for a band of columns it holds only these. weight: [O, C].
        q: [B, O] in the closed form, else the bias [O] or None.
        band: of each sample; None for a dense layer.
        mean_rstd: [B, N], p: [B, O]; None outside of the closed form, and after RMSNorm.
    """
    B, N, K = u.shape
    start, unit, parts = (None, 1, 0) if band is None else (band.start, band.unit, band.parts)
    O = band.width if band and parts else weight.shape[0]
    shape = (B, N, O * max(parts, 1))
    if band is None:  # all tokens share the weight: one long sample
        B, N, u = 1, B * N, u.reshape(1, B * N, K)
    tile = (_FORWARD_GELU if gelu else _FORWARD).tile(u, N, weight.shape[1])
    # Padded rows, which a descriptor can write.
    out, act = (
        empty_rows(B, N, max(parts, 1), O, like=u, dtype=u.dtype) if wanted else None for wanted in (write_out, gelu)
    )
    if B * N > 0:
        box = [1, 1, tile.m, min(tile.n, _PIECE)]
        launch(
            window_forward_kernel,
            B * triton.cdiv(N, tile.m) * triton.cdiv(O, tile.n) * max(parts, 1),
            descriptor(u, [1, tile.m, tile.k]),
            descriptor(weight, [tile.n, tile.k]),
            start,
            mean_rstd,
            p,
            q,
            *(None if x is None else descriptor(x.transpose(1, 2), box) for x in (out, act)),
            B,
            N,
            O,
            K,
            len(weight) // max(parts, 1),
            WINDOWED=band is not None and not parts,
            CLOSED=q is not None and q.dim() == 2,
            CENTRED=p is not None,
            HAS_BIAS=q is not None,
            GELU=gelu,
            WRITE_OUT=write_out,
            PARTS=parts,
            UNIT=unit,
            PRECISION=dot_precision(u.dtype),
            **options(tile),
        )
    none = u.new_empty(0)
    return tuple(none if x is None else x.reshape(shape).contiguous() for x in (out, act))  # type: ignore[return-value]


def window_linear_backward(
    g: Tensor,
    u: Tensor,
    closed: ClosedForm | None,
    weight: Tensor,
    need_weight: bool = True,
    need_bias: bool = True,
) -> LinearGradients:
    """Return the gradients of ``window_linear_forward``; g [B, N, O] is its output's gradient, in weight's dtype."""
    B, N, O = g.shape
    C = weight.shape[1]
    if closed is None:
        flat = g.reshape(B * N, O)
        dweight = flat.t() @ u.reshape(B * N, C) if need_weight else None
        return LinearGradients(g @ weight, None, None, None, dweight, flat.sum(0) if need_bias else None)
    g = g.contiguous()
    if closed.mean_rstd is None:
        summed, dp, dq = None, None, g.sum(1, dtype=compute_dtype(g))
    else:
        p, _ = contributions(closed, u.shape[-1], weight, None, need_q=False)
        assert p is not None
        summed, dp, dq = (_token_sums_on_cpu if runs_on_cpu(u) else token_sums)(g, closed.mean_rstd, p)
    if runs_on_cpu(u):
        du, dweight = _backward_on_slices(g, u, weight, closed.start, need_weight)
    else:
        band = Band(closed.start, u.shape[-1])
        du, _ = input_gradient(g, weight, band, u.shape[-1], None)
        dweight = weight_gradient(g, u, band, C) if need_weight else None
    inactive = _inactive_channels(closed, u.shape[-1], dq.dtype)
    return _with_inactive(du, summed, dp, dq, dweight, inactive, weight, need_bias)


def _with_inactive(
    du: Tensor,
    summed: Tensor | None,
    dp: Tensor | None,
    dq: Tensor,
    dweight: Tensor | None,
    inactive: _Inactive,
    weight: Tensor,
    need_bias: bool,
) -> LinearGradients:
    """Add the contributions of deactivated channels, from dp and dq [B, O] alone."""
    rows, known = dq, inactive.shift
    if dp is not None:
        rows, known = torch.cat([dp, dq]), torch.cat([inactive.factor, inactive.shift])
    # Sums over tokens can be too large for fp16.
    narrow = rows.to(weight.dtype) if weight.dtype != torch.float16 else rows
    *dscale, dshift = matmul_accumulated(narrow, weight.to(narrow.dtype)).chunk(1 if dp is None else 2)
    if dweight is not None:
        dweight = dweight.addmm_(rows.t(), known).to(weight.dtype)
    dbias = dq.sum(0).to(weight.dtype) if need_bias else None
    of_scale = dscale[0] * inactive.mask if dscale else None
    return LinearGradients(du, summed, dshift * inactive.mask, of_scale, dweight, dbias)


def activation_linear_backward(g: Tensor, pre: Tensor, weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return (dpre, act) of out = act @ weight^T: the gradient of pre, and the recomputed activation [B, N, K].

    Args:
        g: gradient of out [B, N, O]. pre: [B, N, K], for "swiglu" [B, N, 2K]. weight: [O, K], in g's dtype.
        kind: of the activation.
    """
    if choose_activation("gelu_backward", kind, g, None, weight, weight.shape[0]).path == "pass":
        return activation_backward(g @ weight, pre, kind)
    B, N, K = pre.shape
    found = input_gradient(g.reshape(1, B * N, g.shape[-1]), weight, None, K, pre.view(1, B * N, K))
    return tuple(x.view(B, N, K) for x in found)  # type: ignore[return-value]


def input_gradient(
    g: Tensor, weight: Tensor, band: Band | None, width: int, pre: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch du = g @ weight[:, band], or g @ weight[band] for rows, times GELU's derivative at ``pre`` if given.

    Returns du [B, N, width], whose rows may be padded, and GELU(pre) like it.

    Args:
        g: [B, N, O]; for a band of rows it holds only these. weight: [O, C]. band: None for the whole weight.
        pre: [B, N, width]; if None, du is returned twice.
    """
    start, unit, parts = (None, 1, 0) if band is None else (band.start, band.unit, band.parts)
    g = _by_part(g, parts)
    B, _, N, O = g.shape
    du = empty_rows(B, N, width, like=g, dtype=g.dtype)
    act = du if pre is None else empty_rows(B, N, width, like=g, dtype=g.dtype)
    if pre is None:
        tile = _INPUT_GRADIENT.tile(g, N, weight.shape[1])
    else:
        tile = _GELU_INPUT_GRADIENT.tile(g, N, weight.shape[0])
    if B * N > 0:
        box = [1, 1, tile.m, min(tile.n, _PIECE)]
        launch(
            window_input_gradient_kernel,
            B * triton.cdiv(N, tile.m) * triton.cdiv(width, tile.n),
            descriptor(g, [1, 1, tile.m, tile.k]),
            descriptor(weight, [tile.k, tile.n]),
            start,
            pre,
            *(descriptor(x[:, None], box) for x in (du, act)),
            B,
            N,
            O,
            width,
            len(weight) // max(parts, 1),
            WINDOWED=band is not None and not parts,
            GELU=pre is not None,
            PARTS=parts,
            UNIT=unit,
            PRECISION=dot_precision(g.dtype),
            **options(tile),
        )
    return du, act


def _by_part(g: Tensor, parts: int) -> Tensor:
    """View g [B, N, O] as [B, parts, N, O / parts]; with tokens and columns last a tile needs no rearranging."""
    return g.unflatten(2, (max(parts, 1), -1)).transpose(1, 2)


def weight_gradient(g: Tensor, u: Tensor, band: Band, size: int) -> Tensor:
    """Launch the sum over samples of g^T u, at each sample's band; return it as fp32 [O, C].

    Args:
        g: [B, N, O]. u: [B, N, C]. The one with the band's rows or columns holds only these.
        size: of the weight, C for a band of columns, O for one of rows.
    """
    B, N, O = g.shape
    start, _, unit, parts = band
    rows, channels = (size, u.shape[2]) if parts else (O, size)
    if B * N == 0:
        return torch.zeros(rows, channels, device=g.device, dtype=torch.float32)
    tile = _WEIGHT_GRADIENT.tile(g, N, channels)
    O = rows // max(parts, 1)
    tiles = triton.cdiv(O, tile.m) * triton.cdiv(channels, tile.n) * max(parts, 1)
    splits = _splits(tiles, B * triton.cdiv(N, tile.k), multiprocessors(g))
    sums = empty_rows(splits, max(parts, 1), O, channels, like=g, dtype=torch.float32)
    launch(
        window_weight_gradient_kernel,
        tiles * splits,
        descriptor(_by_part(g, parts), [1, 1, tile.k, tile.m]),
        descriptor(u, [1, tile.k, tile.n]),
        start,
        descriptor(sums, [1, 1, tile.m, min(tile.n, _PIECE)]),
        B,
        N,
        O,
        channels,
        splits,
        PARTS=parts,
        UNIT=unit,
        PRECISION=dot_precision(g.dtype),
        **options(tile),
    )
    total = sums[0].contiguous() if splits == 1 else sums.sum(0)
    return total.view(rows, channels)


def _splits(tiles: int, steps: int, processors: int) -> int:
    """Return the number of splits in which the tokens of a weight gradient are summed.

    A weight has few tiles, each a long sum: 135 tiles on 132 multiprocessors would take as long as 264. Returns the
    fewest splits of at least ``_LEAST_STEPS`` steps that keep the multiprocessors nearly as busy as the best number up
    to ``_MOST_SPLITS``.
    """

    def busy(splits: int) -> float:
        rounds = triton.cdiv(tiles * splits, processors)
        return tiles * splits / (rounds * processors)

    choices = range(1, max(1, min(_MOST_SPLITS, steps // _LEAST_STEPS)) + 1)
    enough = 0.95 * max(map(busy, choices))
    return next(splits for splits in choices if busy(splits) >= enough)


def token_sums(g: Tensor, mean_rstd: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Launch one read of g for all sums over it; return inactive [B, N], dp [B, O] and dq [B, O] in fp32."""
    B, N, O = g.shape
    inactive = torch.empty(B, N, device=g.device, dtype=torch.float32)
    parts = torch.empty(2, B, chunks_of(N), O, device=g.device, dtype=torch.float32)
    if B * N > 0:
        tile = _TOKEN_SUMS.tile(g, N, O)
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
            **options(tile),
        )
    dp, dq = parts.sum(2)
    return inactive, dp, dq


# --- CPU -------------------------------------------------------------------------------------------------------------

# Least saving of a slice of the weight, in per cent of its cost (`python -m benchmarks run cpu_limits` measures it).
_LEAST_GAIN = 100
# Costs on a CPU: repacking a slice takes as long as this many more tokens; the closed form, which reads the gradient
# three times more in the backward pass, as long as this share of all channels.
_COSTS_OF_A_SLICE: dict[WindowsOp, tuple[int, float]] = {"windows_forward": (45, 0), "windows_backward": (32, 0.25)}


def slice_gain(op: WindowsOp, tokens: int, channels: int, width: int) -> int:
    """Estimate what GEMMs on slices of the weight save on a CPU, in per cent of their cost, at ``tokens`` a slice."""
    repacked, closed_form = _COSTS_OF_A_SLICE[op]
    return int(100 * (channels - width) / (repacked * width / max(tokens, 1) + closed_form * channels))


def _slices(start: Tensor, width: int) -> list[tuple[slice, slice]]:
    """Return groups of samples with the channels of their window: one group if all share it."""
    starts = start.tolist()
    if len(set(starts)) == 1:
        return [(slice(None), slice(starts[0], starts[0] + width))]
    return [(slice(b, b + 1), slice(s, s + width)) for b, s in enumerate(starts)]


def _token_sums_on_cpu(g: Tensor, mean_rstd: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``token_sums`` on a CPU."""
    wide = g.to(mean_rstd.dtype)
    # Sum in parts: one long sum would round as often as there are tokens.
    rows = torch.stack([-mean_rstd, torch.ones_like(mean_rstd)], 1).split(256, 2)
    parts = [torch.bmm(*part) for part in zip(rows, wide.split(256, 1), strict=True)]
    dp, dq = torch.stack(parts).sum(0).unbind(1)
    return torch.bmm(wide, p[:, :, None])[..., 0], dp, dq


def _backward_on_slices(
    g: Tensor, u: Tensor, weight: Tensor, start: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Return du, and the weight gradient of active channels in the accumulator's dtype."""
    du = torch.empty_like(u)
    dweight = weight.new_zeros(weight.shape, dtype=compute_dtype(weight)) if need_weight else None
    for samples, channels in _slices(start, u.shape[-1]):
        rows, inputs = g[samples].flatten(0, 1), u[samples].flatten(0, 1)
        torch.mm(rows, weight[:, channels], out=du[samples].view_as(inputs))
        if dweight is not None:
            dweight[:, channels].addmm_(rows.t().to(dweight.dtype), inputs.to(dweight.dtype))
    return du, dweight


# --- declarations ----------------------------------------------------------------------------------------------------


def _dense(u: Tensor, closed: ClosedForm | None, weight: Tensor) -> Tensor:
    """Return the layer's input on all channels [B, N, C], as in a masked model."""
    if closed is None:
        return u
    inactive = u.new_zeros(*u.shape[:2], weight.shape[1])
    if closed.mean_rstd is not None:
        inactive = -closed.mean_rstd[:, :, None].expand_as(inactive)
    return spread(u, closed.start, reference.modulate(inactive, closed.shift, closed.scale)).to(weight.dtype)


def _plain_forward(u: Tensor, closed: ClosedForm | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(_dense(u, closed, weight), weight, bias)


def _plain_gelu_forward(
    u: Tensor, closed: ClosedForm | None, weight: Tensor, bias: Tensor | None, write_pre: bool
) -> tuple[Tensor | None, Tensor]:
    pre = _plain_forward(u, closed, weight, bias)
    return pre if write_pre else None, reference.activate(pre)


def _gelu_forward(write_pre: bool, **layer: Any) -> tuple[Tensor | None, Tensor]:
    pre, act = linear_activation_forward(**layer, kind="gelu_tanh", write_pre=write_pre)
    return pre if write_pre else None, act


def _of_backward(
    g: Tensor, u: Tensor, closed: ClosedForm | None, weight: Tensor, need_weight: bool, need_bias: bool
) -> tuple[Any, list[Tensor], list[Tensor]]:
    def function(u: Tensor, *others: Tensor) -> list[Tensor]:
        left, form = list(others), closed
        if closed is not None and closed.mean_rstd is None:
            form = closed._replace(shift=left.pop(0))
        elif closed is not None:  # differentiate the norm's output at deactivated channels
            form = ClosedForm(-left.pop(0), left.pop(0), left.pop(0), closed.start)
        return [_plain_forward(u, form, left.pop(0) if need_weight else weight, left.pop(0) if need_bias else None)]

    if closed is None:
        known = []
    else:
        known = [closed.shift] if closed.mean_rstd is None else [-closed.mean_rstd, closed.shift, closed.scale]
    return function, [u, *known, *[weight] * need_weight, *[weight.new_zeros(len(weight))] * need_bias], [g]


def _plain_gelu_backward(g: Tensor, pre: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.gelu_backward(g @ weight, pre, approximate="tanh"), reference.activate(pre)


def _plain_weight_gradient(g: Tensor, u: Tensor, start: Tensor, channels: int) -> Tensor:
    dense = spread(u, start, u.new_zeros(*u.shape[:2], channels))
    return g.flatten(0, 1).t() @ dense.flatten(0, 1)


def _plain_token_sums(g: Tensor, mean_rstd: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = g.to(p.dtype)
    return (wide * p[:, None]).sum(2), -(mean_rstd[..., None] * wide).sum(1), wide.sum(1)


def _plain_contributions(
    closed: ClosedForm, width: int, weight: Tensor, bias: Tensor | None, need_q: bool
) -> tuple[Tensor | None, Tensor | None]:
    _, factor, shift = _inactive_channels(closed, width, compute_dtype(weight))
    p, q = F.linear(factor.to(weight.dtype), weight), F.linear(shift.to(weight.dtype), weight, bias)
    return None if closed.mean_rstd is None else p, q if need_q else None


def _input_gradient(g: Tensor, weight: Tensor, start: Tensor, width: int) -> Tensor:
    return input_gradient(g, weight, Band(start, width), width, None)[0]


def _weight_gradient(g: Tensor, u: Tensor, start: Tensor, channels: int) -> Tensor:
    return weight_gradient(g, u, Band(start, u.shape[2]), channels)


def _layer(draw: Draw, outputs: int, routed: bool, rms: bool = False) -> dict[str, Any]:
    B, N, C, _ = draw.sizes
    shift, scale = draw.vectors(2)
    closed = ClosedForm(None if rms else draw.statistic(B, N), shift, scale, draw.start) if routed else None
    return dict(u=draw.compact() if routed else draw(B, N, C), closed=closed, weight=draw.weight(outputs, C))


def _backward_inputs(draw: Draw, routed: bool, rms: bool, parameters: bool) -> dict[str, Any]:
    B, N, C, _ = draw.sizes
    needs = dict(need_weight=parameters, need_bias=parameters)
    return dict(g=draw(B, N, 3 * C), **_layer(draw, 3 * C, routed, rms), **needs)


def _gelu_forward_inputs(draw: Draw, routed: bool, bias: bool, write_pre: bool) -> dict[str, Any]:
    C = draw.sizes.C
    return dict(**_layer(draw, 4 * C, routed), bias=draw(4 * C) if bias else None, write_pre=write_pre)


def linear_work(M: int, K: int, O: int, items: Itemsizes) -> Work:
    """Count a linear layer with bias, of M rows of K channels."""
    return Work(2 * M * K * O, M * (K + O) * items.operand + (K + 1) * O * items.stream)


def linear_gradients_work(M: int, K: int, O: int, items: Itemsizes, parameters: bool = True) -> Work:
    """Count the gradients of its input, weight and bias: the tensors of the forward pass, with reads and writes
    swapped."""
    work = Work(2 * M * K * O, M * (K + O) * items.operand + K * O * items.stream)
    return work + linear_work(M, K, O, items) if parameters else work


def forward_work(B: int, N: int, C: int, W: int, O: int, items: Itemsizes, rms: bool = False) -> Work:
    """Count the product over each window, and p and q over its deactivated channels; after RMSNorm only q."""
    return linear_work(B * N, W, O, items) + _inactive_work(B, N, C, W, O, items, rms)


def gradients_work(
    B: int, N: int, C: int, W: int, O: int, items: Itemsizes, parameters: bool = True, rms: bool = False
) -> Work:
    """Count the gradients of the window, of deactivated channels' shift and scale, and of weight and bias.

    Deactivated channels take three products: p, which multiplies the gradient of every token, and those with dp and
    dq; after RMSNorm only the one with dq.
    """
    inactive = C - W
    work = linear_gradients_work(B * N, W, O, items, parameters) + _known_work(B, N, C, W, rms)
    vectors = (
        B * inactive * (STATISTIC if rms else items.operand + 2 * STATISTIC)
    )  # gradients of shift; of scale, scale
    work += Work((2 if rms else 6) * B * inactive * O, inactive * O * items.stream + vectors)
    if inactive and not rms:
        work += Work(bytes=B * N * STATISTIC)  # each token's sum over deactivated channels
    return work + _inactive_work(B, N, C, W, O, items, rms) if parameters else work


def mlp_forward_work(
    B: int, N: int, C: int, W: int, H: int, items: Itemsizes, write_pre: bool, parts: int = 1, rms: bool = False
) -> Work:
    """Count fc1 of a window and the activation, and the activation's input if ``write_pre``.

    The activation has H output channels, and ``parts`` times as many input channels.
    """
    pre = parts if write_pre else 0
    fc1 = forward_work(B, N, C, W, parts * H, items, rms)
    return fc1 + Work(bytes=(pre + 1 - parts) * B * N * H * items.operand)  # fc1 writes no more than that


def mlp_backward_work(B: int, N: int, H: int, O: int, items: Itemsizes, write_act: bool = True, parts: int = 1) -> Work:
    """Count the gradient of pre in fc2(act(pre)), from H to O channels, and act(pre) again if ``write_act``."""
    pre = Work(bytes=(2 * parts - 1 + write_act) * B * N * H * items.operand)
    return linear_gradients_work(B * N, H, O, items, parameters=False) + pre


def _inactive_work(B: int, N: int, C: int, W: int, O: int, items: Itemsizes, rms: bool) -> Work:
    """Count the products of the weight's deactivated channels with shift and scale, after RMSNorm with shift only."""
    inactive, vectors = C - W, 1 if rms else 2
    read = inactive * O * items.stream + vectors * B * inactive * items.operand
    return Work(2 * vectors * B * inactive * O, read) + _known_work(B, N, C, W, rms)


def _known_work(B: int, N: int, C: int, W: int, rms: bool) -> Work:
    """Count what the closed form reads if channels are deactivated: windows, and mean * rstd of a LayerNorm."""
    return Work(bytes=(0 if rms else B * N * STATISTIC) + starts(B, C, W) if W < C else 0)


def _forward_peer(share: Callable[[int, int], int]) -> Callable[..., Callable[[], Any]]:
    def peer(u: Tensor, closed: ClosedForm | None, weight: Tensor, bias: Tensor | None) -> Callable[[], Any]:
        channels = share(u.shape[2], weight.shape[1])
        x = _dense(u, closed, weight)[..., :channels].contiguous()
        return lambda: F.linear(x, weight[:, :channels], bias)

    return peer


def _backward_peer(share: Callable[[int, int], int]) -> Callable[..., Callable[[], Any]]:
    def peer(
        g: Tensor, u: Tensor, closed: ClosedForm | None, weight: Tensor, need_weight: bool, **_: bool
    ) -> Callable[[], Any]:
        channels = share(u.shape[2], weight.shape[1])
        x, rows = _dense(u, closed, weight)[..., :channels].contiguous().flatten(0, 1), g.flatten(0, 1)
        if need_weight:
            return lambda: (g @ weight[:, :channels], rows.t() @ x, rows.sum(0))
        return lambda: g @ weight[:, :channels]

    return peer


def _peers(peer: Callable[[Callable[[int, int], int]], Any]) -> dict[str, Any]:
    """Return PyTorch's products with all channels, and with as many as are active, the same for all samples."""
    # A multiple of 8, with which cuBLAS is fast.
    return {ALL_CHANNELS: peer(lambda W, C: C), ONE_SLICE: peer(lambda W, C: min(C, -(-W // 8) * 8))}


def _library_gelu(u: Tensor, closed: Any, weight: Tensor, bias: Any, write_pre: bool) -> Callable[[], Tensor] | None:
    """Return a call of cuBLASLt's epilogue, a private function of PyTorch's; on a CPU it is another GELU."""
    if write_pre or closed is not None or u.device.type != "cuda":
        return None
    rows = u.flatten(0, 1)
    return lambda: torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)


KERNELS = [
    Kernel(
        "window_linear_forward",
        window_linear_forward,
        _plain_forward,
        lambda draw, bias, rms: (
            _layer(draw, 3 * draw.sizes.C, True, rms) | dict(bias=draw(3 * draw.sizes.C) if bias else None)
        ),
        modes(bias=(True, False), rms=(False, True)),
        work=lambda s, items, rms, **_: forward_work(s.B, s.N, s.C, s.W, 3 * s.C, items, rms),
        timed=lambda bias, **_: bias,
        tiles=lambda **_: ("forward",),
        peers=_peers(_forward_peer),
    ),
    Kernel(
        "window_linear_backward",
        window_linear_backward,
        Gradient(_of_backward),
        _backward_inputs,
        modes(
            lambda routed, rms, **_: routed or not rms,
            routed=(True, False),
            rms=(False, True),
            parameters=(True, False),
        ),
        work=lambda s, items, routed, rms, parameters: gradients_work(
            s.B, s.N, s.C, s.W, 3 * s.C, items, parameters, rms
        ),
        timed=lambda routed, **_: routed,
        peers=_peers(_backward_peer),
    ),
    Kernel(
        "input_gradient",
        _input_gradient,
        lambda g, weight, start, width: in_window(g @ weight, start, width),
        lambda draw: dict(
            g=draw(*draw.sizes[:2], 3 * draw.sizes.C),
            weight=draw.weight(3 * draw.sizes.C, draw.sizes.C),
            start=draw.start,
            width=draw.sizes.W,
        ),
        tiles=lambda: ("input_gradient",),
        triton_only=True,
    ),
    Kernel(
        "weight_gradient",
        _weight_gradient,
        _plain_weight_gradient,
        lambda draw: dict(
            g=draw(*draw.sizes[:2], 3 * draw.sizes.C), u=draw.compact(), start=draw.start, channels=draw.sizes.C
        ),
        tiles=lambda: ("weight_gradient",),
        triton_only=True,
    ),
    Kernel(
        "contributions",
        contributions,
        _plain_contributions,
        lambda draw, rms, bias, need_q: dict(
            closed=_layer(draw, 3 * draw.sizes.C, True, rms)["closed"],
            width=draw.sizes.W,
            weight=draw.weight(3 * draw.sizes.C, draw.sizes.C),
            bias=draw(3 * draw.sizes.C) if bias else None,
            need_q=need_q,
        ),
        modes(
            lambda rms, bias, need_q: need_q or not (bias or rms),
            rms=(False, True),
            bias=(True, False),
            need_q=(True, False),
        ),
        tiles=lambda **_: ("closed_form",),
    ),
    Kernel(
        "token_sums",
        token_sums,
        _plain_token_sums,
        lambda draw: dict(
            g=draw(*draw.sizes[:2], 3 * draw.sizes.C),
            mean_rstd=draw.statistic(*draw.sizes[:2]),
            p=draw.statistic(draw.sizes.B, 3 * draw.sizes.C),
        ),
        tiles=lambda: ("token_sums",),
        triton_only=True,
    ),
    Kernel(
        "linear_gelu_forward",
        _gelu_forward,
        _plain_gelu_forward,
        _gelu_forward_inputs,
        modes(routed=(True, False), bias=(True, False), write_pre=(True, False)),
        work=lambda s, items, routed, bias, write_pre: mlp_forward_work(
            s.B, s.N, s.C, s.W if routed else s.C, 4 * s.C, items, write_pre
        ),
        timed=lambda bias, **_: bias,
        tiles=lambda **_: ("forward_gelu",),
        crossover="gelu_forward",
        peers={"cuBLASLt with GELU": _library_gelu},
    ),
    Kernel(
        "gelu_linear_backward",
        lambda **layer: activation_linear_backward(**layer, kind="gelu_tanh"),
        _plain_gelu_backward,
        lambda draw: dict(
            g=draw(*draw.sizes[:3]),
            pre=draw(*draw.sizes[:2], 4 * draw.sizes.C),
            weight=draw.weight(draw.sizes.C, 4 * draw.sizes.C),
        ),
        work=lambda s, items: mlp_backward_work(s.B, s.N, 4 * s.C, s.C, items),
        tiles=lambda: ("gelu_input_gradient",),
        crossover="gelu_backward",
    ),
]
