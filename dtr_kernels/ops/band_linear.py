"""Linear layers in which each sample uses the rows, or the columns, of its active attention heads (scope "inner").

A sample uses neighbours of the H heads, a window over heads instead of channels; MLP channels belong to heads too:

    rows:     out[b] = u[b] @ W[rows of b]^T + bias[rows of b]        # queries, keys and values; fc1
    columns:  out[b] = z[b] @ W[:, columns of b]^T + bias             # attention's output projection; fc2

Activations between the two layers are compact, [B, N, active]. A sample gives no gradient to the rows and columns that
it does not use, and they add nothing to its output, so there is no closed form. A batch has at most H - A + 1 different
windows of A active heads. If the host knows them, each run of neighbouring samples with the same window is a GEMM of
PyTorch's on a slice of the weight, and ops sort their samples by window first. If only a GPU knows them, the kernels of
``window_linear`` run with a start for each sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dtr_kernels import reference
from dtr_kernels.ops.activations import activation_backward, activation_forward
from dtr_kernels.ops.declaration import (
    ALL_CHANNELS,
    ONE_SLICE,
    Draw,
    Gradient,
    Itemsizes,
    Kernel,
    Sizes,
    Work,
    in_window,
    modes,
    spread,
    starts,
)
from dtr_kernels.ops.dispatch import Choice, compute_dtype, made, or_empty, runs_on_cpu
from dtr_kernels.ops.window_linear import (
    Band,
    choose_activation,
    input_gradient,
    linear_gradients_work,
    linear_work,
    product,
    weight_gradient,
)


class Heads(NamedTuple):
    """Active attention heads: the first head of each sample, int32 [B]; the active heads A of H heads in total.

    The start may be on the CPU while the tokens are on a GPU: the host then knows it.
    """

    start: Tensor
    active: int
    total: int

    def rows(self, weight: Tensor, parts: int = 1) -> Band:
        """Return the band of these heads' rows in each of ``parts`` equal parts of a weight."""
        unit = len(weight) // (parts * self.total)
        return Band(self.start, self.active * unit, unit, parts)

    def columns(self, weight: Tensor) -> Band:
        """Return the band of these heads' columns."""
        unit = weight.shape[1] // self.total
        return Band(self.start, self.active * unit, unit)


class BandGradients(NamedTuple):
    """Gradients of the layer's input, unconditionally, and of weight and bias, None if not asked for."""

    u: Tensor
    weight: Tensor | None
    bias: Tensor | None


def choose_bands(x: Tensor, start: Tensor) -> Choice:
    """Choose GEMMs on "slices" of the weight, if the host knows the windows, or a GEMM over each sample's "bands"."""
    if runs_on_cpu(x):
        return Choice("slices", "GEMMs on slices of the weight, one for each different window")
    if start.device != x.device:
        return Choice("slices", "cuBLAS on slices of the weight, once for each different window")
    return Choice(
        "bands",
        "the Triton GEMM over each sample's heads; with t on the CPU cuBLAS multiplies slices of the weight, which is "
        "the faster way",
    )


def order_by_window(x: Tensor, start: Tensor) -> Tensor | None:
    """Return an order of samples, int64 [B] on the CPU, that puts equal windows side by side; None if they already are,
    or the host does not know them. An op calls this once, which also reports the choice for its layers."""
    if made(choose_bands(x, start)).path == "bands":
        return None
    first = start.tolist()
    if sum(1 for _ in itertools.groupby(first)) == len(set(first)):
        return None
    return torch.tensor(sorted(range(len(first)), key=first.__getitem__), device="cpu")


def in_order(x: Tensor, order: Tensor | None) -> Tensor:
    """Return the samples of x [B, ...] in that order."""
    return x if order is None else x.index_select(0, order.to(x.device, non_blocking=True))


def out_of_order(x: Tensor, order: Tensor | None) -> Tensor:
    """Undo ``in_order``."""
    return x if order is None else torch.empty_like(x).index_copy_(0, order.to(x.device, non_blocking=True), x)


def band_forward(u: Tensor, weight: Tensor, bias: Tensor | None, band: Band) -> Tensor:
    """Return out [B, N, parts * width] for a band of rows, or [B, N, O] for a band of columns, in weight's dtype.

    Args:
        u: [B, N, C], or for a band of columns [B, N, width], in weight's dtype.
        weight: [O, C]. bias: [O] or None.
    """
    if choose_bands(u, band.start).path == "bands":
        return product(u, weight, bias, band, None, None, gelu=False, write_out=True)[0]
    out = u.new_empty(*u.shape[:2], band.parts * band.width if band.parts else len(weight))
    for samples, first in _runs(band, weight):
        rows, columns = u[samples].flatten(0, 1), _slice(weight, band, first).t()
        into = out[samples].flatten(0, 1)
        if bias is None:
            torch.mm(rows, columns, out=into)
        else:
            own = _used(bias, band, first).flatten() if band.parts else bias
            torch.addmm(own, rows, columns, out=into)
    return out


