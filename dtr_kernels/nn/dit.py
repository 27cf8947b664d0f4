"""DiT (Peebles & Xie, ICCV 2023) with Denoising Task Routing, loading checkpoints of both public code bases.

Parameters are named, shaped and initialised as in facebookresearch/DiT. Between blocks the last gated residual stays
open, and the next block's first norm, or the final layer's, adds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dtr_kernels import ops
from dtr_kernels.nn._torchscript import NoTorchScript
from dtr_kernels.nn.block import RoutedDiTBlock, Stream
from dtr_kernels.routing import ChannelWindow, DenoisingTaskRouting, RandomRouting

__all__ = ["DiT", "DiT_models"]


class PatchEmbed(nn.Module):
    """Cuts images [B, in_channels, H, W] into patches and embeds each: tokens [B, N, C], row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # every layer from here on reads along channels


class TimestepEmbedder(nn.Module):
    """Embeds timesteps [B], which may be fractional, as [B, C]: sinusoids of 128 frequencies and a two-layer MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        angle = t.float()[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Embeds class labels [B] as [B, C]; in training it replaces some by the null class, index num_classes."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(y.shape[0], device=y.device) < self.dropout_prob
            y = torch.where(dropped, self.num_classes, y)
        return self.embedding_table(y)


class FinalLayer(nn.Module):
    """Norm, modulation and the linear layer that turns each token into the pixels of its patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, stream: Stream, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        weight, bias, eps = self.linear.weight, self.linear.bias, self.norm_final.eps
        _, out = ops.routed_linear(
            stream.x, shift, scale, weight, bias, branch=stream.branch, gate=stream.gate, eps=eps
        )
        return out


