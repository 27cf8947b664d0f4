"""dtr.nn.DiT: names and initial values of facebookresearch/DiT, results of the oracle, both kinds of checkpoint."""

import copy
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gpu_waits import waiting_is_an_error
from models import change

import dtr_kernels as dtr

C, DEPTH, HEADS, PATCH, SIZE, CLASSES, T = 32, 3, 4, 2, 6, 5, 20
TOKENS = (SIZE // PATCH) ** 2
ROUTING = dtr.DenoisingTaskRouting(num_timesteps=T)


SIZES = {"input_size": SIZE, "patch_size": PATCH, "in_channels": 2, "hidden_size": C, "depth": DEPTH}
SIZES |= {"num_heads": HEADS, "num_classes": CLASSES}


def make_model(routing=ROUTING, randomize=True, **kwargs):
    """A small fp64 model; ``randomize`` opens the gates, which start at zero."""
    torch.manual_seed(0)
    model = dtr.nn.DiT(**SIZES | kwargs, routing=routing).double()
    if randomize:
        for name, parameter in model.named_parameters():
            if "adaLN_modulation" in name or "final_layer" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_batch(B=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, 2, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, T // 2, T - 1, 7])[:B], torch.tensor([0, CLASSES, 2, 1])[:B]


def oracle(model, x, t, y, mask):
    """DiT's forward pass, written out around dtr.reference.dit_block."""
    B = len(x)
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = t.float()[:, None] * frequencies
    mlp = model.t_embedder.mlp
    c = mlp[2](F.silu(mlp[0](torch.cat([angles.cos(), angles.sin()], dim=1).double())))
    c = c + model.y_embedder.embedding_table.weight[y]
    patches = F.unfold(x, PATCH, stride=PATCH).transpose(1, 2)
    tokens = F.linear(patches, model.x_embedder.proj.weight.flatten(1), model.x_embedder.proj.bias) + model.pos_embed
    for block in model.blocks:
        tokens = dtr.reference.dit_block(block, tokens, c, mask, block.scope)
    shift, scale = model.final_layer.adaLN_modulation(c).chunk(2, dim=1)
    out = model.final_layer.linear(dtr.reference.modulate(dtr.reference.normalize(tokens), shift, scale))
    out = out.reshape(B, TOKENS, PATCH * PATCH, model.out_channels).permute(0, 3, 2, 1)
    return F.fold(out.reshape(B, -1, TOKENS), SIZE, PATCH, stride=PATCH)


def public_checkpoint(model, routing, channels=C):
    """The model's state_dict as the paper's public code saves it, with a mask table in every block."""
    masks = routing.window(torch.arange(routing.num_timesteps), channels).mask().float()
    return {**model.state_dict(), **{f"blocks.{i}.routing._unit_mapping": masks for i in range(DEPTH)}}


def test_names_and_shapes_are_those_of_facebookresearch_dit():
    out = PATCH * PATCH * 4
    expected = {
        "pos_embed": (1, TOKENS, C),
        "x_embedder.proj.weight": (C, 2, PATCH, PATCH),
        "x_embedder.proj.bias": (C,),
        "t_embedder.mlp.0.weight": (C, 256),
        "t_embedder.mlp.0.bias": (C,),
        "t_embedder.mlp.2.weight": (C, C),
        "t_embedder.mlp.2.bias": (C,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, C),
        "final_layer.linear.weight": (out, C),
        "final_layer.linear.bias": (out,),
        "final_layer.adaLN_modulation.1.weight": (2 * C, C),
        "final_layer.adaLN_modulation.1.bias": (2 * C,),
    }
    rows = {"attn.qkv": 3 * C, "attn.proj": C, "mlp.fc1": 4 * C, "mlp.fc2": C, "adaLN_modulation.1": 6 * C}
    for i in range(DEPTH):
        for name, features in rows.items():
            expected[f"blocks.{i}.{name}.weight"] = (features, 4 * C if name == "mlp.fc2" else C)
            expected[f"blocks.{i}.{name}.bias"] = (features,)
    model = make_model()
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    assert [name for name, value in model.named_parameters() if not value.requires_grad] == ["pos_embed"]


def test_initial_values():
    model = make_model(randomize=False)
    x, t, y = make_batch()
    assert torch.count_nonzero(model(x, t, y)) == 0
    tokens, c = torch.randn(3, TOKENS, C).double(), torch.randn(3, C).double()
    for block in model.blocks:
        torch.testing.assert_close(block(tokens, c, ROUTING.window(t, C)), tokens, rtol=0, atol=0)
        assert block.attn.qkv.weight.abs().max() <= (6 / (4 * C)) ** 0.5  # xavier-uniform for [3C, C]
        assert torch.count_nonzero(block.attn.qkv.bias) == 0
    assert model.x_embedder.proj.weight.abs().max() <= (6 / (C + 2 * PATCH * PATCH)) ** 0.5
    assert torch.count_nonzero(model.x_embedder.proj.bias) == 0
    for weight in (model.y_embedder.embedding_table.weight, model.t_embedder.mlp[0].weight):
        assert 0.017 < weight.std() < 0.023


def test_position_embedding_is_column_then_row():
    frequency = 1.0 / 10000 ** (np.arange(C // 4) / (C / 4))
    expected = np.zeros((TOKENS, C))
    for token in range(TOKENS):
        row, column = divmod(token, SIZE // PATCH)
        expected[token] = np.concatenate([f(p * frequency) for p in (column, row) for f in (np.sin, np.cos)])
    np.testing.assert_array_equal(make_model().pos_embed[0].numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
@pytest.mark.parametrize("routing", [ROUTING, dtr.RandomRouting(T), None], ids=["window", "random", "none"])
def test_agrees_with_the_oracle(routing, scope):
    model, (x, t, y) = make_model(routing, scope=scope), make_batch()
    if isinstance(routing, dtr.RandomRouting):
        mask = routing.mask(t, model.blocks[0].routed_channels)
    else:
        mask = dtr.reference.routing_mask(t, model.blocks[0].routed_channels, T) if routing else None
    expected = oracle(model, x, t, y, mask)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.blocks.parameters()))
    out = model(x, t, y)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), list(model.blocks.parameters())), gradients, rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("routing", [ROUTING, dtr.RandomRouting(T), None], ids=["window", "random", "none"])
def test_a_number_is_the_timestep_of_the_whole_batch(routing):
    model, (x, _, y) = make_model(routing), make_batch()
    torch.testing.assert_close(model(x, 13, y), model(x, torch.full((3,), 13), y))
    if not isinstance(routing, dtr.RandomRouting):
        torch.testing.assert_close(model(x, 0.25, y), model(x, torch.full((3,), 0.25), y))  # continuous


def test_guidance_acts_on_the_first_in_channels():
    """Or on fewer: facebookresearch/DiT guides three of its four."""
    model, (x, t, _) = make_model(), make_batch(4)
    y = torch.tensor([1, 3, CLASSES, CLASSES])
    conditional, unconditional = model(x[[0, 1, 0, 1]], t, y).chunk(2)
    out = model.forward_with_cfg(x, t, y, 4.0)
    expected = 4 * conditional[:, :2] - 3 * unconditional[:, :2]
    torch.testing.assert_close(out[:, :2], torch.cat([expected, expected]))
    torch.testing.assert_close(out[:, 2:], torch.cat([conditional[:, 2:], unconditional[:, 2:]]))
    fewer = model.forward_with_cfg(x, t, y, 4.0, guided_channels=1)
    torch.testing.assert_close(fewer[:, :1], out[:, :1])
    torch.testing.assert_close(fewer[:, 1:], torch.cat([conditional, unconditional])[:, 1:])
    for wrong in (0, 5, -1):
        with pytest.raises(ValueError, match=f"guided_channels must be at .* got {wrong}"):
            model.forward_with_cfg(x, t, y, 4.0, guided_channels=wrong)


def test_float_timesteps():
    routing = dtr.DenoisingTaskRouting(T, float_timesteps=True)
    model, (x, t, y) = make_model(routing), make_batch()
    torch.testing.assert_close(model(x, t.float(), y), model(x, t, y))
    between = torch.tensor([0.0, 12.25, 18.5])
    start = [round((float(u) / (T - 1)) ** 4 * (C - 25)) for u in between]
    mask = torch.zeros(3, C)
    for b, first in enumerate(start):
        mask[b, first : first + 25] = 1
    torch.testing.assert_close(model(x, between, y), oracle(model, x, between, y, mask), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(x, 12.25, y), model(x, torch.full((3,), 12.25), y))


def test_numpy_numbers():
    numbers = {name: np.int64(size) for name, size in SIZES.items()}
    model, (x, _, y) = make_model(mlp_ratio=np.float32(4), **numbers), make_batch()
    torch.testing.assert_close(model(x, np.int64(13), y), make_model()(x, 13, y))
    torch.testing.assert_close(model(x, np.float32(0.25), y), make_model()(x, 0.25, y))


def test_labels_are_dropped_in_training_only():
    x, t, y = make_batch()
    model = make_model(class_dropout_prob=1.0)
    expected = model(x, t, torch.full_like(y, CLASSES))
    assert not torch.allclose(model(x, t, y), expected)
    torch.testing.assert_close(model.train()(x, t, y), expected)
    assert make_model(class_dropout_prob=0.0).y_embedder.embedding_table.num_embeddings == CLASSES


@pytest.mark.parametrize("wrapped", [False, True])
def test_checkpoints_of_dit_and_of_public_dtr_load(wrapped):
    model = copy.deepcopy(make_model())
    checkpoint = {name: torch.randn_like(value) for name, value in make_model(None).state_dict().items()}
    model.load_state_dict(checkpoint)
    assert all(torch.equal(value, checkpoint[name]) for name, value in model.state_dict().items())
    checkpoint = public_checkpoint(make_model(), ROUTING)
    if wrapped:
        model, checkpoint = torch.nn.Sequential(model), {f"0.{name}": value for name, value in checkpoint.items()}
    names = list(checkpoint)
    model.load_state_dict(checkpoint)
    assert list(checkpoint) == names


def test_public_dtr_checkpoint_with_windows_near_halves_loads():
    """Masks of a T at which t / (T - 1) rounds some timestep the other way."""
    routing = dtr.DenoisingTaskRouting(27, 1.0, 0.6)
    start = np.round(np.linspace(0, 1, 27) ** 1.0 * (C - int(0.6 * C)))
    assert (start != np.round(np.arange(27) / 26 * (C - int(0.6 * C)))).any()
    offset = np.arange(C) - start[:, None]
    masks = torch.from_numpy((offset >= 0) & (offset < int(0.6 * C))).float()
    model = make_model(routing)
    saved = {f"blocks.{i}.routing._unit_mapping": masks for i in range(DEPTH)}
    make_model(routing).load_state_dict({**model.state_dict(), **saved})


OTHERS = {"alpha": dtr.DenoisingTaskRouting(T, alpha=2.0), "beta": dtr.DenoisingTaskRouting(T, beta=0.5)}
OTHERS |= {"timesteps": dtr.DenoisingTaskRouting(2 * T), "random": dtr.RandomRouting(T), "none": None}


@pytest.mark.parametrize("routing", OTHERS.values(), ids=OTHERS)
def test_checkpoint_of_another_routing_is_refused(routing):
    checkpoint = public_checkpoint(make_model(), ROUTING)
    with pytest.raises(RuntimeError) as error:
        make_model(routing).load_state_dict(checkpoint)
    message = str(error.value)
    assert f"blocks.0.routing._unit_mapping does not hold the masks of this model's routing={routing}" in message
    assert f"windows of 25 of {C} channels at {T} timesteps" in message
    assert f"DenoisingTaskRouting(num_timesteps={T}, alpha=..., beta=0.8)" in message
    assert "Unexpected key" not in message
    checkpoint["blocks.1.routing._unit_mapping"] = dtr.RandomRouting(T).mask(torch.arange(T), C).float()
    with pytest.raises(RuntimeError, match=r"blocks\.1\.routing.* not windows"):
        make_model().load_state_dict(checkpoint)


def test_published_sizes():
    with torch.device("meta"):
        models = {name: construct(routing=dtr.DenoisingTaskRouting()) for name, construct in dtr.nn.DiT_models.items()}
    sizes = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
    assert list(models) == [f"DiT-{name}/{patch}" for name in sizes for patch in (2, 4, 8)]
    for name, model in models.items():
        size, patch = name.removeprefix("DiT-").split("/")
        assert (model.hidden_size, len(model.blocks), model.blocks[0].attn.num_heads) == sizes[size]
        assert model.patch_size == int(patch)
    assert sum(p.numel() for p in models["DiT-XL/2"].parameters()) == 675_129_632  # 675M in the DiT paper's table 4


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ({"input_size": 7}, ValueError, "input_size must be divisible by patch_size, got 7 and 2"),
        ({"num_heads": 5}, ValueError, "hidden_size must be divisible by num_heads, got 32 and 5"),
        ({"hidden_size": 30}, ValueError, "hidden_size must be divisible by 4 .*got 30"),
        ({"class_dropout_prob": 1.5}, ValueError, "class_dropout_prob must be between 0 and 1, got 1.5"),
        ({"scope": "all"}, ValueError, "scope must be one of 'block', 'branch', 'inner', got 'all'"),
        ({"routing": 0.8}, TypeError, "routing must be .* got 0.8"),
        ({"depth": 0}, ValueError, "depth must be at least 1, got 0"),
        ({"depth": 2.0}, TypeError, "depth must be an integer of at least 1, got 2.0"),
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1, got 0"),
        ({"input_size": 0}, ValueError, "input_size must be at least 1, got 0"),
        ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        ({"mlp_ratio": 0}, ValueError, "mlp_ratio must be at least 1 / hidden_size = 1/32, got 0"),
        ({"num_classes": -1}, ValueError, "num_classes must be at least 0, got -1"),
        ({"num_classes": 0, "class_dropout_prob": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"class_dropout_prob": None}, TypeError, "class_dropout_prob must be a number, got None"),
    ],
)
def test_bad_arguments(argument, error, message):
    with pytest.raises(error, match=message):
        make_model(**argument)


