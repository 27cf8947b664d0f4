"""Which channels a timestep sees: the paper's formula for windows, and the random subsets of its baseline."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from gpu_waits import waiting_is_an_error
from hypothesis import given, settings
from hypothesis import strategies as st

import dtr_kernels as dtr

DIT_WIDTHS = [384, 768, 1024, 1152]


def formula(time, alpha, channels, width):
    """The first channel of each window as numpy computes it, rounding half to even."""
    return np.round(time**alpha * (channels - width)).astype(np.int64)


def timesteps(T):
    return np.linspace(0, 1, T)  # as the public code has it; np.arange(T) / (T - 1) is not the same


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [*DIT_WIDTHS, 1, 7, 97, 1155])
@pytest.mark.parametrize("T", [1, 2, 3, 50, 1000])
def test_every_timestep_has_the_window_of_the_formula(device, T, channels):
    betas = [beta for beta in (1.0, 0.8, 0.5, 1 / 3, 1 / channels) if beta * channels >= 1]
    for alpha, beta in itertools.product((0.25, 1.0, 2.0, 2.5, 4.0), betas):
        window = dtr.DenoisingTaskRouting(T, alpha, beta).window(torch.arange(T, device=device), channels)
        width = int(beta * channels)
        assert (window.width, window.channels, window.shared_start) == (width, channels, None)
        assert window.start.dtype == torch.int32 and window.start.device.type == device.type
        expected = formula(timesteps(T), alpha, channels, width)
        np.testing.assert_array_equal(window.start.cpu(), expected, f"{alpha=} {beta=}")


# With these, halves are rounded otherwise for t / (T - 1) than for np.linspace(0, 1, T).
NEAR_HALVES = [(15, 1.0, 0.8, 384), (25, 2.0, 0.25, 1152), (43, 1.0, 0.8, 1152), (393, 4.0, 0.5, 768)]
NEAR_HALVES += [(491, 1.0, 0.8, 1024), (949, 4.0, 0.5, 768)]


@pytest.mark.parametrize("T, alpha, beta, channels", NEAR_HALVES)
def test_windows_near_halves_are_those_of_linspace(device, T, alpha, beta, channels, fresh_compiler):
    routing, t = dtr.DenoisingTaskRouting(T, alpha, beta), torch.arange(T, device=device)
    expected = formula(timesteps(T), alpha, channels, int(beta * channels))
    assert (expected != formula(np.arange(T) / (T - 1), alpha, channels, int(beta * channels))).any()
    compiled = torch.compile(lambda t: routing.window(t, channels).start, fullgraph=True, backend="aot_eager")
    starts = {
        "eager": routing.window(t, channels).start,
        "compiled": compiled(t),
        "float": dataclasses.replace(routing, float_timesteps=True).window(t.double(), channels).start,
        "number": torch.tensor([routing.window(number, channels).shared_start for number in range(T)]),
        "reference": dtr.reference.routing_mask(t, channels, T, alpha, beta).argmax(1),
    }
    for name, start in starts.items():
        np.testing.assert_array_equal(start.cpu(), expected, name)


def test_half_rounds_to_even():
    """The middle one of three timesteps is at half the travel; Python's round(2.5) is 2 and round(3.5) is 4."""
    for channels, start in ((2, 0), (4, 2), (6, 2), (8, 4)):
        assert dtr.DenoisingTaskRouting(3, 1.0, beta=1 / channels).window(1, channels).shared_start == start


@pytest.mark.parametrize("channels", DIT_WIDTHS)
def test_the_papers_window_slides_from_the_first_to_the_last_channel(channels):
    window = dtr.DenoisingTaskRouting().window(torch.arange(1000), channels)
    assert window.width == int(0.8 * channels)
    assert window.start[0] == 0 and window.start[-1] == channels - window.width
    assert window.start[500] < 0.07 * window.start[-1]  # alpha 4: the clean half of the process shares its channels


