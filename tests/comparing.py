"""How tests of swapped models compare them with plain ones."""

from __future__ import annotations

import copy
import io

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def results(model, *batches):
    """Outputs for each batch, and the gradients of every parameter after one backward pass through all of them."""
    model.zero_grad()
    outputs = [output_of(model(*batch)) for batch in batches]
    sum(output.square().mean() for output in outputs).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [output.detach() for output in outputs] + gradients


def output_of(result):
    """The tensor in what a model returns."""
    return result if isinstance(result, torch.Tensor) else result[0]


def widened(model, *batches):
    """A copy of the model and the batches in fp64."""
    wide = [[x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in batch] for batch in batches]
    return copy.deepcopy(model).double(), *wide


def assert_as_exact(actual, plain, exact, dtype=None):
    """At most twice as far from the fp64 results as plain PyTorch is, and four rounding units of dtype (their own).

    Distances are root mean squares. Gradients that are zero in theory hold only rounding, of larger ones.
    """
    assert len(actual) == len(plain) == len(exact)
    least = 1e-3 * max(e.abs().max() for e in exact)
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert a.dtype == p.dtype and a.shape == p.shape == e.shape
        unit = torch.finfo(dtype or a.dtype).eps
        bound = 2 * rms(p - e) + 4 * unit * max(rms(e), least)
        assert rms(a - e) <= bound, f"error {rms(a - e):.3g} of {rms(e):.3g}, but plain PyTorch allows {bound:.3g}"


def assert_same(actual, expected, rtol=1e-4):
    """Equal up to rounding, relative to each tensor's largest value (or to 0.1: a gradient may be zero in theory)."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=rtol * max(e.abs().max().item(), 0.1))


def rms(x):
    """Root mean square, in fp64."""
    return x.double().square().mean().sqrt()


def differ(actual, expected):
    """Return whether any tensor is far from the expected one."""
    return any((a - e).abs().max() > 1e-2 * e.abs().max() for a, e in zip(actual, expected, strict=True))


def saved_and_loaded(thing, weights_only=False):
    """Save with ``torch.save`` and load with ``torch.load``."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


class Allocations(TorchDispatchMode):
    """Bytes of the largest storage that operators have returned at each address."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.sizes[storage.data_ptr()] = max(storage.nbytes(), self.sizes.get(storage.data_ptr(), 0))
        return out


def snapshot(model, without=()):
    """Class, attributes and tensors of every module."""
    return [
        (
            type(module),
            {name: value for name, value in vars(module).items() if name not in without},
            [*module._parameters.items(), *module._buffers.items()],
        )
        for module in model.modules()
    ]
