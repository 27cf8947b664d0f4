"""Interval clusters against all clusterings there are, in exact arithmetic; assignment, sampling, files, pictures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import sys
import tracemalloc
from collections import Counter
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pytest
import torch
from gpu_waits import waiting_is_an_error
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from torch._dynamo.testing import CompileCounterWithBackend

import dtr_kernels as dtr

COSTS = ["timestep", "snr", "log_snr", "affinity"]
INTEGERS = [getattr(torch, f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
pytestmark = pytest.mark.usefixtures("one_thread")


def clusters_of(*bounds, cost="timestep"):
    return dtr.IntervalClusters(bounds, cost)


def random_values(cost, T):
    """SNRs over many orders of magnitude that go up and down; an affinity that is not symmetric."""
    if cost == "timestep":
        return None
    return torch.randn(T, T, dtype=torch.float64) if cost == "affinity" else (4 * torch.randn(T)).double().exp()


def schedule():
    """The SNR of DDPM's linear schedule."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    return alpha_bar / (1 - alpha_bar)


# --- the definition, written down plainly ----------------------------------------------------------------------------


def interval_cost(cost, values, l, r):
    """The cost of the timesteps l..r, exactly; of log SNR, but for the logarithm."""
    c = (l + r + 1) // 2
    if cost == "affinity":
        return -sum(Fraction(float(values[c, t])) for t in range(l, r + 1))
    if cost == "timestep":
        position = range(r + 1)
    elif cost == "snr":
        position = [Fraction(float(value)) for value in values]
    else:
        position = [Fraction(math.log(value)) for value in values]
    return sum((abs(Fraction(position[t]) - position[c]) for t in range(l, r + 1)), Fraction(0))


def all_clusterings(cost, values, T, K):
    """(total cost, bounds) of every one."""
    one = lru_cache(None)(lambda first, end: interval_cost(cost, values, first, end - 1))
    for inner in itertools.combinations(range(1, T), K - 1):
        bounds = (0, *inner, T)
        yield sum(itertools.starmap(one, itertools.pairwise(bounds))), bounds


def preference(clustering):
    """The best has the least cost, then squared lengths; then later bounds are better, the last one first."""
    total, bounds = clustering
    return total, sum((end - first) ** 2 for first, end in itertools.pairwise(bounds)), [-b for b in reversed(bounds)]


# --- clustering ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", range(1, 10))
@pytest.mark.parametrize("cost", COSTS)
def test_no_clustering_costs_less(seed, cost, T):
    values = random_values(cost, T)
    size = 1 if cost in ("timestep", "snr") else values.log().abs().sum() if cost == "log_snr" else values.abs().sum()
    for K in range(1, T + 1):
        found = dtr.interval_clusters(T, K, cost, values)
        assert (found.num_timesteps, found.num_clusters, found.cost) == (T, K, cost)
        ranked = sorted(all_clusterings(cost, values, T, K), key=preference)
        best, bounds = ranked[0]
        # Sums of distances have no cancellation, so that of SNRs is right to its own last bits.
        rounding = 1e-14 * (float(best) if cost == "snr" else float(size))
        total = next(total for total, bounds in ranked if bounds == found.bounds)
        assert float(total - best) <= rounding, (K, found.bounds, bounds)
        if len(ranked) == 1 or float(ranked[1][0] - best) > 2 * rounding:
            assert found.bounds == bounds, K


@pytest.mark.parametrize("T", range(1, 10))
@pytest.mark.parametrize("cost", ["timestep", "snr", "affinity"])
def test_ties(seed, cost, T):
    """Small integers: many clusterings cost the same, exactly."""
    values = None if cost == "timestep" else torch.randint(3, (T, T) if cost == "affinity" else (T,))
    for K in range(1, T + 1):
        _, bounds = min(all_clusterings(cost, values, T, K), key=preference)
        assert dtr.interval_clusters(T, K, cost, values).bounds == bounds, (K, values)


@pytest.mark.parametrize("T", [*range(1, 31), 97])
def test_equal_intervals_are_best_for_timesteps(T):
    """As np.array_split makes them; 199 and 201 timesteps cost the same as 200 and 200."""
    for K in range(1, T + 1):
        lengths = [len(part) for part in np.array_split(np.arange(T), K)]
        assert np.diff(dtr.interval_clusters(T, K).bounds).tolist() == lengths, K


