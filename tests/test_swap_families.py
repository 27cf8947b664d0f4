"""Families that users add: what is enough, what may be said besides, and what is refused."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_as_exact, results, snapshot, widened
from refusals import refused
from torch import nn

import dtr_kernels as dtr
from dtr_kernels.swap import registry

C, HEADS, T = 32, 4, 50
ROUTING = dtr.DenoisingTaskRouting(num_timesteps=T)

pytestmark = pytest.mark.usefixtures("one_thread", "seed")


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(C, C, bias=False) for _ in range(3))
        self.out = nn.Linear(C, C)

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.queries, self.keys, self.values)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A DiT block that calls everything by other names."""

    def __init__(self):
        super().__init__()
        self.ln1 = nn.LayerNorm(C, elementwise_affine=False, eps=1e-5)
        self.self_attn = SelfAttention()
        self.ln2 = nn.LayerNorm(C, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(C, 3 * C), nn.GELU(approximate="tanh"), nn.Linear(3 * C, C))
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))

    def forward(self, tokens, cond):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(cond)[:, None].chunk(6, dim=2)
        tokens = tokens + gate1 * self.self_attn(self.ln1(tokens) * (1 + scale1) + shift1)
        return tokens + gate2 * self.ffn(self.ln2(tokens) * (1 + scale2) + shift2)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x, c, t):
        for layer in self.layers:
            x = layer(x, cond=c)
        return x


# --- ten lines


@dtr.swap.register_family
class Layers(dtr.swap.Family):
    @classmethod
    def matches(cls, block):
        return isinstance(block, Layer)

    @classmethod
    def layers(cls, block):
        qkv = dtr.swap.StackedLinear((block.self_attn.queries, block.self_attn.keys, block.self_attn.values))
        attn = dtr.swap.AttentionLayers(qkv, block.self_attn.out, HEADS)
        return dtr.swap.Layers(block.ln1, attn, block.ln2, dtr.swap.MlpLayers(*block.ffn), block.ada)


# ---


@pytest.fixture(autouse=True)
def _only_this_familys(monkeypatch):
    monkeypatch.setattr(registry, "FAMILIES", [Layers, *(f for f in registry.FAMILIES if f is not Layers)])


def batch():
    return torch.randn(4, 7, C), torch.randn(4, C), torch.tensor([0, 30, 44, 49])


def masked(model):
    """A copy of the model whose blocks run on masked inputs, and pass on what the mask hides."""
    model = copy.deepcopy(model)

    def forward(x, c, t):
        mask = dtr.reference.routing_mask(t, C, T)[:, None].to(x.dtype)
        for layer in model.layers:
            x = layer(x * mask, c) + x * (1 - mask)
        return x

    model.forward = forward
    return model


def test_ten_lines_are_enough():
    model, inputs = Network(), batch()
    before, expected, exact = snapshot(model), results(model, inputs), results(*widened(model, inputs))
    assert_as_exact(results(dtr.swap_blocks(model), inputs), expected, exact)
    assert snapshot(dtr.restore_blocks(model)) == before
    wide, *batches = widened(model, inputs)
    expected, exact = results(masked(model), inputs), results(masked(wide), *batches)
    assert_as_exact(results(dtr.swap_blocks(model, ROUTING), inputs), expected, exact)


