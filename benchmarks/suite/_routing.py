"""What the benchmarks of single routed ops share: their grid, windows, inputs on buffers of their own, and notes.

The launchers are called as the registered ops call them, with autograd and its dispatch left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, WINDOWS, Options, Side
from benchmarks.counts import Work
from benchmarks.suite import _peers
from benchmarks.suite._models import TINY
from benchmarks.suite._peers import AUTOTUNED, COMPILED, SEED, Axes, Cell, Gate
from benchmarks.timing import copies
from dtr_kernels import reference
from dtr_kernels.ops import dispatch, extension, window_linear
from dtr_kernels.ops.window_linear import WindowsOp
from dtr_kernels.routing import ChannelWindow

PASSES = ("forward", "training")

_SIZE: dict[str, Axes] = {
    "quick": {"model": (TINY,), "batch": (2,)},
    "cpu": {"model": ("DiT-S/2", "DiT-XL/2"), "batch": (4,)},
    "cuda": {"model": ("DiT-S/2", "DiT-XL/2"), "batch": (32,)},
}
_PRECISION = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}

Inputs = TypeVar("Inputs")


def cells(
    options: Options,
    what: str,
    windows: Sequence[str] = WINDOWS[:1],
    precisions: Sequence[str] = tuple(DTYPES),
) -> list[Cell]:
    """The cells of an op's benchmark: what the options ask for, and the default grid where they do not.

    Args:
        what: the op, for errors.
        windows: measured by default.
        precisions: in which the op exists.

    Raises:
        ValueError: if an option does not fit the op.
    """
    _check(options.precisions, "--dtype", precisions, what)
    _check(options.passes, "--pass", PASSES, what)
    _check(options.windows, "--window", WINDOWS, what)
    _check(options.scopes, "--scope", reference.SCOPES, what)
    centre: Axes = {
        **_SIZE["quick" if options.quick else options.device.type],
        "precision": _PRECISION[options.device.type],
        "scope": reference.SCOPES,
        "window": windows,
        "beta": (0.8,),
        "pass_": PASSES,
    }
    return unique(_peers.grid(options, centre, star=()))


def unique(chosen: Iterable[Cell]) -> list[Cell]:
    """Each once: where all channels are active, every window is the same."""
    return list(dict.fromkeys(replace(cell, window=WINDOWS[0]) if cell.beta == 1 else cell for cell in chosen))


def _check(asked: Sequence[str], argument: str, allowed: Sequence[str], what: str) -> None:
    for value in asked:
        if value not in allowed:
            raise ValueError(f"{argument} must be one of {', '.join(allowed)} for {what}, got {value}")


def name_of(what: str, cell: Cell) -> str:
    """A case's name."""
    window = f", window {cell.window}, beta {cell.beta:g}" if cell.beta < 1 else ", unrouted"
    return f"{what}, {cell.model}, batch {cell.batch}, {cell.precision}{window}"


def coordinates(what: str, cell: Cell) -> dict[str, str | int | float]:
    """Where a case stands; scope and pass are part of ``what``, as far as the op knows them."""
    known = {name: value for name, value in cell.coordinates.items() if name not in ("scope", "pass")}
    return {"what": what, **known}


def sizes_of(cell: Cell) -> tuple[int, int, int]:
    """(N, C, W) of the cell's model."""
    _, N, C = _peers.blueprint(cell.model).pos_embed.shape
    return N, C, cell.routing.window(0, C).width


def window_of(cell: Cell, device: torch.device) -> ChannelWindow | None:
    """A start for each sample of the batch; None where all channels are active."""
    _, C, _ = sizes_of(cell)
    t = _peers.timesteps(cell, device)
    # Tensors on "cuda" are on "cuda:0", which compares unequal.
    window = cell.routing.window(t, C).for_batch(cell.batch, torch.as_tensor(t, device=device).device)
    return None if window.width == C else window


def modulation(cell: Cell, device: torch.device) -> Sequence[Tensor]:
    """Six vectors [B, C], as adaLN gives them: strided views of one tensor [B, 6C]."""
    _, C, _ = sizes_of(cell)
    return (0.5 * torch.randn(cell.batch, 6 * C, device=device)).to(cell.matrix_dtype).chunk(6, dim=1)


def in_window(dense: Tensor, window: ChannelWindow | None) -> Tensor:
    """The active channels [B, N, W] of dense [B, N, C], in rows as our kernels pass them on."""
    if window is None:
        return dense
    B, N, _ = dense.shape
    index = window.start[:, None].long() + torch.arange(window.width, device=dense.device)
    rows = dispatch.empty_rows(B, N, window.width, like=dense, dtype=dense.dtype)
    return rows.copy_(dense.gather(2, index[:, None].expand(-1, N, -1)))


def buffers(make: Callable[[], Inputs], work: Work, device: torch.device) -> list[Inputs]:
    """As many sets of inputs as a call of that much work needs for a rotation; the same ones every time."""
    torch.manual_seed(SEED)
    return [make() for _ in range(copies(device, work.bytes))]