def bounds_from_all_costs(distances, K):
    """The recursion over [T, T] costs as it is written down, in fp64, with sums in the order of growing intervals."""
    T = len(distances)
    best = {(0, 0): (0.0, 0, (0,))}
    for j in range(1, K + 1):
        for end in range(1, T + 1):
            candidates = []
            for s in range(end):
                if (j - 1, s) in best:
                    c, total = (s + end) // 2, 0.0
                    for t in sorted(range(s, end), key=lambda t: (abs(t - c), t)):
                        total += distances[c][t]
                    before, squares, bounds = best[j - 1, s]
                    candidates.append((total + before, squares + (end - s) ** 2, -s, (*bounds, end)))
            if candidates:
                total, squares, _, bounds = min(candidates)
                best[j, end] = total, squares, bounds
    return best[K, T][2]


@pytest.mark.parametrize("kind", ["snr", "equal snr", "log_snr", "affinity", "equal affinity"])
def test_the_same_clusters_as_from_all_costs(seed, kind):
    """SNRs that go up and down, and ties; sums that are rounded alike."""
    for T in (2, 7, 16, 45):
        cost = kind.removeprefix("equal ")
        values = random_values(cost, T)
        if kind.startswith("equal"):
            values = values.clamp(0, 2).round()
        x = torch.from_numpy(np.log(values.numpy())) if cost == "log_snr" else values
        distances = (-x if cost == "affinity" else (x - x[:, None]).abs()).tolist()
        for K in {1, 2, min(T // 3 + 1, 6), min(T - 1, 15)}:
            assert dtr.interval_clusters(T, K, cost, values).bounds == bounds_from_all_costs(distances, K), (T, K)


@pytest.mark.parametrize("cost", COSTS)
def test_memory_grows_with_timesteps_and_not_with_their_square(seed, cost):
    T, K = 1000, 5
    values = random_values(cost, T)
    tracemalloc.start()
    dtr.interval_clusters(T, K, cost, values)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * T * T / 16


@pytest.mark.parametrize("cost, values", [("snr", [1e8, 1e4, 1, 1, 1, 1, 1]), ("snr", schedule()), ("affinity", None)])
def test_first_intervals_of_one_timestep(cost, values):
    if cost == "affinity":  # everything but the first two timesteps belongs together
        values = torch.eye(7)
        values[2:, 2:] = 1
    bounds = dtr.interval_clusters(len(values), 3 if len(values) == 7 else 8, cost, values).bounds
    assert bounds[:3] == (0, 1, 2)


NEARLY_TIED = np.eye(4)
NEARLY_TIED[1, 0], NEARLY_TIED[3, 2] = 0.5, 0.5 + 1e-12


@pytest.mark.parametrize(
    ("cost", "values", "bounds"),
    [
        ("timestep", None, (0, 200, 400, 600, 800, 1000)),  # the five clusters of ANT
        ("timestep", None, (0, 333333333334, 666666666668, 10**12 + 1)),  # in closed form
        ("snr", [5, 5, 0, 0], (0, 2, 4)),
        # Differences of sums that hold the first value would lose the others altogether.
        ("snr", [1e16] + 3 * [1e-3] + 5 * [2e-3] + 2 * [1e-3], (0, 1, 4, 9, 11)),
        # In fp32 these would be ties, which the first intervals would win.
        ("snr", [0, 1 + 1e-12, 3, 4], (0, 1, 2, 4)),
        ("log_snr", np.exp([0, 1 + 1e-12, 3, 4]), (0, 1, 2, 4)),
        ("affinity", NEARLY_TIED, (0, 1, 2, 4)),
    ],
)
def test_known_clusters(cost, values, bounds):
    assert dtr.interval_clusters(bounds[-1], len(bounds) - 1, cost, values).bounds == bounds


@pytest.mark.parametrize("cost", COSTS[1:])
def test_values_of_any_kind(seed, device, cost):
    values = random_values(cost, 12).float().bfloat16().float()
    expected = dtr.interval_clusters(12, 4, cost, values)
    before = values.clone()
    kinds = {
        "fp64": values.double().to(device),
        "bf16": values.bfloat16().to(device),
        "a parameter": values.clone().to(device).requires_grad_(),
        "strided": values.to(device).repeat_interleave(2, dim=-1)[..., ::2],
        "numpy": values.numpy(),
        "a list": values.tolist(),
        "a tuple": tuple(values.tolist()),
        "numbers of numpy": [np.float32(value) if cost != "affinity" else value.numpy() for value in values],
    }
    for kind, given_values in kinds.items():
        assert dtr.interval_clusters(12, 4, cost, given_values) == expected, kind
    assert torch.equal(values, before)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float16])
def test_values_of_few_bits_are_subtracted_as_wide_ones(dtype):
    values = np.array([200, 7, 9, 100, 90, 6, 6], dtype)
    narrow, wide = (dtr.interval_clusters(7, 4, "snr", given) for given in (values, values.tolist()))
    assert narrow.bounds == wide.bounds


