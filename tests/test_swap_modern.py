"""swap_blocks on blocks of LightningDiT and JiT: RMSNorm, rotary embeddings, query and key norms, SwiGLU."""

import copy
import functools
import pickle
import sys

import pytest
import torch
from comparing import assert_same, differ, snapshot
from models import (
    DIM,
    HEADS,
    TIMESTEPS,
    DiT,
    JiTBlock,
    LightningDiTBlock,
    Mlp,
    RMSNorm,
    RotaryAttention,
    SeparateSwiGLU,
    SwiGLUFFN,
    change,
    lightning_dit,
)
from swapping import ROUTING, paper_mask
from torch import nn

import dtr_kernels as dtr
from dtr_kernels.swap.registry import family_of

pytestmark = pytest.mark.usefixtures("one_thread", "seed")
MODELS = {
    "LightningDiT": lightning_dit,
    "without RMSNorm": functools.partial(lightning_dit, rms=False),
    "without SwiGLU": functools.partial(lightning_dit, mlp=Mlp, qk_norm=False),
    "w1 and w3": functools.partial(lightning_dit, mlp=SeparateSwiGLU),
    "JiT": functools.partial(lightning_dit, JiTBlock),
}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def batch():
    return torch.randn(4, 3, 8, 8), torch.tensor([0, 25, 40, TIMESTEPS - 1]), torch.arange(4)


def results(model, inputs):
    """The output, and the gradient of every parameter."""
    model.zero_grad()
    out = model(*inputs)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def oracle(model, scope):
    """A copy whose blocks are the reference, under the masks of the paper."""
    model = copy.deepcopy(model)
    forward = model.forward

    def routed(x, t, y):
        for block in model.blocks:
            layers = family_of(block).layers(block)
            mask = paper_mask(t, HEADS if scope == "inner" else DIM)
            block.forward = lambda x, c, rope, layers=layers, mask=mask: dtr.reference.dit_block(
                layers, x, c, mask, scope, rope
            )
        return forward(x, t, y)

    model.forward = routed
    return model


@models
def test_keeps_the_models_own_function_and_keys(make):
    model, inputs = make(), batch()
    before, keys = results(model, inputs), list(model.state_dict())
    untouched = snapshot(model)
    dtr.swap_blocks(model)
    assert_same(results(model, inputs), before)
    assert list(model.state_dict()) == keys
    dtr.restore_blocks(model)
    assert snapshot(model) == untouched


@models
@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
def test_a_routing_matches_the_reference(make, scope):
    model, inputs = make(), batch()
    plain, expected = results(model, inputs), results(oracle(model, scope), inputs)
    assert differ(plain, expected)
    assert_same(results(dtr.swap_blocks(model, ROUTING, scope), inputs), expected)


@pytest.mark.parametrize("kind", [LightningDiTBlock, JiTBlock])
def test_scope_block_is_the_block_on_masked_input(kind):
    """Written out: the block itself on m * x, and what the mask hides added."""
    block, rope = lightning_dit(kind).blocks[0], lightning_dit().rope
    x, c, mask = torch.randn(3, 16, DIM), torch.randn(3, DIM), paper_mask(torch.tensor([0, 30, 49]), DIM)[:, None]
    expected = block(x * mask, c, rope) + x * (1 - mask)
    layers = family_of(block).layers(block)
    assert_same([dtr.reference.dit_block(layers, x, c, mask[:, 0], "block", rope)], [expected])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_copies_and_pickles(reentrant):
    model, inputs = lightning_dit(reentrant=reentrant), batch()
    expected = results(oracle(model, "branch"), inputs)
    dtr.swap_blocks(model, ROUTING, "branch")
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(results(each, inputs), expected)


@pytest.mark.parametrize("part", ["norm1", "norm2"])
@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("plain", [False, True])
def test_a_norm_that_loses_its_weight_after_the_swap(monkeypatch, part, kind, plain):
    """The other keeps its own."""
    if plain:
        monkeypatch.setattr("dtr_kernels.ops.dispatch.LEAST_ELEMENTS_ON_CPU", sys.maxsize)
    model, inputs = lightning_dit(), batch()
    for block in model.blocks:
        block.norm1, block.norm2 = (kind(DIM, eps=1e-6) for _ in range(2))
        nn.init.normal_(block.norm1.weight), nn.init.normal_(block.norm2.weight)
    swapped = dtr.swap_blocks(copy.deepcopy(model))
    for each in (model, swapped):
        each.blocks[1].get_submodule(part).weight = None
    assert_same(results(swapped, inputs), results(model, inputs))


