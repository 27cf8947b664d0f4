"""Importing this lets timm and diffusers be imported, which import torchvision, beside a CPU build of torch.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its library of operators does not load, which it
accepts, and then it describes two of these operators to torch, which knows none of that name. So they are declared
here, without an implementation: nothing calls them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_found = importlib.util.find_spec("torchvision")
if _found is not None and _found.origin is not None:
    try:
        torch.ops.load_library(next(Path(_found.origin).parent.glob("_C*.so")))
    except (OSError, StopIteration):
        for _operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{_operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
