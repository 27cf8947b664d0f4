"""Models that the benchmarks train."""

from __future__ import annotations

import torch
from torch import Tensor

import dtr_kernels as dtr

TINY = "tiny"


def make_dit(name: str, device: torch.device, dtype: torch.dtype) -> dtr.nn.DiT:
    """A DiT of the published sizes for latents of 32 x 32 (images of 256 x 256), or "tiny".

    Training starts with closed gates and a last layer of zeros, where most gradients are zero; here all weights are
    random. Labels are never dropped, so that everyone who trains the model on a batch computes the same.
    """
    if name == TINY:
        model = dtr.nn.DiT(input_size=16, hidden_size=128, depth=2, num_heads=4, class_dropout_prob=0)
    else:
        model = dtr.nn.DiT_models[name](input_size=32, class_dropout_prob=0)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.02)
    return model.to(device, dtype)


def plain_forward(model: dtr.nn.DiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """An unrouted DiT in plain PyTorch, by calls of its layers."""
    c = model.t_embedder(t) + model.y_embedder(y)
    tokens = model.x_embedder(x) + model.pos_embed
    for block in model.blocks:
        tokens = dtr.reference.dit_block(block, tokens, c)
    final = model.final_layer
    shift, scale = final.adaLN_modulation(c).chunk(2, dim=1)
    normed = dtr.reference.layer_norm(tokens, final.norm_final.eps)
    return model.unpatchify(final.linear(dtr.reference.modulate(normed, shift, scale)))
