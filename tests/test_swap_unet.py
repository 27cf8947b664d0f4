"""swap_blocks on U-Nets of guided-diffusion's shape: the same function and gradients, routed by each block's width."""

import functools

import pytest
import torch
from comparing import assert_same, differ, snapshot
from models import DIM, DiTBlock, DropPath, become, change, facebook_dit
from refusals import refused
from swapping import RANDOM, ROUTING, assert_block_is_refused, blocks_of, oracle, paper_mask
from torch import nn
from unets import TIMESTEPS, WIDTHS, AttentionBlock, ResBlock, TimestepBlock, TwoBlocks, UNetModel

import dtr_kernels as dtr
from dtr_kernels.swap import restore_blocks, swap_blocks

TIMES = torch.tensor([0, 30, 44, 49])

pytestmark = pytest.mark.usefixtures("one_thread", "seed")


def batch(times=TIMES):
    """Four images of different timesteps, and labels; 15 pixels at the lower level."""
    return torch.randn(4, 3, 6, 10), times, torch.randint(10, (4,))


def results(model, *batches):
    """Outputs for each batch, and the gradients of images and parameters of one backward pass through all of them."""
    model.zero_grad()
    images = [x.clone().requires_grad_() for x, *_ in batches]
    outputs = [model(x, *rest) for x, (_, *rest) in zip(images, batches, strict=True)]
    sum(output.square().sum() for output in outputs).backward()
    gradients = [tensor.grad.clone() for tensor in (*images, *model.parameters())]
    return [output.detach() for output in outputs] + gradients


# --- the same function


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_scale_shift_norm": True},
        {"use_checkpoint": True},
        {"use_scale_shift_norm": True, "groups": 4},
        {"use_torch": True},
    ],
)
def test_without_routing_keeps_the_models_own_function(options):
    model, inputs = UNetModel(**options), batch()
    expected = results(model, inputs)
    assert swap_blocks(model) is model
    assert type(model) is UNetModel
    assert {block._get_name() for block in blocks_of(model)} == {"FusedResBlock"}
    assert_same(results(model, inputs), expected)


@pytest.mark.parametrize("options", [{}, {"use_scale_shift_norm": True}, {"use_scale_shift_norm": True, "groups": 4}])
@pytest.mark.parametrize(("routing", "mask_of"), [(ROUTING, paper_mask), (RANDOM, RANDOM.mask)], ids=["DTR", "random"])
def test_a_given_routing_matches_the_reference(routing, mask_of, options):
    model, (x, t, y) = UNetModel(**options).double(), batch()
    inputs = x.double(), t, y
    expected = results(oracle(model, mask_of), inputs)
    assert differ(results(model, inputs), expected)
    assert_same(results(swap_blocks(model, routing), inputs), expected, rtol=1e-9)


def test_the_oracle_is_the_masked_model():
    """Where the skip is the identity, the paper's form: the model's own block on the masked input, and the rest."""
    block, x, emb = blocks_of(UNetModel())[0], torch.randn(4, 16, 3, 5), torch.randn(4, 20)
    mask = paper_mask(TIMES, 16)
    outside = x * (1 - mask[:, :, None, None])
    assert_same([dtr.reference.res_block(block, x, emb, mask)], [block(x - outside, emb) + outside])


def test_layers_that_are_only_called_may_be_others():
    model, inputs = UNetModel(), batch()
    block = blocks_of(model)[1]
    block.out_layers[1] = nn.ReLU()
    block.out_layers[2] = nn.Hardtanh()
    block.emb_layers[0] = nn.Tanh()
    block.skip_connection = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
    calls = []
    for name in ("emb_layers", "out_layers.1", "out_layers.3", "x_upd", "skip_connection"):
        block.get_submodule(name).register_forward_hook(lambda *args, name=name: calls.append(name))
    expected = results(oracle(model, paper_mask), inputs)
    own = results(model, inputs)
    swap_blocks(model)
    calls.clear()
    assert_same(results(model, inputs), own)
    assert sorted(calls) == ["emb_layers", "out_layers.1", "out_layers.3", "skip_connection", "x_upd"]
    assert_same(results(swap_blocks(restore_blocks(model), ROUTING), inputs), expected)


class OneTimestep(UNetModel):
    """A sampler's model, whose whole batch has one timestep, a Python number."""

    def forward(self, x, timesteps, y):
        return super().forward(x, torch.full((len(x),), timesteps), y)


@pytest.mark.parametrize("t", [0, 37, TIMESTEPS - 1])
def test_a_window_that_the_batch_shares(t):
    model, (x, _, y) = UNetModel(use_scale_shift_norm=True), batch()
    expected = results(oracle(model, paper_mask), (x, torch.full((4,), t), y))
    model.__class__ = OneTimestep
    assert_same(results(swap_blocks(model, ROUTING), (x, t, y)), expected)


