"""Does a block compute what a DiT block computes? Attributes can agree where forwards differ, so both are run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dtr_kernels import reference
from dtr_kernels.swap.dit import DiT

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def trial_problems(block: nn.Module, family: type[DiT]) -> Iterator[str]:
    """Compares the block's own forward with ``reference.dit_block`` on a small random input.

    Nothing of the block changes and none of its hooks run: what is tried is a copy that shares its parameters. Only the
    adaLN parameters are random, because those of a fresh DiT are zero, which closes every gate and hides any difference.

    Yields:
        What is different; nothing where both agree. Blocks on the meta device hold no numbers and are not tried.
    """
    trial: Any = _bare_copy(block)
    weight = trial.attn.qkv.weight
    device, dtype, C = weight.device, weight.dtype, trial.attn.qkv.in_features
    if device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    for module in trial.adaLN_modulation.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = random(*parameter.shape) / C**0.5
    x, c = random(2, 3, C), random(2, C)
    mask = family.set_trial_tasks(trial)

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        modulation = trial.adaLN_modulation(c)
        if modulation.shape != (2, 6 * C):
            yield (
                f"adaLN_modulation turns c [2, {C}] into {list(modulation.shape)}, but shift, scale and gate of two branches "
                f"are [2, {6 * C}]; leave this model unswapped"
            )
            return
        try:
            own = trial(x, c)
        except Exception as error:
            yield (
                f"its own forward failed on x [2, 3, {C}] and c [2, {C}] in {dtype}, so it could not be compared with a "
                f"DiT block ({error}); swap before sharding or offloading, and in a dtype in which the forward runs"
            )
            return
        expected = reference.dit_block(trial, x, c, mask)
        size, difference = expected.abs().max().item(), (own - expected).abs().max().item()
    if difference > torch.finfo(dtype).eps ** 0.5 * size:
        yield (
            f"its forward computes something else than a DiT block: on a small random input, outputs of up to {size:.2g} "
            f"differ by {difference:.2g}; leave this model unswapped"
        )


def _bare_copy(module: nn.Module) -> nn.Module:
    """The module and its children without hooks: tensors are shared, but replacing one in the copy leaves the original."""
    copy = object.__new__(type(module))
    copy.__dict__.update(
        vars(module),
        _parameters=dict(module._parameters),
        _buffers=dict(module._buffers),
        _modules={name: child and _bare_copy(child) for name, child in module._modules.items()},
        **{hooks: {} for hooks in _HOOKS},
    )
    return copy