def rotated(name: str, call: Callable[[Inputs], Any], sets: Sequence[Inputs], gate: Gate, work: Work) -> Side:
    """A side that calls ``call`` on each set of inputs in turn; ``gate`` is for the first."""
    first, *others = (partial(call, inputs) for inputs in sets)
    return Side(name, first, gate.error, gate.bound, work=work, rotation=others)


def compilations(name: str, function: Callable[..., Any], device: torch.device) -> dict[str, Callable[..., Any]]:
    """A function compiled in each mode that is worth it on the device, by the name of its side."""
    found = {name + COMPILED: _peers.compiled(function)}
    if device.type == "cuda":
        found[name + AUTOTUNED] = _peers.compiled(function, _peers.MAX_AUTOTUNE)
    return found


def widened(inputs: Inputs) -> Inputs:
    """A dataclass with its floating-point tensors in fp64."""
    values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}  # type: ignore[arg-type]
    wide = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    return replace(inputs, **wide)  # type: ignore[type-var]


def require_kernels(x: Tensor) -> None:
    """Raises NotImplementedError where no kernel can run on x."""
    if dispatch.kernel_path(x) == "plain":
        raise NotImplementedError(extension.unavailable or f"there are no kernels for {x.dtype} on {x.device}")


def how_called(cell: Cell, device: torch.device) -> str:
    """In which way our side differs from what the library does in a model, in words."""
    called = "our launchers are called as the library's ops call them, without autograd"
    if device.type != "cpu":
        return called
    N, C, _ = sizes_of(cell)
    here, least = cell.batch * N * C, dispatch.LEAST_ELEMENTS_ON_CPU
    runs = "as it does here" if here >= least else "and so runs plain PyTorch at this size"
    return f"{called}; on a CPU the library calls them from {least} elements [B, N, C] on, {runs} ({here} elements)"


@dataclass(frozen=True)
class Linear:
    """A linear layer behind a routed norm, with its input.

    Attributes:
        window: None when unrouted.
        u: [B, N, W]. mean_rstd: [B, N], None when unrouted. shift, scale: [B, C]. weight: [O, C]. bias: [O].
        g: gradient of the output [B, N, O].
    """

    window: ChannelWindow | None
    u: Tensor
    mean_rstd: Tensor | None
    shift: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    g: Tensor

    @classmethod
    def random(cls, cell: Cell, outputs: int, device: torch.device) -> Linear:
        """Of that many outputs."""
        (N, C, W), B = sizes_of(cell), cell.batch
        window = window_of(cell, device)
        shift, scale, *_ = modulation(cell, device)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(cell.dtype)

        u = draw(B, N, W)
        return cls(
            window,
            dispatch.empty_rows(B, N, W, like=u, dtype=u.dtype).copy_(u),
            None if window is None else 0.5 * torch.randn(B, N, device=device),
            shift,
            scale,
            C**-0.5 * draw(outputs, C),
            draw(outputs),
            draw(B, N, outputs),
        )

    @property
    def start(self) -> Tensor | None:
        """The first active channel of each sample."""
        return None if self.window is None else self.window.start

    @property
    def shared_start(self) -> int | None:
        """The first active channel of all samples, where the host knows it."""
        return None if self.window is None else self.window.shared_start

    @cached_property
    def dense(self) -> Tensor:
        """The layer's input on all channels [B, N, C], as a masked model has it."""
        return dense_input(self.u, self.mean_rstd, self.shift, self.scale, self.window)

    @cached_property
    def one_slice(self) -> Tensor:
        """As many of its channels as are active, the same for all samples, and rounded up to a multiple of 8, with
        which cuBLAS is fast: [B N, W or a few more]."""
        return self.dense.flatten(0, 1)[:, : -(-self.u.shape[-1] // 8) * 8].contiguous()

    def multiplied_by(self) -> str:
        """What our launcher calls, in words."""
        if self.start is None:
            return "PyTorch's products on all channels"
        return "products with slices of the weight" if self.u.device.type == "cpu" else "our GEMM"

    def in_the_library(self, op: WindowsOp) -> str:
        """What the library does for a pass of the layer, where our side contracts over windows, in words."""
        if self.start is None:
            return "every channel is active: the library's op calls the same"
        if window_linear.contracts_windows(op, self.dense, self.start, self.u.shape[-1], self.weight):
            return "our side contracts over windows, as the library's op does at this size and dtype here"
        return "our side contracts over windows, where the library's op runs a dense GEMM at this size and dtype here"


def dense_input(
    u: Tensor, mean_rstd: Tensor | None, shift: Tensor, scale: Tensor, window: ChannelWindow | None
) -> Tensor:
    """modulate(LN(m * x)) [B, N, C] from what is known of it: u in the window, modulated -mean * rstd elsewhere."""
    if window is None or mean_rstd is None:
        return u
    _, N, W = u.shape
    offset = torch.arange(window.channels, device=u.device) - window.start[:, None]
    spread = u.gather(2, offset.clamp(0, W - 1)[:, None].expand(-1, N, -1))
    elsewhere = reference.modulate(-mean_rstd.to(u.dtype)[..., None], shift, scale)
    return torch.where(window.mask()[:, None], spread, elsewhere)
