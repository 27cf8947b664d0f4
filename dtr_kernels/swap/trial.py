"""Does a block compute what a DiT block computes? Attributes can agree where forwards differ, so both are run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dtr_kernels import reference
from dtr_kernels.swap.dit import HOOKS, DiT


@torch.no_grad()
def trial_problem(block: nn.Module, family: type[DiT]) -> str | None:
    """Compares the block's own forward with ``reference.dit_block`` on a small random input.

    Nothing of the block changes and none of its hooks run: what is tried is a copy that shares its parameters, in fp32
    if they are in 16 bits, whose rounding could hide a difference.

    Returns:
        What is different, None where both agree. Blocks on the meta device hold no numbers and are not tried.
    """
    trial: Any = _bare_copy(block)
    weight = trial.attn.qkv.weight
    device, dtype, C = weight.device, weight.dtype, trial.attn.qkv.in_features
    if device.type == "meta":
        return None
    if dtype in (torch.bfloat16, torch.float16):
        _widen(trial)
        dtype = torch.float32
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    x, c = random(2, 3, C), random(2, C)
    try:
        with torch.autocast(device.type, enabled=False):
            modulation = list(trial.adaLN_modulation(c).shape)
            if modulation != [2, 6 * C]:
                return f"adaLN_modulation makes {modulation} of c [2, {C}], not six vectors [2, {C}]; do not swap it"
            trial.adaLN_modulation = _OpenGates(trial.adaLN_modulation, random(2, 6 * C))
            expected = reference.dit_block(trial, x, c, family.set_trial_tasks(trial))
            size, difference = expected.abs().max().item(), (trial(x, c) - expected).abs().max().item()
    except Exception as error:
        return (
            f"it could not be compared with a DiT block: on x [2, 3, {C}] and c [2, {C}] in {dtype} that failed "
            f"({error}); swap before sharding or offloading, and in a dtype in which its forward runs"
        )
    if difference > torch.finfo(dtype).eps ** 0.5 * size:
        return (
            "its forward computes something else than a DiT block: on a small random input, outputs of up to "
            f"{size:.2g} differ by {difference:.2g}; leave this model unswapped"
        )
    return None


class _OpenGates(nn.Module):
    """An adaLN modulation and something random on top: that of a fresh DiT is zero, which would hide any difference."""

    def __init__(self, modulation: nn.Module, random: Tensor) -> None:
        super().__init__()
        self.modulation = modulation
        self.random = random

    def forward(self, c: Tensor) -> Tensor:
        return self.modulation(c) + self.random + c.repeat(1, 6)


def _widen(copy: nn.Module) -> None:
    """Gives a bare copy fp32 parameters and buffers of its own."""
    for module in copy.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point():
                    wide = tensor.detach().float()
                    tensors[name] = nn.Parameter(wide) if isinstance(tensor, nn.Parameter) else wide  # type: ignore[assignment]


def _bare_copy(module: nn.Module) -> nn.Module:
    """The module and its children without hooks: the tensors are shared, but replacing one leaves the original."""
    copy = object.__new__(type(module))
    copy.__dict__.update(
        vars(module),
        _parameters=dict(module._parameters),
        _buffers=dict(module._buffers),
        _modules={name: None if child is None else _bare_copy(child) for name, child in module._modules.items()},
        **{hooks: {} for hooks in HOOKS},
    )
    return copy