LABELS = torch.tensor([1, 2, 3])


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ({"x": torch.ones(3, 2, 6, 4)}, ValueError, r"x must have shape \[B, 2, 6, 6\], got \[3, 2, 6, 4\]"),
        ({"x": torch.ones(3, 2, 6, 6).int()}, TypeError, "x must be floating point, got torch.int32"),
        ({"x": [1.0]}, TypeError, "x must be floating point, a tensor, got list"),
        ({"t": torch.tensor([1, 2])}, ValueError, r"t must have shape \[3\].* got \[2\]"),
        ({"t": [1, 2, 3]}, TypeError, "t must be a tensor, an int or a float, got list"),
        ({"t": "3"}, TypeError, "t must be a tensor, an int or a float, got str"),
        ({"t": None}, TypeError, "t must be a tensor, an int or a float, got NoneType"),
        ({"t": True}, ValueError, "t must be a timestep, got True"),
        ({"t": math.nan}, ValueError, "t must be finite, got nan"),
        ({"t": np.float32("inf")}, ValueError, "t must be finite, got inf"),
        ({"t": torch.ones(3, dtype=torch.bool)}, ValueError, r"t must be a vector \[B\] .* got torch.bool"),
        ({"t": LABELS.to("meta")}, ValueError, "t must be on cpu, as x is, got it on meta"),
        ({"y": LABELS[:2]}, ValueError, r"y must have shape \[3\].* got \[2\]"),
        ({"y": LABELS + 3}, ValueError, rf"y must be in 0..{CLASSES}; .*from 4 to 6"),
        ({"y": -LABELS}, ValueError, rf"y must be in 0..{CLASSES}; .*from -3 to -1"),
        ({"y": LABELS.to("meta")}, ValueError, "y must be on cpu, as x is, got it on meta"),
        ({"y": LABELS.float()}, TypeError, r"y must be an integer tensor \[3\] of class labels, got torch.float32"),
        ({"y": LABELS > 1}, TypeError, r"y must be an integer tensor \[3\] of class labels, got torch.bool"),
        ({"y": 1}, TypeError, r"y must be an integer tensor \[3\] of class labels, got int"),
        ({"y": None}, TypeError, r"y must be an integer tensor \[3\] of class labels, got NoneType"),
    ],
)
@pytest.mark.parametrize("routing", [ROUTING, None], ids=["window", "none"])
def test_bad_batches(routing, argument, error, message):
    batch = dict(zip("xty", make_batch(), strict=True))
    with pytest.raises(error, match=message):
        make_model(routing)(**{**batch, **argument})


