"""GradientSurgery in training loops: what autograd, optimizers and scalers may do around it, and each weighting."""

from __future__ import annotations

import copy
import io
import math
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from comparing import Allocations, saved_and_loaded
from gpu_waits import waiting_is_an_error
from models import facebook_dit
from refusals import refused
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import dtr_kernels as dtr
from dtr_kernels import ops
from dtr_kernels.quoting import quoted
from dtr_kernels.surgery import engines, gradient_surgery, leaves, one_pass, wrappers
from dtr_kernels.surgery.buffer import GradientBuffer
from dtr_kernels.surgery.engines import EngineChoice
from dtr_kernels.surgery.interception import Interception

K = 3
NASH = pytest.param("nash", marks=pytest.mark.skipif(find_spec("torchjd") is None, reason="NOT RUN: needs TorchJD"))
pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Conflicting tasks need no more than this."""

    def __init__(self, width=11):
        super().__init__()
        self.first = nn.Linear(5, width)
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, 2)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + F.silu(self.norm(x)))


class Batches:
    """A batch of random samples for each of K clusters, with targets that set the clusters against each other."""

    def __init__(self, clusters=K, device="cpu", dtype=torch.float32, samples=4):
        self.x = torch.randn(clusters, samples, 5, device=device, dtype=dtype)
        self.y = torch.randn(clusters, 1, 2, device=device, dtype=dtype) * 3

    def loss(self, model, k):
        return (model(self.x[k]) - self.y[k]).square().mean()

    def functions(self, model):
        return [lambda k=k: self.loss(model, k) for k in range(len(self.x))]

    def tensors(self, model):
        return [self.loss(model, k) for k in range(len(self.x))]

    def mean(self, model):
        return torch.stack(self.tensors(model)).mean()

    def double(self):
        """The same in fp64."""
        wide = copy.copy(self)
        wide.x, wide.y = self.x.double(), self.y.double()
        return wide


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def update(model):
    return flat(p.grad for p in model.parameters())


def cluster_gradients(model, losses):
    """[K, P]: each loss divided by K and differentiated alone."""
    parameters = list(model.parameters())
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss / len(losses), parameters, retain_graph=True, allow_unused=True)
        rows.append(flat(torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)))
    return torch.stack(rows)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def expected_pcgrad(model, batches, seed):
    """PCGrad's update by the reference loop in fp64, in the order that a generator seeded alike draws."""
    wide = copy.deepcopy(model).double()
    grads = cluster_gradients(wide, batches.double().tensors(wide))
    return dtr.reference.pcgrad(grads, ops.random_order(len(grads), seeded(seed), grads.device)).sum(0)


def ordinary_step(model, batches):
    """The gradient of the mean loss."""
    return flat(torch.autograd.grad(batches.mean(model), list(model.parameters())))


def step(model, losses, *args, **options):
    """GradientSurgery after one step."""
    surgery = dtr.GradientSurgery(model.parameters(), len(losses), *args, **options)
    surgery.backward(losses)
    return surgery


@pytest.fixture
def where(request, seed):
    """The device of a test that runs on several."""
    return request.getfixturevalue("device") if "device" in request.fixturenames else "cpu"


@pytest.fixture
def model(where):
    return Net().to(where)


@pytest.fixture
def batches(where, model):
    return Batches(device=where)


# --- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clusters", [1, 2, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pcgrad_is_the_reference_on_per_cluster_gradients(clusters, dtype, device, seed):
    model, batches = Net().to(device, dtype), Batches(clusters, device, dtype)
    expected = expected_pcgrad(model, batches, seed)
    # The loop in the same dtype, by plain PyTorch.
    grads = cluster_gradients(model, batches.tensors(model))
    plain = dtr.reference.pcgrad(grads, ops.random_order(clusters, seeded(seed), device)).sum(0)

    surgery = dtr.GradientSurgery(model.named_parameters(), clusters, generator=seeded(seed))
    losses = surgery.backward(batches.functions(model))

    error, allowed = (update(model) - expected).norm(), 2 * (plain - expected).norm()
    assert error <= allowed + 4 * torch.finfo(dtype).eps * expected.norm()
    torch.testing.assert_close(losses, torch.stack(batches.tensors(model)).detach())
    assert surgery.last_weights.shape == (clusters,)
    assert clusters < 8 or (surgery.last_gram < 0).any(), "without conflicts this would compare sums"


def test_sum_is_an_ordinary_step(model, batches, device):
    expected = ordinary_step(model, batches)
    dtr.GradientSurgery(model.parameters(), K, "sum").backward(batches.functions(model))
    torch.testing.assert_close(update(model), expected)


def of_one_graph(model, batches):
    return (model(batches.x) - batches.y).square().mean((1, 2))


