"""torch.utils.flop_counter counts our ops: as the plain model, without the products that a window leaves out."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from models import TIMESTEPS, facebook_dit
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import dtr_kernels as dtr
from dtr_kernels.ops.declaration import PRECISIONS

pytestmark = pytest.mark.usefixtures("one_thread", "seed")

B, N, C, H, HEADS = 3, 20, 32, 128, 4
ROUTING = dtr.DenoisingTaskRouting(TIMESTEPS)
W = 25
# Checks, and the K x K loop of PCGrad: none has a product of matrices.
WITHOUT_PRODUCTS = {
    "checked_labels",
    "checked_times",
    "checked_timesteps",
    "random_masks",
    "window_of_block",
    "window_starts",
}
WITHOUT_PRODUCTS |= {"pcgrad_coefficients"}


def elementwise():
    """Ops of files whose kernels declare no FLOPs."""
    for path in Path(dtr.ops.__file__).parent.glob("*.py"):
        kernels = getattr(importlib.import_module(f"dtr_kernels.ops.{path.stem}"), "KERNELS", [])
        items = PRECISIONS["fp32"].items
        works = [kernel.work(kernel.sizes[0], items, **kernel.modes[0]) for kernel in kernels if kernel.work]
        if works and not any(work.flops for work in works):
            yield from re.findall(r'^@op\("(\w+)"', path.read_text(), re.MULTILINE)


def flops(function, *args):
    """Return the FLOPs of the forward pass and of the backward pass."""
    counts = []
    with FlopCounterMode(display=False) as counter:
        out = function(*args)
        counts.append(counter.get_total_flops())
        out.sum().backward()
        counts.append(counter.get_total_flops() - counts[0])
    return counts


def make_block(scope="block"):
    block = dtr.nn.RoutedDiTBlock(C, HEADS, scope=scope)
    for parameter in block.adaLN_modulation.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return block


def inputs():
    return torch.randn(B, N, C, requires_grad=True), torch.randn(B, C)


def skipped(scope):
    """In the forward pass and in the backward pass of a block."""
    if scope != "inner":
        forward = 2 * B * N * (C - W) * (3 * C + (H if scope == "branch" else 0))
        return forward, 2 * forward
    # One head of four: in four linear layers, and in the attention, which not every PyTorch counts on a CPU.
    forward = 2 * B * N * (3 * C * C + C * C + 2 * H * C) // 4
    head = torch.randn(3, B, 1, N, C // HEADS, requires_grad=True)
    attention = flops(torch.nn.functional.scaled_dot_product_attention, *head)
    return forward + attention[0], 2 * forward + attention[1]


@pytest.mark.parametrize("frozen", [(), ("attn.qkv.weight",), ("mlp.fc1.weight", "mlp.fc2.weight")], ids=str)
def test_flops_of_an_unrouted_block_are_those_of_the_plain_one(frozen):
    block, batch = make_block(), inputs()
    for name in frozen:
        block.get_parameter(name).requires_grad_(False)
    plain = flops(dtr.reference.dit_block, block, *batch)
    assert flops(block, *batch) == plain and min(plain) > 20 * B * N * C * C


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
def test_flops_of_a_routed_block_leave_out_what_is_skipped(scope, dense, request):
    """Also where a dense GEMM is faster: the mathematics is the same."""
    if dense:
        request.getfixturevalue("dense_products")
    block, batch = make_block(scope), inputs()
    forward, backward = flops(dtr.reference.dit_block, block, *batch)
    window = ROUTING.window(torch.tensor([0, 20, 49]), block.routed_channels)
    saved = skipped(scope)
    assert flops(block, *batch, window) == [forward - saved[0], backward - saved[1]]


@pytest.mark.parametrize("routing", [None, ROUTING], ids=["unrouted", "routed"])
def test_flops_of_a_swapped_model(routing):
    model, batch = facebook_dit(), (torch.randn(B, 3, 8, 10), torch.tensor([0, 20, 49]), torch.tensor([1, 2, 3]))
    forward, backward = flops(model, *batch)
    saved = (0, 0) if routing is None else [len(model.blocks) * of for of in skipped("block")]
    assert flops(dtr.swap_blocks(model, routing), *batch) == [forward - saved[0], backward - saved[1]]


@pytest.mark.parametrize("routing", [None, ROUTING], ids=["unrouted", "routed"])
def test_flops_of_a_native_model(routing):
    model = dtr.nn.DiT(8, 2, 3, C, 2, HEADS, num_classes=10, routing=routing)
    batch = torch.randn(B, 3, 8, 8), torch.tensor([0, 20, 49]), torch.tensor([1, 2, 3])
    forward, backward = flops(lambda *batch: dtr.reference.dit(model, *batch), *batch)
    saved = 0 if routing is None else 2 * skipped("block")[0] * 16 // N
    assert flops(model, *batch) == [forward - saved, backward - 2 * saved]


def test_flops_of_a_residual_block():
    block, x, emb = dtr.nn.RoutedResBlock(32, 8), torch.randn(2, 32, 6, 6, requires_grad=True), torch.randn(2, 8)
    assert flops(block, x, emb) == flops(dtr.reference.res_block, block, x, emb)


@pytest.mark.parametrize("several", [False, True])
def test_flops_of_gradient_surgery(several):
    K, P = 3, 40
    gradients = torch.randn(K, P)
    grads = [list(row.split(10)) for row in gradients] if several else gradients
    with FlopCounterMode(display=False) as counter:
        dtr.ops.gram(grads)
        dtr.ops.combine_(grads, torch.eye(K))
        dtr.ops.weighted_sum(grads, torch.ones(K))
    ops = torch.ops.dtr_kernels
    expected = {ops.gram: 2 * K * K * P, ops.combine_: 2 * K * K * P, ops.weighted_sum: 2 * K * P}
    assert counter.get_flop_counts()["Global"] == expected


def test_every_op_has_flops_or_no_products():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dtr_kernels::")}
    names = {name.removeprefix("dtr_kernels::").split(".")[0] for name in names}
    counted = {name for name in names if getattr(torch.ops.dtr_kernels, name) in flop_registry}
    assert names - counted == WITHOUT_PRODUCTS | (set(elementwise()) - counted)
