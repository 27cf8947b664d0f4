"""torch.compile, autocast inside of it, CUDA graphs: nothing breaks a graph, compiles again per timestep or waits."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from gpu_waits import capture, waiting_is_an_error
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import dtr_kernels as dtr

B, N, C, HEADS, H, T = 2, 3, 32, 4, 48, 20
ROUTING = dtr.DenoisingTaskRouting(T)
OPS = torch.ops.dtr_kernels
pytestmark = pytest.mark.usefixtures("fresh_compiler")


# --- the registered ops ----------------------------------------------------------------------------------------------


class Inputs:
    """Random tensors of one dtype and device for an op."""

    def __init__(self, device, dtype, grad=True):
        self.device, self.dtype, self.grad = device, dtype, grad

    def __call__(self, *shape, grad=None):
        tensor = torch.randn(*shape, device=self.device).to(self.dtype)
        return tensor.requires_grad_(self.grad if grad is None else grad)

    def modulation(self):
        """Shift, scale and gate as views of one tensor, as adaLN gives them."""
        vectors = torch.randn(B, 6 * C, device=self.device).to(self.dtype)
        return [vector.detach().requires_grad_(self.grad) for vector in vectors.chunk(6, dim=1)[:3]]


def starts(device, *values):
    return torch.tensor(values, dtype=torch.int32, device=device)


def windows(device):
    """(start, width): unrouted, one window per sample, one for the batch."""
    return {"unrouted": (None, C), "windowed": (starts(device, 0, 7), 25), "shared": (starts(device, 5, 5), 25)}


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("branch", [False, True], ids=["", "branch"])
@pytest.mark.parametrize("window", ["unrouted", "windowed", "shared"])
@pytest.mark.parametrize("norm", dtr.reference.NORMS)
def test_routed_linear_is_a_proper_op(device, norm, window, branch, dtype):
    inputs = Inputs(device, dtype)
    shift, scale, gate = inputs.modulation()
    residual = (inputs(B, N, C), gate) if branch else (None, None)
    opcheck(
        OPS.routed_linear,
        (inputs(B, N, C), shift, scale, inputs(H, C), inputs(H), *residual, *windows(device)[window], 1e-6, norm),
    )


@DTYPES
@pytest.mark.parametrize("window, keep_branch", [("unrouted", False), ("windowed", False), ("windowed", True)])
@pytest.mark.parametrize("norm, activation", [("layer", "gelu_tanh"), ("layer", "silu"), ("rms", "swiglu")])
def test_routed_mlp_is_a_proper_op(device, norm, activation, window, keep_branch, dtype):
    inputs = Inputs(device, dtype)
    shift, scale, gate = inputs.modulation()
    rows = 2 * H if activation == "swiglu" else H
    weights = inputs(rows, C), inputs(rows), inputs(C, H), inputs(C)
    start, width = windows(device)[window]
    opcheck(
        OPS.routed_mlp,
        (
            inputs(B, N, C),
            shift,
            scale,
            *weights,
            inputs(B, N, C),
            gate,
            start,
            width,
            keep_branch,
            1e-6,
            norm,
            activation,
            True,
        ),
    )


@pytest.mark.parametrize("window", ["unrouted", "windowed"])
@pytest.mark.parametrize("train", ["nothing", "modulation", "biases"])
def test_ops_without_biases_and_with_frozen_inputs(device, train, window):
    """Each input that needs no gradient takes a way of its own through the backward pass."""
    inputs = Inputs(device, torch.float32, grad=train == "modulation")
    frozen = Inputs(device, torch.float32, grad=False)
    shift, scale, gate = inputs.modulation()
    x, branch, start_width = frozen(B, N, C), frozen(B, N, C), windows(device)[window]
    bias, fc1_bias, fc2_bias = [frozen(size, grad=True) if train == "biases" else None for size in (H, H, C)]
    opcheck(OPS.routed_linear, (x, shift, scale, frozen(H, C), bias, None, None, *start_width, 1e-6, "layer"))
    weights = frozen(H, C), fc1_bias, frozen(C, H), fc2_bias
    training = train != "nothing"
    opcheck(
        OPS.routed_mlp,
        (x, shift, scale, *weights, branch, gate, *start_width, False, 1e-6, "layer", "gelu_tanh", training),
    )


@pytest.mark.parametrize("needed", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("window", ["unrouted", "windowed"])
@pytest.mark.parametrize("kind", dtr.reference.NORMS)
def test_backward_ops_are_proper_ops(device, kind, window, needed):
    """Without autograd of their own, and with outputs that are empty where a parameter needs no gradient."""
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    new, (start, width) = Inputs(device, torch.float32, grad=False), windows(device)[window]
    x, branch, dstream, dout = (new(B, N, C) for _ in range(4))
    shift, scale, gate = new.modulation()
    norm, update = (x, shift, scale), (branch, gate)
    opcheck(OPS.gated_residual_backward, (dout, branch, gate), **checks)

    weight = new(C, C)
    stream, _, mean, rstd = OPS.routed_linear(*norm, weight, None, *update, start, width, 1e-6, kind)
    saved = *norm[1:], weight, *update, start, width, 1e-6, kind, mean, rstd
    opcheck(OPS.routed_linear_backward, (dstream, dout, stream, *saved, needed, needed), **checks)

    fc1, fc2 = new(H, C), new(C, H)
    settings = *update, start, width, False, 1e-6, kind, "gelu_tanh"
    _, _, pre, mean, rstd = OPS.routed_mlp(*norm, fc1, None, fc2, None, *settings, True)
    saved = *norm, fc1, fc2, *settings, pre, mean, rstd
    opcheck(OPS.routed_mlp_backward, (dstream, dout, *saved, [needed] * 4), **checks)


@DTYPES
def test_gated_residual_is_a_proper_op(device, dtype):
    inputs = Inputs(device, dtype)
    opcheck(OPS.gated_residual, (inputs(B, N, C), inputs(B, N, C), inputs.modulation()[2]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.bfloat16], ids=str)
def test_ops_of_routing_are_proper_ops(device, dtype):
    opcheck(OPS.window_starts, (torch.tensor([0, 1], device=device).to(dtype), T, 4.0, 7))
    if not dtype.is_floating_point:
        opcheck(OPS.random_masks, (torch.tensor([3, 3, 19], device=device).to(dtype), T, 0.5, 0, C))


# --- compiled blocks -------------------------------------------------------------------------------------------------


class RoutedBlock(torch.nn.Module):
    """A block that makes its own windows from timesteps, as a model does."""

    def __init__(self, scope="block", routing=ROUTING, kind=dtr.nn.BlockKind()):  # noqa: B008
        super().__init__()
        self.block = dtr.nn.RoutedDiTBlock(C, HEADS, scope=scope, kind=kind)
        self.routing = routing

    def forward(self, x, c, t):
        if isinstance(self.routing, dtr.RandomRouting):
            return self.block(x, c, self.routing.mask(t, self.block.routed_channels))
        return self.block(x, c, self.routing.window(t, self.block.routed_channels))


def make_batch(device, batch=B, dtype=torch.float32):
    x = torch.randn(batch, N, C, device=device, dtype=dtype, requires_grad=True)
    c = torch.randn(batch, C, device=device, dtype=dtype, requires_grad=True)
    return x, c, torch.randint(T, (batch,), device=device)


def results(module, function, x, c, *rest):
    """The output of function, and the gradients of x, c and all parameters of module."""
    out = function(x, c, *rest)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    return out, torch.autograd.grad((out * weights).sum(), [x, c, *module.parameters()])


@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
@pytest.mark.parametrize("routed", [False, True], ids=["unrouted", "windowed"])
def test_compiled_block_equals_the_eager_one(seed, device, routed, scope):
    block = dtr.nn.RoutedDiTBlock(C, HEADS, scope=scope).to(device)
    x, c, t = make_batch(device)
    window = ROUTING.window(t, block.routed_channels) if routed else None
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(block, compiled, x, c, window), results(block, block, x, c, window))


@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
@pytest.mark.parametrize("routing", [ROUTING, dtr.RandomRouting(T)], ids=["window", "random"])
def test_routing_compiles_with_the_block(seed, device, routing, scope):
    module = RoutedBlock(scope, routing).to(device)
    batch = make_batch(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(module, compiled, *batch), results(module, module, *batch))


@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
def test_blocks_of_another_kind_compile(seed, device, scope):
    kind = dtr.nn.BlockKind(norm="rms", affine=True, activation="swiglu", qk_norm=True)
    module, batch = RoutedBlock(scope, kind=kind).to(device), make_batch(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(module, compiled, *batch), results(module, module, *batch))


def test_compiled_continuous_time_and_timesteps_out_of_range(seed, device):
    module = RoutedBlock().to(device)
    x, c, numbers = make_batch(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for t in (torch.rand(B, device=device), numbers):
        torch.testing.assert_close(compiled(x, c, t), module(x, c, t))
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"t must be in 0\.\.19"):
            compiled(x, c, torch.tensor([0, T]))


def test_default_compiler(seed, device):
    """Inductor generates its own code around the ops, so it is close and not equal."""
    module = RoutedBlock().to(device)
    batch = make_batch(device)
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(results(module, compiled, *batch), results(module, module, *batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
def test_autocast_inside_a_compiled_region(seed, device, scope, dtype):
    """The stream stays fp32, and GEMMs run in the autocast dtype: as in eager mode to its last bit, or nearly."""
    module = RoutedBlock(scope).to(device)
    batch = make_batch(device)

    def step(x, c, t):
        with torch.autocast(device.type, dtype=dtype):
            return module(x, c, t)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    out, gradients = results(module, compiled, *batch)
    assert out.dtype == torch.float32 and all(gradient.dtype == torch.float32 for gradient in gradients)
    expected = results(module, step, *batch)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close((out, gradients), expected, rtol=tolerance, atol=tolerance)
    assert not torch.equal(expected[0], module(*batch)), "autocast changed nothing"


def test_autocast_around_a_compiled_block(seed, device):
    module = RoutedBlock().to(device)
    batch = make_batch(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out, expected = compiled(*batch), module(*batch)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0.03, atol=0.03)
    torch.testing.assert_close(compiled(*batch), module(*batch))  # and without it the same module runs in fp32


# --- how often it compiles -------------------------------------------------------------------------------------------


def compilations(module, calls, backend="eager"):
    """How many graphs were compiled after each call; every call is compared with eager mode."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    counts = []
    for arguments in calls:
        out, expected = compiled(*arguments), module(*arguments)
        torch.testing.assert_close(out, expected)
        if out.requires_grad:
            out.sum().backward()
        counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
