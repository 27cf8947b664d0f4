"""swap_blocks on models of SiT's kind: continuous times, in either direction."""

import copy
import pickle

import pytest
import swapping
import torch
from comparing import assert_as_exact, differ, results, snapshot, widened
from models import DIM, sit
from refusals import refused

import dtr_kernels as dtr
from dtr_kernels.swap import one_timestep

ROUTING = dtr.DenoisingTaskRouting(alpha=3.0)

pytestmark = pytest.mark.usefixtures("one_thread", "seed")


def batch(times=(0.0, 0.2, 0.61, 1.0)):
    return torch.randn(4, 4, 8, 8), torch.tensor(times), torch.randint(10, (4,))


def from_data_to_noise(t):
    """SiT's time in the routing's direction."""
    return 1 - t


DIRECTIONS = {"noise at 1": None, "noise at 0": from_data_to_noise}


def mask_at(noise):
    """DTR's mask [B, C] at noise levels in [0, 1], one sample after the other."""
    width = int(0.8 * DIM)
    mask = torch.zeros(len(noise), DIM)
    for b, level in enumerate(noise.tolist()):
        start = round(level**3 * (DIM - width))
        mask[b, start : start + width] = 1
    return mask


def masked(model, direction):
    return swapping.masked(model, lambda t: mask_at(t if direction is None else 1 - t))


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_routing_matches_the_masked_blocks(direction):
    model, inputs = sit(), batch()
    expected = results(masked(model, direction), inputs)
    wide, *batches = widened(model, inputs)
    exact = results(masked(wide, direction), *batches)
    others = [other for other in DIRECTIONS.values() if other is not direction]
    assert differ(results(model, inputs), expected) and differ(results(masked(model, *others), inputs), expected)
    assert_as_exact(results(dtr.swap_blocks(model, ROUTING, noise_level=direction), inputs), expected, exact)


def test_guidance():
    model, (x, _, y) = sit(), batch()
    t = torch.tensor([0.3]).expand(4)
    expected = masked(model, from_data_to_noise).forward_with_cfg(x, t, y, 1.5)
    dtr.swap_blocks(model, ROUTING, noise_level=from_data_to_noise)
    torch.testing.assert_close(model.forward_with_cfg(x, t, y, 1.5), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_restore_undoes_everything(direction):
    model, inputs = sit(), batch()
    expected, before = results(model, inputs), snapshot(model)
    results(dtr.swap_blocks(model, ROUTING, noise_level=direction), inputs)
    assert snapshot(dtr.restore_blocks(model)) == before
    torch.testing.assert_close(results(model, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_the_direction(clone):
    model, inputs = dtr.swap_blocks(sit(), ROUTING, noise_level=from_data_to_noise), batch()
    cloned = clone(model)
    assert torch.equal(cloned(*inputs), model(*inputs))
    assert differ([dtr.swap_blocks(dtr.restore_blocks(model), ROUTING)(*inputs)], [cloned(*inputs)])


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_a_time_that_the_batch_shares(direction, monkeypatch):
    model, (x, _, y) = dtr.swap_blocks(sit(), ROUTING, noise_level=direction), batch()
    starts, made = [], model._dtr.make_windows
    monkeypatch.setattr(model._dtr, "make_windows", lambda t: starts.append(made(t)) or starts[-1])
    sample = one_timestep(model)
    for t in (0.0, 0.7, 1.0):
        expected = model(x, torch.full((4,), t), y)
        torch.testing.assert_close(sample(x, t, {"y": y}), expected, rtol=1e-4, atol=1e-5)
        by_tensor, by_number = (windows[DIM] for windows in starts[-2:])
        assert by_tensor.shared_start is None and by_number.shared_start == by_tensor.start[0]
    assert model(x, torch.full((4,), 0.7), y).isfinite().all() and starts[-1][DIM].shared_start is None


def test_one_timestep_refuses_a_model_around_the_routed_one():
    model = sit()
    with pytest.raises(TypeError, match="no block of this SiT is swapped"):
        one_timestep(model)
    dtr.swap_blocks(model, ROUTING)
    with pytest.raises(ValueError, match="not the module that takes the timesteps"):
        one_timestep(torch.nn.Sequential(model))


class NoFunction:
    """Something that cannot be called."""


@pytest.mark.parametrize(
    ("noise_level", "routing", "error", "fragments"),
    [
        (lambda t: 1 - t, ROUTING, ValueError, ["<lambda>", "define it by def at the top of a module"]),
        (NoFunction(), ROUTING, TypeError, ["noise_level must be a function of the timesteps or None", "NoFunction"]),
        (from_data_to_noise, None, ValueError, ["give a routing too"]),
    ],
)
def test_refuses_a_noise_level_that_does_not_serve(noise_level, routing, error, fragments):
    model = sit()
    before = snapshot(model)
    refused(lambda: dtr.swap_blocks(model, routing, noise_level=noise_level), error, fragments)
    assert snapshot(model) == before


def test_refuses_times_out_of_range():
    model, (x, t, y) = dtr.swap_blocks(sit(), ROUTING), batch()
    with pytest.raises(ValueError, match=r"continuous time in \[0, 1\]"):
        model(x, 1000 * t, y)