FORMS = {
    "disjoint graphs": lambda model, batches: batches.tensors(model),
    "one graph": lambda model, batches: list(of_one_graph(model, batches)),
    "one tensor": of_one_graph,
    "two of one graph": lambda model, batches: [
        batches.loss(model, 0),
        *(model(batches.x[1:]) - batches.y[1:]).square().mean((1, 2)),
    ],
    "functions": lambda model, batches: batches.functions(model),
    "mixed": lambda model, batches: [batches.loss(model, 0), batches.functions(model)[1], batches.loss(model, 2)],
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_losses(model, batches, form, autocast, seed):
    """Graphs are freed, although the caller keeps the losses: or else those of one step would live on in the next."""
    expected = expected_pcgrad(model, batches, seed).float()
    alive = []
    model.norm.register_forward_hook(lambda module, args, out: alive.append(weakref.ref(out.untyped_storage())))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = FORMS[form](model, batches)
    assert all(storage() is not None for storage in alive)
    dtr.GradientSurgery(model.parameters(), K, generator=seeded(seed)).backward(losses)
    assert alive and all(storage() is None for storage in alive)
    if not autocast:
        torch.testing.assert_close(update(model), expected)


def test_graphs_of_functions_live_one_at_a_time(model, batches):
    kept = []
    step(model, [lambda k=k: kept.append(batches.loss(model, k)) or kept[-1] for k in range(K)])
    assert len(kept) == K
    for value in kept:
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()


@pytest.mark.parametrize("weighting", ["pcgrad", "sum"])
def test_empty_cluster(weighting, seed):
    """A cluster without samples changes nothing, and its loss is reported as NaN."""
    model, batches = Net(), Batches(K - 1)
    grads = cluster_gradients(model, batches.tensors(model)) * (K - 1) / K
    surgery = dtr.GradientSurgery(model.parameters(), K, weighting)
    losses = surgery.backward([batches.functions(model)[0], None, batches.functions(model)[1]])
    # Two gradients meet each other in one order only.
    only = torch.tensor([[1], [0]])
    expected = grads.sum(0) if weighting == "sum" else dtr.reference.pcgrad(grads, only).sum(0)
    torch.testing.assert_close(update(model), expected)
    assert losses.isnan().tolist() == [False, True, False]
    assert surgery.last_gram[1].tolist() == [0] * K


def test_all_clusters_empty():
    model = Net()
    assert dtr.GradientSurgery(model.parameters(), K).backward([None] * K).isnan().all()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("weighting", ["pcgrad", "sum"])
def test_zero_gradient(model, batches, weighting):
    step(model, [lambda k=k: 0 * batches.loss(model, k) for k in range(K)], weighting)
    assert (update(model) == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("weighting", ["pcgrad", NASH, "sum", "external"])
def test_nan_and_inf_reach_the_update(model, batches, bad, weighting):
    chosen = (lambda gram: gram.new_tensor([1.0, 0.0, 2.0])) if weighting == "external" else weighting
    functions = batches.functions(model)
    functions[1] = lambda: batches.loss(model, 1) * bad
    step(model, functions, chosen)
    for name, p in model.named_parameters():
        assert not p.grad.isfinite().any(), name


@pytest.mark.parametrize("weighting", ["pcgrad", NASH, "external"])
def test_an_overflow_of_the_gram_matrix_reaches_the_update(model, batches, weighting, seed):
    """Finite gradients with products that are not: the step is NaN, and the next one as if it had not been."""
    means = batches.functions(model)

    def updates(overflow):
        chosen = Averaging() if weighting == "external" else weighting
        surgery = dtr.GradientSurgery(model.parameters(), K, chosen, generator=seeded(seed), engine="per_cluster")
        if overflow:
            before = surgery.state_dict()["weighting_state"].get("generator")
            surgery.backward([lambda mean=mean: mean() * 1e25 for mean in means])
            assert not surgery.last_gram.isfinite().all()
            assert surgery.last_weights.isnan().all() and update(model).isnan().all()
            if before is not None:
                surgery.load_state_dict(surgery.state_dict() | {"weighting_state": {"generator": before}})
            model.zero_grad()
        surgery.backward(means)
        result = update(model)
        model.zero_grad()
        return result

    assert torch.equal(updates(overflow=True), updates(overflow=False))


def test_sum_needs_no_gram_matrix(model, batches):
    """The update of finite gradients is right where their products overflow."""
    surgery = step(model, [lambda k=k: batches.loss(model, k) * 1e25 for k in range(K)], "sum")
    assert not surgery.last_gram.isfinite().all()
    torch.testing.assert_close(update(model) / 1e25, ordinary_step(model, batches), rtol=1e-5, atol=1e-5)


# --- precisions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", ["function", "call"])
def test_autocast(around, device, seed):
    """Under autocast the update is as near to fp64 as an ordinary step is."""
    model, batches = Net(64).to(device), Batches(device=device, samples=16)
    cast = torch.autocast(device.type, torch.bfloat16)
    expected = ordinary_step(copy.deepcopy(model).double(), batches.double())
    with cast:
        loss = batches.mean(model)
    loss.backward()
    allowed = (update(model) - expected).norm()
    model.zero_grad()

    surgery = dtr.GradientSurgery(model.parameters(), K, "sum")
    if around == "call":
        with cast:
            surgery.backward(batches.functions(model))
    else:

        def function(k):
            with cast:
                return batches.loss(model, k)

        surgery.backward([lambda k=k: function(k) for k in range(K)])
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert (update(model) - expected).norm() <= 2 * allowed + 1e-4 * expected.norm()


@pytest.mark.parametrize("weighting", ["pcgrad", NASH])
def test_scaler(model, batches, weighting, device, seed):
    """Scaling changes neither the parameters after the step nor what the weighting sees."""
    start = copy.deepcopy(model)
    ends, grams = [], []
    for scaled in (False, True):
        model.load_state_dict(start.state_dict())
        surgery = dtr.GradientSurgery(model.parameters(), K, weighting, generator=seeded(seed))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device.type, enabled=scaled, init_scale=2.0**12)
        for _ in range(2):
            optimizer.zero_grad()
            losses = surgery.backward(batches.functions(model), scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
        ends.append(flat(model.parameters()))
        grams.append(surgery.last_gram)
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(grams[0], grams[1])
    assert losses.max() < 1000, "losses are returned unscaled"


def test_scaler_skips_a_step_with_inf(model, batches, device):
    before = flat(model.parameters())
    surgery = dtr.GradientSurgery(model.parameters(), K)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    functions = batches.functions(model)
    functions[2] = lambda: batches.loss(model, 2) * 1e38
    surgery.backward(functions, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert torch.equal(flat(model.parameters()), before)

    optimizer.zero_grad()
    surgery.backward(batches.functions(model), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert not torch.equal(flat(model.parameters()), before)


@pytest.mark.parametrize("weighting", ["pcgrad", "sum"])
def test_mixed_dtypes(model, batches, weighting, device, seed):
    """bf16 weights and fp32 norms: one Gram matrix of both, each update in its parameter's dtype."""
    model.first.bfloat16()
    model.last.bfloat16()
    model.norm.register_forward_pre_hook(lambda module, args: args[0].float())
    model.norm.register_forward_hook(lambda module, args, out: out.bfloat16())
    batches.x = batches.x.bfloat16()
    surgery = step(model, batches.functions(model), weighting, generator=seeded(seed))
    assert [p.grad.dtype for p in model.parameters()] == [p.dtype for p in model.parameters()]
    grads = cluster_gradients(model, batches.tensors(model)).double()  # fp32 holds what bf16 does
    torch.testing.assert_close(surgery.last_gram, grads @ grads.T, rtol=1e-5, atol=1e-7)
    order = ops.random_order(K, seeded(seed), device)
    expected = grads.sum(0) if weighting == "sum" else dtr.reference.pcgrad(grads, order).sum(0)
    # Rounded once to bf16 at the end.
    torch.testing.assert_close(update(model).double(), expected, rtol=2**-8, atol=1e-4 * expected.abs().max().item())


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this PyTorch has no grad_dtype")
def test_gradients_wider_than_parameters(seed):
    model, batches = Net().bfloat16(), Batches(dtype=torch.bfloat16)
    for p in model.parameters():
        p.grad_dtype = torch.float32
    batches.mean(model).backward()
    expected = update(model)
    model.zero_grad()
    step(model, batches.functions(model), "sum")
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(update(model), expected, rtol=2**-7, atol=2**-7)


# --- what autograd may do meanwhile ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(model, batches, reentrant, seed):
    expected = expected_pcgrad(model, batches, seed).float()

    def checkpointed(x):
        hidden = checkpoint(model.first, x.requires_grad_(), use_reentrant=reentrant)
        return checkpoint(lambda h: model.last(h + F.silu(model.norm(h))), hidden, use_reentrant=reentrant)

    functions = [lambda k=k: batches.loss(checkpointed, k) for k in range(K)]
    dtr.GradientSurgery(model.parameters(), K, generator=seeded(seed)).backward(functions)
    torch.testing.assert_close(update(model), expected)


def micro_batches_of_random_counts(device="cpu"):
    """Return some whose cluster counts change, vanish or come late, and the batch that holds all their samples."""
    counts = [[3, 2, 0], [1, 2, 0], [0, 2, 3], *torch.randint(5, (3, K)).tolist(), [1, 0, 0]]
    parts = [Mixed(sizes, device).double() for sizes in counts if any(sizes)]
    parts = [parts[i] for i in torch.randperm(len(parts))[: torch.randint(1, 6, ()).item()]]
    whole = copy.copy(parts[0])
    for name in "clusters", "x", "y":
        setattr(whole, name, torch.cat([getattr(part, name) for part in parts]))
    return parts, whole


def backward_of_mixed(surgery, model, batch, method="backward_batch", **options):
    """A micro-batch's part of a step, by either method."""
    if method == "backward_batch":
        return surgery.backward_batch(batch.loss(model), batch.clusters, batch.x, batch.y, **options)
    given = (
        batch.cluster_means(model)
        if method == "tensors"
        else [lambda k=k: batch.cluster_means(model)[k] for k in range(K)]
    )
    return surgery.backward(given, counts=batch.clusters.bincount(minlength=K).tolist(), **options)


@pytest.mark.parametrize("weighting", ["pcgrad", "sum"])
@pytest.mark.parametrize("how", ["per_cluster", "one_pass", "auto", "tensors", "functions"])
def test_accumulation_of_unequal_micro_batches_equals_the_full_batch(how, weighting, device, seed):
    model = Net().to(device).double()
    parameters = list(model.named_parameters())
    engine, method = (how, "backward_batch") if how in engines.ENGINES else ("per_cluster", how)
    surgery = dtr.GradientSurgery(parameters, K, weighting, engine=engine, generator=seeded(seed))
    at_once = dtr.GradientSurgery(parameters, K, weighting, engine="per_cluster", generator=seeded(seed))
    for _ in range(4):  # with "auto" each engine has its turn
        parts, whole = micro_batches_of_random_counts(device)
        model.zero_grad()
        backward_of_mixed(at_once, model, whole)
        expected = update(model)
        model.zero_grad()
        for i, part in enumerate(parts):
            assert all(p.grad is None for p in model.parameters())
            losses = backward_of_mixed(surgery, model, part, method, last=i == len(parts) - 1)
            torch.testing.assert_close(losses, part.cluster_means(model).detach(), equal_nan=True)
        torch.testing.assert_close(update(model), expected)
        torch.testing.assert_close(surgery.last_gram, at_once.last_gram)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accumulation_of_unequal_micro_batches_in_narrow_dtypes(dtype, device, seed):
    """With a scaler; next to plain PyTorch's accumulation of the same mean, in the same dtype."""
    model = Net().to(device, dtype)
    parts, whole = micro_batches_of_random_counts(device)
    counts = whole.clusters.bincount(minlength=K)
    wide = copy.deepcopy(model).double()
    for part in parts:
        part.x, part.y = part.x.to(dtype), part.y.to(dtype)
        losses = part.loss(model)(part.x, part.y)
        (losses / counts[part.clusters].to(dtype) / K).sum().backward()
    plain = update(model).double()
    losses = whole.loss(wide)(whole.x.to(dtype).double(), whole.y.to(dtype).double())
    (losses / counts[whole.clusters] / K).sum().backward()

    model.zero_grad()
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0)
    surgery = dtr.GradientSurgery(model.named_parameters(), K, "sum", engine="per_cluster")
    for i, part in enumerate(parts):
        backward_of_mixed(surgery, model, part, scaler=scaler, last=i == len(parts) - 1)
    error, allowed = (update(model).double() / 8 - update(wide)).norm(), 2 * (plain - update(wide)).norm()
    assert error <= allowed + 8 * torch.finfo(dtype).eps * update(wide).norm()


def test_accumulation_costs_an_ordinary_step_nothing(model, batches, monkeypatch):
    """Nor a micro-batch with as many samples of each cluster as the one before it."""
    factors = []
    monkeypatch.setattr(GradientBuffer, "_scale", lambda self, given: factors.extend(given))
    dtr.GradientSurgery(model.parameters(), K).backward([None, *batches.functions(model)[1:]], counts=[0, 2, 5])
    assert factors == [1] * 2 * K
    surgery = dtr.GradientSurgery(model.parameters(), K)
    for _ in range(3):
        surgery.backward(batches.functions(model), counts=[1, 2, 3], last=False)
    assert factors == [1] * 5 * K


def test_accumulation_counts_losses_alike_without_counts(seed):
    model, parts = Net(), [Batches() for _ in range(3)]
    losses = torch.stack([torch.stack(part.tensors(model)) for part in parts])
    present = torch.tensor([[True, True, False], [True, False, False], [False, True, False]])
    means = [losses[:, k][present[:, k]].mean() if present[:, k].any() else losses.sum() * 0 for k in range(K)]
    expected = cluster_gradients(model, means).sum(0)
    surgery = dtr.GradientSurgery(model.parameters(), K, "sum")
    for i, part in enumerate(parts):
        functions = [f if there else None for f, there in zip(part.functions(model), present[i], strict=True)]
        assert torch.equal(surgery.backward(functions, last=i == 2).isnan(), ~present[i])
    torch.testing.assert_close(update(model), expected)


def test_accumulation_with_a_loss_of_no_samples(model, batches):
    """It counts as None, whatever it is worth."""
    functions = batches.functions(model)
    expected = cluster_gradients(model, batches.tensors(model))[:2].sum(0)
    surgery = dtr.GradientSurgery(model.parameters(), K, "sum")
    for last in False, True:
        losses = surgery.backward([*functions[:2], lambda: functions[2]() * torch.nan], counts=[4, 7, 0], last=last)
        assert losses.isnan().tolist() == [False, False, True]
    torch.testing.assert_close(update(model), expected)


def test_accumulation_keeps_infinity(seed):
    """An early micro-batch's reaches the update, whatever the counts of the later ones."""
    model, parts = Net(), [Mixed(sizes) for sizes in ((2, 1, 0), (5, 0, 1), (1, 1, 1))]
    parts[0].x[0] = torch.inf
    surgery = dtr.GradientSurgery(model.parameters(), K)
    for i, part in enumerate(parts):
        backward_of_mixed(surgery, model, part, last=i == 2)
    assert not update(model).isfinite().all()


@pytest.mark.parametrize("engine", ["per_cluster", "one_pass"])
def test_accumulation_and_parameters_not_in_params(engine, seed):
    """They get the sum over the micro-batches of the gradient of their mean losses."""
    model, (parts, _) = Net().double(), micro_batches_of_random_counts()
    expected = sum(torch.autograd.grad(sum(part.tensors(model)) / K, model.last.bias)[0] for part in parts)
    names = [(name, p) for name, p in model.named_parameters() if p is not model.last.bias]
    surgery = dtr.GradientSurgery(names, K, engine=engine)
    for i, part in enumerate(parts):
        backward_of_mixed(surgery, model, part, last=i == len(parts) - 1)
    torch.testing.assert_close(model.last.bias.grad, expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_model(model, batches, backend, seed):
    expected = expected_pcgrad(model, batches, seed).float()
    compiled = torch.compile(model, backend=backend)
    for losses in (batches.functions(compiled), batches.tensors(compiled)):
        model.zero_grad()
        surgery = dtr.GradientSurgery(compiled.parameters(), K, generator=seeded(seed))
        surgery.backward(losses)
        torch.testing.assert_close(update(model), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_autograd(model, batches, seed):
    """Which writes to p.grad by code of its own."""
    expected = expected_pcgrad(model, batches, seed).float()
    surgery = dtr.GradientSurgery(model.parameters(), K, generator=seeded(seed))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        surgery.backward(batches.functions(model))
    torch.testing.assert_close(update(model), expected)


def test_hooks_see_each_clusters_gradient(model, batches):
    grads = cluster_gradients(model, batches.tensors(model))
    seen = []
    model.first.weight.register_hook(lambda grad: seen.append(grad.clone()))
    model.last.bias.register_hook(lambda grad: 2 * grad)
    dtr.GradientSurgery(model.parameters(), K, "sum").backward(batches.functions(model))
    for gradient, hooked in zip(grads, seen, strict=True):
        torch.testing.assert_close(hooked.reshape(-1), gradient[: hooked.numel()])
    torch.testing.assert_close(model.last.bias.grad, 2 * grads.sum(0)[-2:])


def test_hooks_that_replace_grad_are_refused(model, batches):
    """Such as an optimizer that steps in the backward pass, and would take a cluster's gradient for the update."""

    def step_and_free(p):
        p.grad = None

    handle = model.last.weight.register_post_accumulate_grad_hook(step_and_free)
    surgery = dtr.GradientSurgery(model.named_parameters(), K, "sum")
    refused(lambda: surgery.backward(batches.functions(model)), RuntimeError, ["last.weight", "replaced", "hooks"])
    assert all(p.grad is None for p in model.parameters())
    handle.remove()
    surgery.backward(batches.functions(model))
    torch.testing.assert_close(update(model), ordinary_step(model, batches))


@pytest.mark.parametrize("last", [True, False])
def test_an_exception_leaves_grad_as_it_was(model, batches, last):
    expected = ordinary_step(model, batches)
    surgery = dtr.GradientSurgery(model.parameters(), K, "sum")
    surgery.backward(batches.functions(model), last=last)
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]

    def fails():
        batches.loss(model, 1).backward()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        surgery.backward([batches.functions(model)[0], fails, fails])
    for p, (grad, value) in zip(model.parameters(), before, strict=True):
        assert p.grad is grad
        assert grad is None or torch.equal(grad, value)
    # The next step has nothing of the failed one, nor of the micro-batch before it.
    model.zero_grad()
    surgery.backward(batches.functions(model))
    torch.testing.assert_close(update(model), expected)


def test_an_exception_in_the_weighting(model, batches):
    with pytest.raises(ZeroDivisionError):
        step(model, batches.functions(model), lambda gram: 1 / 0)
    assert all(p.grad is None for p in model.parameters())


class Failing:
    """Losses and a weighting that raise place they are told to."""

    error = ZeroDivisionError

    def __init__(self, place):
        self.place, self.calls = place, 0

    def reached(self, place):
        self.calls += place == self.place
        if place == self.place and (place == "weighting" or self.calls == 2):
            raise self.error

    def weighting(self, gram):
        self.reached("weighting")
        return gram.new_ones(K)

    def losses(self, model):
        """With a layer that is not in params, and a hook that raises in the backward pass."""

        def loss(x, target):
            self.reached("loss")
            h = model.first(x)
            if h.requires_grad:
                h.register_hook(lambda grad: self.reached("backward"))
            return (model.last(h.tanh()) - target).square().mean(1)

        return loss


@pytest.mark.parametrize("before", [None, 1.0], ids=["no grad", "a grad"])
@pytest.mark.parametrize(
    ("engine", "place", "accumulates"),
    [
        ("per_cluster", "loss", False),
        ("per_cluster", "backward", False),
        ("per_cluster", "backward", True),
        *product(("per_cluster", "one_pass", "auto"), ("weighting",), (False, True)),
        ("low_memory", "weighting", False),
    ],
)
def test_an_exception_leaves_every_gradient_as_it_was(engine, place, accumulates, before, seed):
    """Also those of parameters that are not in params; and a retry counts nothing twice."""
    model, sizes = nn.ModuleDict({"first": nn.Linear(5, 7), "last": nn.Linear(7, 2)}).double(), [2, 1, 3]
    clusters = torch.arange(K).repeat_interleave(torch.tensor(sizes))
    x, target = torch.randn(6, 5).double(), torch.randn(6, 2).double()
    others = list(model.last.parameters())
    for p in others:
        p.grad = None if before is None else torch.full_like(p, before)
    kept = [p.grad for p in others]
    failing = Failing(place)
    surgery = dtr.GradientSurgery(model.first.named_parameters(), K, failing.weighting, engine=engine)
    args = failing.losses(model), clusters, x, target
    for _ in range(2):
        failing.calls = 0
        if accumulates:
            failing.place = ""
            surgery.backward_batch(*args, last=False)
            failing.place = place
        assert [p.grad for p in others] == kept or before is None
        with pytest.raises(ZeroDivisionError):
            surgery.backward_batch(*args)
        for p, grad in zip(others, kept, strict=True):
            assert p.grad is grad and (before is None or (grad == before).all())
        assert all(p.grad is None for p in model.first.parameters())
    failing.place = ""
    surgery.backward_batch(*args)
    per_sample = failing.losses(model)(x, target)
    mean = sum(part.mean() for part in per_sample.split(sizes)) / K
    for p, expected in zip(model.parameters(), torch.autograd.grad(mean, list(model.parameters())), strict=True):
        torch.testing.assert_close(p.grad, expected + (before or 0.0) * any(p is other for other in others))


def test_micro_batches_can_be_dropped(model, batches):
    """As after an error of the caller's own between two of them."""
    others, surgery = list(model.last.parameters()), dtr.GradientSurgery(model.first.parameters(), K, "sum")
    surgery.backward(batches.functions(model), last=False)
    assert all(p.grad is None for p in others)
    surgery.drop_micro_batches()
    surgery.backward(Batches().functions(model), last=False)
    surgery.drop_micro_batches()
    surgery.backward(batches.functions(model))
    torch.testing.assert_close(update(model), ordinary_step(model, batches))


def test_gradients_of_a_leaf_that_is_the_loss(model, batches):
    """A loss may be a parameter itself."""
    alone = nn.Parameter(torch.tensor(2.0))
    surgery = dtr.GradientSurgery(model.parameters(), K, "sum")
    surgery.backward([*batches.functions(model)[:-1], lambda: alone])
    torch.testing.assert_close(alone.grad, torch.tensor(1 / K))


@pytest.mark.parametrize("kind", ["expanded", "inference", "sparse"])
def test_gradients_that_cannot_be_added_to_in_place_are_replaced(model, batches, kind):
    expected = dict(
        zip(model.parameters(), torch.autograd.grad(batches.mean(model), list(model.parameters())), strict=True)
    )
    with torch.inference_mode(kind == "inference"):
        given = {p: torch.ones(()).expand(p.shape) if kind == "expanded" else torch.ones_like(p) for p in expected}
    for p, grad in given.items():
        p.grad = grad.to_sparse() if kind == "sparse" else grad
    dtr.GradientSurgery(list(model.parameters())[:3], K, "sum").backward(batches.functions(model))
    for p, grad in expected.items():
        torch.testing.assert_close(p.grad.to_dense(), 1 + grad)


def test_an_error_after_which_a_gradient_does_not_fit_any_more(model, batches):
    """The caller's own error arrives, and no gradient is left in the buffer."""

    def casts():
        model.double()
        raise KeyError("of the caller")

    for p in model.parameters():
        p.grad = torch.ones_like(p)
    surgery = dtr.GradientSurgery(list(model.parameters())[:3], K, "sum")
    with pytest.raises(KeyError, match="of the caller"):
        surgery.backward([batches.functions(model)[0], casts, casts])
    assert all(p.grad is None for p in list(model.parameters())[:3])


def test_a_step_inside_of_its_own_step_is_refused(model, batches):
    inner = dtr.GradientSurgery(model.parameters(), K, lambda gram: surgery.backward(batches.functions(model)))
    surgery = dtr.GradientSurgery(model.parameters(), K, "sum")
    for losses in ([lambda: surgery.backward(batches.functions(model)).sum()] * K,):
        with pytest.raises(RuntimeError, match="inside of its own loss"):
            surgery.backward(losses)
        assert all(p.grad is None for p in model.parameters())
    surgery = inner
    with pytest.raises(RuntimeError, match="inside of its own loss"):
        surgery.backward(batches.functions(model))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("engine", ["per_cluster", "one_pass", "auto"])
def test_hooks_on_other_parameters_run_as_often_as_passes(model, engine, seed):
    """One that steps would do so in the passes that only look at the model."""
    calls = []
    model.last.weight.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    surgery = dtr.GradientSurgery(model.first.parameters(), K, "sum", engine=engine)

    def run():
        surgery.backward_batch(lambda x: model(x).square().mean(1), torch.arange(6) % K, torch.randn(6, 5))

    if engine == "one_pass":
        with pytest.raises(one_pass.Unsupported, match="not in params has a hook"):
            run()
        return
    run()
    assert len(calls) == K


def test_attributes_of_the_callers_own_functions_are_no_leaves(model, batches):
    class Named(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.variable = "not a tensor"
            return x * 1

        @staticmethod
        def backward(ctx, dout):
            return dout

    surgery = dtr.GradientSurgery(model.parameters(), K, "sum")
    surgery.backward([lambda loss=loss: Named.apply(loss()) for loss in batches.functions(model)])
    torch.testing.assert_close(update(model), ordinary_step(model, batches))


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", range(6))
def test_ctrl_c_between_two_writes_to_grad_comes_after_them(model, batches, write, monkeypatch):
    writes = []
    add = leaves._add
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def interrupted(leaf, new):
        if len(writes) == write:
            signal.raise_signal(signal.SIGINT)
        writes.append(add(leaf, new))

    monkeypatch.setattr(leaves, "_add", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    surgery = dtr.GradientSurgery(list(model.parameters())[:-1], K, "sum")
    with pytest.raises(KeyboardInterrupt):
        surgery.backward(batches.functions(model))
    assert len(writes) == len(list(model.parameters())) == 6 and signal.getsignal(signal.SIGINT) is handler
    torch.testing.assert_close(update(model), ordinary_step(model, batches))


@pytest.mark.parametrize("place", ["loss", "weighting", "end of a micro-batch"])
def test_ctrl_c_ends_a_step_at_once(model, batches, place, monkeypatch):
    """In what may take long; the next step has nothing of it."""
    after = []

    def interrupt(here, result=None):
        if here == place:
            signal.raise_signal(signal.SIGINT)
            after.append(here)
        return result

    handler = signal.getsignal(signal.SIGINT)
    surgery = dtr.GradientSurgery(model.parameters(), K, lambda gram: interrupt("weighting", gram.new_ones(K)))
    losses = [lambda loss=loss: interrupt("loss", loss()) for loss in batches.functions(model)]
    if place == "end of a micro-batch":
        check = gradient_surgery._check_reached
        monkeypatch.setattr(
            gradient_surgery, "_check_reached", lambda *args: interrupt("end of a micro-batch", check(*args))
        )
    with pytest.raises(KeyboardInterrupt):
        surgery.backward(losses, last=place != "end of a micro-batch")
    assert after == ["end of a micro-batch"] * (place == "end of a micro-batch")
    assert all(p.grad is None for p in model.parameters()) and signal.getsignal(signal.SIGINT) is handler
    place = ""
    surgery.backward(losses)
    torch.testing.assert_close(update(model), ordinary_step(model, batches))


@pytest.mark.parametrize("end", [1, 2])
@pytest.mark.parametrize("engine", ["one_pass", "low_memory"])
def test_ctrl_c_at_the_end_of_a_pass_leaves_no_mode_of_pytorch(model, engine, end, monkeypatch):
    ends, leave = [], Interception.__exit__

    def interrupted(self, *args):
        ends.append(self)
        if len(ends) == end:
            signal.raise_signal(signal.SIGINT)
        leave(self, *args)

    monkeypatch.setattr(Interception, "__exit__", interrupted)
    surgery = dtr.GradientSurgery(model.parameters(), K, "sum", engine=engine)
    with pytest.raises(KeyboardInterrupt):
        surgery.backward_batch(lambda x: model(x).square().mean(1), torch.arange(6) % K, torch.randn(6, 5))
    assert len(ends) >= end and not torch._C._len_torch_function_stack()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(()))  # would fail in the stance of a pass


@pytest.mark.parametrize("handler", [signal.SIG_IGN, "own"])
def test_ctrl_c_with_another_handler(model, batches, handler):
    """One of the caller's own is called once, in the passes at once; none is replaced by Python's."""
    calls = []
    own = handler if handler == signal.SIG_IGN else lambda *args: calls.append(args)
    before = signal.signal(signal.SIGINT, own)
    try:

        def weighting(gram):
            signal.raise_signal(signal.SIGINT)
            assert len(calls) == callable(own)
            return gram.new_ones(K)

        dtr.GradientSurgery(model.parameters(), K, weighting).backward(batches.functions(model))
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(calls) == callable(own)
    torch.testing.assert_close(update(model), ordinary_step(model, batches))


def test_steps_in_a_thread_touch_no_handler(model, batches, monkeypatch):
    """Signals have handlers in the main thread alone."""
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("a handler was changed"))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(dtr.GradientSurgery(model.parameters(), K, "sum").backward, batches.functions(model)).result()
    torch.testing.assert_close(update(model), ordinary_step(model, batches))


# --- parameters ------------------------------------------------------------------------------------------------------


def test_parameters_without_gradient(model, batches):
    """Neither autograd nor surgery gives them one, and so no optimizer decays them."""
    model.unused = nn.Linear(3, 3)
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    before = model.unused.weight.detach().clone()
    surgery = dtr.GradientSurgery(model.parameters(), K)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        surgery.backward(batches.functions(model))
        assert model.unused.weight.grad is None
        assert model.unused.bias.grad is None
        assert model.frozen.grad is None
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.unused.weight, before)


def test_parameter_of_some_clusters(seed):
    model = Net()
    model.extra = nn.ParameterList(nn.Parameter(torch.randn(2)) for _ in range(2))
    batches = Batches()
    functions = batches.functions(model)
    functions[0] = lambda: (model(batches.x[0]) + model.extra[0] - batches.y[0]).square().mean()
    functions[2] = lambda: (model(batches.x[2]) * model.extra[1] + model.extra[0] - batches.y[2]).square().mean()
    grads = cluster_gradients(model, [function() for function in functions])
    dtr.GradientSurgery(model.parameters(), K, generator=seeded(seed)).backward(functions)
    expected = dtr.reference.pcgrad(grads.double(), ops.random_order(K, seeded(seed))).sum(0).float()
    torch.testing.assert_close(update(model), expected)


def test_frozen_and_unfrozen_between_steps(model, batches):
    model.norm.requires_grad_(False)
    surgery = dtr.GradientSurgery(model.parameters(), K, "sum")
    for frozen, thawed in [(model.norm, model.last), (model.first, model.norm), (model.last, model.first)]:
        thawed.requires_grad_(True)
        frozen.requires_grad_(False)
        expected = copy.deepcopy(model)
        batches.mean(expected).backward()
        surgery.backward(batches.functions(model))
        for (name, p), like in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert (p.grad is None) == (like.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, like.grad)
        model.zero_grad()


def test_changes_within_a_step_are_refused(model, batches):
    surgery = dtr.GradientSurgery(model.parameters(), K, "sum")
    surgery.backward(batches.functions(model), last=False)
    model.norm.requires_grad_(False)
    refused(lambda: surgery.backward(batches.functions(model)), RuntimeError, ["params changed", "between steps"])
    model.norm.requires_grad_(True)
    surgery.backward(batches.functions(model))
    torch.testing.assert_close(update(model), ordinary_step(model, batches))


def test_cast_and_resized_between_steps(model, batches):
    surgery = step(model, batches.functions(model), "sum")
    model.zero_grad()
    for change in [lambda: model.double(), lambda: model.first.weight.data.t_(), lambda: model.bfloat16()]:
        change()
        if model.first.weight.shape[0] == 5:
            model.first.forward = lambda x: F.linear(x, model.first.weight.T, model.first.bias)
        batches.x, batches.y = batches.x.to(model.last.weight.dtype), batches.y.to(model.last.weight.dtype)
        expected = ordinary_step(model, batches)
        surgery.backward(batches.functions(model))
        assert all(p.grad.dtype == p.dtype and p.grad.shape == p.shape for p in model.parameters())
        allowed = 8 * torch.finfo(model.last.weight.dtype).eps * max(surgery.last_gram.diagonal().sqrt())
        assert (update(model) - expected).norm() <= allowed
        model.zero_grad()


@pytest.mark.gpu
def test_moved_between_steps(model, batches):
    surgery = step(model, batches.functions(model), "sum")
    model.zero_grad()
    model.cuda()
    batches.x, batches.y = batches.x.cuda(), batches.y.cuda()
    expected = ordinary_step(model, batches)
    surgery.backward(batches.functions(model))
    torch.testing.assert_close(update(model), expected)


def test_replaced_parameters_are_noticed(model, batches):
    surgery = dtr.GradientSurgery(model.parameters(), K)
    model.load_state_dict(Net().state_dict(), assign=True)
    refused(lambda: surgery.backward(batches.functions(model)), ValueError, ["params", "assign=True"])


def test_tied_parameters(seed):
    model = nn.Sequential(nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 5), nn.Linear(5, 2))
    model[2].weight = model[0].weight
    batches = Batches()
    grads = cluster_gradients(model, batches.tensors(model))
    twice = [*model[0].named_parameters("0"), *model[2].named_parameters("2"), *model[3].named_parameters("3")]
    assert len({name for name, _ in twice}) == 6
    dtr.GradientSurgery(twice, K, generator=seeded(seed)).backward(batches.functions(model))
    expected = dtr.reference.pcgrad(grads.double(), ops.random_order(K, seeded(seed))).sum(0).float()
    torch.testing.assert_close(update(model), expected)


def test_other_parameters_get_the_ordinary_gradient(model, batches):
    """Surgery on part of a model."""
    other = copy.deepcopy(model)
    batches.mean(other).backward()
    dtr.GradientSurgery(model.first.parameters(), K).backward(batches.functions(model))
    torch.testing.assert_close(model.last.weight.grad, other.last.weight.grad)


def test_memory_formats(device, seed):
    """A gradient has the strides of its parameter, as optimizers like it."""
    conv = nn.Conv2d(6, 4, 3).to(device, memory_format=torch.channels_last)
    transposed = nn.Parameter(torch.randn(4, 7, device=device).T)
    x = torch.randn(K, 2, 6, 5, 5, device=device)

    def functions():
        return [lambda k=k: (conv(x[k]).mean((0, 2, 3)) @ transposed.T).square().mean() for k in range(K)]

    parameters = [*conv.parameters(), transposed]
    expected = torch.autograd.grad(torch.stack([f() for f in functions()]).mean(), parameters)
    dtr.GradientSurgery(parameters, K, "sum").backward(functions())
    for p, grad in zip(parameters, expected, strict=True):
        assert p.grad.stride() == p.stride()
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.parametrize("before", [False, True], ids=["none", "sparse grad before"])
def test_sparse_embedding_gradients(before, seed):
    """They become dense, as where autograd adds a sparse gradient to a dense one."""
    table = nn.Embedding(9, 4, sparse=True)
    index = torch.randint(9, (K, 3))
    functions = [lambda k=k: table(index[k]).square().sum() for k in range(K)]
    expected = torch.zeros(9, 4)
    if before:
        table(torch.tensor([1, 8])).sum().backward()
        assert table.weight.grad.is_sparse
        expected[[1, 8]] = 1
    for k in range(K):
        expected.index_add_(0, index[k], 2 * table.weight.detach()[index[k]] / K)
    dtr.GradientSurgery(table.parameters(), K, "sum").backward(functions)
    assert not table.weight.grad.is_sparse
    torch.testing.assert_close(table.weight.grad, expected)


def test_empty_and_scalar_parameters(seed):
    scale, nothing = nn.Parameter(torch.randn(())), nn.Parameter(torch.empty(0, 3))
    x = torch.randn(K)
    functions = [lambda k=k: (scale * x[k]).square() + nothing.sum() for k in range(K)]
    dtr.GradientSurgery([scale, nothing], K, "sum").backward(functions)
    torch.testing.assert_close(scale.grad, 2 * scale.detach() * x.square().mean())
    assert nothing.grad.shape == (0, 3)


# --- p.grad ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(model, batches, set_to_none):
    """With set_to_none p.grad is a new tensor on every step; without, it stays the same, as autograd would have it."""
    surgery = step(model, batches.functions(model), "sum")
    held = [p.grad for p in model.parameters()]
    values = [grad.clone() for grad in held]
    model.zero_grad(set_to_none=set_to_none)
    batches.x *= 2
    surgery.backward(batches.functions(model))
    torch.testing.assert_close(update(model), ordinary_step(model, batches))
    for p, grad, value in zip(model.parameters(), held, values, strict=True):
        if set_to_none:
            assert torch.equal(grad, value)
            assert grad.data_ptr() != p.grad.data_ptr()
        else:
            assert p.grad is grad


def test_added_to_what_grad_holds(model, batches, seed):
    ordinary = ordinary_step(model, batches)
    batches.mean(model).backward()
    dtr.GradientSurgery(model.parameters(), K, generator=seeded(seed)).backward(batches.functions(model))
    torch.testing.assert_close(update(model), ordinary + expected_pcgrad(model, batches, seed).float())


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {"fused": False, "foreach": False}], ids=str)
def test_optimizers_and_clipping(model, batches, kind, device):
    """Three steps as with gradients of autograd's own."""
    like = copy.deepcopy(model)
    surgery = dtr.GradientSurgery(model.parameters(), K, "sum")
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-2, **kind) for net in (model, like)]
    for _ in range(3):
        surgery.backward(batches.functions(model))
        batches.mean(like).backward()
        norms = [nn.utils.clip_grad_norm_(net.parameters(), 0.5) for net in (model, like)]
        torch.testing.assert_close(*norms)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(flat(model.parameters()), flat(like.parameters()), rtol=1e-3, atol=1e-5)