def test_new_timesteps_do_not_compile_again(seed, device, scope):
    calls = [(*make_batch(device)[:2], torch.tensor(t, device=device)) for t in ([0, 19], [5, 5], [19, 0], [18, 1])]
    assert compilations(RoutedBlock(scope).to(device), calls) == [1, 1, 1, 1]


@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
def test_new_windows_do_not_compile_again(seed, device, scope):
    """The same where the window is made outside of the compiled block."""
    block = dtr.nn.RoutedDiTBlock(C, HEADS, scope=scope).to(device)
    calls = [(x, c, ROUTING.window(t, block.routed_channels)) for x, c, t in (make_batch(device) for _ in range(4))]
    assert compilations(block, calls) == [1, 1, 1, 1]


@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
def test_new_batch_sizes_compile_once_more(seed, device, scope):
    """The second size makes the batch dynamic, and every other size then runs the same graph, at other timesteps
    too."""
    calls = [make_batch(device, batch) for batch in (4, 4, 2, 7, 3, 16, 4)]
    backend = "aot_eager" if scope == "block" else "eager"  # which traces alike, in half the time
    assert compilations(RoutedBlock(scope).to(device), calls, backend) == [1, 1, 2, 2, 2, 2, 2]


def test_new_batch_sizes_of_the_plain_path_compile_once_more(seed, device, monkeypatch):
    """The reason for the path, which names a size, is no part of the graph."""
    monkeypatch.setattr("dtr_kernels.ops.dispatch.LEAST_ELEMENTS_ON_CPU", 1 << 30)
    calls = [make_batch(device, batch) for batch in (4, 2, 7, 3)]
    assert compilations(RoutedBlock().to(device), calls) == [1, 2, 2, 2]


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
def test_a_sampling_loop_compiles_twice_at_most(seed, device, outside):
    """With Python-number timesteps: once for the first and once for all others, the last ones included."""
    module = RoutedBlock().to(device)
    x, c, _ = make_batch(device)
    calls = [(x, c, ROUTING.window(t, C) if outside else t) for t in (19, 18, 16, 13, 9, 4, 1, 0)]
    with torch.no_grad():
        counts = compilations(module.block if outside else module, calls)
    assert counts[-1] <= 2


