"""Sampling with a routed model: one timestep for the whole batch, the same conditioning at every step.

Three things save time that a training step cannot save. The host knows the window, so a U-Net convolves only the groups
that it touches. A block's modulation depends on timestep and conditioning alone, so it is remembered from batch to
batch. Every step launches the same kernels on the same memory, so a CUDA graph can replay it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from dtr_kernels.nn import DiT, RoutedDiTBlock
from dtr_kernels.nn.dit import FinalLayer, guide
from dtr_kernels.routing import DenoisingTaskRouting, check_count, check_number
from dtr_kernels.swap.core import is_block, is_compiled, one_timestep

__all__ = ["Sampler"]

# A step patches the model's modules while it runs, and several samplers may share a model.
_LOCK = threading.Lock()


class Sampler:
    """Calls a routed model at one timestep after another, with a fixed conditioning.

    Windows come from the timestep as a number, so a U-Net convolves only the groups that they touch. Modulations are
    computed at the first step at a timestep and remembered, one row for all samples with the same conditioning; later
    batches read them instead of the weights that compute them, which are a third of a DiT's. Results change only by
    rounding. Copies and pickles begin with nothing remembered.

    Example::

        sampler = Sampler(model, y=labels)
        for t in scheduler.timesteps:
            x = scheduler.step(sampler(x, t), t, x).prev_sample

    Args:
        model: ``dtr_kernels.nn.DiT``, or a model after ``swap_blocks``, in eval mode and not compiled. When its weights
            change in place, remembered modulations and graphs are dropped; after any other change call ``forget``.
        guidance_scale: for classifier-free guidance; None for none. The conditioning then holds 2B samples, the wanted
            ones followed by those of no class, and both go through the model in one batch.
        remember: keep modulations, 6 C numbers for each timestep, block and different conditioning. Otherwise every
            step computes them.
        cuda_graphs: capture a CUDA graph at the first step at each timestep and replay it later. Needs a GPU, and x of
            one shape and dtype. All graphs share their memory.
        guided_channels: how many of the prediction's first channels are guided; None for as many as x has.
            facebookresearch/DiT guides 3 of 4.
        conditioning: the other arguments of the model's forward by their names, such as y=labels. Tensors must have one
            entry per sample, and are copied.

    Raises:
        TypeError: if the model is of another class.
        ValueError: if the model is compiled, or if the conditioning's tensors do not fit each other.
    """

    def __init__(
        self,
        model: nn.Module,
        guidance_scale: float | None = None,
        remember: bool = True,
        cuda_graphs: bool = False,
        guided_channels: int | None = None,
        **conditioning: Any,
    ) -> None:
        self.model = model
        self.guidance_scale = guidance_scale
        self.remember = remember
        self.cuda_graphs = cuda_graphs
        self.guided_channels = None if guided_channels is None else check_count("guided_channels", guided_channels)
        self._conditioning = {
            name: value.clone() if isinstance(value, Tensor) else value for name, value in conditioning.items()
        }
        self._at = _at_one_timestep(model)
        self._batch = _samples(self._conditioning)
        if guidance_scale is not None and self._batch is not None and self._batch % 2:
            raise ValueError(
                f"with guidance the conditioning must hold 2B samples, those wanted and then as many of no class, got "
                f"{self._batch}"
            )
        self._conditioned = _conditioned(model) if remember else []
        self._weights = list(model.parameters())
        self._kind: type | None = None  # of timestep: int or float
        self.forget()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        settings = self.model, self.guidance_scale, self.remember, self.cuda_graphs, self.guided_channels
        return _make, (settings, self._conditioning)

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor | int | float) -> Tensor:
        """Return the model's prediction.

        Args:
            x: [B, channels, H, W], the samples at timestep t.
            t: the timestep of all samples, in the numbers that the model was trained with: a Python or NumPy number, or
                a tensor that holds one. The host waits for a tensor on a GPU.

        Returns:
            The model's output for x, [B, ...]; if that is not a tensor, its ``sample`` or its first element. With
            guidance, its first ``guided_channels`` channels are guided, and the others (a learned variance) are those
            with conditioning.

        Raises:
            TypeError: if t is not a number.
            ValueError: if x does not have as many samples as the conditioning; if the model is in training mode; if t
                is not one finite number or, unless the routing has ``float_timesteps``, is an integer at one step and
                not at another; or, with CUDA graphs, if x is not on a GPU or changes its shape after the first step.
            RuntimeError: if a block's modulation turns out to depend on more than timestep and conditioning.
        """
        if self.model.training:
            raise ValueError("the model is in training mode, where labels may be dropped; call model.eval()")
        number = _number(t)
        samples = x.shape[0] * (1 if self.guidance_scale is None else 2)
        if self._batch is None:
            self._batch = samples
        if samples != self._batch:
            raise ValueError(
                f"this Sampler is for {self._batch} samples, but x [{x.shape[0]}, ...] makes {samples}; make one for "
                "each batch size"
            )
        self._kind = self._kind or type(number)
        if type(number) is not self._kind and not _has_float_timesteps(self.model):
            raise ValueError(
                f"t was of type {self._kind.__name__} before and is {number!r} now, which routing tells apart"
            )
        with _LOCK:
            self._forget_if_weights_changed()
            return self._replay(x, number) if self.cuda_graphs else self._step(x, number)

    def forget(self) -> None:
        """Drop remembered modulations and graphs."""
        self._modulations = _Modulations(*_distinct(self._conditioning, self._batch))
        self._graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._input: Tensor | None = None
        self._versions = _versions(self._weights)

    def _forget_if_weights_changed(self) -> None:
        if _versions(self._weights) != self._versions:
            self.forget()

    def _step(self, x: Tensor, t: int | float) -> Tensor:
        batch = x if self.guidance_scale is None else torch.cat([x, x])
        with self._modulations.remembered(self._conditioned, _when(x, t)):
            out = self._at(batch, t, self._conditioning)
        if not isinstance(out, Tensor):
            out = out.sample if hasattr(out, "sample") else out[0]
        if self.guidance_scale is None:
            return out
        return guide(out, self.guidance_scale, x.shape[1] if self.guided_channels is None else self.guided_channels)[0]

    def _replay(self, x: Tensor, t: int | float) -> Tensor:
        if x.device.type != "cuda":
            raise ValueError(f"cuda_graphs=True needs x on a GPU, got {x.device}; leave it out elsewhere")
        if self._input is None:
            self._input = x.clone()
        if (x.shape, x.dtype, x.device) != (self._input.shape, self._input.dtype, self._input.device):
            raise ValueError(
                f"CUDA graphs were captured for x {list(self._input.shape)} in {self._input.dtype} on "
                f"{self._input.device}, got {list(x.shape)} in {x.dtype} on {x.device}; make another Sampler"
            )
        self._input.copy_(x)
        when = _when(x, t)
        if when not in self._graphs:
            self._graphs[when] = self._capture(self._input, t)
        graph, out = self._graphs[when]
        graph.replay()
        return out.clone()  # the next graph writes into the same memory

    def _capture(self, x: Tensor, t: int | float) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # first compile kernels and compute modulations, then check these
                self._step(x, t)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            out = self._step(x, t)
        return graph, out


class _Modulations:
    """Results of modules that see timestep and conditioning alone.

    Args:
        first: the index of one sample for each different conditioning. None: every sample has its own.
        like: for each sample, which of these it shares.
    """

    def __init__(self, first: Tensor | None, like: Tensor | None) -> None:
        self._first = first
        self._like = like
        self._known: dict[tuple[Any, ...], Tensor] = {}
        self._calls: dict[int, int] = {}
        self._thread: int | None = None  # that samples
        self._computed: set[int] = set()  # modules checked once when they compute,
        self._repeated: set[int] = set()  # and once when they are recalled

    @contextmanager
    def remembered(self, modules: list[Any], when: tuple[Any, ...]) -> Iterator[None]:
        """Let modules return their earlier results at the same timestep, in this thread."""
        patched = [vars(module).get("forward") for module in modules]
        self._calls.clear()
        self._thread = threading.get_ident()
        for number, module in enumerate(modules):
            vars(module)["forward"] = partial(self._recall, number, when, module.forward)
        try:
            yield
        finally:
            for module, forward in zip(modules, patched, strict=True):
                if forward is None:
                    del vars(module)["forward"]
                else:
                    vars(module)["forward"] = forward

    def _recall(
        self, module: int, when: tuple[Any, ...], compute: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        if threading.get_ident() != self._thread:  # another thread calls the model directly
            return compute(*args, **kwargs)
        # Blocks may share a module, and each calls it with its own conditioning.
        call = self._calls[module] = self._calls.get(module, 0) + 1
        key = (module, call, *when)
        if key not in self._known:
            out = compute(*args, **kwargs)
            known = out if self._first is None else out[self._first]
            if module not in self._computed:
                self._check(out, self._of_all(known))
                self._computed.add(module)
            self._known[key] = known
            return out
        remembered = self._of_all(self._known[key])
        if module not in self._repeated:
            self._check(compute(*args, **kwargs), remembered)
            self._repeated.add(module)
        return remembered

    def _of_all(self, known: Tensor) -> Tensor:
        return known if self._like is None else known[self._like]

    @staticmethod
    def _check(out: Tensor, remembered: Tensor) -> None:
        """Raise if a modulation depends on more. On a GPU the host waits, so this is not done at every step."""
        if out.numel() and (out - remembered).abs().max() > torch.finfo(out.dtype).eps ** 0.5 * out.abs().max():
            raise RuntimeError(
                "a block's modulation differs between samples, or steps, of one timestep and one conditioning, so it "
                "depends on something else too; give Sampler remember=False"
            )


def _when(x: Tensor, t: int | float) -> tuple[Any, ...]:
    """Return everything that a modulation depends on and that may change from step to step."""
    device = x.device.type
    return t, x.dtype, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _make(settings: tuple[Any, ...], conditioning: dict[str, Any]) -> Sampler:
    return Sampler(*settings, **conditioning)


def _at_one_timestep(model: nn.Module) -> Callable[[Tensor, int | float, Mapping[str, Any]], Any]:
    """Return a function that calls the model for a timestep that the host knows."""
    if any(is_compiled(module) for module in model.modules()):
        raise ValueError("the model is compiled; give Sampler the model itself, and use cuda_graphs=True on a GPU")
    if isinstance(model, DiT):
        return lambda x, t, conditioning: model(x, t, **conditioning)
    return one_timestep(model)


def _conditioned(model: nn.Module) -> list[Any]:
    """Return the modules whose results depend on timestep and conditioning alone."""
    own: list[Any] = [module for module in model.modules() if isinstance(module, RoutedDiTBlock | FinalLayer)]
    swapped: list[Any] = [module for module in model.modules() if is_block(module)]
    parts = [module.adaLN_modulation for module in own]
    parts += [part for block in swapped for part in block._dtr.family.conditioned(block)]
    return list(dict.fromkeys(parts))


def _versions(weights: list[nn.Parameter]) -> list[tuple[int, int]]:
    """Return the address and version of each weight, to notice moves and writes. Inference tensors count no writes."""
    return [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]


def _has_float_timesteps(model: nn.Module) -> bool:
    """Return whether an integer timestep and a floating-point one mean the same to the model."""
    blocks: list[Any] = [module for module in model.modules() if is_block(module)]
    routing = model.routing if isinstance(model, DiT) else blocks[0]._dtr.model.routing
    return isinstance(routing, DenoisingTaskRouting) and routing.float_timesteps


def _number(t: Any) -> int | float:
    if isinstance(t, Tensor):
        if t.numel() != 1:
            raise ValueError(f"t must be one timestep for the whole batch, got a tensor of shape {list(t.shape)}")
        t = t.item()
    return check_number("t", t)


def _samples(conditioning: Mapping[str, Any]) -> int | None:
    """Return the number of samples in the conditioning; None if no tensor shows it."""
    sizes = {
        name: len(value) if value.dim() else 0 for name, value in conditioning.items() if isinstance(value, Tensor)
    }
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the conditioning's tensors must have one entry per sample, got {sizes}")
    return next(iter(sizes.values()), None)


def _distinct(conditioning: Mapping[str, Any], samples: int | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the index of one sample for each different conditioning, and which of these each sample shares.

    Both are None if all samples differ, or may differ because of objects that are not tensors.
    """
    others = [value for value in conditioning.values() if not isinstance(value, Tensor)]
    if not samples or not all(isinstance(value, Real | None) for value in others):
        return None, None
    tensors = [value.reshape(samples, -1) for value in conditioning.values() if isinstance(value, Tensor)]
    if not tensors or any(tensor.is_complex() for tensor in tensors):
        return None, None
    device = tensors[0].device
    each = [torch.unique(tensor, dim=0, return_inverse=True)[1].to(device) for tensor in tensors]
    different, like = torch.unique(torch.stack(each), dim=1, return_inverse=True)
    if different.shape[1] == samples:
        return None, None
    index = torch.arange(samples, device=device)
    first = torch.full((different.shape[1],), samples, device=device).scatter_reduce(0, like, index, "amin")
    return first, like
