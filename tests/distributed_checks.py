"""Checks that test_distributed.py runs in several processes at once. Every check is called on all ranks."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import traceback
import warnings
from contextlib import suppress
from copy import deepcopy
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import dtr_kernels as dtr
from dtr_kernels import ops, reference

K = 4
CHECKS: dict[int, list] = {2: [], 4: []}


def check(*world_sizes):
    """Runs the function in groups of so many processes."""

    def register(function):
        for size in world_sizes:
            CHECKS[size].append(function)
        return function

    return register


def work(rank, world_size, folder, seed):
    """One process: runs the checks in turn and writes down how each ended; after a failure ranks are out of step."""
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.simplefilter("ignore")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=world_size)
    ended = {}
    for function in CHECKS[world_size]:
        torch.manual_seed(seed)
        try:
            function(rank, world_size)
        except Exception:
            ended[function.__name__] = traceback.format_exc()
            break
        ended[function.__name__] = ""
    Path(folder, f"ended.{rank}").write_text(json.dumps(ended))
    if not any(ended.values()):
        dist.barrier()  # none leaves while another still listens
    os._exit(0)  # destroying the process group would wait for ranks that may have failed


class Net(nn.Module):
    """Two layers, one that only samples of cluster 2 use, and one that none uses."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.head = nn.Linear(7, 3)
        self.rare = nn.Linear(7, 3)
        self.idle = nn.Parameter(torch.randn(11))

    def forward(self, x, t):
        h = self.first(x).tanh()
        y = self.head(h)
        return y + self.rare(h) * (t == 2)[:, None] if (t == 2).any() else y


def losses_of(model, t, x, target):
    """The loss of each sample."""
    return (model(x, t) - target).square().mean(1)


# The clusters of each rank's samples: the batches differ in size, and in what they lack; nobody has cluster 3.
CLUSTERS = [[0, 2, 0, 1, 1, 0], [1, 0], [0, 1, 0, 1, 1], [1, 1, 0, 2, 2, 2, 0]]


def batches(world_size, dtype=torch.float64, clusters=CLUSTERS):
    """A random batch of each rank, the same on all ranks, and the whole batch: clusters, inputs and targets."""
    parts = [
        (torch.tensor(c), torch.randn(len(c), 5, dtype=dtype), torch.randn(len(c), 3, dtype=dtype))
        for c in clusters[:world_size]
    ]
    return parts, tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def true_gradients(model, whole, losses_of=losses_of):
    """[K, P] by autograd alone: of each cluster's mean loss over the whole batch, divided by K."""
    parameters = list(model.parameters())
    rows = []
    for k in range(K):
        at = whole[0] == k
        grads = [torch.zeros_like(p) for p in parameters]
        if at.any():
            loss = losses_of(model, *(tensor[at] for tensor in whole)).mean() / K
            grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.double().flatten() for g in grads]))
    return torch.stack(rows)


def sequential():
    """A model of x alone, and the loss of each sample."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    return model, lambda model, t, x, target: (model(x) - target).square().mean(1)


def flat_update(model):
    """Return the full ``p.grad`` of all parameters as one vector, zero for a parameter without one."""
    parts = []
    for p in model.parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        parts.append((grad.full_tensor() if isinstance(grad, DTensor) else grad).detach().double().flatten())
    return torch.cat(parts)


def own_part(p):
    """Return the part of a parameter that this rank holds."""
    return (p.to_local() if isinstance(p, DTensor) else p).detach()


def assert_close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_same_everywhere(tensor):
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor)
    for copy in copies:
        assert torch.equal(copy, tensor)


def assert_update_of(grads, surgery, model, before=0.0, tolerance=1e-9):
    """The Gram matrix and p.grad are those of the true gradients [K, P], with the same weights on all ranks."""
    assert_close(surgery.last_gram, grads @ grads.T, tolerance)
    assert_close(flat_update(model), before + surgery.last_weights @ grads, tolerance)
    assert_same_everywhere(surgery.last_weights)


def raised(kind, function):
    """The message of the error that the function raises."""
    try:
        function()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def replicated(model, *args, **options):
    return dtr.GradientSurgery(model.named_parameters(), K, *args, process_group=dist.group.WORLD, **options)


def backward(surgery, model, part, losses_of=losses_of, **options):
    return surgery.backward_batch(partial(losses_of, model), part[0], *part, **options)


def backward_by_functions(surgery, model, part, **options):
    """As ``backward``; a cluster without samples has the loss of any, with a count of 0."""
    counts = part[0].bincount(minlength=K).tolist()

    def loss(k):
        chosen = part[0] == k if counts[k] else slice(1)
        return losses_of(model, *(tensor[chosen] for tensor in part)).mean()

    return surgery.backward([partial(loss, k) for k in range(K)], counts=counts, **options)


def setups(rank, world_size):
    """A model, a copy that is whole on every rank, its surgery, and a generator that draws rank 0's orders."""
    replica = Net().double()
    for model, copy in [(replica, replica), *map(sharded, meshes(world_size))]:
        group = dist.group.WORLD if model is copy else None
        own, orders = torch.Generator().manual_seed(rank), torch.Generator().manual_seed(0)
        yield model, copy, dtr.GradientSurgery(model.named_parameters(), K, generator=own, process_group=group), orders


