"""The affinity of denoising tasks: cosines of the gradients at different timesteps (ANT, observation O1)."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import operator
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dtr_kernels.analysis.bar import ticking
from dtr_kernels.analysis.progress import Checkpoint, Progress
from dtr_kernels.files import check_no_device, expecting, replacing
from dtr_kernels.quoting import quoted, shortened
from dtr_kernels.routing import check_count, is_integer
from dtr_kernels.surgery.parameters import device_of, named, trainable

# Memory that would take more passes per timestep than this is refused.
_MOST_PASSES = 1000
# Columns of gradients that are widened to fp64 at a time.
_COLUMNS = 2048
# The distance of a cosine from [-1, 1] that fp32 rounding can cause.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class TaskAffinity:
    """Agreement of the denoising tasks at n timesteps, made by ``task_affinity``. Tensors are on the CPU.

    Attributes:
        timesteps: int64 [n], ascending, at least 0.
        matrix: fp64 [n, n], the cosine of the gradients at timesteps[i] and timesteps[j]: 1 if they point the same way,
            0 if they are orthogonal, below 0 if they conflict. A gradient of zero has cosine 0 with every gradient,
            itself included.
        norms: fp64 [n], the gradients' norms; ``norms[i] * matrix[i, j] * norms[j]`` is their Gram matrix.
        losses: fp64 [n], the losses at the timesteps.

    Raises:
        ValueError: if an attribute is not as described, or holds NaN or inf.
    """

    timesteps: Tensor
    matrix: Tensor
    norms: Tensor
    losses: Tensor

    def __post_init__(self) -> None:
        _check_tensor("timesteps", self.timesteps, torch.int64, [n := _length(self.timesteps)])
        for name, shape in ("matrix", [n, n]), ("norms", [n]), ("losses", [n]):
            _check_tensor(name, getattr(self, name), torch.float64, shape)
        if n == 0 or self.timesteps[0] < 0 or not (self.timesteps.diff() > 0).all():
            raise ValueError("timesteps must hold at least one timestep, in ascending order from 0 on")
        if (self.norms < 0).any():
            raise ValueError(f"norms must not be negative, got {self.norms.min().item()}")
        if (most := self.matrix.abs().max().item()) > 1 + _ROUNDING:
            raise ValueError(f"matrix must hold cosines, from -1 to 1, got one of magnitude {most}")

    @classmethod
    def average(cls, affinities: Iterable[TaskAffinity]) -> TaskAffinity:
        """Return the mean over checkpoints of the cosines, as in the paper, and of the norms and losses.

        Args:
            affinities: of one model's checkpoints, at the same timesteps. Each has the same weight.

        Raises:
            ValueError: if there are none, or their timesteps differ.
        """
        affinities = list(affinities)
        if not affinities:
            raise ValueError("affinities must hold at least one TaskAffinity, got none")
        timesteps = affinities[0].timesteps
        for i, affinity in enumerate(affinities):
            if not torch.equal(affinity.timesteps, timesteps):
                raise ValueError(f"affinities[{i}] has other timesteps than affinities[0]; compute both at the same")
        names = "matrix", "norms", "losses"
        return cls(timesteps, *(torch.stack([getattr(a, name) for a in affinities]).mean(0) for name in names))

    def resized(self, num_timesteps: int) -> Tensor:
        """Return the affinity of every pair of timesteps, for ``interval_clusters(cost="affinity", values=...)``.

        Values are bilinear between the analysed timesteps, and constant before the first and after the last. So the
        diagonal is 1 at the analysed timesteps, and less between them.

        Args:
            num_timesteps: T, more than the last analysed timestep.

        Returns:
            fp64 [T, T].

        Raises:
            TypeError: if num_timesteps is not an integer.
            ValueError: if num_timesteps does not exceed the last analysed timestep, or is not below 2**63.
        """
        num_timesteps = check_count("num_timesteps", num_timesteps)
        if num_timesteps <= self.timesteps[-1]:
            raise ValueError(
                f"num_timesteps must be more than the last timestep that was analysed, {int(self.timesteps[-1])}, got "
                f"{num_timesteps}"
            )
        t, known = np.arange(num_timesteps), self.timesteps.numpy()
        weights = torch.from_numpy(np.stack([np.interp(t, known, hat) for hat in np.eye(len(known))], axis=1))
        return weights @ self.matrix @ weights.T

    def save(self, path: str | Path) -> None:
        """Write an npz file of the attributes. It replaces an older file when it is complete.

        Raises:
            OSError: if the file cannot be written. The old file stays as it was.
        """
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **{name: tensor.numpy() for name, tensor in vars(self).items()})

    @classmethod
    def load(cls, path: str | Path) -> TaskAffinity:
        """Read a file that ``save`` has written.

        Raises:
            OSError: if the file cannot be read.
            ValueError: naming the file, if it is damaged, as its checksums show, or holds anything else.
        """
        with expecting("a saved TaskAffinity", path, "compute it again with task_affinity, or name another file"):
            check_no_device(path)
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def _length(timesteps: object) -> int:
    return timesteps.numel() if isinstance(timesteps, Tensor) else 0


def _check_tensor(name: str, tensor: object, dtype: torch.dtype, shape: list[int]) -> None:
    wanted = f"{name} must be a tensor of {dtype} and shape {shape} on the CPU, detached, of finite numbers"
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{wanted}, got {quoted(tensor)}")
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.requires_grad
    if tensor.dtype != dtype or list(tensor.shape) != shape or not plain:
        raise ValueError(f"{wanted}, got {tensor.dtype}, {tensor.layout}, {list(tensor.shape)} on {tensor.device}")
    if not tensor.isfinite().all():
        raise ValueError(f"{wanted}, got NaN or inf")


def task_affinity(
    loss: Callable[[int], Tensor],
    params: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
    timesteps: Sequence[int],
    *,
    memory: int = 1 << 30,
    seed: int = 0,
    path: str | Path | None = None,
    progress: bool = True,
) -> TaskAffinity:
    """Return the cosines of the gradients of the losses at each pair of n timesteps (ANT, section 3, observation O1).

    All cosines come from one Gram matrix, summed over chunks of the P flattened parameters, so the n gradients are
    never in memory at once. Each chunk takes one forward and backward pass per timestep:

        passes = n * ceil(n * P * itemsize / memory)

    so half the memory, or twice the parameters, takes twice the passes, and twice the timesteps four times as many. Use
    all memory that the device has to spare, and few timesteps at first. DiT-S/2 (33M, fp32) at 100 timesteps takes 1300
    passes with the default of 1 GiB and 100 with 14 GB; at 1000 timesteps it takes 123,000 with 1 GiB.

    Args:
        loss: returns the loss at a timestep t, a scalar, from its own model and data: ``lambda t:
            denoising_loss(model, images, t)``. The more samples it averages over, the less noisy the cosines are. It
            must return the same each time it is called with the same t. So PyTorch's random numbers (of the CPU, and of
            the parameters' GPU) start from (seed, t) in each call and are restored after it; other randomness (Python's
            or NumPy's generators, a shuffled data loader) must stay outside. Gradient checkpointing needs
            ``use_reentrant=False``.
        params: parameters, or (name, parameter) pairs, as for ``GradientSurgery``; on one device, fp32, bf16, fp16 or
            fp64, also mixed. Parameters that do not require grad are left out. ``p.grad`` is neither read nor written.
        timesteps: n different integers of at least 0, such as ``range(0, 1000, 10)``, in any order.
        memory: most bytes of the buffer [n, chunk], on the parameters' device. Beside it are the gradients with respect
            to a chunk's parameters at one timestep, a few fp64 [n, n] and one [n, 2048].
        seed: of the random numbers that ``loss`` draws, at least 0 and below 2**63.
        path: the file for the progress (with ``<path>.rows``), saved at least every half minute and at any exception,
            also Ctrl-C. The same call then continues where the last one stopped, on a CPU to the same bits, and returns
            at once when all is done. ``memory`` may change in between, at the cost of the chunk in progress. The file
            does not record the loss: delete it if data or frozen parameters change. One call at a time uses it, and
            holds ``<path>.lock``.
        progress: show a bar, if tqdm is installed.

    Returns:
        ``TaskAffinity``. Products are computed and summed in fp64.

    Raises:
        TypeError: if an argument, or the result of loss, is of the wrong kind.
        ValueError: if an argument or a loss is not as described; if a loss or gradient is not finite; if path holds
            anything but the progress of this very analysis (timesteps, seed, parameters and their values), which is
            never overwritten; or if another analysis is using path.
        OSError: if path cannot be read or written. The file then stays as it was.
        RuntimeError: if loss gives another value when called again with the same t.
    """
    if not callable(loss):
        raise TypeError(f"loss must be a function of a timestep, got {type(loss).__name__}")
    seed = check_count("seed", seed, least=0)
    ascending = _checked_timesteps(timesteps)
    parameters = _flattened(trainable(named(params)))
    n = len(ascending)
    row_bytes = _row_bytes(memory, parameters, n)
    checkpoint = Checkpoint(path, _problem(parameters, ascending, seed) if path is not None else {})
    with checkpoint.locked():
        analysis = _Analysis(loss, parameters, ascending, seed, checkpoint)
        analysis.save()  # a path that cannot be written to is refused before the work
        chunks = _chunks(parameters, row_bytes, analysis.progress.start)
        passes = n * len(_chunks(parameters, row_bytes))
        done = passes - n * len(chunks) + analysis.progress.rows
        try:
            with ticking(passes, done, "pass", progress) as tick:
                for chunk in chunks:
                    analysis.add(chunk, tick)
        finally:
            analysis.save()
    return analysis.result()


def _checked_timesteps(timesteps: Iterable[int]) -> list[int]:
    """Return the timesteps, sorted."""
    try:
        ascending = sorted(operator.index(t) for t in timesteps)
    except TypeError as error:
        raise TypeError(f"timesteps must be integers, such as range(0, 1000, 10) ({shortened(error)})") from error
    if not ascending:
        raise ValueError("timesteps must hold at least one timestep, got none")
    if ascending[0] < 0:
        raise ValueError(f"timesteps must be at least 0, got {quoted(ascending[0])}")
    if ascending[-1] >= 2**63:
        raise ValueError(f"timesteps must be below 2**63, got {quoted(ascending[-1])}")
    twice = [t for t, count in Counter(ascending).items() if count > 1]
    if twice:
        raise ValueError(f"timesteps must be different, got {twice[0]} more than once")
    return ascending


def _flattened(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters in the order of the flattened vector: parameters of one dtype side by side."""
    for name, p in parameters.items():
        if hasattr(p, "device_mesh"):
            raise TypeError(f"params must be whole tensors, but {name} is a DTensor; analyse a copy on one device")
    return dict(sorted(parameters.items(), key=lambda item: str(item[1].dtype)))


