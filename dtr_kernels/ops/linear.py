"""Linear(modulate(LN(m * stream))) with stream = x + gate * branch: the part of a block before its attention.

Nothing between ``gated_norm`` and ``window_linear`` is stored for the backward pass: the linear layer's input is
recomputed from the stream, which the next op of the block keeps anyway.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from dtr_kernels import reference
from dtr_kernels.ops.checks import check_floating, check_linear, check_norm, check_stream, check_window
from dtr_kernels.ops.declaration import Draw, Gradient, Kernel, modes, widened
from dtr_kernels.ops.dispatch import Choice, choose, compute_dtype, in_dtype_of, or_empty
from dtr_kernels.ops.gated_norm import (
    EPS,
    Norm,
    NormGradients,
    NormInputs,
    NormOutput,
    NormWindow,
    gated_norm_backward,
    gated_norm_forward,
    plain_norm,
)
from dtr_kernels.ops.registration import Op, op
from dtr_kernels.ops.window_linear import ClosedForm, choose_gemm, window_linear_backward, window_linear_forward
from dtr_kernels.routing import ChannelWindow


@op("routed_linear")
def _op(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    start: Tensor | None,
    width: int,
    eps: float,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (stream, out, mean, rstd). stream is empty without a branch (it equals x); mean is empty for RMSNorm."""
    compact = choose_gemm("windows_forward", x, start, width, weight).path == "windows"
    inputs, window = NormInputs(x, shift, scale, branch, gate), NormWindow(start, width, compact)
    normed = gated_norm_forward(inputs, window, Norm(eps, norm), weight.dtype)
    out = window_linear_forward(normed.u, closed_form(inputs, normed), weight, bias)
    return or_empty(normed.stream, x), out, or_empty(normed.mean, normed.rstd), normed.rstd


def closed_form(inputs: NormInputs, norm: NormOutput) -> ClosedForm | None:
    """Describe the channels that a compact norm left out, for the linear layer; None if it left out none."""
    if norm.first is None:
        return None
    mean_rstd = None if norm.mean is None else norm.mean * norm.rstd
    return ClosedForm(mean_rstd, inputs.shift, inputs.scale, norm.first)