def test_model_can_be_copied_and_saved(model, batches):
    """An EMA copy, and a checkpoint made between backward and step."""
    step(model, batches.functions(model))
    ema = copy.deepcopy(model)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(flat(ema.parameters()), flat(model.parameters()))
    assert all(p.is_leaf and p.grad is None for p in ema.parameters())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert file.tell() < 20_000


def test_autograd_writes_to_the_buffer(seed):
    """During the pass p.grad is the row itself, and nothing as large as the K gradients is made twice."""
    model, batches = Net(301), Batches()
    surgery = step(model, batches.functions(model))
    (buffer,) = surgery._buffer.tensors.values()
    begin, row = buffer.data_ptr(), buffer.stride(0) * buffer.element_size()
    places = []

    def watched(k):
        places.append([p.grad.data_ptr() for p in model.parameters()])
        return batches.loss(model, k)

    with Allocations() as made:
        surgery.backward([lambda k=k: watched(k) for k in range(K)])
    assert next(iter(surgery._buffer.tensors.values())) is buffer
    for k, addresses in enumerate(places):
        assert all(begin + k * row <= address < begin + (k + 1) * row for address in addresses)
    others = {address: size for address, size in made.sizes.items() if address != begin}
    assert max(others.values()) <= row, "one gradient, the update, is the largest"
    assert row <= 4 * (sum(p.numel() for p in model.parameters()) + 32 * 6)


