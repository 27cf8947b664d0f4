"""Sampler: the samples of the plain, masked model to rounding, over whole trajectories of diffusers' schedulers."""

from __future__ import annotations

import copy
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

os.environ["HF_HUB_OFFLINE"] = "1"

import any_torchvision  # noqa: F401  # before diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gpu_waits import waiting_is_an_error
from models import TIMESTEPS, facebook_dit, public_dtr, sit, window_mapping
from unets import UNetModel

import dtr_kernels as dtr

diffusers = pytest.importorskip("diffusers", reason="NOT RUN: needs diffusers; pip install '.[test]'")

pytestmark = pytest.mark.usefixtures("one_thread", "seed")

C, CLASSES, T, SIZE = 64, 5, 1000, 8
ROUTING = dtr.DenoisingTaskRouting(num_timesteps=T)
SCHEDULERS = {
    "ddim": lambda T: diffusers.DDIMScheduler(num_train_timesteps=T, clip_sample=False),
    "dpm": lambda T: diffusers.DPMSolverMultistepScheduler(num_train_timesteps=T),
    "euler": lambda T: diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=T),
}
# The wanted classes, two of them alike, and as many times no class.
LABELS = torch.tensor([0, 3, 3, CLASSES, CLASSES, CLASSES])


def make_model(routing=ROUTING, scope="block", **options):
    """A small DiT with random values for what starts at zero and would hide the blocks."""
    sizes = {"input_size": SIZE, "in_channels": 2, "hidden_size": C, "depth": 2, "num_heads": 4, "num_classes": CLASSES}
    model = dtr.nn.DiT(**sizes, routing=routing, scope=scope, **options)
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or "final_layer" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def trajectory(predict, x, scheduler="ddim", steps=50, timesteps=T):
    """Samples from noise x [B, ...]. predict(x, t) gets the scheduler's own timesteps, and returns as many channels."""
    scheduler = SCHEDULERS[scheduler](timesteps)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t), t, x).prev_sample
    return x


def assert_as_exact(fused, single, exact):
    """At most twice as far from fp64 as plain PyTorch is in fp32."""
    bound = 2 * (single - exact).abs().max() + 1e-5 * exact.abs().max()
    assert (fused - exact).abs().max() <= bound


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
def test_samples_are_those_of_the_plain_model(scheduler, scope):
    """Fifty steps with guidance."""
    model, noise = make_model(scope=scope), torch.randn(3, 2, SIZE, SIZE)
    sampler = dtr.Sampler(model, guidance_scale=2.0, y=LABELS)

    def plain(model):
        def predict(x, t):
            times = t.expand(2 * len(x))
            mask = ROUTING.window(times, model.blocks[0].routed_channels).mask()
            wanted, other = dtr.reference.dit(model, torch.cat([x, x]), times, LABELS, mask)[:, :2].chunk(2)
            return other + 2.0 * (wanted - other)

        return predict

    assert_same_trajectory(lambda x, t: sampler(x, t)[:, :2], plain, model, noise, scheduler)


def test_guidance_is_that_of_the_model():
    model, x = make_model(), torch.randn(3, 2, SIZE, SIZE)
    guided = dtr.Sampler(model, guidance_scale=3.0, y=LABELS)(x, 700)
    expected = model.forward_with_cfg(torch.cat([x, x]), 700, LABELS, 3.0)[:3]
    torch.testing.assert_close(guided, expected)
    unguided = dtr.Sampler(model, y=LABELS[:3])(x, torch.tensor(700))
    torch.testing.assert_close(unguided, model(x, 700, LABELS[:3]))
    assert (guided[:, :2] - unguided[:, :2]).abs().max() > 1e-3

    sampler = dtr.Sampler(model, guidance_scale=3.0, guided_channels=1, y=LABELS)
    fewer = sampler(x, 700)
    torch.testing.assert_close(fewer[:, :1], guided[:, :1])
    torch.testing.assert_close(fewer[:, 1:], unguided[:, 1:])
    torch.testing.assert_close(fewer, model.forward_with_cfg(torch.cat([x, x]), 700, LABELS, 3.0, 1)[:3])
    assert torch.equal(copy.deepcopy(sampler)(x, 700), fewer)


