"""A training step of a DiT with gradient surgery between K timestep clusters, against an ordinary step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

import dtr_kernels as dtr
from benchmarks.cases import DTYPES, Benchmark, Case, Goal, Options, Side, dtype_name
from benchmarks.suite.models import TINY, dit_channels, make_dit
from benchmarks.suite.surgery import OTHERS, Oracle, torchjd_order, what_runs

# The distance of an update [P] from an oracle's.
Error = Callable[[Tensor], float]

K, TIMESTEPS = 5, 1000
SEED = 0
# Our surgery, and the same gradients summed in another order: a network amplifies roundings.
BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}


def cases(options: Options) -> list[Callable[[], Case]]:
    """Return a case for each model, batch and dtype."""
    options.check("surgery_step", "gradients", ("model", "batch", "precision"), precision=DTYPES)
    models = options.asked.get("model", (TINY if options.quick else "DiT-S/2",))
    batches = options.asked.get("batch", (4 * K,))
    for model in models:
        dit_channels(model)
    for batch in batches:
        if batch % K:
            raise ValueError(f"--batch must be a multiple of the {K} clusters, got {batch}")
    return [
        partial(step, model, batch, DTYPES[precision], options.device)
        for model in models
        for batch in batches
        for precision in options.asked.get("precision", ("fp32",))
    ]


def step(model: str, batch: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Build forward, backward and surgery, up to ``p.grad``."""
    with suppress(ImportError):  # imported here, so that a step's memory excludes its code
        import torchjd.autogram
        import torchjd.autojac  # noqa: F401
    training = Training(model, batch, dtype, device)
    gradients = training.cluster_gradients()
    loop = Oracle(gradients, dtr.ops.random_order(K, torch.Generator().manual_seed(SEED)))
    theirs = Oracle(gradients, torchjd_order(K, SEED))
    autogram = Autogram(training)

    def side(name: str, way: Training, call: Callable[[], Any], of: Error, bound: float) -> Side:
        return Side(name, call, lambda _: of(way.update()), bound, before=way.forget)

    def ours(name: str, engine: str, backward: Callable[[dtr.GradientSurgery], object]) -> Side:
        generator = torch.Generator()
        surgery = dtr.GradientSurgery(training.model.named_parameters(), K, engine=engine, generator=generator)
        made = side(name, training, lambda: backward(surgery), loop.error_of_update, BOUND[dtype])

        def before() -> None:
            training.forget()
            generator.manual_seed(SEED)

        return replace(made, before=before)

    ordinary, engines = "ordinary step", ("per_cluster", "one_pass", "low_memory")
    sides = [
        side(ordinary, training, training.ordinary, loop.error_of_sum, BOUND[dtype]),
        ours("GradientSurgery, functions", "per_cluster", training.with_functions),
        *(ours(f"GradientSurgery, {engine}", engine, training.with_batch) for engine in engines),
        *(
            side(name, way, call, of.error_of_update, OTHERS[dtype])
            for name, way, call, of in (
                ("retained graph and loop", training, partial(training.retained, loop.order), loop),
                ("TorchJD, one by one", training, partial(training.torchjd, 1), theirs),
                ("TorchJD, in parallel", training, partial(training.torchjd, None), theirs),
                ("TorchJD, autogram", autogram, autogram.step, theirs),
            )
        ),
    ]

    goals = [
        Goal("time", f"GradientSurgery, {way}", over=ordinary, at_most=1.15)
        for way in ("functions", "per_cluster", "one_pass")
    ]
    notes = [
        "a step is forward, backward and surgery, up to p.grad; the optimizer's step is the same for all and left out",
        f"gradients: {loop.conflicts}",
        what_runs(device, dtype),
        "retained graph: one forward pass, a backward pass of it for every cluster, PCGrad's loop (the public code)",
        "TorchJD: autojac.backward and jac_to_grad; one by one is parallel_chunk_size=1, in parallel its default",
        "autogram: the Gram matrix of the samples' losses, from it the clusters', then one weighted backward pass; it "
        "sees only parameters that modules use in their own calls, so its DiT runs in plain PyTorch",
        "peak MB: above the level before the first step, of model and batch; what a step leaves behind is included",
    ]
    precision = dtype_name(dtype)
    size = f"{model} ({gradients.shape[1] / 1e6:.1f}M parameters), batch {batch}"
    return Case(
        f"training step, {size}, K {K}, {precision}",
        sides,
        {"model": model, "batch": batch, "clusters": K, "precision": precision},
        time_over=ordinary,
        goals=goals,
        memory=True,
        notes=notes,
    )


