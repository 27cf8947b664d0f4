"""A batch whose samples are sorted by cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Batch:
    """Tensors [B, ...] with the samples of cluster 0 first; sizes[k] samples belong to cluster k."""

    tensors: tuple[Tensor, ...]
    sizes: tuple[int, ...]

    @classmethod
    def gathered(cls, clusters: Tensor, tensors: tuple[Tensor, ...], num_clusters: int) -> Batch:
        """Check the tensors of a batch, and sort their samples by cluster, keeping the order within a cluster."""
        if not isinstance(clusters, Tensor) or clusters.dtype not in _INTEGERS:
            given = getattr(clusters, "dtype", type(clusters).__name__)
            raise TypeError(f"clusters must be an integer tensor, the cluster of each sample, got {given}")
        if clusters.dim() != 1 or len(clusters) == 0:
            raise ValueError(f"clusters must have shape [B] with at least one sample, got {list(clusters.shape)}")
        if not tensors:
            raise ValueError("tensors must hold what loss takes, at least one tensor of samples, got none")
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"tensors[{i}] must be a tensor of {len(clusters)} samples, got {type(tensor).__name__}; what all "
                    "samples share belongs into the loss function"
                )
            if tensor.dim() == 0 or len(tensor) != len(clusters):
                raise ValueError(
                    f"every tensor of the batch must have {len(clusters)} samples, one for each entry of clusters; "
                    f"tensors[{i}] has shape {list(tensor.shape)}"
                )
            if tensor.requires_grad:
                raise ValueError(f"tensors[{i}] requires grad, but only parameters get one; pass it detached")
        on_host = clusters.cpu()  # sizes must be numbers: from a GPU this is the only copy the host waits for
        for b, cluster in enumerate(on_host.tolist()):
            if not 0 <= cluster < num_clusters:
                raise ValueError(
                    f"clusters must be from 0 to num_clusters - 1 = {num_clusters - 1}, got {cluster} for sample {b}"
                )
        sizes = torch.bincount(on_host, minlength=num_clusters).tolist()
        order = on_host.argsort(stable=True)
        if not torch.equal(order, torch.arange(len(order))):
            orders = {device: _without_waiting(order, device) for device in {tensor.device for tensor in tensors}}
            tensors = tuple(tensor[orders[tensor.device]] for tensor in tensors)
        return cls(tensors, tuple(sizes))

    def losses(self, loss: Callable[..., Tensor]) -> list[Callable[[], Tensor] | None]:
        """Return for each cluster a function of its mean loss; None for a cluster without samples."""
        parts = zip(*(tensor.split(list(self.sizes)) for tensor in self.tensors), strict=True)
        return [
            partial(_mean_loss, loss, part, size) if size else None
            for part, size in zip(parts, self.sizes, strict=True)
        ]

    def any_loss(self, loss: Callable[..., Tensor]) -> Callable[[], Tensor]:
        """Return a function that computes the loss of one sample, of any cluster."""
        return partial(_mean_loss, loss, tuple(tensor[:1] for tensor in self.tensors), 1)


def _without_waiting(order: Tensor, device: torch.device) -> Tensor:
    return order.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else order.to(device)


def _mean_loss(loss: Callable[..., Tensor], tensors: tuple[Tensor, ...], samples: int) -> Tensor:
    losses = check_per_sample(loss(*tensors), samples)
    return losses.mean(dtype=torch.promote_types(losses.dtype, torch.float32))


def check_by_cluster(losses: object, clusters: int) -> None:
    """Refuse anything but a sequence of losses, one for each cluster."""
    if not isinstance(losses, Sequence | Tensor) or (isinstance(losses, Tensor) and losses.dim() == 0):
        given = "one scalar" if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"losses must be a sequence of {clusters} losses, one for each cluster, got {given}")
    if len(losses) != clusters:
        raise ValueError(f"losses must have {clusters} entries, one for each cluster, got {len(losses)}")


def check_per_sample(losses: Tensor, samples: int) -> Tensor:
    """Return losses itself if it has one loss for each sample; raise otherwise."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"loss must return a tensor of one loss for each sample, got {type(losses).__name__}")
    if tuple(losses.shape) != (samples,):
        raise ValueError(
            f"loss must return one loss for each of the {samples} samples that it was called with (of one cluster, or "
            f"of all), shape [{samples}], got {list(losses.shape)}; take the mean over all dimensions but the first"
        )
    return losses
