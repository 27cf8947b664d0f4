"""Gradient surgery by many processes: the same Gram matrix and update as in one process with the batches of all.

PCGrad of averaged gradients is not the average of PCGrads, so the K gradients are averaged first:

- Replicated parameters (``Replicas``): the K gradients are reduce-scattered, so that each rank holds a slice of their
  averages; the ranks add up the slices' Gram matrices, combine their slices, and gather the update. Each rank sends
  (K + 1) P elements over the network, where all-reduced gradients would take 2 K P.
- Sharded parameters (``Shards``): FSDP2 has already averaged the gradients in a shard. The ranks add up the shards'
  Gram matrices, and the update stays sharded.

Either way all ranks use one rank's weights, so that random orders and rounding cannot make the ranks drift apart.

A rank that fails must not leave the others waiting. So the ranks meet before each communication, after everything that
may fail has been done on each of them, and a rank that has failed reports it at the next meeting.

An average over ranks is weighted by samples, like one over micro-batches: with n samples of cluster k, the gradient of
their mean loss has weight n / (all samples of cluster k in the step).
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dtr_kernels import ops
from dtr_kernels.quoting import shortened
from dtr_kernels.surgery.buffer import ClusterGradients, GradientBuffer
from dtr_kernels.surgery.engines import EngineChoice
from dtr_kernels.surgery.parameters import device_of
from dtr_kernels.surgery.per_cluster import Loss

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class OneProcess:
    """The ranks of a ``GradientSurgery``: here this process only."""

    def engine(self, name: str) -> EngineChoice:
        """Return the engine with a name; ValueError if these ranks cannot use it."""
        return EngineChoice(name)

    def buffer(self, parameters: Mapping[str, Tensor], clusters: int) -> GradientBuffer:
        """Return a buffer for this rank's gradients."""
        return GradientBuffer(parameters, clusters)

    def begin(self) -> None:
        """Record that the caller has called ``backward`` or ``backward_batch``."""

    def end(self) -> None:
        """Record that the step is complete."""

    def fail(self, error: BaseException) -> None:
        """Turn an error on this rank that ends a step early into an error on every rank."""

    def weighted(
        self, losses: Sequence[Loss], counts: Sequence[int], spare: Loss = None
    ) -> tuple[Sequence[Loss], Sequence[int]]:
        """Return the losses to differentiate, and the number of samples whose mean each of them is.

        Args:
            losses: of this rank's micro-batch.
            counts: the samples of each loss; a loss of no samples is left out.
            spare: a loss to run if only other ranks have samples of a cluster, and all ranks must run.
        """
        return [loss if count else None for loss, count in zip(losses, counts, strict=True)], counts

    def together(
        self, parameters: Mapping[str, Tensor], buffer: GradientBuffer, received: set[str]
    ) -> tuple[ClusterGradients, set[str]]:
        """Return the mean gradients of all ranks' batches, and the names of parameters with a gradient on any rank."""
        buffer.average(buffer.totals)
        return buffer, received

    def agreed(self, weights: Tensor) -> Tensor:
        """Return the weights that all ranks use."""
        return weights

    def check_copyable(self) -> None:
        """Raise a TypeError if a ``GradientSurgery`` with these ranks can be neither copied nor pickled."""


def ranks(
    parameters: Mapping[str, Tensor],
    process_group: dist.ProcessGroup | None,
    num_clusters: int,
    weighting: str,
    engine: str,
) -> OneProcess:
    """Return the ranks that share the work on these parameters: of the parameters' kind and the caller's process group.

    All ranks must pass the same arguments.
    """
    settings = [("num_clusters", str(num_clusters)), ("weighting", repr(weighting)), ("engine", repr(engine))]
    for name, p in parameters.items():
        if getattr(p, "_fsdp_flattened", False):
            raise ValueError(
                f"params must be the model's own or sharded by fully_shard, but {name} belongs to "
                "FullyShardedDataParallel (FSDP1), which gathers gradients in a flat parameter; use "
                "torch.distributed.fsdp.fully_shard (FSDP2)"
            )
    if any(_is_dtensor(p) for p in parameters.values()):
        if process_group is not None:
            raise ValueError(
                "process_group is for replicated parameters, but params are DTensors, whose device mesh says which "
                "ranks work together; leave process_group out"
            )
        return Shards(parameters, settings)
    if process_group is not None:
        return Replicas(process_group, parameters, settings)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            f"torch.distributed runs {dist.get_world_size()} processes, but GradientSurgery got no process_group, so "
            "that each makes updates of its own; pass process_group=torch.distributed.group.WORLD for updates from all "
            "ranks' batches",
            stacklevel=3,
        )
    return OneProcess()