def test_bad_batches_of_other_kinds():
    model, (x, t, y) = make_model(), make_batch()
    with pytest.raises(ValueError, match=f"t must be in 0..{T - 1}"):
        model(x, T, y)
    with pytest.raises(ValueError, match=r"even number of samples.* got 3"):
        model.forward_with_cfg(x, t, y, 2.0)
    with pytest.raises(ValueError, match=f"y must be in 0..{CLASSES - 1}; .* from 0 to {CLASSES}"):
        make_model(class_dropout_prob=0.0)(x, t, y)


def test_labels_of_any_integer_dtype_and_the_null_class_alone():
    model, (x, t, y) = make_model(), make_batch()
    for dtype in (torch.int32, torch.uint8, torch.int16):
        torch.testing.assert_close(model(x, t, y.to(dtype)), model(x, t, y), rtol=0, atol=0)
        torch.library.opcheck(torch.ops.dtr_kernels.checked_labels, (y.to(dtype), CLASSES + 1))
    make_model(num_classes=0)(x, t, torch.zeros(3, dtype=torch.long))


def test_labels_are_checked_in_compiled_and_exported_models(fresh_compiler):
    model, (x, t, y) = make_model(depth=1).float(), make_batch()
    x = x.float()
    for run in (
        torch.compile(model, fullgraph=True, backend="aot_eager"),
        torch.export.export(model, (x, t, y)).module(),
        lambda x, t, y: torch.func.functional_call(model, dict(model.named_parameters()), (x, t, y)),
    ):
        torch.testing.assert_close(run(x, t, y), model(x, t, y))
        with pytest.raises(ValueError, match=f"y must be in 0..{CLASSES}"):
            run(x, t, y + CLASSES + 1)


