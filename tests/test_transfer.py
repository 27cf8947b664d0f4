"""Negative transfer gaps, and the model that two models make together."""

from __future__ import annotations

import math
import sys
from functools import partial

import pytest
import torch
from refusals import refused
from torch import nn

import dtr_kernels as dtr
from dtr_kernels.analysis import IntervalSpecialist

pytestmark = pytest.mark.usefixtures("one_thread")


class Named(nn.Module):
    """Says in every sample of its output who it is and what that sample was given."""

    def __init__(self, name, dtype=torch.float64):
        super().__init__()
        self.name, self.dtype = name, dtype
        self.batches = []

    def forward(self, x, t, y, scale, *, extra=None, table=None, note="none"):
        self.batches.append(len(x))
        extra = torch.zeros_like(x[:, 0]) if extra is None else extra
        last = scale if table is None else scale + table.sum()
        columns = self.name, x.sum(1), t, y, extra, last
        return torch.stack([column * torch.ones_like(x[:, 0]) for column in columns], dim=1).to(self.dtype)

    def forward_with_cfg(self, x, t, y, scale):
        return -self.forward(x, t, y, scale)


class Constant(nn.Module):
    """Predicts the same at every timestep."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value)))

    def forward(self, x, t):
        return self.value.expand(len(x), 1)


def mean_square(model):
    """Over the timesteps 0..9, of which each wants its own number; what a good model predicts is t."""
    t = torch.arange(10)
    with torch.no_grad():
        return (model(torch.zeros(10, 1), t)[:, 0] - t).square().mean().item()


# --- the mixed model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("B", [2, 7, 64])
def test_every_sample_goes_to_its_model_with_its_own_arguments(seed, device, B, dtype):
    shared, specialist = Named(1), Named(2)
    model = IntervalSpecialist(shared, specialist, 3, 6)
    x = torch.randn(B, 4, dtype=torch.float64, device=device)
    t = torch.randint(0, 10, (B,), device=device).to(dtype)
    y, extra = torch.randint(0, 100, (B,), device=device), torch.randn(B, dtype=torch.float64, device=device)
    table = torch.randn(B + 1, device=device)  # no sample's own
    out = model(x, t, y, 1.5, extra=extra, table=table)
    who = [2.0 if 3 <= each < 6 else 1.0 for each in t.tolist()]
    scale = torch.full((B,), 1.5, device=device) + table.sum()
    expected = torch.stack([torch.tensor(who, device=device).double(), x.sum(1), t, y, extra, scale], dim=1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    assert shared.batches == [who.count(1.0)] * (1.0 in who) and specialist.batches == [who.count(2.0)] * (2.0 in who)


@pytest.mark.parametrize("t", [2, 3, 5, 6, 2.9, 3.0, 5.9, 6.0])
def test_one_number_sends_the_whole_batch_to_one_model(seed, t):
    model = IntervalSpecialist(Named(1), Named(2), 3, 6)
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.arange(5)
    out = model(x, t, y, 0.0, note="passed on")
    assert out[:, 0].tolist() == [2.0 if 3 <= t < 6 else 1.0] * 5
    assert torch.equal(out[:, 1], x.sum(1)) and torch.equal(out[:, 3], y.double())
    assert (out[:, 2] == t).all()


def test_guidance_goes_to_both_models(seed):
    """The halves of a batch for guidance have the same timesteps, and so have the halves of each model's part."""
    t = torch.randint(0, 10, (6,)).repeat(2)
    t[[0, 6]], t[[1, 7]] = 4, 8
    model, plain = dit(), dit()
    mixed = IntervalSpecialist(plain, model, 3, 6)
    x, y = torch.randn(6, 1, 4, 4).repeat(2, 1, 1, 1), torch.cat([torch.randint(3, (6,)), torch.full((6,), 3)])
    out = mixed.forward_with_cfg(x, t, y, 2.5)
    rounding = 1e-4 * out.abs().max().item()
    for b in range(6):
        own = model if 3 <= t[b] < 6 else plain
        pair = [b, b + 6]
        alone = own.forward_with_cfg(x[pair], t[pair], y[pair], 2.5)
        torch.testing.assert_close(out[pair], alone, rtol=0, atol=rounding)
    assert torch.equal(mixed.forward_with_cfg(x, 4, y, 2.5), model.forward_with_cfg(x, 4, y, 2.5))


def dit():
    model = dtr.nn.DiT(4, 2, 1, 16, 2, 2, num_classes=3, learn_sigma=False, routing=dtr.DenoisingTaskRouting(10))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


