"""The routed DiT block, written once for our own module and for swapped blocks of other models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from dtr_kernels import ops, reference
from dtr_kernels.nn.parts import ReadParts, is_plain_linear
from dtr_kernels.nn.torchscript import NoTorchScript
from dtr_kernels.ops.activations import parts_of
from dtr_kernels.ops.band_linear import among_all
from dtr_kernels.ops.checks import check_block, check_heads, check_one_of, check_shape, check_window
from dtr_kernels.ops.dispatch import Choice, choose
from dtr_kernels.ops.gated_norm import Norm
from dtr_kernels.ops.inner import inner_linear_by, inner_mlp_by, inner_projection_by
from dtr_kernels.ops.linear import fold_affine, routed_linear_by
from dtr_kernels.ops.mlp import routed_mlp_by
from dtr_kernels.ops.window_linear import Band
from dtr_kernels.reference.transformer import BlockKind, Rope
from dtr_kernels.routing import ChannelWindow, check_count, check_number

__all__ = ["BlockKind", "RoutedDiTBlock", "Stream", "advance", "check_hidden", "check_scope"]


class Stream(NamedTuple):
    """The residual stream between blocks, x + gate * branch, with the sum left to its next reader.

    A block ends with a gated residual and the next begins with a norm of the sum; leaving the sum open lets one
    kernel do both. ``branch`` and ``gate`` are None when nothing is pending.
    """

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None

    def sum(self) -> Tensor:
        """Return the residual stream as one tensor [B, N, C]."""
        if self.branch is None or self.gate is None:
            return self.x
        return ops.gated_residual(self.x, self.branch, self.gate)


def check_scope(scope: str) -> None:
    """Raise ValueError unless scope is "block", "branch" or "inner"."""
    check_one_of("scope", scope, reference.SCOPES)


def _attend(attn: Any, qkv: Tensor, heads: int, rope: Rope | None) -> Tensor:
    """Compute self-attention [B, N, heads * d] on views of qkv [B, N, 3 * heads * d], without a copy."""
    B, N, width = qkv.shape
    # Unbind before swapping heads and tokens: the backward pass then stacks the gradients in qkv's own layout.
    q, k, v = (x.transpose(1, 2) for x in qkv.view(B, N, 3, heads, width // 3 // heads).unbind(2))
    q, k = reference.queries_and_keys(attn, q, k, rope)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, width // 3)


def weights_of(block: Any) -> list[Tensor]:
    """Return the weights that the kernels read, of a block as ``advance`` takes it."""
    layers = (block.attn.qkv, block.mlp.fc1, block.mlp.fc2)
    return [part.weight for layer in layers for part in getattr(layer, "layers", (layer,))]  # q, k, v may be three


def advance(
    block: Any, stream: Stream, c: Tensor, window: ChannelWindow | None, scope: str, rope: Rope | None = None
) -> Stream:
    """Run one routed DiT block (DTR paper, equation 6), its last gated residual left pending in the returned stream.

    Args:
        block: any module with the attributes of facebookresearch/DiT's block: norm1, attn.qkv, attn.proj,
            attn.num_heads, norm2, mlp.fc1, mlp.fc2, adaLN_modulation; and kind, if it has another ``BlockKind``.
        stream: the residual stream, its tensors [B, N, C].
        c: conditioning [B, C].
        window: active channels of each sample, in scope "inner" active heads; None runs the unrouted block.
        scope: "block", "branch" or "inner".
        rope: rotary position embedding, a function of queries or keys [B, heads, N, d].
    """
    if scope == "inner":
        return _advance_inner(block, stream, c, window, rope)
    choice = choose(stream.x, *weights_of(block))
    # A plain block as a whole takes fewer passes than its ops one by one.
    if choice.path == "plain":
        window = check_window(stream.x, window)
        mask = None if window is None else window.mask()
        return Stream(reference.dit_block(block, stream.sum(), c, mask, scope, rope))
    return _advance(choice, block, stream, c, window, scope == "block", rope)


class _Steps(NamedTuple):
    """Inputs of a block's two fused steps besides x, its update and its window: modulation that includes the norms'
    affine parameters, kinds of the norms, gates, the activation and the MLP's parameters."""

    modulation1: tuple[Tensor, Tensor]
    norm1: Norm
    gate1: Tensor
    modulation2: tuple[Tensor, Tensor]
    norm2: Norm
    gate2: Tensor
    activation: str
    mlp: tuple[Tensor, Tensor | None, Tensor, Tensor | None]

    @classmethod
    def of(cls, block: Any, c: Tensor) -> _Steps:
        kind: BlockKind = getattr(block, "kind", BlockKind())
        s1, k1, g1, s2, k2, g2 = block.adaLN_modulation(c).chunk(6, dim=1)

        def folded(shift: Tensor, scale: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
            return fold_affine(shift, scale, getattr(norm, "weight", None), getattr(norm, "bias", None))

        norm1, norm2, fc1, fc2 = block.norm1, block.norm2, block.mlp.fc1, block.mlp.fc2
        first = folded(s1, k1, norm1), Norm(norm1.eps, kind.norm), g1
        second = folded(s2, k2, norm2), Norm(norm2.eps, kind.norm), g2
        return cls(*first, *second, kind.activation, (fc1.weight, fc1.bias, fc2.weight, fc2.bias))


def _advance(
    choice: Choice,
    block: Any,
    stream: Stream,
    c: Tensor,
    window: ChannelWindow | None,
    keep_branch: bool,
    rope: Rope | None,
) -> Stream:
    """Run the fused block of the scopes that mask what the branches read.

    Scope "block" masks the stream that entered the block: the attention's output stays visible on every channel.
    """
    steps, attn = _Steps.of(block, c), block.attn
    x, branch, gate = stream
    layer = attn.qkv.weight, attn.qkv.bias
    x, qkv = routed_linear_by(choice, x, *steps.modulation1, *layer, window, branch, gate, steps.norm1)
    branch = attn.proj(_attend(attn, qkv, attn.num_heads, rope))
    x, hidden = routed_mlp_by(
        choice,
        x,
        *steps.modulation2,
        steps.mlp,
        branch,
        steps.gate1,
        window,
        keep_branch,
        steps.norm2,
        steps.activation,
    )
    return Stream(x, hidden, steps.gate2)


def _advance_inner(block: Any, stream: Stream, c: Tensor, window: ChannelWindow | None, rope: Rope | None) -> Stream:
    """Run a block in scope "inner": each sample uses its active heads and the hidden channels that go with them."""
    choice = choose(stream.x, *weights_of(block))
    attn = block.attn
    if window is not None:
        window = check_heads(stream.x, window, attn.num_heads)
        window = None if window.width == window.channels else window
    if choice.path == "plain":
        mask = None if window is None else window.mask().to(stream.x.device)
        return Stream(reference.dit_block(block, stream.sum(), c, mask, "inner", rope))
    if window is None:
        return _advance(choice, block, stream, c, None, False, rope)
    steps = _Steps.of(block, c)
    x, branch, gate = stream
    layer = attn.qkv.weight, attn.qkv.bias
    x, qkv = inner_linear_by(choice, x, *steps.modulation1, *layer, window, branch, gate, 3, steps.norm1)
    z = _attend(attn, qkv, window.width, rope)
    if is_plain_linear(attn.proj):
        branch = inner_projection_by(choice, z, attn.proj.weight, attn.proj.bias, window)
    else:  # an adapter, or a layer with hooks, is called and sees zeros for inactive heads
        d = z.shape[2] // window.width
        branch = attn.proj(among_all(z, Band(window.start, z.shape[2], d), d * attn.num_heads))
    x, hidden = inner_mlp_by(
        choice, x, *steps.modulation2, steps.mlp, branch, steps.gate1, window, steps.norm2, steps.activation
    )
    return Stream(x, hidden, steps.gate2)


def check_hidden(hidden: int, heads: int, which: str) -> None:
    """Raise ValueError unless the hidden channels of an MLP divide evenly among the heads."""
    if hidden % heads:
        raise ValueError(
            f'in scope "inner" as many hidden channels go with each head, but {which} are {hidden} of them for {heads} '
            f"heads; use a multiple of {heads}"
        )


class Attention(nn.Module):
    """Parameters of multi-head self-attention, named as in timm."""

    def __init__(self, dim: int, num_heads: int, qk_norm: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"hidden_size must be divisible by num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        if qk_norm is not None:
            self.q_norm, self.k_norm = qk_norm(dim // num_heads), qk_norm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)


class Mlp(nn.Module):
    """Parameters of a two-layer perceptron, named as in timm."""

    def __init__(self, dim: int, hidden: int, activation: str = "gelu_tanh") -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, parts_of(activation) * hidden)
        self.fc2 = nn.Linear(hidden, dim)


_NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class RoutedDiTBlock(NoTorchScript, nn.Module):
    """A DiT block (adaLN-Zero) that sees only the active channels of each sample.

    state_dict keys are those of facebookresearch/DiT's block; another ``kind`` adds the norms' parameters.

    Args:
        hidden_size: number of channels C.
        num_heads: attention heads; must divide C.
        mlp_ratio: hidden width of the MLP over C.
        scope: "block" (the DTR paper): the whole residual block is routed; the attention skips deactivated channels,
            and the MLP sees the attention's output on every channel. "branch": attention and MLP both skip. "inner"
            (this library's own, not in the paper): a window over heads chooses the heads and hidden channels of the
            MLP that are computed at all, so that everything in the block shrinks with their share.
        kind: norms, activation and whether queries and keys are normed, see ``BlockKind``.

    Raises:
        TypeError: if an argument is not a number of its kind, or kind is no ``BlockKind``, or its affine or qk_norm is
            neither True nor False.
        ValueError: if scope or a part of kind is unknown, a size is less than 1, num_heads does not divide hidden_size
            (in scope "inner" also the MLP's hidden channels), or mlp_ratio leaves the MLP no channel.
    """

    _read: ClassVar = {
        (norm, affine): ReadParts(
            {
                "norm1": kind,
                "attn": Attention,
                "attn.qkv": nn.Linear,
                "norm2": kind,
                "mlp": Mlp,
                "mlp.fc1": nn.Linear,
                "mlp.fc2": nn.Linear,
            },
            affine,
        )
        for norm, kind in _NORMS.items()
        for affine in (False, True)
    }

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        scope: str = "block",
        kind: BlockKind = BlockKind(),  # noqa: B008  # immutable
    ) -> None:
        super().__init__()
        check_scope(scope)
        if not isinstance(kind, BlockKind):
            raise TypeError(f"kind must be a BlockKind, got {kind!r}")
        for name, flag in (("affine", kind.affine), ("qk_norm", kind.qk_norm)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, got {flag!r}")
        check_one_of("norm", kind.norm, reference.NORMS)
        check_one_of("activation", kind.activation, reference.ACTIVATIONS)
        hidden_size, num_heads = check_count("hidden_size", hidden_size), check_count("num_heads", num_heads)
        mlp_width = int(hidden_size * check_number("mlp_ratio", mlp_ratio))
        if mlp_width < 1:
            raise ValueError(f"mlp_ratio must be at least 1 / hidden_size = 1/{hidden_size}, got {mlp_ratio}")
        if scope == "inner":
            check_hidden(mlp_width, num_heads, f"mlp_ratio {mlp_ratio} of {hidden_size} channels")
        self.scope, self.kind = scope, kind
        norm = partial(_NORMS[kind.norm], eps=1e-6)
        self.norm1 = norm(hidden_size, elementwise_affine=kind.affine)
        self.attn = Attention(hidden_size, num_heads, norm if kind.qk_norm else None)
        self.norm2 = norm(hidden_size, elementwise_affine=kind.affine)
        self.mlp = Mlp(hidden_size, mlp_width, kind.activation)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    @property
    def routed_channels(self) -> int:
        """The number of channels that a routing of this block chooses from: C, in scope "inner" its attention heads."""
        return self.attn.num_heads if self.scope == "inner" else self.attn.qkv.in_features

    def forward(
        self,
        x: Tensor | Stream,
        c: Tensor,
        window: ChannelWindow | Tensor | None = None,
        rope: Rope | None = None,
    ) -> Tensor | Stream:
        """Run the block.

        Args:
            x: residual stream [B, N, C], floating point. Between the blocks of a ``DiT`` without hooks it is the
                ``Stream`` that the block before returned; the kernel of this block's first norm then adds its pending
                update.
            c: conditioning [B, C].
            window: ``DenoisingTaskRouting.window(t, C)``, in scope "inner" ``window(t, num_heads)``, for which t may be
                on the CPU when x is on a GPU; or a bool mask [B, C] or [B, num_heads], which runs the plain PyTorch
                path (random routing); or None, the unrouted block.
            rope: rotary position embedding, a function of queries or keys [B, heads, N, d] (active heads alone in scope
                "inner"); or None.

        Returns:
            [B, N, C] in x's dtype; a ``Stream`` for a ``Stream``.

        Raises:
            ValueError: if shapes, devices or the window do not fit x, or rope returns something else than such queries
                or keys.
            TypeError: if x is not floating point, or rope no function.
            RuntimeError: if a part that is not called, ``attn.qkv`` for one, was wrapped, patched or given hooks.
        """
        self._read[self.kind.norm, self.kind.affine].refuse_changes(self)
        stream = x if isinstance(x, Stream) else Stream(x)
        check_block(stream.x, c, self.attn.qkv.in_features)
        if isinstance(window, Tensor):
            check_shape("window, a mask,", window, (len(c), self.routed_channels), stream.x)
            out = Stream(reference.dit_block(self, stream.sum(), c, window, self.scope, rope))
        else:
            out = advance(self, stream, c, window, self.scope, rope)
        return out if isinstance(x, Stream) else out.sum()