@pytest.mark.parametrize("routing", [ROUTING, RANDOM])
def test_one_window_for_each_number_of_channels(routing, monkeypatch):
    model, made = swap_blocks(UNetModel(), routing), []
    method = "window" if routing is ROUTING else "mask"
    make = getattr(type(routing), method)
    monkeypatch.setattr(type(routing), method, lambda self, t, C: made.append(C) or make(self, t, C))
    model(*batch())
    assert sorted(made) == sorted(WIDTHS) == sorted({block.channels for block in blocks_of(model)})


def test_blocks_of_both_kinds_in_one_model():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet, self.dit = UNetModel(), facebook_dit()

        def forward(self, x, t, y):
            return self.dit(self.unet(x, t, y), t, y)

    model, inputs = Both(), batch()
    expected = oracle(model, paper_mask)
    assert_same(results(swap_blocks(model, ROUTING), inputs), results(expected, inputs))
    refused(lambda: swap_blocks(restore_blocks(model), scope="branch"), ValueError, ["U-Net", "'branch'"])


def test_dit_blocks_of_different_widths():
    class Widening(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([facebook_dit().blocks[0], DiTBlock(2 * DIM, 4)])
            nn.init.normal_(self.blocks[1].adaLN_modulation[-1].weight, std=0.1)

        def forward(self, x, t, masks=(None, None)):
            for block, mask in zip(self.blocks, masks, strict=True):
                c = t[:, None].to(x.dtype).sin().expand(-1, x.shape[-1])
                x = block(x, c) if mask is None else dtr.reference.dit_block(block, x, c, mask)
                x = x.repeat(1, 1, 2)
            return x

    model, x = Widening(), torch.randn(4, 5, DIM)
    expected = results(model, (x, TIMES, [paper_mask(TIMES, C) for C in (DIM, 2 * DIM)]))
    assert differ(results(model, (x, TIMES)), expected)
    assert_same(results(swap_blocks(model, ROUTING), (x, TIMES)), expected)


def test_dropout_follows_the_mode():
    """In training the same random numbers drop the same activations as in the model's own blocks."""
    model, inputs = UNetModel(dropout=0.5), batch()
    state = torch.get_rng_state()
    expected = results(model, inputs)
    swap_blocks(model)
    assert all(module.training for module in model.modules())
    torch.set_rng_state(state)
    assert_same(results(model, inputs), expected)
    model.eval()
    assert differ(results(model, inputs), expected)
    assert_same(results(model, inputs), results(restore_blocks(model), inputs))


def test_convolutions_in_16_bits_among_fp32_layers():
    """Guided-diffusion's fp16 mode, in bf16: convolutions in 16 bits, norms and the embedding in fp32."""

    class HalfModel(UNetModel):
        def run(self, layers, h, emb):
            return super().run(layers, h.bfloat16(), emb)

    model, inputs = UNetModel(), batch()
    for module in (*model.input_blocks, model.middle_block, *model.output_blocks):
        for layer in module.modules():
            if isinstance(layer, nn.Conv1d | nn.Conv2d):
                layer.bfloat16()
    model.__class__ = HalfModel
    model.out.register_forward_pre_hook(lambda module, args: args[0].float())
    expected = results(oracle(model, paper_mask), inputs)
    assert_same(results(swap_blocks(model, ROUTING), inputs), expected, rtol=5e-2)


def test_autocast():
    model, (x, t, y) = UNetModel(), batch()
    expected = oracle(model, paper_mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same([swap_blocks(model, ROUTING)(x, t, y)], [expected(x, t, y)], rtol=3e-2)


def test_a_block_alone_does_not_know_its_timesteps():
    model = swap_blocks(UNetModel(), ROUTING)
    with pytest.raises(RuntimeError, match=r"'input_blocks.1.0' was called outside its model's forward"):
        blocks_of(model)[0](torch.randn(4, 16, 6, 10), torch.randn(4, 20))


# --- nothing else changes


def test_loads_the_weights_of_another():
    model, other, inputs = swap_blocks(UNetModel(), ROUTING), UNetModel(), batch()
    model.load_state_dict(other.state_dict())
    assert_same(results(model, inputs), results(swap_blocks(other, ROUTING), inputs))


@pytest.mark.parametrize("routing", [None, ROUTING, RANDOM])
def test_compiles_whole_and_once(routing):
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    model, batches = swap_blocks(TwoBlocks(use_scale_shift_norm=True), routing), two_batches()
    expected = results(model, *batches)
    counter = CompileCounterWithBackend("eager" if routing is RANDOM else "aot_eager")
    assert_same(results(torch.compile(model, backend=counter, fullgraph=True), *batches), expected)
    assert counter.frame_count == 1


def test_compiled_blocks_recompute_for_their_own_timesteps():
    """Guided-diffusion's checkpointing breaks the graph, so that the compiled parts of a block run once more."""
    model, batches = swap_blocks(TwoBlocks(use_checkpoint=True), ROUTING), two_batches()
    expected = results(model, *batches)
    assert differ(results(restore_blocks(model), *batches), expected)
    compiled = torch.compile(swap_blocks(model, ROUTING), backend="eager")
    assert_same(results(compiled, *batches), expected)


def two_batches():
    """For ``TwoBlocks``."""
    return [(torch.randn(4, 16, 6, 10), times) for times in (TIMES, torch.tensor([49, 3, 2, 40]))]


# --- refusals


class ThreeArguments(ResBlock):
    def _forward(self, x, emb, skip=None):
        return super()._forward(x, emb)


class OtherEmbedding(ResBlock):
    def _forward(self, x, emb):
        return super()._forward(x, torch.sigmoid(emb))


class BesidesItsForward(ResBlock):
    """Computes what a residual block does, without its _forward."""

    def forward(self, x, emb):
        return ResBlock._forward(self, x, emb)


class BeforeItsForward(ResBlock):
    """Its _forward is only part of the block."""

    def forward(self, x, emb):
        return self._forward(x, emb) + x

    def _forward(self, x, emb):
        return super()._forward(x, emb) - x


class MaxDownsample(nn.MaxPool2d):
    pass


class HiddenDownsample(nn.Module):
    """Guided-diffusion's Downsample, but with nothing to tell it from Upsample."""

    channels = 24

    def forward(self, x):
        return nn.functional.avg_pool2d(x, 2)


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def resample_by(module):
    def apply(block):
        block.updown, block.h_upd, block.x_upd = True, module, module

    return apply


def insert_dropout(block):
    block.in_layers = nn.Sequential(block.in_layers[0], nn.SiLU(), nn.Dropout(0.1), block.in_layers[2])


# Changes to a block of 24 channels, and words of the error.
REFUSED_BLOCKS = {
    "missing attributes": (
        lambda block: (delattr(block, "skip_connection"), delattr(block, "use_scale_shift_norm")),
        "it has no skip_connection, use_scale_shift_norm, which a U-Net residual block has",
    ),
    "missing layer": (lambda block: delattr(block.out_layers, "3"), "it has no out_layers.3"),
    "more layers": (lambda block: block.out_layers.append(nn.Identity()), "out_layers is Sequential of 5 layers"),
    "no sequence": (
        change("in_layers", nn.ModuleList([nn.GroupNorm(2, 24), nn.SiLU(), nn.Conv2d(24, 24, 3)])),
        "in_layers is ModuleList",
    ),
    "one dimension": (change("in_layers.2", nn.Conv1d(24, 24, 3, padding=1)), "in_layers.2 is Conv1d"),
    "three dimensions": (change("in_layers.2", nn.Conv3d(24, 24, 3, padding=1)), "in_layers.2 is Conv3d"),
    "wrapped convolution": (change("in_layers.2", ScaledConv(24, 24, 3, padding=1)), "in_layers.2 is ScaledConv"),
    "kernel size": (change("in_layers.2", nn.Conv2d(24, 24, 5, padding=2)), "the fused convolution is 3 x 3"),
    "padding": (change("in_layers.2", nn.Conv2d(24, 24, 3, padding=1, padding_mode="reflect")), "padding_mode=reflect"),
    "grouped convolution": (change("in_layers.2", nn.Conv2d(24, 24, 3, padding=1, groups=2)), "groups=2"),
    "batch norm": (change("in_layers.0", nn.BatchNorm2d(24)), "in_layers.0 is BatchNorm2d"),
    "second norm": (change("out_layers.0", nn.InstanceNorm2d(24)), "out_layers.0 is InstanceNorm2d"),
    "norm of other channels": (change("in_layers.0", nn.GroupNorm(4, 16)), "in_layers.0 normalises 16 channels"),
    "norm without parameters": (change("in_layers.0", nn.GroupNorm(4, 24, affine=False)), "has no affine parameters"),
    "activation": (change("in_layers.1", nn.ReLU()), r"in_layers.1 is ReLU\(\), but the fused block computes nn.SiLU"),
    "trained activation": (change("in_layers.1", nn.PReLU()), "has a parameter in_layers.1.weight"),
    "resampling": (resample_by(MaxDownsample(2)), "h_upd is MaxDownsample"),
    "hidden resampling": (resample_by(HiddenDownsample()), "h_upd is HiddenDownsample"),
    "trained resampling": (change("h_upd", nn.Conv2d(24, 24, 3, padding=1)), "has a parameter h_upd.weight"),
    "one-sided resampling": (change("x_upd", nn.Upsample(scale_factor=2)), "could not be compared with a U-Net"),
    "extra parameter": (change("gamma", nn.Parameter(torch.ones(24))), "has a parameter gamma"),
    "dropout before the convolution": (insert_dropout, "in_layers is Sequential of 4 layers"),
    "drop path": (change("drop_path", DropPath()), "drop_path drops with probability 0.1"),
    "hook": (lambda block: block.in_layers[2].register_forward_hook(print), "in_layers.2 has hooks"),
    "hook on the sequence": (lambda block: block.out_layers.register_forward_pre_hook(print), "out_layers has hooks"),
    "patched layer": (change("in_layers.0.forward", print), "forward of in_layers.0 was patched"),
    "patched forward": (change("forward", print), "forward of its instance was patched"),
    "patched _forward": (change("_forward", print), "_forward of its instance was patched"),
    "other arguments": (become(ThreeArguments), r"its _forward takes \(x, emb, skip\)"),
    "other computation": (become(OtherEmbedding), "its forward computes something else than a U-Net residual block"),
    "unused _forward": (become(BesidesItsForward), "does not just return what its _forward computes"),
    "part in _forward": (become(BeforeItsForward), "does not just return what its _forward computes"),
    "other embedding": (change("emb_layers", nn.Sequential(nn.SiLU(), nn.Linear(20, 5))), "could not be compared"),
    "embedding": (change("emb_layers", nn.Sequential(nn.SiLU(), nn.Identity())), "emb_layers holds no nn.Linear"),
}


@pytest.mark.parametrize("case", REFUSED_BLOCKS)
def test_refuses_a_block_by_name_and_changes_nothing(case):
    model = UNetModel()
    for block in blocks_of(model):  # a model as it is before training: no branch is open
        nn.init.zeros_(block.out_layers[-1].weight)
        nn.init.zeros_(block.out_layers[-1].bias)
    spoil, message = REFUSED_BLOCKS[case]
    spoil(model.middle_block[2])
    assert_block_is_refused(model, "middle_block.2", message)


class NoLabels(UNetModel):
    def forward(self, x, noise_level, y):
        return super().forward(x, noise_level, y)


REFUSED_MODELS = {
    "scope": (UNetModel, {"scope": "branch"}, ["'input_blocks.1.0' (ResBlock)", "no scope 'branch'; use 'block'"]),
    "beta": (
        UNetModel, {"routing": dtr.DenoisingTaskRouting(beta=1 / 20)},
        ["'input_blocks.1.0' (ResBlock)", "0.05 of 16 channels leaves none active"],
    ),
    "random beta": (UNetModel, {"routing": dtr.RandomRouting(beta=1 / 20)}, ["'input_blocks.1.0'", "16 channels"]),
    "no timesteps": (NoLabels, {"routing": ROUTING}, ["argument named t, timestep, timesteps", "NoLabels"]),
    "swapped": (lambda: swap_blocks(UNetModel()), {}, ["swapped already; call restore_blocks first"]),
    "no blocks": (lambda: AttentionBlock(8), {}, ["no DiT block", "no U-Net residual block", "in_layers"]),
    "our own": (lambda: dtr.nn.RoutedResBlock(32, 8), {}, ["runs the fused kernels as it is"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_refuses_a_model_and_changes_nothing(case):
    make, arguments, fragments = REFUSED_MODELS[case]
    model = make()
    before = snapshot(model)
    refused(lambda: swap_blocks(model, **arguments), ValueError, fragments)
    assert snapshot(model) == before


def test_a_later_block_of_few_channels_is_named():
    model = UNetModel()
    model.output_blocks[3][0] = ResBlock(8, 20, out_channels=16)
    routing = dtr.DenoisingTaskRouting(TIMESTEPS, beta=0.1)
    refused(lambda: swap_blocks(model, routing), ValueError, ["'output_blocks.3.0'", "0.1 of 8 channels"])


def test_restore_refuses_a_patched_block():
    model = swap_blocks(UNetModel(), ROUTING)
    block = blocks_of(model)[1]
    block._forward = functools.partial(block._forward)
    refused(lambda: restore_blocks(model), ValueError, ["'input_blocks.2.0'", "its _forward was patched since"])


def test_blocks_without_a_forward_of_two_names():
    """Descendants without checkpointing of their own, whose forward is the block itself."""

    class Direct(TimestepBlock):
        __init__ = ResBlock.__init__

        def forward(self, x, emb):
            return run(self, x, emb)

    run, model, inputs = ResBlock._forward, UNetModel(), batch()
    expected = results(oracle(model, paper_mask), inputs)
    for block in blocks_of(model):
        block.__class__ = Direct
    assert_same(results(swap_blocks(model, ROUTING), inputs), expected)
