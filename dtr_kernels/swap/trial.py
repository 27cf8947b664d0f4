"""Trial of a block against its family's reference: attributes can agree where forwards differ, so both are run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dtr_kernels.swap.checks import HOOKS, is_within
from dtr_kernels.swap.family import Family, RandomTensor, Unfit


def swap_problem(block: nn.Module, family: type[Family]) -> str | None:
    """Return why a block cannot be swapped or stay swapped; None if it can."""
    return next(family.problems(block), None) or trial_problem(block, family)


@torch.no_grad()
def trial_problem(block: nn.Module, family: type[Family]) -> str | None:
    """Compare the block's own forward with the family's reference on a small random input.

    The block does not change and none of its hooks run: the trial runs a copy, in eval mode and in training mode, in
    fp32 if the block is in 16 bits, whose rounding could hide a difference.

    Returns:
        The difference in words, None if both agree. Blocks on the meta device hold no numbers and are not tried.
    """
    copy: Any = _bare_copy(block).eval()
    copy.__class__ = getattr(copy, "_dtr_original", type(copy))  # if swapped already, the block's own forward
    weight = family.weight(copy)
    device, dtype = weight.device, weight.dtype
    if device.type == "meta":
        return None
    if dtype in (torch.bfloat16, torch.float16):
        _widen(copy)
        dtype = torch.float32
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    inputs = family.trial_input(copy, random)
    try:
        _move_vectors(copy, random)
        with torch.autocast(device.type, enabled=False):
            mask = family.prepare_trial(copy, family.arguments(*inputs)[1], random)
            called = family.calls(copy)  # and may drop, as it then does in the fused block too
            for training in (False, True):
                for name, module in copy.named_modules():
                    module.training = training and not is_within(name, called)
                if (problem := _difference(copy, family, inputs, mask)) is not None:
                    return problem
            return None
    except Unfit as problem:
        return str(problem)
    except Exception as error:
        shapes = " and ".join(str(list(tensor.shape)) for tensor in inputs if isinstance(tensor, Tensor))
        return (
            f"it could not be compared with a {family.name}: on inputs of shape {shapes} in {dtype} that failed "
            f"({error}); swap before sharding or offloading, and in a dtype in which its forward runs"
        )


def _difference(copy: Any, family: type[Family], inputs: tuple[Any, ...], mask: Tensor | None) -> str | None:
    expected = family.run_plain(copy, *family.arguments(*inputs), mask, "block")
    size = expected.abs().max().item()
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * size
    difference = (copy(*inputs) - expected).abs().max().item()
    if difference > tolerance:
        mode = " in training mode" if copy.training else ""
        return (
            f"its forward computes something else than a {family.name}{mode}: on a small random input, outputs of up "
            f"to {size:.2g} differ by {difference:.2g}; leave this model unswapped"
        )
    method = family.method(type(copy))
    if method == "forward":
        return None
    vars(copy)[method] = lambda *args: 2 * family.run_plain(copy, *family.arguments(*args), mask, "block")
    doubled = copy(*inputs)
    del vars(copy)[method]
    if (doubled - 2 * expected).abs().max().item() > tolerance:
        return (
            f"its forward does not just return what its {method} computes, and swapping replaces that; leave this "
            "model unswapped"
        )
    return None


def _widen(copy: nn.Module) -> None:
    """Give a bare copy its own fp32 parameters and buffers."""
    for module in copy.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point():
                    wide = tensor.detach().float()
                    tensors[name] = nn.Parameter(wide) if isinstance(tensor, nn.Parameter) else wide  # type: ignore[assignment]


def _move_vectors(copy: nn.Module, random: RandomTensor) -> None:
    """Give a bare copy biases and norms' weights as training would: zeros and ones hide what is made of them."""
    for module in copy.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 1:
                noise = random(len(parameter)).to(parameter) / 4
                module._parameters[name] = nn.Parameter(parameter + noise, requires_grad=False)


def _bare_copy(module: nn.Module) -> nn.Module:
    """Return a copy of the module and its children without hooks, with its own buffers, which a forward may write to.

    Parameters are shared, but replacing one leaves the original unchanged.
    """
    copy = object.__new__(type(module))
    copy.__dict__.update(
        vars(module),
        _parameters=dict(module._parameters),
        _buffers={name: None if tensor is None else tensor.clone() for name, tensor in module._buffers.items()},
        _modules={name: None if child is None else _bare_copy(child) for name, child in module._modules.items()},
        **{hooks: {} for hooks in HOOKS},
    )
    return copy