def test_clusters_are_immutable_and_can_be_keys():
    clusters = dtr.interval_clusters(np.int64(10), np.int32(2))
    assert clusters.bounds == (0, 5, 10)
    assert all(type(bound) is int for bound in (*clusters.bounds, clusters.num_timesteps, clusters.num_clusters))
    clusters = dtr.IntervalClusters([0, 2, np.int64(5)], "snr")
    assert clusters == clusters_of(0, 2, 5, cost="snr") and len({clusters, clusters_of(0, 2, 5, cost="snr")}) == 1
    assert clusters != clusters_of(0, 2, 5) and clusters != clusters_of(0, 3, 5, cost="snr")
    with pytest.raises(dataclasses.FrozenInstanceError):
        clusters.bounds = (0, 5)


# --- assignment ------------------------------------------------------------------------------------------------------


bounds_of_any_kind = st.lists(st.integers(1, 60), min_size=1, max_size=12).map(
    lambda lengths: (0, *itertools.accumulate(lengths))
)


@settings(max_examples=60, deadline=None)
@given(bounds=bounds_of_any_kind)
def test_every_timestep_is_in_one_cluster(bounds):
    clusters = clusters_of(*bounds)
    T, K = clusters.num_timesteps, clusters.num_clusters
    assigned = clusters.assign(torch.arange(T))
    assert assigned.tolist() == np.repeat(np.arange(K), np.diff(bounds)).tolist()
    assert [clusters.assign(t) for t in range(T)] == assigned.tolist()


def test_assign(seed, device):
    clusters = dtr.interval_clusters(1000, 8, "snr", schedule())
    t = torch.randint(1000, (257,), device=device)
    before = t.clone()
    assigned = clusters.assign(t)
    assert assigned.dtype == torch.int64 and assigned.shape == t.shape and assigned.device == t.device
    assert assigned.tolist() == (np.searchsorted(clusters.bounds, t.tolist(), side="right") - 1).tolist()
    assert torch.equal(t, before)
    assert clusters.assign(t[:0]).tolist() == []
    assert torch.equal(clusters.assign(t[::3]), assigned[::3])


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_timesteps_of_any_integer_dtype(device, dtype):
    """Also of those that cannot hold the bounds."""
    clusters = clusters_of(0, 1, 100, 300, 1000)
    t = [t for t in (0, 1, 99, 100, 127, 255, 299, 300, 999) if t <= torch.iinfo(dtype).max]
    assert clusters.assign(torch.tensor(t, device=device).to(dtype)).tolist() == [clusters.assign(one) for one in t]
    assert [clusters.assign(t) for t in (0, 1, 99, 100, 999)] == [0, 1, 1, 2, 3]
    for one in (clusters.assign(4), clusters.assign(np.int64(4)), clusters_of(0, 5).assign(4)):
        assert type(one) is int


def test_compiled_assign(seed, device):
    clusters = dtr.interval_clusters(1000, 8)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def one_hot(t):
        return torch.nn.functional.one_hot(clusters.assign(t), clusters.num_clusters).float()

    for batch_size in (5, 33, 34, 60):
        t = torch.randint(1000, (batch_size,), device=device)
        assert torch.equal(one_hot(t).argmax(1), clusters.assign(t))
    assert counter.frame_count <= 2, "once, and once more for batches of any size"


def test_compiled_assign_refuses_timesteps_out_of_range_and_takes_an_int():
    clusters = clusters_of(0, 5, 20)
    compiled = torch.compile(clusters.assign, fullgraph=True, backend="eager")
    assert compiled(torch.tensor([0, 19])).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"t must be in 0\.\.19"):
        compiled(torch.tensor([0, 20]))
    compiled = torch.compile(lambda x: x * clusters.assign(x.shape[0]), fullgraph=True, backend="aot_eager")
    assert [compiled(torch.ones(n)).sum().item() for n in (4, 7, 8)] == [0, 7, 8]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_the_op_of_the_range_check(device, dtype):
    """Among others: its output is not its input, nor a view of it."""
    t = torch.tensor([0, 7, 3], dtype=dtype, device=device)
    torch.library.opcheck(torch.ops.dtr_kernels.checked_timesteps.default, (t, 8))


@pytest.mark.gpu
def test_assign_does_not_wait_for_the_gpu():
    clusters, t = dtr.interval_clusters(1000, 8), torch.randint(1000, (64,), device="cuda")
    with waiting_is_an_error():
        assigned = clusters.assign(t)
    assert torch.equal(assigned.cpu(), clusters.assign(t.cpu()))


