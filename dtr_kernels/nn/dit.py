"""DiT (Peebles & Xie, ICCV 2023) with Denoising Task Routing, loading checkpoints of both public code bases.

Parameters are named, shaped and initialised as in facebookresearch/DiT. Between blocks the last gated residual stays
pending, and the next block's first norm, or the final layer's, adds it. A block with hooks, or wrapped in another
module, takes and returns tensors instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dtr_kernels import ops
from dtr_kernels.nn.block import RoutedDiTBlock, Stream
from dtr_kernels.nn.parts import ReadParts
from dtr_kernels.nn.torchscript import NoTorchScript
from dtr_kernels.ops.checks import check_floating
from dtr_kernels.ops.registration import op
from dtr_kernels.reference.transformer import BlockKind, Rope
from dtr_kernels.routing import (
    ChannelWindow,
    DenoisingTaskRouting,
    RandomRouting,
    check_count,
    check_number,
    check_range,
    check_timesteps,
    window_width,
)

__all__ = ["DiT", "DiT_models"]


class PatchEmbed(nn.Module):
    """Cuts images [B, in_channels, H, W] into patches and embeds each patch: tokens [B, N, C], row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # later layers read along channels


class TimestepEmbedder(nn.Module):
    """Embeds timesteps [B], which may be fractional, as [B, C]: sinusoids of 128 frequencies and a two-layer MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        angle = t.float()[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(next(self.mlp.parameters()).dtype))


# A separate op, so that the range check (a data-dependent branch on a CPU) does not break a torch.compile graph.
@op("checked_labels")
def _checked_labels(y: Tensor, rows: int) -> Tensor:
    """Return a copy of the labels as int64: an op's output must not share memory with its input."""
    check_range(y, rows - 1, "labels are class indices, and num_classes one with class_dropout_prob > 0 alone", "y")
    return y.to(torch.int64, copy=True)


@_checked_labels.register_fake
def _(y: Tensor, rows: int) -> Tensor:
    return torch.empty_like(y, dtype=torch.int64)