class _ManyProcesses(OneProcess):
    """Ranks that check one another: a mismatch or an error on one rank becomes an error on every rank, not a hang.

    Args:
        groups: process groups that together reach every rank, one after the other, like the dimensions of a device
            mesh.
        parameters: the parameters that all ranks have.
        settings: names and values that must be the same on all ranks.
    """

    _made_with: str  # the argument that holds process groups

    def __init__(
        self, groups: Sequence[dist.ProcessGroup], parameters: Mapping[str, Tensor], settings: list[tuple[str, str]]
    ) -> None:
        self._groups = groups
        self._device = device_of(parameters)
        # On a CPU, if the backend has one, so that no rank waits for its GPU to exchange a few numbers.
        on_cpu = all("cpu:" in dist.get_backend_config(group) for group in groups)
        self._control_device = torch.device("cpu") if on_cpu else self._device
        self._settings = settings
        self._describe(parameters)
        # Calls of backward and backward_batch: a rank that has skipped a call, or ended one early, has another number.
        self._calls = 0
        # The other ranks' next act: "meet", "know" of an error that has ended the step, or "go on" without this rank.
        self._others = "go on"

    def _describe(self, parameters: Mapping[str, Tensor]) -> None:
        """Record what the ranks must have in common: the settings, and the parameters that require grad now."""
        self._description = self._settings + [
            (f"parameter {name!r}", f"{list(p.shape)} {p.dtype} {p.stride()} {getattr(p, 'placements', '')}".strip())
            for name, p in parameters.items()
        ]

    def begin(self) -> None:
        self._others = "meet"
        self._calls += 1

    def end(self) -> None:
        self._others = "go on"

    def fail(self, error: BaseException) -> None:
        if self._others == "meet":
            with suppress(RuntimeError):  # another rank is gone; this rank's error is more useful
                self._meet(error)
        elif self._others == "go on":
            self._calls += 1  # the others notice it at the next meeting

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """Meet, and communicate inside."""
        self._meet()
        yield
        self._others = "meet"

    def _meet(self, error: BaseException | None = None) -> None:
        """Wait for all ranks; raise if another rank reports an error, or differs from the rest."""
        self._others = "know"
        report = None if error is None else _described(error)
        description = [*self._description, ("calls of backward and backward_batch", str(self._calls))]
        digest = zlib.crc32(repr(description).encode())
        word = torch.tensor([report is not None, digest, -digest, self._calls], device=self._control_device)
        self._all_reduce(word, dist.ReduceOp.MAX)
        failed, largest, smallest, self._calls = word.tolist()
        if failed:
            reports = self._gathered(report)
            if report is None:
                rank, theirs = next((rank, theirs) for rank, theirs in reports if theirs is not None)
                raise RuntimeError(f"rank {rank} failed in this step of gradient surgery: {theirs}")
        elif largest != -smallest:
            (first, here), *others = self._gathered(description)
            rank, there = next((rank, there) for rank, there in others if there != here)
            a, b = next((a, b) for a, b in zip_longest(here, there) if a != b)
            raise ValueError(
                "GradientSurgery must be made and used alike on all ranks, but "
                f"rank {first} has {_entry(a)}, and rank {rank} has {_entry(b)}"
            )

    def _sums(self, numbers: Sequence[int]) -> list[int]:
        """Return each number's sum over all ranks."""
        sums = torch.tensor(numbers, device=self._control_device)
        self._all_reduce(sums, dist.ReduceOp.SUM)
        return sums.tolist()

    def _all_reduce(self, tensor: Tensor, op: Any) -> None:
        for group in self._groups:
            dist.all_reduce(tensor, op, group)

    def _gathered(self, thing: object) -> list[tuple[int, Any]]:
        """Return the things of all ranks, each with its rank."""
        things: list[Any] = [(dist.get_rank(), thing)]
        # Backends without a CPU side send objects through the current GPU.
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            for group in self._groups:
                parts: list[Any] = [None] * group.size()
                dist.all_gather_object(parts, things, group)
                things = [item for part in parts for item in part]
        return sorted(things, key=lambda item: item[0])

    def check_copyable(self) -> None:
        raise TypeError(
            f"a GradientSurgery made with {self._made_with} cannot be copied or pickled, because a process group "
            "belongs to its process; save its state_dict(), and load that into one made anew with the same arguments"
        )

    def agreed(self, weights: Tensor) -> Tensor:
        weights = weights.clone()
        with self._meeting():
            for group in self._groups:
                dist.broadcast(weights, group=group, group_src=0)
        return weights


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {shortened(error)}"
    except Exception:  # an error class of the caller's
        return type(error).__name__