# --- sampling --------------------------------------------------------------------------------------------------------


def within(counts, trials, share):
    """Return whether binomial counts are within seven standard deviations, which one in 10^11 is not by chance."""
    counts = torch.as_tensor(counts, dtype=torch.float64)
    return ((counts - trials * share).abs() <= 7 * math.sqrt(trials * share * (1 - share)) + 1).all()


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 6, 15, 17, 64, np.int64(3), np.uint64(3)])
@pytest.mark.parametrize("bounds", [(0, 7), (0, 1, 2, 3, 4, 5), (0, 1, 3, 4, 90, 1000), (0, 400, 1000)])
def test_clusters_are_balanced(seed, device, bounds, batch_size):
    clusters = clusters_of(*bounds)
    for _ in range(20):
        t = clusters.sample(batch_size, device=device)
        assert t.dtype == torch.int64 and t.shape == (batch_size,) and t.device.type == device.type
        counts = clusters.assign(t).bincount(minlength=clusters.num_clusters)
        assert counts.sum() == batch_size and counts.max() - counts.min() <= 1


def test_timesteps_are_uniform_within_a_cluster(seed, device):
    clusters = clusters_of(0, 1, 4, 10, 1000)
    counts = clusters.sample(40000, device=device).bincount(minlength=1000).cpu()
    for first, end in itertools.pairwise(clusters.bounds):
        assert counts[first:end].sum() == 10000
        assert within(counts[first:end], 10000, 1 / (end - first))