class Training:
    """A model, a batch whose samples are sorted by cluster, and ways to run a step with them."""

    def __init__(self, model: str, size: int, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(SEED)
        self.model = make_dit(model, device, dtype)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        clusters = torch.arange(K).repeat_interleave(size // K)
        t = (clusters + torch.rand(size)) * (TIMESTEPS / K)
        x, noise = torch.randn(2, size, self.model.in_channels, self.model.input_size, self.model.input_size)
        # The clusters' targets lean in opposite directions, so that some clusters conflict.
        target = noise + (1 - 2 * (clusters % 2))[:, None, None, None]
        y = torch.randint(self.model.y_embedder.num_classes, (size,))
        self.batch = [x.to(device, dtype), t.long().to(device), y.to(device), target.to(device, dtype)]
        self.clusters = clusters.to(device)

    def loss(self, x: Tensor, t: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each sample [B]."""
        return squared_error(self.model(x, t, y), target)

    def _mean_loss(self, *part: Tensor) -> Tensor:
        return self.loss(*part).mean()

    def cluster_losses(self) -> Tensor:
        """Return the mean losses of the clusters over K [K], from one forward pass."""
        return self.loss(*self.batch).view(K, -1).mean(1) / K

    def cluster_gradients(self) -> Tensor:
        """Return the clusters' gradients [K, P], from K backward passes over one graph."""
        losses = self.cluster_losses()
        rows = losses.new_empty(K, sum(p.numel() for p in self.parameters))
        for k, row in enumerate(rows):
            found = torch.autograd.grad(losses[k], self.parameters, retain_graph=k + 1 < K)
            torch.cat([g.flatten() for g in found], out=row)
        return rows

    def forget(self) -> None:
        """Prepare a step: clear the gradients, and seed TorchJD's orders."""
        self.model.zero_grad()
        torch.manual_seed(SEED)

    def update(self) -> Tensor:
        """Return ``p.grad`` of all parameters as one vector [P]."""
        grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters)
        return torch.cat([grad.flatten() for grad in grads])

    def ordinary(self) -> None:
        self.loss(*self.batch).mean().backward()

    def with_functions(self, surgery: dtr.GradientSurgery) -> None:
        parts = zip(*(tensor.chunk(K) for tensor in self.batch), strict=True)
        surgery.backward([partial(self._mean_loss, *part) for part in parts])

    def with_batch(self, surgery: dtr.GradientSurgery) -> None:
        surgery.backward_batch(self.loss, self.clusters, *self.batch)

    def retained(self, order: Tensor) -> None:
        update = dtr.reference.pcgrad(self.cluster_gradients(), order).sum(0)
        for p, g in zip(self.parameters, update.split([p.numel() for p in self.parameters]), strict=True):
            p.grad = g.view_as(p)

    def torchjd(self, parallel_chunk_size: int | None) -> None:
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import backward, jac_to_grad

        backward(self.cluster_losses(), inputs=self.parameters, parallel_chunk_size=parallel_chunk_size)
        jac_to_grad(self.parameters, PCGrad())


class Autogram(Training):
    """TorchJD's engine that computes the Gram matrix without the gradients, with hooks on its own copy of the model."""

    def __init__(self, training: Training) -> None:
        self.model, self.batch = copy.deepcopy(training.model), training.batch
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        size = len(training.clusters)
        # [K, B]: maps the losses of samples to those of clusters over K.
        self.clusters = torch.nn.functional.one_hot(training.clusters, K).T.to(training.batch[0]) / size

    @cached_property
    def _engine(self) -> Any:
        from torchjd.autogram import Engine

        return Engine(self.model, batch_dim=0)

    def step(self) -> None:
        from torchjd.aggregation import PCGradWeighting

        engine = self._engine  # its hooks must precede the forward pass
        *inputs, target = self.batch
        losses = squared_error(dtr.reference.dit(self.model, *inputs), target)
        gram = self.clusters @ engine.compute_gramian(losses) @ self.clusters.T
        losses.backward(self.clusters.T @ PCGradWeighting()(gram))


def squared_error(prediction: Tensor, noise: Tensor) -> Tensor:
    """Return the squared error of the predicted noise, the first half of the channels, for each sample [B]."""
    return (prediction[:, : noise.shape[1]] - noise).square().flatten(1).mean(1)


BENCHMARK = Benchmark(
    "surgery_step",
    "A training step of a DiT with PCGrad between 5 timestep clusters: an ordinary step, GradientSurgery, the public "
    "code's way, TorchJD.",
    cases,
)