def band_activation_forward(
    u: Tensor, weight: Tensor, bias: Tensor | None, band: Band, kind: str, write_pre: bool
) -> tuple[Tensor, Tensor]:
    """Return pre of ``band_forward`` and its activation; pre is empty unless ``write_pre`` (training)."""
    in_epilogue = choose_activation("gelu_forward", kind, u, None, weight, weight.shape[1]).path == "epilogue"
    if in_epilogue and choose_bands(u, band.start).path == "bands":
        return product(u, weight, bias, band, None, None, gelu=True, write_out=write_pre)
    pre = band_forward(u, weight, bias, band)
    return or_empty(pre if write_pre else None, pre), activation_forward(pre, kind, write_pre)


def band_backward(
    g: Tensor, u: Tensor, weight: Tensor, band: Band, need_weight: bool = True, need_bias: bool = True
) -> BandGradients:
    """Return the gradients of ``band_forward``; g is the gradient of its output, in weight's dtype."""
    du = band_input_gradient(g, weight, band)
    return BandGradients(du, *parameter_gradients(g, u, weight, band, need_weight, need_bias))


def band_input_gradient(g: Tensor, weight: Tensor, band: Band) -> Tensor:
    """Return the gradient of the layer's input, [B, N, C] or for a band of columns [B, N, width]; rows may be
    padded."""
    width = weight.shape[1] if band.parts else band.width
    if choose_bands(g, band.start).path == "bands":
        return input_gradient(g, weight, band, width, None)[0]
    du = g.new_empty(*g.shape[:2], width)
    for samples, first in _runs(band, weight):
        torch.mm(g[samples].flatten(0, 1), _slice(weight, band, first), out=du[samples].flatten(0, 1))
    return du


def activation_band_backward(g: Tensor, pre: Tensor, weight: Tensor, band: Band, kind: str) -> tuple[Tensor, Tensor]:
    """Return (dpre, act) of out = act @ weight[:, columns]^T, like pre and [B, N, width]; act is recomputed."""
    in_epilogue = choose_activation("gelu_backward", kind, g, None, weight, weight.shape[0]).path == "epilogue"
    if in_epilogue and choose_bands(g, band.start).path == "bands":
        return input_gradient(g, weight, band, pre.shape[2], pre)
    dact = band_input_gradient(g, weight, band).contiguous()  # its rows may be padded
    return activation_backward(dact, pre, kind)