@pytest.mark.parametrize("kind", ["native", "swapped"])
def test_float_timesteps(kind):
    """A scheduler's timesteps; an integer among them is the same number, and not refused."""
    routing = dtr.DenoisingTaskRouting(num_timesteps=T, float_timesteps=True)
    if kind == "native":
        model, x = make_model(routing), torch.randn(3, 2, SIZE, SIZE)
    else:
        model, x = dtr.swap_blocks(facebook_dit().eval(), routing), torch.randn(3, 3, SIZE, SIZE)
    sampler = dtr.Sampler(model, y=LABELS[:3])
    for t in (torch.tensor(999.0), torch.tensor(978.61), np.float32(978.61), 500.5, 500, np.int64(3)):
        times = torch.full((3,), float(t))
        torch.testing.assert_close(sampler(x, t), model(x, times, LABELS[:3]))
    assert torch.equal(sampler(x, 500), sampler(x, 500.0))


def assert_same_trajectory(step, of, model, noise, scheduler="ddim", **options):
    """Return what ``step`` samples, as exact as ``of`` the model."""
    exact = copy.deepcopy(model).double()
    assert_as_exact(
        trajectory(step, noise, scheduler, **options),
        trajectory(of(model), noise, scheduler, **options),
        trajectory(of(exact), noise.double(), scheduler, **options),
    )


# --- swapped models


def test_swapped_dit():
    """The masks of the public DTR code are the oracle."""
    model, plain = facebook_dit().eval(), public_dtr(window_mapping()).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    y, noise = torch.tensor([1, 1, 4]), torch.randn(3, 3, SIZE, SIZE)
    dtr.swap_blocks(model, dtr.DenoisingTaskRouting(num_timesteps=TIMESTEPS))
    sampler = dtr.Sampler(model, y=y)

    def of(model):
        return lambda x, t: F.pixel_shuffle(model(x, t.expand(3), y), 2)

    steps = {"steps": TIMESTEPS, "timesteps": TIMESTEPS}
    assert_same_trajectory(lambda x, t: F.pixel_shuffle(sampler(x, t), 2), of, plain, noise, **steps)


def noise_level(t):
    """SiT's time, which is 1 at data."""
    return 1 - t


def test_swapped_flow_model():
    model, noise = sit().eval(), torch.randn(2, 4, SIZE, SIZE)
    y = torch.tensor([1, 4, 9, 9])
    dtr.swap_blocks(model, dtr.DenoisingTaskRouting(), noise_level=noise_level)
    sampler = dtr.Sampler(model, guidance_scale=1.5, y=y)

    def of(model):
        def velocity(x, t):
            times = (1 - t / 1000).to(x.dtype).expand(4)
            return -model.forward_with_cfg(torch.cat([x, x]), times, y, 1.5)[:2]

        return velocity

    assert_same_trajectory(lambda x, t: -sampler(x, 1 - t / 1000), of, model, noise, "euler")


def test_swapped_diffusers_model():
    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "in_channels": 4}
    model = diffusers.DiTTransformer2DModel(**sizes, num_embeds_ada_norm=10).eval()
    labels, noise = torch.tensor([1, 4, 10, 10]), torch.randn(2, 4, SIZE, SIZE)
    dtr.swap_blocks(model, ROUTING)
    sampler = dtr.Sampler(model, guidance_scale=4.0, class_labels=labels)

    def of(model):
        def predict(x, t):
            out = model(torch.cat([x, x]), timestep=t.expand(4), class_labels=labels).sample
            wanted, other = out[:, :4].chunk(2)
            return other + 4.0 * (wanted - other)

        return predict

    assert_same_trajectory(lambda x, t: sampler(x, t)[:, :4], of, model, noise, "dpm")


