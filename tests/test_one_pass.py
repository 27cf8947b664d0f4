"""The engines that take all K gradients from one pass, against the one that computes each from its own samples."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from functools import partial

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dtr_kernels as dtr
from dtr_kernels.surgery import low_memory, one_pass, per_cluster
from dtr_kernels.surgery.batch import Batch
from dtr_kernels.surgery.buffer import GradientBuffer
from dtr_kernels.surgery.interception import Interception
from dtr_kernels.surgery.leaves import Leaves
from dtr_kernels.surgery.segments import Segments
from dtr_kernels.surgery.separation import Separation

SIZES = [(2, 2, 1, 1), (3, 0, 1, 2), (6,), (0, 1, 0, 1, 0)]
by_sizes = pytest.mark.parametrize("sizes", SIZES, ids=str)
pytestmark = pytest.mark.usefixtures("one_thread")


# --- models ----------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 7, bias=False), nn.Tanh())
        self.out = nn.Linear(7, 3)

    def forward(self, x):
        return self.out(self.layers(x) + self.layers[1:](self.layers[0](x)))  # every layer twice


class ConvNet(nn.Module):
    """Images and labels, through every kind of layer that has a rule."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, (3, 1), padding="same", groups=2, bias=False)
        self.labels = nn.Embedding(10, 8, padding_idx=3)
        self.group_norm = nn.GroupNorm(2, 8)
        self.batch_norm = nn.BatchNorm2d(8).eval()
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1, groups=2)
        self.flat = nn.Conv1d(4, 6, 2, dilation=2)
        self.norm = nn.LayerNorm((6, 5))
        self.rms = nn.RMSNorm(5)
        self.narrow = nn.LayerNorm(5, bias=False)
        for p in self.parameters():
            nn.init.normal_(p)  # no norm of nearly nothing, which makes errors large

    def forward(self, x, y):
        x = F.relu(self.stem(x), inplace=True)
        x = self.batch_norm(self.group_norm(self.grouped(x) + self.labels(y)[:, :, None, None]))
        x = self.flat(self.up(x).mean(2)[:, :, :7])
        return self.narrow(self.rms(self.norm(x)))

    def train(self, mode=True):
        super().train(mode)
        self.batch_norm.eval()
        return self


class Tricks(nn.Module):
    """Parameters that are not simply a layer's weight."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 4, 6))
        self.flat_position = nn.Parameter(torch.randn(4, 6))
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.missing = nn.Parameter(torch.randn(6))
        self.gain = nn.Parameter(torch.randn(()))
        self.scale = nn.Parameter(torch.randn(6))
        self.matrix = nn.Parameter(torch.randn(6, 6))
        self.table = nn.Parameter(torch.randn(10, 6))
        self.direction = nn.Parameter(torch.randn(6, 6))
        self.low, self.high = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x, y):
        x = x + self.position
        x = torch.where((y > 4)[:, None, None], x, self.missing)
        x += self.flat_position[:, :6] * 0.5
        x = (1 + self.scale) * x / (self.gain**2 + 1)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        x = x @ self.matrix.t() + x.flatten(0, 1).mm(self.matrix).view_as(x)
        x = F.linear(x, F.normalize(self.direction, dim=1), self.bias)
        x = x + F.linear(torch.tanh(x), self.low @ self.high)
        x = x[..., :4] @ self.matrix[:, 1:5].mT + x
        x = torch.addmm(self.bias, x.reshape(-1, 6), self.matrix).view_as(x)
        x = x + self.table[y][:, None] + self.table[torch.arange(5)]
        return x.mul_(self.gain).addcmul(x, self.bias.detach() + self.scale)


class Steps(nn.Module):
    """The steps of routed blocks, with a window over channels or over heads."""

    def __init__(self, inner, norm, activation):
        super().__init__()
        self.inner, self.kind = inner, {"norm": norm, "activation": activation}
        self.modulation, self.layer = nn.Linear(8, 48), nn.Linear(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(12 if activation == "swiglu" else 24, 8)

    def forward(self, x, c, t):
        s1, k1, g1, s2, k2, g2 = self.modulation(c).chunk(6, 1)
        window = dtr.DenoisingTaskRouting(num_timesteps=50, beta=0.5).window(t, 4 if self.inner else 8)
        weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        layer, norm = (self.layer.weight, self.layer.bias), self.kind["norm"]
        if self.inner:
            x, z = dtr.ops.inner_linear(x, s1, k1, *layer, window, norm=norm)
            branch = dtr.ops.inner_projection(z, *layer, window)
            x, out = dtr.ops.inner_mlp(x, s2, k2, *weights, branch, g1, window, **self.kind)
        else:
            x, branch = dtr.ops.routed_linear(x, s1, k1, *layer, window, norm=norm)
            x, out = dtr.ops.routed_mlp(x, s2, k2, *weights, branch, g1, window, **self.kind)
        return dtr.ops.gated_residual(x, out, g2)


def double(model):
    return copy.deepcopy(model).double()


def images(samples):
    """The first label is the padding index."""
    labels = torch.randint(10, (samples,))
    labels[0] = 3
    return torch.randn(samples, 3, 7, 7), labels


def square_loss(model):
    def loss(*tensors):
        return model(*tensors).square().flatten(1).mean(1)

    return loss


def dit(**settings):
    model = dtr.nn.DiT(
        input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=10, class_dropout_prob=0, **settings
    )
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.15)
    return model


def dit_batch(samples, channels=4):
    return torch.randn(samples, channels, 8, 8), torch.randint(50, (samples,)), torch.randint(10, (samples,))


def wide_position_dit():
    """In the manner of timm: a position embedding that is learned."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.dit = models.facebook_dit(qk_norm=True)
            self.pos_embed = nn.Parameter(torch.randn(1, 16, models.DIM))
            embed = self.dit.x_embedder
            embed.register_forward_hook(lambda *args: args[2] + self.pos_embed.mT.unflatten(2, (4, 4)))

        def forward(self, *args):
            return self.dit(*args)

    return Model()


