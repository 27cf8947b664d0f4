"""The routed residual block of ADM: the oracle against the paper's form, the skipping against the oracle."""

from __future__ import annotations

import copy
import importlib
import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from test_whole_benchmarks import CPU, assert_every_tensor_counts, assert_right, quick, sides_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from unets import Downsample, Upsample

import dtr_kernels as dtr
from benchmarks.cases import AUTOCAST, Options
from benchmarks.counts import ITEMSIZES
from benchmarks.suite import res_block as suite
from benchmarks.suite import whole
from dtr_kernels import ops, reference
from dtr_kernels.nn.res_block import RoutedResBlock, run_res_block
from dtr_kernels.routing import ChannelWindow
from dtr_kernels.verify import compare

pytestmark = pytest.mark.usefixtures("one_thread")

OP = importlib.import_module("dtr_kernels.ops.conv")  # the package has the function under that name
E = 5


class Form(NamedTuple):
    """A kind of block, by what differs from the plainest."""

    options: dict
    channels: int = 12
    groups: int = 4
    image: tuple[int, int] = (5, 4)


FORMS = {
    "plain": Form({}),
    "additive": Form({"use_scale_shift_norm": False}),
    "wider": Form({"out_channels": 20}),
    "narrower, 3x3 skip": Form({"out_channels": 8, "use_conv": True}),
    "up": Form({"up": True}),
    "down": Form({"down": True}),
    "up and narrower": Form({"up": True, "out_channels": 8}),
    "one group": Form({}, groups=1),
    "groups of one": Form({}, groups=12),
    "groups of two": Form({}, groups=6),
    "1 x 1": Form({}, image=(1, 1)),
    "2 x 1": Form({}, image=(2, 1)),
    "1 x 7": Form({}, image=(1, 7)),
    "2 x 3": Form({}, image=(2, 3)),
    "1 x 1, up": Form({"up": True}, image=(1, 1)),
    "3 x 2, down": Form({"down": True}, image=(3, 2)),
}
# First channel and width among 12: cutting groups, on their borders, at both ends, within one group, all but one, all.
WINDOWS = [(0, 5), (7, 5), (4, 8), (4, 4), (2, 6), (5, 2), (1, 11), (11, 1), (0, 12)]
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture
def skipping(monkeypatch):
    """Tests' images are small, for which skipping would not pay."""
    monkeypatch.setattr(OP, "_POSITIONS_PER_COPY", 0)
    monkeypatch.setattr(OP, "_LEAST_PRODUCTS", 0)


def random_block(form, device="cpu", dtype=torch.float64, **options):
    """A block in which everything matters: its last convolution is not zero, and its norms are affine."""
    block = RoutedResBlock(form.channels, E, num_groups=form.groups, **{**form.options, **options})
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5 if parameter.dim() == 1 else parameter[0].numel() ** -0.5)
    return block.to(device, dtype)


def random_inputs(form, batch=3, device="cpu", dtype=torch.float64, mean=1.0):
    """x, whose channels have means of their own, and emb."""
    x = torch.randn(batch, form.channels, *form.image) + mean * torch.randn(batch, form.channels, 1, 1)
    return [tensor.to(device, dtype).requires_grad_() for tensor in (x, torch.randn(batch, E))]


def shared(start, width, channels=12, device="cpu"):
    return ChannelWindow(torch.tensor([start], dtype=torch.int32, device=device), width, channels, shared_start=start)


def per_sample(starts, width, channels=12, device="cpu"):
    return ChannelWindow(torch.tensor(starts, dtype=torch.int32, device=device), width, channels)


def mask_of(window, x):
    return None if window is None else window.for_batch(len(x), x.device).mask()


def out_and_gradients(function, block, x, emb):
    """Return the output and the gradients of a random projection of it by x, emb and the parameters."""
    out = function(block, x, emb)
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
    leaves = [x, emb, *block.parameters()]
    return [out, *torch.autograd.grad(out, leaves, cotangent, allow_unused=True, materialize_grads=True)]


def assert_equal_to_oracle(block, x, emb, window):
    found = out_and_gradients(lambda *args: run_res_block(*args, window), block, x, emb)
    mask = mask_of(window, x)
    expected = out_and_gradients(lambda *args: reference.res_block(*args, mask), block, x, emb)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# --- the oracle ------------------------------------------------------------------------------------------------------


