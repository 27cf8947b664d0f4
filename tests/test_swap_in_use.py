"""Swapped models as people use them: in threads, changed after the swap, unwrapped by tools, averaged, quantised."""

from __future__ import annotations

import copy
import inspect
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparing import differ
from models import DIM, HEADS, TIMESTEPS, DiT, DiTBlock, TimestepEmbedder, facebook_dit, public_dtr, window_mapping
from torch import nn
from unets import ResBlock, TwoBlocks, UNetModel

import dtr_kernels as dtr

ROUTING, RANDOM = dtr.DenoisingTaskRouting(TIMESTEPS), dtr.RandomRouting(TIMESTEPS)
pytestmark = pytest.mark.usefixtures("one_thread", "seed")


def images(samples=4, channels=3):
    return torch.randn(samples, channels, 8, 8)


def labels(samples=4):
    return torch.randint(10, (samples,))


def at(t, samples=4):
    return torch.full((samples,), t)


# --- threads ---------------------------------------------------------------------------------------------------------


def in_threads(*calls, expected, times=15):
    """Run each call many times in a thread of its own, all at once; it always returns what is expected."""
    start, results = threading.Barrier(len(calls)), [[] for _ in calls]

    def run(call, into):
        start.wait()
        for _ in range(times):
            try:
                into.append(call())
            except Exception as error:  # told apart by the caller
                into.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(calls, results, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, right in zip(results, expected, strict=True):
        for result in found:
            torch.testing.assert_close(result, right, rtol=1e-4, atol=1e-5)


def native(routing=ROUTING):
    model = dtr.nn.DiT(8, 2, 3, DIM, 2, HEADS, num_classes=10, class_dropout_prob=0.0, routing=routing)
    for layer in (*model.blocks, model.final_layer):
        nn.init.normal_(layer.adaLN_modulation[1].weight, std=DIM**-0.5)
    nn.init.normal_(model.final_layer.linear.weight, std=DIM**-0.5)
    return model


@pytest.mark.parametrize("routing", [ROUTING, RANDOM], ids=["DTR", "random"])
@pytest.mark.parametrize("kind", [facebook_dit, UNetModel, native])
def test_threads_at_other_timesteps_share_a_model(kind, routing):
    model = native(routing) if kind is native else dtr.swap_blocks(kind(), routing)
    x, y = images(), labels()
    calls = [torch.no_grad()(lambda t=t: model(x, at(t), y)) for t in (1, TIMESTEPS - 1)]
    expected = [call() for call in calls]
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    in_threads(*calls, expected=expected)


@pytest.mark.parametrize("kind", [facebook_dit, native])
def test_a_sampler_in_one_thread_beside_calls_in_others(kind):
    model = native() if kind is native else dtr.swap_blocks(kind(), ROUTING)
    x, y = images(), labels()
    sampler = dtr.Sampler(model.eval(), y=y)
    calls = [lambda: sampler(x, 1), torch.no_grad()(lambda: model(x, at(49), y)), lambda: sampler(x, 30)]
    expected = [torch.no_grad()(model)(x, at(t), y) for t in (1, 49, 30)]
    in_threads(*calls, expected=expected, times=20)


def test_threads_with_backward_passes_of_checkpointed_blocks():
    model, x, y = dtr.swap_blocks(facebook_dit(reentrant=False), ROUTING), images(), labels()
    weight = model.blocks[0].attn.qkv.weight

    def gradient(t):
        return torch.autograd.grad(model(x, at(t), y).square().sum(), weight)[0]

    expected = [gradient(t) for t in (1, 49)]
    in_threads(lambda: gradient(1), lambda: gradient(49), expected=expected, times=10)


def test_threads_of_a_compiled_model(fresh_compiler):
    model, x, y = dtr.swap_blocks(facebook_dit().eval(), ROUTING), images(), labels()
    expected = [model(x, at(t), y) for t in (1, 49)]
    compiled = torch.compile(model, backend="eager")
    compiled(x, at(30), y)
    in_threads(*(lambda t=t: compiled(x, at(t), y) for t in (1, 49)), expected=expected)


# --- changes after the swap ------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """A layer and something on top, as an adapter's."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.gain = layer, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return 2 * self.gain * self.layer(x)


class OtherAttention(nn.Module):
    """Attention by its attributes, with another forward."""

    def __init__(self, attn):
        super().__init__()
        self.qkv, self.proj, self.num_heads = attn.qkv, attn.proj, attn.num_heads

    def forward(self, x):
        return self.proj(self.qkv(x)[..., :DIM])


def change(path, make):
    """A change of a block: what is at ``path`` is replaced by what ``make`` makes of it."""
    parent, _, name = path.rpartition(".")

    def apply(block):
        module = block.get_submodule(parent)
        setattr(module, name, make(getattr(module, name, None)))

    return apply


def hook(path):
    return lambda block: block.get_submodule(path).register_forward_hook(lambda module, inputs, out: 2 * out)


def patch(path):
    return change(f"{path}.forward", lambda forward: lambda *args: 2 * forward(*args))


REFUSED_IN_DIT = {
    "patched attention": patch("attn"),
    "patched MLP": patch("mlp"),
    "hook on attention": hook("attn"),
    "hook on the MLP": hook("mlp"),
    "hook on a norm": hook("norm2"),
    "patched layer": patch("mlp.fc1"),
    "hook on a layer": hook("mlp.fc2"),
    "wrapped qkv": change("attn.qkv", Doubled),
    "wrapped MLP": change("mlp", lambda mlp: nn.Sequential(mlp)),
    "norm in the MLP": change("mlp.norm", lambda _: nn.LayerNorm(4 * DIM)),
    "weight of a norm": change("norm2.weight", lambda _: nn.Parameter(torch.full((DIM,), 2.0))),
    "affine norm": change("norm1", lambda _: nn.LayerNorm(DIM)),
    "activation": change("mlp.act", lambda _: nn.ReLU()),
    "exact GELU": change("mlp.act.approximate", lambda _: "none"),
    "dropout": change("attn.attn_drop.p", lambda _: 0.1),
    "other attention": change("attn", OtherAttention),
    "rotary embedding": change("attn.rope", lambda _: nn.Identity()),
}
REFUSED_IN_UNET = {
    "wrapped convolution": change("in_layers.2", Doubled),
    "patched convolution": patch("in_layers.2"),
    "hook on the layers": hook("in_layers"),
    "hook on a norm": hook("out_layers.0"),
    "norm": change("in_layers.0", lambda _: nn.BatchNorm2d(16)),
    "activation": change("in_layers.1", lambda _: nn.ReLU()),
}
CASES = {f"facebook_dit, {what}": (facebook_dit, "blocks.1", do) for what, do in REFUSED_IN_DIT.items()}
CASES |= {f"UNetModel, {what}": (UNetModel, "input_blocks.1.0", do) for what, do in REFUSED_IN_UNET.items()}


@pytest.mark.parametrize("routing", [None, ROUTING, RANDOM], ids=["unrouted", "DTR", "random"])
@pytest.mark.parametrize(("make", "name", "do"), CASES.values(), ids=CASES)
def test_what_is_refused_before_a_swap_is_refused_after_it(make, name, do, routing):
    before = make()
    do(before.get_submodule(name))
    with pytest.raises(ValueError, match=f"cannot swap block '{name}'"):
        dtr.swap_blocks(before, routing)
    model = dtr.swap_blocks(make(), routing)
    batch = images(), at(3), labels()
    model(*batch)
    do(model.get_submodule(name))
    copied = copy.deepcopy(model)
    for changed in (model, copied):
        with pytest.raises(RuntimeError, match=f"swapped block '{name}' was changed: "):
            changed(*batch)
    assert not any(isinstance(module, dtr.swap.core.Swapped) for module in dtr.restore_blocks(model).modules())


def test_an_old_weight_norm_is_refused_after_the_swap():
    model = dtr.swap_blocks(facebook_dit(), ROUTING)
    nn.utils.weight_norm(model.blocks[1].mlp.fc1)
    with pytest.raises(RuntimeError, match=r"swapped block 'blocks.1' was changed: "):
        model(images(), at(3), labels())


@pytest.mark.parametrize(
    ("make", "name", "path"),
    [
        *((facebook_dit, "blocks.1", path) for path in ("attn.proj", "adaLN_modulation")),
        *((UNetModel, "input_blocks.1.0", path) for path in ("out_layers.3", "emb_layers")),
    ],
)
def test_layers_that_are_called_may_change_after_the_swap(make, name, path):
    model = make()
    batch = images(), at(3), labels()
    dtr.swap_blocks(model)
    for do in (change(path, Doubled), hook(path)):
        do(model.get_submodule(name))
        swapped = model(*batch)
        torch.testing.assert_close(swapped, dtr.restore_blocks(model)(*batch), rtol=1e-4, atol=1e-4)
        dtr.swap_blocks(model)
    model(*batch).square().sum().backward()
    assert model.get_submodule(f"{name}.{path}").gain.grad.abs() > 0


def test_a_layer_that_is_read_may_be_replaced_by_one_of_its_kind():
    model, batch = dtr.swap_blocks(facebook_dit()), (images(), at(3), labels())
    before = model(*batch)
    model.blocks[0].attn.qkv = nn.Linear(DIM, 3 * DIM)
    after = model(*batch)
    assert differ([after], [before])
    torch.testing.assert_close(after, dtr.restore_blocks(model)(*batch), rtol=1e-4, atol=1e-5)


def test_compiled_models_notice_changes(fresh_compiler):
    model, batch = dtr.swap_blocks(facebook_dit(), ROUTING), (images(), at(3), labels())
    compiled = torch.compile(model, backend="eager")
    compiled(*batch)
    model.blocks[1].attn.qkv = Doubled(model.blocks[1].attn.qkv)
    with pytest.raises(RuntimeError, match=r"swapped block 'blocks.1' was changed: attn.qkv"):
        compiled(*batch)


# --- tools that unwrap, averages, the trial --------------------------------------------------------------------------


def test_no_attribute_of_a_swapped_forward_leads_to_the_plain_one():
    """As ``Accelerator.unwrap_model`` looks for it, which follows ``__wrapped__``."""
    for model, blocks in ((facebook_dit(), "blocks.0"), (UNetModel(use_checkpoint=True), "input_blocks.1.0")):
        plain, batch = copy.deepcopy(model), (images(), at(30), labels())
        dtr.swap_blocks(model, ROUTING)
        for swapped, original in ((model, plain), (model.get_submodule(blocks), plain.get_submodule(blocks))):
            for name in ("forward", "_forward", "__init__"):
                if hasattr(original, name):
                    method, old = getattr(swapped, name), getattr(original, name)
                    assert inspect.unwrap(method) == method
                    assert inspect.signature(method) == inspect.signature(old) and method.__doc__ == old.__doc__
        expected = model(*batch)
        model.forward = inspect.unwrap(model.forward)
        assert torch.equal(model(*batch), expected) and differ([plain(*batch)], [expected])


@pytest.mark.parametrize("make", [facebook_dit, UNetModel])
def test_an_average_made_before_the_swap_is_swapped_like_the_model(make):
    model, batch = make(), (images(), at(30), labels())
    average = torch.optim.swa_utils.AveragedModel(model)
    dtr.swap_blocks(model, ROUTING)
    assert differ([average(*batch)], [model(*batch)])  # it is a copy, and unrouted
    dtr.swap_blocks(average, ROUTING)
    average.update_parameters(model)
    torch.testing.assert_close(average(*batch), model(*batch))


class Counting(nn.Linear):
    """A layer that counts its calls in a buffer, and in training mode draws numbers."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return F.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize("fit", [True, False])
@pytest.mark.parametrize("kind", ["spectral norm", "counter"])
def test_the_trial_leaves_buffers_and_generators_alone(kind, fit):
    model = facebook_dit().train()
    for block in model.blocks:
        if kind == "spectral norm":
            nn.utils.parametrizations.spectral_norm(block.adaLN_modulation[1])
        else:
            block.attn.proj = Counting(DIM, DIM)
    if not fit:
        model.blocks[1].mlp.act = nn.ReLU()
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    try:
        dtr.swap_blocks(model)
        assert fit
    except ValueError:
        assert not fit
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and model.training and model.blocks[0].attn.training


# --- compiled blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "routing", "backend"),  # the eager one traces alike, in half the time
    [(facebook_dit, ROUTING, "aot_eager"), (facebook_dit, RANDOM, "eager"), (public_dtr, None, "eager")],
    ids=["DTR", "random", "public DTR"],
)
@pytest.mark.parametrize("reentrant", [False, True, None])
def test_compiled_blocks_and_the_models_own_checkpointing(make, routing, backend, reentrant, fresh_compiler):
    """Two forwards of other timesteps come before their backward passes, whose blocks run again."""
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    model, counter = dtr.swap_blocks(make(), routing), CompileCounterWithBackend(backend)
    batches = [(images().requires_grad_(), at(t), labels()) for t in (1, 49)]

    def gradients():
        model.zero_grad()
        sum(model(*batch).square().sum() for batch in batches).backward()
        return [p.grad for p in model.parameters()]

    expected = gradients()
    model.reentrant = reentrant
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-4)
    # Blocks share graphs: one for each layout of the first input, and of those with gradients or without.
    assert counter.frame_count <= 4


def test_compiled_blocks_are_told_of_another_mapping(fresh_compiler):
    model, batch = dtr.swap_blocks(public_dtr()), (images(), at(30), labels())
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    model(*batch)
    for block in model.blocks:
        block.routing._unit_mapping.copy_(window_mapping(beta=0.5))
    with pytest.raises(RuntimeError, match="was changed since it was compiled; compile it again"):
        model(*batch)


# --- timesteps as numbers --------------------------------------------------------------------------------------------


class Annotated(DiT):
    def forward(self, x: torch.Tensor, t: torch.Tensor | None, y=None):
        return super().forward(x, t, y)


def test_one_number_is_the_timestep_of_the_batch():
    model = dtr.swap_blocks(Annotated([DiTBlock(DIM, HEADS)], DIM), ROUTING)
    x, y = images(), labels()
    expected = model(x, at(30), y)
    for t in (30, np.int64(30), torch.tensor(30)):
        for call in (lambda t=t: model(x, t, y), lambda t=t: model(x=x, t=t, y=y), lambda t=t: model(y=y, t=t, x=x)):
            torch.testing.assert_close(call(), expected)
    for bad in ("30", [30, 3, 1, 2], True):
        with pytest.raises(TypeError, match=r"t must be a tensor of timesteps \[B\], or one number for the batch, got"):
            model(x, bad, y)
    with pytest.raises(ValueError, match=r"t must be in 0\.\.49"):
        model(x, TIMESTEPS, y)


# --- other models ----------------------------------------------------------------------------------------------------


class ImprovedResBlock(ResBlock):
    """A residual block of improved-diffusion, which never resamples within."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.h_upd, self.x_upd


@pytest.mark.parametrize("routing", [None, ROUTING], ids=["unrouted", "DTR"])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_residual_blocks_of_improved_diffusion(routing, scale_shift):
    model, options = TwoBlocks(), {"use_scale_shift_norm": scale_shift}
    model.down, model.up = ImprovedResBlock(16, 20, out_channels=24, **options), ImprovedResBlock(24, 20, **options)
    x, t = images(channels=16).requires_grad_(), torch.tensor([0, 20, 40, 49])
    nn.init.normal_(model.down.out_layers[3].weight, std=0.1)
    nn.init.normal_(model.up.out_layers[3].weight, std=0.1)
    plain = copy.deepcopy(model)
    if routing is not None:
        for block in (plain.down, plain.up):
            mask = routing.window(t, block.channels).mask()
            block.forward = lambda x, emb, block=block, mask=mask: dtr.reference.res_block(block, x, emb, mask)
    dtr.swap_blocks(model, routing)
    out, expected = model(x, t), plain(x, t)
    torch.testing.assert_close(out, expected)
    grads, right = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected))
    torch.testing.assert_close(grads, right)