def micro_batches_of(world_size):
    """The clusters of each rank's samples in four micro-batches: shares change, and clusters come late or stay away."""
    random = [torch.randint(K - 1, (int(torch.randint(1, 7, ())),)).tolist() for _ in range(world_size)]
    lone = [[1 + r % 2] * (r + 1) for r in range(world_size)]
    return [lone, CLUSTERS[:world_size], [*CLUSTERS[1:world_size], CLUSTERS[0]], random]


@check(2, 4)
def pcgrad_of_unequal_batches(rank, world_size):
    for model, copy, surgery, orders in setups(rank, world_size):
        if model is not copy:
            assert (surgery.engine.name, surgery.engine.reason[:15]) == ("per_cluster", "the only engine")
        for _ in range(3):
            model.zero_grad()
            parts, whole = batches(world_size)
            losses = backward(surgery, model, parts[rank])
            grads = true_gradients(copy, whole)
            assert_update_of(grads, surgery, model)
            assert_close(flat_update(model), reference.pcgrad(grads, ops.random_order(K, orders)).sum(0))
            assert model.idle.grad is None
            assert model.rare.weight.grad is not None  # also where there is no sample of cluster 2
            own = losses_of(copy, *parts[rank]).detach()
            for k in range(K):
                mean = own[parts[rank][0] == k].mean()  # NaN without samples
                torch.testing.assert_close(losses[k], mean, equal_nan=True)
        assert_same_everywhere(flat_update(model))
        for p in model.parameters():
            if isinstance(p, DTensor) and p.grad is not None:
                assert p.grad.placements == p.placements and p.grad.stride() == p.stride()
        torch.optim.AdamW(model.parameters()).step()
        backward(surgery, model, parts[rank])  # adds


@check(2)
def adds_to_an_existing_grad(rank, world_size):
    model = Net().double()
    parts, whole = batches(world_size)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    surgery = replicated(model)
    backward(surgery, model, parts[rank])
    assert_update_of(true_gradients(model, whole), surgery, model, before=1.0)


@check(2, 4)
def every_weighting(rank, world_size):
    model = Net().double()
    parts, whole = batches(world_size, clusters=[[3, *c] for c in CLUSTERS])
    grads = true_gradients(model, whole)
    gram = grads @ grads.T

    def by_norm(gram):
        return gram.diagonal() / gram.trace()

    def by_rank(gram):  # of which rank 0's is taken
        return gram.new_full((K,), 1.0 + rank)

    for weighting, expected in ("sum", gram.new_ones(K)), (by_norm, by_norm(gram)), (by_rank, gram.new_ones(K)):
        model.zero_grad()
        surgery = replicated(model, weighting)
        backward(surgery, model, parts[rank])
        assert_update_of(grads, surgery, model)
        assert_close(surgery.last_weights, expected)
    try:
        surgery = replicated(model, "nash")
    except ImportError:
        return
    for _ in range(2):
        model.zero_grad()
        backward(surgery, model, parts[rank])
        assert_update_of(grads, surgery, model)
    alone = dtr.GradientSurgery(model.named_parameters(), K, "nash")
    backward(alone, model, whole)
    assert_close(surgery.last_weights, alone.last_weights, 1e-3)