def fake_statistics(x: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Return a norm's mean, empty for RMSNorm, and rstd, for tracing."""
    rstd = x.new_empty(x.shape[:2], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return rstd.new_empty(0 if norm == "rms" else rstd.shape), torch.empty_like(rstd)


@_op.register_fake
def _(
    x: Tensor, shift: Any, scale: Any, weight: Tensor, bias: Any, branch: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stream = x.new_empty(0 if branch is None else x.shape)
    return stream, x.new_empty(*x.shape[:2], weight.shape[0], dtype=weight.dtype), *fake_statistics(x, rest[-1])


@_op.register_flops
def _(x: Any, shift: Any, scale: Any, weight: Any, *rest: Any) -> int:
    width = rest[-3]
    B, N, _C = x
    return 2 * B * N * width * weight[0]


@op("routed_linear_backward")
def _backward_op(
    dstream: Tensor | None,
    dout: Tensor,
    stream: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    start: Tensor | None,
    width: int,
    eps: float,
    norm: str,
    mean: Tensor,
    rstd: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of (x, shift, scale, weight, bias, branch, gate), empty for missing inputs and unneeded ones."""
    compact = choose_gemm("windows_backward", stream, start, width, weight).path == "windows"
    window = NormWindow(start, width, compact)
    again = gated_norm_forward(NormInputs(stream, shift, scale), window, Norm(eps, norm), weight.dtype)
    inputs = NormInputs(stream, shift, scale, branch, gate)
    linear = window_linear_backward(dout, again.u, closed_form(inputs, again), weight, need_weight, need_bias)
    found = gated_norm_backward(
        linear.u, dstream, linear.inactive, inputs, None if norm == "rms" else mean, rstd, window, x_is_stream=True
    )
    return linear_gradients(found.of(inputs, linear.shift, linear.scale), weight, linear.weight, linear.bias)


def linear_gradients(
    norm: NormGradients, weight: Tensor, dweight: Tensor | None, dbias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients as the outputs of an op, empty tensors for None."""
    others = ((dweight, weight), (dbias, weight), (norm.branch, norm.x), (norm.gate, norm.x))
    return norm.x, norm.shift, norm.scale, *(or_empty(*each) for each in others)  # type: ignore[return-value]


@_backward_op.register_fake
def fake_linear_gradients(
    dstream: Any,
    dout: Any,
    stream: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the shapes of the gradients of (x, shift, scale, weight, bias, branch, gate)."""
    need_weight, need_bias = rest[-2:]
    return (
        stream.new_empty(stream.shape),
        shift.new_empty(shift.shape),
        scale.new_empty(scale.shape),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
        stream.new_empty(0) if branch is None else branch.new_empty(branch.shape),
        stream.new_empty(0) if gate is None else gate.new_empty(gate.shape),
    )


@_backward_op.register_flops
def _(dstream: Any, dout: Any, *rest: Any) -> int:
    B, N, O = dout
    width, need_weight = rest[-7], rest[-2]
    return 2 * B * N * width * O * (1 + need_weight)


def register_linear_autograd(forward: Op, backward: Op) -> None:
    """Register the gradient of an op that takes x, shift, scale, weight, bias, branch, gate, a window's start and
    settings, and returns (stream, out, mean, rstd)."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, shift, scale, weight, _, branch, gate, start, *ctx.settings = inputs
        stream, out, mean, rstd = output
        ctx.outputs = out.shape[2]
        ctx.set_materialize_grads(False)
        # Save the stream instead of x: the sum is not computed again, and the next op saves the same tensor.
        ctx.save_for_backward(x if branch is None else stream, shift, scale, weight, branch, gate, start, mean, rstd)

    def gradients(ctx: Any, dstream: Tensor | None, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        *inputs, mean, rstd = ctx.saved_tensors
        stream, weight, branch = inputs[0], inputs[3], inputs[4]
        if dout is None:
            dout = stream.new_zeros(*stream.shape[:2], ctx.outputs, dtype=weight.dtype)
        needs = ctx.needs_input_grad[:7]
        dstream = None if branch is None else dstream
        found = backward(dstream, dout, *inputs, *ctx.settings, mean, rstd, *needs[3:5])
        wanted = [g if need else None for g, need in zip(found, needs, strict=True)]
        return *wanted, None, *[None] * len(ctx.settings)

    forward.register_autograd(gradients, setup_context=setup_context)
    backward.refuse_autograd()
    forward.register_autocast(casts=(3, 4))


register_linear_autograd(_op, _backward_op)


def routed_linear(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: ChannelWindow | None = None,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """Compute stream = x + gate * branch, and Linear(modulate(LN(m * stream), shift, scale)).

    The layer runs over active channels only, if that is faster. The result equals the dense layer on masked input (DTR
    paper, equation 6), because a deactivated channel leaves the norm with a value known per token; see
    ``window_linear``.

    Args:
        x: residual stream [B, N, C], fp32, bf16, fp16 or fp64.
        shift, scale: adaLN modulation [B, C], any floating dtype; rows may be strided views of one [B, 6C].
        weight, bias: of the linear layer, [O, C] and [O] (or None), in x's dtype; autocast casts them, but not x.
        window: active channels of each sample; None for all.
        branch, gate: a pending update of the stream, [B, N, C] and [B, C], or None.
        eps: added to the variance, or to the mean square.
        norm: "layer", or "rms" for RMSNorm instead of LN. For a norm with weight and bias see ``fold_affine``.

    Returns:
        stream [B, N, C] in x's dtype (x itself without a branch) and the layer's output [B, N, O] in weight's dtype.

    Raises:
        TypeError: if a tensor is not floating point, or eps not a number.
        ValueError: if shapes, dtypes, devices or the window do not fit x, eps is negative or not finite, or norm is
            unknown.
    """
    return routed_linear_by(choose(x, weight), x, shift, scale, weight, bias, window, branch, gate, Norm(eps, norm))


def routed_linear_by(
    choice: Choice,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: ChannelWindow | None,
    branch: Tensor | None,
    gate: Tensor | None,
    norm: Norm,
) -> tuple[Tensor, Tensor]:
    """Run ``routed_linear`` by a choice that was made for it or for its block."""
    check_stream(x, branch, gate, shift=shift, scale=scale)
    check_linear(x, "", weight, bias, x.shape[-1])
    check_norm(*norm)
    window = check_window(x, window)
    if choice.path == "plain":
        mask = None if window is None else window.mask()
        branch, gate, shift, scale = in_dtype_of(x, branch, gate, shift, scale)
        return reference.routed_linear(x, shift, scale, weight, bias, mask, branch, gate, *norm)
    start, width = (None, x.shape[-1]) if window is None else (window.start, window.width)
    stream, out, _, _ = _op(x, shift, scale, weight, bias, branch, gate, start, width, *norm)
    return x if branch is None else stream, out


def fold_affine(
    shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return shift and scale for a norm without affine parameters so that it equals modulate(norm(x) * weight + bias).

    They are computed and returned in fp32 at least: in 16 bits 1 + scale would lose a small weight by cancellation.

    Args:
        shift, scale: [B, C], any floating dtype. weight, bias: of the norm, [C] or None.

    Returns:
        shift and scale [B, C], in fp32 or scale's wider dtype; unchanged if there is neither weight nor bias.

    Raises:
        TypeError: if weight or bias is not floating point.
        ValueError: if one has another shape than [C].
    """
    if weight is None and bias is None:
        return shift, scale
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_floating(name, parameter)
            if parameter.shape != scale.shape[1:]:
                raise ValueError(
                    f"{name} must have shape {list(scale.shape[1:])} to fit scale {list(scale.shape)}, got "
                    f"{list(parameter.shape)}"
                )
    dtype = torch.promote_types(scale.dtype, torch.float32)
    factor, shift = 1 + scale.to(dtype), shift.to(dtype)
    return (shift if bias is None else factor * bias + shift), (factor if weight is None else factor * weight) - 1


# --- declarations ----------------------------------------------------------------------------------------------------


def _drawn(draw: Draw, routed: bool, update: bool, rms: bool) -> dict[str, Any]:
    B, N, C, _ = draw.sizes
    shift, scale, gate = draw.vectors(3)
    routing = dict(start=draw.start, width=draw.sizes.W) if routed else dict(start=None, width=C)
    pending = dict(branch=draw(B, N, C), gate=gate) if update else dict(branch=None, gate=None)
    norm = dict(eps=EPS, norm="rms" if rms else "layer")
    return dict(
        x=draw.stream(B, N, C), shift=shift, scale=scale, weight=draw.weight(3 * C, C), **routing, **pending, **norm
    )


def _plain(start: Tensor | None, width: int, **layer: Any) -> tuple[Tensor, ...]:
    mask = None if start is None else ChannelWindow(start, width, layer["x"].shape[2]).mask()
    stream, out = reference.routed_linear(**layer, mask=mask)
    return (out,) if layer["branch"] is None else (stream, out)


def _backward_inputs(draw: Draw, **mode: bool) -> dict[str, Any]:
    layer = _drawn(draw, **mode)
    x = layer.pop("x")
    inputs = widened(NormInputs(x, layer["shift"], layer["scale"]))
    norm = Norm(layer["eps"], layer["norm"])
    _, _, mean, rstd, _ = plain_norm(inputs, NormWindow(layer["start"], layer["width"]), norm, torch.float64)
    statistics = dict(mean=or_empty(mean, rstd).to(compute_dtype(x)), rstd=rstd.to(compute_dtype(x)))
    dout = draw(*x.shape[:2], len(layer["weight"]))
    needs = dict(need_weight=True, need_bias=True)
    return dict(
        dstream=None if layer["branch"] is None else draw.stream(*x.shape),
        dout=dout,
        stream=x,
        **layer,
        **statistics,
        **needs,
    )


def _of_backward(
    dstream: Tensor | None, dout: Tensor, stream: Tensor, branch: Tensor | None, gate: Tensor | None, **rest: Any
) -> tuple[Any, list[Tensor], list[Tensor | None]]:
    shift, scale, weight = (rest[name] for name in ("shift", "scale", "weight"))
    fixed: dict[str, Any] = {name: rest[name] for name in ("start", "width", "eps", "norm")}
    bias, update = weight.new_zeros(len(weight)), [t for t in (branch, gate) if t is not None]
    x = stream if branch is None or gate is None else stream - gate[:, None] * branch

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        names = ("x", "shift", "scale", "weight", "bias", "branch", "gate")
        layer: dict[str, Any] = dict(itertools.zip_longest(names, given))
        return _plain(**fixed, **layer)

    return function, [x, shift, scale, weight, bias, *update], [dstream, dout] if update else [dout]


KERNELS = [
    Kernel(
        "routed_linear",
        lambda **layer: torch.ops.dtr_kernels.routed_linear(**layer)[layer["branch"] is None : 2],
        _plain,
        lambda draw, bias, **mode: _drawn(draw, **mode) | dict(bias=draw(3 * draw.sizes.C) if bias else None),
        modes(routed=(True, False), update=(True, False), rms=(False, True), bias=(True, False)),
        timed=lambda routed, update, rms, bias: routed and update and bias and not rms,
        crossover="windows_forward",
    ),
    Kernel(
        "routed_linear_backward",
        lambda **layer: torch.ops.dtr_kernels.routed_linear_backward(**layer)[: 5 if layer["branch"] is None else 7],
        Gradient(_of_backward),
        _backward_inputs,
        modes(routed=(True, False), update=(True, False), rms=(False, True)),
        timed=lambda routed, update, rms: routed and update and not rms,
        crossover="windows_backward",
    ),
]