# --- comparison ------------------------------------------------------------------------------------------------------


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def by(engine, model, tensors, sizes, loss=square_loss, scale=1.0, buffer=None):
    """The gradients [K] lists by parameter, values and names that an engine gives."""
    parameters = trainable(model)
    buffer = buffer or GradientBuffer(parameters, len(sizes))
    batch = Batch(tuple(tensors), sizes)

    def scaled(value):
        return value * scale / len(sizes)

    leaves = Leaves()
    leaves.put_away(parameters.values())
    if engine is per_cluster:
        values, names = per_cluster.accumulate(buffer, parameters, batch.losses(loss(model)), scaled, leaves)
    else:
        values, names = one_pass.accumulate(buffer, parameters, loss(model), batch, scaled, Separation(), leaves)
    leaves.put_back()
    leaves.add([])
    rows = [dict(zip(parameters, buffer.gradient(k), strict=True)) for k in range(len(sizes))]
    return rows, values, names


def accumulate(buffer, parameters, loss, *tensors, sizes=(2, 2, 2)):
    """One pass with losses as they are."""
    leaves, batch = Leaves(), Batch(tensors, sizes)
    result = one_pass.accumulate(buffer, parameters, loss, batch, lambda value: value, Separation(), leaves)
    leaves.put_back()
    leaves.add([])
    return result


def stream(model, loss, *tensors, sizes=(2, 2, 2)):
    """The same by low_memory."""
    return low_memory.stream(trainable(model), loss, Batch(tensors, sizes), lambda value: value, Separation(), Leaves())