@check(2, 4)
def functions_and_counts(rank, world_size):
    model = Net().double()
    parts, whole = batches(world_size)
    clusters = parts[rank][0]

    def cluster(k):
        return lambda: losses_of(model, *(tensor[clusters == k] for tensor in parts[rank])).mean()

    losses = [cluster(k) if k in clusters else None for k in range(K)]
    counts = clusters.bincount(minlength=K).tolist()
    surgery = replicated(model)
    for given in losses, [loss and loss() for loss in losses]:
        model.zero_grad()
        surgery.backward(given, counts=counts)
        assert_update_of(true_gradients(model, whole), surgery, model)

    # Without counts the ranks that have a cluster count alike.
    model.zero_grad()
    surgery.backward(losses)
    have = torch.tensor([[k in part[0] for k in range(K)] for part in parts]).sum(0)
    grads = sum(true_gradients(model, part) for part in parts) / have.clamp_min(1)[:, None]
    assert_update_of(grads, surgery, model)

    for wrong, message in (
        ([1] * (K - 1), "counts must have 4 entries"),
        ([-1] * K, "counts must be numbers of samples"),
        ([1] * K, "must be 0, because losses["),
    ):
        assert message in raised(ValueError, lambda wrong=wrong: surgery.backward(losses, counts=wrong))


@check(2, 4)
def accumulation(rank, world_size):
    """The update of one process that had the micro-batches of all in one batch."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for model, copy, surgery, orders in setups(rank, world_size):
        for method, scale in (backward, 1), (backward_by_functions, 1), (partial(backward, scaler=scaler), 2):
            model.zero_grad()
            wholes = []
            for clusters in micro_batches_of(world_size):
                assert model.head.weight.grad is None
                parts, whole = batches(world_size, clusters=clusters)
                wholes.append(whole)
                method(surgery, model, parts[rank], last=len(wholes) == 4)
            grads = true_gradients(copy, tuple(map(torch.cat, zip(*wholes, strict=True))))
            assert_close(surgery.last_gram, grads @ grads.T)
            assert_close(flat_update(model), scale * reference.pcgrad(grads, ops.random_order(K, orders)).sum(0))
        assert_same_everywhere(flat_update(model))


@check(2)
def engines(rank, world_size):
    """With "auto" each rank chooses for itself, and may."""
    model, losses_of = sequential()
    for engine, steps in ("one_pass", 1), ("auto", 9):
        surgery = replicated(model, engine=engine)
        for _ in range(steps):
            model.zero_grad()
            parts, whole = batches(world_size)
            backward(surgery, model, parts[rank], losses_of)
            assert_update_of(true_gradients(model, whole, losses_of), surgery, model)
    assert " ms, " in surgery.engine.reason  # both were measured


@check(2, 4)
def dtypes(rank, world_size):
    """Against PyTorch's own: the mean over ranks of the gradients, all-reduced in their dtype."""
    for dtype, epsilon in (torch.float32, 2**-24), (torch.bfloat16, 2**-8), (torch.float16, 2**-11):
        model = Net().to(dtype)
        parts, whole = batches(world_size, dtype, clusters=[[0, 1, 2, 3, 3, 0, 1, 2]] * world_size)
        surgery = replicated(model, "sum", engine="per_cluster")
        backward(surgery, model, parts[rank])
        ours = flat_update(model)
        model.zero_grad()
        losses_of(model, *parts[rank]).mean().backward()
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= world_size
        plain = flat_update(model)
        t, *wide = whole[0], whole[1].double(), whole[2].double()
        true = true_gradients(model.double(), (t, *wide)).sum(0)
        bound = 2 * (plain - true).abs().max() + 4 * epsilon * true.abs().max()
        assert (ours - true).abs().max() <= bound, dtype

    class Mixed(Net):
        def forward(self, x, t):
            h = self.first(x).tanh()
            return self.head(h.float()).double() + self.rare(h)

    model = Mixed().double()
    model.head.float()
    parts, whole = batches(world_size)
    surgery = replicated(model)
    backward(surgery, model, parts[rank])
    assert model.head.weight.grad.dtype == torch.float32 and model.rare.weight.grad.dtype == torch.float64
    assert_update_of(true_gradients(model, whole), surgery, model, tolerance=1e-5)