@pytest.mark.gpu
def test_labels_are_checked_without_waiting_for_the_gpu():
    model = make_model().float().cuda()
    x, t, y = (tensor.cuda() for tensor in make_batch())
    model(x.float(), t, y)
    with waiting_is_an_error():
        model(x.float(), t, y)


# --- blocks that somebody looks into ---------------------------------------------------------------------------------


class Wrapped(torch.nn.Module):
    """A user's own module around a block."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, c, window):
        assert isinstance(x, torch.Tensor)
        return self.block(x, c, window)


def forward_hook(block, seen):
    block.register_forward_hook(lambda module, inputs, out: seen.extend((inputs[0], out)))


def pre_hook(block, seen):
    block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))


def backward_hook(block, seen):
    block.register_full_backward_hook(lambda module, inputs, outputs: seen.extend(outputs))


def patch(block, seen):
    block.forward = lambda *args: seen.append(args[0]) or type(block).forward(block, *args)


def global_hook(block, seen):
    """For all modules, which are seen one after the other."""
    return torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, out: seen.extend((inputs[0], out)) if module is block else None
    )


@pytest.mark.parametrize("look", [forward_hook, pre_hook, backward_hook, patch, global_hook])
@pytest.mark.parametrize(
    "where", [lambda model: model.blocks[1], lambda model: model.final_layer], ids=["block", "last"]
)
def test_whoever_looks_into_a_block_sees_tensors(look, where):
    model, (x, t, y) = make_model(), make_batch()
    parameters = list(model.blocks.parameters())
    expected = model(x, t, y)
    gradients = torch.autograd.grad(expected.square().sum(), parameters)
    seen = []
    handle = look(where(model), seen)
    out = model(x, t, y)
    found = torch.autograd.grad(out.square().sum(), parameters)
    if handle is not None:
        handle.remove()
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, gradients, rtol=1e-9, atol=1e-9)
    assert seen and all(isinstance(tensor, torch.Tensor) for tensor in seen)


def test_a_hook_changes_what_a_block_returns():
    model, (x, t, y) = make_model(None), make_batch()
    model.blocks[1].register_forward_hook(lambda module, inputs, out: 2 * out)
    c = model.t_embedder(t) + model.y_embedder(y)
    tokens = model.x_embedder(x) + model.pos_embed
    for factor, block in zip((1, 2, 1), model.blocks, strict=True):
        tokens = factor * dtr.reference.dit_block(block, tokens, c, None, block.scope)
    expected = model.unpatchify(model.final_layer(tokens, c))
    torch.testing.assert_close(model(x, t, y), expected, rtol=1e-9, atol=1e-9)


def compiled(block):
    return torch.compile(block, backend="aot_eager")


def compiled_in_place(block):
    block.compile(backend="aot_eager")
    return block


@pytest.mark.parametrize("wrap", [Wrapped, compiled, compiled_in_place])
@pytest.mark.parametrize("number", [0, DEPTH - 1])
def test_a_wrapped_block_takes_and_returns_tensors(wrap, number, fresh_compiler):
    model, (x, t, y) = make_model(), make_batch()
    expected = model(x, t, y)
    model.blocks[number] = wrap(model.blocks[number])
    torch.testing.assert_close(model(x, t, y), expected, rtol=1e-9, atol=1e-9)


def test_blocks_that_nobody_looks_into_are_fused():
    """One sum of the residual stream for each block with a hook, and none without."""
    model, (x, t, y) = make_model().float(), make_batch()

    def sums():
        with torch.profiler.profile() as profile:
            model(x.float(), t, y)
        return sum(event.name == "dtr_kernels::gated_residual" for event in profile.events())

    assert sums() == 0
    handle = model.blocks[1].register_forward_hook(lambda module, inputs, out: None)
    assert sums() == 2  # before it, and its own
    handle.remove()
    assert sums() == 0


@pytest.mark.parametrize("routing", [ROUTING, dtr.RandomRouting(T)], ids=["window", "random"])
def test_compiles_as_one_graph(routing):
    model, (x, t, y) = make_model(routing, depth=2).float(), make_batch()
    x = x.float()
    expected = model(x, t, y)
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(x, t, y)
    torch.testing.assert_close(out, expected)
    parameter = model.blocks[0].attn.qkv.weight
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), parameter), torch.autograd.grad(expected.square().sum(), parameter)
    )


def test_autocast_keeps_the_stream_in_fp32():
    model, (x, t, y) = make_model().float(), make_batch()
    x = x.float()
    streams = []
    model.final_layer.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
    assert streams[0].dtype == torch.float32
    torch.testing.assert_close(out.float(), model(x, t, y), rtol=0.1, atol=0.1)


class Adapter(torch.nn.Module):
    """A linear layer and something on top, as LoRA's, with the attributes of the layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "layer" else getattr(self.layer, name)

    def forward(self, x):
        return 2 * self.layer(x)


