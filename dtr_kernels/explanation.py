"""Report which ops run in each block of a model, and why not faster ones: ``dtr_kernels.explain``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dtr_kernels.nn import RoutedDiTBlock, RoutedResBlock
from dtr_kernels.nn.block import Stream
from dtr_kernels.ops.dispatch import Choice, choices
from dtr_kernels.quoting import quoted
from dtr_kernels.routing import ChannelWindow
from dtr_kernels.swap.classes import block_input
from dtr_kernels.swap.core import is_block, is_compiled
from dtr_kernels.swap.registry import family_of
from dtr_kernels.swap.trial import swap_problem

__all__ = ["BlockReport", "Explanation", "explain"]


@dataclass
class BlockReport:
    """The ops that ran in one block.

    Attributes:
        name: of the block in its model.
        kind: its class, before a swap.
        routing: the channels it saw, in words.
        input: shape, dtype and device of its input, in words; None if the batch did not reach it.
        ops: the fused ops that ran, each with its path and why no faster path was taken; empty if plain PyTorch ran.
        why_plain: why plain PyTorch ran, and what to do about it; None if fused ops ran.
    """

    name: str
    kind: str
    routing: str = "unrouted"
    input: str | None = None
    ops: dict[str, str] = field(default_factory=dict)
    why_plain: str | None = None


@dataclass
class Explanation:
    """The result of ``explain``; ``str`` gives readable text, ``as_dict`` the same for JSON.

    Attributes:
        blocks: one report for each block, in the model's order.
    """

    blocks: list[BlockReport]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as dicts, lists and strings."""
        return asdict(self)

    def __str__(self) -> str:
        fused = sum(bool(report.ops) for report in self.blocks)
        lines = [f"{fused} of {len(self.blocks)} blocks run fused ops"]
        for names, report in _alike(self.blocks):
            lines += [
                "",
                f"{names} ({report.kind}): {report.routing}" + (f", x {report.input}" if report.input else ""),
            ]
            lines += [f"  {op:16} {path}" for op, path in report.ops.items()]
            lines += [f"  plain PyTorch    {report.why_plain}"] if report.why_plain else []
        return "\n".join(lines)


def _alike(blocks: Sequence[BlockReport]) -> Iterator[tuple[str, BlockReport]]:
    """Group neighbours that differ only in their names under one name."""
    groups: list[list[BlockReport]] = []
    for report in blocks:
        same = groups and asdict(report) | {"name": ""} == asdict(groups[-1][-1]) | {"name": ""}
        groups[-1 if same else len(groups) :] = [[*groups[-1], report]] if same else [[report]]
    for group in groups:
        first, last = group[0].name or "the model itself", group[-1].name
        yield (first if len(group) == 1 else f"{first} to {last}, {len(group)} blocks"), group[0]


def explain(model: nn.Module, batch: Tensor | Sequence[Any] | Mapping[str, Any]) -> Explanation:
    """Report which kernels run in each block of a model for a batch, and why not faster ones.

    The batch runs once through the model, without gradients and in the model's own mode; random number generators and
    buffers are restored. Fused ops are watched while they run; if a block runs more than once, the last call counts.
    For a block that could be swapped and is not, the report says what prevents it. Blocks are those of
    ``swap_blocks``, swapped or not, ``RoutedDiTBlock`` and ``RoutedResBlock``.

    Args:
        model: any module that is not compiled, since a compiled model does not run its blocks one by one.
        batch: the arguments of its forward: a tuple or list, a dict of keywords, or one tensor.

    Returns:
        ``Explanation``; print it to read it.

    Raises:
        TypeError: if batch is something else.
        ValueError: if the model has no such block or is compiled.
    """
    arguments, keywords = _arguments(batch)
    blocks = {name: module for name, module in model.named_modules() if _is_known(module)}
    if not blocks:
        raise ValueError(f"this {type(model).__name__} has no block that could be fused; see dtr_kernels.swap_blocks")
    for name, module in model.named_modules():
        if is_compiled(module):
            raise ValueError(f"{name or 'the model'} is compiled; explain the model before torch.compile")

    watch = _Watch()
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"})
    with ExitStack() as stack:
        for name, block in blocks.items():
            stack.enter_context(watch.block(name, block))
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_kept([buffer for buffer in model.buffers() if not buffer.is_meta]))
        watch.choices = stack.enter_context(choices())
        stack.enter_context(watch)
        model(*arguments, **keywords)
    return Explanation([watch.reports[name] for name in blocks])