@check(2)
def overflow_on_one_rank(rank, world_size):
    for model, copy, surgery, _ in setups(rank, world_size):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        parts, whole = batches(world_size)
        backward(surgery, model, parts[rank], scaler=scaler)
        grads = true_gradients(copy, whole)
        assert_close(surgery.last_gram, grads @ grads.T)
        assert_close(flat_update(model), 2.0**10 * surgery.last_weights @ grads)

        model.zero_grad()
        before = [own_part(p).clone() for p in model.parameters()]
        if rank == 1:
            parts[rank][1][0, 0] = torch.inf
        backward(surgery, model, parts[rank], scaler=scaler)
        assert not flat_update(model).isfinite().all()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**9
        assert all(torch.equal(own_part(p), value) for p, value in zip(model.parameters(), before, strict=True))


@check(4)
def groups_of_some_ranks(rank, world_size):
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    model = Net().double()
    members = [rank % 2, rank % 2 + 2]
    surgery = dtr.GradientSurgery(model.named_parameters(), K, process_group=groups[rank % 2])
    parts, _ = batches(world_size)
    backward(surgery, model, parts[rank])
    grads = true_gradients(model, tuple(torch.cat([parts[r][i] for r in members]) for i in range(3)))
    assert_close(surgery.last_gram, grads @ grads.T)
    assert_close(flat_update(model), surgery.last_weights @ grads)
    other = groups[1 - rank % 2]
    message = raised(TypeError, lambda: dtr.GradientSurgery(model.parameters(), K, process_group=other))
    assert "process_group must be a torch.distributed.ProcessGroup that this process belongs to" in message