def test_swapped_unet():
    """Which skips channels where the timestep is a number."""
    model, x, y = UNetModel().eval(), torch.randn(2, 3, SIZE, SIZE), torch.tensor([2, 2])
    dtr.swap_blocks(model, ROUTING)
    sampler = dtr.Sampler(model, y=y)
    for t in (999, 400, 400):
        torch.testing.assert_close(sampler(x, t), model(x, torch.full((2,), t), y))


def test_random_routing():
    model = make_model(dtr.RandomRouting(num_timesteps=T))
    x = torch.randn(3, 2, SIZE, SIZE)
    torch.testing.assert_close(dtr.Sampler(model, y=LABELS[:3])(x, 5), model(x, torch.tensor([5] * 3), LABELS[:3]))


# --- what is remembered


@pytest.fixture
def modulated():
    """The rows of every modulation that is computed."""
    rows = []

    def count(module):
        module.adaLN_modulation[1].register_forward_hook(lambda layer, args, out: rows.append(len(out)))

    return rows, count


@pytest.mark.parametrize("swapped", [False, True])
def test_modulations_are_computed_once_for_each_timestep(modulated, swapped):
    rows, count = modulated
    if swapped:
        model, x, y = dtr.swap_blocks(facebook_dit().eval(), ROUTING), torch.randn(3, 3, SIZE, SIZE), LABELS[:3]
    else:
        model, x, y = make_model(), torch.randn(3, 2, SIZE, SIZE), LABELS[:3]
    for block in model.blocks:
        count(block)
    sampler = dtr.Sampler(model, y=y)
    first = [sampler(x, t) for t in (999, 500)]
    assert rows == [3, 3, 3, 3]
    for module in sampler._conditioned:  # what is kept: of the two samples of one class, one
        assert module.__dict__.get("forward") is None
    assert {len(known) for known in sampler._modulations._known.values()} == {2}
    for _ in range(2):
        assert all(torch.equal(sampler(x, t), out) for t, out in zip((999, 500), first, strict=True))
        assert rows == [3, 3, 3, 3, 3, 3]  # each once more, to see whether that gives the same

    with torch.no_grad():
        model.blocks[0].adaLN_modulation[1].bias.add_(1)
    assert (sampler(x, 500) - first[1]).abs().max() > 1e-3, "the weights have changed"
    dtr.Sampler(model, remember=False, y=y)(x, 500)
    assert len(sampler._modulations._known) == len(dict.fromkeys(sampler._conditioned))


def test_samples_are_alike_only_where_all_of_the_conditioning_is():
    model = make_model()
    calls = []

    def forward(x, t, y, extra=None, scale=1.0):
        calls.append((extra, scale))
        return dtr.nn.DiT.forward(model, x, t, y)

    model.forward = forward
    x, alike = torch.randn(3, 2, SIZE, SIZE), torch.tensor([1, 1, 1])
    for conditioning, kept in [
        ({"y": alike}, 1),
        ({"y": alike, "scale": 2.0, "extra": None}, 1),
        ({"y": LABELS[:3]}, 2),
        ({"y": alike, "extra": torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 2.0]])}, 2),
        ({"y": alike, "extra": torch.tensor([2**60, 2**60 + 1, 2**60])}, 2),
        ({"y": alike, "extra": ["a", "b", "a"]}, 3),
        ({"y": alike, "extra": {"mask": alike}}, 3),
    ]:
        sampler = dtr.Sampler(model, **conditioning)
        torch.testing.assert_close(sampler(x, 5), dtr.nn.DiT.forward(model, x, 5, conditioning["y"]))
        assert {len(known) for known in sampler._modulations._known.values()} == {kept}, conditioning


class Drifting(torch.nn.Module):
    """A model whose conditioning is not all that its blocks are given."""

    def __init__(self, of_images):
        super().__init__()
        model = facebook_dit()
        self.y_embedder, self.blocks, self.of_images = model.y_embedder, model.blocks, of_images

    def forward(self, x, t, y):
        c = self.y_embedder(y) + self.of_images * x.mean((1, 2))[:, None]
        for block in self.blocks:
            x = block(x, c)
        return x


