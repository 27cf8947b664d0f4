"""How tests of swapped models compare them with plain ones."""

from __future__ import annotations

import copy

import torch


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


def rms(x):
    """Root mean square, in fp64."""
    return x.double().square().mean().sqrt()


def differ(actual, expected):
    """Whether any tensor is far from the expected one."""
    return any((a - e).abs().max() > 1e-2 * e.abs().max() for a, e in zip(actual, expected, strict=True))


def snapshot(model):
    """Class, attributes and tensors of every module."""
    return [
        (type(module), dict(vars(module)), [*module._parameters.items(), *module._buffers.items()])
        for module in model.modules()
    ]
