"""Gradient surgery in a training loop: from the losses of K timestep clusters to one update in ``p.grad``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dtr_kernels.ops.gradient_lists import MOST_CLUSTERS
from dtr_kernels.quoting import quoted, shortened
from dtr_kernels.routing import is_integer
from dtr_kernels.surgery import distributed, interrupts, low_memory, one_pass, per_cluster, weightings, wrappers
from dtr_kernels.surgery.batch import Batch, check_by_cluster
from dtr_kernels.surgery.buffer import ClusterGradients, GradientBuffer
from dtr_kernels.surgery.leaves import Leaves
from dtr_kernels.surgery.parameters import device_of, named, trainable
from dtr_kernels.surgery.per_cluster import Loss
from dtr_kernels.surgery.separation import Separation
from dtr_kernels.surgery.weightings import GramWeighting

_Method = TypeVar("_Method", bound=Callable[..., Tensor])
_Result = TypeVar("_Result")


def _all_or_nothing(method: _Method) -> _Method:
    """Undo a step on every rank after an error on one of them; all ranks call the method."""

    @wraps(method)
    def attempt(self: GradientSurgery, *args: Any, **kwargs: Any) -> Tensor:
        with interrupts.HeldBack():
            if self._running:
                raise RuntimeError(
                    "a GradientSurgery makes one step at a time, but it is called inside of its own loss, weighting or "
                    "hook, or by two threads; use another one there"
                )
            self._running = True
            try:
                self._ranks.begin()
                with wrappers.refused():
                    result = method(self, *args, **kwargs)
                with interrupts.LetThrough():
                    return result  # a held-back Ctrl-C ends the step here, where the other ranks hear of it
            except BaseException as error:
                self._received = None
                self._leaves.drop()
                self._ranks.fail(error)
                raise
            finally:
                self._running = False

    return cast(_Method, attempt)


class GradientSurgery:
    """Replaces ``loss.backward()``: treats the losses of K timestep clusters as K tasks (ANT, section 4).

    The gradient of cluster k is the gradient of losses[k] / K, so weighting "sum" is an ordinary step on the mean loss.
    The other weightings follow from the Gram matrix of these gradients.

    Before you choose: in ANT's results ``UncertaintyWeighting``, which costs next to nothing, does as well as PCGrad.
    Table 1, SNR clusters, FID on FFHQ: ADM 24.95 without any method, 20.60 with PCGrad, 23.09 with Nash-MTL, 20.19 with
    uncertainty weighting; LDM 10.56, 9.72, 10.33 and 9.73.

    Args:
        params: parameters, or (name, parameter) pairs, whose names are used in errors; on one device, fp32, bf16, fp16
            or fp64, also mixed. Duplicates are ignored. Parameters may be frozen and unfrozen, moved and cast between
            steps. The model's other parameters get the gradient of this process's mean loss, as usual. In an
            accumulated step they get the sum over all micro-batches, after the last one; you may want to divide it by
            their number.
        num_clusters: K, 1 to 64.
        weighting: "pcgrad"; "nash" (Nash-MTL, needs TorchJD: ``pip install 'torchjd[nash-mtl]'``); "sum"; or any
            object that maps a Gram matrix [K, K] to weights [K], such as TorchJD's Gramian weightings. A cluster
            without samples has a gradient of zero: PCGrad and "sum" leave it out, "nash" keeps its last weights, and
            some others, such as MGDA, make no update at all.
        engine: how ``backward_batch`` computes the K gradients. "per_cluster": one forward and backward pass for each
            cluster's samples, for any model. "one_pass": one pass for the whole batch, with weight gradients taken
            cluster by cluster, for models of known layers that treat each sample by itself (checked with the first
            batch of each shape). "low_memory": one_pass without ever holding K gradients, at the cost of a second
            backward pass. "auto": per_cluster or one_pass, whichever is faster in the first steps; name one if two runs
            must agree to the last bit.
        generator: draws PCGrad's orders; default: PyTorch's own.
        process_group: ranks that each have a replica of the parameters and a part of the batch. See "Many processes".

    Memory: K gradients from the first step on, and the update. Hooks on parameters see each cluster's gradient; the
    one-pass engines refuse hooks.

    Many processes: all ranks get the update that one process with all their batches would compute, and must make the
    same calls; their batches may differ in size, and lack clusters that others have.

    - Replicated parameters: pass ``process_group``, and let the loss call the model itself. A DistributedDataParallel
      wrapper would communicate each of the K gradients on its own, and is refused (use its ``module``). The ranks
      communicate once a step.
    - Sharded parameters (DTensors: FSDP2's ``fully_shard``, tensor parallelism) know their ranks. Pass the parameters
      that the model has after sharding. Leave FSDP's gradient divide factor and gradient synchronisation unchanged.
      FullyShardedDataParallel (FSDP1) is refused.

    A difference between ranks, a different number of calls of ``backward`` and ``backward_batch``, and an error or
    Ctrl-C on one rank become errors on all ranks, and the next step works again. If one rank is interrupted after the
    others have completed the step, they get the error in their next call. (With sharded parameters an error within the
    passes leaves the other ranks in FSDP's collectives, until the process group's timeout.) For this the ranks exchange
    a few numbers before each communication, four times a step. The host waits for the GPU then if the process group has
    no CPU backend, as after ``init_process_group("nccl")``; without the argument, or with "cpu:gloo,cuda:nccl", it has
    a CPU backend.

    Raises:
        TypeError, ValueError: if an argument is not as described.
        ImportError: if weighting is "nash" and TorchJD is not installed.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        num_clusters: int,
        weighting: str | GramWeighting = "pcgrad",
        *,
        engine: str = "auto",
        generator: torch.Generator | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not is_integer(num_clusters) or not 1 <= num_clusters <= MOST_CLUSTERS:
            raise ValueError(f"num_clusters must be an integer from 1 to {MOST_CLUSTERS}, got {quoted(num_clusters)}")
        self._parameters = named(params)
        parameters = trainable(self._parameters)  # refuses parameters that no step could use
        self.num_clusters = num_clusters = int(num_clusters)
        self._weighting = weightings.make(weighting, num_clusters, generator)
        self._weighting_name = weighting if isinstance(weighting, str) else type(weighting).__name__
        self._ranks = distributed.ranks(parameters, process_group, num_clusters, self._weighting_name, engine)
        self.engine = self._ranks.engine(engine)
        self._separation = Separation()
        self._buffer: GradientBuffer | None = None
        # Names of the parameters with a gradient in the micro-batches of this step; None between steps.
        self._received: set[str] | None = None
        self._leaves = Leaves()
        self._running = False
        # The last step's, on the device, for watching how much the clusters conflict.
        self.last_gram: Tensor | None = None
        self.last_weights: Tensor | None = None

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self._parameters.values())
        settings = f"weighting={self._weighting_name!r}, engine={self.engine.name!r}"
        return f"GradientSurgery({count:,} parameters, num_clusters={self.num_clusters}, {settings})"

    @_all_or_nothing
    def backward(
        self,
        losses: Sequence[Loss] | Tensor,
        *,
        counts: Sequence[int] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        last: bool = True,
    ) -> Tensor:
        """Compute the K gradients and add the update to ``p.grad``, like ``loss.backward()``.

        Args:
            losses: K mean losses, one for each cluster; None for a cluster without samples. Better are K functions that
                return a loss: they are called in turn, so that one graph is in memory at a time, and none is traversed
                K times. (Losses of one graph keep it until the last of them, which compiled models may refuse.)
            counts: the number of samples of each loss; a loss of 0 samples counts as None. Default: 1 each, so that
                micro-batches and ranks with a cluster have equal weights. With sharded parameters, a rank without
                samples of a cluster that other ranks have passes the loss of any sample, with a count of 0, instead of
                None.
            scaler: scales the losses; step and update it as usual. inf and NaN reach ``p.grad``, and it skips the step.
            last: False for all micro-batches of an accumulated step but the last: their gradients are averaged by
                samples, cluster by cluster, and every ``grad`` stays unchanged. The update equals that of one batch
                with all their samples, so do not divide the losses.

        Returns:
            The losses [K] of this process, detached and unscaled; NaN for clusters without samples.

        Raises:
            TypeError, ValueError: if losses is not as described, or reaches none of the parameters.
            RuntimeError: if a parameter has changed between the micro-batches of one step, or its ``grad`` is replaced
                while a cluster's gradient is computed; if the losses come from a DistributedDataParallel wrapper; or if
                another rank failed.

        After an error, also one in a function of the caller, the ``grad`` of every parameter that the losses reach is
        as before the step, and the micro-batches accumulated so far are dropped. (Exceptions are parameters outside
        params that autograd does not show, inside of checkpointing with ``use_reentrant=True`` or of FSDP: they keep
        their new gradients.) Ctrl-C within the passes or the weighting is such an error; elsewhere it waits for the end
        of the call.
        """
        check_by_cluster(losses, self.num_clusters)
        each, samples = self._ranks.weighted(list(losses), _checked_counts(counts, losses))
        return self._step(lambda step: self._by_cluster(step, each, scaler), samples, scaler, last)

    @_all_or_nothing
    def backward_batch(
        self,
        loss: Callable[..., Tensor],
        clusters: Tensor,
        *tensors: Tensor,
        scaler: torch.amp.GradScaler | None = None,
        last: bool = True,
    ) -> Tensor:
        """Run ``backward`` for a batch with samples of all clusters, by the engine that this object was made with.

        Args:
            loss: called with tensors like ``tensors``, of the whole batch or of one cluster's samples; returns the loss
                of each sample.
            clusters: int [B], the cluster of each sample, in any order. The host waits for it if it is on a GPU.
            tensors: each [B, ...], the arguments of ``loss``: noisy images, timesteps, labels, noise.
            scaler, last: as in ``backward``.

        Returns:
            The mean loss of each cluster [K] in this process, detached and unscaled; NaN for clusters without samples.

        Raises:
            TypeError, ValueError, RuntimeError: as ``backward``.
            one_pass.Unsupported: if the model uses a parameter in a way that the named engine does not know.
        """
        if not callable(loss):
            raise TypeError(f"loss must be a function of the batch's tensors, got {type(loss).__name__}")
        batch = Batch.gathered(clusters, tensors, self.num_clusters)
        if self.engine.name == "low_memory":
            if not last or self._received is not None:
                raise ValueError(
                    "last=False adds up the K gradients of several micro-batches, but engine 'low_memory' never holds "
                    "them; use engine='one_pass' or 'per_cluster' for accumulated steps, or one larger batch"
                )
            parameters = trainable(self._parameters)
            gradients, values, received = self._passes(
                parameters,
                lambda: low_memory.stream(
                    parameters, loss, batch, self._scaling(scaler), self._separation, self._leaves
                ),
            )
            _check_reached(received, values)
            result = _stacked(values, device_of(parameters))
            self._finish(parameters, gradients, received, scaler)
            return result

        losses, samples = self._ranks.weighted(batch.losses(loss), batch.sizes, spare=batch.any_loss(loss))

        def collect(step: _Step) -> tuple[list[Tensor | None], set[str]]:
            return self.engine.run(
                per_cluster=lambda: self._by_cluster(step, losses, scaler),
                one_pass=lambda: one_pass.accumulate(
                    step.buffer, step.parameters, loss, batch, self._scaling(scaler), self._separation, self._leaves
                ),
                start_over=step.start_over,
                device=device_of(step.parameters),
            )

        return self._step(collect, samples, scaler, last)

    def drop_micro_batches(self) -> None:
        """Drop the gradients accumulated with last=False, if an error of your own ends a step between two calls.

        The next call begins a new step. All ranks must call this, or none.
        """
        if self._received is not None:
            self._received = None
            self._leaves.drop()
            self._ranks.begin()  # a rank that has dropped gradients is in another step than the others

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes, for copy and pickle; raise TypeError if process groups are among them."""
        self._ranks.check_copyable()
        return vars(self)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers and strings for a checkpoint: the weighting's state, and the engine found fastest."""
        return {
            "num_clusters": self.num_clusters,
            "weighting": self._weighting_name,
            "weighting_state": self._weighting.state_dict() if hasattr(self._weighting, "state_dict") else {},
            "engine": self.engine.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a ``state_dict``.

        Raises:
            ValueError: if it was saved with another number of clusters or another weighting, or is not a
                ``state_dict``. This object is then unchanged.
        """
        before = copy.deepcopy(self.state_dict())
        try:
            self._load(state)
        except Exception as error:
            self._load(before)
            if isinstance(error, ValueError):
                raise
            reason = f"{type(error).__name__}: {shortened(error)}"
            raise ValueError(f"state must be what GradientSurgery.state_dict() has returned ({reason})") from error

    def _load(self, state: dict[str, Any]) -> None:
        for name, here in ("num_clusters", self.num_clusters), ("weighting", self._weighting_name):
            if state[name] != here:
                raise ValueError(f"state was saved with {name}={quoted(state[name])}, but this object has {here!r}")
        if hasattr(self._weighting, "load_state_dict"):
            self._weighting.load_state_dict(state["weighting_state"])
        self.engine.load_state_dict(state["engine"])

    def _step(
        self,
        collect: Callable[[_Step], tuple[list[Tensor | None], set[str]]],
        samples: Sequence[int],
        scaler: torch.amp.GradScaler | None,
        last: bool,
    ) -> Tensor:
        """Let an engine write to the buffer, and after the last micro-batch compute the update from it."""
        received, self._received = self._received, None  # an error from here on drops the step
        parameters = trainable(self._parameters)
        buffer = self._prepared_buffer(parameters, first=received is None)
        buffer.expect(samples)

        def start_over() -> None:
            buffer.zero_()
            buffer.expect(samples)
            self._leaves.start_over()

        step = _Step(parameters, buffer, start_over if received is None else None)
        values, reached = self._passes(parameters, lambda: collect(step))
        _check_reached(reached, values)
        received = reached if received is None else received | reached
        result = _stacked(values, device_of(parameters))  # nothing may fail after _finish
        if last:
            gradients, received = self._ranks.together(parameters, buffer, received)
            self._finish(parameters, gradients, received, scaler)
        else:
            self._received = received
        return result

    def _passes(self, parameters: Mapping[str, Tensor], run: Callable[[], _Result]) -> _Result:
        """Run an engine's passes, which may change ``grad``."""
        self._leaves.put_away(parameters.values())
        result = run()
        self._leaves.put_back()
        return result

    def _prepared_buffer(self, parameters: Mapping[str, Tensor], first: bool) -> GradientBuffer:
        """Return the buffer for a micro-batch, set to zero for a step's first."""
        if self._buffer is not None and self._buffer.fits(parameters):
            if first:
                self._buffer.zero_()
            return self._buffer
        if not first:
            raise RuntimeError(
                "params changed between the micro-batches of one step (in shape, dtype, device, memory layout or "
                "requires_grad); change them between steps"
            )
        self._buffer = None  # frees the old one before the new one is made
        self._buffer = self._ranks.buffer(parameters, self.num_clusters)
        return self._buffer

    def _by_cluster(
        self, step: _Step, losses: Sequence[Loss], scaler: torch.amp.GradScaler | None
    ) -> tuple[list[Tensor | None], set[str]]:
        return per_cluster.accumulate(step.buffer, step.parameters, losses, self._scaling(scaler), self._leaves)

    def _scaling(self, scaler: torch.amp.GradScaler | None) -> Callable[[Tensor], Tensor]:
        if scaler is None:
            return lambda loss: loss / self.num_clusters
        return lambda loss: scaler.scale(loss) / self.num_clusters

    def _finish(
        self,
        parameters: Mapping[str, Tensor],
        gradients: ClusterGradients,
        received: set[str],
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        """Compute the update from K gradients and add it to ``p.grad``."""
        gram = gradients.gram()
        if scaler is not None:
            # Weightings with an absolute scale, such as Nash-MTL's bound on the norm, must see unscaled gradients.
            gram = gram / scaler.scale(torch.ones((), device=gram.device)).double().square()
        with interrupts.LetThrough():
            weights = self._weighting(gram.clone())  # a weighting may write to it
        weights = self._ranks.agreed(weights)
        update = gradients.weighted_sum(weights)
        self._ranks.end()
        self.last_gram, self.last_weights = gram, weights
        pairs = zip(parameters.items(), update, strict=True)
        self._leaves.add((p, new) for (name, p), new in pairs if name in received)


class _Step(NamedTuple):
    """The inputs of an engine for one micro-batch."""

    parameters: Mapping[str, Tensor]
    buffer: GradientBuffer
    start_over: Callable[[], None] | None  # None from a step's second micro-batch on


def _checked_counts(counts: Sequence[int] | None, losses: Sequence[Loss] | Tensor) -> Sequence[int]:
    """Return the samples of each loss; one each if the caller gives no counts."""
    if counts is None:
        return [int(loss is not None) for loss in losses]
    if len(counts) != len(losses):
        raise ValueError(f"counts must have {len(losses)} entries, one for each cluster, got {len(counts)}")
    for k, (count, loss) in enumerate(zip(counts, losses, strict=True)):
        if not is_integer(count) or count < 0:
            raise ValueError(f"counts must be numbers of samples, integers from 0 on, got counts[{k}] = {count!r}")
        if count and loss is None:
            raise ValueError(f"counts[{k}] must be 0, because losses[{k}] is None, got {count}")
    return [int(count) for count in counts]


def _check_reached(received: set[str], values: Sequence[Tensor | None]) -> None:
    if not received and any(value is not None for value in values):
        raise ValueError(
            "losses reach none of the parameters in params; if the model's parameters were replaced (as by "
            "load_state_dict(assign=True) or to_empty()), make a new GradientSurgery"
        )


def _stacked(values: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Return the losses as one tensor, fp32, or fp64 if one of them is fp64."""
    wide = any(value is not None and value.dtype == torch.float64 for value in values)
    dtype = torch.float64 if wide else torch.float32
    nan = torch.full((), torch.nan, dtype=dtype, device=device)
    return torch.stack([nan if value is None else value.to(nan).reshape(()) for value in values])
