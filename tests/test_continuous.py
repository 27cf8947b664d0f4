"""Clusters of continuous time: bounds, assignment, sampling against the distributions themselves, files, pictures."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from gpu_waits import waiting_is_an_error
from refusals import refused
from scipy import stats

import dtr_kernels as dtr

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERTS = dtr.ContinuousClusters((0, 0.875, 1))
UNEVEN = dtr.ContinuousClusters((0, 1e-6, 0.2, 0.7, 0.999999, 1))
LOG_SNR = {
    "flow": lambda t: 2 * np.log((1 - t) / t),
    "cosine": lambda t: 2 * np.log(np.cos(np.pi * t / 2) / np.sin(np.pi * t / 2)),
}


# --- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 5, 64])
def test_equal_lengths(K):
    clusters = dtr.continuous_clusters(np.int64(K))
    assert clusters.num_clusters == K and clusters.bounds == pytest.approx(np.linspace(0, 1, K + 1), abs=1e-15)
    assert all(type(bound) is float for bound in clusters.bounds)
    assert dtr.ContinuousClusters([Fraction(bound) for bound in clusters.bounds]) == clusters


@pytest.mark.parametrize("ends", [(-10.0, 10.0), (-3, 12)])
@pytest.mark.parametrize("spacing", LOG_SNR)
def test_equal_parts_of_the_log_snr(spacing, ends):
    clusters = dtr.continuous_clusters(5, spacing, ends)
    assert clusters.bounds[0] == 0 and clusters.bounds[-1] == 1
    log_snrs = LOG_SNR[spacing](np.array(clusters.bounds[1:-1]))
    np.testing.assert_allclose(log_snrs, np.linspace(*ends, 6)[-2:0:-1], rtol=1e-12, atol=1e-12)


def test_the_default_range_is_that_of_ddpm():
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert np.log(alpha_bar / (1 - alpha_bar))[[0, -1]] == pytest.approx([9.2, -10.1], abs=0.05)
    assert dtr.continuous_clusters(3, "flow") == dtr.continuous_clusters(3, "flow", (-10, 10))


@pytest.mark.parametrize(
    "bounds",
    [
        *[(), (0,), (0, 0.5), (0.1, 1), (0, 0.5, 0.5, 1), (0, 0.7, 0.3, 1), (0, 0.3, 0.3 + 1e-12, 1), (0, math.nan, 1)],
        *[(0, "0.5", 1), (False, 1), (0, 1j), "01", None, 1.0, [0, [0.5], 1], (0, 1, 1000)],
    ],
    ids=repr,
)
def test_bad_bounds(bounds):
    refused(lambda: dtr.ContinuousClusters(bounds), ValueError, ["bounds must", "0 and ascends to 1", repr(bounds)])


@pytest.mark.parametrize(
    "give",
    [
        lambda number: dtr.ContinuousClusters((0, number, 1)),
        lambda number: EXPERTS.sample(2, logit_normal=(number, 1)),
        lambda number: EXPERTS.sample(2, logit_normal=(0, number)),
        lambda number: dtr.continuous_clusters(2, "flow", (0, number)),
    ],
)
@pytest.mark.parametrize("number", [10**400, True], ids=["too large", "bool"])
def test_numbers_that_are_no_floats(give, number):
    refused(lambda: give(number), ValueError, ["must", str(number)[:20]])


@pytest.mark.parametrize(
    "arguments, fragments",
    [
        ((0,), ["k, the number of clusters", "1 to 10000", "got 0"]),
        ((2.0,), ["k, the number of clusters", "got 2.0"]),
        ((10_001,), ["k, the number of clusters", "got 10001"]),
        ((2, "snr"), ["spacing must be one of 'time', 'flow', 'cosine'", "got 'snr'"]),
        ((2, "flow", (3, -3)), ["log_snr must be two numbers from -100 to 100", "got (3, -3)"]),
        ((2, "flow", (0, math.inf)), ["log_snr must", "inf"]),
        ((2, "flow", (0, math.nan)), ["log_snr must", "nan"]),
        ((2, "cosine", "ab"), ["log_snr must", "'ab'"]),
        ((2, "cosine", 5), ["log_snr must", "got 5"]),
        ((64, "flow", (-100, 100)), ["bounds must", "rounded to fp32"]),
    ],
    ids=str,
)
def test_bad_arguments(arguments, fragments):
    refused(lambda: dtr.continuous_clusters(*arguments), ValueError, fragments)


# --- assignment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_assign(seed, device, dtype):
    t = torch.cat([torch.rand(257), torch.tensor([0, 1, 0.2, 0.7, 0.5, 1e-6, 0.999999])]).to(device, dtype)
    before = t.clone()
    assigned = UNEVEN.assign(t)
    assert assigned.dtype == torch.int64 and assigned.shape == t.shape and assigned.device == t.device
    bounds = np.array(UNEVEN.bounds[1:-1], np.float32)
    assert assigned.tolist() == np.searchsorted(bounds, t.float().cpu().numpy(), side="right").tolist()
    assert [UNEVEN.assign(one) for one in t.tolist()] == assigned.tolist()
    assert torch.equal(t, before) and UNEVEN.assign(t[:0]).tolist() == []


def test_a_bound_belongs_to_the_cluster_that_begins_there():
    for dtype in (torch.float32, torch.float64):
        t = torch.tensor([0, 0.2, 0.7, 0.999999, 1], dtype=dtype)
        assert UNEVEN.assign(t).tolist() == [0, 2, 3, 4, 4]
    assert [UNEVEN.assign(t) for t in (0.0, 0.2, np.float32(0.7), np.float64(0.7), 1.0)] == [0, 2, 3, 3, 4]
    with torch.device("meta"):  # a GPU as PyTorch's default device would have to be waited for
        assert type(EXPERTS.assign(0.9)) is int


def test_times_may_be_rounded_past_an_end():
    assert EXPERTS.assign(torch.tensor([-1e-7, 1 + 1e-7])).tolist() == [0, 1]


def test_compiled(seed, device):
    compiled = torch.compile(
        lambda: EXPERTS.assign(EXPERTS.sample(6, device=device, logit_normal=(0, 1))), fullgraph=True, backend="eager"
    )
    assert compiled().bincount().tolist() == [3, 3]
    with pytest.raises(ValueError, match=r"t must be in 0\.\.1"):
        torch.compile(EXPERTS.assign, fullgraph=True, backend="aot_eager")(torch.tensor([0.5, 2]))
    torch.library.opcheck(torch.ops.dtr_kernels.checked_times.default, (torch.rand(3, device=device),))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    t = torch.rand(64, device="cuda")
    with waiting_is_an_error():
        assigned = UNEVEN.assign(t)
        drawn = [EXPERTS.sample(20, g, "cuda", logit_normal=(0, 1)) for g in (None, torch.Generator())]
    assert torch.equal(assigned.cpu(), UNEVEN.assign(t.cpu())) and all(t.is_cuda for t in drawn)


@pytest.mark.parametrize(
    "t, fragments",
    [
        (torch.tensor([0.5, 1.5]), ["t must be in 0..1", "continuous time", "from 0.5 to 1.5"]),
        (torch.tensor([-0.1]), ["t must be in 0..1", "from -0.1"]),
        (torch.tensor([0.5, math.nan]), ["t must be in 0..1", "nan"]),
        (1.5, ["t must be in 0..1", "1.5"]),
        (math.nan, ["t must be in 0..1", "nan"]),
        (torch.tensor([0, 1]), ["floating-point times in [0, 1]", "torch.int64", "t / (T - 1)", "IntervalClusters"]),
        (torch.tensor([True]), ["floating-point times", "torch.bool"]),
        (torch.tensor([1j]), ["floating-point times", "torch.complex64"]),
        (1, ["floating-point times", "got int", "IntervalClusters"]),
        (torch.full((2, 1), 0.5), ["vector [B] of times", "[2, 1]"]),
        (torch.tensor(0.5), ["vector [B] of times", "[]"]),
    ],
    ids=str,
)
def test_bad_times(t, fragments):
    refused(lambda: EXPERTS.assign(t), ValueError, ["t must", *fragments])


@pytest.mark.parametrize("t", [[0.5], None, "0.5", True], ids=repr)
def test_times_of_another_type(t):
    refused(lambda: EXPERTS.assign(t), TypeError, ["t must be a floating-point tensor", type(t).__name__])


def test_integer_clusters_lead_here():
    refused(lambda: dtr.interval_clusters(20, 2).assign(torch.rand(3)), ValueError, ["make ContinuousClusters"])


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logit_normal", [None, (0.0, 1.0), (Fraction(-1), 0.5)], ids=str)
@pytest.mark.parametrize("batch_size", [1, 4, np.uint64(5), 17])
def test_clusters_are_balanced(seed, device, batch_size, logit_normal):
    clusters = dtr.continuous_clusters(5, "flow")
    t = clusters.sample(batch_size, device=device, logit_normal=logit_normal)
    assert t.dtype == torch.float32 and t.shape == (batch_size,) and t.device.type == device.type
    counts = clusters.assign(t).bincount(minlength=5)
    assert counts.sum() == batch_size and counts.max() - counts.min() <= 1


@pytest.mark.parametrize("logit_normal", [None, (0.0, 1.0), (-1.0, 0.3), (4, 2.0)], ids=str)
def test_the_distribution_within_a_cluster(seed, logit_normal):
    """Also far in both tails; a test of Kolmogorov and Smirnov fails by chance once in a million."""
    clusters = dtr.ContinuousClusters((0, 0.05, 0.4, 0.6, 0.98, 1))
    t = clusters.sample(20_000, logit_normal=logit_normal)
    of_cluster = clusters.assign(t)
    for k, (first, end) in enumerate(itertools.pairwise(clusters.bounds)):
        own = t[of_cluster == k].double().numpy()
        if logit_normal is None:
            expected = stats.uniform(first, end - first)
        else:
            mean, std = logit_normal
            with np.errstate(divide="ignore"):
                ends = (np.log([first, end]) - np.log1p([-first, -end]) - mean) / std
            own, expected = np.log(own) - np.log1p(-own), stats.truncnorm(*ends, loc=mean, scale=std)
        assert len(own) == 4000 and stats.kstest(own, expected.cdf).pvalue > 1e-6, k


@pytest.mark.parametrize("logit_normal", [None, (0.0, 1.0), (-30.0, 2.0), (20.0, 1.0)], ids=str)
def test_times_stay_in_clusters_that_fp32_can_hardly_tell(seed, logit_normal):
    neighbours = [np.float32(0.3)]
    while len(neighbours) < 4:
        neighbours.append(np.nextafter(neighbours[-1], np.float32(1)))
    clusters = dtr.ContinuousClusters((0, *map(float, neighbours), 0.7, 1))
    counts = clusters.assign(clusters.sample(600, logit_normal=logit_normal)).bincount(minlength=6)
    assert counts.tolist() == [100] * 6


def test_seeds(seed, device):
    def drawn(number):
        return EXPERTS.sample(50, torch.Generator().manual_seed(number), device, logit_normal=(0.0, 1.0))

    assert torch.equal(drawn(seed), drawn(seed)) and not torch.equal(drawn(seed), drawn(seed + 1))


@pytest.mark.parametrize(
    "arguments, error, fragments",
    [
        ({"batch_size": 0}, ValueError, ["batch_size must be a positive integer", "got 0"]),
        ({"generator": 42}, TypeError, ["generator must be a torch.Generator", "manual_seed"]),
        ({"logit_normal": (0, 0)}, ValueError, ["logit_normal must be a mean and a standard deviation", "(0, 0)"]),
        ({"logit_normal": (math.nan, 1)}, ValueError, ["logit_normal must", "(nan, 1)"]),
        ({"logit_normal": (0, math.inf)}, ValueError, ["logit_normal must", "(0, inf)"]),
        ({"logit_normal": 1.0}, ValueError, ["logit_normal must", "got 1.0"]),
        ({"logit_normal": ("0", "1")}, ValueError, ["logit_normal must", "('0', '1')"]),
        ({"logit_normal": (0, 0.01)}, ValueError, ["logit_normal must reach every cluster", "0.875 to 1.0", "larger"]),
    ],
    ids=str,
)
def test_bad_arguments_of_sample(arguments, error, fragments):
    refused(lambda: EXPERTS.sample(**{"batch_size": 4} | arguments), error, fragments)


# --- files, pictures, what takes clusters ----------------------------------------------------------------------------


def test_files(tmp_path):
    path = tmp_path / "clusters.json"
    clusters = dtr.continuous_clusters(7, "cosine")
    clusters.save(path)
    assert dtr.ContinuousClusters.load(path) == clusters and len({clusters, dtr.ContinuousClusters.load(path)}) == 1
    assert json.loads(path.read_text()) == {"format": 1, "bounds": list(clusters.bounds)}
    fragments = [str(path), "clusters that IntervalClusters.save has written", "format, bounds and cost"]
    refused(lambda: dtr.IntervalClusters.load(path), ValueError, fragments)


@pytest.mark.parametrize(
    "content, fragment",
    [
        ('{"format": 1, "bounds": [0, 0.5]}', "ascends to 1"),
        ('{"format": 1, "bounds": [0, NaN, 1]}', "[0, nan, 1]"),
        ('{"format": 2, "bounds": [0, 1]}', "version 2"),
        ('{"format": 1, "cost": "snr", "bounds": [0, 1]}', "holds format, cost, bounds"),
        ("[0, 1]", "not an object"),
    ],
)
def test_broken_files(tmp_path, content, fragment):
    path = tmp_path / "clusters.json"
    path.write_text(content)
    fragments = [str(path), "clusters that ContinuousClusters.save has written", fragment]
    refused(lambda: dtr.ContinuousClusters.load(path), ValueError, fragments)


def test_pictures():
    pytest.importorskip("matplotlib")
    boxes, axes = dtr.plot_clusters(EXPERTS).axes
    assert [text.get_text() for text in boxes.texts][1:] == [
        "0\n0\N{EN DASH}0.875\n0.875",
        "1\n0.875\N{EN DASH}1\n0.125",
    ]
    assert [(patch.get_x(), patch.get_width()) for patch in axes.patches] == [(0, 0.875), (0.875, 0.125)]
    assert axes.get_xlim() == (0, 1) and "Clusters of continuous time: K 2" in boxes.get_title()
    refused(lambda: dtr.plot_clusters(EXPERTS, values=[1, 2]), ValueError, ["values must be None"])


def test_surgery_and_uncertainty_weighting(seed):
    model, x = torch.nn.Linear(4, 4), torch.randn(12, 4)
    t = dtr.continuous_clusters(3).sample(12)
    clusters = dtr.continuous_clusters(3).assign(t)

    def loss(x, t):
        return (model(x) - x * t[:, None]).square().mean(1)

    means = dtr.GradientSurgery(model.parameters(), 3, "sum").backward_batch(loss, clusters, x, t)
    expected = torch.stack([loss(x, t)[clusters == k].mean() for k in range(3)])
    torch.testing.assert_close(means, expected.detach())
    weighting = dtr.UncertaintyWeighting(3)
    weighting(expected).backward()
    assert all(s.grad.isfinite().all() for s in weighting.s)


def test_an_expert_has_its_times_to_the_very_end():
    class Constant(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x, t):
            return x * 0 + self.value

    def distance(model):
        t = torch.tensor([0, 0.5, 0.874, 0.875, 1.0])
        return model(torch.ones(5), t).sum().item() + model(torch.ones(1), 1.0).item()

    gaps = dtr.negative_transfer_gaps(distance, Constant(0), [Constant(1), Constant(10)], EXPERTS, progress=False)
    assert gaps.tolist() == [3, 30]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_an_expert_has_the_times_of_its_cluster(dtype):
    """At the bounds, one rounding unit beside them, and rounded past the ends; as tensors and as numbers."""
    bounds = torch.tensor(UNEVEN.bounds, dtype=torch.float64).to(dtype)
    beside = [torch.nextafter(bounds, torch.tensor(end, dtype=dtype)) for end in (-1, 2)]
    t = torch.cat([bounds, *beside, bounds.float().to(dtype)])
    t = t[t < 1.0000001]

    def expert(model):
        assert model(t, t).tolist() == [model(t[:1], number).item() for number in t.tolist()]
        experts.append(model(t, t))
        return 0

    class Whose(torch.nn.Module):
        def __init__(self, own):
            super().__init__()
            self.own = own

        def forward(self, x, t):
            return torch.full_like(x, self.own)

    experts = []
    dtr.negative_transfer_gaps(expert, Whose(0), [Whose(1)] * 5, UNEVEN, progress=False)
    clusters = UNEVEN.assign(t)
    assert [(clusters == k).tolist() for k in range(5)] == [own.bool().tolist() for own in experts[1:]]