def _row_bytes(memory: int, parameters: Mapping[str, Tensor], n: int) -> int:
    """Return the bytes of ``memory`` for each timestep."""
    if not is_integer(memory):
        raise TypeError(f"memory must be an integer, the bytes of the buffer, got {quoted(memory)}")
    sizes: Counter[torch.dtype] = Counter()
    for p in parameters.values():
        sizes[p.dtype] += p.numel()
    least = max(n * dtype.itemsize * math.ceil(size / _MOST_PASSES) for dtype, size in sizes.items())
    if memory < least:
        raise ValueError(
            f"memory must be at least {least} bytes for {n} timesteps and {sum(sizes.values())} parameters, got "
            f"{quoted(memory)}: each timestep would take more than {_MOST_PASSES} backward passes"
        )
    return memory // n


def _problem(parameters: Mapping[str, Tensor], timesteps: list[int], seed: int) -> dict[str, object]:
    """Return everything that two calls must share for one to continue with the other's progress."""
    weights = hashlib.sha256()
    for p in parameters.values():
        weights.update(p.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    shapes = [f"{name} ({str(p.dtype).removeprefix('torch.')} {list(p.shape)})" for name, p in parameters.items()]
    return {"timesteps": timesteps, "seed": seed, "parameters": shapes, "hash of the weights": weights.hexdigest()}


@dataclass(frozen=True)
class _Chunk:
    """A stretch of the flattened parameters, all of one dtype: names, and slices of each parameter's elements."""

    dtype: torch.dtype
    parts: list[tuple[str, slice]]

    @property
    def width(self) -> int:
        return sum(part.stop - part.start for _, part in self.parts)

    def name_at(self, element: int) -> str:
        """Return the name of the parameter to which the chunk's element of that number belongs."""
        ends = list(accumulate(part.stop - part.start for _, part in self.parts))
        return self.parts[bisect_right(ends, element)][0]


def _chunks(parameters: Mapping[str, Tensor], row_bytes: int, start: int = 0) -> list[_Chunk]:
    """Split the flattened parameters from element ``start`` on into chunks of at most ``row_bytes`` bytes."""
    chunks: list[_Chunk] = []
    room = 0
    for name, p in parameters.items():
        first = min(start, p.numel())
        start -= first
        while first < p.numel():
            if room == 0 or p.dtype != chunks[-1].dtype:
                chunks.append(_Chunk(p.dtype, []))
                room = row_bytes // p.itemsize
            stop = min(first + room, p.numel())
            chunks[-1].parts.append((name, slice(first, stop)))
            room -= stop - first
            first = stop
    return chunks


@dataclass
class _Analysis:
    """The growing Gram matrix of the gradients at all timesteps, chunk by chunk of the parameters."""

    _loss: Callable[[int], Tensor]
    _parameters: Mapping[str, Tensor]
    _timesteps: list[int]
    _seed: int
    _checkpoint: Checkpoint
    _buffer: Tensor | None = None

    def __post_init__(self) -> None:
        self._device = device_of(self._parameters)
        self.progress = self._checkpoint.load() or Progress.none(len(self._timesteps))

    def save(self) -> None:
        self._checkpoint.save(self.progress, self._buffer)

    def result(self) -> TaskAffinity:
        norms = self.progress.gram.diagonal().sqrt()
        inverse = torch.where(norms > 0, 1 / norms, 0)
        matrix = inverse[:, None] * self.progress.gram * inverse
        matrix = ((matrix + matrix.T) / 2).clamp(-1, 1)
        matrix.diagonal().copy_(norms > 0)
        return TaskAffinity(torch.tensor(self._timesteps), matrix, norms, self.progress.losses)

    def add(self, chunk: _Chunk, tick: Callable[[], object]) -> None:
        """Add the products of the gradients with respect to a chunk, which must begin where the last one ended."""
        n = len(self._timesteps)
        buffer = torch.empty(n, chunk.width, dtype=chunk.dtype, device=self._device)
        same = chunk.width == self.progress.width  # other chunks if ``memory`` has changed
        rows = self._checkpoint.load_rows(buffer, self.progress.rows) if same else 0
        self.progress = dataclasses.replace(self.progress, width=chunk.width, rows=rows)
        self._buffer = buffer
        for i in range(rows, n):
            self._differentiate(i, chunk, buffer[i])
            self.progress = dataclasses.replace(self.progress, rows=i + 1)
            self._checkpoint.save_if_due(self.progress, buffer)
            tick()
        gram = self.progress.gram + _gram(buffer)
        self.progress = Progress(self.progress.start + chunk.width, gram, self.progress.losses)
        self._buffer = None

    def _differentiate(self, i: int, chunk: _Chunk, row: Tensor) -> None:
        """Write the gradient at timesteps[i] with respect to a chunk to ``row``."""
        t = self._timesteps[i]
        with torch.enable_grad(), _seeded(self._seed, t, self._device):
            value = self._loss(t)
            self._check_loss(i, value)
            inputs = [self._parameters[name] for name, _ in chunk.parts]
            gradients = torch.autograd.grad(value, inputs, allow_unused=True)
        at = 0
        for gradient, (_, part) in zip(gradients, chunk.parts, strict=True):
            own = row[at : (at := at + part.stop - part.start)]
            if gradient is None:
                own.zero_()
            else:
                own.copy_(gradient.to_dense().reshape(-1)[part])
        if not row.isfinite().all():
            first = int(row.isfinite().logical_not().nonzero()[0])
            raise ValueError(f"the gradient of loss({t}) holds inf or NaN, first in {chunk.name_at(first)}")

    def _check_loss(self, i: int, value: Tensor) -> None:
        t = self._timesteps[i]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            given = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"loss must return a floating-point scalar tensor, got {given} from loss({t})")
        if value.numel() != 1:
            raise ValueError(f"loss must return a scalar, got shape {list(value.shape)} from loss({t}); take its mean")
        if not value.requires_grad:
            raise ValueError(
                f"loss({t}) does not require grad: it reaches none of params, or was computed without grad"
            )
        number = value.item()
        if not math.isfinite(number):
            raise ValueError(f"loss({t}) is {number}")
        before = self.progress.losses[i].item()
        # Sums in another order, as on a GPU, change a mean by a few of the last bits.
        tolerance = max(1e-4, 4 * torch.finfo(value.dtype).eps) * max(abs(number), abs(before))
        if abs(number - before) > tolerance:
            remedy = f", then delete {self._checkpoint.path}" if self._checkpoint.path else ""
            raise RuntimeError(
                f"loss({t}) was {before} and is now {number}. Each chunk of the parameters calls it anew, so it must "
                "be deterministic. PyTorch's random numbers are the same in each call; draw what is otherwise random "
                f"(a data loader, Python's or NumPy's generators) once, outside of it{remedy}"
            )
        self.progress.losses[i] = number


def _gram(buffer: Tensor) -> Tensor:
    """Return the Gram matrix, fp64 [n, n], on the CPU. fp64 keeps small gradients and ignores settings like TF32."""
    gram = torch.zeros(len(buffer), len(buffer), dtype=torch.float64, device=buffer.device)
    for columns in buffer.split(_COLUMNS, dim=1):
        wide = columns.double()
        gram += wide @ wide.T
    return gram.cpu()


@contextmanager
def _seeded(seed: int, t: int, device: torch.device) -> Iterator[None]:
    """Start PyTorch's random numbers of the CPU and of ``device`` from (seed, t), and restore them afterwards."""
    gpus = [device.index] if device.type == "cuda" else []
    state = int(np.random.SeedSequence([seed, t]).generate_state(1, np.uint64)[0])
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(state)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(state)
        yield
