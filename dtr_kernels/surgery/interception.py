"""Interception between a model and its parameters, so that one backward pass yields each cluster's weight gradients.

While an ``Interception`` is active it sees every call of a PyTorch function. Tensors are of three kinds:

- weights: parameters, and tensors computed from parameters alone (``weight.t()``, ``1 + gain``, a cast),
- samples: the batch and tensors computed from it, one or several rows for each sample,
- constants: everything else.

A function of weights and samples is computed with detached weights, by the rule for that function (``rules``), which
also derives the weights' gradients from the gradient of its output. The backward pass hands these, cluster by cluster,
to a ``Collector``. So the graph holds no path to a parameter, and a path that exists all the same is detected: it ends
in ``p.grad``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode, resolve_name

from dtr_kernels.surgery.batch import Batch, check_per_sample
from dtr_kernels.surgery.interrupts import LetThrough
from dtr_kernels.surgery.layout import batch_dimensions, functions, tensors_in
from dtr_kernels.surgery.segments import Segments


class Unsupported(NotImplementedError):
    """The model uses a parameter in a way that has no per-cluster gradient rule here.

    The message names the function, the parameter and the reason.
    """


class Refusal(Exception):
    """Raised by rules, with only the reason."""


# Adds a weight's gradients, segment by segment, to a tensor [K, *shape].
Add = Callable[[Tensor, Segments], None]
# Calls take(i, add) for the i-th weight of a function, with the gradient of its output and the saved tensors in scope.
TakeGradients = Callable[..., None]


class Collector(Protocol):
    """Receives the weights' gradients in a backward pass."""

    def take(self, weight: Tensor, names: tuple[str, ...], add: Add) -> Tensor | None:
        """Receive the gradients of a weight computed from the named parameters; return the gradient for autograd."""


class Sink(Protocol):
    """The destination of a parameter's gradients."""

    def add(self, name: str, write: Callable[[Tensor], None]) -> None:
        """Call ``write`` with a tensor [K, *shape] to which it adds gradients."""


class PerCluster:
    """The collector of K gradients."""

    def __init__(self, parameters: Mapping[str, Tensor], sizes: Sequence[int], sink: Sink) -> None:
        self._parameters, self._segments, self._sink = parameters, Segments(sizes), sink

    def take(self, weight: Tensor, names: tuple[str, ...], add: Add) -> None:
        if weight is self._parameters[names[0]]:
            self._sink.add(names[0], lambda gradients: add(gradients, self._segments))
            return
        of_weight = weight.new_zeros(len(self._segments.sizes), *weight.shape)
        add(of_weight, self._segments)
        parameters = [self._parameters[name] for name in names]
        of_parameters = {
            k: torch.autograd.grad(weight, parameters, of_weight[k], retain_graph=True, materialize_grads=True)
            for k, size in enumerate(self._segments.sizes)
            if size
        }
        for i, name in enumerate(names):
            self._sink.add(name, partial(_add, {k: of_all[i] for k, of_all in of_parameters.items()}))


def _add(new: dict[int, Tensor], gradients: Tensor) -> None:
    for k, gradient in new.items():
        gradients[k] += gradient


class Whole:
    """The collector that leaves the gradient of the whole batch to autograd, as if nothing were intercepted."""

    def __init__(self, samples: int) -> None:
        self._segments = Segments([samples])

    def take(self, weight: Tensor, names: tuple[str, ...], add: Add) -> Tensor:
        gradients = weight.new_zeros(1, *weight.shape)
        add(gradients, self._segments)
        return gradients[0]


class _Mark(NamedTuple):
    """Facts about a tensor, kept as an attribute of the tensor."""

    owner: object
    # The parameters that a weight is computed from; none for samples.
    names: tuple[str, ...] = ()
    # The dimension of samples that is the batch, None if unknown.
    batch: int | None = None


# Calls that compute nothing. They are the most frequent in a forward pass, so they are skipped early.
_INSPECTING = {
    *functions("dim size numel stride is_floating_point is_complex is_contiguous data_ptr", Tensor),
    *(attribute.__get__ for attribute in functions("shape dtype device ndim requires_grad is_leaf", Tensor)),
    *(attribute.__get__ for attribute in functions("grad_fn layout is_cuda", Tensor)),
}