def test_who_gets_one_more_is_random(seed):
    """With fewer samples than clusters that is who gets any."""
    clusters = clusters_of(0, 1, 4, 10, 11, 20)
    for batch_size in (2, 7):
        pairs = Counter()
        for _ in range(3000):
            counts = clusters.assign(clusters.sample(batch_size)).bincount(minlength=5)
            pairs[tuple((counts > batch_size // 5).nonzero().flatten().tolist())] += 1
        assert len(pairs) == 10 and within(list(pairs.values()), 3000, 1 / 10)


def test_the_order_is_random(seed):
    """Any two of four places are as likely those of the first cluster."""
    clusters = clusters_of(0, 3, 5)
    places = Counter(tuple(clusters.assign(clusters.sample(4)).tolist()) for _ in range(3000))
    assert len(places) == 6 and within(list(places.values()), 3000, 1 / 6)


def test_timesteps_of_a_batch_are_drawn_one_by_one(seed):
    """Two of the same cluster are as likely equal as any two."""
    clusters = clusters_of(0, 4)
    equal = sum(len(set(clusters.sample(2).tolist())) == 1 for _ in range(3000))
    assert within([equal], 3000, 1 / 4)


def test_seeds(seed, device):
    clusters = dtr.interval_clusters(1000, 8)

    def drawn(number):
        return clusters.sample(50, torch.Generator().manual_seed(number), device)

    before = torch.get_rng_state()
    first = drawn(seed)
    assert first.device.type == device.type
    assert torch.equal(drawn(seed), first) and not torch.equal(drawn(seed + 1), first)
    assert torch.equal(clusters.sample(50, torch.Generator().manual_seed(seed)), first.cpu())
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(seed)
    assert not torch.equal(clusters.sample(50, generator), clusters.sample(50, generator))


def test_without_a_generator_pytorchs_own_draws_on_its_default_device(seed, device):
    clusters = dtr.interval_clusters(1000, 8)
    torch.manual_seed(seed)
    first, second = clusters.sample(50, device=device), clusters.sample(50, device=device)
    torch.manual_seed(seed)
    assert torch.equal(clusters.sample(50, device=str(device)), first) and not torch.equal(first, second)
    with torch.device(device):
        assert clusters_of(0, 5, 9).sample(4).device.type == device.type
        assert clusters_of(0, 5, 9).sample(4, torch.Generator("cpu")).device.type == "cpu"


def test_compiled_sample(seed, device):
    clusters = clusters_of(0, 5, 9)
    compiled = torch.compile(
        lambda: clusters.assign(clusters.sample(6, device=device)), fullgraph=True, backend="eager"
    )
    assert compiled().bincount().tolist() == [3, 3]


@pytest.mark.gpu
def test_sampling_does_not_wait_for_the_gpu():
    clusters = dtr.interval_clusters(1000, 8)
    on_cpu, on_gpu = torch.Generator(), torch.Generator("cuda")
    with waiting_is_an_error():
        batches = [clusters.sample(20, generator, "cuda") for generator in (None, on_cpu, on_gpu)]
        batches.append(clusters.sample(20, on_gpu))
    for t in batches:
        assert t.is_cuda and clusters.assign(t).bincount().max() == 3


@pytest.mark.gpu
def test_a_generator_of_the_gpu_draws_for_the_cpu():
    clusters = dtr.interval_clusters(1000, 8)
    drawn = [clusters.sample(20, torch.Generator("cuda").manual_seed(3), device) for device in ("cpu", "cuda", None)]
    assert [t.device.type for t in drawn] == ["cpu", "cuda", "cuda"]
    assert drawn[0].tolist() == drawn[1].tolist() == drawn[2].tolist()


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_given", [str, lambda path: path], ids=["str", "Path"])
def test_files(seed, tmp_path, as_given):
    path = as_given(tmp_path / "clusters.json")
    clusters = dtr.interval_clusters(1000, 8, "snr", schedule())
    clusters_of(0, 1).save(path)
    clusters.save(path)
    loaded = dtr.IntervalClusters.load(path)
    assert loaded == clusters and hash(loaded) == hash(clusters) and type(loaded.bounds) is tuple
    assert [file.name for file in tmp_path.iterdir()] == ["clusters.json"]
    with open(path) as file:
        assert json.load(file) == {"format": 1, "cost": "snr", "bounds": list(clusters.bounds)}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_is_neither_replaced_nor_read(tmp_path, make):
    make(path := tmp_path / "clusters.json")
    refused(lambda: clusters_of(0, 1).save(path), OSError, [f"{path} is not a file"])
    refused(lambda: dtr.IntervalClusters.load(path), ValueError, [f"{path} is not a file"])
    assert [file.name for file in tmp_path.iterdir()] == ["clusters.json"] and not path.is_file()


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "clusters.json"
    clusters_of(0, 1).save(path)

    def full_disk(source, target):
        assert json.loads(source.read_text())["bounds"] == [0, 2, 5] and target == path
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        clusters_of(0, 2, 5).save(path)
    assert dtr.IntervalClusters.load(path) == clusters_of(0, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["clusters.json"]


GOOD = {"format": 1, "cost": "snr", "bounds": [0, 2, 5]}


@pytest.mark.parametrize(
    "content, fragment",
    [
        ("", "JSON that this library has written: Expecting value"),
        ("bounds: 0 2 5", "Expecting value"),
        (json.dumps(GOOD)[:-3], "Expecting"),
        ("[" * 100_000, "recursion"),
        (b"\x80\x04\x95 a pickle", "can't decode"),
        (json.dumps(GOOD).replace("5", "5" + 400 * "0"), "more than 64 bits"),
        (json.dumps(GOOD).replace("5", str(2**63)), "more than 64 bits"),
        ([0, 2, 5], "not an object"),
        ({"cost": "snr", "bounds": [0, 2, 5]}, "format"),
        ({**GOOD, "format": 2}, "version 2"),
        ({"format": 1, "cost": "snr"}, "bounds"),
        ({**GOOD, "t": 0}, "format, cost, bounds, t"),
        ({**GOOD, "cost": "SNR"}, "'SNR'"),
        ({**GOOD, "cost": ["snr"]}, "['snr']"),
        ({**GOOD, "bounds": [0, 5, 2]}, "[0, 5, 2]"),
        ({**GOOD, "bounds": [0, 2.0, 5]}, "[0, 2.0, 5]"),
        ({**GOOD, "bounds": "025"}, "'025'"),
        ({**GOOD, "bounds": {"0": 2}}, "{'0': 2}"),
        ({**GOOD, "bounds": [0, math.nan]}, "[0, nan]"),
        ({**GOOD, "bounds": None}, "None"),
        ({**GOOD, "bounds": [0, *[1] * 100_000]}, " ... "),
        ({**GOOD, "cost": "snr" * 100_000}, " ... "),
        ({**GOOD, "format": "1" * 100_000}, " ... "),
        ({**GOOD, "t" * 100_000: 0}, " ... "),
    ],
    ids=lambda content: str(content)[:30],
)
def test_broken_files(tmp_path, content, fragment):
    path = tmp_path / "clusters.json"
    if isinstance(content, dict | list):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(lambda: dtr.IntervalClusters.load(path), ValueError, [str(path), fragment])
    with pytest.raises(ValueError) as caught:
        dtr.IntervalClusters.load(path)
    assert len(str(caught.value)) < 1000
    with pytest.raises(FileNotFoundError):
        dtr.IntervalClusters.load(tmp_path / "other.json")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bounds",
    [(), (0,), (5,), (1, 5), (-1, 5), (0, 0), (0, 3, 3, 5), (0, 4, 3), (0, 2.0), (False, 3), (0, True), "05", None, 5],
    ids=repr,
)
def test_bounds(bounds):
    refused(lambda: dtr.IntervalClusters(bounds, "snr"), ValueError, ["bounds", "begins with 0", f"got {bounds!r}"])


@pytest.mark.parametrize(
    "make", [lambda cost: clusters_of(0, 5, cost=cost), lambda cost: dtr.interval_clusters(5, 2, cost)]
)
@pytest.mark.parametrize("cost", ["SNR", "", None, ["snr"], 3], ids=repr)
def test_costs(make, cost):
    refused(lambda: make(cost), ValueError, ["cost must be one of", *map(repr, COSTS), f"got {cost!r}"])


@pytest.mark.parametrize("number", [0, -5, 10.0, True, "10", None, math.nan], ids=repr)
def test_numbers_of_timesteps_clusters_and_samples(number):
    positive, got = "positive integer", f"got {number!r}"
    refused(lambda: dtr.interval_clusters(number, 1), ValueError, ["num_timesteps", positive, got])
    refused(lambda: clusters_of(0, 5, 20).sample(number), ValueError, ["batch_size", positive, got])
    for k, said in ((number, got), (11, "got 11")):
        fragments = ["k, the number of clusters", "from 1 to num_timesteps = 10", said]
        refused(lambda k=k: dtr.interval_clusters(10, k), ValueError, fragments)


@pytest.mark.parametrize("number", [2**63, 2**64, 10**5000], ids=lambda number: f"{number.bit_length()} bits")
def test_numbers_that_no_int64_holds(number):
    refused(lambda: dtr.interval_clusters(number, 5), ValueError, ["num_timesteps", "below 2**63"])
    refused(lambda: clusters_of(0, 5, number), ValueError, ["bounds must end below 2**63"])
    refused(lambda: clusters_of(0, 5).sample(number), ValueError, ["batch_size", "below 2**63"])
    refused(lambda: clusters_of(0, 5).assign(number), ValueError, ["t must be in 0..4"])
    refused(lambda: dtr.DenoisingTaskRouting(number), ValueError, ["num_timesteps must be below 2**63"])
    refused(lambda: dtr.RandomRouting(number), ValueError, ["num_timesteps must be below 2**63"])
    refused(lambda: dtr.RandomRouting(seed=number), ValueError, ["seed must be below 2**63"])
    huge = 10**400 * number
    refused(lambda: dtr.DenoisingTaskRouting(alpha=huge), ValueError, ["alpha must be a number that fits into a float"])
    largest = dtr.interval_clusters(2**63 - 1, 2)
    assert largest.assign(torch.tensor([0, 2**63 - 2])).tolist() == [0, 1] and largest.sample(3).shape == (3,)


SNR = "the SNR at every timestep, finite real numbers of shape [3]"
AFFINITY = "the affinity of all pairs of timesteps, finite real numbers of shape [3, 3]"


@pytest.mark.parametrize(
    "cost, values, error, fragments",
    [
        ("timestep", [1, 2, 3], ValueError, ["None", "timestep", "name the cost"]),
        ("snr", None, TypeError, [SNR, "NoneType"]),
        ("log_snr", None, TypeError, [SNR, "NoneType"]),
        ("affinity", None, TypeError, [AFFINITY, "NoneType"]),
        ("snr", [1, 2], ValueError, [SNR, "got shape [2]"]),
        ("snr", 5.0, ValueError, [SNR, "got shape []"]),
        ("log_snr", torch.ones(4), ValueError, [SNR, "got shape [4]"]),
        ("snr", torch.ones(3, 3), ValueError, [SNR, "got shape [3, 3]"]),
        ("affinity", np.ones((3, 2)), ValueError, [AFFINITY, "got shape [3, 2]"]),
        ("affinity", [1, 2, 3], ValueError, [AFFINITY, "got shape [3]"]),
        ("affinity", [[1, 2, 3], [1, 2], [1]], ValueError, [AFFINITY, "got list"]),
        ("snr", ["1", "2", "3"], TypeError, [SNR, "got <U1"]),
        ("snr", "123", TypeError, [SNR, "got <U3"]),
        ("snr", [1, None, 3], TypeError, [SNR, "got list"]),
        ("snr", torch.tensor([True, False, True]), TypeError, [SNR, "got bool"]),
        ("snr", torch.ones(3, dtype=torch.complex64), TypeError, [SNR, "got complex64"]),
        ("snr", [1, math.nan, 2], ValueError, [SNR, "1e+300", "values[1] = nan"]),
        ("snr", [1, 2, math.inf], ValueError, [SNR, "1e+300", "values[2] = inf"]),
        ("log_snr", torch.tensor([math.inf, 2, 1]), ValueError, [SNR, "values[0] = inf"]),
        ("snr", [1e301, 2, 1], ValueError, [SNR, "1e+300", "values[0] = 1e+301"]),
        ("affinity", [[1, 1, 1], [1, 1, -math.inf], [1, 1, 1]], ValueError, [AFFINITY, "values[1, 2] = -inf"]),
        ("snr", [1, -2, 3], ValueError, ["values", "not negative", "values[1] = -2", "log_snr"]),
        ("log_snr", [1, 2, -3], ValueError, ["values", "not negative", "values[2] = -3", "log_snr"]),
        ("log_snr", [2, 1, 0], ValueError, ["values", "greater than 0", "values[2] = 0", "zero terminal SNR", '"snr"']),
    ],
    ids=str,
)
def test_values(cost, values, error, fragments):
    refused(lambda: dtr.interval_clusters(3, 2, cost, values), error, ["values must", *fragments])


def ints(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    "t, fragments",
    [
        (ints(3, 20), ["0..19", "num_timesteps=20", "from 3 to 20"]),
        (ints(-1, 3), ["0..19", "num_timesteps=20", "from -1 to 3"]),
        (ints(3, 20, dtype=torch.uint8), ["0..19", "from 3 to 20"]),
        (20, ["0..19", "num_timesteps=20", "got 20"]),
        (-1, ["0..19", "num_timesteps=20", "got -1"]),
        (torch.tensor([0.5]), ["integer timesteps", "torch.float32", "continuous", "(t * 20).long().clamp(max=19)"]),
        (torch.tensor(0.5), ["integer timesteps", "torch.float32", "continuous time"]),
        (0.5, ["integer timesteps", "got float", "(t * 20).long().clamp(max=19)"]),
        (np.float64(3), ["integer timesteps", "got float64", "continuous time"]),
        (torch.tensor([True]), ["vector [B]", "torch.bool"]),
        (torch.tensor([1j]), ["vector [B]", "torch.complex64"]),
        (ints(1, 2)[None], ["vector [B]", "[1, 2]"]),
        (torch.tensor(3), ["vector [B]", "[]"]),
    ],
    ids=str,
)
def test_timesteps(t, fragments):
    refused(lambda: clusters_of(0, 5, 20).assign(t), ValueError, ["t must", *fragments])


@pytest.mark.parametrize("t", [[1, 2], None, "3", True], ids=repr)
def test_timesteps_of_another_type(t):
    refused(lambda: clusters_of(0, 5, 20).assign(t), TypeError, ["t must", "integer tensor", type(t).__name__])


def test_continuous_time_as_the_error_says():
    t = torch.tensor([0, 0.2499, 0.25, 0.999, 1])
    assert clusters_of(0, 5, 20).assign((t * 20).long().clamp(max=19)).tolist() == [0, 0, 1, 1, 1]


def test_a_seed_is_no_generator():
    fragments = ["generator", "torch.Generator", "int", "manual_seed"]
    refused(lambda: clusters_of(0, 5, 20).sample(8, 42), TypeError, fragments)


# --- pictures --------------------------------------------------------------------------------------------------------


def pictures():
    """Clusters of one timestep and of many, many clusters, and one; with and without a curve and a heat map."""
    affinity = torch.rand(30, 30) * 1.5 - 0.5
    return [
        (dtr.interval_clusters(1000, 8, "snr", schedule()), schedule()),
        (dtr.interval_clusters(1000, 64, "snr", schedule()), schedule()),
        (dtr.interval_clusters(1000, 20, "log_snr", schedule()), None),
        (clusters_of(0, 30_000, 60_001, 100_000), None),
        (dtr.interval_clusters(30, 4, "affinity", affinity), affinity),
        (dtr.interval_clusters(30, 1), affinity.tolist()),
    ]


@pytest.fixture(scope="module")
def figures():
    pytest.importorskip("matplotlib")
    return [(clusters, values, dtr.plot_clusters(clusters, values=values)) for clusters, values in pictures()]


def test_every_cluster_can_be_read(figures):
    many = dtr.plot_clusters(dtr.interval_clusters(200, 65)).axes[0]
    assert len(many.patches) == 65 and not any(text.get_text() for text in many.texts)
    for clusters, _, figure in figures:
        figure.draw_without_rendering()
        boxes = figure.axes[0]
        caption, *labels = boxes.texts
        assert "timesteps" in caption.get_text() and "length" in caption.get_text()
        assert len(labels) == clusters.num_clusters
        for k, (first, end) in enumerate(itertools.pairwise(clusters.bounds)):
            span = str(first) if end == first + 1 else f"{first}\N{EN DASH}{end - 1}"
            words = labels[k].get_text().replace(":", "").replace("(", "").replace(")", "").split()
            assert words == [str(k), span, str(end - first)]
        extents = [text.get_window_extent() for text in boxes.texts]
        assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(extents)), "labels overlap"
        assert all(figure.bbox.x0 <= e.x0 and e.x1 <= figure.bbox.x1 and e.y1 <= figure.bbox.y1 for e in extents)
        assert f"cost {clusters.cost}, K {clusters.num_clusters}, T {clusters.num_timesteps}" in boxes.get_title()


def test_boxes_lead_to_the_intervals(figures):
    for clusters, _, figure in figures:
        boxes, axes = figure.axes[:2]
        wedges = [patch.get_xy() for patch in boxes.patches]
        expected = [[first - 0.5, end - 0.5] for first, end in itertools.pairwise(clusters.bounds)]
        assert [sorted({x for x, y in corners.tolist() if y == 0}) for corners in wedges] == expected
        assert axes.get_xlim() == boxes.get_xlim() == (-0.5, clusters.num_timesteps - 0.5)
        above, below = boxes.get_position(), axes.get_position()
        assert above.x0 == pytest.approx(below.x0) and above.x1 == pytest.approx(below.x1)
        assert above.y0 == pytest.approx(below.y1), "no gap between a box's wedge and its band"


def test_what_is_behind_the_clusters(figures):
    for clusters, values, figure in figures:
        axes = figure.axes[1]
        edges = [(first - 0.5, end - first) for first, end in itertools.pairwise(clusters.bounds)]
        assert [(patch.get_x(), patch.get_width()) for patch in axes.patches] == edges  # bands, or squares
        if values is None:
            assert not axes.lines and not axes.images and not len(axes.get_yticks())
        elif np.ndim(values) == 1:
            (line,) = axes.lines
            np.testing.assert_array_equal(line.get_ydata(), values)
            assert axes.get_yscale() == "log" and axes.get_ylabel() == "SNR"
        else:
            (image,) = axes.images
            np.testing.assert_array_equal(image.get_array(), values)
            assert image.origin == "lower"
            assert [(patch.get_y(), patch.get_height()) for patch in axes.patches] == edges
            assert image.norm(0.0) == 0.5, "an affinity of 0 has the colour in the middle"
            area = axes.get_window_extent()
            assert area.width == pytest.approx(area.height)


def test_files_of_pictures(tmp_path, monkeypatch):
    imread = pytest.importorskip("matplotlib.image").imread
    monkeypatch.chdir(tmp_path)
    clusters = clusters_of(0, 1, 7, 10)
    dtr.plot_clusters(clusters)
    assert not list(tmp_path.iterdir())
    figure = dtr.plot_clusters(clusters, "clusters.pdf")
    assert (tmp_path / "clusters.pdf").read_bytes().startswith(b"%PDF")
    dtr.plot_clusters(clusters, tmp_path / "clusters.png")
    picture = imread(tmp_path / "clusters.png")[::-1]
    scale = picture.shape[0] / figure.bbox.height
    boxes, axes = figure.axes
    for k, t in enumerate((0, 4, 8)):
        colours = []
        for part, height in ((axes, 0.5), (boxes, 0.05)):
            x, y = part.get_xaxis_transform().transform((t, height)) * scale
            colours.append(picture[int(y), int(x), :3])
        np.testing.assert_allclose(colours[0], axes.patches[k].get_facecolor()[:3], atol=0.01)
        np.testing.assert_allclose(colours[0], colours[1], atol=0.01)
    assert len({tuple(patch.get_facecolor()) for patch in axes.patches}) == 3


@pytest.mark.parametrize(
    "values, error, fragments",
    [
        (torch.ones(4), ValueError, ["SNR at every timestep", "[5]", "got shape [4]"]),
        (torch.ones(5, 4), ValueError, ["affinity", "[5, 5]", "got shape [5, 4]"]),
        (torch.ones(1, 5, 5), ValueError, ["[5]", "got shape [1, 5, 5]"]),
        ([1, 2, math.nan, 4, 5], ValueError, ["values[2] = nan"]),
        ([1, 2, 3, -4, 5], ValueError, ["not negative", "values[3] = -4"]),
        ("abcde", TypeError, ["real numbers", "<U5"]),
    ],
    ids=str,
)
def test_values_of_pictures(values, error, fragments):
    pytest.importorskip("matplotlib")
    refused(lambda: dtr.plot_clusters(clusters_of(0, 2, 5), values=values), error, ["values must", *fragments])


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(lambda: dtr.plot_clusters(clusters_of(0, 2, 5)), ImportError, ["pip install matplotlib"])
