"""The least time of each part of a block: its operations and bytes over the two ceilings of a GPU.

``docs/performance.md`` is written against these floors.
"""

from __future__ import annotations

from benchmarks import counts
from benchmarks.counts import ITEMSIZES, Work
from benchmarks.tables import table

# Measured once on an H200 with PyTorch 2.11: bytes per second read and written by a copy within its memory, and
# operations per second of a bf16 product of random 8192 x 8192 matrices. The benchmarks measure both in every run.
BANDWIDTH, MATRIX_RATE = 4.3e12, 790e12


def markdown(B: int = 256, N: int = 256, C: int = 1152, heads: int = 16) -> str:
    """Write a table of the parts of a DiT block in bf16, scope "block"; the defaults are DiT-XL/2 on images of
    256 x 256."""
    W, H, items = int(0.8 * C), 4 * C, ITEMSIZES["bf16"]
    T, sizes = B * N, (B, N, C, W)
    qkv = (*sizes, 3 * C, items)
    forward = {
        "first norm, active channels": counts.norm_forward(*sizes, items, compact=True),
        "QKV over windows": counts.window_linear_forward(*qkv),
        "QKV over all channels": counts.linear_forward(T, C, 3 * C, items),
        "attention": counts.attention_forward(B, N, C, items),
        "output projection": counts.linear_forward(T, C, C, items),
        "second norm": counts.norm_forward(*sizes, items, branch=True),
        "fc1 and GELU": counts.mlp_forward(B, N, C, C, H, items, write_pre=True),
        "fc2": counts.linear_forward(T, H, C, items),
    }
    backward = {
        "fc2, input and GELU": counts.mlp_backward(B, N, H, C, items, write_act=True),
        "fc2, weight": counts.linear_weight_gradient(T, H, C, items),
        "fc1": counts.linear_gradients(T, C, H, items),
        "second norm": counts.norm_backward(*sizes, items, branch=True),
        "output projection": counts.linear_gradients(T, C, C, items),
        "attention": counts.attention_backward(B, N, C, heads, items),
        "QKV over windows": counts.window_linear_gradients(*qkv),
        "QKV over all channels": counts.linear_gradients(T, C, 3 * C, items),
        "first norm, active channels": counts.norm_backward(*sizes, items, compact=True),
    }
    rows = [
        [which, name, f"{work.flops / 1e12:.3f}", f"{work.bytes / 1e9:.2f}", f"{1e3 * seconds(work):.3f}", _bound(work)]
        for which, parts in (("forward", forward), ("backward", backward))
        for name, work in parts.items()
    ]
    return table([["pass", "part", "TFLOP", "GB", "floor, ms", "bound by"], *rows])


def seconds(work: Work) -> float:
    """Return the floor: the longer of the times for operations and for bytes."""
    return max(work.flops / MATRIX_RATE, work.bytes / BANDWIDTH)


def _bound(work: Work) -> str:
    return "operations" if work.flops / MATRIX_RATE > work.bytes / BANDWIDTH else "bytes"
