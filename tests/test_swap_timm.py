"""swap_blocks on models built as facebookresearch/DiT is, from timm's own layers."""

import functools

import any_torchvision  # noqa: F401  # before timm
import pytest
import torch
from comparing import assert_as_exact, differ, results, snapshot, widened
from models import DiTBlock, SiT
from refusals import refused
from swapping import with_heads
from torch import nn

import dtr_kernels as dtr

pytest.importorskip("timm", reason="NOT RUN: needs timm; pip install '.[test]'")
from timm.layers import DropPath, SwiGLU
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed

C, HEADS, T = 32, 4, 1000
ROUTING = dtr.DenoisingTaskRouting(num_timesteps=T)

pytestmark = pytest.mark.usefixtures("one_thread", "seed")


def approx_gelu():
    return nn.GELU(approximate="tanh")


def block(attn=None, mlp=None, **options):
    """A block of facebookresearch/DiT."""
    attn = attn or Attention(C, num_heads=HEADS, qkv_bias=True, **options)
    return DiTBlock(C, HEADS, attn=attn, mlp=mlp or Mlp(C, 4 * C, act_layer=approx_gelu, drop=0))


def model(*blocks):
    return SiT(blocks or [block(), block()], C, x_embedder=PatchEmbed(8, 2, 4, C, bias=True))


def batch():
    return torch.randn(4, 4, 8, 8), torch.tensor([0, 600, 880, 999]), torch.randint(10, (4,))


def paper_masked(model, scope="block"):
    """The model with its blocks under DTR's masks, by their own modules."""
    forward = model.forward

    def masked_block(block, mask, x, c):
        if scope == "inner":
            with with_heads(mask, block.attn.proj, block.mlp.fc2):
                return block.branches(x, c)
        mask = mask[:, None].to(x.dtype)
        if scope == "block":
            return block.branches(x * mask, c) + x * (1 - mask)
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        x = x + gate1 * block.attn(block.norm1(x * mask) * (1 + scale1) + shift1)
        return x + gate2 * block.mlp(block.norm2(x * mask) * (1 + scale2) + shift2)

    def masked(x, t, y):
        mask = dtr.reference.routing_mask(t, HEADS if scope == "inner" else C, T)
        for block in model.blocks:
            block.forward = functools.partial(masked_block, block, mask)
        return forward(x, t, y)

    model.forward = masked
    return model


MODELS = {
    "as published": model,
    "unfused attention": lambda: model(unfused(block()), unfused(block())),
    "query and key norms": lambda: model(*(block(qk_norm=True, norm_layer=nn.LayerNorm) for _ in range(2))),
    "no bias": lambda: model(
        block(Attention(C, HEADS, qkv_bias=False, proj_bias=False), Mlp(C, 3 * C, act_layer=approx_gelu, bias=False))
    ),
}


def unfused(block):
    block.attn.fused_attn = False
    return block


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_without_routing_keeps_the_models_own_function(make):
    plain, inputs = make(), batch()
    expected, exact = results(plain, inputs), results(*widened(plain, inputs))
    before = snapshot(plain)
    assert_as_exact(results(dtr.swap_blocks(plain), inputs), expected, exact)
    assert snapshot(dtr.restore_blocks(plain)) == before
    torch.testing.assert_close(results(plain, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_routing_matches_the_masked_blocks(make, scope):
    plain, inputs = make(), batch()
    own = results(plain, inputs)
    wide, *batches = widened(plain, inputs)
    exact = results(paper_masked(wide, scope), *batches)
    routed = make()
    routed.load_state_dict(plain.state_dict())
    expected = results(paper_masked(plain, scope), inputs)
    assert differ(own, expected)
    assert_as_exact(results(dtr.swap_blocks(routed, ROUTING, scope), inputs), expected, exact)


REFUSED_BLOCKS = {
    "attention dropout": (lambda: block(attn_drop=0.1), "attn.attn_drop drops with probability 0.1"),
    "projection dropout": (lambda: block(proj_drop=0.1), "attn.proj_drop drops with probability 0.1"),
    "MLP dropout": (lambda: block(mlp=Mlp(C, 4 * C, act_layer=approx_gelu, drop=0.1)), "mlp.drop1 drops with"),
    "gate": (lambda: block(gated=True), "attn.gate is set"),
    "scale norm": (lambda: block(scale_norm=True, norm_layer=nn.LayerNorm), "attn.norm is not nn.Identity"),
    "MLP norm": (
        lambda: block(mlp=Mlp(C, 4 * C, act_layer=approx_gelu, norm_layer=nn.LayerNorm)),
        "mlp.norm is not nn.Identity",
    ),
    "activation": (lambda: block(mlp=Mlp(C, 4 * C)), "mlp.act is GELU(approximate='none')"),
    "convolution": (
        lambda: block(mlp=Mlp(C, 4 * C, act_layer=approx_gelu, use_conv=True)),
        "mlp.fc1 is torch.nn.modules.conv.Conv2d",
    ),
    "head size": (lambda: block(Attention(C, HEADS, attn_head_dim=16)), "attn.qkv maps 32 features to 192"),
    "SwiGLU": (lambda: block(mlp=SwiGLU(C, 4 * C)), "it has no mlp.fc1 (mlp is SwiGLU), which a DiT block has"),
    "drop path": (lambda: with_drop_path(block()), "drop_path drops with probability 0.2"),
}


def with_drop_path(block):
    block.drop_path = DropPath(0.2)
    return block


@pytest.mark.parametrize("case", REFUSED_BLOCKS)
def test_refuses_what_timm_can_do_besides(case):
    make, message = REFUSED_BLOCKS[case]
    refused(lambda: dtr.swap_blocks(model(block(), make())), ValueError, ["block 'blocks.1' (DiTBlock)", message])
