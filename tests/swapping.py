"""Shared by tests of swapped DiTs and U-Nets: the oracle, which runs the reference in place of their blocks."""

from __future__ import annotations

import copy
import functools
from contextlib import contextmanager

import pytest
import torch
from comparing import snapshot
from models import TIMESTEPS, DiTBlock
from unets import ResBlock

import dtr_kernels as dtr

ROUTING = dtr.DenoisingTaskRouting(num_timesteps=TIMESTEPS)
RANDOM = dtr.RandomRouting(num_timesteps=TIMESTEPS)


def blocks_of(model):
    """The blocks that are routed."""
    return [module for module in model.modules() if isinstance(module, DiTBlock | ResBlock)]


def paper_mask(t, channels):
    """DTR's masks [B, C]."""
    return dtr.reference.routing_mask(t, channels, TIMESTEPS)


def oracle(model, mask_of, scope="block"):
    """A copy of the model whose blocks are dtr.reference's, with the mask that mask_of makes of timesteps and C."""
    model = copy.deepcopy(model)
    forward = model.forward

    def routed(x, t, y):
        for block in blocks_of(model):
            if isinstance(block, ResBlock):
                mask = mask_of(t, block.channels)
                block._forward = functools.partial(dtr.reference.res_block, block, mask=mask)
            else:
                mask = mask_of(t, block.attn.num_heads if scope == "inner" else block.attn.qkv.in_features)
                block.forward = functools.partial(dtr.reference.dit_block, block, mask=mask, scope=scope)
        return forward(x, t, y)

    model.forward = routed
    return model


@contextmanager
def with_heads(mask, *layers):
    """Inside, the linear layers read zeros where the heads of mask [B, H] are inactive."""

    def hide(layer, inputs):
        (x,) = inputs
        return x * mask.repeat_interleave(x.shape[2] // mask.shape[1], 1)[:, None].to(x.dtype)

    hooks = [layer.register_forward_pre_hook(hide) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def masked(model, mask_of):
    """A copy of a model of DiT blocks, which run on masked inputs and pass on what the mask [B, C] of t hides."""
    model = copy.deepcopy(model)
    forward = model.forward

    def masked_block(block, mask, x, c):
        return block.branches(x * mask, c) + x * (1 - mask)

    def routed(x, t, y):
        mask = mask_of(t)[:, None].to(x.dtype)
        for block in model.blocks:
            block.forward = functools.partial(masked_block, block, mask)
        return forward(x, t, y)

    model.forward = routed
    return model


def assert_block_is_refused(model, name, message, snapshot=snapshot):
    """By its name and class, and nothing has changed then."""
    before, kind = snapshot(model), type(model.get_submodule(name)).__name__
    with pytest.raises(ValueError, match=rf"cannot swap block '{name}' \({kind}\): .*{message}"):
        dtr.swap_blocks(model, ROUTING)
    assert snapshot(model) == before
    assert torch.is_grad_enabled()
