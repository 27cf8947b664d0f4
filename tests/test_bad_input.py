"""Bad input is refused before anything is computed, by a message with the argument, what it is and what it may be.

On a GPU a t out of range is a device-side assertion, after which the process cannot use the GPU any more: not tested.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch
from refusals import refused

import dtr_kernels as dtr
from dtr_kernels import ops
from dtr_kernels.ops.dispatch import runs_on_cpu

B, N, C, H, T = 2, 3, 32, 48, 20
ROUTING = dtr.DenoisingTaskRouting(T)
RANDOM = dtr.RandomRouting(T)


def starts(*values, dtype=torch.int32, device="cpu"):
    return torch.tensor(values, dtype=dtype, device=device)


# --- routing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", [dtr.DenoisingTaskRouting, dtr.RandomRouting])
@pytest.mark.parametrize(
    "arguments, error, fragments",
    [
        *(({"beta": beta}, ValueError, ["beta", "(0, 1]", f"got {beta}"]) for beta in (0, -0.25, 1.5, math.nan)),
        *(({"num_timesteps": n}, ValueError, ["num_timesteps", "at least 1", f"got {n}"]) for n in (0, -5)),
        *(({"num_timesteps": n}, TypeError, ["num_timesteps", "an integer", f"got {n}"]) for n in (1000.0, True)),
        ({"beta": "0.8"}, TypeError, ["beta", "a number", "got '0.8'"]),
    ],
    ids=str,
)
def test_routing_arguments(routing, arguments, error, fragments):
    refused(lambda: routing(**arguments), error, fragments)


def test_settings_of_one_routing_of_another_type():
    refused(lambda: dtr.DenoisingTaskRouting(float_timesteps=1), TypeError, ["float_timesteps", "True or False", "1"])
    refused(lambda: dtr.DenoisingTaskRouting(alpha=None), TypeError, ["alpha", "a number", "None"])
    refused(lambda: dtr.RandomRouting(seed=0.5), TypeError, ["seed", "an integer", "0.5"])
    refused(lambda: dtr.RandomRouting(seed=-1), ValueError, ["seed", "at least 0", "-1"])
    refused(lambda: RANDOM.mask(3, C), TypeError, ["t must be a tensor", "int"])
    refused(lambda: ROUTING.window(3, 8.0), TypeError, ["channels", "an integer", "8.0"])


@pytest.mark.parametrize("alpha", [0, -4.0, math.nan])
def test_alpha(alpha):
    refused(lambda: dtr.DenoisingTaskRouting(alpha=alpha), ValueError, ["alpha", "greater than 0", f"got {alpha}"])


@pytest.mark.parametrize(
    "t, fragments",
    [
        (starts(3, T), ["0..19", f"num_timesteps={T}", "from 3 to 20"]),
        (starts(-1, 3), ["0..19", f"num_timesteps={T}", "from -1 to 3"]),
        (starts(3, T, dtype=torch.uint8), ["0..19", "from 3 to 20"]),
        (T, ["0..19", f"num_timesteps={T}", "20"]),
        (-1, ["0..19", f"num_timesteps={T}", "-1"]),
        (torch.tensor([0.5, 1.5]), ["[0, 1]", "from 0.5 to 1.5", "integer dtype"]),
        (torch.tensor([-0.25, 1.0]), ["[0, 1]", "from -0.25 to 1.0"]),
        (torch.tensor([0.5, math.nan]), ["[0, 1]", "nan"]),
        (1.5, ["[0, 1]", "1.5", "integer dtype"]),
        (-0.5, ["[0, 1]", "-0.5"]),
        (math.nan, ["[0, 1]", "nan"]),
        (torch.tensor([True, False]), ["vector [B]", "integer timesteps", "torch.bool"]),
        (torch.tensor([0.5j, 0.5j]), ["vector [B]", "integer timesteps", "torch.complex64"]),
        (starts(1, 2)[None], ["vector [B]", "[1, 2]"]),
        (torch.tensor(3), ["vector [B]", "[]"]),
        (True, ["t must", "True"]),
    ],
    ids=str,
)
def test_timesteps(t, fragments):
    refused(lambda: ROUTING.window(t, C), ValueError, ["t must", *fragments])


@pytest.mark.parametrize("t", [[1, 2], None, "3"], ids=repr)
def test_timesteps_of_another_type(t):
    refused(lambda: ROUTING.window(t, C), TypeError, ["t must", type(t).__name__])


@pytest.mark.parametrize(
    "t, fragments",
    [
        (starts(3, T), ["0..19", f"num_timesteps={T}", "from 3 to 20"]),
        (starts(-1), ["0..19", "from -1 to -1"]),
        (torch.tensor([0.5]), ["integer timesteps", "torch.float32"]),
        (torch.tensor([True]), ["integer timesteps", "torch.bool"]),
        (starts(1, 2)[None], ["vector [B]", "[1, 2]"]),
    ],
    ids=str,
)
def test_timesteps_of_random_routing(t, fragments):
    refused(lambda: RANDOM.mask(t, C), ValueError, ["t must", *fragments])


@pytest.mark.parametrize(
    "window",
    [
        lambda beta, channels: dtr.DenoisingTaskRouting(T, beta=beta).window(3, channels),
        lambda beta, channels: dtr.RandomRouting(T, beta).mask(starts(3), channels),
    ],
    ids=["window", "random"],
)
@pytest.mark.parametrize(
    "beta, channels, fragments",
    [
        (0.01, 32, ["beta 0.01", "32 channels", "at least 1/32 = 0.03125"]),
        (0.8, 0, ["channels", "at least 1", "got 0"]),
        (0.8, -5, ["channels", "at least 1", "got -5"]),
    ],
)
def test_no_channel_left(window, beta, channels, fragments):
    refused(lambda: window(beta, channels), ValueError, fragments)


@pytest.mark.parametrize(
    "start, width, fragments",
    [
        (starts(1, dtype=torch.int64), 3, ["start", "int32 tensor of shape [B]", "torch.int64"]),
        (starts(1)[None], 3, ["start", "int32 tensor of shape [B]", "[1, 1]"]),
        (starts(1)[0], 3, ["start", "int32 tensor of shape [B]", "[]"]),
        (starts(1), 0, ["width", "between 1 and channels (8)", "got 0"]),
        (starts(1), -1, ["width", "between 1 and channels (8)", "got -1"]),
        (starts(1), 9, ["width", "between 1 and channels (8)", "got 9"]),
    ],
)
def test_channel_window(start, width, fragments):
    refused(lambda: dtr.ChannelWindow(start, width, channels=8), ValueError, fragments)


@pytest.mark.parametrize("batch, device, fragments", [(3, "cpu", ["2", "3"]), (2, "meta", ["cpu", "meta"])])
def test_window_for_another_batch_or_device(batch, device, fragments):
    window = ROUTING.window(starts(1, 2), C)
    refused(lambda: window.for_batch(batch, torch.device(device)), ValueError, ["window", *fragments])


# --- ops -------------------------------------------------------------------------------------------------------------


def inputs_of(op):
    """Good inputs of an op by name; a case changes some of them."""
    stream = {"x": torch.randn(B, N, C), "branch": torch.randn(B, N, C), "gate": torch.randn(B, C)}
    modulation = {"shift": torch.randn(B, C), "scale": torch.randn(B, C), "window": ROUTING.window(starts(1, 19), C)}
    if op is ops.gated_residual:
        return stream
    if op in INNER:
        modulation["window"] = ROUTING.window(starts(1, 19), HEADS)
    if op is ops.inner_projection:
        return {"x": torch.randn(B, N, 24), "weight": torch.randn(H, C), "window": modulation["window"]} | {
            "bias": None
        }
    if op in (ops.routed_linear, ops.inner_linear):
        return {**stream, **modulation, "weight": torch.randn(H, C), "bias": torch.randn(H)}
    fc1 = {"fc1_weight": torch.randn(H, C), "fc1_bias": torch.randn(H)}
    return {**stream, **modulation, **fc1, "fc2_weight": torch.randn(C, H), "fc2_bias": torch.randn(C)}


HEADS = 4
INNER = [ops.inner_linear, ops.inner_mlp, ops.inner_projection]
WINDOWED = [ops.routed_linear, ops.routed_mlp]
ROUTED = WINDOWED + INNER[:2]
ALL = [*ROUTED, ops.gated_residual]
MLPS = [ops.routed_mlp, ops.inner_mlp]

STREAM_CASES = [
    (ALL, "x", lambda x: x.long(), TypeError, ["x must", "floating point", "torch.int64", "x.float()"]),
    (ALL, "x", lambda x: x > 0, TypeError, ["x must", "floating point", "torch.bool"]),
    (ALL, "x", lambda x: x[0], ValueError, ["x must", "[B, N, C]", "[3, 32]"]),
    (ALL, "x", lambda x: x[None], ValueError, ["x must", "[B, N, C]", "[1, 2, 3, 32]"]),
    (ALL, "branch", lambda x: x.long(), TypeError, ["branch", "floating point", "torch.int64"]),
    (ALL, "branch", lambda x: x[:, :1], ValueError, ["branch", "[2, 3, 32]", "[2, 1, 32]"]),
    (ALL, "branch", lambda x: x[:1], ValueError, ["branch", "[2, 3, 32]", "[1, 3, 32]"]),
    (ALL, "branch", lambda x: x[..., :16], ValueError, ["branch", "[2, 3, 32]", "[2, 3, 16]"]),
    (ALL, "branch", lambda x: x.to("meta"), ValueError, ["branch", "meta", "cpu"]),
    (ALL, "branch", lambda x: None, ValueError, ["branch", "gate", "both"]),
    (ALL, "gate", lambda x: None, ValueError, ["branch", "gate", "both"]),
    (ALL, "gate", lambda x: x[:1], ValueError, ["gate", "[2, 32]", "[1, 32]"]),
    (ALL, "gate", lambda x: x[:, None], ValueError, ["gate", "[2, 32]", "[2, 1, 32]"]),
    (ALL, "gate", lambda x: x.to("meta"), ValueError, ["gate", "meta", "cpu"]),
    (ROUTED, "x", lambda x: x.to("meta"), ValueError, ["meta", "cpu"]),
    (ROUTED, "shift", lambda x: x[:, :5], ValueError, ["shift", "[2, 32]", "[2, 5]"]),
    (ROUTED, "shift", lambda x: x.int(), TypeError, ["shift", "floating point", "torch.int32"]),
    (ROUTED, "scale", lambda x: x[:1], ValueError, ["scale", "[2, 32]", "[1, 32]"]),
    (ROUTED, "scale", lambda x: x.to("meta"), ValueError, ["scale", "meta", "cpu"]),
    (ROUTED, "window", lambda w: "first half", TypeError, ["window", "ChannelWindow", "str"]),
    (ROUTED, "window", lambda w: w.mask(), TypeError, ["window", "ChannelWindow", "Tensor"]),
    (WINDOWED, "window", lambda w: ROUTING.window(starts(1, 2), 16), ValueError, ["window", "16 channels", "32"]),
    (ROUTED, "window", lambda w: ROUTING.window(starts(1, 2, 3), C), ValueError, ["window", "3 samples", "2"]),
    (ROUTED, "window", lambda w: window_on("meta"), ValueError, ["window", "meta", "cpu"]),
    (ROUTED, "norm", lambda _: "batch", ValueError, ["norm must be one of 'layer', 'rms'", "'batch'"]),
    (ROUTED, "eps", lambda _: None, TypeError, ["eps must be a number", "None"]),
    (ROUTED, "eps", lambda _: float("nan"), ValueError, ["eps must be finite and not negative", "nan"]),
    (ROUTED, "eps", lambda _: -1e-6, ValueError, ["eps must be finite and not negative", "-1e-06"]),
    (MLPS, "activation", lambda _: "relu", ValueError, ["activation must be one of 'gelu_tanh'", "'swiglu'", "'relu'"]),
    (MLPS, "activation", lambda _: "swiglu", ValueError, ["fc2_weight must have shape [O, 24]", "[32, 48]"]),
    (ALL, "x", lambda x: x.to(torch.float8_e4m3fn), TypeError, ["x must", "torch.float8_e4m3fn"]),
]


def window_on(device):
    return dtr.ChannelWindow(starts(0, 1, device=device), 5, C)


def table(cases):
    return [
        pytest.param(op, *case, id=f"{op.__name__}-{case[0]}-{case[-1][-1]}")
        for allowed, *case in cases
        for op in allowed
    ]


LINEAR = [ops.routed_linear, ops.inner_linear]
WEIGHT_CASES = [
    (LINEAR, "weight", lambda w: w[:, :5], ValueError, ["weight", "[O, 32]", "[48, 5]"]),
    (LINEAR, "weight", lambda w: w[0], ValueError, ["weight", "[O, 32]", "[32]"]),
    (LINEAR, "weight", lambda w: w.long(), TypeError, ["weight", "floating point", "torch.int64"]),
    (LINEAR, "weight", lambda w: w.double(), ValueError, ["weight", "torch.float32", "autocast", "torch.float64"]),
    (LINEAR, "weight", lambda w: w.to("meta"), ValueError, ["weight", "cpu", "meta"]),
    (LINEAR, "bias", lambda b: b[:5], ValueError, ["bias", "[48]", "[5]"]),
    (LINEAR, "bias", lambda b: b[None], ValueError, ["bias", "[48]", "[1, 48]"]),
    (LINEAR, "bias", lambda b: b.half(), ValueError, ["bias", "torch.float32", "autocast", "torch.float16"]),
    (MLPS, "fc1_weight", lambda w: w[:, :5], ValueError, ["fc1_weight", "[O, 32]", "[48, 5]"]),
    (MLPS, "fc1_weight", lambda w: w.bfloat16(), ValueError, ["fc1_weight", "torch.float32", "torch.bfloat16"]),
    (MLPS, "fc1_bias", lambda b: b[:1], ValueError, ["fc1_bias", "[48]", "[1]"]),
    (MLPS, "fc2_weight", lambda w: w.t(), ValueError, ["fc2_weight", "[O, 48]", "[48, 32]"]),
    (MLPS, "fc2_weight", lambda w: w.to("meta"), ValueError, ["fc2_weight", "cpu", "meta"]),
    (MLPS, "fc2_bias", lambda b: b[:1], ValueError, ["fc2_bias", "[32]", "[1]"]),
    (MLPS, "fc2_bias", lambda b: b.double(), ValueError, ["fc2_bias", "torch.float32", "torch.float64"]),
    (ROUTED[2:], "window", lambda w: ROUTING.window(starts(1, 2), 5), ValueError, ["weight", "48", "5 do not divide"]),
    (INNER[2:], "x", lambda x: x.long(), TypeError, ["x must", "torch.int64"]),
    (INNER[2:], "x", lambda x: x[..., :8], ValueError, ["x must", "24", "3 heads", "[2, 3, 8]"]),
    (INNER[2:], "weight", lambda w: w.double(), ValueError, ["weight", "torch.float64", "x is torch.float32"]),
    (INNER[2:], "weight", lambda w: w[:, :-2], ValueError, ["weight's inputs", "30", "4 do not divide"]),
    (INNER[2:], "window", lambda w: ROUTING.window(starts(1, 2, 3), HEADS), ValueError, ["window", "3 samples", "2"]),
    (INNER[2:], "window", lambda w: None, TypeError, ["window", "ChannelWindow", "NoneType"]),
]


@pytest.mark.parametrize("op, name, change, error, fragments", table(STREAM_CASES + WEIGHT_CASES))
def test_streams_modulation_windows_and_weights(op, name, change, error, fragments):
    inputs = inputs_of(op)
    inputs[name] = change(inputs.get(name))
    refused(lambda: op(**inputs), error, fragments)


@pytest.mark.parametrize("op", MLPS)
def test_halves_of_swiglu(op):
    inputs = inputs_of(op) | {"activation": "swiglu", "fc1_weight": torch.randn(H + 1, C), "fc1_bias": None}
    refused(lambda: op(**inputs), ValueError, ["fc1_weight", "two halves", "even", "49"])


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    "change, error, fragments",
    [
        (lambda p: p[:1], ValueError, ["must have shape [32]", "got [1]"]),
        (lambda p: p.expand(B, C), ValueError, ["must have shape [32]", "got [2, 32]"]),
        (lambda p: p.long(), TypeError, ["must be floating point", "torch.int64"]),
    ],
)
def test_affine_parameters_of_norms(name, change, error, fragments):
    shift, scale = torch.randn(2, B, C)
    affine = {"weight": torch.randn(C), "bias": torch.randn(C)}
    affine[name] = change(affine[name])
    refused(lambda: ops.fold_affine(shift, scale, **affine), error, [name, *fragments])


ROPES = {
    "channels": (lambda q: q[..., :4], ValueError, ["[2, 4, 3, 8]", "torch.float32 [2, 4, 3, 4]"]),
    "heads": (lambda q: q[:, :1], ValueError, ["[2, 4, 3, 8]", "torch.float32 [2, 1, 3, 8]"]),
    "samples": (lambda q: q[:1], ValueError, ["[2, 4, 3, 8]", "torch.float32 [1, 4, 3, 8]"]),
    "complex": (lambda q: q + 0j, ValueError, ["floating-point", "torch.complex64"]),
    "nothing": (lambda q: None, ValueError, ["floating-point", "NoneType"]),
    "a table": (torch.ones(N, 8), TypeError, ["a function", "Tensor"]),
}


@pytest.mark.parametrize("rope, error, fragments", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
@pytest.mark.parametrize("plain", [False, True])
def test_rotary_embeddings(monkeypatch, scope, plain, rope, error, fragments):
    """Attention would take fewer channels, and would repeat one head or sample."""
    if plain:
        monkeypatch.setattr("dtr_kernels.ops.dispatch.LEAST_ELEMENTS_ON_CPU", sys.maxsize)
    block = dtr.nn.RoutedDiTBlock(C, HEADS, scope=scope)
    refused(lambda: block(torch.randn(B, N, C), torch.randn(B, C), rope=rope), error, ["rope must", *fragments])


@pytest.mark.parametrize("op", [ops.routed_mlp, ops.gated_residual])
def test_branch_is_required(op):
    inputs = {**inputs_of(op), "branch": None, "gate": None}
    refused(lambda: op(**inputs), ValueError, ["branch", "gate"])


@pytest.mark.parametrize("op", ROUTED + INNER[2:])
@pytest.mark.parametrize("start", [-1, 28])
def test_windows_that_leave_the_channels(op, start):
    """A compiled kernel would write outside of its tensors; a GPU's kernels stay inside by their masks."""
    inputs = inputs_of(op)
    if not runs_on_cpu(inputs["x"]):
        pytest.skip("NOT RUN: needs the compiled CPU kernels")
    width, last = (3, 1) if op in INNER else (5, 27)
    inputs["window"] = dtr.ChannelWindow(starts(1, start), width, HEADS if op in INNER else C)
    refused(lambda: op(**inputs), ValueError, ["start", f"0..{last}", str(start)])