@pytest.mark.parametrize("routing", [None, ROUTING], ids=["unrouted", "DTR"])
def test_conditioning_narrower_than_the_stream(routing):
    """As in the decoder of MaskDiT, whose blocks are wider or narrower than the conditioning of the encoder."""
    wide = 2 * DIM

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.t_embedder = TimestepEmbedder(DIM)
            self.encoder, self.decoder = DiTBlock(DIM, HEADS), DiTBlock(wide, HEADS)
            self.decoder.adaLN_modulation[1] = nn.Linear(DIM, 6 * wide)
            self.between = nn.Linear(DIM, wide)

        def forward(self, x, t):
            c = self.t_embedder(t)
            return self.decoder(self.between(self.encoder(x, c)), c)

    model, x, t = Decoder(), torch.randn(4, 9, DIM), torch.tensor([0, 20, 40, 49])
    plain = copy.deepcopy(model)
    if routing is not None:
        for block, C in ((plain.encoder, DIM), (plain.decoder, wide)):
            mask = routing.window(t, C).mask()
            block.forward = lambda x, c, block=block, mask=mask: dtr.reference.dit_block(block, x, c, mask)
    torch.testing.assert_close(dtr.swap_blocks(model, routing)(x, t), plain(x, t))


class RMSNorm(nn.Module):
    pass