def test_a_compiled_model_samples_without_compiling_at_every_step(seed, device):
    sizes = {"input_size": 4, "hidden_size": C, "depth": 2, "num_heads": HEADS, "num_classes": 5}
    model = dtr.nn.DiT(**sizes, routing=ROUTING).to(device).eval()
    x, y = torch.randn(B, 4, 4, 4, device=device), torch.tensor([0, 5], device=device)
    with torch.no_grad():
        for layer in (*model.blocks, model.final_layer):  # they start at zero
            torch.nn.init.normal_(layer.adaLN_modulation[1].weight)
        torch.nn.init.normal_(model.final_layer.linear.weight, std=C**-0.5)
        counts = compilations(model, [(x, t, y) for t in (19, 17, 12, 6, 2, 0)])
    assert counts[-1] <= 2


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
def test_a_captured_block_follows_its_timesteps(seed, scope, backward, dtype):
    """A replay reads the timesteps that the static tensor holds then, not those it was captured with."""
    module = RoutedBlock(scope).to("cuda", dtype)
    x, c, t = make_batch("cuda", dtype=dtype)

    def forward(x, c, t):
        with torch.no_grad():
            return (module(x, c, t),)

    def both(x, c, t):
        out, gradients = results(module, module, x, c, t)
        return (out.detach(), *gradients)

    function = both if backward else forward
    t.copy_(torch.tensor([0, 9]))
    graph, outputs = capture(function, x, c, t)
    seen = []
    for timesteps in ([0, 9], [19, 18], [16, 0]):
        t.copy_(torch.tensor(timesteps))
        graph.replay()
        seen.append(outputs[0].clone())
        torch.testing.assert_close(outputs, function(x, c, t))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
def test_a_training_step_never_waits_for_the_gpu(seed, scope, autocast):
    module = RoutedBlock(scope).cuda()
    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    batch = make_batch("cuda")

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            loss = module(*batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # compiles the kernels
    with waiting_is_an_error():
        step()
    assert all(not torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.gpu
def test_a_sampling_step_never_waits_for_the_gpu(seed):
    """Timesteps as Python numbers, for which the host knows the window."""
    module = RoutedBlock().cuda()
    x, c, _ = make_batch("cuda")
    with torch.no_grad():
        module(x, c, 0)
        with waiting_is_an_error():
            out = module(x, c, 19)
        torch.testing.assert_close(out, module(x, c, torch.full((B,), 19, device="cuda")))
