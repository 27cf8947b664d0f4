"""Shared by the ops of gradient surgery: K gradients as the kernels read them, and the choice of a path.

The registered ops take a flat list of tensors, segment by segment: the K gradients of each parameter side by side.
One [K, P] buffer is one segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dtr_kernels.compilation import has_code_for
from dtr_kernels.ops import extension
from dtr_kernels.ops.declaration import Draw, Gradients
from dtr_kernels.ops.dispatch import Choice, made

MOST_CLUSTERS = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Elements per gradient that the plain path widens at a time, so that its scratch memory does not grow with the model.
_PLAIN_CHUNK = 1 << 18


class FlatGradients(NamedTuple):
    """Gradients as the flat list that the registered ops take."""

    tensors: list[Tensor]
    clusters: int

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


class Gathered(NamedTuple):
    """K lists of tensors that the extension has examined, in a small part of the time that Python needs."""

    rows: Sequence[Sequence[Tensor]]
    described: extension.kernels.Gradients

    @property
    def clusters(self) -> int:
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        return self.rows[0][0].device


def checked(grads: Tensor | Sequence[Sequence[Tensor]]) -> Gathered | FlatGradients:
    """Check a [K, P] tensor, or K lists of equally shaped tensors, and return it as the ops take it.

    Raises:
        TypeError, ValueError: as ``flattened``.
    """
    return _gathered(grads) or flattened(grads)


def _gathered(grads: Tensor | Sequence[Sequence[Tensor]]) -> Gathered | None:
    """Let the extension examine the gradients. Return None if it refuses them, or if PyTorch must trace or compute."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or extension.kernels is None:
        return None
    if not isinstance(grads, list | tuple):
        return None
    described = extension.kernels.Gradients.of(grads, Tensor, nn.Parameter)
    if described is None or choose_surgery(grads[0][0].device, grads[0][0].dtype).path == "plain":
        return None
    if torch.is_grad_enabled() and any(torch._C._any_requires_grad(*row) for row in grads):
        return None
    return Gathered(grads, described)


def flattened(grads: Tensor | Sequence[Sequence[Tensor]]) -> FlatGradients:
    """Check a [K, P] tensor, or K lists of equally shaped tensors; return the ops' flat list, and K.

    Raises:
        TypeError: if grads is neither of these, or holds anything but floating-point tensors.
        ValueError: if there are no or more than 64 gradients, they have no tensors, differ in shape, dtype, device or
            memory layout, are not dense in memory, or require grad.
    """
    if isinstance(grads, Tensor):
        if grads.dim() != 2:
            raise ValueError(f"grads must be [K, P] or K lists of tensors, got a tensor of shape {list(grads.shape)}")
        rows: list[list[Tensor]] = [[row] for row in grads.unbind(0)]
    elif isinstance(grads, Sequence) and all(isinstance(row, Sequence) for row in grads):
        rows = [list(row) for row in grads]
    else:
        given = type(grads).__name__
        if isinstance(grads, Sequence):
            given += f" that holds a {next(type(row).__name__ for row in grads if not isinstance(row, Sequence))}"
        raise TypeError(f"grads must be a [K, P] tensor or a list of K lists of tensors, got a {given}")
    if not 1 <= len(rows) <= MOST_CLUSTERS:
        raise ValueError(f"grads must hold the gradients of 1 to {MOST_CLUSTERS} clusters, got {len(rows)}")
    for k, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(f"grads[{k}] has {len(row)} tensors, but grads[0] has {len(rows[0])}")
    if not rows[0]:
        raise ValueError("grads has no tensors: pass the gradients of at least one parameter")
    for k, row in enumerate(rows):
        for i, tensor in enumerate(row):
            _check(f"grads[{k}]" + ("" if isinstance(grads, Tensor) else f"[{i}]"), tensor, rows[0][i], rows[0][0])
    return FlatGradients([tensor for segment in zip(*rows, strict=True) for tensor in segment], len(rows))