@check(2, 4)
def traffic(rank, world_size):
    """(K + 1) P elements cross the network for each rank."""
    model = Net()
    parts, _ = batches(world_size, torch.float32)
    moved = []

    def counting(run):
        return lambda out, tensor, **options: (
            moved.append(max(out.numel(), tensor.numel())),
            run(out, tensor, **options),
        )

    names = ("reduce_scatter_single", "all_gather_single", "reduce_scatter_tensor", "all_gather_into_tensor")
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}
    for name in list(originals)[:2]:
        setattr(dist, name, counting(originals[name]))
    try:
        surgery = replicated(model)
        backward(surgery, model, parts[rank], last=False)
        assert not moved
        backward(surgery, model, parts[rank])
    finally:
        for name, run in originals.items():
            setattr(dist, name, run)
    P = sum(-(-p.numel() // 32) * 32 for p in model.parameters())
    assert P * (K + 1) <= sum(moved) <= (P + 32 * world_size) * (K + 1)


@check(2, 4)
def mismatches(rank, world_size):
    """One rank is different: every rank hears of it, and goes on afterwards."""
    odd = rank == world_size - 1
    last = world_size - 1
    parts, whole = batches(world_size)

    def step(model, num_clusters=K, weighting="pcgrad", engine="auto"):
        surgery = dtr.GradientSurgery(
            model.named_parameters(), num_clusters, weighting, engine=engine, process_group=dist.group.WORLD
        )
        return raised(ValueError, lambda: backward(surgery, model, parts[rank]))

    assert f"rank 0 has num_clusters = 4, and rank {last} has num_clusters = 5" in step(Net().double(), K + odd)
    message = step(Net().double(), weighting="sum" if odd else "pcgrad")
    assert f"rank 0 has weighting = 'pcgrad', and rank {last} has weighting = 'sum'" in message
    message = step(Net().double(), engine="per_cluster" if odd else "auto")
    assert f"engine = 'auto', and rank {last} has engine = 'per_cluster'" in message
    model = Net().double()
    model.idle = nn.Parameter(torch.zeros(11 + odd, dtype=torch.float64))
    message = step(model)
    assert "parameter 'idle' = [11] torch.float64" in message and "parameter 'idle' = [12] torch.float64" in message
    model = Net().double()
    model.idle.data = model.idle.data.to(torch.float32 if odd else torch.float64)
    assert "parameter 'idle' = [11] torch.float32" in step(model)
    model = Net().double()
    if odd:
        model.another = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    message = step(model)
    assert "parameter 'another'" in message or "no further parameter" in message

    # In the middle of the training.
    model = Net().double()
    surgery = replicated(model)
    backward(surgery, model, parts[rank])
    model.zero_grad()
    model.head.requires_grad_(not odd)
    message = raised(ValueError, lambda: backward(surgery, model, parts[rank]))
    assert "rank 0 has parameter 'head.weight'" in message
    assert flat_update(model).abs().sum() == 0
    model.head.requires_grad_(True)
    backward(surgery, model, parts[rank])
    assert_update_of(true_gradients(model, whole), surgery, model)


@check(2, 4)
def an_error_on_one_rank(rank, world_size):
    odd = world_size - 1
    parts, whole = batches(world_size)

    def loss(*tensors):
        raise KeyError("of the caller")

    def bad_step(surgery, model, **options):
        if rank == odd:
            return surgery.backward_batch(loss, parts[rank][0], *parts[rank], **options)
        return backward(surgery, model, parts[rank], **options)

    def bad_argument(surgery, model):
        return backward(surgery, model, (parts[rank][0] + K * (rank == odd), *parts[rank][1:]))

    def bad_micro_batch(surgery, model):
        bad_step(surgery, model, last=False)
        backward(surgery, model, parts[rank])

    def bad_argument_after_a_micro_batch(surgery, model):
        backward(surgery, model, parts[rank], last=False)
        bad_argument(surgery, model)

    for model, copy, surgery, _ in setups(rank, world_size):
        of_arguments = (bad_argument, bad_argument_after_a_micro_batch)
        # A rank that fails in its forward pass leaves the others of a sharded model waiting there.
        for step in (*of_arguments, bad_step, bad_micro_batch) if model is copy else of_arguments:
            kind, announced = KeyError, "KeyError: 'of the caller'"
            if step in of_arguments:
                kind, announced = ValueError, "ValueError: clusters must be from 0"
            message = raised(kind if rank == odd else RuntimeError, partial(step, surgery, model))
            if rank != odd:
                assert f"rank {odd} failed in this step of gradient surgery: {announced}" in message
            assert flat_update(model).abs().sum() == 0
        if model is not copy:
            other = dtr.GradientSurgery(model.named_parameters(), K, "sum" if rank == odd else "pcgrad")
            message = raised(ValueError, partial(backward, other, model, parts[rank]))
            assert f"rank 0 has weighting = 'pcgrad', and rank {odd} has weighting = 'sum'" in message
        backward(surgery, model, parts[rank])
        assert_update_of(true_gradients(copy, whole), surgery, model)


@check(2, 4)
def an_error_on_one_rank_once_they_have_met(rank, world_size):
    """In a weighting, and where memory is short: no rank waits for another, and the next step is right."""
    odd = world_size - 1
    parts, whole = batches(world_size)

    class Weighting:
        error = None

        def __call__(self, gram):
            if self.error and rank == odd:
                raise self.error
            return gram.new_ones(K)

    weighting = Weighting()
    replica = Net().double()
    for model, copy in [(replica, replica), *map(sharded, meshes(world_size))]:
        group = dist.group.WORLD if model is copy else None
        surgery = dtr.GradientSurgery(model.named_parameters(), K, weighting, process_group=group)
        for weighting.error in ZeroDivisionError("of the weighting"), KeyboardInterrupt("at once"):
            kind = type(weighting.error) if rank == odd else RuntimeError
            message = raised(kind, partial(backward, surgery, model, parts[rank]))
            assert rank == odd or f"rank {odd} failed in this step of gradient surgery: {kind_of(weighting)}" in message
            assert flat_update(model).abs().sum() == 0
        weighting.error = None
        backward(surgery, model, parts[rank])
        assert_update_of(true_gradients(copy, whole), surgery, model)


def kind_of(weighting):
    return f"{type(weighting.error).__name__}: {weighting.error}"


@check(2, 4)
def ranks_in_different_steps(rank, world_size):
    """One accumulates once more or once less than the others, or catches Ctrl-C: every rank hears of it."""
    odd = rank == world_size - 1
    parts, whole = batches(world_size)
    model = Net().double()
    surgery = replicated(model)

    def accumulate(micro_batches):
        for last in [False] * (micro_batches - 1) + [True]:
            backward(surgery, model, parts[rank], last=last)

    def interrupted(*tensors):
        if odd:
            raise KeyboardInterrupt
        return losses_of(model, *tensors)

    for here in 2 + odd, 3 - odd, 1 + odd:
        message = raised(ValueError, partial(accumulate, here))
        assert "has calls of backward and backward_batch = " in message and "used alike on all ranks" in message
        assert flat_update(model).abs().sum() == 0
    for last in False, True:
        run = partial(surgery.backward_batch, interrupted, parts[rank][0], *parts[rank], last=last)
        if not last and not odd:
            run()
            run = partial(backward, surgery, model, parts[rank])
        message = raised(KeyboardInterrupt if odd else RuntimeError, run)
        assert odd or f"rank {world_size - 1} failed in this step of gradient surgery: KeyboardInterrupt" in message
        assert flat_update(model).abs().sum() == 0
    # Dropped by one alone; and interrupted where the others have made the step.
    backward(surgery, model, parts[rank], last=False)
    if odd:
        surgery.drop_micro_batches()
    assert "has calls of" in raised(ValueError, partial(backward, surgery, model, parts[rank]))
    backward(surgery, model, parts[rank], last=False)
    surgery.drop_micro_batches()
    add = surgery._leaves.add

    def interrupted_at_the_end(updates):
        signal.raise_signal(signal.SIGINT)
        add(updates)

    if odd:
        surgery._leaves.add = interrupted_at_the_end
        raised(KeyboardInterrupt, partial(backward, surgery, model, parts[rank]))
        surgery._leaves.add = add
    else:
        backward(surgery, model, parts[rank])
    assert_close(flat_update(model), surgery.last_weights @ true_gradients(model, whole))
    model.zero_grad()
    assert "has calls of" in raised(ValueError, partial(backward, surgery, model, parts[rank]))
    accumulate(2)
    assert_update_of(true_gradients(model, whole), surgery, model)


class Silent(Exception):
    def __str__(self):
        raise TypeError("it has no words")


@check(2)
def errors_that_are_hard_to_tell(rank, world_size):
    model, (parts, whole) = Net().double(), batches(world_size)
    surgery = replicated(model)
    for error, told in (Silent(), "Silent"), (KeyError("x" * 10**6), "KeyError: 'xxx"):

        def loss(*tensors, error=error):
            if rank:
                raise error
            return losses_of(model, *tensors)

        run = partial(surgery.backward_batch, loss, parts[rank][0], *parts[rank])
        if rank:
            with suppress(type(error)):
                run()
        else:
            message = raised(RuntimeError, run)
            assert told in message and len(message) < 1000
    backward(surgery, model, parts[rank])
    assert_update_of(true_gradients(model, whole), surgery, model)


@check(2)
def what_replicas_refuse(rank, world_size):
    model = Net().double()
    assert "engine 'low_memory' does not work" in raised(ValueError, lambda: replicated(model, engine="low_memory"))
    message = raised(TypeError, lambda: dtr.GradientSurgery(model.parameters(), K, process_group="world"))
    assert "process_group must be" in message and "got str" in message
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dtr.GradientSurgery(model.parameters(), K)
    assert "torch.distributed runs 2 processes" in str(caught[0].message)
    assert Path(caught[0].filename).name == Path(__file__).name


class WrapperOfTheCallers(DistributedDataParallel):
    """With a forward of its own."""

    def forward(self, *args):
        return super().forward(*args)


WRAPPERS = {
    "plain": DistributedDataParallel,
    "unused parameters": partial(DistributedDataParallel, find_unused_parameters=True),
    "bucket views": partial(DistributedDataParallel, gradient_as_bucket_view=True),
    "static graph": partial(DistributedDataParallel, static_graph=True),
    "subclass": WrapperOfTheCallers,
    "compiled": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
    "of a compiled model": lambda model: DistributedDataParallel(torch.compile(model, backend="eager")),
    "replicate": replicate,  # which keeps the wrapper to itself
}
# Ranks without a cluster in common: as many passes, or others, of which the wrapper would average the gradients.
APART = [[0, 0, 1], [2, 2, 2, 2]]


@check(2)
def ddp_wrappers_are_refused(rank, world_size):
    before = DistributedDataParallel._pre_forward
    parts, whole = batches(world_size, clusters=APART)
    counts = parts[rank][0].bincount(minlength=K).tolist()

    def computed_before(surgery, model, part):
        each = losses_of(model, *part)
        losses = [each[part[0] == k].mean() if count else None for k, count in enumerate(counts)]
        surgery.backward(losses, counts=counts)

    for (name, wrap), early in product(WRAPPERS.items(), (False, True)):
        model = ShardedNet().double()
        if early:
            del model.idle  # without a gradient for it, the wrapper would fail by itself in the second pass
        copy = deepcopy(model)
        wrapper = wrap(model)
        for engine in ("per_cluster", "one_pass", "auto", "low_memory") if name == "plain" and not early else ("auto",):
            group = None if engine == "low_memory" else dist.group.WORLD
            surgery = dtr.GradientSurgery(model.named_parameters(), K, engine=engine, process_group=group)
            for method in (computed_before,) if early else (backward, backward_by_functions):
                message = raised(RuntimeError, lambda m=method, s=surgery, w=wrapper: m(s, w, parts[rank]))
                assert early or "let them call the model itself, the wrapper's" in message, (name, engine, message)
                assert ".module" in message and DistributedDataParallel._pre_forward is before
        assert early or flat_update(model).abs().sum() == 0
        if name != "replicate":  # has no model to call in its place
            surgery = surgery if early else replicated(model)
            (computed_before if early else backward)(surgery, model, parts[rank])
            assert_update_of(true_gradients(copy, whole), surgery, model)


@check(2)
def ddp_wrappers_that_are_quiet(rank, world_size):
    """They communicate nothing: within no_sync(), and where nothing is differentiated."""
    model, teacher = Net().double(), DistributedDataParallel(Net().double())
    wrapper = DistributedDataParallel(model)
    surgery = replicated(model)
    parts, whole = batches(world_size, clusters=APART)

    def distilled(model, t, x, target):
        with torch.no_grad():
            target = teacher(x, t)
        return losses_of(model, t, x, target)

    with wrapper.no_sync():
        backward(surgery, wrapper, parts[rank], distilled)
    assert_update_of(true_gradients(model, whole, distilled), surgery, model)


@check(2)
def a_compiled_model_is_compiled_once(rank, world_size):
    from torch._dynamo.testing import CompileCounter  # which takes long

    model, losses_of = sequential()
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    surgery = replicated(model, engine="per_cluster")
    parts, whole = batches(world_size, clusters=[[0, 0, 0, 1, 1, 1]] * 2)
    losses_of(compiled, *(tensor[:3] for tensor in parts[rank]))
    for _ in range(3):
        model.zero_grad()
        backward(surgery, compiled, parts[rank], losses_of)
        assert graphs.frame_count == 1
    assert_update_of(true_gradients(model, whole, losses_of), surgery, model)


@check(2)
def copies_are_refused(rank, world_size):
    model, (shards, _) = Net().double(), sharded(next(meshes(world_size)))
    parts, whole = batches(world_size)
    for surgery, module, argument in (
        (replicated(model), model, "process_group"),
        (dtr.GradientSurgery(shards.named_parameters(), K), shards, "params that are DTensors"),
    ):
        for copied in deepcopy, pickle.dumps, lambda thing: torch.save(thing, io.BytesIO()):
            for thing in surgery, {"step": 3, "surgery": surgery}:
                message = raised(TypeError, lambda copied=copied, thing=thing: copied(thing))
                assert f"made with {argument} cannot be copied" in message and "state_dict()" in message
            backward(surgery, module, parts[rank])
    state = replicated(model, generator=torch.Generator().manual_seed(7)).state_dict()
    surgery = replicated(model, generator=torch.Generator())
    surgery.load_state_dict(deepcopy(state))
    model.zero_grad()
    backward(surgery, model, parts[rank])
    grads, order = true_gradients(model, whole), ops.random_order(K, torch.Generator().manual_seed(7))
    assert_close(flat_update(model), reference.pcgrad(grads, order).sum(0))


class ShardedNet(Net):
    """FSDP wants the same parameters used in every pass."""

    def forward(self, x, t):
        h = self.first(x).tanh()
        return self.head(h) + self.rare(h) * (t == 2)[:, None]


def sharded(mesh, dtype=torch.float64, **options):
    """A model and its unsharded copy."""
    model = ShardedNet().to(dtype)
    copy = deepcopy(model)
    for layer in model.first, model.rare:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model, copy


def meshes(world_size):
    yield init_device_mesh("cpu", (world_size,))
    if world_size == 4:
        yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))  # HSDP


