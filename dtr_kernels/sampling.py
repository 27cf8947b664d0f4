"""A model in sampling: one timestep for the whole batch, the same conditioning at every step.

What a step of sampling can leave out that a step of training cannot: the window is known to the host, so a slice of
each weight is all that is read; what a block makes of timestep and conditioning alone, its modulation, is the same for
every batch and is remembered; and as every step launches the same kernels on the same memory, a CUDA graph replays it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from dtr_kernels.nn import DiT, RoutedDiTBlock
from dtr_kernels.nn.dit import FinalLayer
from dtr_kernels.swap.core import is_block, one_timestep

__all__ = ["Sampler"]


class Sampler:
    """Calls a routed model at one timestep after another, with the conditioning it is given here.

    Windows come from the timestep as a number, so kernels read one slice of each weight. Modulations are computed at
    the first step at a timestep and remembered, in one row for all samples that have the same conditioning; later
    batches read them instead of the weights that make them, which are a third of a DiT's. Nothing of this changes
    a result but for rounding.

    Example::

        sampler = Sampler(model, y=labels)
        for t in scheduler.timesteps:
            x = scheduler.step(sampler(x, t), t, x).prev_sample

    Args:
        model: ``dtr_kernels.nn.DiT``, or a model after ``swap_blocks``, in eval mode and not compiled.
        guidance_scale: for classifier-free guidance; None for none. Then the conditioning holds 2B samples, those
            wanted followed by those of no class, and both go through the model in one batch.
        cuda_graphs: capture a CUDA graph at the first step at each timestep and replay it later. For x of one shape
            and dtype, on a GPU. All graphs share their memory.
        conditioning: the other arguments of the model's forward by their names, such as y=labels. Tensors among them
            have one entry per sample.

    Raises:
        TypeError: if the model is neither.
        ValueError: if it is in training mode or compiled, or if the conditioning's tensors do not fit each other.
    """

    def __init__(
        self, model: nn.Module, guidance_scale: float | None = None, cuda_graphs: bool = False, **conditioning: Any
    ) -> None:
        self.model = model
        self.guidance_scale = guidance_scale
        self.cuda_graphs = cuda_graphs
        self.conditioning = conditioning
        self._at = _at_one_timestep(model)
        self._conditioned = _conditioned(model)
        self._batch, self._first, self._rows = _distinct(conditioning)
        self._known: dict[tuple[int, int | float], Tensor] = {}
        self._graphs: dict[int | float, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._input: Tensor | None = None
        if guidance_scale is not None and self._batch is not None and self._batch % 2:
            raise ValueError(
                f"with guidance the conditioning must hold 2B samples, those wanted and then as many of no class, got "
                f"{self._batch}"
            )

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor | int | float) -> Tensor:
        """The model's prediction.

        Args:
            x: [B, channels, H, W], the samples at timestep t.
            t: the timestep of all of them, in the numbers that the model was trained with: a Python number, or a
                tensor that holds one, for which the host waits if it is on a GPU.

        Returns:
            What the model returns for x, [B, ...], its ``sample`` where that is not a tensor. With guidance, the first
            ``channels`` of its channels are guided, and others (a learned variance) are those with conditioning.

        Raises:
            ValueError: if x does not have as many samples as the conditioning, the model is in training mode, t is not
                one number, or, with CUDA graphs, x is not on a GPU or of another shape than at the first step.
        """
        if self.model.training:
            raise ValueError("the model is in training mode, where labels may be dropped; call model.eval()")
        number = _number(t)
        samples = x.shape[0] * (1 if self.guidance_scale is None else 2)
        if self._batch is not None and samples != self._batch:
            raise ValueError(
                f"the conditioning has {self._batch} samples, but x [{x.shape[0]}, ...] needs {samples}; make a "
                "Sampler for each batch size"
            )
        return self._replay(x, number) if self.cuda_graphs else self._step(x, number)

    def forget(self) -> None:
        """Drops remembered modulations and graphs: call it after the model's weights have changed."""
        self._known.clear()
        self._graphs.clear()
        self._input = None

    def _step(self, x: Tensor, t: int | float) -> Tensor:
        batch = x if self.guidance_scale is None else torch.cat([x, x])
        with self._remembering(t):
            out = self._at(batch, t, self.conditioning)
        out = out if isinstance(out, Tensor) else out[0]  # diffusers' outputs are tuples, and so is return_dict=False
        if self.guidance_scale is None:
            return out
        wanted, unconditional = out.chunk(2)
        C = x.shape[1]
        guided = unconditional[:, :C] + self.guidance_scale * (wanted[:, :C] - unconditional[:, :C])
        return torch.cat([guided, wanted[:, C:]], dim=1)

    @contextmanager
    def _remembering(self, t: int | float) -> Iterator[None]:
        """Lets the modules that see the conditioning alone return what they returned for it at t before."""
        for number, module in enumerate(self._conditioned):
            vars(module)["forward"] = partial(self._recall, (number, t), module.forward)
        try:
            yield
        finally:
            for module in self._conditioned:
                del vars(module)["forward"]

    def _recall(
        self, key: tuple[int, int | float], compute: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        if key not in self._known:
            out = compute(*args, **kwargs)
            self._known[key] = out if self._first is None else out[self._first]
        known = self._known[key]
        return known if self._rows is None else known[self._rows]

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
        if t not in self._graphs:
            self._graphs[t] = self._capture(self._input, t)
        graph, out = self._graphs[t]
        graph.replay()
        return out.clone()  # the next graph writes into the same memory

    def _capture(self, x: Tensor, t: int | float) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self._step(x, t)  # compiles kernels and fills the memory of modulations
        torch.cuda.current_stream(x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            out = self._step(x, t)
        return graph, out


def _at_one_timestep(model: nn.Module) -> Callable[[Tensor, int | float, dict[str, Any]], Any]:
    """How to call the model for a timestep that the host knows."""
    if any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError("the model is compiled; give Sampler the model itself, and use cuda_graphs=True on a GPU")
    if isinstance(model, DiT):
        return lambda x, t, conditioning: model(x, t, **conditioning)
    return one_timestep(model)


def _conditioned(model: nn.Module) -> list[Any]:
    """The modules whose result depends on timestep and conditioning alone."""
    modules: list[Any] = [module for module in model.modules() if isinstance(module, RoutedDiTBlock | FinalLayer)]
    own = [module.adaLN_modulation for module in modules]
    swapped: list[Any] = [module for module in model.modules() if is_block(module)]
    return own + [part for block in swapped for part in block._dtr.family.conditioned(block)]


def _number(t: Any) -> int | float:
    if isinstance(t, Tensor):
        if t.numel() != 1:
            raise ValueError(f"t must be one timestep for the whole batch, got a tensor of shape {list(t.shape)}")
        return t.item()
    if not isinstance(t, Real):
        raise ValueError(f"t must be a number or a tensor that holds one, got {t!r}")
    return int(t) if isinstance(t, Integral) else float(t)


def _distinct(conditioning: dict[str, Any]) -> tuple[int | None, Tensor | None, Tensor | None]:
    """How many samples the conditioning has, one sample for each that is different, and which of these each is like.

    None where there are no tensors; the indices are None where all samples are different.
    """
    tensors = {name: value for name, value in conditioning.items() if isinstance(value, Tensor)}
    sizes = {name: len(value) if value.dim() else 0 for name, value in tensors.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the conditioning's tensors must have one entry per sample, got {sizes}")
    if not tensors:
        return None, None, None
    B = next(iter(sizes.values()))
    rows = torch.cat([value.reshape(B, -1).double() for value in tensors.values()], dim=1)
    different, like = torch.unique(rows, dim=0, return_inverse=True)
    if len(different) == B:
        return B, None, None
    index = torch.arange(B, device=rows.device)
    first = torch.full((len(different),), B, device=rows.device).scatter_reduce(0, like, index, "amin")
    return B, first, like
