"""Counts of operations and bytes against numbers derived by hand, PyTorch's own counter, and what launchers touch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import counts
from benchmarks.counts import ITEMSIZES, Work
from benchmarks.suite.models import TINY, make_dit
from dtr_kernels import nn, reference
from dtr_kernels.ops import window_linear as linear_ops
from dtr_kernels.ops.gated_norm import Norm, NormInputs, NormWindow, gated_norm_backward, gated_norm_forward
from dtr_kernels.ops.residual import gated_residual_backward, gated_residual_forward
from dtr_kernels.sampling import Sampler

CPU = torch.device("cpu")
BF16, FP32, AUTOCAST = ITEMSIZES["bf16"], ITEMSIZES["fp32"], ITEMSIZES["autocast"]
aten = torch.ops.aten


def attention_flops(query, key, value, *rest, **options):
    return flop_counter.sdpa_flop_count(query, key, value)


def attention_backward_flops(gradient, query, key, value, *rest, **options):
    return flop_counter.sdpa_backward_flop_count(gradient, query, key, value)


def product_flops(total, left, right, *rest, **options):
    return 2 * left[0] * left[1] * right[1]


# PyTorch counts attention on a GPU only, and no products in place.
MORE = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    aten.addmm_: product_flops,
}


def counted(call) -> int:
    """The operations that PyTorch counts."""
    with FlopCounterMode(display=False, custom_mapping=MORE) as counter:
        call()
    return counter.get_total_flops()


# --- by hand ---------------------------------------------------------------------------------------------------------

# DiT-XL/2 at batch 256: T = B N = 65536 tokens of C = 1152 channels, W = int(0.8 C) = 921, H = 4C = 4608.
B, N, C, W, H, HEADS = 256, 256, 1152, 921, 4608, 16


def block(W: int, scope: str, **kind: Any) -> counts.Block:
    return counts.Block(B, N, C, W, H, HEADS, BF16, scope, nn.BlockKind(**kind))


def test_linear_layers_and_attention_of_a_large_block():
    # Linear layers: 3 C^2 (qkv) + C^2 (proj) + 4 C^2 (fc1) + 4 C^2 (fc2) = 12 C^2 weights, C^2 = 1327104, each used by
    # T tokens: 2 * 65536 * 12 * 1327104 = 131072 * 15925248. That is 2.09 TFLOP.
    dense = 2_087_354_105_856
    # adaLN, a row per sample: 2 * 256 * 6 * 1327104.
    modulation = 4_076_863_488
    # q k^T and p v: 2 * 2 * B N^2 C = 4 * 256 * 65536 * 1152. That is 0.08 TFLOP.
    attention = 77_309_411_328
    assert counts.attention_forward(B, N, C, BF16).flops == attention
    assert block(C, "block").forward().flops == dense + modulation + attention
    # The qkv layer reads 921 of 1152 channels: 231 * 3456 = 798336 weights fewer, 2 * 65536 * 798336 operations fewer:
    # 1.98 TFLOP are left. The 231 deactivated channels meet two rows per sample: 2 * 2 * 256 * 798336.
    windowed = dense - 104_639_496_192
    p_and_q = 817_496_064
    assert windowed == 1_982_714_609_664
    assert block(W, "block").forward().flops == windowed + p_and_q + modulation + attention
    # Scope "branch" has a window in fc1 too: 231 * 4608 = 1064448 weights.
    fc1 = -2 * 65536 * 1_064_448 + 2 * 2 * 256 * 1_064_448
    scope_branch = block(W, "branch").forward().flops
    assert scope_branch == windowed + p_and_q + modulation + attention + fc1


def test_a_large_block_with_half_of_its_heads():
    """Half of the rows or columns of each weight but adaLN's, half of the attention; the norms see all channels."""
    dense, modulation, attention = 2_087_354_105_856, 4_076_863_488, 77_309_411_328
    forward = block(C // 2, "inner").forward()
    assert forward.flops == modulation + (dense + attention) // 2
    training = block(C // 2, "inner").training()
    assert training.flops == 3 * modulation + (3 * dense + 7 * attention // 2) // 2
    # Read + written per token: first norm C + C, qkv C + 3C/2, attention 3C/2 + C/2, proj C/2 + C, second norm 4C, fc1
    # C + 2C, fc2 2C + C, last residual 3C: 21C, of 29C of all heads; times 65536 tokens of 1152 channels.
    # Weights: 18 C^2 less 6 C^2; biases 3C/2 + C + 2C + C + 6C. Vectors: 7C of adaLN, 2C, 2C, gates 2C.
    elements = 21 * 75_497_472 + 12 * 1_327_104 + 13_248 + 256 * 14_976
    assert forward.bytes == 2 * elements + 4 * 4 * 65_536  # mean and rstd of two norms


def test_training_of_a_large_block():
    # Every linear layer once forward and twice backward. Attention: two products forward, five backward (q k^T again,
    # then gradients of v, p, q, k), each 2 B N^2 C = 38654705664.
    dense, modulation = 2_087_354_105_856, 4_076_863_488
    expected = 3 * (dense + modulation) + 7 * 38_654_705_664
    assert block(C, "block").training().flops == expected
    # The window saves 104639496192 three times. Over the deactivated channels (q p: one row per sample is
    # 2 * 256 * 798336 = 408748032): 2 rows forward; 1 row p again, 2 rows of gradients of shift and scale; 2 rows
    # for the weight's gradient: 7.
    windowed = expected - 3 * 104_639_496_192 + 7 * 408_748_032
    assert block(W, "block").training().flops == windowed


def test_bytes_of_a_large_block():
    """Elements of 2 bytes, of which T C = 75497472 are one tensor of 151 MB."""
    # Read + written per token: first norm W + W, qkv W + 3C, attention 3C + C, proj C + C, second norm (x, branch) 2C +
    # (stream, u) 2C, fc1 C + 4C, fc2 4C + C, last residual 2C + C: 26C + 3W = 29952 + 2763 = 32715; times 65536:
    tokens = 2_144_010_240
    # Weights and biases: 12 C^2 + 6 C^2 (adaLN) = 18 * 1327104; 3C + C + 4C + C + 6C = 15C.
    weights = 23_887_872 + 17_280
    # Vectors of a sample: adaLN reads C and writes 6C; shift and scale of the first norm 2W, of p and q 2 (C - W), of
    # the second norm 2C; gates 2C: 13C; times 256:
    vectors = 3_833_856
    # Not in bf16: mean and rstd of two norms, mean * rstd for qkv, 5 * 4 bytes per token; starts for both norms and
    # qkv, 3 * 4 bytes per sample.
    others = 20 * 65_536 + 12 * 256
    expected = 2 * (tokens + weights + vectors) + others
    assert block(W, "block").forward().bytes == expected
    # Scope "branch": u of the second norm and fc1's input have W channels, and so have that norm's shift and scale, of
    # which fc1 reads the rest; fc1 reads mean * rstd and starts as well.
    less = 2 * (2 * 65_536 * 231) - 4 * 65_536 - 4 * 256
    assert block(W, "branch").forward().bytes == expected - less


def test_bytes_of_training_a_large_block():
    T = 65_536
    # Backward, per token. Last residual: gradient and branch in, gradient of branch out: 3C. fc2: weight gradient
    # C + 4C; input gradient C in, pre 4C in, gradient of pre 4C out. fc1: weight gradient 4C + C, input gradient
    # 4C + C. Second norm: x on W channels; u's and the stream's gradient, branch: 3C; gradients of x and branch: 2C.
    # proj: 2C + 2C. Attention: q, k, v, out and its gradient 5C; 3C. qkv: 3C + W, 3C + W. First norm: u's gradient W,
    # x W, the stream's gradient C; C. In all 3 + 14 + 10 + 5 + 4 + 8 + 6 + 2 = 52C, and 5W: 59904 + 4605 = 64509.
    tokens = 2 * 64_509 * T
    # Kept for it, forward: pre, 4C per token, and a number of 4 bytes per token and head.
    kept = 2 * 4_608 * T + 4 * 16 * T
    # Weights are read and their gradients written; the biases' gradients are written: 36 C^2 + 15C.
    weights = 2 * (36 * 1_327_104 + 15 * 1_152)
    # Vectors of a sample in bf16: gate of the last residual and its gradient 2C; second norm scale C, gate C; qkv
    # scale C - W, shift and scale 2 (C - W); first norm scale W; adaLN: (C + 6C) twice: 21C - 2W = 22350.
    vectors = 2 * 22_350 * 256
    # In fp32: gradients of shift and scale of two norms 4C, of the second norm's gate C, from qkv 2 (C - W): 7C - 2W.
    sums = 4 * 6_222 * 256
    # Per token 4 bytes each: mean and rstd twice; mean * rstd for both products of qkv; what deactivated channels sum
    # up to, written by qkv, read by the norm; the softmax's denominators, one per head.
    others = 4 * (4 + 2 + 2 + 16) * T
    starts = 4 * 4 * 256  # two norms, two products
    forward = block(W, "block").forward().bytes
    expected = forward + tokens + kept + weights + vectors + sums + others + starts
    assert block(W, "block").training().bytes == expected


def test_blocks_of_other_kinds():
    """RMSNorm has no mean and q alone, without p; fc1 of SwiGLU has two outputs for each that the activation has."""
    T, inactive, rms = 65_536, 231, {"norm": "rms", "affine": True, "qk_norm": True}
    less = block(W, "block").forward() - block(W, "block", **rms).forward()
    # p: one row per sample with 231 * 3456 weights. Means of two norms and mean * rstd of qkv, scale in p.
    assert less == Work(2 * B * inactive * 3456, 4 * 3 * T + 2 * B * inactive)
    less = block(W, "block").training() - block(W, "block", **rms).training()
    # Forward 1 row less; backward p, dp, and scale * dp in the weight's gradient: 4 of 7. Bytes: forward as above and
    # backward the means twice, mean * rstd of both products of qkv, what deactivated channels sum up to, written and
    # read: 9 numbers a token; of vectors the scale thrice, and its gradient.
    assert less == Work(4 * 2 * B * inactive * 3456, 4 * 9 * T + 3 * 2 * B * inactive + 4 * B * inactive)

    more = block(C, "block", activation="swiglu").forward() - block(C, "block").forward()
    assert more == Work(2 * T * C * H, 2 * (C + 1) * H)
    # fc1 again, its gradients; its pre-activation of twice the width is kept, read and has a gradient, which two
    # products read.
    more = block(C, "block", activation="swiglu").training() - block(C, "block").training()
    assert more == Work(3 * 2 * T * C * H, 2 * ((C + 1) * H + 5 * T * H + (2 * C + 1) * H))


def test_bytes_of_autocast():
    """The stream, parameters and their gradients have 4 bytes; branches, modulation and GEMM inputs have 2."""
    # x and stream 2 * 6 * 5 elements of 4 bytes; branch and u 2 * 6 * 5, gate, shift and scale 3 * 2 * 5 of 2; mean
    # and rstd 2 * 6 of 4.
    assert counts.norm_forward(2, 3, 5, 5, AUTOCAST, branch=True) == Work(bytes=4 * 60 + 2 * 60 + 2 * 30 + 4 * 12)
    # x 6 * 5 and out 6 * 7 of 2 bytes; weight 5 * 7 and bias 7 of 4.
    assert counts.linear_forward(6, 5, 7, AUTOCAST) == Work(2 * 6 * 5 * 7, 2 * (30 + 42) + 4 * 42)
    # GELU writes 6 * 7 more of 2 bytes for each tensor.
    gelu = counts.mlp_forward(2, 3, 5, 5, 7, AUTOCAST, write_pre=True)
    assert gelu == Work(420, 2 * (30 + 42) + 4 * 42 + 2 * 42)
    # x and sum 2 * 30 of 4 bytes; branch 30 and gate 10 of 2.
    assert counts.gated_residual_forward(2, 3, 5, AUTOCAST) == Work(bytes=4 * 60 + 2 * 40)
    # q, k, v and out 4 * 30 of 2 bytes.
    assert counts.attention_forward(2, 3, 5, AUTOCAST) == Work(4 * 2 * 9 * 5, 2 * 120)


def test_bytes_of_adamw_and_layer_norm():
    # DiT-S/2 has 33 million parameters: p, its gradient and two moments in, all but the gradient out, 4 bytes each.
    assert counts.adamw_step(33_000_000, 4) == Work(bytes=924_000_000)
    # 6 tokens of 5 channels, 2 bytes each: x in, out; then gradient and x in, gradient out; mean and rstd of 4 bytes.


def test_blocks_of_a_model_share_a_kernel():
    """In a model the sum after a block and the next block's norm are one pass: the sum is not read again."""
    block = counts.Block(4, 6, 8, 5, 32, 2, BF16, "block")
    forward, one_more = (counts.dit_forward(counts.Dit(block, depth, 16, 32)).bytes for depth in (3, 4))
    # For each of 24 tokens, a block alone reads 2C and writes C at its end, reads W and writes W at its start; one
    # among others reads 2C, writes C and W. Gate, shift, scale and statistics are the same.
    assert one_more - forward == block.forward().bytes - 2 * 24 * 5


# --- by PyTorch's counter --------------------------------------------------------------------------------------------


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


MODERN = nn.BlockKind(norm="rms", affine=True, activation="swiglu", qk_norm=True)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("kind", [nn.BlockKind(), MODERN, nn.BlockKind(activation="silu")])
def test_operations_of_the_reference_block(heads, kind, seed):
    B, N, C = 3, 10, 32
    module = nn.RoutedDiTBlock(C, heads, kind=kind)
    x, c = leaf(B, N, C), leaf(B, C)
    block = counts.Block(B, N, C, C, 4 * C, heads, FP32, "block", kind)
    assert counted(lambda: reference.dit_block(module, x, c)) == block.forward().flops
    assert counted(lambda: reference.dit_block(module, x, c).sum().backward()) == block.training().flops


def test_operations_of_the_reference_model(seed):
    model = make_dit(TINY, CPU, torch.float32)
    B, (_, N, C) = 3, model.pos_embed.shape
    block = counts.Block(B, N, C, C, 4 * C, 4, FP32, "block")
    dit = counts.Dit(block, len(model.blocks), 4 * model.in_channels, 4 * model.out_channels)
    x = torch.randn(B, model.in_channels, model.input_size, model.input_size)
    t, y = torch.randint(1000, (B,)), torch.randint(1000, (B,))
    assert counted(lambda: reference.dit(model, x, t, y)) == counts.dit_forward(dit).flops
    training = counted(lambda: reference.dit(model, x, t, y).sum().backward())
    assert training == counts.dit_training(dit).flops


def test_operations_that_a_sampler_leaves_out(seed, monkeypatch):
    monkeypatch.setattr("dtr_kernels.ops.dispatch.LEAST_ELEMENTS_ON_CPU", 1 << 30)  # kernels are not counted
    model = make_dit(TINY, CPU, torch.float32).eval()
    B, C = 3, model.hidden_size
    x = torch.randn(B, model.in_channels, model.input_size, model.input_size)
    sampler = Sampler(model, y=torch.arange(B))
    for _ in range(2):  # modulations are computed, then compared once
        sampler(x, 5)
    left_out = counted(lambda: model(x, 5, torch.arange(B))) - counted(lambda: sampler(x, 5))
    assert left_out == counts.dit_modulations(B, C, len(model.blocks), FP32).flops > 0


# --- by what launchers touch -----------------------------------------------------------------------------------------


def nbytes(*tensors: torch.Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class Launched:
    """Inputs of the launchers, whose windows start at different channels, and what they return."""

    B, N, C, W, O = 3, 40, 24, 17, 50

    def __init__(self, dtype: torch.dtype, operand: torch.dtype) -> None:
        B, N, C, O = self.B, self.N, self.C, self.O
        self.start = torch.tensor([0, 3, 7], dtype=torch.int32)
        self.x, self.dstream = torch.randn(2, B, N, C).to(dtype)
        self.branch = torch.randn(B, N, C).to(operand)
        self.shift, self.scale, self.gate = torch.randn(3, B, C).to(operand)
        self.weight, self.bias = torch.randn(O, C).to(operand), torch.randn(O).to(operand)
        self.g = torch.randn(B, N, O).to(operand)
        self.dtype, self.operand = dtype, operand

    def inputs(self, branch: bool) -> NormInputs:
        return NormInputs(self.x, self.shift, self.scale, *((self.branch, self.gate) if branch else ()))

    def forward(self, branch: bool, compact: bool, keep_branch: bool):
        window = NormWindow(self.start, self.W, compact, keep_branch)
        return gated_norm_forward(self.inputs(branch), window, Norm(1e-6), self.operand)

    def backward(self, out, branch: bool, compact: bool, keep_branch: bool):
        self.inactive = torch.randn(self.B, self.N) if compact else None
        return gated_norm_backward(
            torch.randn(out.u.shape).to(self.operand),
            self.dstream if branch else None,
            self.inactive,
            self.inputs(branch),
            out.mean,
            out.rstd,
            NormWindow(self.start, self.W, compact, keep_branch),
        )


PRECISIONS = [
    ("fp32", torch.float32, torch.float32),
    ("bf16", torch.bfloat16, torch.bfloat16),
    ("autocast", torch.float32, torch.bfloat16),
]
# There is a branch; u is compact; the branch is kept on all channels.
FORMS = [(False, True, False), (True, True, False), (False, False, False), (True, False, False), (True, False, True)]


@pytest.mark.parametrize("precision, dtype, operand", PRECISIONS)
@pytest.mark.parametrize("branch, compact, keep_branch", FORMS)
def test_bytes_of_the_norm_launchers(seed, precision, dtype, operand, branch, compact, keep_branch):
    run = Launched(dtype, operand)
    sizes = run.B, run.N, run.C, run.W, ITEMSIZES[precision], branch, compact
    window, modulated = slice(run.W), slice(run.W if compact else None)
    shift, scale = run.shift[:, modulated], run.scale[:, modulated]
    pending = (run.branch, run.gate) if branch else ()

    out = run.forward(branch, compact, keep_branch)
    x = run.x if branch else run.x[..., window]
    assert counts.norm_forward(*sizes).bytes == nbytes(x, shift, scale, run.start, *pending, *out[:4])

    gradients = run.backward(out, branch, compact, keep_branch)
    read = (out.u, out.mean, out.rstd, run.x[..., window], scale, run.start, run.inactive, *pending)
    dstream = run.dstream if branch else None
    assert counts.norm_backward(*sizes, dstream=branch).bytes == nbytes(*read, dstream, *gradients)


def test_norm_launchers_read_no_deactivated_channel_of_x(seed):
    run = Launched(torch.float32, torch.float32)
    outs = {form: run.forward(*form) for form in FORMS}
    for x, first in zip(run.x, run.start.tolist(), strict=True):
        x[:, :first] = x[:, first + run.W :] = float("nan")
    for form, out in outs.items():
        branch, *_ = form
        assert branch or torch.equal(run.forward(*form).u, out.u)
        assert all(gradient.isfinite().all() for gradient in run.backward(out, *form) if gradient is not None)


@pytest.mark.parametrize("precision, dtype, operand", PRECISIONS)
def test_bytes_of_the_residual_launchers(seed, precision, dtype, operand):
    run = Launched(dtype, operand)
    sizes = run.B, run.N, run.C, ITEMSIZES[precision]
    out = gated_residual_forward(run.x, run.branch, run.gate)
    assert counts.gated_residual_forward(*sizes).bytes == nbytes(run.x, run.branch, run.gate, out)
    gradients = gated_residual_backward(run.dstream, run.branch, run.gate)
    assert counts.gated_residual_backward(*sizes).bytes == nbytes(run.dstream, run.branch, run.gate, *gradients)


@pytest.fixture
def layer(seed):
    """A window's linear layer in fp32: its launchers, given all of their inputs but those that a test changes."""
    run = Launched(torch.float32, torch.float32)
    run.out = run.forward(branch=False, compact=True, keep_branch=False)
    run.mean_rstd = run.out.mean * run.out.rstd
    run.closed = linear_ops.ClosedForm(run.mean_rstd, run.shift, run.scale, run.start)
    run.sizes = run.B, run.N, run.C, run.W, run.O, FP32
    # The closed form reads the deactivated channels of shift and scale, wherever they are.
    run.of_inactive = run.shift[:, run.W :], run.scale[:, run.W :]
    return run


def test_work_of_the_window_linear_launcher(layer):
    B, N, _, W, O, _ = layer.sizes
    inputs = (layer.out.u, layer.closed, layer.weight, layer.bias)
    out = linear_ops.window_linear_forward(*inputs)
    work = counts.window_linear_forward(*layer.sizes)
    read = (layer.out.u, layer.mean_rstd, *layer.of_inactive, layer.weight, layer.bias, layer.start)
    assert work.bytes == nbytes(*read, out)
    # By hand: 17 of 24 channels for 120 tokens, 7 for two rows of 3 samples, 50 outputs.
    assert work.flops == 2 * 120 * 17 * 50 + 2 * 6 * 7 * 50
    # The launcher multiplies p and q's rows on active channels too, with zeros, and starts from a rank-one product.
    spent = counted(lambda: linear_ops.window_linear_forward(*inputs))
    assert spent == work.flops + 4 * B * W * O + 2 * B * N * O


def test_work_of_the_window_linear_gradients(layer):
    B, N, _, W, O, _ = layer.sizes

    def gradients(parameters: bool):
        return linear_ops.window_linear_backward(
            layer.g, layer.out.u, layer.closed, layer.weight, need_weight=parameters, need_bias=parameters
        )

    found = gradients(True)
    shift, scale = layer.of_inactive
    of_input = (layer.g, layer.mean_rstd, scale, layer.weight, layer.start)
    of_input += (found.u, found.inactive, found.shift[:, W:], found.scale[:, W:])
    of_weight = (layer.g, layer.out.u, layer.mean_rstd, shift, scale, layer.start, found.weight, found.bias)
    input_only = counts.window_linear_gradients(*layer.sizes, parameters=False)
    both = counts.window_linear_gradients(*layer.sizes)
    assert input_only.bytes == nbytes(*of_input) and both.bytes == nbytes(*of_input, *of_weight)
    # By hand, as above: p is one row for each sample, dp and dq are two, each to and from the 7 deactivated channels.
    assert input_only.flops == 2 * 120 * 17 * 50 + 2 * 3 * 7 * 50 + 2 * 6 * 7 * 50
    assert both.flops == input_only.flops + 2 * 120 * 17 * 50 + 2 * 6 * 7 * 50
    # The launcher computes all of these on active channels too, and sums over tokens as products of 3 rows.
    spent = counted(lambda: gradients(False))
    zeros = 2 * B * W * O + 4 * B * W * O
    assert spent == input_only.flops + zeros + 6 * B * N * O
    assert counted(lambda: gradients(True)) == both.flops + zeros + 6 * B * N * O + 4 * B * W * O


def test_work_of_the_gelu_launchers(layer):
    B, N, C, _, O, _ = layer.sizes
    inputs = (layer.out.u, layer.closed, layer.weight, layer.bias)
    read = (layer.out.u, layer.mean_rstd, *layer.of_inactive, layer.weight, layer.bias, layer.start)
    for write_pre in (False, True):
        written = linear_ops.linear_activation_forward(*inputs, "gelu_tanh", write_pre)
        work = counts.mlp_forward(*layer.sizes, write_pre)
        assert work == Work(counts.window_linear_forward(*layer.sizes).flops, nbytes(*read, *written))

    pre, g = written[0], torch.randn(B, N, C)
    weight = torch.randn(C, O)
    written = linear_ops.activation_linear_backward(g, pre, weight, "gelu_tanh")
    work = counts.mlp_backward(B, N, O, C, FP32, write_act=True)
    spent = counted(lambda: linear_ops.activation_linear_backward(g, pre, weight, "gelu_tanh"))
    assert work == Work(spent, nbytes(g, pre, weight, *written))
    assert counts.mlp_backward(B, N, O, C, FP32, write_act=False).bytes == work.bytes - written[1].nbytes


def test_all_channels_active_is_the_linear_layer():
    for window_form, dense_form in (
        (counts.window_linear_forward, counts.linear_forward),
        (partial(counts.window_linear_gradients, parameters=False), partial(counts.linear_gradients, parameters=False)),
        (counts.window_linear_gradients, counts.linear_gradients),
    ):
        assert window_form(2, 3, 5, 5, 7, AUTOCAST) == dense_form(6, 5, 7, AUTOCAST)