def _entry(entry: tuple[str, str] | None) -> str:
    return "no further parameter" if entry is None else " = ".join(entry)


class Replicas(_ManyProcesses):
    """Ranks that each hold a copy of the parameters, and communicate once a step, after the last micro-batch."""

    _made_with = "process_group"

    def __init__(
        self, group: dist.ProcessGroup, parameters: Mapping[str, Tensor], settings: list[tuple[str, str]]
    ) -> None:
        if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise TypeError(
                "process_group must be a torch.distributed.ProcessGroup that this process belongs to, such as "
                f"torch.distributed.group.WORLD, got {type(group).__name__}"
            )
        super().__init__([group], parameters, settings)
        self._group = group

    def engine(self, name: str) -> EngineChoice:
        if name == "low_memory":
            raise ValueError(
                "engine 'low_memory' does not work with process_group, because it never holds the K gradients that "
                "the ranks must average; use 'auto', 'per_cluster' or 'one_pass', or shard the parameters (fully_shard)"
            )
        return EngineChoice(name)

    def buffer(self, parameters: Mapping[str, Tensor], clusters: int) -> GradientBuffer:
        self._describe(parameters)
        return GradientBuffer(parameters, clusters, slices=self._group.size())

    def together(
        self, parameters: Mapping[str, Tensor], buffer: GradientBuffer, received: set[str]
    ) -> tuple[ClusterGradients, set[str]]:
        averages = _Averages(buffer, self._group, self._meeting)
        with self._meeting():
            sums = self._sums([*buffer.totals, *(name in received for name in parameters)])
            totals, reached = sums[: len(buffer.totals)], sums[len(buffer.totals) :]
            # Sum the rows first and divide at the end: ranks with equal counts save a pass over memory.
            buffer.average([total / self._group.size() for total in totals])
            averages.reduce()
        return averages, {n for n, number in zip(parameters, reached, strict=True) if number}