@pytest.mark.parametrize("op", [*ALL, *INNER[2:]])
def test_the_inputs_that_the_cases_change_are_good(op):
    inputs = inputs_of(op)
    assert all(torch.isfinite(out).all() for out in torch.utils._pytree.tree_leaves(op(**inputs)))


# --- block -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, fragments",
    [
        ({"num_heads": 5}, ["hidden_size", "divisible by num_heads", "32", "5"]),
        ({"num_heads": 0}, ["num_heads", "at least 1", "0"]),
        ({"num_heads": -4}, ["num_heads", "at least 1", "-4"]),
        ({"hidden_size": 0}, ["hidden_size", "at least 1", "0"]),
        ({"mlp_ratio": 0.0}, ["mlp_ratio", "at least 1 / hidden_size = 1/32", "0.0"]),
        ({"mlp_ratio": -1}, ["mlp_ratio", "at least 1 / hidden_size", "-1"]),
        ({"scope": "both"}, ["scope", "'block'", "'branch'", "'inner'", "'both'"]),
        ({"scope": None}, ["scope", "'block'", "'branch'", "None"]),
        ({"scope": "inner", "mlp_ratio": 4.1}, ["inner", "mlp_ratio 4.1 of 32", "131", "4 heads", "multiple of 4"]),
    ],
    ids=str,
)
def test_block_arguments(arguments, fragments):
    refused(lambda: dtr.nn.RoutedDiTBlock(**{"hidden_size": C, "num_heads": 4, **arguments}), ValueError, fragments)