def test_another_process_finds_the_family_by_its_name(tmp_path):
    model, inputs = dtr.swap_blocks(Network(), ROUTING), batch()
    (tmp_path / "saved").write_bytes(pickle.dumps((model, inputs, model(*inputs))))
    code = """
import pickle, sys, torch
sys.path.insert(0, sys.argv[2])
model, inputs, expected = pickle.load(open(sys.argv[1], "rb"))
torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-4)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "saved", Path(__file__).parent], check=True)


class Doubled(Layer):
    def forward(self, tokens, cond):
        return 2 * super().forward(tokens, cond)


class AffineLayer(Layer):
    def __init__(self):
        super().__init__()
        self.ln2 = nn.LayerNorm(C)


class Unfinished(Layer):
    def __init__(self):
        super().__init__()
        del self.self_attn.keys


class Skipping(Layer):
    def forward(self, tokens, cond, skip):
        return super().forward(tokens, cond) + skip


class Dropping(Layer):
    def __init__(self):
        super().__init__()
        self.ffn.insert(2, nn.Dropout(0.1))


@pytest.mark.parametrize(
    ("kind", "fragments"),
    [
        (Doubled, ["its forward computes something else than a DiT block"]),
        (AffineLayer, ["ln2 has affine parameters"]),
        (Unfinished, ["not made as a DiT block is", "'keys'"]),
        (Dropping, ["not made as a DiT block is", "positional arguments"]),
        (Skipping, ["its forward takes (tokens, cond, skip), but the one that would replace it takes (x, c)"]),
    ],
)
def test_checks_are_those_of_every_family(kind, fragments):
    model = Network()
    model.layers[1] = kind()
    nn.init.zeros_(model.layers[1].ada[1].weight)
    nn.init.zeros_(model.layers[1].ada[1].bias)
    refused(lambda: dtr.swap_blocks(model), ValueError, ["cannot swap block 'layers.1'", *fragments])


def test_the_newest_family_is_asked_first():
    class Other(Layers):
        @classmethod
        def matches(cls, block):
            return isinstance(block, Doubled)

    Other.__qualname__ = "Other"
    assert dtr.swap.register_family(Other) is Other
    assert registry.FAMILIES[:2] == [Other, Layers]
    assert registry.family_of(Doubled()) is Other and registry.family_of(Layer()) is Layers


def test_a_family_of_the_same_name_takes_the_place():
    known = list(registry.FAMILIES)
    again = type("Layers", (Layers,), {"__module__": __name__, "__qualname__": "Layers"})
    for _ in range(2):
        dtr.swap.register_family(again)
        assert [again, *known[1:]] == registry.FAMILIES


class Wordless(dtr.swap.Family):
    pass


class ByInstance(dtr.swap.Family):
    def matches(self, block):
        return False


def test_refuses_what_is_no_family():
    known = list(registry.FAMILIES)

    class Local(Layers):
        pass

    for family, error, fragments in [
        (Layer, TypeError, ["a class derived from dtr_kernels.swap.Family", "Layer"]),
        (Layers(), TypeError, ["a class derived from"]),
        (Local, ValueError, ["Local is defined inside a function"]),
        (Wordless, ValueError, ["Wordless has no method matches(block)"]),
        (ByInstance, ValueError, ["ByInstance.matches takes (self, block), but is called with (block)"]),
    ]:
        refused(lambda family=family: dtr.swap.register_family(family), error, fragments)
    assert known == registry.FAMILIES


def test_a_model_without_blocks_hears_of_all_families():
    fragments = ["it has no DiT block, such as Layers matches; ", "no DiT block of diffusers, a module with", "U-Net"]
    refused(lambda: dtr.swap_blocks(nn.Linear(2, 2)), ValueError, fragments)


class OfFunctions(Layers):
    """A family whose modulation is a function, of a part that it names."""

    called = ("ada",)

    @classmethod
    def layers(cls, block):
        return super().layers(block)._replace(adaLN_modulation=lambda c: block.ada(c))


def test_a_modulation_that_is_a_function_needs_its_gates_opened(monkeypatch):
    monkeypatch.setattr(registry, "FAMILIES", [OfFunctions])
    with pytest.raises(ValueError, match="override prepare_trial, which opens them"):
        dtr.swap_blocks(Network())


def test_a_modulation_may_be_supplied():
    """A sampler may remember the modulation of each timestep."""
    block, (x, c, t) = Layer(), batch()
    layers = Layers.layers(block)
    vectors = layers.adaLN_modulation(c)
    supplied = layers._replace(adaLN_modulation=lambda c: vectors)
    window = ROUTING.window(t, C)
    fused = dtr.nn.block.advance(supplied, dtr.nn.block.Stream(x), None, window, "block").sum()
    torch.testing.assert_close(fused, dtr.reference.dit_block(layers, x, c, window.mask()), rtol=1e-4, atol=1e-4)