def _adapt(model, path):
    change(path, Adapter(model.get_submodule(path)))(model)


def _patch(model, path):
    model.get_submodule(path).forward = lambda *inputs: inputs[0]


def _hook(model, path):
    model.get_submodule(path).register_forward_hook(lambda module, inputs, out: 2 * out)


@pytest.mark.parametrize("alter", [_adapt, _patch, _hook], ids=["adapter", "patch", "hook"])
@pytest.mark.parametrize(
    "path", ["blocks.1.attn.qkv", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "final_layer.linear", "blocks.0.norm2"]
)
def test_a_changed_part_that_kernels_read_is_refused_by_name(alter, path):
    model = make_model()
    alter(model, path)
    part = re.escape(path.removeprefix("blocks.0.").removeprefix("blocks.1.").removeprefix("final_layer."))
    with pytest.raises(RuntimeError, match=f"^{part} of a .* the kernels read its parameters and do not call it"):
        model(*make_batch())


def test_a_norm_that_got_a_weight_is_refused_by_name():
    model = make_model()
    model.blocks[1].norm1.weight = torch.nn.Parameter(torch.full((C,), 2.0))
    with pytest.raises(RuntimeError, match=r"^norm1 of a RoutedDiTBlock has affine parameters"):
        model(*make_batch())