def mask(*shape, device="cpu"):
    return torch.ones(shape, dtype=torch.bool, device=device)


WINDOW = ROUTING.window(starts(1, 19), C)
BLOCK_CASES = [
    ({"x": torch.ones(B, N, C).long()}, TypeError, ["x must", "floating point", "torch.int64"]),
    ({"x": [0.0]}, TypeError, ["x must", "floating point", "list"]),
    ({"c": None}, TypeError, ["c must", "floating point", "None"]),
    ({"x": torch.ones(N, C)}, ValueError, ["x must have shape [B, N, ", "[3, 32]"]),
    ({"x": torch.ones(B, N, C).double()}, ValueError, ["x is torch.float64", "torch.float32", "autocast"]),
    ({"window": ROUTING.window(starts(1, 2, 3), C)}, ValueError, ["window", "3 samples", "2"]),
    ({"window": ROUTING.window(starts(1, 2), 16)}, ValueError, ["window", "16 channels", "32"]),
    ({"window": window_on("meta")}, ValueError, ["window", "meta", "cpu"]),
    ({"window": "all"}, TypeError, ["window", "ChannelWindow", "str"]),
    ({"x": torch.ones(B, N, 16)}, ValueError, ["x must have shape [B, N, 32]", "[2, 3, 16]"]),
    ({"x": torch.ones(B, N, 16), "window": None}, ValueError, ["x must have shape [B, N, 32]", "[2, 3, 16]"]),
    ({"x": torch.ones(B, N, C, device="meta")}, ValueError, ["c ", "meta", "cpu"]),
    ({"c": torch.ones(1, C)}, ValueError, ["c must", "[2, 32]", "[1, 32]"]),
    ({"c": torch.ones(B, 5)}, ValueError, ["c must", "[2, 32]", "[2, 5]"]),
    ({"c": torch.ones(C)}, ValueError, ["c must", "[2, 32]", "got [32]"]),
    ({"c": torch.ones(B, 1, C)}, ValueError, ["c must", "[2, 32]", "[2, 1, 32]"]),
    ({"c": torch.ones(B, C).long()}, TypeError, ["c must", "floating point", "torch.int64"]),
    ({"c": torch.ones(B, C, device="meta")}, ValueError, ["c ", "meta", "cpu"]),
    ({"c": torch.ones(1, C), "window": mask(B, C)}, ValueError, ["c must", "[2, 32]", "[1, 32]"]),
    ({"x": torch.ones(N, C), "window": mask(B, C)}, ValueError, ["x must have shape [B, N, ", "[3, 32]"]),
    ({"x": torch.ones(B, N, C).long(), "window": mask(B, C)}, TypeError, ["x must", "floating point", "torch.int64"]),
    ({"window": mask(B, 5)}, ValueError, ["mask", "[2, 32]", "[2, 5]"]),
    ({"window": mask(5, C)}, ValueError, ["mask", "[2, 32]", "[5, 32]"]),
    ({"window": mask(C)}, ValueError, ["mask", "[2, 32]", "got [32]"]),
    ({"window": mask(B, N, C)}, ValueError, ["mask", "[2, 32]", "[2, 3, 32]"]),
    ({"window": starts(1, 19)}, ValueError, ["mask", "[2, 32]", "got [2]"]),
    ({"window": mask(B, C, device="meta")}, ValueError, ["mask", "meta", "cpu"]),
]


@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
@pytest.mark.parametrize(
    "inputs, error, fragments", [pytest.param(*row, id=f"{'-'.join(row[0])}-{row[2][-1]}") for row in BLOCK_CASES]
)
def test_block_inputs(inputs, error, fragments, scope):
    """And a refused call leaves parameters, inputs and the random state as they were."""
    block = dtr.nn.RoutedDiTBlock(C, C if scope == "inner" else 4, scope=scope)  # as many heads as channels
    inputs = {"x": torch.ones(B, N, C), "c": torch.ones(B, C), "window": WINDOW, **inputs}
    tensors = [tensor for tensor in (*inputs.values(), *block.parameters()) if isinstance(tensor, torch.Tensor)]
    before, random_state = [tensor.clone() for tensor in tensors], torch.get_rng_state()
    refused(lambda: block(**inputs), error, fragments)
    for tensor, value in zip(tensors, before, strict=True):
        assert tensor.device.type == "meta" or torch.equal(tensor, value)
    assert all(parameter.grad is None for parameter in block.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert block(torch.ones(B, N, C), torch.ones(B, C), WINDOW).isfinite().all()