# --- batches ---------------------------------------------------------------------------------------------------------


class Mixed:
    """A batch with samples of all clusters in any order; loss gives one value for each."""

    def __init__(self, sizes=(4, 1, 3), device="cpu"):
        clusters = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        self.clusters = clusters[torch.randperm(len(clusters))].to(device)
        self.x = torch.randn(len(clusters), 5, device=device)
        self.y = torch.randn(len(clusters), 2, device=device)

    def double(self):
        self.x, self.y = self.x.double(), self.y.double()
        return self

    def loss(self, model):
        return lambda x, y: (model(x) - y).square().mean(1)

    def cluster_means(self, model):
        """The mean losses [K]; NaN without samples."""
        losses = self.loss(model)(self.x, self.y)
        return torch.stack([losses[self.clusters == k].mean() for k in range(K)])

    def tensors(self, model):
        """The mean losses of the clusters that have samples."""
        return [mean for k, mean in enumerate(self.cluster_means(model)) if (self.clusters == k).any()]


@pytest.mark.parametrize("sizes", [(4, 1, 3), (2, 0, 3), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_backward_batch(sizes, dtype, device, seed):
    model, batch = Net().to(device), Mixed(sizes, device)
    present = [k for k in range(K) if sizes[k]]
    expected = torch.full((K,), math.nan, device=device)
    expected[present] = torch.stack(batch.tensors(model)).detach()
    grads = cluster_gradients(model, batch.tensors(model)) * len(present) / K

    surgery = dtr.GradientSurgery(model.parameters(), K, engine="per_cluster")
    losses = surgery.backward_batch(batch.loss(model), batch.clusters.to(dtype), batch.x, batch.y)
    torch.testing.assert_close(losses, expected, equal_nan=True)
    torch.testing.assert_close(surgery.last_gram[present][:, present].float(), grads @ grads.T)
    torch.testing.assert_close(update(model), surgery.last_weights[present].float() @ grads)


def test_batches_of_loss_functions_that_depend_on_order(seed):
    """Each cluster's samples come to the loss function in the order that they have in the batch."""
    model, batch = Net(), Mixed((2, 2, 3))
    seen = []

    def loss(index, x):
        seen.append(index.tolist())
        return model(x).mean(1)

    dtr.GradientSurgery(model.parameters(), K, engine="per_cluster").backward_batch(
        loss, batch.clusters, torch.arange(7), batch.x
    )
    assert seen == [(batch.clusters == k).nonzero()[:, 0].tolist() for k in range(K)]


@pytest.mark.parametrize("engine", ["per_cluster", "auto"])
@pytest.mark.parametrize("swapped", [False, True])
def test_dit_learns(swapped, engine, seed):
    """A few steps of a routed DiT towards one image reduce the loss; its batches are drawn from clusters."""
    routing, sizes = dtr.DenoisingTaskRouting(30), {"hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    if swapped:
        model, target = dtr.swap_blocks(facebook_dit(reentrant=False), routing), lambda x: F.pixel_unshuffle(x, 2)
    else:
        model, target = dtr.nn.DiT(4, 2, 3, **sizes, learn_sigma=False, routing=routing), lambda x: x
    image = torch.randn(1, 3, 4, 4)
    surgery = dtr.GradientSurgery(model.named_parameters(), K, engine=engine)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    clean, t, y = image.expand(12, -1, -1, -1), torch.randint(30, (12,)), torch.randint(3, (12,))
    noise = torch.randn_like(clean) * (t / 30)[:, None, None, None]

    def loss(x, t, y, clean):
        return (model(x, t, y) - target(clean)).square().mean((1, 2, 3))

    history = []
    for _ in range(12):
        history.append(surgery.backward_batch(loss, t // 10, clean + noise, t, y, clean).nanmean())
        optimizer.step()
        optimizer.zero_grad()
    assert history[-1] < 0.9 * history[0]
    assert surgery.engine.name != "auto"


# --- weightings ------------------------------------------------------------------------------------------------------


def random_gram(clusters=K):
    grads = torch.randn(clusters, 20, dtype=torch.float64)
    return grads @ grads.T


@pytest.fixture
def nash():
    pytest.importorskip("torchjd")
    pytest.importorskip("ecos")
    from dtr_kernels.surgery.weightings import Nash

    return Nash


def calls_of_the_solver(weighting, monkeypatch):
    """A list that grows with each."""
    calls, solve = [], weighting._solver.forward
    monkeypatch.setattr(weighting._solver, "forward", lambda root: calls.append(root) or solve(root))
    return calls


@pytest.mark.parametrize("clusters", [1, 2, 5, 8])
def test_nash_solves_the_bargaining_problem(nash, clusters, seed):
    """w_i (K^2 G w)_i = 1 for all i, so that the update has norm 1 / sqrt(K)."""
    weighting = nash(clusters)
    gram = random_gram(clusters)
    gram += gram.diagonal().mean() * torch.eye(clusters)  # far from singular: 20 iterations suffice
    weights = weighting(gram)
    of_undivided = clusters**2 * gram
    torch.testing.assert_close(weights * (of_undivided @ weights), torch.ones_like(weights), rtol=0.05, atol=0)
    torch.testing.assert_close((weights @ gram @ weights).sqrt().item(), clusters**-0.5, rtol=0.03, atol=0)


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP")
@pytest.mark.parametrize("clusters", [2, 5])
def test_nash_is_ants_loop(nash, clusters, seed):
    """Written as in ANT's code, on losses that are not divided by K, with TorchJD's solver and schedule."""
    from torchjd.aggregation import NashMTL

    model, ants = Net(), Net()
    ants.load_state_dict(model.state_dict())
    surgery = dtr.GradientSurgery(model.parameters(), clusters, "nash", engine="per_cluster")
    solver = NashMTL(clusters, max_norm=0.0, update_weights_every=25, optim_niter=20).weighting
    shrunk = 0
    for step in range(55):
        batches = Batches(clusters)
        if step % 25 > 20:  # weights of before, and gradients that have grown: some updates are above the bound
            batches.y *= 30
        model.zero_grad(), ants.zero_grad()
        surgery.backward(batches.functions(model))
        losses = batches.tensors(ants)
        alpha = solver(clusters * cluster_gradients(ants, losses))
        sum(a * loss for a, loss in zip(alpha.detach().float(), losses, strict=True)).div(clusters).backward()
        shrunk += nn.utils.clip_grad_norm_(ants.parameters(), 1.0) > 1
        torch.testing.assert_close(update(model), update(ants), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for p, q in zip(model.parameters(), ants.parameters(), strict=True):
                p -= 0.01 * p.grad
                q.copy_(p)
    assert 0 < shrunk < 55


def test_nash_solves_every_25_steps(nash, monkeypatch, seed):
    weighting = nash(K)
    solves = calls_of_the_solver(weighting, monkeypatch)
    counts = []
    for _ in range(52):
        gram = random_gram()
        weights = weighting(gram)
        assert weights @ gram @ weights <= 1 + 1e-9, "clipped on every step"
        counts.append(len(solves))
    assert counts == [1] * 25 + [2] * 25 + [3] * 2


def test_nash_leaves_small_updates_alone(nash, seed):
    weighting = nash(K)
    gram = random_gram()
    unclipped = weighting._solved(gram)
    small = gram * (0.25 / (unclipped @ gram @ unclipped))
    weighting(gram)
    torch.testing.assert_close(weighting(small), unclipped)


@pytest.mark.parametrize("bad", ["nan", "inf", "empty cluster"])
@pytest.mark.parametrize("after", [0, 1])
def test_nash_keeps_its_weights_where_there_is_no_solution(nash, bad, after, monkeypatch, seed):
    weighting = nash(K)
    solves = calls_of_the_solver(weighting, monkeypatch)
    for _ in range(25 * after):
        weighting(random_gram())
    before = weighting._weights.clone()
    gram = random_gram()
    gram[1] = gram[:, 1] = {"nan": math.nan, "inf": math.inf, "empty cluster": 0}[bad]
    for _ in range(2):
        weights = weighting(gram)
        assert torch.equal(weighting._weights, before)
        if bad == "empty cluster":
            assert weights.isfinite().all()
            assert weights @ gram @ weights <= 1 + 1e-9
        else:
            assert weights.isnan().all()
    assert len(solves) == after
    weighting(random_gram())
    # Now and then the solver finds nothing better than the weights that it starts from.
    assert len(solves) == after + 1, "the next step that can, solves"


@pytest.mark.parametrize("saved_after", [3, 25, 26])
def test_nash_resumes_exactly(nash, saved_after, seed):
    grams = [random_gram() for _ in range(60)]
    through = nash(K)
    expected = [through(gram) for gram in grams]
    first, resumed = nash(K), nash(K)
    for gram in grams[:saved_after]:
        first(gram)
    resumed(random_gram())  # whatever it did before
    resumed.load_state_dict(through_a_file(first.state_dict()))
    for gram, weights in zip(grams[saved_after:], expected[saved_after:], strict=True):
        assert torch.equal(resumed(gram), weights)


@pytest.mark.gpu
def test_nash_waits_for_the_device_only_to_solve(nash, seed):
    weighting = nash(K)
    gram = random_gram().cuda()
    weighting(gram)
    with waiting_is_an_error():
        for _ in range(24):
            weighting(gram)


@pytest.mark.parametrize("missing", ["torchjd.aggregation", "ecos"])
def test_nash_without_torchjd(missing, monkeypatch):
    pytest.importorskip("torchjd")
    if missing == "ecos":
        monkeypatch.setattr("torchjd._mixins.find_spec", lambda name: None if name == "ecos" else object())
    else:
        monkeypatch.setitem(sys.modules, missing, None)
    refused(
        lambda: dtr.GradientSurgery(Net().parameters(), K, "nash"), ImportError, ["pip install 'torchjd[nash-mtl]'"]
    )


def test_torchjd_is_not_imported():
    code = "import sys, dtr_kernels; assert not {'torchjd', 'cvxpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


WITH_ARGUMENTS = {"CAGrad": {"c": 0.5}, "FairGrad": {"alpha": 1.0}, "Krum": {"n_byzantine": 0}}
GRAMIAN_WEIGHTINGS = ["AlignedMTL", "DualProj", "GradVac", "IMTLG", "Mean", "MGDA", "PCD", "PCGrad", "Random", "Sum"]
GRAMIAN_WEIGHTINGS += ["UPGrad", *WITH_ARGUMENTS]


def torchjd_weighting(name):
    aggregation = pytest.importorskip("torchjd.aggregation")
    if not hasattr(aggregation, f"{name}Weighting"):
        pytest.skip(f"this TorchJD has no {name}Weighting")
    try:
        return getattr(aggregation, f"{name}Weighting")(**WITH_ARGUMENTS.get(name, {}))
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", GRAMIAN_WEIGHTINGS)
def test_torchjd_weightings(model, batches, name):
    """The update is what the weighting makes of the Gram matrix; overflows do not trip its solver; its state is kept
    where TorchJD can restore it."""
    weighting = torchjd_weighting(name)
    grads = cluster_gradients(model, batches.tensors(model))
    surgery = step(model, batches.functions(model), weighting)
    torch.testing.assert_close(update(model), surgery.last_weights.float() @ grads)
    if name == "Mean":
        torch.testing.assert_close(update(model), grads.mean(0))

    model.zero_grad()
    surgery.backward([lambda k=k: batches.loss(model, k) * math.inf for k in range(K)])
    assert not update(model).isfinite().any()

    other = dtr.GradientSurgery(model.parameters(), K, torchjd_weighting(name))
    if name in ("GradVac", "PCD"):
        with pytest.warns(UserWarning, match=f"{name}Weighting cannot restore"):
            other.load_state_dict(through_a_file(surgery.state_dict()))
    else:
        other.load_state_dict(through_a_file(surgery.state_dict()))


def test_torchjds_pcgrad_is_this_one(seed):
    """On two clusters there is one order."""
    model, batches = Net(), Batches(2)
    updates = []
    for weighting in (torchjd_weighting("PCGrad"), "pcgrad"):
        model.zero_grad()
        dtr.GradientSurgery(model.parameters(), 2, weighting).backward(batches.functions(model))
        updates.append(update(model))
    torch.testing.assert_close(*updates)


class Averaging:
    """A weighting with a running average, as some of TorchJD's have, which NaN and made-up matrices would spoil."""

    def __init__(self):
        self.average = None

    def __call__(self, gram):
        self.average = gram if self.average is None else (self.average + gram) / 2
        return 1 / self.average.diagonal()


class Counting:
    """A weighting with a state of its own."""

    def __init__(self):
        self.steps = 0

    def __call__(self, gram):
        self.steps += 1
        return gram.new_full((len(gram),), float(self.steps))

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weightings_get_fp64_and_return_what_they_like(model, batches, dtype):

    def weighting(gram):
        assert gram.dtype == torch.float64
        return torch.tensor([1.0, 2.0, 0.5], dtype=dtype, requires_grad=True)

    surgery = step(model, batches.functions(model), weighting)
    grads = cluster_gradients(model, batches.tensors(model))
    torch.testing.assert_close(update(model), torch.tensor([1.0, 2.0, 0.5]) @ grads)
    assert not any(tensor.requires_grad for tensor in [surgery.last_weights, *(p.grad for p in model.parameters())])
    assert surgery.last_weights.dtype == torch.float64


# --- checkpoints -----------------------------------------------------------------------------------------------------


def through_a_file(state):
    return saved_and_loaded(state, weights_only=True)


def test_pcgrad_resumes_bit_for_bit(seed):
    batches = Batches(8)

    def run(surgery, model, steps):
        for _ in range(steps):
            surgery.backward(batches.functions(model))
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
            model.zero_grad()

    model = Net()
    surgery = dtr.GradientSurgery(model.parameters(), 8, generator=seeded(seed))
    run(surgery, model, 3)
    saved, weights = through_a_file(surgery.state_dict()), copy.deepcopy(model.state_dict())
    run(surgery, model, 3)
    other = Net()
    other.load_state_dict(weights)
    resumed = dtr.GradientSurgery(other.parameters(), 8, generator=seeded(seed + 1))
    resumed.load_state_dict(saved)
    run(resumed, other, 3)
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))


def test_states_of_other_objects_are_kept(model, batches):
    surgery = step(model, batches.functions(model), Counting())
    resumed = dtr.GradientSurgery(model.parameters(), K, Counting())
    resumed.load_state_dict(through_a_file(surgery.state_dict()))
    resumed.backward(batches.functions(model))
    assert resumed.last_weights.tolist() == [2.0] * K


@pytest.mark.parametrize(
    "saved, here, fragments",
    [
        ({"num_clusters": 3}, {"num_clusters": 4}, ["num_clusters=3", "has 4"]),
        ({"weighting": "sum"}, {"weighting": "pcgrad"}, ["weighting='sum'", "has 'pcgrad'"]),
        ({"weighting": Counting()}, {"weighting": "sum"}, ["weighting='Counting'", "has 'sum'"]),
        ({"generator": seeded(0)}, {}, ["with a generator", "without one"]),
        ({}, {"generator": seeded(0)}, ["without a generator", "with one"]),
    ],
    ids=["K", "name", "object", "generator", "no generator"],
)
def test_states_that_do_not_fit(saved, here, fragments):
    save, load = (
        dtr.GradientSurgery(Net().parameters(), **{"num_clusters": K, **arguments}) for arguments in (saved, here)
    )
    refused(lambda: load.load_state_dict(save.state_dict()), ValueError, fragments)


@pytest.mark.parametrize("weighting", ["pcgrad", NASH, "external"])
def test_a_damaged_state_is_refused_and_changes_nothing(weighting, seed):
    def make(seed):
        given = {"generator": seeded(seed)} if weighting == "pcgrad" else {}
        return dtr.GradientSurgery(Net().parameters(), K, Counting() if weighting == "external" else weighting, **given)

    good, surgery = make(1).state_dict(), make(2)
    good["engine"] = {"name": "one_pass", "reason": "it was faster"}
    before = repr(surgery.state_dict())
    bad = [
        None,
        {},
        [1],
        {**good, "engine": {"name": "fastest", "reason": ""}},
        {**good, "engine": {"name": "one_pass"}},
    ]
    bad += [{k: v for k, v in good.items() if k != left_out} for left_out in good]
    bad += [{**good, name: value} for name in ("num_clusters", "weighting", "weighting_state") for value in (None, [1])]
    if weighting == "nash":
        states = {
            "weights": [torch.ones(K + 1), torch.full((K,), torch.nan), None],
            "steps_until_solved": [-1, 25, "1"],
        }
        for name, values in states.items():
            bad += [{**good, "weighting_state": {**good["weighting_state"], name: value}} for value in values]
    for state in bad:
        with pytest.raises(ValueError):
            surgery.load_state_dict(state)
        assert repr(surgery.state_dict()) == before
    surgery.load_state_dict(good)
    assert surgery.engine.name == "one_pass"


# --- bad input -------------------------------------------------------------------------------------------------------


def used_up():
    parameters = Net().parameters()
    list(parameters)
    return parameters


def ones(**options):
    return nn.Parameter(torch.ones(3, **options))


BAD_PARAMETERS = {
    "none": (lambda: [], ValueError, ["params", "at least one", "got none"]),
    "used up": (used_up, ValueError, ["params", "got none", "list(...)"]),
    "all frozen": (lambda: Net().requires_grad_(False).parameters(), ValueError, ["params", "requires grad"]),
    "module": (Net, TypeError, ["params", "named_parameters()", "Net"]),
    "tensor": (ones, TypeError, ["params", "Parameter"]),
    "names": (lambda: dict(Net().named_parameters()), TypeError, ["params[0]", "str"]),
    "triples": (lambda: [("a", "b", torch.ones(1))], TypeError, ["params[0]", "pair", "tuple"]),
    "not a leaf": (lambda: [("w", 2 * ones())], ValueError, ["w ", "result of a computation"]),
    "complex": (lambda: [ones(dtype=torch.complex64)], TypeError, ["params[0]", "fp32", "complex64"]),
    "devices": (lambda: [ones(), ones(device="meta")], ValueError, ["params", "one device", "cpu, meta"]),
    "same name": (lambda: [("w", ones()), ("w", ones())], ValueError, ["params", "two", "'w'"]),
}


@pytest.mark.parametrize("case", BAD_PARAMETERS)
def test_bad_parameters(case):
    params, error, fragments = BAD_PARAMETERS[case]
    refused(lambda: dtr.GradientSurgery(params(), K), error, fragments)


@pytest.mark.parametrize("clusters", [0, -1, 65, 2**63, 10**5000, "5", 2.0, True, None], ids=quoted)
def test_bad_num_clusters(clusters):
    if clusters != 65:
        fragments = ["num_clusters", "from 1 to 10000", f"got {quoted(clusters)}"]
        refused(lambda: dtr.UncertaintyWeighting(clusters), ValueError, fragments)
    refused(
        lambda: dtr.GradientSurgery(Net().parameters(), clusters),
        ValueError, ["num_clusters", "1 to 64", f"got {quoted(clusters)}"],
    )  # fmt: skip


def from_torchjd(make):
    """make(torchjd.aggregation), later."""
    return lambda: make(pytest.importorskip("torchjd.aggregation"))


# Each would silently take a Gram matrix for gradients [K, P].
WANT_GRADIENTS = {
    "ExcessMTLWeighting": lambda jd: jd.ExcessMTLWeighting(),
    "MoDoWeighting": lambda jd: jd.MoDoWeighting(),
    "SDMGradWeighting": lambda jd: jd.SDMGradWeighting(),
    "_NashMTLWeighting": lambda jd: jd.NashMTL(K).weighting,
    "_Composition": lambda jd: jd.UPGrad().weighting,  # makes a Gram matrix of what it gets
}


@pytest.mark.parametrize("name", WANT_GRADIENTS)
@pytest.mark.parametrize("smoothed", [False, True])
def test_torchjd_weightings_that_want_gradients_are_refused(name, smoothed):
    jd = pytest.importorskip("torchjd.aggregation")
    weighting = WANT_GRADIENTS[name](jd)
    if smoothed:
        weighting = jd.CRMOGMWeighting(jd.CRMOGMWeighting(weighting))
    refused(
        lambda: dtr.GradientSurgery(Net().parameters(), K, weighting),
        TypeError, ["weighting", f"TorchJD's {name} is no Gramian weighting", "UPGradWeighting()"],
    )  # fmt: skip


def test_weightings_of_torchjds_kind_are_taken(model, batches):
    """Around others, of the user's own, and those that look at K alone."""
    jd, psd = pytest.importorskip("torchjd.aggregation"), pytest.importorskip("torchjd.linalg").PSDMatrix

    class Own(jd.Weighting[psd]):
        def forward(self, gram):
            return 1 / gram.diagonal()

    class Derived(Own):
        pass

    fixed = torch.tensor([1.0, 2.0, 0.5])
    for weighting in (Own(), Derived(), jd.CRMOGMWeighting(jd.UPGradWeighting()), jd.ConstantWeighting(fixed)):
        surgery = step(model, batches.functions(model), weighting)
        assert surgery.last_weights.isfinite().all()
    assert torch.equal(surgery.last_weights, fixed.double())


@pytest.mark.parametrize(
    "weighting, error, fragments",
    [
        (lambda: "mgda", ValueError, ["weighting", "'pcgrad', 'nash', 'sum'", "got 'mgda'"]),
        (lambda: 3, TypeError, ["weighting", "callable", "int"]),
        (lambda: None, TypeError, ["weighting", "callable", "NoneType"]),
        (lambda: Counting, TypeError, ["weighting", "class", "Counting(...)"]),
        (from_torchjd(lambda jd: jd.UPGrad()), TypeError, ["weighting", "UPGrad aggregates", "UPGradWeighting()"]),
    ],
    ids=["name", "number", "none", "class", "aggregator"],
)
def test_bad_weighting(weighting, error, fragments):
    refused(lambda: dtr.GradientSurgery(Net().parameters(), K, weighting()), error, fragments)


@pytest.mark.parametrize(
    "weights, error, fragments",
    [
        (torch.ones(K - 1), ValueError, ["weighting", "shape [3]", "got [2]"]),
        (torch.ones(K, 1), ValueError, ["weighting", "shape [3]", "got [3, 1]"]),
        (torch.ones(K, dtype=torch.int64), TypeError, ["weighting", "floating", "int64"]),
        ([1.0] * K, TypeError, ["weighting", "floating", "list"]),
    ],
    ids=["short", "column", "integers", "list"],
)
def test_bad_weights(model, batches, weights, error, fragments):
    surgery = dtr.GradientSurgery(model.parameters(), K, lambda gram: weights)
    refused(lambda: surgery.backward(batches.functions(model)), error, fragments)
    assert all(p.grad is None for p in model.parameters())


BAD_LOSSES = {
    "too few": (lambda model: [model.loss] * 2, ValueError, ["losses", "3 entries", "got 2"]),
    "too many": (lambda model: torch.ones(4), ValueError, ["losses", "3 entries", "got 4"]),
    "scalar": (lambda model: model.loss(), TypeError, ["losses", "one scalar"]),
    "generator": (lambda model: (model.loss for _ in range(3)), TypeError, ["losses", "sequence", "generator"]),
    "function": (lambda model: model.loss, TypeError, ["losses", "sequence", "function"]),
    "numbers": (lambda model: [model.loss, model.loss, 1.0], TypeError, ["losses[2]", "float"]),
    "no scalar": (
        lambda model: [model.loss, torch.ones(2, requires_grad=True), None],
        ValueError, ["losses[1]", "shape [2]", "mean"],
    ),
    "complex": (lambda model: [model.loss(), model.loss, model.loss() * 1j], ValueError, ["losses[2]", "complex64"]),
    "no grad": (lambda model: [model.loss().detach(), None, None], ValueError, ["losses[0]", "requires grad"]),
    "function of no scalar": (
        lambda model: [model.loss, lambda: model.first.weight, None],
        ValueError, ["losses[1]()", "shape [11, 5]", "mean"],
    ),
    "function of no grad": (
        lambda model: [lambda: model.loss().detach(), None, None], ValueError, ["losses[0]()", "requires grad"],
    ),
    "function of a tuple": (lambda model: [lambda: (1, 2), None, None], TypeError, ["losses[0]()", "tuple"]),
    "elsewhere": (lambda model: [ones().sum() for _ in range(3)], ValueError, ["losses", "none of the parameters"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LOSSES)
def test_bad_losses(model, batches, case):
    make, error, fragments = BAD_LOSSES[case]
    model.loss = lambda: batches.loss(model, 0)
    surgery = dtr.GradientSurgery(model.parameters(), K)
    refused(lambda: surgery.backward(make(model)), error, fragments)
    assert all(p.grad is None for p in model.parameters())


BAD_BATCHES = {
    "loss": ({"loss": 3}, TypeError, ["loss ", "function", "int"]),
    "clusters too high": ({"clusters": torch.tensor([0, 3, 1])}, ValueError, ["clusters", "0 to", "got 3", "sample 1"]),
    "clusters negative": ({"clusters": torch.tensor([0, 1, -1])}, ValueError, ["clusters", "got -1", "sample 2"]),
    "clusters float": ({"clusters": torch.zeros(3)}, TypeError, ["clusters", "integer", "float32"]),
    "clusters bool": ({"clusters": torch.zeros(3, dtype=torch.bool)}, TypeError, ["clusters", "integer", "bool"]),
    "clusters complex": ({"clusters": torch.zeros(3) * 1j}, TypeError, ["clusters", "integer", "complex64"]),
    "clusters list": ({"clusters": [0, 1, 2]}, TypeError, ["clusters", "integer", "list"]),
    "clusters of two dimensions": (
        {"clusters": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, ["clusters", "[B]", "[3, 1]"],
    ),
    "clusters empty": (
        {"clusters": torch.zeros(0, dtype=torch.int64), "tensors": [torch.ones(0, 5)]}, ValueError,
        ["clusters", "at least one", "[0]"],
    ),
    "no tensors": ({"tensors": []}, ValueError, ["tensors", "at least one"]),
    "short tensor": ({"tensors": [torch.ones(3, 5), torch.ones(2)]}, ValueError, ["tensors[1]", "3 samples", "[2]"]),
    "scalar tensor": ({"tensors": [torch.ones(3, 5), torch.ones(())]}, ValueError, ["tensors[1]", "[]"]),
    "number": ({"tensors": [torch.ones(3, 5), 1.0]}, TypeError, ["tensors[1]", "float"]),
    "loss of one value": ({"loss": lambda x: x.mean()}, ValueError, ["loss ", "shape [1]", "got []"]),
    "loss of a matrix": ({"loss": lambda x: x}, ValueError, ["loss ", "each of the 1 samples", "got [1, 5]"]),
    "loss of no tensor": ({"loss": lambda x: 1.0}, TypeError, ["loss ", "float"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches(case, seed):
    arguments, error, fragments = BAD_BATCHES[case]
    model = Net()
    arguments = {"loss": model, "clusters": torch.tensor([0, 1, 2]), "tensors": [torch.ones(3, 5)], **arguments}
    surgery = dtr.GradientSurgery(model.parameters(), K, engine="per_cluster")
    refused(
        lambda: surgery.backward_batch(arguments["loss"], arguments["clusters"], *arguments["tensors"]),
        error, fragments,
    )  # fmt: skip
    assert all(p.grad is None for p in model.parameters())


def test_low_memory_does_not_accumulate(seed):
    model, batches, batch = Net(), Batches(), Mixed()
    surgery = dtr.GradientSurgery(model.parameters(), K, engine="low_memory")
    arguments = batch.loss(model), batch.clusters, batch.x, batch.y
    words = ValueError, ["last=False", "'low_memory' never holds", "use engine='one_pass' or 'per_cluster'"]
    refused(lambda: surgery.backward_batch(*arguments, last=False), *words)
    surgery.backward(batches.functions(model), last=False)
    refused(lambda: surgery.backward_batch(*arguments), *words)


# --- engines ---------------------------------------------------------------------------------------------------------


class FakeEngines:
    """Two engines that take given times by a clock of their own and note who was called."""

    def __init__(self, monkeypatch, seconds=(1.0, 1.0), refuses=()):
        self.calls, self.clock_was_read, self.undone, self.now, self.refuses = [], 0, 0, 0.0, refuses
        self.seconds = dict(zip(("per_cluster", "one_pass"), seconds, strict=True))
        monkeypatch.setattr(engines.time, "perf_counter", self.clock)

    def clock(self):
        self.clock_was_read += 1
        return self.now

    def engine(self, name):
        self.calls.append(name)
        self.now += self.seconds[name]
        if name == "one_pass" and self.calls.count(name) in self.refuses:
            raise one_pass.Unsupported("no rule for this")
        return name

    def undo(self):
        self.undone += 1

    def step(self, choice, micro_batches=1):
        """Return the engine that each micro-batch's gradients came from."""
        both = [lambda: self.engine("per_cluster"), lambda: self.engine("one_pass")]
        return [choice.run(*both, None if i else self.undo, torch.device("cpu")) for i in range(micro_batches)]


@pytest.mark.parametrize("seconds, faster", [((1.0, 2.0), "per_cluster"), ((2.0, 1.0), "one_pass")])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_auto_takes_the_faster_engine(seconds, faster, micro_batches, monkeypatch):
    choice, fake = EngineChoice("auto"), FakeEngines(monkeypatch, seconds)
    for _ in range(4):
        for name in ("per_cluster", "one_pass"):
            assert choice.name == "auto"
            assert fake.step(choice, micro_batches) == [name] * micro_batches
    assert choice.name == faster
    assert "per_cluster" in choice.reason
    assert "one_pass" in choice.reason
    reads = fake.clock_was_read
    assert fake.step(choice, micro_batches) == [faster] * micro_batches
    assert fake.clock_was_read == reads, "a choice that is made is not timed"


def test_auto_does_not_count_the_first_time(monkeypatch):
    """In which things are compiled and allocated."""
    choice, fake = EngineChoice("auto"), FakeEngines(monkeypatch, (2.0, 100.0))
    fake.step(choice)
    fake.step(choice)
    fake.seconds["one_pass"] = 1.0
    for _ in range(6):
        fake.step(choice)
    assert choice.name == "one_pass"


@pytest.mark.parametrize("name", ["per_cluster", "one_pass"])
def test_named_engines_are_never_timed(name, monkeypatch):
    choice, fake = EngineChoice(name), FakeEngines(monkeypatch)
    for _ in range(10):
        assert fake.step(choice, 2) == [name] * 2
    assert fake.clock_was_read == 0
    assert choice.reason == "as asked for"
    fake.refuses = [21]
    if name == "one_pass":
        with pytest.raises(one_pass.Unsupported):  # nor replaced
            fake.step(choice)


@pytest.mark.parametrize("refused_at", [1, 3, 6])
def test_auto_falls_back_where_one_pass_is_refused(refused_at, monkeypatch):
    """At the first trial, a later one, and after it has been chosen."""
    choice, fake = EngineChoice("auto"), FakeEngines(monkeypatch, (2.0, 1.0), refuses=[refused_at])
    while fake.calls.count("one_pass") < refused_at:
        (name,) = fake.step(choice)
    assert name == "per_cluster"
    assert fake.undone == 1
    assert choice.name == "per_cluster"
    assert "no rule for this" in choice.reason
    assert fake.step(choice) == ["per_cluster"]


def test_one_pass_refused_within_a_step(monkeypatch):
    """Gradients of earlier micro-batches can be neither undone nor kept: the step fails, and the next one works."""
    choice, fake = EngineChoice("auto"), FakeEngines(monkeypatch, refuses=[2])
    fake.step(choice)
    with pytest.raises(one_pass.Unsupported):
        fake.step(choice, 2)
    assert fake.undone == 0
    assert choice.name == "per_cluster"
    assert fake.step(choice, 2) == ["per_cluster"] * 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyError("surprise")], ids=repr)
def test_auto_falls_back_where_one_pass_fails(error, monkeypatch):
    """It gives its memory back before per_cluster takes some: the error's traceback holds the graph."""
    choice, fake = EngineChoice("auto"), FakeEngines(monkeypatch)
    fake.step(choice)
    graphs = []

    def fails():
        tensor = torch.ones(3)
        graphs.append(weakref.ref(tensor))
        raise type(error)(*error.args)

    device = torch.device("cpu")
    assert choice.run(lambda: [graph() for graph in graphs], fails, fake.undo, device) == [None]
    assert choice.name == "per_cluster"
    assert type(error).__name__ in choice.reason
    with pytest.raises(type(error)):
        choice.run(fails, fails, fake.undo, device)


def test_errors_of_the_callers_own_decide_nothing(monkeypatch):
    choice, fake = EngineChoice("auto"), FakeEngines(monkeypatch)
    fake.step(choice)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            choice.run(lambda: 1 / 0, lambda: 1 / 0, fake.undo, torch.device("cpu"))
    assert choice.name == "auto"
    assert fake.step(choice) == ["one_pass"]


def test_engine_choice_is_saved(monkeypatch):
    choice, fake = EngineChoice("auto"), FakeEngines(monkeypatch, (2.0, 1.0))
    for _ in range(8):
        fake.step(choice)
    resumed, named = EngineChoice("auto"), EngineChoice("per_cluster")
    for other in (resumed, named):
        other.load_state_dict(through_a_file(choice.state_dict()))
    assert (resumed.name, resumed.reason) == ("one_pass", choice.reason)
    assert named.name == "per_cluster"
    saved, loaded = (dtr.GradientSurgery(Net().parameters(), K) for _ in range(2))
    saved.engine.load_state_dict(choice.state_dict())
    loaded.load_state_dict(through_a_file(saved.state_dict()))
    assert loaded.engine.name == "one_pass"
    # A name that somebody has asked for is no finding, and does not bind another run.
    resumed = EngineChoice("auto")
    resumed.load_state_dict(EngineChoice("low_memory").state_dict())
    assert resumed.name == "auto"


def test_unknown_engine():
    refused(
        lambda: dtr.GradientSurgery(Net().parameters(), K, engine="two_pass"),
        ValueError, ["engine", "'auto', 'per_cluster', 'one_pass', 'low_memory'", "'two_pass'"],
    )  # fmt: skip


def test_a_refused_one_pass_leaves_nothing_behind(monkeypatch, seed):
    """Through GradientSurgery: it writes half of its gradients, refuses, and per_cluster starts over."""
    model, batch = Net(), Mixed()

    def half(buffer, parameters, loss, data, scaled):
        for tensor in buffer.tensors.values():
            tensor.fill_(7)
        raise one_pass.Unsupported("no rule for this")

    monkeypatch.setattr(gradient_surgery.one_pass, "accumulate", half)
    surgery = dtr.GradientSurgery(model.parameters(), K, "sum")
    expected = cluster_gradients(model, batch.tensors(model)).sum(0)
    for _ in range(2):
        for _ in range(2):
            surgery.backward_batch(batch.loss(model), batch.clusters, batch.x, batch.y, last=False)
        surgery.backward_batch(batch.loss(model), batch.clusters, batch.x, batch.y)
        torch.testing.assert_close(update(model), expected)
        model.zero_grad()
    assert surgery.engine.name == "per_cluster"


# --- uncertainty weighting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["tensor", "list"])
def test_uncertainty_is_the_reference(dtype, form, device, seed):
    weighting = with_log_variances(torch.randn(5)).to(device)
    losses = torch.rand(5, device=device, dtype=dtype, requires_grad=True)
    s = weighting.log_variances.detach().double().requires_grad_()
    wide = losses.detach().double().requires_grad_()
    expected = dtr.reference.uncertainty_loss(wide, s)
    expected.backward()
    loss = weighting(losses if form == "tensor" else list(losses))
    loss.backward()
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flat(p.grad for p in weighting.s).double(), s.grad, rtol=1e-5, atol=1e-6)


def with_log_variances(values):
    weighting = dtr.UncertaintyWeighting(len(values))
    weighting.load_state_dict({f"s.{k}": value.reshape(1) for k, value in enumerate(values)})
    return weighting


def test_uncertainty_starts_from_half_the_mean_and_settles_at_the_loss_divided_by_the_number_of_clusters(seed):
    """ANT and DTR weight l_k / K: exp(s_k) = l_k / K."""
    weighting, losses = dtr.UncertaintyWeighting(3), torch.tensor([0.3, 1.0, 6.0])
    assert weighting.log_variances.tolist() == [0, 0, 0]
    assert weighting(torch.tensor([1.0, 2.0, 3.0])).item() == 1
    optimizer = torch.optim.SGD([weighting.param_group(lr=0.5)])
    for _ in range(300):
        optimizer.zero_grad()
        weighting(losses).backward()
        optimizer.step()
    torch.testing.assert_close(weighting.log_variances.detach().exp(), losses / 3, rtol=1e-3, atol=0)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_uncertainty_of_a_loss_of_zero_does_not_run_away(optimizer):
    weighting = dtr.UncertaintyWeighting(5)
    optimizer = optimizer([weighting.param_group()])
    losses = torch.tensor([0.0, 1e-20, -3.0, 1.0, 1e-3])
    for _ in range(2000):
        optimizer.zero_grad()
        weighting(losses).backward()
        optimizer.step()
    weights = weighting.log_variances.detach().neg().exp()
    torch.testing.assert_close(weights, torch.tensor([1e8, 1e8, 1e8, 5.0, 5e3]), rtol=0.2, atol=0)


@pytest.mark.parametrize("loss", [0.0, -2.0, 1e-12, 5.0])
def test_uncertainty_passes_the_gradient_of_every_loss(loss):
    """The floor is what s_k sees; the model's gradient is weighted as ever."""
    weighting = with_log_variances(torch.tensor([-1.0, 0.5]))
    losses = torch.tensor([loss, 1.0], requires_grad=True)
    weighting(losses).backward()
    torch.testing.assert_close(losses.grad, torch.tensor([1.0, -0.5]).exp() / 4)
    assert weighting.s[0].grad == pytest.approx(0.5 - math.e * max(loss / 2, 1e-8) / 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_uncertainty_of_nan_and_inf(bad):
    weighting, losses = dtr.UncertaintyWeighting(2), torch.tensor([bad, 1.0])
    loss = weighting(losses)
    loss.backward()
    assert torch.equal(loss, torch.tensor(bad)) or (loss.isnan() and math.isnan(bad))
    assert not weighting.s[0].grad.isfinite() and weighting.s[1].grad.isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_uncertainty_of_narrow_losses(dtype, device, seed):
    """Computed in fp32, also where the module has been cast with the model."""
    losses = (10 * torch.rand(5, device=device)).to(dtype)
    for cast in (torch.float32, dtype):
        weighting = with_log_variances(torch.randn(5)).to(device, cast)
        expected = dtr.reference.uncertainty_loss(losses.double(), weighting.log_variances.detach().double())
        with torch.autocast(device.type, torch.bfloat16):
            loss = weighting(list(losses))
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    mixed = [loss if k % 2 else loss.float() for k, loss in enumerate(losses)]
    torch.testing.assert_close(weighting(mixed).double(), expected, rtol=1e-6, atol=1e-6)


def test_uncertainty_without_some_clusters(seed):
    """None is left out, and its s_k gets no gradient; NaN is NaN."""
    weighting = with_log_variances(torch.randn(4))
    losses = torch.rand(4)
    loss = weighting([losses[0], None, losses[2], None])
    present, s = [0, 2], weighting.log_variances.detach()
    torch.testing.assert_close(loss, dtr.reference.uncertainty_loss(losses[present] / 2, s[present]))
    loss.backward()
    assert [p.grad is None for p in weighting.s] == [False, True, False, True]
    assert weighting([losses[0], losses[1], torch.tensor(math.nan), None]).isnan()


@pytest.mark.parametrize("kind", [partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_uncertainty_leaves_an_absent_cluster_where_it_was(kind):
    """A gradient of zero would let the optimizer's moments move it."""
    weighting = dtr.UncertaintyWeighting(3)
    optimizer, losses = kind([weighting.param_group()]), [torch.tensor(9.0)] * 3
    for absent in (None, None, 1, 1, 1):
        before = weighting.log_variances.detach()
        optimizer.zero_grad()
        weighting([None if k == absent else loss for k, loss in enumerate(losses)]).backward()
        optimizer.step()
        assert (weighting.log_variances != before).tolist() == [k != absent for k in range(3)]


def test_uncertainty_loads_checkpoints_of_one_parameter():
    values = torch.randn(3)
    for prefix in "", "w.":
        weighting = dtr.UncertaintyWeighting(3)
        state = {f"{prefix}log_variances": values}
        (nn.ModuleDict({"w": weighting}) if prefix else weighting).load_state_dict(state)
        assert torch.equal(weighting.log_variances, values)
        assert list(state) == [f"{prefix}log_variances"], "the caller's dictionary is not changed"
    with pytest.raises(RuntimeError, match=r"Unexpected key.*s\.3"):
        dtr.UncertaintyWeighting(3).load_state_dict({"log_variances": torch.randn(4)})


def test_uncertainty_trains_with_the_model(model, batches):
    weighting = dtr.UncertaintyWeighting(K)
    optimizer = torch.optim.AdamW([{"params": model.parameters()}, weighting.param_group()], lr=1e-3, weight_decay=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.025]
    assert optimizer.param_groups[1]["weight_decay"] == 0
    above = []
    for _ in range(5):
        losses = batches.tensors(model)
        above.append(torch.stack(losses) > K)
        weighting(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
    # A loss above its variance raises the variance; one that crosses it may leave it on either side.
    steady = torch.stack(above).all(0) | ~torch.stack(above).any(0)
    assert torch.equal((weighting.log_variances > 0)[steady], above[0][steady])
    restored = dtr.UncertaintyWeighting(K)
    restored.load_state_dict(through_a_file(weighting.state_dict()))
    assert torch.equal(restored.log_variances, weighting.log_variances)


@pytest.mark.parametrize(
    "losses, error, fragments",
    [
        (torch.ones(2), ValueError, ["losses", "3 entries", "got 2"]),
        (torch.ones(()), TypeError, ["losses", "one scalar"]),
        (torch.ones(3, 2), ValueError, ["losses[0]", "shape [2]"]),
        ([torch.ones(())] * 4, ValueError, ["losses", "got 4"]),
        ([None] * 3, ValueError, ["losses", "None for every cluster"]),
        ([torch.ones(()), 1.0, None], TypeError, ["losses[1]", "float"]),
        (3.0, TypeError, ["losses", "float"]),
    ],
    ids=["short", "scalar", "matrix", "long", "nothing", "number", "no sequence"],
)
def test_bad_losses_of_uncertainty(losses, error, fragments):
    refused(lambda: dtr.UncertaintyWeighting(3)(losses), error, fragments)


def test_ddp_wrappers_are_refused_in_the_threads_of_steps_alone(monkeypatch):
    """Steps of two threads overlap, and the first to begin ends first; another thread has a wrapper of its own."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    original = DistributedDataParallel._pre_forward
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    begun, ended = threading.Event(), threading.Event()
    vars(wrapper)["require_backward_grad_sync"] = True

    def is_refused():
        try:
            wrapper._pre_forward()
        except RuntimeError as error:
            return "wrapper's .module" in str(error)
        except AttributeError:  # of the original, which finds no model
            return False

    def step():
        with wrappers.refused():
            begun.set()
            ended.wait()
            found.append(is_refused())

    found, thread = [], threading.Thread(target=step)
    with wrappers.refused():
        thread.start()
        begun.wait()
        assert is_refused()
    assert not is_refused() and DistributedDataParallel._pre_forward is not original
    ended.set()
    thread.join()
    assert found == [True] and DistributedDataParallel._pre_forward is original


def test_numpys_integers_are_integers(model, batches):
    import numpy as np

    plain, with_numpy = (dtr.GradientSurgery(model.parameters(), kind(K)) for kind in (int, np.int64))
    for surgery, counts in ((plain, [1, 2, 3]), (with_numpy, np.array([1, 2, 3]))):
        surgery.backward(batches.tensors(model), counts=list(counts))
    assert type(with_numpy.num_clusters) is int and torch.equal(plain.last_gram, with_numpy.last_gram)
    assert len(dtr.UncertaintyWeighting(np.int32(3)).s) == 3


def test_a_description_in_a_line():
    surgery = dtr.GradientSurgery(torch.nn.Linear(40, 50).named_parameters(), 5, "sum", engine="one_pass")
    assert repr(surgery) == "GradientSurgery(2,050 parameters, num_clusters=5, weighting='sum', engine='one_pass')"