class DiT(NoTorchScript, nn.Module):
    """Class-conditional diffusion transformer whose blocks compute only the channels that the timestep activates.

    state_dict keys and shapes are those of facebookresearch/DiT, whose checkpoints load into it. Checkpoints of the DTR
    paper's public code load too: the masks stored in them (``blocks.*.routing._unit_mapping``) are compared with those
    of ``routing``, and ``load_state_dict`` reports a difference as an error.

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
        num_classes: number of classes.
        learn_sigma: predict 2 * in_channels channels, the second half for the variance.
        routing: which channels a timestep activates; None is the ordinary DiT.
        scope: what the routing masks, see ``RoutedDiTBlock``.

    Raises:
        ValueError: if an argument does not fit the others, as said above, or scope is unknown.
        TypeError: if routing is not one of the above.
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
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size must be divisible by patch_size, got {input_size} and {patch_size}")
        if hidden_size % 4:
            raise ValueError(f"hidden_size must be divisible by 4 for the position embedding, got {hidden_size}")
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob must be between 0 and 1, got {class_dropout_prob}")
        if not isinstance(routing, DenoisingTaskRouting | RandomRouting | None):
            raise TypeError(f"routing must be DenoisingTaskRouting, RandomRouting or None, got {routing!r}")
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.hidden_size = hidden_size
        self.routing = routing

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(_position_embedding(hidden_size, input_size // patch_size), requires_grad=False)
        self.blocks = nn.ModuleList(RoutedDiTBlock(hidden_size, num_heads, mlp_ratio, scope) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
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
        """Predicts the noise (or whatever it is trained to predict).

        Args:
            x: noisy input [B, in_channels, input_size, input_size], floating point.
            t: timesteps [B]: integers, or floating point for continuous time in [0, 1]. One Python number stands for
                the whole batch, as in sampling: its window is then known without asking the device.
            y: class labels [B], integer; num_classes is the null class.

        Returns:
            [B, out_channels, input_size, input_size].

        Raises:
            ValueError: if a shape does not fit or t is outside the routing's range.
        """
        self._check_batch(x, t, y)
        times = t if isinstance(t, Tensor) else torch.full((x.shape[0],), t, device=x.device)
        c = self.t_embedder(times) + self.y_embedder(y)
        stream = Stream(self.x_embedder(x) + self.pos_embed)
        active = self._active_channels(t, times)
        for block in self.blocks:
            stream = block(stream, c, active)
        return self.unpatchify(self.final_layer(stream, c))

    def _active_channels(self, t: Tensor | int | float, times: Tensor) -> ChannelWindow | Tensor | None:
        if isinstance(self.routing, RandomRouting):
            return self.routing.mask(times, self.hidden_size)
        return None if self.routing is None else self.routing.window(t, self.hidden_size)

    def forward_with_cfg(self, x: Tensor, t: Tensor | int | float, y: Tensor, cfg_scale: float) -> Tensor:
        """Forward pass with classifier-free guidance of the first in_channels output channels.

        Args:
            x: [2B, in_channels, input_size, input_size], of which only the first half is read.
            t: as in ``forward``, [2B].
            y: [2B]: the classes, then as many null labels (num_classes).
            cfg_scale: 1 is the class-conditional prediction, more is stronger guidance.

        Returns:
            [2B, out_channels, input_size, input_size]: the guided channels are the same in both halves, the others are
            those of either pass.

        Raises:
            ValueError: as ``forward``, or if the batch is odd.
        """
        if x.shape[0] % 2:
            raise ValueError(f"x must hold an even number of samples, the second half unread, got {x.shape[0]}")
        half = x[: x.shape[0] // 2]
        out = self(torch.cat([half, half]), t, y)
        guided, rest = out[:, : self.in_channels], out[:, self.in_channels :]
        conditional, unconditional = guided.chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Images [B, out_channels, H, W] from tokens [B, N, patch_size**2 * out_channels], channels last in a patch."""
        grid, p = self.input_size // self.patch_size, self.patch_size
        return x.reshape(-1, grid, grid, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _check_batch(self, x: Tensor, t: Tensor | int | float, y: Tensor) -> None:
        expected = [self.in_channels, self.input_size, self.input_size]
        if list(x.shape[1:]) != expected:
            raise ValueError(f"x must have shape [B, {', '.join(map(str, expected))}], got {list(x.shape)}")
        B = x.shape[0]
        if isinstance(t, Tensor) and t.shape != (B,):
            raise ValueError(f"t must have shape [{B}], one timestep per sample of x, got {list(t.shape)}")
        if y.shape != (B,):
            raise ValueError(f"y must have shape [{B}], one label per sample of x, got {list(y.shape)}")


def _position_embedding(channels: int, grid: int) -> Tensor:
    """Fixed position embedding [1, grid**2, channels]: sines and cosines of the column, then of the row."""
    quarter = channels // 4
    frequency = 1 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    column, row = line.repeat(grid, 1), line.repeat_interleave(grid, dim=0)
    return torch.cat([column, row], dim=1)[None].float()


def _take_masks(model: DiT, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before loading: takes the public DTR code's masks out of state_dict, a copy, and reports those that differ."""
    *_, error_msgs = rest
    names = [f"{prefix}blocks.{i}.routing._unit_mapping" for i in range(len(model.blocks))]
    saved = {name: state_dict.pop(name).bool() for name in names if name in state_dict}
    for name, masks in saved.items():
        if not torch.equal(masks, _own_masks(model, masks)):
            error_msgs.append(
                f"{name} does not hold the masks of this model's routing={model.routing}: {_describe(masks)}"
            )
            break  # the blocks of a model share one routing


def _own_masks(model: DiT, saved: Tensor) -> Tensor:
    """The model's masks [T, C] on the device of the saved ones; without routing, all channels of as many timesteps."""
    if model.routing is None:
        return torch.ones(len(saved), model.hidden_size, dtype=torch.bool, device=saved.device)
    t = torch.arange(model.routing.num_timesteps, device=saved.device)
    if isinstance(model.routing, RandomRouting):
        return model.routing.mask(t, model.hidden_size)
    return model.routing.window(t, model.hidden_size).mask()


def _describe(masks: Tensor) -> str:
    """What saved masks [T, C] are, and the routing to construct for them."""
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
