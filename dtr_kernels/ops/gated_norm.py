"""Residual + gate, routed norm and modulation in one pass, and its backward pass.

For each token, over channels c, with m the sample's window (all ones when unrouted), W its width:

    stream = x + gate * branch                                  (x itself without a branch)
    v      = m * stream,   or m * x + gate * branch             (``keep_branch``: only x is masked)
    mean   = sum(v) / C,   var = sum((v - mean)^2) / C,   rstd = (var + eps)^(-1/2)
    u      = (v - mean) * rstd * (1 + scale) + shift

RMSNorm is the same with mean = 0. Deactivated channels leave the norm as -mean * rstd, the same for all of them. So u
may be compact, [B, N, K]: the window's channels and, on a GPU, some neighbours. The next linear layer then adds the
contribution of the other channels in closed form (``window_linear``). Otherwise u has all C channels: for a dense GEMM,
if that is faster, and always with ``keep_branch``. The sums over C need only the window: each deactivated channel adds
mean^2 to the variance.

``reference.routed_norm`` is the reference. These functions are not differentiable by themselves; ``routed_linear`` and
``routed_mlp`` build the autograd ops from them and recompute u in the backward pass instead of storing it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton's language has no types.
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dtr_kernels import reference
from dtr_kernels.ops import extension
from dtr_kernels.ops.declaration import (
    STATISTIC,
    Draw,
    Gradient,
    Itemsizes,
    Kernel,
    Work,
    in_window,
    modes,
    starts,
    widened,
)
from dtr_kernels.ops.dispatch import (
    chunks_of,
    compute_dtype,
    empty_rows,
    launch,
    modulation,
    row_stride,
    rows_contiguous,
    runs_on_cpu,
)
from dtr_kernels.ops.tiles import TOKENS_PER_SUM, RowTile, RowTiles, options
from dtr_kernels.routing import ChannelWindow


class NormInputs(NamedTuple):
    """x and a pending update's branch [B, N, C]; shift, scale and the update's gate [B, C]."""

    x: Tensor
    shift: Tensor
    scale: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None


class NormWindow(NamedTuple):
    """Active channels.

    Attributes:
        start: int32 [B], the first channel of each sample's window; None when unrouted.
        width: W; C when unrouted.
        compact: u has only the active channels and few others (``kept_channels``).
        keep_branch: only x is masked; excludes ``compact``.
    """

    start: Tensor | None
    width: int
    compact: bool = False
    keep_branch: bool = False


class Norm(NamedTuple):
    """One of ``reference.NORMS``; eps is added to the variance, or to the mean square."""

    eps: float
    kind: str = "layer"


class NormOutput(NamedTuple):
    """stream [B, N, C] (None without a branch), u [B, N, C] (fewer channels if compact), mean (None for RMSNorm) and
    rstd [B, N] in the compute dtype; first, int32 [B], the first channel of a compact u (None otherwise).
    """

    stream: Tensor | None
    u: Tensor
    mean: Tensor | None
    rstd: Tensor
    first: Tensor | None


# Channels per step of a GEMM on large GPUs in 16-bit dtypes. A window seldom fills the last step.
_STEP = 64


def kept_channels(x: Tensor, window: NormWindow) -> tuple[int, int]:
    """Return the number of channels of a compact u, and a power of two that divides the index of the first one.

    A window may start anywhere, unlike vectors and memory sectors. So on a GPU u begins before the window, as far as
    the last step of a GEMM over it has room anyway; the neighbours hold their values of a dense layer's input.
    """
    C, width = x.shape[-1], window.width
    if runs_on_cpu(x):
        return width, 1
    kept = min(triton.cdiv(width, _STEP) * _STEP, C)
    room = 1 << ((kept - width + 1).bit_length() - 1)
    return kept, math.gcd(room, C - kept)  # they start at C - kept at the latest


def _first_kept_channel(x: Tensor, window: NormWindow) -> Tensor | None:
    """Return the first channel of a compact u, int32 [B]; None for any other u."""
    if window.start is None or not window.compact:
        return None
    kept, alignment = kept_channels(x, window)
    return (window.start // alignment * alignment).clamp_max(x.shape[-1] - kept)


class NormGradients(NamedTuple):
    """Gradients of x and branch [B, N, C] in the inputs' dtypes; of shift, scale and gate [B, C] in the compute dtype.
    Those of branch and gate are None without a branch."""

    x: Tensor
    shift: Tensor
    scale: Tensor
    branch: Tensor | None
    gate: Tensor | None

    def of(self, inputs: NormInputs, shift: Tensor | None = None, scale: Tensor | None = None) -> NormGradients:
        """Return the gradients in the inputs' dtypes, adding ``shift`` and ``scale`` of channels that u left out."""
        dshift = self.shift if shift is None else self.shift + shift
        dscale = self.scale if scale is None else self.scale + scale
        dgate = None if self.gate is None or inputs.gate is None else self.gate.to(inputs.gate.dtype)
        return self._replace(shift=dshift.to(inputs.shift.dtype), scale=dscale.to(inputs.scale.dtype), gate=dgate)


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _near(c, first, width):
    """Return the mask of a window's channels and others in the same vectors of 8: a window starts anywhere, and masks
    that change within a vector would split loads into single channels."""
    return (c // 8 >= first // 8) & (c // 8 <= (first + width - 1) // 8)


@triton.jit
def _first_kept(start, last, ALIGNMENT: tl.constexpr):
    """Return the first channel of a compact u: the last multiple of ``ALIGNMENT`` up to ``start``, at most ``last``."""
    return tl.multiple_of(min(start // ALIGNMENT * ALIGNMENT, last), ALIGNMENT)


@triton.jit(do_not_specialize=["N", "width"])
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
    first_ptr,
    N,
    C,
    width,
    kept,
    gate_stride,
    shift_stride,
    scale_stride,
    u_stride,
    eps,
    HAS_BRANCH: tl.constexpr,
    KEEP_BRANCH: tl.constexpr,
    WINDOWED: tl.constexpr,
    COMPACT: tl.constexpr,
    RMS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
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
    seen = exists
    column = c
    if WINDOWED:
        start = tl.load(start_ptr + b)
        active = (c >= start) & (c < start + width) & exists
        if not HAS_BRANCH:  # only a residual update touches deactivated channels
            read = _near(c, start, width) & exists
        if COMPACT:
            first = _first_kept(start, C - kept, ALIGNMENT)
            seen = (c >= first) & (c < first + kept)
            column = c - first
            tl.store(first_ptr + b, first, mask=pid % tiles == 0)
    offsets = token[:, None] * C + c[None, :]
    v = tl.load(x_ptr + offsets, mask=here & read[None, :], other=0.0).to(tl.float32)
    if HAS_BRANCH:
        gate = tl.load(gate_ptr + b * gate_stride + c, mask=exists, other=0.0).to(tl.float32)
        branch = tl.load(branch_ptr + offsets, mask=here & exists[None, :], other=0.0).to(tl.float32)
        # Explicit fma here and in the backward pass: if the sum nearly cancels, both must round it alike.
        stream = tl.fma(branch, gate[None, :], v).to(stream_ptr.dtype.element_ty)
        if WRITE_STREAM:
            tl.store(stream_ptr + offsets, stream, mask=here & exists[None, :])
        if not KEEP_BRANCH:
            v = stream.to(tl.float32)
    v = tl.where(active[None, :], v, 0.0)
    if KEEP_BRANCH:
        v = tl.fma(branch, gate[None, :], v)
    mean = tl.zeros([ROWS], tl.float32)
    if not RMS:
        mean = tl.sum(v, 1) / C
        tl.store(mean_ptr + token, mean, mask=n < N)
    centred = tl.where(seen[None, :], v - mean[:, None], 0.0)
    squares = tl.sum(centred * centred, 1)
    if COMPACT:
        squares += (C - kept) * mean * mean
    rstd = 1.0 / tl.sqrt(squares / C + eps)
    shift = tl.load(shift_ptr + b * shift_stride + c, mask=exists, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + b * scale_stride + c, mask=exists, other=0.0).to(tl.float32)
    u = centred * rstd[:, None] * (1.0 + scale[None, :]) + shift[None, :]
    u_offsets = token[:, None] * u_stride + column[None, :]
    tl.store(u_ptr + u_offsets, u.to(u_ptr.dtype.element_ty), mask=here & seen[None, :])
    tl.store(rstd_ptr + token, rstd, mask=n < N)


@triton.jit(do_not_specialize=["B", "N", "width"])
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
    kept,
    gate_stride,
    scale_stride,
    du_stride,
    HAS_BRANCH: tl.constexpr,
    KEEP_BRANCH: tl.constexpr,
    X_IS_STREAM: tl.constexpr,
    WINDOWED: tl.constexpr,
    COMPACT: tl.constexpr,
    RMS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
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
    seen = exists
    column = c
    if WINDOWED:
        start = tl.load(start_ptr + b)
        active = (c >= start) & (c < start + width) & exists
        read = _near(c, start, width) & exists
        if COMPACT:
            first = _first_kept(start, C - kept, ALIGNMENT)
            seen = (c >= first) & (c < first + kept)
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
        mean = tl.zeros([ROWS], tl.float32)
        if not RMS:
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
        total = tl.zeros([ROWS], tl.float32)
        along = tl.sum(dz * z, 1)
        if not RMS:
            total = tl.sum(dz, 1)
            if COMPACT:
                inactive = tl.load(inactive_ptr + token, mask=n < N, other=0.0)
                total += inactive
                along -= mean * rstd * inactive
        dv = rstd[:, None] * (dz - (total[:, None] + z * along[:, None]) / C)
        # The norm saw every channel of an update that is not masked; x is masked below.
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
    plane = B.to(tl.int64) * chunks * C
    tl.store(sums_ptr + part, shift_sum, mask=exists)
    tl.store(sums_ptr + plane + part, scale_sum, mask=exists)
    if HAS_BRANCH:
        tl.store(sums_ptr + 2 * plane + part, gate_sum, mask=exists)


# --- launchers -------------------------------------------------------------------------------------------------------


class _ForwardUpdateTiles(RowTiles):
    """Tiles of the forward pass with a pending update."""

    def default(self, dtype: torch.dtype, rows: int, channels: int, arch: int, active: int = 100) -> RowTile:
        tile = super().default(dtype, rows, channels, arch)
        # ptxas would spill to fit one more block on a multiprocessor: long rows of fp32, and two rows on Blackwell.
        return tile._replace(rows=1) if arch >= 100 or (dtype == torch.float32 and tile.block == 2048) else tile


class _BackwardTiles(RowTiles):
    """Tiles of the backward pass without a pending update."""

    def default(self, dtype: torch.dtype, rows: int, channels: int, arch: int, active: int = 100) -> RowTile:
        tile = super().default(dtype, rows, channels, arch)
        if dtype != torch.float32:  # few barriers; on Hopper vectors of 8 channels a thread, which spill elsewhere
            vector = 8 if 90 <= arch < 100 else 4
            return RowTile(1, tile.block, min(max(1, tile.block // (32 * vector)), 32))
        # With fp32 rows this long ptxas spills a register on sm_90 to fit one more block on a multiprocessor.
        return RowTile(1, tile.block, warps=32) if tile.block == 2048 else tile


class _BackwardUpdateTiles(RowTiles):
    """Tiles of the backward pass with a pending update."""

    def default(self, dtype: torch.dtype, rows: int, channels: int, arch: int, active: int = 100) -> RowTile:
        tile = super().default(dtype, rows, channels, arch)
        # Spills likewise, for rows of 512 in fp32 on Blackwell.
        return tile._replace(warps=8) if arch >= 100 and dtype == torch.float32 and tile.block == 512 else tile


_FORWARD, _FORWARD_UPDATE = RowTiles("norm_forward", 2), _ForwardUpdateTiles("norm_forward_update", 3)
_BACKWARD, _BACKWARD_UPDATE = _BackwardTiles("norm_backward", 4), _BackwardUpdateTiles("norm_backward_update", 6)


def gated_norm_forward(
    inputs: NormInputs, window: NormWindow, norm: Norm, dtype: torch.dtype, write_stream: bool = True
) -> NormOutput:
    """Run the forward pass.

    Args:
        inputs: x and branch [B, N, C]; shift, scale and gate [B, C], whose rows may be strided.
        window: active channels.
        norm: kind and eps.
        dtype: of u, the dtype of the GEMM that reads it.
        write_stream: False in the backward pass, which recomputes only u.
    """
    x, branch = inputs.x.contiguous(), None if inputs.branch is None else inputs.branch.contiguous()
    gate, shift, scale = modulation(x, inputs.gate, inputs.shift, inputs.scale)
    start, width, compact, keep_branch = window
    B, N, C = x.shape
    stream = torch.empty_like(x) if branch is not None and write_stream else None
    kept, alignment = kept_channels(x, window)
    u = empty_rows(B, N, kept, like=x, dtype=dtype) if compact else torch.empty(B, N, C, device=x.device, dtype=dtype)
    rstd = torch.empty(B, N, device=x.device, dtype=compute_dtype(x))
    rms = norm.kind == "rms"
    mean = None if rms else torch.empty_like(rstd)
    if B * N == 0:
        return NormOutput(stream, u, mean, rstd, _first_kept_channel(x, window))
    if runs_on_cpu(x):
        tensors = (x, branch, stream, u, gate, shift, scale, mean, rstd)
        shape = extension.shape(B, N, C, start, width)
        extension.kernels.norm_forward(
            shape, norm.eps, compact, keep_branch, rms, extension.dtype_code(x.dtype), *map(extension.rows, tensors)
        )
        return NormOutput(stream, u, mean, rstd, start if compact else None)
    first = torch.empty_like(start) if start is not None and compact else None
    tile = (_FORWARD if branch is None else _FORWARD_UPDATE).tile(x, N, C)
    launch(
        gated_norm_forward_kernel,
        B * triton.cdiv(N, tile.rows),
        x,
        branch,
        gate,
        shift,
        scale,
        start,
        x if stream is None else stream,  # for the dtype to which the kernel rounds the sum
        u,
        mean,
        rstd,
        first,
        N,
        C,
        width,
        kept,
        0 if gate is None else gate.stride(0),
        shift.stride(0),
        scale.stride(0),
        row_stride(u),
        norm.eps,
        HAS_BRANCH=branch is not None,
        KEEP_BRANCH=keep_branch,
        WINDOWED=start is not None,
        COMPACT=compact,
        RMS=rms,
        ALIGNMENT=alignment,
        WRITE_STREAM=stream is not None,
        **options(tile),
    )
    return NormOutput(stream, u, mean, rstd, first)


def gated_norm_backward(
    du: Tensor,
    dstream: Tensor | None,
    inactive: Tensor | None,
    inputs: NormInputs,
    mean: Tensor | None,
    rstd: Tensor,
    window: NormWindow,
    x_is_stream: bool = False,
) -> NormGradients:
    """Run the backward pass.

    Args:
        du: gradient of u, of u's shape. dstream: gradient of the stream [B, N, C], or None.
        inactive: [B, N] in the compute dtype, for each token the sum of the norm output's gradient over deactivated
            channels, which the linear layer knows in closed form; None unless compact, and for RMSNorm.
        inputs, window: as in ``gated_norm_forward``. mean, rstd: its results; mean is None for RMSNorm.
        x_is_stream: x holds the forward pass's stream instead of its input (not with ``keep_branch``).
    """
    x, branch = inputs.x.contiguous(), None if inputs.branch is None else inputs.branch.contiguous()
    gate, scale = modulation(x, inputs.gate, inputs.scale)
    start, width, compact, keep_branch = window
    B, N, C = x.shape
    du = rows_contiguous(du)
    dstream = None if dstream is None else dstream.contiguous()
    dx = torch.empty_like(x)
    dbranch = None if branch is None else torch.empty_like(branch)
    sums = torch.empty(2 if branch is None else 3, B, chunks_of(N), C, device=x.device, dtype=compute_dtype(x))
    if B * N > 0 and runs_on_cpu(x):
        tensors = (du, dstream, x, branch, dx, dbranch, gate, scale, mean, rstd, inactive, sums)
        shape = extension.shape(B, N, C, start, width, TOKENS_PER_SUM)
        flags = (compact, keep_branch, mean is None, x_is_stream)
        extension.kernels.norm_backward(shape, *flags, *map(extension.rows, tensors))
    elif B * N > 0:
        tile = (_BACKWARD if branch is None else _BACKWARD_UPDATE).tile(x, N, C)
        kept, alignment = kept_channels(x, window)
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
            kept,
            0 if gate is None else gate.stride(0),
            scale.stride(0),
            row_stride(du),
            HAS_BRANCH=branch is not None,
            KEEP_BRANCH=keep_branch,
            X_IS_STREAM=x_is_stream,
            WINDOWED=start is not None,
            COMPACT=compact,
            RMS=mean is None,
            ALIGNMENT=alignment,
            HAS_DSTREAM=dstream is not None,
            TOKENS=TOKENS_PER_SUM,
            **options(tile),
        )
    # Stage two of the sums over tokens. Separate tensors, since an op's outputs must not share memory.
    shift_sum, scale_sum, *gate_sum = (plane.sum(1) for plane in sums)
    return NormGradients(dx, shift_sum, scale_sum, dbranch, gate_sum[0] if gate_sum else None)


# --- declarations ----------------------------------------------------------------------------------------------------

EPS = 1e-6


def plain_norm(
    inputs: NormInputs, window: NormWindow, norm: Norm, dtype: torch.dtype, write_stream: bool = True
) -> NormOutput:
    """Compute ``gated_norm_forward`` in plain PyTorch."""
    x, shift, scale, branch, gate = inputs
    mask = None if window.start is None else ChannelWindow(window.start, window.width, x.shape[2]).mask()
    stream, u = reference.routed_norm(x, shift, scale, mask, branch, gate, window.keep_branch, *norm)
    seen = reference.masked(stream, mask)
    if branch is not None and gate is not None and window.keep_branch:
        seen = reference.masked(x, mask) + gate[:, None] * branch
    first = _first_kept_channel(x, window)
    if first is not None:
        u = in_window(u, first, kept_channels(x, window)[0])
    seen = seen.to(compute_dtype(x))
    mean = None if norm.kind == "rms" else seen.mean(2)
    rstd = ((seen if mean is None else seen - mean[..., None]).square().mean(2) + norm.eps).rsqrt()
    return NormOutput(stream if branch is not None and write_stream else None, u.to(dtype), mean, rstd, first)


def _of_backward(
    du: Tensor,
    dstream: Tensor | None,
    inactive: Tensor | None,
    inputs: NormInputs,
    mean: Tensor | None,
    rstd: Tensor,
    window: NormWindow,
    x_is_stream: bool,
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor], tuple[Tensor | None, ...]]:
    inputs = _before_update(inputs) if x_is_stream else inputs

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        out = plain_norm(NormInputs(*inputs), window, _kind(mean is None), du.dtype)
        outputs = inputs[0] if out.stream is None else out.stream, out.u
        # Every deactivated channel leaves the layer norm as -mean * rstd.
        return outputs if out.mean is None else (*outputs, -out.mean * out.rstd)

    return function, [t for t in inputs if t is not None], (dstream, du, inactive)[: 2 if mean is None else 3]


def _before_update(inputs: NormInputs) -> NormInputs:
    """Return the inputs whose stream is ``inputs.x``."""
    assert inputs.branch is not None and inputs.gate is not None
    return inputs._replace(x=inputs.x - inputs.gate[:, None] * inputs.branch)


def _drawn(draw: Draw, routed: bool, update: bool, compact: bool, keep_branch: bool) -> tuple[NormInputs, NormWindow]:
    B, N, C, _ = draw.sizes
    shift, scale, gate = draw.vectors(3)
    pending = (draw(B, N, C), gate) if update else (None, None)
    window = NormWindow(draw.start, draw.sizes.W, compact, keep_branch) if routed else NormWindow(None, C)
    return NormInputs(draw.stream(B, N, C), shift, scale, *pending), window


def _kind(rms: bool) -> Norm:
    return Norm(EPS, "rms" if rms else "layer")


def _forward_inputs(draw: Draw, rms: bool, without_stream: bool, **mode: bool) -> dict[str, Any]:
    inputs, window = _drawn(draw, **mode)
    return dict(
        inputs=inputs, window=window, norm=_kind(rms), dtype=inputs.shift.dtype, write_stream=not without_stream
    )


def _backward_inputs(draw: Draw, rms: bool, x_is_stream: bool, without_dstream: bool, **mode: bool) -> dict[str, Any]:
    B, N, C, _ = draw.sizes
    inputs, window = _drawn(draw, **mode)
    wide = widened(inputs)
    _, _, mean, rstd, _ = plain_norm(_before_update(wide) if x_is_stream else wide, window, _kind(rms), torch.float64)
    return dict(
        du=draw.compact(kept_channels(inputs.x, window)[0]) if window.compact else draw(B, N, C),
        dstream=None if without_dstream else draw.stream(B, N, C),
        inactive=draw.statistic(B, N) if window.compact and not rms else None,
        inputs=inputs,
        mean=None if mean is None else mean.to(compute_dtype(inputs.x)),
        rstd=rstd.to(compute_dtype(inputs.x)),
        window=window,
        x_is_stream=x_is_stream,
    )


def forward_work(
    B: int, N: int, C: int, W: int, items: Itemsizes, branch: bool = False, compact: bool = False, rms: bool = False
) -> Work:
    """Count the stream (with a branch), the next layer's input on all channels (on active ones if ``compact``), and
    each token's mean (not for RMSNorm) and rstd."""
    T, written = B * N, W if compact else C
    work = T * (C if branch else W) * items.stream  # x
    work += (T + 2 * B) * written * items.operand  # u, shift and scale
    work += (2 - rms) * T * STATISTIC + starts(B, C, W)
    if branch:
        work += T * C * (items.operand + items.stream) + B * C * items.operand  # branch, stream, gate
    return Work(bytes=work)


def backward_work(
    B: int,
    N: int,
    C: int,
    W: int,
    items: Itemsizes,
    branch: bool = False,
    compact: bool = False,
    dstream: bool = True,
    rms: bool = False,
) -> Work:
    """Count gradients of x, branch, gate, shift and scale.

    Args:
        compact: the given gradient has active channels only, and for the others their sum.
        dstream: the gradient of the stream is given and added to the gradient of x.
        rms: there is no mean, and so no sum over deactivated channels.
    """
    T, seen = B * N, W if compact else C
    work = T * (W + C) * items.stream  # x and its gradient
    work += (T + B) * seen * items.operand  # du, scale
    work += (2 - rms) * T * STATISTIC + starts(B, C, W)
    work += 2 * B * C * STATISTIC  # gradients of shift and scale
    if seen < C and not rms:
        work += T * STATISTIC  # sums over deactivated channels
    if dstream:
        work += T * C * items.stream
    if branch:
        work += (2 * T + B) * C * items.operand + B * C * STATISTIC  # branch and its gradient, gate and its gradient
    return Work(bytes=work)


def _valid(routed: bool, update: bool, compact: bool, keep_branch: bool, **others: bool) -> bool:
    """Return whether a mode exists: a compact output needs a window, and only a window masks one of two terms."""
    return (routed or not (compact or keep_branch)) and (update or not keep_branch) and not (compact and keep_branch)


def _layer_norm(inputs: NormInputs, norm: Norm, **_: Any) -> Callable[[], Tensor]:
    """Return PyTorch's layer norm, a simpler function: all channels, no residual, gate or modulation."""
    return lambda: F.layer_norm(inputs.x, inputs.x.shape[2:], eps=norm.eps)


_NORM = dict.fromkeys(("routed", "update", "compact", "keep_branch", "rms"), (False, True))

KERNELS = [
    Kernel(
        "gated_norm_forward",
        gated_norm_forward,
        plain_norm,
        _forward_inputs,
        modes(
            lambda update, without_stream, **m: _valid(update=update, **m) and (update or not without_stream),
            **_NORM,
            without_stream=(False, True),
        ),
        work=lambda s, items, routed, update, compact, rms, **_: forward_work(
            s.B, s.N, s.C, s.W if routed else s.C, items, update, compact, rms
        ),
        timed=lambda routed, update, rms, without_stream, **_: routed and not without_stream and (update or not rms),
        tiles=lambda update, **_: ("norm_forward_update",) if update else ("norm_forward",),
        peers={"F.layer_norm of x": _layer_norm},
        under_autocast=True,
    ),
    Kernel(
        "gated_norm_backward",
        gated_norm_backward,
        Gradient(_of_backward),
        _backward_inputs,
        modes(
            lambda update, x_is_stream, keep_branch, **m: (
                _valid(update=update, keep_branch=keep_branch, **m)
                and (not x_is_stream or (update and not keep_branch))
            ),
            **_NORM,
            x_is_stream=(False, True),
            without_dstream=(False, True),
        ),
        work=lambda s, items, routed, update, compact, rms, without_dstream, **_: backward_work(
            s.B, s.N, s.C, s.W if routed else s.C, items, update, compact, not without_dstream, rms
        ),
        timed=lambda routed, update, rms, without_dstream, **_: routed and not without_dstream and (update or not rms),
        tiles=lambda update, **_: ("norm_backward_update",) if update else ("norm_backward",),
        under_autocast=True,
    ),
]