class SwiGLUFFN(nn.Module):
    pass


class AnotherBlock(DiTBlock):
    def __init__(self, *args):
        super().__init__(*args)
        self.norm1, self.norm2, self.mlp = RMSNorm(), RMSNorm(), SwiGLUFFN()

    def forward(self, x, c, rope=None):
        raise NotImplementedError


def test_a_refusal_names_all_that_is_of_another_kind():
    model = DiT([AnotherBlock(DIM, HEADS)], DIM)
    with pytest.raises(ValueError, match=r"no mlp\.fc1, .*SwiGLUFFN.*RoPE.*norm1 is RMSNorm.*norm2 is RMSNorm"):
        dtr.swap_blocks(model)


class LoRA(nn.Module):
    """A low-rank adapter with dropout around a layer, as PEFT's."""

    def __init__(self, layer):
        super().__init__()
        self.base, self.down, self.up = layer, nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.dropout(x)))


def test_adapters_with_dropout_on_layers_that_are_called():
    model, batch = facebook_dit(), (images(), at(30), labels())
    for block in model.blocks:
        block.attn.proj = LoRA(block.attn.proj)
        block.adaLN_modulation[1] = LoRA(block.adaLN_modulation[1])
    expected = model.eval()(*batch)
    dtr.swap_blocks(model.train())
    torch.testing.assert_close(model.eval()(*batch), expected, rtol=1e-4, atol=1e-5)
    model.train()(*batch).square().sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())
    model.blocks[0].attn.qkv = LoRA(model.blocks[0].attn.qkv)
    with pytest.raises(RuntimeError, match=r"'blocks.0' was changed: attn.qkv is"):
        model(*batch)


