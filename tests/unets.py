"""Small stand-ins for guided-diffusion's U-Net (ADM), with the attributes and forwards of the public one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint


class GroupNorm32(nn.GroupNorm):
    """A norm that computes in fp32, in whatever dtype the model is; unlike the public one also in fp64, for tests."""

    def forward(self, x):
        return super().forward(x if x.dtype == torch.float64 else x.float()).type(x.dtype)


class Checkpoint(torch.autograd.Function):
    """Guided-diffusion's own checkpointing: runs without a graph, and in the backward pass again on detached inputs."""

    @staticmethod
    def forward(ctx, function, num_inputs, *tensors):
        ctx.function, ctx.inputs, ctx.parameters = function, tensors[:num_inputs], tensors[num_inputs:]
        with torch.no_grad():
            return function(*ctx.inputs)

    @staticmethod
    def backward(ctx, *grads):
        inputs = [x.detach().requires_grad_() for x in ctx.inputs]
        with torch.enable_grad():
            output = ctx.function(*(x.view_as(x) for x in inputs))
        return None, None, *torch.autograd.grad(output, (*inputs, *ctx.parameters), grads, allow_unused=True)


def own_checkpoint(function, inputs, parameters, flag):
    """Runs function(*inputs), if flag is set without keeping its activations."""
    return Checkpoint.apply(function, len(inputs), *inputs, *parameters) if flag else function(*inputs)


class TimestepBlock(nn.Module):
    """A module whose forward takes the embedding of timesteps as well."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """Passes the embedding to those of its layers that take it."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Twice the height and width."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        assert x.shape[1] == self.channels
        return F.interpolate(x, scale_factor=2, mode="nearest")


class Downsample(nn.Module):
    """Half the height and width."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.op = nn.AvgPool2d(2)

    def forward(self, x):
        assert x.shape[1] == self.channels
        return self.op(x)


def zero_module(module):
    """The module with all parameters zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(TimestepBlock):
    """A residual block of guided-diffusion. ``conv`` is nn.Conv2d; other dimensions are refused by ``swap_blocks``."""

    def __init__(
        self,
        channels,
        emb_channels,
        dropout=0.0,
        out_channels=None,
        use_conv=False,
        use_scale_shift_norm=False,
        use_checkpoint=False,
        up=False,
        down=False,
        groups=8,
        conv=nn.Conv2d,
    ):
        super().__init__()
        self.channels, self.emb_channels, self.dropout = channels, emb_channels, dropout
        self.out_channels = out_channels = out_channels or channels
        self.use_conv, self.use_checkpoint, self.use_scale_shift_norm = use_conv, use_checkpoint, use_scale_shift_norm
        self.in_layers = nn.Sequential(
            GroupNorm32(groups, channels), nn.SiLU(), conv(channels, out_channels, 3, padding=1)
        )
        self.updown = up or down
        resampling = Upsample if up else Downsample if down else nn.Identity
        self.h_upd, self.x_upd = resampling(channels), resampling(channels)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, (1 + use_scale_shift_norm) * out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm32(groups, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(conv(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity()
        if out_channels != channels:
            self.skip_connection = conv(channels, out_channels, *((3, 1, 1) if use_conv else (1,)))

    def forward(self, x, emb):
        return own_checkpoint(self._forward, (x, emb), tuple(self.parameters()), self.use_checkpoint)

    def _forward(self, x, emb):
        h = self.in_layers[:-1](x)
        if self.updown:
            h, x = self.h_upd(h), self.x_upd(x)
        h = self.in_layers[-1](h)
        emb_out = self.emb_layers(emb).type(h.dtype)
        emb_out = emb_out[(...,) + (None,) * (h.dim() - 2)]
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Self-attention between the positions of an image; no routing reaches it."""

    def __init__(self, channels, num_heads=2, groups=8):
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm32(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        tokens = x.flatten(2)
        q, k, v = self.qkv(self.norm(tokens)).unflatten(1, (3, self.num_heads, -1)).mT.unbind(1)
        out = F.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2)
        return x + self.proj_out(out).view_as(x)


def open_up(block):
    """Makes random what is zero or one before training, so that every branch is open."""
    for parameter in block.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(parameter[0].item() == 1), std=0.5)
    nn.init.normal_(block.out_layers[-1].weight, std=0.1)


def timestep_embedding(timesteps):
    """Eight features of each timestep: [B, 8]."""
    return torch.cos(timesteps[:, None] * 1e-2 * torch.arange(8, device=timesteps.device))


class TwoBlocks(nn.Module):
    """A block that reads 16 channels and one that reads 24, for tests that take long."""

    def __init__(self, **options):
        super().__init__()
        self.time_embed = nn.Linear(8, 20)
        self.down = ResBlock(16, 20, out_channels=24, down=True, **options)
        self.up = ResBlock(24, 20, up=True, **options)
        open_up(self.down)
        open_up(self.up)

    def forward(self, x, timesteps):
        """Images [B, 16, H, W], timesteps [B] -> [B, 24, H, W]."""
        emb = self.time_embed(timestep_embedding(timesteps))
        return self.up(self.down(x, emb), emb)


class UNetModel(nn.Module):
    """A class-conditional U-Net of two levels, whose blocks read 16, 24, 40, 48 and 32 channels.

    ``use_torch`` checkpoints by torch.utils.checkpoint, True or False its use_reentrant; None is without.
    """

    def __init__(self, use_torch: bool | None = None, **options):
        super().__init__()
        first, second, emb_channels = 16, 24, 20
        self.use_torch = use_torch
        self.time_embed = nn.Sequential(nn.Linear(8, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels))
        self.label_emb = nn.Embedding(10, emb_channels)

        def res(channels, out_channels=None, **more):
            return ResBlock(channels, emb_channels, out_channels=out_channels, **options, **more)

        layers = TimestepEmbedSequential
        self.input_blocks = nn.ModuleList(
            [
                layers(nn.Conv2d(3, first, 3, padding=1)),
                layers(res(first)),
                layers(res(first, down=True)),
                layers(res(first, second), AttentionBlock(second)),
            ]
        )
        self.middle_block = layers(res(second), AttentionBlock(second), res(second))
        self.output_blocks = nn.ModuleList(
            [
                layers(res(second + second, second), AttentionBlock(second)),
                layers(res(second + first, second), AttentionBlock(second), res(second, up=True)),
                layers(res(second + first, first, use_conv=True)),
                layers(res(first + first, first)),
            ]
        )
        self.out = nn.Sequential(GroupNorm32(8, first), nn.SiLU(), nn.Conv2d(first, 3, 3, padding=1))
        for module in self.modules():
            if isinstance(module, ResBlock):
                open_up(module)

    def forward(self, x, timesteps, y=None):
        """Images [B, 3, H, W], timesteps [B], labels [B] -> [B, 3, H, W]."""
        emb = self.time_embed(timestep_embedding(timesteps).to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, skips = x, []
        for layers in self.input_blocks:
            h = self.run(layers, h, emb)
            skips.append(h)
        h = self.run(self.middle_block, h, emb)
        for layers in self.output_blocks:
            h = self.run(layers, torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)

    def run(self, layers: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        """The layers of one level, checkpointed or not."""
        if self.use_torch is None:
            return layers(h, emb)
        return torch_checkpoint(layers, h, emb, use_reentrant=self.use_torch)


TIMESTEPS = 50
# Channels that the blocks of ``UNetModel`` read.
WIDTHS = (16, 24, 32, 40, 48)