def parameter_gradients(
    g: Tensor, u: Tensor, weight: Tensor, band: Band, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of weight and bias, None if not asked for; arguments as in ``band_backward``."""
    if choose_bands(g, band.start).path == "bands":
        dweight = weight_gradient(g, u, band, weight.shape[0 if band.parts else 1]) if need_weight else None
        if not need_bias:
            dbias = None
        elif band.parts:  # sum each sample, scatter it among all rows, then sum those
            dbias = among_all(g.sum(1, keepdim=True, dtype=compute_dtype(g)), band, len(weight)).sum((0, 1))
        else:
            dbias = g.flatten(0, 1).sum(0)
    else:
        runs = list(_runs(band, weight))
        # Accumulate runs in the compute dtype, so that their sum is rounded once.
        dtype = weight.dtype if len(runs) < 2 else compute_dtype(weight)
        dweight = weight.new_zeros(weight.shape, dtype=dtype) if need_weight else None
        dbias = weight.new_zeros(len(weight), dtype=compute_dtype(weight)) if need_bias else None
        for samples, first in runs:
            rows = g[samples].flatten(0, 1)
            if dweight is not None:
                _add_product(_used(dweight, band, first), rows, u[samples].flatten(0, 1), band.parts)
            if dbias is not None:
                own = _used(dbias, band, first) if band.parts else dbias
                own += rows.sum(0, dtype=own.dtype).view_as(own)
    return tuple(None if d is None else d.to(weight.dtype) for d in (dweight, dbias))  # type: ignore[return-value]


def _add_product(into: Tensor, g: Tensor, u: Tensor, parts: int) -> None:
    """Add g^T u to the used part of a weight's gradient."""
    pieces = zip(into, g.chunk(parts, 1), strict=True) if parts else [(into, g)]
    for piece, rows in pieces:
        if piece.dtype == rows.dtype:
            piece.addmm_(rows.t(), u)
        else:
            piece.add_(rows.t() @ u)


def _runs(band: Band, weight: Tensor) -> Iterator[tuple[slice, int]]:
    """Yield each run of samples with the same window, and its first row or column; the host must know the windows."""
    starts = band.start.tolist()
    size = len(weight) // band.parts if band.parts else weight.shape[1]
    if starts and (min(starts) < 0 or max(starts) * band.unit + band.width > size):
        last = (size - band.width) // band.unit
        raise ValueError(f"the window's starts must be in 0..{last}, got {min(starts)} to {max(starts)}")
    sample = 0
    for start, same in itertools.groupby(starts):
        count = sum(1 for _ in same)
        yield slice(sample, sample + count), start * band.unit
        sample += count


def among_all(compact: Tensor, band: Band, size: int) -> Tensor:
    """Scatter a band, [B, N, parts * width] or for columns [B, N, width], into zeros [B, N, size]."""
    (B, N, _), parts = compact.shape, max(band.parts, 1)
    start = (band.start * band.unit).to(compact.device, non_blocking=True)
    every = spread(compact.reshape(B, N * parts, band.width), start, compact.new_zeros(B, N * parts, size // parts))
    return every.view(B, N, size)


def _used(tensor: Tensor, band: Band, first: int) -> Tensor:
    """Return a view of a band's columns [O, width], or of its rows in each part [parts, width, ...]."""
    if band.parts:
        return tensor.unflatten(0, (band.parts, -1))[:, first : first + band.width]
    return tensor[:, first : first + band.width]


def _slice(weight: Tensor, band: Band, first: int) -> Tensor:
    """Return ``_used`` as one matrix; a copy if the rows fall into parts."""
    return _used(weight, band, first).flatten(0, 1) if band.parts else _used(weight, band, first)


# --- declarations ----------------------------------------------------------------------------------------------------


def head_size(channels: int) -> int:
    """Return the channels of a head as in the published models; one for odd numbers of channels."""
    return next(size for size in (72, 64, 8, 1) if channels % size == 0)


def heads_of(sizes: Sizes) -> tuple[int, int]:
    """Return the number of active heads, and of all heads."""
    count = sizes.C // head_size(sizes.C)
    return max(1, int(sizes.beta * count)), count


def drawn_heads(draw: Draw, on_host: bool) -> Heads:
    """Draw random windows over heads."""
    width, count = heads_of(draw.sizes)
    start = draw.starts(count - width + 1)
    return Heads(start.cpu() if on_host and not start.is_meta else start, width, count)


def _dense(out: Tensor, band: Band) -> Tensor:
    """Return the active rows' part [B, N, parts * width] of a dense layer's output."""
    B, N, _ = out.shape
    parts = out.unflatten(2, (band.parts, -1)).flatten(1, 2)
    return in_window(parts, (band.start * band.unit).to(out.device), band.width).reshape(B, N, band.parts * band.width)


def plain_band(u: Tensor, weight: Tensor, bias: Tensor | None, band: Band) -> Tensor:
    """Compute ``band_forward`` in plain PyTorch."""
    if band.parts:
        return _dense(F.linear(u, weight, bias), band)
    return F.linear(among_all(u, band, weight.shape[1]), weight, bias)


def _plain_gelu(
    u: Tensor, weight: Tensor, bias: Tensor | None, band: Band, write_pre: bool
) -> tuple[Tensor | None, Tensor]:
    pre = plain_band(u, weight, bias, band)
    return pre if write_pre else None, reference.activate(pre)


def _gelu(write_pre: bool, **layer: Any) -> tuple[Tensor | None, Tensor]:
    pre, act = band_activation_forward(**layer, kind="gelu_tanh", write_pre=write_pre)
    return pre if write_pre else None, act


def _plain_gelu_backward(g: Tensor, pre: Tensor, weight: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    dact = in_window(g @ weight, (band.start * band.unit).to(g.device), band.width)
    return torch.ops.aten.gelu_backward(dact, pre, approximate="tanh"), reference.activate(pre)


def _of_backward(
    g: Tensor, u: Tensor, weight: Tensor, band: Band, need_weight: bool, need_bias: bool
) -> tuple[Any, list[Tensor], list[Tensor]]:
    def function(u: Tensor, *parameters: Tensor) -> list[Tensor]:
        left = list(parameters)
        own = left.pop(0) if need_weight else weight
        return [plain_band(u, own, left.pop(0) if need_bias else None, band)]

    return function, [u, *[weight] * need_weight, *[weight.new_zeros(len(weight))] * need_bias], [g]


def _layer(draw: Draw, parts: int, on_host: bool, ratio: int = 1) -> dict[str, Any]:
    """Draw a layer from C to ``parts * ratio * C`` channels over rows, or if parts is 0 its inverse over columns."""
    B, N, C, _ = draw.sizes
    heads = drawn_heads(draw, on_host)
    if parts:
        weight = draw.weight(parts * ratio * C, C)
        return dict(u=draw(B, N, C), weight=weight, band=heads.rows(weight, parts))
    weight = draw.weight(C, ratio * C)
    band = heads.columns(weight)
    return dict(u=draw(B, N, band.width), weight=weight, band=band)


def _bias(draw: Draw, layer: dict[str, Any], bias: bool) -> dict[str, Any]:
    return layer | dict(bias=draw(len(layer["weight"])) if bias else None)


def _outputs(layer: dict[str, Any]) -> int:
    band: Band = layer["band"]
    return band.parts * band.width if band.parts else len(layer["weight"])


def _backward_inputs(draw: Draw, parts: int, parameters: bool, on_host: bool) -> dict[str, Any]:
    layer = _layer(draw, parts, on_host)
    g = draw(*draw.sizes[:2], _outputs(layer))
    return dict(g=g, **layer, need_weight=parameters, need_bias=parameters)


def _gelu_backward_inputs(draw: Draw, on_host: bool) -> dict[str, Any]:
    B, N, C, _ = draw.sizes
    layer = _layer(draw, 0, on_host, ratio=4)
    return dict(g=draw(B, N, C), pre=layer.pop("u"), **layer)


def _widths(sizes: Sizes, parts: int) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a layer, on the side of its band the active ones."""
    active = heads_of(sizes)[0] * head_size(sizes.C)
    return (sizes.C, parts * active) if parts else (active, sizes.C)


def _starts(sizes: Sizes) -> Work:
    active, total = heads_of(sizes)
    return Work(bytes=starts(sizes.B, total, active))


def _work(sizes: Sizes, items: Itemsizes, parts: int, **_: bool) -> Work:
    return linear_work(sizes.B * sizes.N, *_widths(sizes, parts), items) + _starts(sizes)


def _gradients_work(sizes: Sizes, items: Itemsizes, parts: int, parameters: bool, **_: bool) -> Work:
    return linear_gradients_work(sizes.B * sizes.N, *_widths(sizes, parts), items, parameters) + _starts(sizes)


def _peers(all_of_it: bool) -> Callable[..., Callable[[], Any]]:
    """Return PyTorch's product with all heads, or with the first active ones for all samples alike."""

    def peer(u: Tensor, weight: Tensor, bias: Tensor | None, band: Band) -> Callable[[], Any]:
        x = among_all(u, band, weight.shape[1]) if all_of_it and not band.parts else u
        used = weight if all_of_it else _slice(weight, band, 0)
        return lambda: F.linear(x, used, bias if bias is None else bias[: len(used)])

    return peer


KERNELS = [
    Kernel(
        "band_forward",
        band_forward,
        plain_band,
        lambda draw, parts, bias, on_host: _bias(draw, _layer(draw, parts, on_host), bias),
        modes(parts=(3, 1, 0), bias=(True, False), on_host=(False, True)),
        work=_work,
        timed=lambda parts, bias, on_host: parts != 1 and bias and not on_host,
        tiles=lambda **_: ("forward",),
        peers={ALL_CHANNELS: _peers(True), ONE_SLICE: _peers(False)},
    ),
    Kernel(
        "band_backward",
        band_backward,
        Gradient(_of_backward),
        _backward_inputs,
        modes(parts=(3, 1, 0), parameters=(True, False), on_host=(False, True)),
        work=_gradients_work,
        timed=lambda parts, parameters, on_host: parts != 1 and parameters and not on_host,
        tiles=lambda parameters, **_: ("input_gradient", "weight_gradient") if parameters else ("input_gradient",),
    ),
    Kernel(
        "band_gelu_forward",
        _gelu,
        _plain_gelu,
        lambda draw, write_pre, on_host: (
            _bias(draw, _layer(draw, 1, on_host, ratio=4), True) | dict(write_pre=write_pre)
        ),
        modes(write_pre=(True, False), on_host=(False, True)),
        timed=lambda write_pre, on_host: not on_host,
        tiles=lambda **_: ("forward_gelu",),
        crossover="gelu_forward",
    ),
    Kernel(
        "gelu_band_backward",
        lambda **layer: activation_band_backward(**layer, kind="gelu_tanh"),
        _plain_gelu_backward,
        _gelu_backward_inputs,
        modes(on_host=(False, True)),
        timed=lambda on_host: not on_host,
        tiles=lambda **_: ("gelu_input_gradient",),
        crossover="gelu_backward",
    ),
]