# Functions that read only the shape or the dtype of tensors other than the first.
_READING_ONE = set(functions("to type_as expand_as view_as reshape_as new_tensor", Tensor))

Rule = Callable[..., Any]


class Interception(TorchFunctionMode):
    """Computes functions of weights and samples by rules, for one batch.

    Args:
        parameters: by name.
        rules: rule(interception, function, *args, **kwargs) returns the result of function(*args, **kwargs).
    """

    def __init__(self, parameters: Mapping[str, Tensor], rules: Mapping[Any, Rule]) -> None:
        super().__init__()
        self.samples = 0
        # Forward calls with a parameter, or a tensor computed from it, among their weights.
        self.uses: Counter[str] = Counter()
        self.parameters, self._rules = parameters, rules
        self._names = {id(p): (name,) for name, p in parameters.items()}
        self._owner = object()
        self._collector: Collector | None = None

    # --- the two passes ---

    def mean_losses(self, loss: Callable[..., Tensor], batch: Batch) -> list[Tensor | None]:
        """Run the forward pass; return each cluster's mean loss, None for a cluster without samples."""
        self.samples = sum(batch.sizes)
        for name, p in self.parameters.items():
            if p._backward_hooks or p._post_accumulate_grad_hooks:  # type: ignore[attr-defined]
                raise Unsupported(
                    f"parameter {name!r} has a hook, which would see no gradient; use engine='per_cluster'"
                )
        with _nothing_compiled(), self, LetThrough():
            tensors = [tensor.view_as(tensor) for tensor in batch.tensors]  # views to mark, not the caller's own
            for tensor in tensors:
                self._mark(tensor, batch=0)
            losses = check_per_sample(loss(*tensors), self.samples)
        if not losses.requires_grad:
            raise ValueError("the loss does not depend on any parameter that requires grad")
        mark = self._samples_mark(losses)
        if mark is not None and mark.batch != 0:
            raise Unsupported(
                "the losses could not be followed back to one sample each, as if the loss function mixed the samples "
                "of the batch; use engine='per_cluster'"
            )
        dtype = torch.promote_types(losses.dtype, torch.float32)
        return [part.mean(dtype=dtype) if len(part) else None for part in losses.split(list(batch.sizes))]

    def backward(self, losses: Sequence[Tensor], collector: Collector, retain_graph: bool = False) -> None:
        """Run the backward pass of the losses' sum, and hand the weights' gradients to ``collector``."""
        # Edges, because torch.autograd.backward of tensors would be intercepted itself, and nothing inside of it.
        edges = [torch.autograd.graph.get_gradient_edge(loss) for loss in losses]
        self._collector = collector
        try:
            # Active here too, because checkpointed functions are computed again; they restore their own autocast.
            with self, torch.autocast(losses[0].device.type, enabled=False), LetThrough():
                torch.autograd.backward(edges, retain_graph=retain_graph)
        finally:
            self._collector = None

    # --- for rules ---

    def is_weight(self, tensor: Any) -> bool:
        """Return whether a tensor is a parameter or computed from parameters alone."""
        return isinstance(tensor, Tensor) and bool(self._names_of(tensor))

    def frozen(self, tensor: Any) -> Any:
        """Return a weight without its history, anything else unchanged."""
        return tensor.detach() if self.is_weight(tensor) else tensor

    def derived(self, tensor: Tensor, weight: Tensor) -> Tensor:
        """Declare ``tensor`` to be computed from ``weight`` alone."""
        self._mark(tensor, names=self._names_of(weight))
        return tensor

    def has_rows(self, tensor: Tensor) -> bool:
        """Return whether a tensor holds samples."""
        return self._samples_mark(tensor) is not None

    def check_rows(self, *tensors: Tensor) -> None:
        """Refuse a tensor without samples, or whose dimension 0 is not the batch, alone or merged with later ones."""
        for tensor in tensors:
            mark = self._samples_mark(tensor)
            if mark is None:
                raise Refusal(f"its input of shape {list(tensor.shape)} must depend on the batch")
            if mark.batch != 0 or len(tensor) % self.samples:
                raise Refusal(
                    f"dimension 0 of its input, of shape {list(tensor.shape)}, is not known to be the batch of "
                    f"{self.samples} samples, or the batch flattened with dimensions behind it"
                )

    def check_no_rows(self, *tensors: Any) -> None:
        """Refuse a tensor that holds samples, as one weight serves the whole batch."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and self.has_rows(tensor):
                raise Refusal(f"its weight of shape {list(tensor.shape)} depends on the batch")

    def tap(
        self, out: Tensor, weights: Sequence[Any], saved: Sequence[Tensor], take_gradients: TakeGradients
    ) -> Tensor:
        """Return ``out``, a new tensor, so that the weights' gradients are taken when its own gradient arrives.

        Args:
            weights: may include other things than weights; no gradients are taken of these.
            saved: tensors kept for the backward pass.
            take_gradients: called as take_gradients(take, dout, *saved).
        """
        return _Tap.apply(self, weights, [tensor.detach() for tensor in saved], take_gradients, out, *weights)

    def collect(self, weights: Sequence[Any], take_gradients: TakeGradients, *tensors: Tensor) -> list[Tensor | None]:
        """Call take_gradients(take, *tensors) in a backward pass; return each weight's gradient for autograd."""
        collector = self._collector
        if collector is None:
            raise Unsupported(
                "the loss function differentiates the model itself, and its gradients would be taken for the step's; "
                "use engine='per_cluster'"
            )
        results: list[Tensor | None] = [None] * len(weights)

        def take(i: int, add: Add) -> None:
            if self.is_weight(weights[i]):
                results[i] = collector.take(weights[i], self._names_of(weights[i]), add)

        with torch._C.DisableTorchFunction():
            take_gradients(take, *tensors)
        return results

    # --- interception ---

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _INSPECTING:
            return func(*args, **kwargs)
        tensors = list(tensors_in(args[:1] if func in _READING_ONE else (*args, *kwargs.values())))
        names = tuple(dict.fromkeys(name for tensor in tensors for name in self._names_of(tensor)))
        inputs = [(tensor, mark.batch) for tensor in tensors if (mark := self._samples_mark(tensor)) is not None]
        if names and inputs:
            if self._collector is None:
                self.uses.update(name for tensor in tensors for name in self._names_of(tensor))
            if torch.is_grad_enabled():
                out = self._by_rule(func, names, args, kwargs)
                for output in tensors_in([out]):
                    self._mark(output, batch=0)
                return out
        # Checkpointing would compute weights again at every use; their own graph holds no more than their size.
        with torch.autograd.graph.saved_tensors_hooks(_same, _same) if names and not inputs else nullcontext():
            out = func(*args, **kwargs)
        outputs = [args[0]] if func is Tensor.__setitem__ else list(tensors_in([out]))
        if inputs and self.samples == 1:
            for output in outputs:  # all belong to the one cluster, in any layout
                self._mark(output, batch=0 if output.dim() else None)
        elif inputs and outputs:
            for output, batch in zip(outputs, batch_dimensions(func, args, kwargs, inputs, outputs), strict=True):
                self._mark(output, batch=batch)
        elif names:
            self._mark_derived(func, names, tensors, outputs)
        return out

    def _by_rule(self, func: Any, names: tuple[str, ...], args: Any, kwargs: Any) -> Any:
        try:
            if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
                raise Refusal("it is called inside of a torch.func transform or forward-mode differentiation")
            if func not in self._rules:
                raise Refusal("there is no rule for this function")
            return self._rules[func](self, func, *args, **kwargs)
        except Refusal as reason:
            raise self._unsupported(func, names, str(reason)) from None

    def _mark_derived(self, func: Any, names: tuple[str, ...], tensors: list[Tensor], outputs: list[Tensor]) -> None:
        for output in outputs:
            if output.requires_grad and id(output) not in self._names:
                if any(tensor.requires_grad and not self._names_of(tensor) for tensor in tensors):
                    raise self._unsupported(
                        func, names, "together with another that requires grad and is not in params"
                    )
                self._mark(output, names=names)

    def _unsupported(self, func: Any, names: tuple[str, ...], reason: str) -> Unsupported:
        function = resolve_name(func) or getattr(func, "__name__", repr(func))
        parameters = ", ".join(map(repr, names))
        return Unsupported(f"{function} uses parameter {parameters}: {reason}; use engine='per_cluster'")

    def _mark(self, tensor: Tensor, names: tuple[str, ...] = (), batch: int | None = None) -> None:
        tensor._one_pass = _Mark(self._owner, names, batch)  # type: ignore[attr-defined]

    def _mark_of(self, tensor: Tensor) -> _Mark | None:
        mark = getattr(tensor, "_one_pass", None)
        return mark if mark is not None and mark.owner is self._owner else None

    def _names_of(self, tensor: Tensor) -> tuple[str, ...]:
        """Return the parameters that a weight is computed from; none if it is no weight."""
        if id(tensor) in self._names:
            return self._names[id(tensor)]
        mark = self._mark_of(tensor)
        return () if mark is None else mark.names

    def _samples_mark(self, tensor: Tensor) -> _Mark | None:
        """Return the mark of a tensor that holds samples; None if it holds none."""
        if id(tensor) in self._names:
            return None
        mark = self._mark_of(tensor)
        if mark is None:
            # No function call returned it, so a custom autograd.Function did. If that takes parameters, it is detected.
            if not tensor.requires_grad or tensor.is_leaf:
                return None
            return _Mark(self._owner, batch=0 if tensor.dim() else None)
        return None if mark.names else mark