@pytest.mark.parametrize("T", [1, 2, 1000])
@pytest.mark.parametrize("channels", [5, 33, 384])
def test_the_reference_mask_is_the_window(device, channels, T):
    t = torch.arange(0, T, max(T // 37, 1), device=device)
    for alpha, beta in ((4.0, 0.8), (0.5, 0.3), (1.0, 1.0)):
        mask = dtr.DenoisingTaskRouting(T, alpha, beta).window(t, channels).mask()
        torch.testing.assert_close(mask, dtr.reference.routing_mask(t, channels, T, alpha, beta).bool(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_continuous_time_is_used_as_it_is(device, dtype):
    t = torch.linspace(0, 1, 257, device=device).to(dtype)
    window = dtr.DenoisingTaskRouting(num_timesteps=10, alpha=4.0).window(t, 384)
    np.testing.assert_array_equal(window.start.cpu(), formula(t.double().cpu().numpy(), 4.0, 384, window.width))


INTEGERS = [getattr(torch, f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("T", [100, 1000, 40000])
def test_integer_timesteps_of_any_dtype(device, dtype, T):
    """Also those too narrow to hold T - 1, of which a respaced or truncated sampler may use the low numbers only."""
    largest = min(torch.iinfo(dtype).max, T - 1)
    t = sorted({0, 1, largest // 3, largest - 1, largest})
    window = dtr.DenoisingTaskRouting(T).window(torch.tensor(t, device=device).to(dtype), 1152)
    expected = formula(timesteps(T)[t], 4.0, 1152, window.width)
    np.testing.assert_array_equal(window.start.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 2, 393, 1000])
def test_float_timesteps_are_the_integers_and_what_lies_between(device, dtype, T):
    routing = dtr.DenoisingTaskRouting(T, beta=0.5, float_timesteps=True)
    t = torch.arange(T, device=device)
    window = routing.window(t, 768)
    torch.testing.assert_close(routing.window(t.to(dtype), 768).start, window.start, rtol=0, atol=0)
    assert torch.equal(routing.window(t, 768).start, dtr.DenoisingTaskRouting(T, beta=0.5).window(t, 768).start)
    between = (t[:-1] + 0.25).to(dtype)
    expected = formula(between.double().cpu().numpy() * (1 / max(T - 1, 1)), 4.0, 768, window.width)
    np.testing.assert_array_equal(routing.window(between, 768).start.cpu(), expected)


@pytest.mark.parametrize("t", [978.61, 500.0, 998.9999, np.float32(978.61), np.float16(500), 7, np.int32(7)], ids=repr)
def test_a_float_timestep_for_the_whole_batch(t):
    routing = dtr.DenoisingTaskRouting(float_timesteps=True)
    one, batch = routing.window(t, 1152), routing.window(torch.tensor([float(t)], dtype=torch.float64), 1152)
    assert [one.shared_start] == batch.start.tolist()
    assert one.shared_start == round((float(t) / 999) ** 4 * (1152 - 921))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rounding_beyond_the_ends_is_the_end(device, dtype):
    """Noise levels such as 1 + 2e-7 and -3e-8, that arithmetic in a scheduler leaves; and timestep numbers."""
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    for last, routing in ((1, dtr.DenoisingTaskRouting()), (999, dtr.DenoisingTaskRouting(float_timesteps=True))):
        t = torch.tensor([-2 * eps * last, last * (1 + 2 * eps)], dtype=torch.float64, device=device).to(dtype)
        assert routing.window(t, 1152).start.tolist() == [0, 1152 - 921]
        for far in (-6 * eps * last, last * (1 + 8 * eps)):
            with pytest.raises(ValueError, match=f"t must be in 0..{last}"):
                routing.window(torch.tensor([far], dtype=dtype), 1152)
    for t in (1 + 2e-7, -3e-8):  # an fp32 number, as Python has it
        assert dtr.DenoisingTaskRouting().window(t, 1152).shared_start in (0, 1152 - 921)


def test_a_number_out_of_range_is_told_both_ways_out():
    with pytest.raises(ValueError, match=r"float_timesteps=True.* noise_level"):
        dtr.DenoisingTaskRouting().window(torch.tensor([978.61]), 64)
    with pytest.raises(ValueError, match=r"t must be in 0..999; .*num_timesteps=1000; got values from 1010.0"):
        dtr.DenoisingTaskRouting(float_timesteps=True).window(1010.0, 64)


def test_float_timesteps_compile_and_export(fresh_compiler):
    class Start(torch.nn.Module):
        def forward(self, t):
            return dtr.DenoisingTaskRouting(float_timesteps=True).window(t, 1152).start

    t = torch.tensor([0.0, 978.61, 999.0])
    torch.library.opcheck(torch.ops.dtr_kernels.window_starts, (t, 1000, 4.0, 231, True))
    expected = Start()(t)
    assert torch.equal(torch.compile(Start(), fullgraph=True, backend="aot_eager")(t), expected)
    assert torch.equal(torch.export.export(Start(), (t,)).module()(t), expected)


def test_numpy_numbers_are_numbers():
    """PyTorch takes some of them itself and refuses others."""
    plain = dtr.DenoisingTaskRouting(20, 2.0, 0.5)
    routing = dtr.DenoisingTaskRouting(np.int64(20), np.float32(2), np.float32(0.5))
    assert routing == plain and type(routing.num_timesteps) is int
    assert routing.window(np.int64(7), np.int32(64)).shared_start == plain.window(7, 64).shared_start
    random, t = dtr.RandomRouting(np.int16(20), np.float64(0.5), np.uint8(3)), torch.arange(20)
    assert torch.equal(random.mask(t, np.int64(64)), dtr.RandomRouting(20, 0.5, 3).mask(t, 64))


@pytest.mark.parametrize("t", [0, 1, 500, 999, 0.0, 0.5, 1.0, np.int64(500), np.float64(0.5)], ids=repr)
def test_a_python_number_is_a_tensor_with_that_one_timestep(t):
    routing = dtr.DenoisingTaskRouting()
    batch = routing.window(torch.tensor([t, t]), 384)
    with torch.device("meta"):  # a GPU as PyTorch's default device would have to be waited for
        one = routing.window(t, 384)
    assert one.start.shape == (1,) and one.start.dtype == torch.int32
    assert type(one.shared_start) is int and [one.shared_start] * 2 == batch.start.tolist() == one.start.tolist() * 2
    assert (one.width, one.channels) == (batch.width, batch.channels)
    assert batch.shared_start is None


@settings(max_examples=200, deadline=None)
@given(T=st.integers(1, 300), alpha=st.floats(0.01, 20), channels=st.integers(1, 2000), ratio=st.floats(0, 1))
def test_windows_stay_inside_and_never_move_back(T, alpha, channels, ratio):
    beta = max(ratio, (1 + 1e-9) / channels) if channels > 1 else 1.0
    window = dtr.DenoisingTaskRouting(T, alpha, beta).window(torch.arange(T), channels)
    assert 1 <= window.width <= channels
    assert window.start[0] == 0 and (window.start.diff() >= 0).all()
    assert window.start[-1] == (channels - window.width if T > 1 else 0)


# --- ChannelWindow ---------------------------------------------------------------------------------------------------


def test_mask_is_one_on_the_window_only(device):
    start = torch.tensor([0, 3, 6], dtype=torch.int32, device=device)
    mask = dtr.ChannelWindow(start, width=4, channels=10).mask()
    assert mask.dtype == torch.bool and mask.device == start.device
    assert [row.nonzero().flatten().tolist() for row in mask] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


def test_for_batch_repeats_one_start_and_keeps_a_start_per_sample():
    cpu = torch.device("cpu")
    one = dtr.ChannelWindow(torch.tensor([3], dtype=torch.int32), 4, 10).for_batch(5, cpu)
    assert one.start.tolist() == [3] * 5 and one.start.is_contiguous()  # kernels read it as an array
    many = dtr.ChannelWindow(torch.tensor([3, 4], dtype=torch.int32), 4, 10).for_batch(2, cpu)
    assert many.start.tolist() == [3, 4]
    assert (many.width, many.channels, many.shared_start) == (4, 10, None)


def test_for_batch_of_a_python_number_keeps_its_start_and_goes_to_the_device(device):
    window = dtr.DenoisingTaskRouting().window(999, 384)
    batch = window.for_batch(3, device)
    assert batch.start.tolist() == [384 - 307] * 3 and batch.shared_start == 384 - 307
    assert batch.start.dtype == torch.int32 and batch.start.device.type == device.type
    torch.testing.assert_close(batch.mask(), window.mask().expand(3, -1).to(device))


def test_routings_and_windows_are_immutable():
    """A window is shared by all blocks of a model and a routing by all its steps."""
    window = dtr.DenoisingTaskRouting().window(3, 16)
    for thing, name in ((dtr.DenoisingTaskRouting(), "beta"), (dtr.RandomRouting(), "seed"), (window, "width")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, 1)


# --- random routing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta, channels", [(1.0, 1), (0.3, 5), (0.8, 96), (1.0, 96), (1 / 3, 1155)])
def test_random_subsets_have_the_width_of_the_windows(device, beta, channels):
    mask = dtr.RandomRouting(100, beta).mask(torch.arange(100, device=device), channels)
    assert mask.dtype == torch.bool and mask.shape == (100, channels) and mask.device.type == device.type
    assert (mask.sum(1) == int(beta * channels)).all()


def test_random_subsets_belong_to_timesteps():
    """The same timestep has the same subset in any batch, and different timesteps have different ones."""
    routing = dtr.RandomRouting(50, 0.5)
    table = routing.mask(torch.arange(50), 64)
    t = torch.tensor([7, 3, 7, 49])
    assert torch.equal(routing.mask(t, 64), table[t])
    assert torch.equal(routing.mask(t.to(torch.uint8), 64), table[t])
    assert len(table.unique(dim=0)) == 50
    assert not torch.equal(table.sort(descending=True).values, table)  # scattered, not windows


def test_random_subsets_follow_their_seed_only():
    t = torch.arange(20)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = dtr.RandomRouting(20, 0.5, seed=123456).mask(t, 31)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    # 30 other routings in between: whatever is kept of earlier calls, the subsets come out the same.
    others = [dtr.RandomRouting(20, 0.5, seed).mask(t, 31) for seed in range(30)]
    assert torch.equal(dtr.RandomRouting(20, 0.5, seed=123456).mask(t, 31), first)
    assert not any(torch.equal(other, first) for other in others)


def test_changing_a_mask_leaves_the_routing_alone():
    routing, t = dtr.RandomRouting(20, 0.5), torch.arange(20)
    expected = routing.mask(t, 16).clone()
    routing.mask(t, 16).zero_()
    assert torch.equal(routing.mask(t, 16), expected)


@pytest.mark.gpu
def test_random_subsets_are_the_same_on_every_device():
    t = torch.arange(100)
    assert torch.equal(dtr.RandomRouting(100).mask(t.cuda(), 96).cpu(), dtr.RandomRouting(100).mask(t, 96))


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("continuous", [False, True])
def test_windows_are_made_on_the_gpu_without_waiting_for_it(continuous):
    routing = dtr.DenoisingTaskRouting()
    t = torch.rand(8, device="cuda") if continuous else torch.randint(1000, (8,), device="cuda")
    with waiting_is_an_error():
        window = routing.window(t, 1152)
        batch = window.for_batch(8, t.device)
        mask = batch.mask()
    assert window.start.device == t.device
    assert torch.equal(mask.cpu(), routing.window(t.cpu(), 1152).mask())


@pytest.mark.gpu
def test_numbers_and_random_subsets_do_not_wait_for_the_gpu():
    routing, t = dtr.RandomRouting(), torch.randint(1000, (8,), device="cuda")
    routing.mask(t, 1152)  # the first call copies the table
    with waiting_is_an_error():
        routing.mask(t, 1152)
        batch = dtr.DenoisingTaskRouting().window(999, 384).for_batch(3, t.device)
    assert batch.start.tolist() == [384 - 307] * 3


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "routing, name",
    [(dtr.DenoisingTaskRouting(60, alpha=2.0, beta=0.5), "alpha 2"), (dtr.RandomRouting(60, 0.5), "random routing")],
    ids=["window", "random"],
)
def test_the_picture_shows_the_mask(tmp_path, monkeypatch, routing, name):
    imread = pytest.importorskip("matplotlib.image").imread
    monkeypatch.chdir(tmp_path)
    assert dtr.plot_routing(dtr.DenoisingTaskRouting(10), channels=16).axes and not list(tmp_path.iterdir())
    t = torch.arange(60)
    mask = routing.mask(t, 24) if isinstance(routing, dtr.RandomRouting) else routing.window(t, 24).mask()
    figure = dtr.plot_routing(routing, tmp_path / "routing.png", 24)
    (axes,) = figure.axes
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array(), mask.T)  # timesteps to the right, channels upwards
    assert image.origin == "lower"
    assert axes.get_xlabel().startswith("timestep") and axes.get_ylabel() == "channel"
    assert axes.get_xticks().tolist() == [0, 12, 24, 36, 48, 59]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["active", "inactive"]
    assert name in axes.get_title() and "beta 0.5" in axes.get_title() and "12 of 24" in axes.get_title()

    picture = imread(tmp_path / "routing.png")
    height = picture.shape[0]
    scale = height / figure.bbox.height
    for timestep in (0, 20, 40, 59):
        for channel in (0, 11, 23):
            x, y = (axes.transData.transform((timestep, channel)) * scale).astype(int)
            brightness = picture[height - 1 - y, x, :3].mean()
            assert (brightness < 0.9) == bool(mask[timestep, channel]), (timestep, channel)


def test_a_path_in_the_place_of_channels_is_refused():
    with pytest.raises(TypeError, match="path must name a file or be None, got 24; give channels=24 by name"):
        dtr.plot_routing(dtr.DenoisingTaskRouting(10), 24)