class _Averages:
    """The averages over the ranks of the K gradients in their buffers; this rank holds one slice of columns.

    Args:
        meeting: entered before each communication.
    """

    def __init__(
        self, buffer: GradientBuffer, group: dist.ProcessGroup, meeting: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._buffer, self._group, self._meeting = buffer, group, meeting
        self._slices = {
            key: tensor.new_empty(len(tensor), tensor.shape[1] // group.size())
            for key, tensor in buffer.tensors.items()
        }

    def reduce(self) -> None:
        """Reduce all ranks' buffers into this rank's slices."""
        for key, slices in self._slices.items():
            for gradient, own in zip(self._buffer.tensors[key], slices, strict=True):
                _reduce_scatter(own, gradient, self._group)

    def gram(self) -> Tensor:
        gram = torch.stack([ops.gram(slices) for slices in self._slices.values()]).sum(0)
        with self._meeting():
            dist.all_reduce(gram, group=self._group)
        return gram / self._group.size() ** 2

    def weighted_sum(self, weights: Tensor) -> list[Tensor]:
        weights = weights / self._group.size()
        own = {key: ops.weighted_sum(slices, weights) for key, slices in self._slices.items()}
        update = {key: part.new_empty(len(part) * self._group.size()) for key, part in own.items()}
        with self._meeting():
            for key, part in own.items():
                _all_gather(update[key], part, self._group)
        return self._buffer.split(update)


def _reduce_scatter(out: Tensor, tensor: Tensor, group: dist.ProcessGroup) -> None:
    # The new name since torch 2.13, where the old one warns.
    run = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    run(out, tensor, group=group)


def _all_gather(out: Tensor, tensor: Tensor, group: dist.ProcessGroup) -> None:
    run = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    run(out, tensor, group=group)


class Shards(_ManyProcesses):
    """Ranks with a shard of each parameter (FSDP2's ``fully_shard``, HSDP, tensor parallelism: DTensors).

    The gradient of a DTensor belongs to the whole mesh, averaged over its data-parallel ranks with equal weights. So a
    rank's losses are weighted before the backward pass, and the ranks communicate in every micro-batch. All ranks of a
    mesh must run the same passes; a rank without samples of a cluster runs a spare loss of weight 0.
    """

    _made_with = "params that are DTensors"

    def __init__(self, parameters: Mapping[str, Tensor], settings: list[tuple[str, str]]) -> None:
        shards = _dtensors(parameters)
        mesh = max((p.device_mesh for p in shards.values()), key=lambda mesh: mesh.size())
        members = set(mesh.mesh.flatten().tolist())
        for name, p in shards.items():
            if not members.issuperset(p.device_mesh.mesh.flatten().tolist()):
                raise ValueError(
                    f"the device mesh of {name}, {p.device_mesh}, must be part of the largest one, {mesh}; use one "
                    "GradientSurgery for the parameters of each mesh"
                )
        super().__init__(mesh.get_all_groups(), parameters, settings)
        self._size = mesh.size()

    def engine(self, name: str) -> EngineChoice:
        if name in ("one_pass", "low_memory"):
            raise ValueError(
                f"engine {name!r} does not work with sharded parameters (DTensors), whose gradients are communicated "
                "inside of the backward pass; use 'auto' or 'per_cluster'"
            )
        choice = EngineChoice("per_cluster" if name == "auto" else name)
        if name == "auto":
            choice.reason = "the only engine for sharded parameters (DTensors)"
        return choice

    def buffer(self, parameters: Mapping[str, Tensor], clusters: int) -> GradientBuffer:
        shards = _dtensors(parameters)
        self._describe(shards)
        return _ShardBuffer(shards, clusters, self._meeting)

    def weighted(
        self, losses: Sequence[Loss], counts: Sequence[int], spare: Loss = None
    ) -> tuple[Sequence[Loss], Sequence[int]]:
        to_run = [spare if loss is None else loss for loss in losses]
        with self._meeting():
            sums = self._sums([*counts, *(loss is not None for loss in to_run)])
        self._others = "go on"  # FSDP communicates until the passes are over
        totals, runners = sums[: len(counts)], sums[len(counts) :]
        for k, number in enumerate(runners):
            if 0 < number < self._size:
                raise ValueError(
                    f"losses[{k}] is None on {self._size - number} of {self._size} ranks, but with sharded parameters "
                    "all ranks must run the same passes; pass a function that takes the loss of any sample, and "
                    f"counts with counts[{k}] = 0, or use backward_batch"
                )
        return [
            # A cluster without samples on any rank needs no spare pass.
            None if loss is None or (given is None and not total) else _weighted(loss, self._size * n / max(total, 1))
            for loss, given, n, total in zip(to_run, losses, counts, totals, strict=True)
        ], totals

    def together(
        self, parameters: Mapping[str, Tensor], buffer: GradientBuffer, received: set[str]
    ) -> tuple[ClusterGradients, set[str]]:
        self._others = "meet"
        return super().together(parameters, buffer, received)


def _weighted(loss: Any, weight: float) -> Any:
    """Return a loss of equal value with ``weight`` times the gradient; a function becomes one that returns such a loss.

    Weight 0 stands for no samples: the value is then NaN, and the gradient is zero in any case.
    """
    if not isinstance(loss, Tensor):
        return (lambda: _weighted(loss(), weight)) if callable(loss) else loss
    if not loss.requires_grad:
        return loss
    if weight == 0:
        return torch.where(torch.zeros_like(loss, dtype=torch.bool), loss, torch.nan)
    loss = loss.view_as(loss)  # the caller's own tensor keeps its gradient
    loss.register_hook(lambda gradient: gradient * weight)
    return loss


class _ShardBuffer(GradientBuffer):
    """This rank's shards of the K gradients of some DTensors.

    Args:
        meeting: entered before each communication, and before the update is used.
    """

    def __init__(
        self, parameters: Mapping[str, DTensor], clusters: int, meeting: Callable[[], AbstractContextManager[None]]
    ) -> None:
        # Gram matrices of shards are added up over the groups of ranks that the shards are spread over.
        super().__init__(_local(parameters), clusters, apart={name: _spread(p) for name, p in parameters.items()})
        self._parameters, self._meeting = list(parameters.values()), meeting
        self._sharded = [self._as_dtensors(super(_ShardBuffer, self).gradient(k)) for k in range(clusters)]

    def fits(self, parameters: Mapping[str, Tensor]) -> bool:
        return all(_is_dtensor(p) for p in parameters.values()) and super().fits(_local(parameters))

    def gradient(self, k: int) -> list[Tensor]:
        return self._sharded[k]

    def gram(self) -> Tensor:
        sums: dict[Any, Tensor] = {}
        for (_, groups), tensor in self.tensors.items():
            gram = ops.gram(tensor)
            sums[groups] = sums[groups] + gram if groups in sums else gram
        with self._meeting():
            for groups, gram in sums.items():
                for group in groups:
                    dist.all_reduce(gram, group=group)
        return torch.stack(list(sums.values())).sum(0)

    def weighted_sum(self, weights: Tensor) -> list[Tensor]:
        update = self._as_dtensors(super().weighted_sum(weights))
        with self._meeting():
            return update

    def _as_dtensors(self, shards: list[Tensor]) -> list[Tensor]:
        from torch.distributed.tensor import DTensor

        return [
            DTensor.from_local(shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
            for shard, p in zip(shards, self._parameters, strict=True)
        ]


def _is_dtensor(p: Tensor) -> bool:
    return hasattr(p, "device_mesh")  # avoids importing torch.distributed.tensor, which is slow


def _dtensors(parameters: Mapping[str, Tensor]) -> dict[str, DTensor]:
    """Return the parameters, checked to be DTensors whose gradients are sums over shards."""
    found: dict[str, Any] = {}
    for name, p in parameters.items():
        if not _is_dtensor(p):
            raise ValueError(
                f"params must be all DTensors or none, but {name} is an ordinary tensor; distribute it too "
                "(Replicate() where each rank holds all of it), or leave it out"
            )
        found[name] = p
        for placement in found[name].placements:
            if not (placement.is_replicate() or type(placement).__name__ in ("Shard", "_StridedShard")):
                raise ValueError(
                    f"params must be sharded or replicated, but {name} has the placement {placement}; redistribute it"
                )
    return found


def _spread(p: DTensor) -> tuple[dist.ProcessGroup, ...]:
    """Return the process groups over which p's shards are spread; p is replicated over the mesh's other groups."""
    groups = zip(p.device_mesh.get_all_groups(), p.placements, strict=True)
    return tuple(group for group, placement in groups if not placement.is_replicate())


@torch.no_grad()
def _local(parameters: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return this rank's shard of each DTensor."""
    return {name: p.to_local() for name, p in parameters.items()}