def test_a_model_whose_modulation_depends_on_more_is_refused():
    x, y = torch.randn(2, 9, 32), torch.tensor([1, 2])
    steady, drifting = (dtr.swap_blocks(Drifting(of).eval(), ROUTING) for of in (0.0, 3.0))
    sampler = dtr.Sampler(steady, y=y)
    assert torch.equal(sampler(x, 5), sampler(x, 5))
    sampler = dtr.Sampler(drifting, y=torch.tensor([1, 1]))
    for _ in range(3):  # at every attempt
        with pytest.raises(RuntimeError, match="depends on something else too; give Sampler remember=False"):
            sampler(x, 5)
    sampler = dtr.Sampler(drifting, y=y)
    sampler(x, 5)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="depends on something else too"):
            sampler(x + torch.randn(2, 1, 1), 5)
    sampler = dtr.Sampler(drifting, remember=False, y=y)
    torch.testing.assert_close(sampler(x, 5), drifting(x, torch.tensor([5, 5]), y))


def test_a_modulation_that_blocks_share():
    model, x = facebook_dit().eval(), torch.randn(3, 3, SIZE, SIZE)
    model.blocks[1].adaLN_modulation = model.blocks[0].adaLN_modulation
    dtr.swap_blocks(model, ROUTING)
    sampler = dtr.Sampler(model, y=LABELS[:3])
    for _ in range(3):
        torch.testing.assert_close(sampler(x, 5), model(x, torch.tensor([5] * 3), LABELS[:3]))