@pytest.mark.parametrize("width", [1, 5, 7])
def test_heads_of_odd_width(width):
    model, inputs = DiT([LightningDiTBlock(HEADS * width, HEADS)], HEADS * width), batch()
    before = results(model, inputs)
    # A head of one channel is normalised to its sign: gradients are what nearly cancels.
    assert_same(results(dtr.swap_blocks(model), inputs), before, rtol=2e-3)


class UnweightedRMSNorm(RMSNorm):
    def forward(self, x):
        return super().forward(x) / self.weight


def exchanged(kind, one, other):
    """A class of which each of two parts does what the other should."""

    class Exchanged(kind):
        @functools.wraps(kind.forward)
        def forward(self, *args, **kwargs):
            twin = copy.copy(self)
            twin.__dict__["_modules"] = {**self._modules, one: self._modules[other], other: self._modules[one]}
            return kind.forward(twin, *args, **kwargs)

    return Exchanged


def test_hidden_channels_that_heads_do_not_divide():
    """Which the layers of a gated MLP have other names for than those of a DiT."""
    model = lightning_dit()
    model.blocks[1].mlp = SwiGLUFFN(DIM, 43)
    with pytest.raises(ValueError, match=r"'blocks.1' .*, but those of its MLP are 43 of them for 4 heads"):
        dtr.swap_blocks(model, ROUTING, "inner")


class OwnRope(LightningDiTBlock):
    def forward(self, x, c, feat_rope=None):
        return super().forward(x, c, feat_rope or torch.tanh)


class NeedsRope(RotaryAttention):
    def forward(self, x, rope=None):
        return super().forward(x, lambda q: rope(q))


def test_without_a_rope():
    """A block with one of its own is refused, one that cannot do without is not."""
    model, inputs = lightning_dit(), batch()
    model.blocks[1].attn.__class__ = NeedsRope
    before = results(model, inputs)
    assert_same(results(dtr.swap_blocks(model), inputs), before)
    dtr.restore_blocks(model).blocks[1].__class__ = OwnRope
    model.blocks[1].attn.__class__ = RotaryAttention
    with pytest.raises(ValueError, match="without feat_rope its forward computes something else"):
        dtr.swap_blocks(model)


@pytest.mark.parametrize(
    "part, kind",
    [
        ("norm1", UnweightedRMSNorm),
        ("", exchanged(LightningDiTBlock, "norm1", "norm2")),
        ("attn", exchanged(RotaryAttention, "q_norm", "k_norm")),
    ],
    ids=["unweighted", "norms", "norms of queries and keys"],
)
def test_what_shows_after_training_alone_is_refused(part, kind):
    """Weights of fresh norms are ones."""
    model = lightning_dit()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
    model.blocks[1].get_submodule(part).__class__ = kind
    with pytest.raises(ValueError, match=r"cannot swap block 'blocks.1' .*computes something else than"):
        dtr.swap_blocks(model)


REFUSED = {
    "dropout": (lambda: change("mlp.ffn_dropout.p", 0.1), "mlp.ffn_dropout drops with probability 0.1"),
    "two kinds of norms": (lambda: change("norm2", nn.LayerNorm(DIM)), "norm2 is LayerNorm; the fused norms are"),
    "no eps": (lambda: change("norm2", nn.RMSNorm(DIM)), "norm2 has no number eps"),
    "one bias of two": (
        lambda: lambda block: [change("mlp", SeparateSwiGLU(DIM, 64))(block), change("mlp.w3.bias", None)(block)],
        "some of mlp.w1, mlp.w3 have a bias and some not; give all one",
    ),
    "another size": (lambda: change("norm1.weight", nn.Parameter(torch.ones(1))), r"norm1 has a weight of shape \[1\]"),
}


@pytest.mark.parametrize(("alter", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(alter, message):
    model = lightning_dit()
    alter()(model.blocks[1])
    with pytest.raises(ValueError, match=rf"cannot swap block 'blocks.1' \(LightningDiTBlock\): .*{message}"):
        dtr.swap_blocks(model)
