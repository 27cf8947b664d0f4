"""Models that the benchmarks run."""

from __future__ import annotations

from functools import lru_cache

import torch

import dtr_kernels as dtr
from dtr_kernels.routing import DenoisingTaskRouting

TINY = "tiny"


def dit_channels(name: str) -> int:
    """Return the channels of the model of that name; raise ValueError where there is none."""
    if name != TINY and name not in dtr.nn.DiT_models:
        raise ValueError(f"--model must be {TINY} or one of {', '.join(dtr.nn.DiT_models)}, got {name}")
    return blueprint(name).hidden_size


@lru_cache
def blueprint(model: str) -> dtr.nn.DiT:
    """A DiT without memory for its parameters."""
    with torch.device("meta"):
        return make_dit(model, torch.device("meta"), torch.float32)


def make_dit(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    routing: DenoisingTaskRouting | None = None,
    scope: str = "block",
) -> dtr.nn.DiT:
    """A DiT of the published sizes for latents of 32 x 32 (images of 256 x 256), or "tiny".

    Training starts with closed gates and a last layer of zeros, where most gradients are zero; here all weights are
    random. Labels are never dropped, so that everyone who trains the model on a batch computes the same.
    """
    chosen = {"routing": routing, "scope": scope, "class_dropout_prob": 0}
    if name == TINY:
        model = dtr.nn.DiT(input_size=16, hidden_size=128, depth=2, num_heads=4, **chosen)  # type: ignore[arg-type]
    else:
        model = dtr.nn.DiT_models[name](input_size=32, **chosen)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.02)
    return model.to(device, dtype)
