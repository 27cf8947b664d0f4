"""Residual, gate, routed norm and modulation in one kernel: ``dtr_kernels.ops.gated_norm``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import counts, sources
from benchmarks.cases import AUTOCAST, DTYPES, Benchmark, Case, Goal, Options
from benchmarks.counts import ITEMSIZES
from benchmarks.suite import _peers, _routing
from benchmarks.suite._peers import Cell, Gate
from benchmarks.suite._routing import rotated
from dtr_kernels import reference
from dtr_kernels.ops.dispatch import compute_dtype
from dtr_kernels.ops.gated_norm import NormOutput, gated_norm_backward, gated_norm_forward
from dtr_kernels.ops.window_linear import WindowsOp, contracts_windows
from dtr_kernels.routing import ChannelWindow

FUSED, BACKWARD, MASKED, LAYER_NORM = "gated_norm", "gated_norm, backward alone", "reference", "F.layer_norm of x"
EPS = 1e-6
# Forward, and where there is a backward pass.
GOALS_ON_GPU = [Goal("share of copy", name, at_least=0.9) for name in (FUSED, BACKWARD)]


class Form(NamedTuple):
    """Which norm of a block: whether it first adds a pending branch, and whether it sees that on every channel."""

    name: str
    branch: bool
    keep_branch: bool


FIRST = Form("no branch", branch=False, keep_branch=False)
AFTER_BRANCH = Form("branch", branch=True, keep_branch=False)
KEEPS_BRANCH = Form("keep_branch", branch=True, keep_branch=True)
FORMS = {"block": (FIRST, AFTER_BRANCH, KEEPS_BRANCH), "branch": (FIRST, AFTER_BRANCH)}


def cases(options: Options) -> list[Callable[[], Case]]:
    """Every norm of the scopes asked for, forward, and forward and backward."""
    cells = _routing.cells(options, "gated_norm", precisions=(*DTYPES, AUTOCAST))
    # To a norm it makes no difference which scope it is of.
    chosen = dict.fromkeys((replace(cell, scope="block"), form) for cell in cells for form in FORMS[cell.scope])
    return [partial(build, cell, form, options.device) for cell, form in chosen]


def build(cell: Cell, form: Form, device: torch.device) -> Case:
    """The forward pass, or forward and backward to the gradients of all inputs."""
    torch.compiler.reset()
    trains = cell.pass_ == "training"
    (N, C, W), items = _routing.sizes_of(cell), ITEMSIZES[cell.precision]
    sizes = cell.batch, N, C, W, items, form.branch
    # As many sets as the call needs that moves the fewest bytes.
    least = counts.norm_forward(*sizes, compact=True)
    sets = _routing.buffers(partial(_Norm.random, cell, form, device), least, device)
    norm, wide = sets[0], _routing.widened(sets[0])

    work = counts.norm_forward(*sizes, compact=norm.compact)
    layer_norm_work = counts.layer_norm_forward(cell.batch, N, C, items.stream)
    backward_work = counts.norm_backward(*sizes, compact=norm.compact_gradient, dstream=form.branch)
    if trains:
        work += backward_work
        layer_norm_work += counts.layer_norm_backward(cell.batch, N, C, items.stream)

    exact, eager = wide.plain(masked), norm.plain(masked)
    on_all_channels = Gate(exact, eager, cell.precision)
    as_fused = Gate(norm.as_fused(exact), norm.as_fused(eager), cell.precision)
    of_layer_norm = Gate(wide.layer_norm(), norm.layer_norm(), cell.precision)

    peers = {MASKED: masked, **_routing.compilations(MASKED, masked, device)}
    sides = [
        *(rotated(name, partial(_Norm.plain, function=f), sets, on_all_channels, work) for name, f in peers.items()),
        rotated(LAYER_NORM, _Norm.layer_norm, sets, of_layer_norm, layer_norm_work),
        rotated(FUSED, _Norm.fused, sets, as_fused, work),
    ]
    if trains:
        gradients = slice(-len(norm.leaves), None)
        of_gradients = Gate(norm.as_fused(exact)[gradients], norm.as_fused(eager)[gradients], cell.precision)
        sides.append(rotated(BACKWARD, _Norm.backward_alone, sets, of_gradients, backward_work))

    notes = [f"{LAYER_NORM}: another function, of all channels and without residual, gate and modulation"]
    if norm.window is not None and not norm.keep_branch:
        chosen = {"u": norm.compact} | ({"the gradient of u": norm.compact_gradient} if trains else {})
        notes += [_channels_of(tensor, compact) for tensor, compact in chosen.items()]
    notes.append(_routing.how_called(cell, device))
    if trains:
        notes.insert(0, "training: the forward pass, and the backward pass from given gradients of the outputs")
        if norm.compact_gradient:
            notes.append(
                f"{FUSED} is given what deactivated channels add to the gradients of each token, computed outside the "
                "clock, and leaves out what they add to those of shift and scale: in the library the linear layer "
                f"behind the norm computes both; {MASKED} computes both itself"
            )
    what = f"{form.name}, {cell.pass_}"
    return Case(
        _routing.name_of(what, cell),
        sides,
        _routing.coordinates(what, cell),
        speedup_over=MASKED,
        goals=GOALS_ON_GPU[: 1 + trains] if device.type == "cuda" else (),
        notes=notes,
    )


def _channels_of(tensor: str, compact: bool) -> str:
    which, layer = ("active", "contracts over windows") if compact else ("all", "is a dense GEMM")
    return (
        f"{tensor} has {which} channels, as in the library's op, whose linear layer {layer} at this size and dtype here"
    )


def masked(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    keep_branch: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """The reference: the stream (with a branch), and u in the dtype of the matrix product that reads it."""
    stream, u = reference.routed_norm(x, branch, gate, shift, scale, mask, keep_branch, EPS)
    return (u.to(dtype),) if branch is None else (stream, u.to(dtype))


@dataclass(frozen=True)
class _Norm:
    """Inputs of a norm, and ways to compute it.

    Every way returns its outputs and, if there is a backward pass, the gradients of ``leaves``.

    Attributes:
        window: None when unrouted. mask: the same as plain PyTorch takes it, in x's dtype.
        keep_branch: False when unrouted.
        du, dstream: gradients of u on all channels and of the stream [B, N, C]; None without a backward pass.
    """

    window: ChannelWindow | None
    keep_branch: bool
    mask: Tensor | None
    x: Tensor
    branch: Tensor | None
    gate: Tensor | None
    shift: Tensor
    scale: Tensor
    du: Tensor | None
    dstream: Tensor | None

    @classmethod
    def random(cls, cell: Cell, form: Form, device: torch.device) -> _Norm:
        N, C, _ = _routing.sizes_of(cell)
        trains = cell.pass_ == "training"

        def draw(dtype: torch.dtype) -> Tensor:
            return torch.randn(cell.batch, N, C, device=device).to(dtype)

        shift, scale, gate, *_ = _routing.modulation(cell, device)
        window = _routing.window_of(cell, device)
        norm = cls(
            window,
            form.keep_branch and window is not None,
            None if window is None else window.mask().to(cell.dtype),
            _peers.tokens(cell.batch, N, C, device).to(cell.dtype),
            draw(cell.matrix_dtype) if form.branch else None,
            gate if form.branch else None,
            shift,
            scale,
            draw(cell.matrix_dtype) if trains else None,
            draw(cell.dtype) if trains and form.branch else None,
        )
        for leaf in norm.leaves:
            leaf.requires_grad_(trains)
        return norm

    @property
    def leaves(self) -> list[Tensor]:
        """What has a gradient."""
        return _given(self.x, self.branch, self.gate, self.shift, self.scale)

    @cached_property
    def compact(self) -> bool:
        """Whether our u has active channels only."""
        return self._contracts_windows("windows_forward")

    @cached_property
    def compact_gradient(self) -> bool:
        """Whether the gradient of u that ours is given has."""
        return self._contracts_windows("windows_backward")

    def _contracts_windows(self, op: WindowsOp) -> bool:
        """Whether the library's QKV layer behind this norm does, which reads u, or writes its gradient."""
        C = self.x.shape[-1]
        return not self.keep_branch and contracts_windows(
            op, self.x, self.start, self.width, self.shift.new_empty(3 * C, C)
        )

    def plain(self, function: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        """By ``masked`` or a compilation of it."""
        inputs = (self.x, self.branch, self.gate, self.shift, self.scale, self.mask)
        outputs = function(*inputs, self.keep_branch, self.shift.dtype)
        if self.du is None:
            return list(outputs)
        gradients = torch.autograd.grad(outputs, self.leaves, _given(self.dstream, self.du))
        return [*(out.detach() for out in outputs), *gradients]

    def as_fused(self, plain: Sequence[Tensor]) -> list[Tensor]:
        """Of what ``plain`` returns that which ``fused`` does: where u or its gradient has active channels only, u on
        these, or what these add to the gradients of shift and scale. The linear layer knows what the others add."""
        found = list(plain)
        if self.compact:
            u = 0 if self.branch is None else 1
            found[u] = _routing.in_window(found[u], self.window)
        if self.du is not None and self.window is not None and self.compact_gradient:
            found[-2:] = (gradient * self.window.mask() for gradient in found[-2:])
        return found

    def layer_norm(self) -> list[Tensor]:
        """F.layer_norm of x and its gradient alone."""
        out = F.layer_norm(self.x, self.x.shape[-1:], eps=EPS)
        if self.du is None:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, self.x, self.du.to(out.dtype))]

    def fused(self) -> list[Tensor]:
        """By our kernels."""
        forward = self._forward()
        return _given(forward.stream, forward.u) + ([] if self.du is None else self._backward(forward))

    def backward_alone(self) -> list[Tensor]:
        """The gradients, from what a forward pass has left."""
        return self._backward(self._saved)

    @cached_property
    def _saved(self) -> NormOutput:
        return self._forward()

    @torch.no_grad()
    def _forward(self) -> NormOutput:
        _routing.require_kernels(self.x)
        return gated_norm_forward(
            self.x,
            self.branch,
            self.gate,
            self.shift,
            self.scale,
            self.start,
            self.width,
            eps=EPS,
            dtype=self.shift.dtype,
            compact=self.compact,
            keep_branch=self.keep_branch,
        )

    @torch.no_grad()
    def _backward(self, forward: NormOutput) -> list[Tensor]:
        # The library hands over the sum where there is one, except where the mask is on x alone.
        stream = None if self.keep_branch else forward.stream
        return _given(
            *gated_norm_backward(
                self._du_of_next_layer,
                self.dstream,
                self._inactive,
                self.x if stream is None else stream,
                self.branch,
                self.gate,
                self.scale,
                forward.mean,
                forward.rstd,
                self.start,
                self.width,
                compact=self.compact_gradient,
                keep_branch=self.keep_branch,
                x_is_stream=stream is not None,
            )
        )

    @property
    def start(self) -> Tensor | None:
        """The first active channel of each sample; None when unrouted."""
        return None if self.window is None else self.window.start

    @property
    def width(self) -> int:
        """How many channels are active."""
        return self.x.shape[-1] if self.window is None else self.window.width

    @cached_property
    def _du_of_next_layer(self) -> Tensor:
        assert self.du is not None
        return _routing.in_window(self.du, self.window if self.compact_gradient else None)

    @cached_property
    @torch.no_grad()
    def _inactive(self) -> Tensor | None:
        """Of each token the sum over deactivated channels of the gradient of the norm's output."""
        if self.window is None or self.du is None or not self.compact_gradient:
            return None
        factor = (1 + self.scale.double()) * ~self.window.mask()
        return (self.du.double() * factor[:, None]).sum(-1).to(compute_dtype(self.x))


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


BENCHMARK = Benchmark(
    "gated_norm",
    "Residual, gate, routed norm and modulation: our kernel, the reference eager and compiled, F.layer_norm.",
    cases,
    sources=sources.BLOCKS,
)