@check(2, 4)
def shards_with_losses_of_one_graph(rank, world_size):
    model, copy = sharded(next(meshes(world_size)))
    surgery = dtr.GradientSurgery(model.named_parameters(), K)
    parts, whole = batches(world_size)
    clusters = parts[rank][0]
    counts = clusters.bincount(minlength=K).tolist()
    each = losses_of(model, *parts[rank])
    losses = [each[clusters == k].sum() / max(counts[k], 1) for k in range(K - 1)]
    surgery.backward([*losses, None], counts=counts)
    assert_update_of(true_gradients(copy, whole), surgery, model)

    missing = [None if rank == 1 and k == 0 else loss for k, loss in enumerate([*losses, None])]
    message = raised(ValueError, lambda: surgery.backward(missing))
    assert f"losses[0] is None on 1 of {world_size} ranks" in message


@check(2)
def shards_of_mixed_precision(rank, world_size):
    mesh = next(meshes(world_size))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, _ = sharded(mesh, torch.float32, mp_policy=policy)
    surgery = dtr.GradientSurgery(model.named_parameters(), K, "sum")
    parts, _ = batches(world_size, torch.float32, clusters=[[0, 1, 2, 3]] * world_size)
    backward(surgery, model, parts[rank])
    assert model.head.weight.grad.dtype == torch.float32
    ours = flat_update(model)
    model.zero_grad()
    losses_of(model, *parts[rank]).mean().backward()
    assert_close(ours, flat_update(model), 0.02)