def _check(name: str, tensor: Tensor, like: Tensor, first: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}; call .to_dense() on it")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64, got {tensor.dtype}")
    if tensor.dtype != first.dtype or tensor.device != first.device:
        raise ValueError(
            f"all gradients must have one dtype and device; {name} is {tensor.dtype} on {tensor.device}, the first "
            f"{first.dtype} on {first.device}"
        )
    if tensor.shape != like.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, but the first gradient has {list(like.shape)} there")
    alike = tensor.stride() == like.stride() or (tensor.is_contiguous() and like.is_contiguous())
    if not (alike and _is_dense(tensor)):
        raise ValueError(
            f"{name} has strides {tensor.stride()}: gradients must be dense in memory and laid out alike; call "
            ".contiguous() on them"
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, and gradient surgery cannot be differentiated; detach it")


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill a stretch of memory without gaps or overlaps, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def refuse_shared_memory(grads: list[Tensor], clusters: int) -> None:
    """Refuse overlapping tensors before an op writes to the gradients: it would change the overlap twice.

    Raises:
        ValueError: if two tensors share memory.
    """
    stretches = sorted((t.data_ptr(), t.numel() * t.element_size(), i) for i, t in enumerate(grads) if t.numel())
    for (address, size, first), (following, _, second) in pairwise(stretches):
        if address + size > following:
            (s, k), (z, l) = divmod(first, clusters), divmod(second, clusters)
            raise ValueError(
                f"grads must not share memory where they are changed in place, but tensor {s} of grads[{k}] and tensor "
                f"{z} of grads[{l}] do; clone one of them"
            )


def flat(tensor: Tensor) -> Tensor:
    """Return a view of a dense tensor's elements in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def choose_surgery(device: torch.device, dtype: torch.dtype) -> Choice:
    """Choose the kernels for gradients of this device and dtype: "cuda" or "cpu" (the compiled extension), or "plain"
    (PyTorch ops)."""
    why = _unavailable(device, dtype)
    kernels = "CUDA kernels" if device.type == "cuda" else "compiled CPU kernels"
    return made(Choice("plain", why) if why else Choice(device.type, kernels))


def _unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "the compiled kernels of gradient surgery do not take fp64"
    if device.type == "cpu":
        return extension.unavailable
    return _cuda_unavailable(device) if device.type == "cuda" else f"there are no compiled kernels for {device.type}"


@cache
def _cuda_unavailable(device: torch.device) -> str | None:
    if extension.kernels is None:
        return extension.unavailable
    if not hasattr(extension.kernels, "cuda"):
        return f"the extension was built without CUDA kernels: {extension.kernels.build_config()['no_cuda_reason']}"
    architectures = extension.kernels.build_config()["architectures"]
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8 and not has_code_for(major, minor, architectures):
        return (
            f"the extension was built for {' '.join(architectures)}, and {torch.cuda.get_device_name(device)} has "
            f"compute capability {major}.{minor}; run python -m dtr_kernels build, which builds one for it with your "
            f"nvcc, or install this package again with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )
    with torch.cuda.device(device):
        return extension.kernels.cuda.unsupported()


def described(grads: list[Tensor], clusters: int) -> extension.kernels.Gradients:
    """Return the gradients' pointers and sizes for the extension; the caller keeps the tensors alive."""
    return extension.kernels.Gradients.at(
        extension.dtype_code(grads[0].dtype),
        clusters,
        [tensor.data_ptr() for tensor in grads],
        [tensor.numel() for tensor in grads[::clusters]],
    )


def current_stream(x: Tensor) -> int:
    """Return the CUDA stream that PyTorch queues work on for x's device, as an address."""
    return torch.cuda.current_stream(x.device).cuda_stream


def plain_chunks(grads: list[Tensor], clusters: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield stretches of the K gradients as flat views, with their segment's number, for the plain path."""
    for s in range(0, len(grads), clusters):
        rows = [flat(tensor) for tensor in grads[s : s + clusters]]
        for stretch in zip(*(row.split(_PLAIN_CHUNK) for row in rows), strict=True):
            yield s // clusters, list(stretch)


# --- for declarations ------------------------------------------------------------------------------------------------

#: Numbers of clusters with and without their own CUDA kernel, up to the most.
CLUSTERS = tuple(Gradients(K, 3504) for K in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 32, 33, MOST_CLUSTERS))


def drawn(draw: Draw, lists: bool) -> Tensor | list[list[Tensor]]:
    """Draw K random gradients of norm about 1, as one buffer or as lists of separate tensors.

    They lie near three directions, so that many conflict.
    """
    K, P = draw.sizes
    near = draw(K, 3).float() @ draw(3, P).float() + 0.3 * draw(K, P).float()
    rows = (near / (3 * P) ** 0.5).to(draw.precision.operand)
    sizes = [P - P // 3 - 1, 1, 0, P // 3]
    return [[part.clone() for part in row.split(sizes)] for row in rows] if lists else rows


def joined(gradients: Any) -> Tensor:
    """Join lists of gradients into one tensor: [K, P], or [P] for one gradient; a tensor is returned unchanged."""
    if isinstance(gradients, Tensor):
        return gradients
    return torch.cat(gradients) if isinstance(gradients[0], Tensor) else torch.stack([joined(row) for row in gradients])