def test_the_callers_tensors_and_dtypes_may_change():
    model, x, y = make_model(), torch.randn(3, 2, SIZE, SIZE), LABELS[:3].clone()
    sampler = dtr.Sampler(model, y=y)
    expected = sampler(x, 5)
    y.fill_(0)
    assert torch.equal(sampler(x, 5), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = sampler(x, 5)
    assert torch.equal(sampler(x, 5), expected) and not torch.equal(narrow, expected)
    model.double()
    torch.testing.assert_close(sampler(x.double(), 5).float(), expected)


def test_timesteps_first():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = facebook_dit()

        def forward(self, t, images, y):
            return self.inner.forward(images, t, y)

    model = dtr.swap_blocks(Model().eval(), None)
    x, y = torch.randn(3, 3, SIZE, SIZE), LABELS[:3]
    torch.testing.assert_close(dtr.Sampler(model, y=y)(x, 5), model(torch.tensor([5] * 3), x, y))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
def test_copies_run_a_model_of_their_own(clone):
    sampler, x = dtr.Sampler(make_model(), guidance_scale=2.0, y=LABELS), torch.randn(3, 2, SIZE, SIZE)
    expected = sampler(x, 5)
    other = clone(sampler)
    assert torch.equal(other(x, 5), expected)
    with torch.no_grad():
        for parameter in sampler.model.parameters():
            parameter.zero_()
    assert torch.equal(other(x, 5), expected) and not sampler(x, 5).any()


def test_threads_that_share_a_model():
    model, x = make_model(), torch.randn(3, 2, SIZE, SIZE)
    samplers = [dtr.Sampler(model, y=torch.tensor([k, k, k])) for k in range(CLASSES)]
    expected = [model(x, 5, torch.tensor([k, k, k])) for k in range(CLASSES)]
    with ThreadPoolExecutor(CLASSES) as threads:
        for _ in range(10):
            for out, right in zip(threads.map(lambda sampler: sampler(x, 5), samplers), expected, strict=True):
                torch.testing.assert_close(out, right)


def test_a_forward_of_the_users_own_is_kept():
    model, x = make_model(), torch.randn(3, 2, SIZE, SIZE)
    layer = model.blocks[0].adaLN_modulation
    layer.forward = lambda c: 2 * torch.nn.Sequential.forward(layer, c)
    own = layer.forward
    out = dtr.Sampler(model, y=LABELS[:3])(x, 5)
    assert layer.forward is own
    torch.testing.assert_close(out, model(x, 5, LABELS[:3]))


def test_a_failed_step_leaves_the_model_as_it_was():
    model = make_model()
    sampler = dtr.Sampler(model, y=LABELS)
    with pytest.raises(ValueError, match="must have shape"):
        sampler(torch.randn(6, 3, SIZE, SIZE), 5)
    assert not any("forward" in vars(module) for module in model.modules())


def test_one_sampler_is_not_disturbed_by_another():
    model, x = make_model(), torch.randn(3, 2, SIZE, SIZE)
    one, other = dtr.Sampler(model, y=LABELS[:3]), dtr.Sampler(model, y=LABELS[3:])
    expected = one(x, 7)
    other(x, 7)
    assert torch.equal(one(x, 7), expected)


# --- refusals


def test_refusals():
    model, x = make_model(), torch.randn(3, 2, SIZE, SIZE)
    sampler = dtr.Sampler(model, y=LABELS[:3])
    sampler(x, 5)
    for wrong, error, says in [
        (lambda: dtr.Sampler(facebook_dit(), y=LABELS), TypeError, "no block of this DiT is swapped"),
        (lambda: dtr.Sampler(torch.compile(make_model()), y=LABELS), ValueError, "the model is compiled"),
        (lambda: dtr.Sampler(model, y=LABELS, z=LABELS[:2]), ValueError, "one entry per sample"),
        (lambda: dtr.Sampler(model, guidance_scale=2.0, y=LABELS[:3]), ValueError, "must hold 2B samples"),
        (lambda: sampler(x[:2], 5), ValueError, "this Sampler is for 3 samples, but"),
        (lambda: sampler(x, torch.tensor([5, 5, 5])), ValueError, "one timestep for the whole batch"),
        (lambda: sampler(x, 5.0), ValueError, "t was of type int before and is 5.0 now"),
        (lambda: sampler(x, "5"), TypeError, "t must be a number, got '5'"),
        (lambda: sampler(x, None), TypeError, "t must be a number, got None"),
        (lambda: dtr.Sampler(model, 2.0, guided_channels=0, y=LABELS), ValueError, "guided_channels must be at least"),
        (lambda: dtr.Sampler(model, 2.0, guided_channels=5, y=LABELS)(x, 5), ValueError, "at most the 4 channels"),
        (lambda: sampler(x, T), ValueError, "0..999|0 to 999|out of range|between"),
        (lambda: dtr.Sampler(model, cuda_graphs=True, y=LABELS[:3])(x, 5), ValueError, "needs x on a GPU"),
    ]:
        with pytest.raises(error, match=says):
            wrong()
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        sampler(x, 5)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("swapped", [False, True])
def test_cuda_graphs_replay_every_timestep(swapped):
    if swapped:
        model, channels = dtr.swap_blocks(facebook_dit().eval().cuda(), ROUTING), 3
    else:
        model, channels = make_model().cuda(), 2
    y = LABELS[:3].cuda()
    eager, replayed = dtr.Sampler(model, y=y), dtr.Sampler(model, cuda_graphs=True, y=y)
    for _ in range(2):
        x = torch.randn(3, channels, SIZE, SIZE, device="cuda")
        for t in (999, 321, 0):
            torch.testing.assert_close(replayed(x, t), eager(x, t))
    with pytest.raises(ValueError, match="were captured for x"):
        replayed(x.double(), 0)


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu():
    model, x = make_model().cuda(), torch.randn(3, 2, SIZE, SIZE, device="cuda")
    sampler = dtr.Sampler(model, y=LABELS[:3].cuda())
    for _ in range(2):  # what is remembered is checked once
        sampler(x, 5)
    with waiting_is_an_error():
        for t in (5, 4):
            sampler(x, t)