def test_outputs_of_two_dtypes_are_promoted(seed):
    mixed = IntervalSpecialist(Named(1, torch.float32), Named(2, torch.bfloat16), 3, 6)
    out = mixed(torch.ones(2, 4), torch.tensor([4, 0]), torch.zeros(2), 0.0)
    assert out.dtype == torch.float32 and out[:, 0].tolist() == [2, 1]


def test_a_mixed_model_is_a_module_of_both_whose_hooks_run(seed):
    shared, specialist, called = Constant(1), Constant(2), []
    shared.register_forward_hook(lambda *_: called.append("shared"))
    specialist.register_forward_hook(lambda *_: called.append("specialist"))
    mixed = IntervalSpecialist(shared, specialist, 3, 6).eval()
    assert not shared.training and not specialist.training
    assert set(mixed.parameters()) == {shared.value, specialist.value}
    mixed(torch.zeros(4, 1), torch.tensor([0, 3, 5, 6])).sum().backward()
    assert shared.value.grad == 2 and specialist.value.grad == 2
    assert sorted(called) == ["shared", "specialist"]


def test_what_does_not_fit_is_refused(seed):
    model = Constant(0)
    refused(lambda: IntervalSpecialist(model, model, 3, 3), ValueError, ["start must be less than stop", "3 and 3"])
    mixed = IntervalSpecialist(model, model, 3, 6)
    for t in torch.zeros(3), torch.zeros(4, 1), torch.tensor(5):
        refused(lambda t=t: mixed(torch.zeros(4, 1), t), ValueError, ["t must have shape [4]", str(list(t.shape))])


# --- the gaps --------------------------------------------------------------------------------------------------------


def test_gaps_are_negative_where_the_specialist_is_better():
    """The shared model predicts 4 everywhere; the best constants on 0..1, 2..5, 6..9 are 0.5, 3.5, 7.5."""
    clusters = dtr.IntervalClusters((0, 2, 6, 10), "timestep")
    gaps = dtr.negative_transfer_gaps(
        mean_square, Constant(4), [Constant(0.5), Constant(9), Constant(7.5)], clusters, progress=False
    )
    squares = [(t - 4) ** 2 for t in range(10)]
    expected = [
        (0.25 + 0.25 - squares[0] - squares[1]) / 10,
        (sum((t - 9) ** 2 for t in range(2, 6)) - sum(squares[2:6])) / 10,
        (sum((t - 7.5) ** 2 for t in range(6, 10)) - sum(squares[6:])) / 10,
    ]
    assert expected[0] < 0 < expected[1] and expected[2] < 0
    assert gaps.dtype == torch.float64 and gaps.device.type == "cpu"
    torch.testing.assert_close(gaps, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)


def test_the_shared_model_as_its_own_specialist_has_no_gap(seed):
    shared = Constant(torch.randn(()))
    gaps = dtr.negative_transfer_gaps(mean_square, shared, [shared] * 5, dtr.interval_clusters(10, 5), progress=False)
    assert gaps.tolist() == [0.0] * 5


def test_a_cluster_without_specialist_is_nan_and_the_shared_model_is_judged_once():
    judged = []

    def distance(model):
        judged.append(model)
        return torch.tensor(mean_square(model))  # anything that float takes

    shared, specialist = Constant(4), Constant(7)
    clusters = dtr.interval_clusters(10, 3)
    gaps = dtr.negative_transfer_gaps(distance, shared, (s for s in [None, specialist, None]), clusters, progress=False)
    assert [math.isnan(gap) for gap in gaps] == [True, False, True]
    assert judged[0] is shared and len(judged) == 2
    assert isinstance(judged[1], IntervalSpecialist) and judged[1].specialist is specialist
    assert (judged[1].start, judged[1].stop) == clusters.bounds[1:3]


def test_another_number_of_specialists_is_refused():
    shared, clusters = Constant(0), dtr.interval_clusters(10, 3)
    for given in [], [shared] * 4:
        fragments = ["specialists must have 3 entries", f"got {len(given)}"]
        gaps = partial(dtr.negative_transfer_gaps, lambda model: 1 / 0, shared, given, clusters)
        refused(gaps, ValueError, fragments)


def test_the_bar(capsys, monkeypatch):
    arguments = mean_square, Constant(4), [Constant(1), None, Constant(2)], dtr.interval_clusters(10, 3)
    dtr.negative_transfer_gaps(*arguments)
    assert "3/3" in capsys.readouterr().err
    dtr.negative_transfer_gaps(*arguments, progress=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    dtr.negative_transfer_gaps(*arguments)
    assert capsys.readouterr().err == ""