class LabelEmbedder(nn.Module):
    """Embeds class labels [B] as [B, C]; in training, replaces some by the null class, index num_classes."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        y = _checked_labels(y, self.embedding_table.num_embeddings)
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(y.shape[0], device=y.device) < self.dropout_prob
            y = torch.where(dropped, self.num_classes, y)
        return self.embedding_table(y)


class FinalLayer(nn.Module):
    """Norm, modulation and the linear layer that turns each token into the pixels of its patch."""

    _read = ReadParts({"norm_final": nn.LayerNorm, "linear": nn.Linear})

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor | Stream, c: Tensor) -> Tensor:
        self._read.refuse_changes(self)
        stream = x if isinstance(x, Stream) else Stream(x)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        weight, bias, eps = self.linear.weight, self.linear.bias, self.norm_final.eps
        _, out = ops.routed_linear(
            stream.x, shift, scale, weight, bias, branch=stream.branch, gate=stream.gate, eps=eps
        )
        return out


_OURS = (RoutedDiTBlock.forward, FinalLayer.forward)


def _takes_streams(module: nn.Module) -> bool:
    """Return whether a module is one of ours, unchanged, with no hook or patch that would see a ``Stream``.

    Hooks that accept a ``Stream`` have an attribute ``takes_streams``.
    """
    if type(module).forward not in _OURS or "forward" in module.__dict__ or _has_any_global_hook():
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return not (module._backward_hooks or module._backward_pre_hooks) and all(
        hasattr(hook, "takes_streams") for hook in hooks
    )


class DiT(NoTorchScript, nn.Module):
    """Class-conditional diffusion transformer whose blocks compute only the channels that the timestep activates.

    state_dict keys and shapes are those of facebookresearch/DiT, whose checkpoints load into it. Checkpoints of the DTR
    paper's public code load too: ``load_state_dict`` compares the masks stored in them
    (``blocks.*.routing._unit_mapping``) with the masks of ``routing``, and reports a difference as an error.

    Args:
        input_size: height and width of the input, divisible by patch_size.
        patch_size: height and width of a patch; there are (input_size / patch_size)**2 tokens.
        in_channels: channels of the input.
        hidden_size: channels C of the residual stream, divisible by num_heads and by 4.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over C.
        class_dropout_prob: how often training replaces a label by the null class (index num_classes), for guidance.
            At 0 there is no null class.
        num_classes: number of classes; 0 leaves the null class alone, which needs class_dropout_prob above 0.
        learn_sigma: predict 2 * in_channels channels, the second half for the variance.
        routing: the routing that selects the active channels of a timestep; None is the ordinary DiT.
        scope: what the routing masks, see ``RoutedDiTBlock``.
        kind: of the blocks, see ``BlockKind``; the final layer's norm is always LayerNorm without affine parameters.
        rope: rotary position embedding of the blocks, a function of queries or keys [B, heads, N, d], or None.

    Raises:
        ValueError: if a size is less than 1, an argument does not fit the others as described, scope is unknown, or
            in scope "inner" the routing leaves no head active.
        TypeError: if a size is not an integer, a ratio not a number, or routing not a routing.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        *,
        routing: DenoisingTaskRouting | RandomRouting | None = None,
        scope: str = "block",
        kind: BlockKind = BlockKind(),  # noqa: B008  # immutable
        rope: Rope | None = None,
    ) -> None:
        super().__init__()
        sizes = {"input_size": input_size, "patch_size": patch_size, "in_channels": in_channels, "depth": depth}
        input_size, patch_size, in_channels, depth = (check_count(*size) for size in sizes.items())
        hidden_size = check_count("hidden_size", hidden_size)
        if input_size % patch_size:
            raise ValueError(f"input_size must be divisible by patch_size, got {input_size} and {patch_size}")
        if hidden_size % 4:
            raise ValueError(f"hidden_size must be divisible by 4 for the position embedding, got {hidden_size}")
        if not 0 <= check_number("class_dropout_prob", class_dropout_prob) <= 1:
            raise ValueError(f"class_dropout_prob must be between 0 and 1, got {class_dropout_prob}")
        # With the null class alone, the model is unconditional.
        num_classes = check_count("num_classes", num_classes, least=0 if class_dropout_prob > 0 else 1)
        if not isinstance(routing, DenoisingTaskRouting | RandomRouting | None):
            raise TypeError(f"routing must be DenoisingTaskRouting, RandomRouting or None, got {routing!r}")
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.hidden_size = hidden_size
        self.routing = routing
        self.scope = scope
        self.rope = rope
        #: Number of channels, in scope "inner" attention heads, that a routing chooses from.
        self.routed_channels = num_heads if scope == "inner" else hidden_size

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(_position_embedding(hidden_size, input_size // patch_size), requires_grad=False)
        self.blocks = nn.ModuleList(
            RoutedDiTBlock(hidden_size, num_heads, mlp_ratio, scope, kind) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        if routing is not None and scope == "inner":
            window_width(routing.beta, num_heads, "attention heads")
        self._initialize()
        self.register_load_state_dict_pre_hook(_take_masks)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        proj: Any = self.x_embedder.proj
        nn.init.xavier_uniform_(proj.weight.flatten(1))  # a linear layer, written as a convolution
        nn.init.zeros_(proj.bias)
        embeddings: list[Any] = [self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]]
        for module in embeddings:
            nn.init.normal_(module.weight, std=0.02)
        # adaLN-Zero: every block begins as the identity, and the model predicts zero.
        zeroed: list[Any] = [module.adaLN_modulation[1] for module in (*self.blocks, self.final_layer)]
        for module in [*zeroed, self.final_layer.linear]:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor | int | float, y: Tensor) -> Tensor:
        """Predict the noise, or another training target.

        Args:
            x: noisy input [B, in_channels, input_size, input_size], floating point.
            t: timesteps [B]: integers; or floating point for continuous time in [0, 1], or for timestep numbers if the
                routing has ``float_timesteps``. One Python or NumPy number stands for the whole batch, as in sampling;
                its window is then known without asking the device. In scope "inner" a tensor on the CPU, with x on a
                GPU, is faster, since the host then knows the windows.
            y: class labels [B], integer; num_classes is the null class.

        Returns:
            [B, out_channels, input_size, input_size].

        Raises:
            TypeError: if x, t or y has another type or dtype.
            ValueError: if a shape or device does not fit, t is outside the routing's range or y is not a class. On a
                GPU values are checked by device-side assertions.
        """
        self._check_batch(x, t, y)
        times = t.to(x.device) if isinstance(t, Tensor) else torch.full((x.shape[0],), t, device=x.device)
        c = self.t_embedder(times) + self.y_embedder(y)
        stream = Stream(self.x_embedder(x) + self.pos_embed)
        active = self._active_channels(t, times)
        given = (c, active) if self.rope is None else (c, active, self.rope)
        for block in self.blocks:
            stream = block(stream, *given) if _takes_streams(block) else Stream(block(stream.sum(), *given))
        return self.unpatchify(self.final_layer(stream if _takes_streams(self.final_layer) else stream.sum(), c))

    def _active_channels(self, t: Tensor | int | float, times: Tensor) -> ChannelWindow | Tensor | None:
        if isinstance(self.routing, RandomRouting):
            return self.routing.mask(times, self.routed_channels)
        return None if self.routing is None else self.routing.window(t, self.routed_channels)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor | int | float, y: Tensor, cfg_scale: float, guided_channels: int | None = None
    ) -> Tensor:
        """Run the forward pass with classifier-free guidance.

        Args:
            x: [2B, in_channels, input_size, input_size]; only the first half is read.
            t: as in ``forward``, [2B].
            y: [2B]: B classes, then B null labels (num_classes).
            cfg_scale: 1 is the class-conditional prediction, more is stronger guidance.
            guided_channels: how many of the first output channels are guided; None for in_channels.
                facebookresearch/DiT guides 3 of its 4, as for its published samples.

        Returns:
            [2B, out_channels, input_size, input_size]: the guided channels are the same in both halves, the others come
            from the conditional and the unconditional pass.

        Raises:
            TypeError: as ``forward``, or if guided_channels is not an integer.
            ValueError: as ``forward``, or if the batch is odd or guided_channels is not in 1..out_channels.
        """
        if x.shape[0] % 2:
            raise ValueError(f"x must hold an even number of samples, the second half unread, got {x.shape[0]}")
        half = x[: x.shape[0] // 2]
        out = self(torch.cat([half, half]), t, y)
        return torch.cat(guide(out, cfg_scale, self.in_channels if guided_channels is None else guided_channels))

    def unpatchify(self, x: Tensor) -> Tensor:
        """Turn tokens [B, N, patch_size**2 * out_channels], channels last in a patch, into [B, out_channels, H, W]."""
        grid, p = self.input_size // self.patch_size, self.patch_size
        return x.reshape(-1, grid, grid, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _check_batch(self, x: Tensor, t: Tensor | int | float, y: Tensor) -> None:
        check_floating("x", x, "; convert it with x.float()")
        expected = [self.in_channels, self.input_size, self.input_size]
        if list(x.shape[1:]) != expected:
            raise ValueError(f"x must have shape [B, {', '.join(map(str, expected))}], got {list(x.shape)}")
        B = x.shape[0]
        if isinstance(t, Tensor) and t.shape != (B,):
            raise ValueError(f"t must have shape [{B}], one timestep per sample of x, got {list(t.shape)}")
        check_timesteps(t)
        if not isinstance(t, Tensor | Integral) and not math.isfinite(t):
            raise ValueError(f"t must be finite, got {t}")
        if not isinstance(y, Tensor) or y.dtype == torch.bool or y.is_floating_point() or y.is_complex():
            given = getattr(y, "dtype", type(y).__name__)
            raise TypeError(f"y must be an integer tensor [{B}] of class labels, got {given}")
        if y.shape != (B,):
            raise ValueError(f"y must have shape [{B}], one label per sample of x, got {list(y.shape)}")
        for name, tensor in (("t", t), ("y", y)):
            if isinstance(tensor, Tensor) and tensor.device != x.device:
                if name == "t" and self.scope == "inner" and tensor.device.type == "cpu":
                    continue
                raise ValueError(f"{name} must be on {x.device}, as x is, got it on {tensor.device}; move it there")


def guide(out: Tensor, scale: float, channels: int) -> tuple[Tensor, Tensor]:
    """Return both halves of a prediction [2B, C, ...] with their first ``channels`` channels guided.

    The first half is the conditional prediction and the second the unconditional one. In the guided channels both
    halves become unconditional + scale * (conditional - unconditional).
    """
    channels = check_count("guided_channels", channels)
    if channels > out.shape[1]:
        raise ValueError(f"guided_channels must be at most the {out.shape[1]} channels of the output, got {channels}")
    wanted, other = out.chunk(2)
    guided = other[:, :channels] + scale * (wanted[:, :channels] - other[:, :channels])
    return torch.cat([guided, wanted[:, channels:]], dim=1), torch.cat([guided, other[:, channels:]], dim=1)


def _position_embedding(channels: int, grid: int) -> Tensor:
    """Return a fixed position embedding [1, grid**2, channels]: sines and cosines of the column, then of the row."""
    quarter = channels // 4
    frequency = 1 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    column, row = line.repeat(grid, 1), line.repeat_interleave(grid, dim=0)
    return torch.cat([column, row], dim=1)[None].float()


def _take_masks(model: DiT, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Remove the public DTR code's masks from state_dict, a copy, before loading, and report those that differ."""
    *_, error_msgs = rest
    names = [f"{prefix}blocks.{i}.routing._unit_mapping" for i in range(len(model.blocks))]
    saved = {name: state_dict.pop(name).bool() for name in names if name in state_dict}
    if saved and model.scope == "inner":
        error_msgs.append(f'{names[0]} is a mask of channels, which scope "inner" has not: it routes heads')
        return
    for name, masks in saved.items():
        if not torch.equal(masks, _own_masks(model, masks)):
            error_msgs.append(
                f"{name} does not hold the masks of this model's routing={model.routing}: {_describe(masks)}"
            )
            break  # the blocks of a model share one routing


def _own_masks(model: DiT, saved: Tensor) -> Tensor:
    """Return the model's masks [T, C] on the device of the saved ones; without routing, all channels."""
    if model.routing is None:
        return torch.ones(len(saved), model.hidden_size, dtype=torch.bool, device=saved.device)
    t = torch.arange(model.routing.num_timesteps, device=saved.device)
    if isinstance(model.routing, RandomRouting):
        return model.routing.mask(t, model.hidden_size)
    return model.routing.window(t, model.hidden_size).mask()


def _describe(masks: Tensor) -> str:
    """Describe saved masks [T, C], and the routing to construct for them."""
    T, C = masks.shape
    width, start = int(masks[0].sum()), masks.int().argmax(dim=1)
    offset = torch.arange(C, device=masks.device) - start[:, None]
    if not torch.equal(masks, (offset >= 0) & (offset < width)):
        return f"it holds channels of {T} timesteps that are not windows, and no routing here reproduces them"
    roundings = (round((width + 0.5) / C, digits) for digits in range(1, 17))
    beta = next(beta for beta in roundings if int(beta * C) == width)
    return (
        f"it holds windows of {width} of {C} channels at {T} timesteps; construct the model with "
        f"routing=DenoisingTaskRouting(num_timesteps={T}, alpha=..., beta={beta}), alpha as trained (public code: 4)"
    )


_SIZES: dict[str, dict[str, Any]] = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}

#: The published sizes by name, "DiT-S/2" to "DiT-XL/8"; each takes the other arguments of ``DiT`` as keywords.
DiT_models: dict[str, Callable[..., DiT]] = {
    f"DiT-{name}/{patch_size}": partial(DiT, patch_size=patch_size, **size)
    for name, size in _SIZES.items()
    for patch_size in (2, 4, 8)
}