def as_double(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def check_close(ours, plain, exact, dtype):
    """At most twice the error of the engine that passes the clusters one by one, plus a few roundings."""
    eps = torch.finfo(dtype).eps
    for row, plain_row, exact_row in zip(ours, plain, exact, strict=True):
        largest = max(truth.abs().max() for truth in exact_row.values())  # some gradients are sums that cancel to zero
        for name, truth in exact_row.items():
            bound = 2 * (plain_row[name] - truth).abs().max() + 30 * eps * largest
            error = (row[name] - truth).abs().max()
            assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"


def check_equal_to_per_cluster(model, tensors, sizes, loss=square_loss, dtype=torch.float32):
    exact, *_ = by(per_cluster, double(model), as_double(tensors), sizes, loss)
    plain, values, names = by(per_cluster, model, tensors, sizes, loss)
    ours, our_values, our_names = by(one_pass, model, tensors, sizes, loss)
    assert our_names == names
    for value, our_value in zip(values, our_values, strict=True):
        assert (value is None) == (our_value is None)
        if value is not None:
            torch.testing.assert_close(our_value, value, rtol=30 * torch.finfo(dtype).eps, atol=1e-6)
    check_close(ours, plain, exact, dtype)
    wide, *_ = by(one_pass, double(model), as_double(tensors), sizes, loss)
    check_close(wide, exact, exact, torch.float64)


# --- the same gradients ----------------------------------------------------------------------------------------------


@by_sizes
def test_layers_and_parameters_in_other_places(seed, sizes):
    samples, model = sum(sizes), ConvNet()
    model.batch_norm.running_mean.normal_()
    check_equal_to_per_cluster(model, images(samples), sizes)
    check_equal_to_per_cluster(Mlp(), [torch.randn(samples, 5)], sizes)
    check_equal_to_per_cluster(Tricks(), (torch.randn(samples, 4, 6), torch.randint(10, (samples,))), sizes)


@by_sizes
@pytest.mark.parametrize("scope", [None, *dtr.reference.SCOPES])
def test_dit(seed, sizes, scope):
    routing = {} if scope is None else {"routing": dtr.DenoisingTaskRouting(num_timesteps=50), "scope": scope}
    check_equal_to_per_cluster(dit(**routing), dit_batch(sum(sizes)), sizes)


@by_sizes
@pytest.mark.parametrize("norm, activation", [("layer", "gelu"), ("layer", "silu"), ("rms", "swiglu")])
@pytest.mark.parametrize("inner", [False, True])
def test_steps_of_blocks(seed, sizes, inner, norm, activation):
    samples = sum(sizes)
    batch = torch.randn(samples, 5, 8), torch.randn(samples, 8), torch.randint(50, (samples,))
    check_equal_to_per_cluster(Steps(inner, norm, activation), batch, sizes)


@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
def test_dit_of_another_kind(seed, scope):
    kind = dtr.nn.BlockKind(norm="rms", affine=True, activation="swiglu", qk_norm=True)
    model = dit(routing=dtr.DenoisingTaskRouting(num_timesteps=50), scope=scope, kind=kind, rope=torch.sin)
    check_equal_to_per_cluster(model, dit_batch(6), SIZES[1])


def test_dit_with_random_routing(seed):
    model = dit(routing=dtr.RandomRouting(num_timesteps=50, beta=0.8, seed=seed))
    check_equal_to_per_cluster(model, dit_batch(6), SIZES[1])


@pytest.mark.parametrize("make", [models.facebook_dit, models.public_dtr, models.lightning_dit, wide_position_dit])
def test_public_models_and_swapped_ones(seed, make):
    check_equal_to_per_cluster(make(), dit_batch(6, channels=3), SIZES[1])
    if make is not wide_position_dit:
        check_equal_to_per_cluster(dtr.swap_blocks(make()), dit_batch(6, channels=3), SIZES[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_parameters(seed, dtype):
    """Each engine against fp64 on the same rounded parameters."""
    for model, tensors in (
        (Mlp(), [torch.randn(6, 5)]),
        (ConvNet(), images(6)),
        (Tricks(), (torch.randn(6, 4, 6) / 4, torch.randint(10, (6,)))),
        (dit(routing=dtr.DenoisingTaskRouting(num_timesteps=50)), dit_batch(6)),
    ):
        tensors = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
        check_equal_to_per_cluster(model.to(dtype), tensors, SIZES[1], dtype=dtype)


def autocast_loss(model):
    def loss(*tensors):
        with torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype == torch.float32):
            return square_loss(model)(*tensors).to(tensors[0].dtype)

    return loss


@pytest.mark.parametrize(
    "make, batch", [(ConvNet, images), (dit, dit_batch), (Mlp, lambda samples: [torch.randn(samples, 5)])]
)
def test_autocast(seed, make, batch):
    model = make()
    check_equal_to_per_cluster(model, batch(6), SIZES[1], autocast_loss, dtype=torch.bfloat16)
    routed = dit(routing=dtr.DenoisingTaskRouting(num_timesteps=50))
    check_equal_to_per_cluster(routed, dit_batch(6), SIZES[1], autocast_loss, dtype=torch.bfloat16)


def test_backward_inside_of_autocast_rounds_no_gradient_down(seed):
    """The buffer is fp32, and sums into it are too, even if the caller left autocast on."""
    model, x = Mlp(), torch.randn(6, 5)
    outside, *_ = by(one_pass, model, [x], SIZES[1])
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        rows, *_ = by(
            one_pass, model, [x], SIZES[1], lambda model: torch.autocast("cpu", enabled=False)(square_loss(model))
        )
    torch.testing.assert_close(rows, outside, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("swapped", [True, False])
def test_checkpointing(seed, reentrant, swapped):
    model = models.facebook_dit(reentrant=reentrant)
    check_equal_to_per_cluster(dtr.swap_blocks(model) if swapped else model, dit_batch(6, channels=3), SIZES[1])


def test_checkpointed_function_of_derived_weights(seed):
    model = Tricks()

    def loss(model):
        return lambda x, y: checkpoint(model, x, y, use_reentrant=False).square().mean((1, 2))

    check_equal_to_per_cluster(model, (torch.randn(6, 4, 6), torch.randint(10, (6,))), SIZES[1], loss)


def test_micro_batches_add_up(seed):
    model, sizes = ConvNet(), SIZES[1]
    first, second = images(6), images(6)
    parts = [copy.deepcopy(by(per_cluster, model, batch, sizes)[0]) for batch in (first, second)]
    expected = [{name: a[name] + b[name] for name in a} for a, b in zip(*parts, strict=True)]
    buffer = GradientBuffer(trainable(model), len(sizes))
    by(one_pass, model, first, sizes, buffer=buffer)
    rows, *_ = by(one_pass, model, second, sizes, buffer=buffer)
    torch.testing.assert_close(rows, expected)


def test_frozen_and_unused_parameters(seed):
    model = ConvNet()
    model.unused = nn.Linear(2, 2)
    model.stem.weight.requires_grad_(False)
    model.group_norm.bias.requires_grad_(False)
    tensors = images(6)
    check_equal_to_per_cluster(model, tensors, SIZES[1])
    _, _, names = by(one_pass, model, tensors, SIZES[1])
    assert names == {name for name in trainable(model) if not name.startswith("unused")}


def test_parameters_that_are_not_asked_for_get_their_ordinary_gradient(seed):
    model, x = Mlp(), torch.randn(6, 5)
    square_loss(model)(x).reshape(3, 2).mean(1).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    asked = {"out.weight": model.out.weight}
    buffer = GradientBuffer(asked, 3)
    accumulate(buffer, asked, square_loss(model), x)
    torch.testing.assert_close(sum(buffer.gradient(k)[0] for k in range(3)), expected.pop("out.weight"))
    for name, grad in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad)
    assert model.out.weight.grad is None


def test_numbers_leave_the_dtype_as_it_is(seed):
    """A parameter without dimensions is to PyTorch a number, which does not make bf16 samples fp32."""
    model = Holder(lambda m, x: m.layer(m.layer(x) * m.gain)).bfloat16()
    model.gain = nn.Parameter(torch.randn(()))
    check_equal_to_per_cluster(model, [torch.randn(6, 3, 4).bfloat16()], SIZES[1], dtype=torch.bfloat16)


def test_sums_of_narrow_rows_are_wide(seed):
    """A bias's gradient can be too large for fp16 where every sample's is not."""
    rows = torch.zeros(3, 2)
    Segments((1, 0, 2)).add_sums(rows, torch.full((9, 2), 3e4, dtype=torch.float16))
    assert torch.equal(rows, 3e4 * torch.tensor([[3.0], [0], [6]]).expand(3, 2))


def test_infinity_arrives(seed):
    model, x = Mlp(), torch.randn(6, 5)
    x[5, 0] = torch.inf
    rows, *_ = by(one_pass, model, [x], (3, 0, 1, 2), scale=2.0)
    assert not rows[3]["layers.0.weight"].isfinite().all()
    assert rows[0]["layers.0.weight"].isfinite().all()


def test_one_forward_pass_and_one_backward_pass(seed):
    model = dit()
    calls = []
    for name, module in model.named_modules():
        if name.endswith(("attn.proj", "adaLN_modulation", "t_embedder")):  # which are called
            module.register_forward_hook(lambda module, *_: calls.append(module))
    model.final_layer.register_full_backward_hook(lambda module, *_: calls.append("backward"))
    counts = {}
    for engine in "one_pass", "per_cluster":
        surgery = dtr.GradientSurgery(model.parameters(), 3, engine=engine)
        for _ in range(2):  # the first batch of a shape is also checked for mixed samples
            calls.clear()
            surgery.backward_batch(square_loss(model), torch.arange(6) % 3, *dit_batch(6))
        counts[engine] = Counter(calls)
    assert set(counts["one_pass"].values()) == {1} and counts["one_pass"]["backward"] == 1
    assert counts["per_cluster"] == Counter(dict.fromkeys(counts["one_pass"], 3))


def test_nothing_of_the_callers_is_changed(seed):
    model, (x, y) = ConvNet(), images(6)
    x.requires_grad_()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = {name: (p.grad, p.grad.clone(), p._version) for name, p in model.named_parameters()}

    def broken(x, y):
        raise KeyError("of the caller")

    def check():
        for name, p in model.named_parameters():
            grad, value, version = before[name]
            assert p.grad is grad and torch.equal(grad, value) and p._version == version
            assert not vars(p).keys() - {"_one_pass"} and "_one_pass" not in vars(p)
        assert "_one_pass" not in vars(x) and "_one_pass" not in vars(y)

    by(one_pass, model, (x, y), SIZES[1])
    check()
    for engine in partial(accumulate, GradientBuffer(trainable(model), 4), trainable(model)), partial(stream, model):
        with pytest.raises(KeyError, match="of the caller"):
            engine(broken, x, y, sizes=SIZES[1])
        check()


# --- refusals --------------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A layer and a parameter, used as ``forward`` says."""

    def __init__(self, forward, *layers):
        super().__init__()
        self.use = forward
        self.layer = nn.Linear(4, 4)
        self.p = nn.Parameter(torch.randn(4, 4))
        self.more = nn.ModuleList(layers)

    def forward(self, x):
        return self.use(self, x)


class Hidden(torch.autograd.Function):
    """x @ p where no function call shows it."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.save_for_backward(x, p)
        return x @ p

    @staticmethod
    def backward(ctx, dout):
        x, p = ctx.saved_tensors
        return dout @ p.mT, x.flatten(0, -2).mT @ dout.flatten(0, -2)


def sequence_first_flattened(m, x):
    return m.layer(x.permute(1, 0, 2).reshape(-1, 4)).reshape(x.shape[1], x.shape[0], 4).permute(1, 0, 2)


def own_gradient(m, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(m.layer(x).square().sum(), x, create_graph=True)[0]


REFUSED = {
    "einsum": (Holder(lambda m, x: torch.einsum("bnc,cd->bnd", x, m.p)), "einsum.*'p'.*no rule"),
    "attention": (
        Holder(lambda m, x: m.more[0](x, x, x)[0], nn.MultiheadAttention(4, 2, batch_first=True)),
        "multi_head_attention_forward.*in_proj_weight.*no rule",
    ),
    "matrix on the left": (Holder(lambda m, x: m.p @ x), "matmul.*'p'.*samples @ matrix"),
    "sequence first": (
        Holder(lambda m, x: m.layer(x.transpose(0, 1)).transpose(0, 1)),
        "linear.*'layer.weight'.*dim.* 0",
    ),
    "sequence first, flattened": (Holder(sequence_first_flattened), "linear.*'layer.weight'.*dimension 0"),
    "batch twice": (Holder(lambda m, x: m.layer(torch.cat([x, x]))[: len(x)]), "linear.*'layer.weight'.*dimension 0"),
    "samples one by one": (
        Holder(lambda m, x: torch.stack([m.layer(each) for each in x])),
        "linear.*'layer.weight'.*dim",
    ),
    "sum over the batch": (Holder(lambda m, x: x + m.layer(x.mean(0))), "linear.*'layer.weight'.*dimension 0"),
    "weight of the batch": (Holder(lambda m, x: F.linear(x, m.p * x.mean((0, 1)))), "'p'.*dimension 0"),
    "batch norm": (Holder(lambda m, x: m.more[0](x), nn.BatchNorm1d(6)), "batch_norm.*'more.0.weight'.*mixes"),
    "max_norm": (Holder(lambda m, x: m.more[0](x.long()), nn.Embedding(9, 4, max_norm=1)), "embedding.*max_norm"),
    "changed in place": (Holder(lambda m, x: (m.p * 2).mul_(x)), "mul_.*'p'.*in place"),
    "own gradient": (Holder(own_gradient), "differentiates the model itself"),
    "torch.func": (Holder(lambda m, x: torch.func.jvp(m.layer, (x,), (x,))[1]), "'layer.weight'.*torch.func"),
    "loss of all samples": (Holder(lambda m, x: m.layer(x) / x.std()), "mixed the samples"),
    "unknown function": (Holder(lambda m, x: F.bilinear(x, x, m.p[None])), "bilinear.*'p'.*no rule"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(seed, name):
    model, message = REFUSED[name]
    x = torch.randint(9, (6, 6, 4)).float()  # as many tokens as samples
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    buffer = GradientBuffer(trainable(model), 3)
    for engine in partial(accumulate, buffer, trainable(model)), partial(stream, model):
        with pytest.raises(one_pass.Unsupported, match=message):
            engine(square_loss(model), x)
    assert not any(row.any() for k in range(3) for row in buffer.gradient(k))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def test_refusal_of_what_no_function_shows(seed):
    model = Holder(lambda m, x: Hidden.apply(m.layer(x), m.p))
    model.p.grad = torch.ones(4, 4)
    with pytest.raises(one_pass.Unsupported, match="'p' past the rules"):
        by(one_pass, model, [torch.randn(6, 2, 4)], (2, 2, 2))
    assert torch.equal(model.p.grad, torch.ones(4, 4))


def test_custom_functions_of_samples_alone(seed):
    model = Holder(lambda m, x: m.layer(Hidden.apply(m.layer(x), torch.eye(4, dtype=x.dtype))))
    check_equal_to_per_cluster(model, [torch.randn(6, 2, 4)], SIZES[1])


def test_refusal_of_a_mixture_with_other_parameters(seed):
    model = Holder(lambda m, x: F.linear(x, m.p + m.layer.weight))
    asked = {"p": model.p}
    with pytest.raises(one_pass.Unsupported, match=r"'p'.*not in params"):
        accumulate(GradientBuffer(asked, 3), asked, square_loss(model), torch.randn(6, 2, 4))


MIXING = {
    "flip and back": lambda m, x: m.layer(x.flip(0)).flip(0),
    "an order and back": lambda m, x: m.layer(x[torch.arange(6).roll(2)])[torch.arange(6).roll(-2)],
    "softmax over the batch": lambda m, x: m.layer(x).softmax(0),
    "cumulative sum": lambda m, x: m.layer(x).cumsum(0),
    "mixup": lambda m, x: m.layer(x + 0.5 * x.flip(0)) * m.layer(x).flip(0),
    "batch statistics": lambda m, x: F.batch_norm(m.layer(x), None, None, training=True),
    "all pairs": lambda m, x: torch.cdist(m.layer(x), m.layer(x)),
}


@pytest.mark.parametrize("engine", ["one_pass", "low_memory"])
@pytest.mark.parametrize("forward", MIXING.values(), ids=MIXING)
def test_refusal_of_mixed_samples(seed, forward, engine):
    """Mixing that keeps the length of dimension 0 is detected by what it leaves in the gradients of other clusters."""
    model, x = Holder(forward), torch.randn(6, 4)
    surgery = dtr.GradientSurgery(model.named_parameters(), 3, engine=engine)
    for _ in range(2):
        with pytest.raises(one_pass.Unsupported, match=r"other clusters|mixed the samples"):
            surgery.backward_batch(square_loss(model), torch.tensor([0, 0, 1, 1, 2, 2]), x)
    assert all(p.grad is None for p in model.parameters())


def test_separation_is_checked_once_for_each_shape(seed, monkeypatch):
    passes = []
    backward = Interception.backward
    monkeypatch.setattr(
        Interception, "backward", lambda self, *args, **kwargs: [passes.append(1), backward(self, *args, **kwargs)]
    )
    model = Mlp()
    surgery = dtr.GradientSurgery(model.parameters(), 2, engine="one_pass")
    counts = []
    for samples in (6, 6, 8, 6):
        passes.clear()
        surgery.backward_batch(square_loss(model), torch.arange(samples) % 2, torch.randn(samples, 5))
        counts.append(len(passes))
    assert counts == [3, 1, 3, 1]


@pytest.mark.parametrize("engine", ["per_cluster", "one_pass", "low_memory"])
def test_other_parameters_get_the_gradient_of_the_mean_loss(seed, engine):
    model, x = Mlp(), torch.randn(6, 5)
    others = [model.layers[0].weight, model.layers[0].bias]
    surgery = dtr.GradientSurgery([model.layers[2].weight, *model.out.parameters()], 3, engine=engine)
    expected = torch.autograd.grad(square_loss(model)(x).mean(), others)
    for step in (1, 2):  # added to what is there
        surgery.backward_batch(square_loss(model), torch.arange(6) % 3, x)
        for p, gradient in zip(others, expected, strict=True):
            torch.testing.assert_close(p.grad, step * gradient)


@pytest.mark.parametrize("engine", ["one_pass", "auto"])
def test_other_parameters_after_a_failure_of_one_pass(seed, engine):
    """It fails in its backward pass; nothing of it may be left, and the fallback adds its own."""
    model, x = Holder(lambda m, x: Hidden.apply(m.layer(x), m.p)), torch.randn(6, 4)
    surgery = dtr.GradientSurgery([("p", model.p)], 3, engine=engine)
    for step in (1, 2):
        model.zero_grad()
        if engine == "one_pass":
            with pytest.raises(one_pass.Unsupported):
                surgery.backward_batch(square_loss(model), torch.arange(6) % 3, x)
            assert model.layer.weight.grad is None
        else:
            surgery.backward_batch(square_loss(model), torch.arange(6) % 3, x)
            (expected,) = torch.autograd.grad(square_loss(model)(x).mean(), model.layer.weight)
            torch.testing.assert_close(model.layer.weight.grad, expected, msg=f"step {step}")


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_refusal_of_hooks_on_parameters(seed, hook):
    model = Mlp()
    getattr(model.out.weight, hook)(lambda _: None)
    with pytest.raises(one_pass.Unsupported, match=r"out\.weight.*hook"):
        by(one_pass, model, [torch.randn(6, 5)], (2, 2, 2))


def test_refusal_of_compiled_code(seed):
    model = Mlp()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(6, 5)
    parameters = trainable(model)
    for _ in range(2):  # before it has compiled anything, and after
        with pytest.raises(one_pass.Unsupported, match="compiled code"):
            by(one_pass, model, [x], (2, 2, 2), lambda _: square_loss(compiled))
        compiled(x)
    check_equal_to_per_cluster(model, [x], (2, 2, 2))
    assert all(p.grad is None for p in parameters.values())


def test_a_loss_that_is_none(seed):
    model, x = Mlp(), torch.randn(6, 5)
    with pytest.raises(ValueError, match="one loss for each of the 6 samples"):
        by(one_pass, model, [x], (2, 2, 2), lambda model: lambda x: model(x))
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        by(one_pass, model, [x], (2, 2, 2), lambda model: lambda x: x.mean(1))


# --- low memory ------------------------------------------------------------------------------------------------------


def check_low_memory(model, tensors, sizes, loss=square_loss, scale=1.0, error=1e-9):
    """Gram matrix and update against those of the whole buffer."""
    parameters = trainable(model)
    buffer = GradientBuffer(parameters, len(sizes))
    _, values, names = by(per_cluster, model, tensors, sizes, loss, scale, buffer)
    batch = Batch(tuple(tensors), sizes)
    streamed, our_values, our_names = low_memory.stream(
        parameters, loss(model), batch, lambda value: value * scale / len(sizes), Separation(), Leaves()
    )
    assert our_names == names
    assert [v is None for v in our_values] == [v is None for v in values]
    gram = buffer.gram()
    assert streamed.gram().dtype == torch.float64
    assert (streamed.gram() - gram).abs().max() <= error * gram.abs().max()
    weights = torch.rand(len(sizes), dtype=torch.float64, device=gram.device)
    update, expected = streamed.weighted_sum(weights), buffer.weighted_sum(weights)
    for p, new in zip(parameters.values(), update, strict=True):
        assert new.shape == p.shape and new.dtype == p.dtype and p.grad is None
    update, expected = (torch.cat([new.flatten() for new in whole]) for whole in (update, expected))
    assert (update - expected).abs().max() <= error * expected.abs().max()


@by_sizes
def test_low_memory(seed, sizes):
    samples = sum(sizes)
    routed = dit(routing=dtr.DenoisingTaskRouting(num_timesteps=50))
    check_low_memory(double(Mlp()), as_double([torch.randn(samples, 5)]), sizes)
    check_low_memory(double(ConvNet()), as_double(images(samples)), sizes)
    check_low_memory(double(routed), as_double(dit_batch(samples)), sizes, scale=8.0)


def test_low_memory_in_fp32_and_autocast(seed):
    routed = dit(routing=dtr.DenoisingTaskRouting(num_timesteps=50))
    check_low_memory(routed, dit_batch(6), SIZES[1], scale=8.0, error=1e-3)
    check_low_memory(routed, dit_batch(6), SIZES[1], autocast_loss, error=0.1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_low_memory_checkpointed(seed, reentrant):
    model = double(models.facebook_dit(reentrant=reentrant))
    check_low_memory(model, as_double(dit_batch(6, channels=3)), SIZES[1])


def test_low_memory_of_tied_and_derived_weights_and_a_use_without_effect(seed):
    tensors = torch.randn(6, 4, 6).double(), torch.randint(10, (6,))
    check_low_memory(Tricks().double(), tensors, SIZES[1])
    model = Holder(lambda m, x: (m.layer(x), m.layer(x + 1))[0])
    check_low_memory(model.double(), [torch.randn(6, 2, 4).double()], SIZES[1])


@pytest.fixture
def most_held(monkeypatch):
    """The largest number of elements held as K gradients at one time, so far."""
    alive, most = [], [0]
    add = low_memory._IntoGram.add

    def watched_add(self, name, write):
        def watched_write(rows):
            alive.append(weakref.ref(rows))
            most[0] = max(most[0], sum(rows().numel() for rows in set(alive) if rows() is not None))
            write(rows)

        add(self, name, watched_write)

    monkeypatch.setattr(low_memory._IntoGram, "add", watched_add)
    return most


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_low_memory_never_holds_more_than_one_parameters_gradients(seed, most_held, reentrant):
    for model, channels in (models.facebook_dit(reentrant=reentrant), 3), (dit(), 4):
        stream(model, square_loss(model), *dit_batch(6, channels))
        assert most_held[0] == 3 * max(p.numel() for p in trainable(model).values())
        most_held[0] = 0


def test_low_memory_holds_tied_weights_until_their_last_use(seed, most_held):
    layers = [nn.Linear(4, 4) for _ in range(5)]
    model = Holder(lambda m, x: nn.Sequential(*m.more, *m.more)(x), *layers)
    stream(model, square_loss(model), torch.randn(6, 4))
    assert most_held[0] == 3 * 5 * (16 + 4)


# --- through GradientSurgery -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["one_pass", "low_memory"])
def test_gradient_surgery(seed, engine):
    """The batch in any order, PCGrad's random order, and a scaler."""
    model = dit(routing=dtr.DenoisingTaskRouting(num_timesteps=50))
    tensors = dit_batch(9)
    clusters = torch.randint(4, (9,))
    updates = []
    for name in "per_cluster", engine:
        generator = torch.Generator().manual_seed(seed)
        surgery = dtr.GradientSurgery(model.named_parameters(), 4, engine=name, generator=generator)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        values = surgery.backward_batch(square_loss(model), clusters, *tensors, scaler=scaler)
        updates.append({name: p.grad for name, p in trainable(model).items()} | {"values": values})
        model.zero_grad()
    for name, expected in updates[0].items():
        torch.testing.assert_close(updates[1][name], expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("swapped", [True, False])
def test_on_a_gpu(seed, reentrant, swapped):
    """Where autograd has threads of its own, into which the interception must follow."""
    model = models.facebook_dit(reentrant=reentrant).cuda()
    model = dtr.swap_blocks(model, dtr.DenoisingTaskRouting(num_timesteps=50)) if swapped else model
    tensors = [t.cuda() for t in dit_batch(6, channels=3)]
    check_equal_to_per_cluster(model, tensors, SIZES[1])
    check_low_memory(model, tensors, SIZES[1], error=1e-3)