def brute_force_branch(block, z, emb):
    """h(z, emb) with every group normalised and every tap of a kernel summed by itself."""

    def normalised(z, norm):
        z = z.clone()
        per_group = norm.num_channels // norm.num_groups
        for b, g in itertools.product(range(len(z)), range(norm.num_groups)):
            group = z[b, g * per_group : (g + 1) * per_group]
            group.copy_((group - group.mean()) / (group.var(unbiased=False) + norm.eps).sqrt())
        return z * norm.weight[:, None, None] + norm.bias[:, None, None]

    def convolved(z, conv):
        H, W = z.shape[2:]
        padded = F.pad(z, (1, 1, 1, 1))
        taps = (
            torch.einsum("oc,bchw->bohw", conv.weight[:, :, i, j], padded[:, :, i : i + H, j : j + W])
            for i, j in itertools.product(range(3), range(3))
        )
        return sum(taps) + conv.bias[:, None, None]

    def silu(z):
        return z / (1 + (-z).exp())

    h = silu(normalised(z, block.in_layers[0]))
    if isinstance(block.h_upd, torch.nn.Upsample):
        h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
    elif isinstance(block.h_upd, torch.nn.AvgPool2d):
        H, W = (size // 2 * 2 for size in h.shape[2:])
        h = (h[..., :H:2, :W:2] + h[..., 1:H:2, :W:2] + h[..., :H:2, 1:W:2] + h[..., 1:H:2, 1:W:2]) / 4
    h = convolved(h, block.in_layers[2])
    linear = block.emb_layers[1]
    conditioning = (silu(emb) @ linear.weight.T + linear.bias)[:, :, None, None]
    if block.use_scale_shift_norm:
        scale, shift = conditioning.chunk(2, dim=1)
        h = normalised(h, block.out_layers[0]) * (1 + scale) + shift
    else:
        h = normalised(h + conditioning, block.out_layers[0])
    return convolved(silu(h), block.out_layers[3])


@forms
@torch.no_grad()
def test_oracle_is_the_papers_form(seed, form):
    """out = S(x) + h(m * x, emb); and where S is the identity, eq. 6: Block(m * x) + (1 - m) * x."""
    block = random_block(form).eval()
    x, emb = random_inputs(form)
    for mask in (torch.rand(3, 12) < 0.6, None):
        m = torch.ones(3, 12, 1, 1) if mask is None else mask[:, :, None, None].double()
        skip = block.skip_connection(block.x_upd(x))
        found = reference.res_block(block, x, emb, mask)
        torch.testing.assert_close(found, skip + brute_force_branch(block, m * x, emb))
        if skip is x:
            torch.testing.assert_close(found, reference.res_block(block, m * x, emb) + (1 - m) * x)


# --- the skipping, in fp64 -------------------------------------------------------------------------------------------


@forms
@pytest.mark.usefixtures("skipping")
def test_shared_windows(seed, form):
    block, (x, emb) = random_block(form), random_inputs(form)
    for start, width in WINDOWS:
        assert_equal_to_oracle(block, x, emb, shared(start, width))


@forms
def test_windows_per_sample(seed, form):
    block, (x, emb) = random_block(form), random_inputs(form)
    assert_equal_to_oracle(block, x, emb, per_sample([0, 3, 5], 7))
    assert_equal_to_oracle(block, x, emb, per_sample([8], 4))  # for all samples, but the host does not know it


@pytest.mark.usefixtures("skipping")
def test_windows_of_many_sizes(seed):
    for channels, groups in ((32, 8), (30, 3), (9, 9)):
        form = Form({"out_channels": 2 * groups}, channels, groups, (3, 5))
        block, (x, emb) = random_block(form), random_inputs(form, batch=2)
        for _ in range(8):
            width = int(torch.randint(1, channels, ()))
            start = int(torch.randint(channels - width + 1, ()))
            assert_equal_to_oracle(block, x, emb, shared(start, width, channels))


@pytest.fixture
def images(monkeypatch):
    """Shapes of what convolutions read, in their order."""
    conv, seen = F.conv2d, []

    def spy(image, *args, **options):
        seen.append(tuple(image.shape))
        return conv(image, *args, **options)

    monkeypatch.setattr(F, "conv2d", spy)
    return seen


@pytest.mark.usefixtures("skipping")
@torch.no_grad()
def test_channels_are_skipped(seed, images):
    """Groups outside the window reach no convolution but one of 3 x 3 positions, and deactivated channels no norm."""
    form = Form({}, 32, 8, (6, 5))
    block, (x, emb) = random_block(form), random_inputs(form)
    window = shared(9, 13, 32)  # of groups 2 to 5
    branch = run_res_block(block, x, emb, window) - x
    assert images == [(1, 16, 3, 3), (3, 16, 6, 5), (3, 32, 6, 5)]
    x[:, :9] = x[:, 22:] = float("inf")
    torch.testing.assert_close((run_res_block(block, x, emb, window) - x)[:, 9:22], branch[:, 9:22])


@torch.no_grad()
def test_skipping_where_it_pays(seed, images):
    """There is a limit to the size of images; it is the convolution's input that counts."""
    window = shared(9, 13, 32)
    for size, options, convolved in [
        (8, {}, [(4, 32, 8, 8)]),
        (48, {}, [(1, 16, 3, 3), (4, 16, 48, 48)]),
        (48, {"down": True}, [(4, 32, 24, 24)]),
        (24, {"up": True}, [(1, 16, 3, 3), (4, 16, 48, 48)]),
    ]:
        images.clear()
        form = Form(options, 32, 8, (size, size))
        block, (x, emb) = random_block(form, dtype=torch.float32), random_inputs(form, 4, dtype=torch.float32)
        run_res_block(block, x, emb, window)
        assert images[:-1] == convolved


@pytest.mark.parametrize(
    "window", [None, shared(0, 12), per_sample([0, 0, 0], 12)], ids=["none", "shared", "per sample"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unrouted_is_bit_for_bit(seed, window, dtype):
    """The block as PyTorch's modules compute it, GroupNorm in fp32."""
    form = Form({"out_channels": 20})
    block, (x, emb) = random_block(form, dtype=dtype), random_inputs(form, dtype=dtype)
    norm, act, conv = block.in_layers
    out_norm, *rest = block.out_layers

    def in_fp32(norm, z):
        return copy.deepcopy(norm).float()(z.float()).to(dtype)

    scale, shift = block.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
    h = in_fp32(out_norm, conv(act(in_fp32(norm, x)))) * (1 + scale) + shift
    expected = block.skip_connection(x) + torch.nn.Sequential(*rest)(h)
    assert torch.equal(block(x, emb, window), expected)
    assert torch.equal(reference.res_block(block, x, emb), expected)


@forms
@pytest.mark.usefixtures("skipping")
def test_gradcheck(seed, form):
    form = form._replace(image=tuple(min(size, 4) for size in form.image))
    block = random_block(form, dropout=0.0)
    names = [name for name, _ in block.named_parameters()]

    for window in (shared(1, 6), per_sample([6, 0], 5)):

        def function(x, emb, *parameters, window=window):
            return functional_call(block, dict(zip(names, parameters, strict=True)), (x, emb, window))

        inputs = (*random_inputs(form, batch=2), *block.parameters())
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True, atol=1e-4)


# --- other dtypes and layouts ----------------------------------------------------------------------------------------


def compare_with_plain(block, x, emb, window, dtype, precision=None, conditioning=4.0):
    """Errors of output and all gradients, against fp64, next to plain PyTorch's.

    Before a norm, gradients nearly cancel: hence the factor to the bound's constant.
    """

    class Oracle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x, emb):
            return reference.res_block(self.block, x, emb, mask_of(window, x))

    def called(model, prefix, *more):
        def run(x, emb, **parameters):
            named = {prefix + name.replace("__", "."): p for name, p in parameters.items()}
            return (functional_call(model, named, (x, emb, *more)),)

        return run

    routed, plain = called(block, "", window), called(Oracle(), "block.")
    inputs = {"x": x, "emb": emb} | {name.replace(".", "__"): p for name, p in block.named_parameters()}
    failed = [c for c in compare(routed, plain, inputs, dtype, precision, conditioning) if not c.passed]
    assert not failed, "\n".join(map(str, failed))


BOTH_WINDOWS = {"shared": shared(5, 13, 24), "per sample": per_sample([0, 7, 11], 13, 24)}
both_windows = pytest.mark.parametrize("window", BOTH_WINDOWS.values(), ids=BOTH_WINDOWS)


@both_windows
@pytest.mark.parametrize("name", ["plain", "additive", "narrower, 3x3 skip", "up", "down"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("skipping")
def test_precision(seed, device, dtype, name, window):
    form = Form(FORMS[name].options, 24, 4, (7, 6))
    window = ChannelWindow(window.start.to(device), window.width, 24, window.shared_start)
    block = random_block(form, device, dtype)
    compare_with_plain(block, *random_inputs(form, device=device, dtype=dtype), window, dtype)


@both_windows
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("skipping")
def test_autocast(seed, stream, window):
    form = Form({"out_channels": 16}, 24, 4, (7, 6))
    block, (x, emb) = random_block(form, dtype=torch.float32), random_inputs(form, dtype=stream)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x, emb, window).dtype == reference.res_block(block, x, emb, mask_of(window, x)).dtype
    compare_with_plain(block, x, emb, window, torch.bfloat16, torch.autocast("cpu", torch.bfloat16))


@pytest.mark.usefixtures("skipping")
def test_norms_in_fp32_of_a_model_in_fp16(seed):
    """As guided-diffusion's convert_to_fp16 leaves it: convolutions in fp16, norms in fp32; here in bf16."""
    form = Form({}, 24, 4, (7, 6))
    block, (x, emb) = random_block(form, dtype=torch.bfloat16), random_inputs(form, dtype=torch.bfloat16)
    for norm in (block.in_layers[0], block.out_layers[0]):
        norm.float()
    compare_with_plain(block, x, emb, shared(5, 13, 24), torch.bfloat16)


@pytest.mark.parametrize("mean", [1e2, 1e4])
@pytest.mark.usefixtures("skipping")
def test_large_means(seed, mean):
    """Groups whose mean is far larger than their deviation."""
    form = Form({}, 24, 4, (7, 6))
    block, (x, emb) = random_block(form, dtype=torch.float32), random_inputs(form, dtype=torch.float32, mean=0)
    x = (x.detach() + mean).requires_grad_()
    for window in BOTH_WINDOWS.values():
        compare_with_plain(block, x, emb, window, torch.float32, conditioning=mean)


@pytest.mark.usefixtures("skipping")
def test_layouts(seed):
    """channels_last, transposed, a part of a wider tensor, expanded."""
    form = Form({}, image=(6, 6))
    block, (x, emb) = random_block(form), random_inputs(form)
    wide = torch.randn(3, 20, 8, 8, dtype=torch.float64)
    wide[:, 4:16, 1:7, 2:] = x.detach()
    layouts = {
        "channels_last": x.detach().to(memory_format=torch.channels_last),
        "transposed": x.detach().mT.contiguous().mT,
        "part": wide[:, 4:16, 1:7, 2:],
        "expanded": x.detach()[:1].expand(3, -1, -1, -1),
    }
    for layout, window in itertools.product(layouts.values(), (shared(5, 6), per_sample([0, 2, 6], 6))):
        assert_equal_to_oracle(block, layout.detach().requires_grad_(), emb, window)
    last = copy.deepcopy(block).to(memory_format=torch.channels_last)
    assert_equal_to_oracle(last, layouts["channels_last"].requires_grad_(), emb, shared(5, 6))


# --- the module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, skip",
    [({}, []), ({"up": True}, []), ({"down": True}, []), ({"out_channels": 64}, [1]),
     ({"out_channels": 64, "use_conv": True}, [3])],
    ids=str,
)  # fmt: skip
def test_state_dict_is_guided_diffusions(options, skip):
    out = options.get("out_channels", 32)
    expected = {
        "in_layers.0.weight": (32,),
        "in_layers.0.bias": (32,),
        "in_layers.2.weight": (out, 32, 3, 3),
        "in_layers.2.bias": (out,),
        "emb_layers.1.weight": (2 * out, E),
        "emb_layers.1.bias": (2 * out,),
        "out_layers.0.weight": (out,),
        "out_layers.0.bias": (out,),
        "out_layers.3.weight": (out, out, 3, 3),
        "out_layers.3.bias": (out,),
    }
    for size in skip:
        expected |= {"skip_connection.weight": (out, 32, size, size), "skip_connection.bias": (out,)}
    block = RoutedResBlock(32, E, **options)
    assert {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()} == expected
    additive = RoutedResBlock(32, E, use_scale_shift_norm=False, **options).state_dict()
    assert additive.keys() == expected.keys() and additive["emb_layers.1.weight"].shape == (out, E)
    assert not block.out_layers[3].weight.any() and not block.out_layers[3].bias.any()
    assert block.in_layers[0].num_groups == block.out_layers[0].num_groups == 32
    assert dtr.nn.RoutedResBlock is RoutedResBlock


@pytest.mark.parametrize("name", ["up", "down"])
def test_resampling_modules_of_guided_diffusion(seed, name):
    """Which refuse a part of the block's channels."""
    form = FORMS[name]
    block, (x, emb) = random_block(form), random_inputs(form)
    foreign = copy.deepcopy(block)
    foreign.h_upd = foreign.x_upd = Upsample(12) if name == "up" else Downsample(12)
    assert torch.equal(run_res_block(foreign, x, emb, shared(3, 4)), run_res_block(block, x, emb, shared(3, 4)))


def test_dropout_follows_training(seed):
    form = Form({})
    block, (x, emb) = random_block(form, dropout=0.5), random_inputs(form)
    with torch.no_grad():
        assert not torch.equal(block(x, emb, shared(3, 4)), block(x, emb, shared(3, 4)))
        block.eval()
        assert torch.equal(block(x, emb, shared(3, 4)), block(x, emb, shared(3, 4)))
        torch.manual_seed(1)
        routed = block.train()(x, emb, shared(3, 4))
        torch.manual_seed(1)
        torch.testing.assert_close(routed, reference.res_block(block, x, emb, mask_of(shared(3, 4), x)))


def test_masks_run_the_plain_path(seed):
    form = Form({"out_channels": 8})
    block, (x, emb) = random_block(form), random_inputs(form)
    mask = dtr.RandomRouting(10, 0.5).mask(torch.tensor([3, 9, 0]), 12)
    assert torch.equal(block(x, emb, mask), reference.res_block(block, x, emb, mask))
    assert not torch.allclose(block(x, emb, mask), block(x, emb))


def test_compile(seed, fresh_compiler):
    """One graph for every first channel of a shared window, one for windows per sample, one for no window."""
    form = Form({"down": True, "out_channels": 8}, image=(4, 6))
    block = random_block(form, dtype=torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for start in (1, 5, 2, 0, 6):
        assert_same_as_eager(compiled, block, form, shared(start, 6))
    assert counter.frame_count <= 2  # the first takes the channel for a constant
    for window in (per_sample([0, 3, 5], 7), per_sample([2, 1, 0], 7), None):
        assert_same_as_eager(compiled, block, form, window)
    assert counter.frame_count <= 4


def assert_same_as_eager(compiled, block, form, window):
    x, emb = random_inputs(form, dtype=torch.float32)
    found = out_and_gradients(lambda _, *args: compiled(*args, window), block, x, emb)
    expected = out_and_gradients(lambda block, *args: block(*args, window), block, x, emb)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_inductor(seed, fresh_compiler):
    form = Form({})
    block = random_block(form, dtype=torch.float32)
    assert_same_as_eager(torch.compile(block, fullgraph=True), block, form, shared(1, 6))


@pytest.mark.usefixtures("skipping")
def test_functional_transforms(seed):
    """Plain PyTorch operations, so per-sample gradients and forward-mode derivatives are there."""
    form = Form({})
    block, (x, emb) = random_block(form), random_inputs(form)
    x, emb = x.detach(), emb.detach()
    window = shared(3, 5)

    def loss(parameters, x, emb):
        return functional_call(block, parameters, (x[None], emb[None], window)).square().sum()

    parameters = {name: p.detach() for name, p in block.named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, emb)
    total = torch.func.grad(lambda p: functional_call(block, p, (x, emb, window)).square().sum())(parameters)
    torch.testing.assert_close({name: g.sum(0) for name, g in each.items()}, total)
    direction = torch.randn_like(x)
    _, tangent = torch.func.jvp(lambda x: block(x, emb, window), (x,), (direction,))
    step = 1e-6 * direction
    difference = block(x + step, emb, window) - block(x - step, emb, window)
    torch.testing.assert_close(tangent, difference / 2e-6, rtol=1e-5, atol=1e-6)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, fragments",
    [
        ({"channels": 30}, ["channels", "30", "32"]),
        ({"channels": 0}, ["channels", "0"]),
        ({"out_channels": 48}, ["out_channels", "48", "32"]),
        ({"num_groups": 0}, ["num_groups", "0"]),
        ({"emb_channels": 0}, ["emb_channels", "at least 1", "0"]),
        ({"up": True, "down": True}, ["up", "down"]),
    ],
    ids=str,
)
def test_constructor(options, fragments):
    refused(lambda: RoutedResBlock(**{"channels": 64, "emb_channels": E, **options}), ValueError, fragments)


@pytest.mark.parametrize(
    "inputs, error, fragments",
    [
        ({"x": torch.ones(2, 12, 3, 3).int()}, TypeError, ["x must be floating point", "int32", "x.float()"]),
        ({"x": torch.ones(2, 12, 9)}, ValueError, ["x must have shape [B, 12, H, W]", "[2, 12, 9]"]),
        ({"x": torch.ones(2, 8, 3, 3)}, ValueError, ["x must have shape [B, 12, H, W]", "[2, 8, 3, 3]"]),
        ({"x": torch.ones(2, 12, 3, 3).bfloat16()}, ValueError, ["weight is torch.float32", "x is torch.bfloat16"]),
        ({"emb": torch.ones(3, E)}, ValueError, ["emb must have shape [2, 5]", "[3, 5]"]),
        ({"emb": torch.ones(2, E).int()}, TypeError, ["emb must be floating point", "int32"]),
        ({"window": shared(0, 5, 8)}, ValueError, ["window is for 8 channels", "12"]),
        ({"window": per_sample([0, 1, 2], 5)}, ValueError, ["window", "3 samples", "the batch has 2"]),
        ({"window": shared(8, 5)}, ValueError, ["window starts at channel 8", "5 of 12", "0..7"]),
        ({"window": shared(-1, 5)}, ValueError, ["window starts at channel -1", "0..7"]),
        ({"window": torch.ones(2, 8)}, ValueError, ["window, a mask, must have shape [2, 12]", "[2, 8]"]),
        ({"window": (0, 5)}, TypeError, ["ChannelWindow or None", "tuple"]),
    ],
    ids=lambda value: "",
)
def test_inputs_of_the_block(inputs, error, fragments):
    block = RoutedResBlock(12, E, num_groups=4)
    inputs = {"x": torch.ones(2, 12, 3, 3), "emb": torch.ones(2, E), "window": shared(0, 5), **inputs}
    refused(lambda: block(**inputs), error, fragments)


@pytest.mark.parametrize(
    "inputs, error, fragments",
    [
        ({"x": torch.ones(2, 12, 3, 3).bool()}, TypeError, ["x must be floating point", "bool"]),
        ({"x": torch.ones(12, 3, 3)}, ValueError, ["x must have shape [B, C, H, W]", "[12, 3, 3]"]),
        ({"num_groups": 5}, ValueError, ["num_groups must divide the 12 channels", "5"]),
        ({"num_groups": 0}, ValueError, ["num_groups must divide the 12 channels", "0"]),
        ({"norm_weight": torch.ones(8)}, ValueError, ["norm_weight must have shape [12]", "[8]"]),
        ({"norm_bias": torch.ones(12).int()}, TypeError, ["norm_bias must be floating point", "int32"]),
        ({"weight": torch.ones(6, 12, 1, 1)}, ValueError, ["weight must have shape [O, 12, 3, 3]", "[6, 12, 1, 1]"]),
        ({"weight": torch.ones(6, 8, 3, 3)}, ValueError, ["weight must have shape [O, 12, 3, 3]", "[6, 8, 3, 3]"]),
        ({"weight": torch.ones(6, 12)}, ValueError, ["weight must have shape [O, 12, 3, 3]", "[6, 12]"]),
        ({"weight": torch.ones(6, 12, 3, 3).double()}, ValueError, ["weight is torch.float64", "x is torch.float32"]),
        ({"bias": torch.ones(5)}, ValueError, ["bias must have shape [6]", "[5]"]),
    ],
    ids=lambda value: "",
)
def test_inputs_of_the_op(inputs, error, fragments):
    norm = {"norm_weight": torch.ones(12), "norm_bias": torch.ones(12), "num_groups": 4, "eps": 1e-5}
    good = {"x": torch.ones(2, 12, 3, 3), **norm, "weight": torch.ones(6, 12, 3, 3), "bias": None}
    refused(lambda: ops.routed_conv(**{**good, "window": shared(0, 5), **inputs}), error, fragments)


# --- its benchmark ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(seed, monkeypatch):
    """Other parameters and inputs in every run; nothing is compiled."""
    monkeypatch.setattr(suite, "SEED", seed)
    monkeypatch.setattr(whole, "compiled", lambda forward, mode=None: forward)


@pytest.mark.parametrize("precision", ["fp32", "bf16", AUTOCAST])
@pytest.mark.usefixtures("skipping")
def test_every_side_of_the_benchmark_is_right(fresh, precision):
    """And each would be wrong if one of its tensors were, or if it computed another function."""
    cases = quick(suite, CPU, precisions=[precision])
    assert [(case.cell["window"], case.cell["pass"]) for case in cases] == [
        (window, pass_) for window in ("per sample", "shared") for pass_ in ("forward", "training")
    ]
    for case in cases:
        assert_right(case)
        sides = sides_of(case)
        for side in case.sides:
            assert_every_tensor_counts(side, 1.15)
        routed, unrouted = sides["RoutedResBlock"], sides["unrouted"]
        assert routed.error(unrouted.call()) > routed.bound and unrouted.error(routed.call()) > unrouted.bound
        assert unrouted.work.flops > routed.work.flops == sides["reference"].work.flops


def test_a_benchmark_without_deactivated_channels_fails(fresh, skipping, monkeypatch):
    (case,) = quick(suite, CPU, precisions=["bf16"], windows=["shared"], passes=["forward"])
    side = sides_of(case)["RoutedResBlock"]
    monkeypatch.setattr(OP, "_stretched", lambda image, dim, size: torch.zeros(()))
    assert side.error(side.call()) > 1.5 * side.bound


@pytest.mark.parametrize("name", suite.PLACES)
@pytest.mark.parametrize("pass_", suite.PASSES)
def test_operations_are_counted(name, pass_):
    """As PyTorch counts them of the unrouted block, on tensors without memory."""
    place = suite.PLACES[name]
    B, C, O, size = 2, place.channels, place.out_channels, place.size
    with torch.device("meta"):
        block = RoutedResBlock(C, place.emb_channels, out_channels=O, up=place.up, down=place.down)
        x = torch.empty(B, C, size, size, requires_grad=True)
        emb = torch.empty(B, place.emb_channels, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = block(x, emb)
        assert out.shape == (B, O, place.out_size, place.out_size)
        if pass_ == "training":
            out.sum().backward()
    count = suite.training_work if pass_ == "training" else suite.forward_work
    items = ITEMSIZES["fp32"]
    assert count(place, B, C, items).flops == counter.get_total_flops()
    # One channel less in the first convolution, in the forward pass and in both of its gradients.
    times = 3 if pass_ == "training" else 1
    saved = times * 2 * 9 * O * (B * place.out_size**2 - B)
    assert count(place, B, C, items).flops - count(place, B, C - 1, items).flops == saved
    assert count(place, B, C, items).bytes > count(place, B, C - 1, items).bytes


def test_cells_of_the_benchmark():
    for device, least in (("cpu", 10), ("cuda", 10)):
        built = suite.cases(Options(torch.device(device)))
        assert least <= len(built) == len({build.args for build in built})
    for options, fragments in [
        ({"models": ["DiT-S/2"]}, ["--model", "ADM-256x32", "DiT-S/2"]),
        ({"passes": ["sampling"]}, ["--pass", "sampling"]),
        ({"scopes": ["branch"]}, ["res_block", "scopes", "branch"]),
        ({"betas": [0.001]}, ["beta 0.001"]),
    ]:
        refused(lambda options=options: suite.cases(Options(torch.device("cpu"), **options)), ValueError, fragments)