def _same(tensor: Tensor) -> Tensor:
    return tensor


def in_autocast_dtype(x: Tensor) -> Tensor:
    """Return x in the dtype to which autocast would cast it for a matrix multiplication."""
    device = x.device.type
    if x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def take_linear(take: Any, dout: Tensor, x: Tensor) -> None:
    """Take the gradients of a linear layer's weight and bias, its weights 0 and 1; dout [..., O], x [..., I]."""
    dout, x = dout.flatten(0, -2), x.flatten(0, -2)
    take(0, lambda gradients, segments: segments.add_products(gradients, dout, x))
    take(1, lambda gradients, segments: segments.add_sums(gradients, dout))


class _Tap(torch.autograd.Function):
    """Identity, in place, on a layer's output; its backward pass takes the gradients of the layer's weights."""

    @staticmethod
    def forward(
        ctx: Any,
        interception: Interception,
        weights: Sequence[Any],
        saved: Sequence[Tensor],
        take_gradients: TakeGradients,
        out: Tensor,
        *_: Any,
    ) -> Tensor:
        ctx.interception, ctx.weights, ctx.take_gradients = interception, weights, take_gradients
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * (5 + len(ctx.weights))
        saved = ctx.saved_tensors  # checkpointing computes them again, under the interception
        taken = ctx.interception.collect(ctx.weights, ctx.take_gradients, dout, *saved)
        return None, None, None, None, dout, *taken


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Refuse compiled code, whose calls of layers cannot be intercepted."""
    loaded = "torch._dynamo" in sys.modules
    try:
        with torch.compiler.set_stance("fail_on_recompile") if loaded else nullcontext():
            yield
    except RuntimeError as error:
        if "fail_on_recompile" not in str(error):
            raise
        raise Unsupported(
            "the loss function calls compiled code, inside of which parameters cannot be followed; pass the uncompiled "
            "model or use engine='per_cluster'"
        ) from error


def check_nothing_missed(parameters: Mapping[str, Tensor]) -> None:
    """Refuse gradients that reached a parameter past the interception."""
    for name, p in parameters.items():
        if p.grad is not None:
            raise Unsupported(
                f"autograd reached parameter {name!r} past the rules, for example through a custom autograd.Function "
                "that takes it; use engine='per_cluster'"
            )