class Transformerish(nn.Module):
    """A layer of each kind that tensor parallelism shards in its own way."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x):
        return self.down(self.up(self.norm(x)).tanh())


@check(2, 4)
def tensor_parallelism(rank, world_size):
    """Alone on 2 ranks; under FSDP2 on 2 x 2."""
    shape, names = ((2,), ("tp",)) if world_size == 2 else ((2, 2), ("dp", "tp"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    tp = mesh["tp"]
    model = Transformerish().double()
    copy = deepcopy(model)
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, tp, plan)
    if world_size == 4:
        fully_shard(model, mesh=mesh["dp"])

    def inputs(x, y):
        return x.chunk(2, dim=1)[tp.get_local_rank()], y

    def losses_of(model, t, x, y):
        return (model(x) - y).square().mean((1, 2))

    batches = [torch.randn(2, n, 4, 8, dtype=torch.float64) for n in (5, 3)][: len(shape)]
    clusters = [torch.tensor([0, 1, 1, 2, 0]), torch.tensor([1, 0, 0])][: len(shape)]
    own = mesh["dp"].get_local_rank() if world_size == 4 else 0
    surgery = dtr.GradientSurgery(model.named_parameters(), K)
    local = inputs(*batches[own])
    for _ in range(2):
        model.zero_grad()
        surgery.backward_batch(partial(losses_of, model), clusters[own], clusters[own], *local)
        whole = (torch.cat(clusters), *torch.cat(batches, dim=1))
        assert_update_of(true_gradients(copy, whole, losses_of), surgery, model)


@check(2)
def what_shards_refuse(rank, world_size):
    mesh = next(meshes(world_size))
    model, copy = sharded(mesh)

    def message(*args, **options):
        return raised(ValueError, lambda: dtr.GradientSurgery(*args, **options))

    for engine in "one_pass", "low_memory":
        assert f"engine '{engine}' does not work with sharded" in message(model.parameters(), K, engine=engine)
    assert "leave process_group out" in message(model.parameters(), K, process_group=dist.group.WORLD)
    pairs = [*model.named_parameters(), ("plain", copy.idle)]
    assert "but plain is an ordinary tensor" in message(pairs, K)
    for use_orig_params in False, True:
        wrapper = FullyShardedDataParallel(Net(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        for group in None, dist.group.WORLD:
            text = message(wrapper.parameters(), K, process_group=group)
            assert "FullyShardedDataParallel (FSDP1)" in text and "use torch.distributed.fsdp.fully_shard" in text
    partial_sum = nn.Parameter(DTensor.from_local(torch.randn(3), mesh, [Partial()]))
    assert "but w has the placement" in message([("w", partial_sum)], K)
    half = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    whole = nn.Parameter(distribute_tensor(torch.randn(4), half, [Shard(0), Replicate()]))
    dtr.GradientSurgery([("part", whole), ("w", model.idle)], K)  # meshes of the same ranks may differ