# --- quantised weights -----------------------------------------------------------------------------------------------


class Int8(torch.Tensor):
    """A weight in 8 bits with a scale for each row, that multiplies and does nothing else, as TorchAO's."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["values"], inner["scale"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.values * weight.scale, *bias, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"Int8 knows no {function}")


def quantise(model):
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(Int8.of(layer.weight.detach()), requires_grad=False)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        lambda: (model := native(), quantise(copy.deepcopy(model))),
        lambda: (model := dtr.swap_blocks(facebook_dit(), ROUTING), quantise(copy.deepcopy(model))),
        lambda: (
            dtr.swap_blocks(copy.deepcopy(model := facebook_dit()), ROUTING),
            dtr.swap_blocks(quantise(model), ROUTING),
        ),
        lambda: (model := dtr.swap_blocks(UNetModel(), ROUTING), quantise(copy.deepcopy(model))),
    ],
    ids=["native", "swapped, then quantised", "quantised, then swapped", "U-Net"],
)
def test_quantised_weights_run_plainly(make):
    exact, model = (model.eval() for model in make())
    batch = images(), torch.tensor([0, 20, 40, 49]), labels()
    expected = exact(*batch)
    torch.testing.assert_close(model(*batch), expected, rtol=0, atol=0.1 * expected.abs().max().item())
    if not isinstance(model, UNetModel):
        assert "kernels cannot read weights of type Int8" in str(dtr.explain(model, batch))