@contextmanager
def _kept(buffers: list[Tensor]) -> Iterator[None]:
    """Restore buffers on exit, such as the statistics that BatchNorm keeps in training."""
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, old in zip(buffers, before, strict=True):
            if not torch.equal(buffer, old):
                buffer.copy_(old)


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return tuple(batch), {}
    raise TypeError(f"batch must hold the arguments of the model's forward, as a tuple or a dict, got {quoted(batch)}")


def _is_known(module: nn.Module) -> bool:
    return _is_ours(module) or family_of(module) is not None


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, RoutedDiTBlock | RoutedResBlock)


class _Watch(TorchDispatchMode):
    """Records which of our ops run in which block, and the choices made there."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: dict[str, BlockReport] = {}
        self.choices: list[Choice] = []
        # Each block with the number of choices made before it.
        self._running: list[tuple[BlockReport, int]] = []

    @contextmanager
    def block(self, name: str, block: Any) -> Iterator[None]:
        """Watch a block while the context is open."""
        report = self.reports[name] = BlockReport(
            name, type(block).__name__, why_plain="the batch did not reach this block"
        )

        def enter(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self._running.append((report, len(self.choices)))
            _describe(report, block, arguments, keywords)

        def leave(*_: Any) -> None:
            made = self.choices[self._running.pop()[1] :]
            if report.why_plain is None and made:
                _explain(report, made[0])
            if not report.ops and report.why_plain is None:
                report.why_plain = "its forward was replaced, and called no fused op"

        # Otherwise a DiT would pass tensors to the watched block, which would then run other kernels.
        enter.takes_streams = leave.takes_streams = True  # type: ignore[attr-defined]
        handles = [
            block.register_forward_pre_hook(enter, with_kwargs=True),
            block.register_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function.namespace == "dtr_kernels" and self._running:
            op = function._schema.name.split("::")[1]
            before, (report, _) = len(self.choices), self._running[-1]
            output = function(*args, **(kwargs or {}))
            report.ops[op] = _in_the_op(self.choices, before)
            return output
        return function(*args, **(kwargs or {}))


def _describe(report: BlockReport, block: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Fill in what is known before a block runs."""
    if is_block(block):
        x, c = block_input(block, arguments, keywords)
        window = block._dtr.window(block, block._dtr.family.marker(c))
    else:
        named = inspect.signature(block.forward).bind(*arguments, **keywords).arguments
        x = next(iter(named.values()))
        window = named.get("window") if _is_ours(block) else None
    x = x.x if isinstance(x, Stream) else x
    report.input = f"{list(x.shape)} in {str(x.dtype).removeprefix('torch.')} on {x.device}"
    scope = block._dtr.model.scope if is_block(block) else getattr(block, "scope", "")
    what = "heads" if scope == "inner" else "channels"
    report.routing = _in_words(window, what) if _is_ours(block) or is_block(block) else "as the model has it"
    report.ops = {}
    report.why_plain = _known_before(block, x, window)


def _in_words(window: ChannelWindow | Tensor | None, what: str) -> str:
    if window is None:
        return "unrouted"
    if isinstance(window, Tensor):
        return f"a mask that is no window, of {window.shape[1]} {what}"
    if window.shared_start is not None:
        return f"{what} {window.shared_start} to {window.shared_start + window.width - 1} of {window.channels}"
    return f"{window.width} of {window.channels} {what}, a window per sample"


def _known_before(block: Any, x: Tensor, window: ChannelWindow | Tensor | None) -> str | None:
    """Return why plain PyTorch is about to compute a block, if that is known before it runs."""
    if not _is_ours(block) and not is_block(block):
        family = family_of(block)
        assert family is not None
        problem = swap_problem(block, family)
        return f"it is not swapped: {problem}" if problem else "it is not swapped; call dtr_kernels.swap_blocks(model)"
    if isinstance(window, Tensor):
        return "masks that are no windows (RandomRouting) skip nothing"
    return None


def _explain(report: BlockReport, choice: Choice) -> None:
    """Fill in the first choice made in a block, which holds for the whole block."""
    if choice.path == "plain":
        report.why_plain = choice.why
    elif choice.path == "dense":
        report.why_plain = f"its first convolution is dense: {choice.why}"
    elif choice.path == "touched":
        report.ops["routed_conv"] = choice.why


def _in_the_op(choices: Sequence[Choice], before: int) -> str:
    """Return the choice of kernels for an op, and the choices made inside the op, from number ``before`` on."""
    kernels = next(choice.why for choice in reversed(choices) if choice.path in ("triton", "cpu"))
    inside = choices[before:]
    # A GEMM with an epilogue replaces the one that was chosen without.
    if inside and inside[-1].path == "epilogue":
        inside = inside[-1:]
    return "; ".join([kernels, *(choice.why for choice in inside)])