MODERN = dtr.nn.BlockKind(norm="rms", affine=True, activation="swiglu", qk_norm=True)


@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
def test_a_model_of_another_kind(scope):
    """With rotary embeddings, which any function of queries and keys stands for here."""
    model, (x, t, y) = make_model(scope=scope, kind=MODERN, rope=torch.tanh), make_batch()
    mask = ROUTING.window(t, model.routed_channels).mask()
    torch.testing.assert_close(model(x, t, y), dtr.reference.dit(model, x, t, y, mask), rtol=1e-9, atol=1e-9)
    without = make_model(scope=scope, kind=MODERN)
    without.load_state_dict(model.state_dict())
    assert (without(x, t, y) - model(x, t, y)).abs().max() > 1e-3


def test_parameters_of_a_block_of_another_kind():
    block = dtr.nn.RoutedDiTBlock(48, 4, mlp_ratio=2, kind=MODERN)
    found = {name: list(p.shape) for name, p in block.named_parameters() if name.endswith("weight")}
    norms = {"norm1.weight": [48], "norm2.weight": [48], "attn.q_norm.weight": [12], "attn.k_norm.weight": [12]}
    layers = {"attn.qkv.weight": [144, 48], "attn.proj.weight": [48, 48], "adaLN_modulation.1.weight": [288, 48]}
    assert found == norms | layers | {"mlp.fc1.weight": [192, 48], "mlp.fc2.weight": [48, 96]}
    assert "norm1.bias" in dict(dtr.nn.RoutedDiTBlock(48, 4, kind=dtr.nn.BlockKind(affine=True)).named_parameters())


@pytest.mark.parametrize(
    "kind, error, message",
    [
        (dtr.nn.BlockKind(norm="batch"), ValueError, "norm must be one of"),
        (dtr.nn.BlockKind(activation="relu"), ValueError, "activation must be one of"),
        (dtr.nn.BlockKind(affine="yes"), TypeError, "affine must be True or False, got 'yes'"),
        (dtr.nn.BlockKind(qk_norm="no"), TypeError, "qk_norm must be True or False, got 'no'"),
        ("rms", TypeError, "kind must be a BlockKind, got 'rms'"),
    ],
)
def test_unknown_kinds_are_refused(kind, error, message):
    with pytest.raises(error, match=message):
        dtr.nn.RoutedDiTBlock(48, 4, kind=kind)


@pytest.mark.parametrize("alter", [_adapt, _hook], ids=["adapter", "hook"])
def test_a_changed_projection_is_called_with_zeros_of_inactive_heads(alter):
    """In scope "inner", where an unchanged one is read."""
    model, (x, t, y) = make_model(scope="inner"), make_batch()
    before = model(x, t, y)
    alter(model, "blocks.1.attn.proj")
    mask = ROUTING.window(t, model.routed_channels).mask()
    torch.testing.assert_close(model(x, t, y), oracle(model, x, t, y, mask), rtol=1e-9, atol=1e-9)
    assert (model(x, t, y) - before).abs().max() > 1e-3


def test_no_active_head_is_refused_when_a_model_is_made():
    with pytest.raises(ValueError, match=r"beta 0\.1 of \d+ attention heads leaves none active"):
        make_model(dtr.DenoisingTaskRouting(T, beta=0.1), scope="inner")


def test_masks_of_channels_are_no_masks_of_heads():
    model = make_model(scope="inner")
    with pytest.raises(RuntimeError, match='is a mask of channels, which scope "inner" has not'):
        model.load_state_dict(public_checkpoint(model, ROUTING))


@pytest.mark.parametrize("alter", [_adapt, _hook], ids=["adapter", "hook"])
@pytest.mark.parametrize("path", ["blocks.1.attn.proj", "blocks.1.adaLN_modulation", "x_embedder.proj"])
def test_a_changed_part_that_is_called_is_used(alter, path):
    model, batch = make_model(), make_batch()
    before = model(*batch)
    alter(model, path)
    assert (model(*batch) - before).abs().max() > 1e-3
