"""Tests of the PyTorch features that docs/support.md claims, unless another file tests them."""

from __future__ import annotations

import ast
import copy
import functools
import importlib.util
import io
import os
import pickle
import re
import subprocess
import sys
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from comparing import assert_as_exact, differ, results, saved_and_loaded, widened
from gpu_waits import capture
from models import DIM, HEADS, TIMESTEPS, DiT, DiTBlock
from processes import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import dtr_kernels as dtr
from dtr_kernels.ops import dispatch

ROOT = Path(__file__).parent.parent
ROUTING = dtr.DenoisingTaskRouting(TIMESTEPS)
OPS = torch.ops.dtr_kernels
PLAIN_AT_EVERY_SIZE = 1 << 62

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # TorchScript is on its way out of PyTorch, which says so at every call.
    pytest.mark.filterwarnings("ignore:.*(deprecated|legacy TorchScript|feature will be removed):DeprecationWarning"),
]


def native(depth=2, scope="block"):
    """A routed ``nn.DiT`` with open gates."""
    settings = {"class_dropout_prob": 0.0, "num_classes": 10, "learn_sigma": False, "routing": ROUTING, "scope": scope}
    model = dtr.nn.DiT(6, 2, 3, DIM, depth, HEADS, **settings)
    for layer in (*model.blocks, model.final_layer):
        nn.init.normal_(layer.adaLN_modulation[1].weight, std=DIM**-0.5)
        nn.init.normal_(layer.adaLN_modulation[1].bias, std=0.5)
    nn.init.normal_(model.final_layer.linear.weight, std=DIM**-0.5)
    return model


def unswapped(depth=2):
    """A model of facebookresearch/DiT's shape, with open gates."""
    return DiT([DiTBlock(DIM, HEADS) for _ in range(depth)], DIM)


def swapped(depth=2):
    """The same, routed and swapped."""
    return dtr.swap_blocks(unswapped(depth), ROUTING)


inner = functools.partial(native, scope="inner")
BOTH = pytest.mark.parametrize("make", [native, inner, swapped], ids=["native", "inner", "swapped"])


def make_batch(samples=4, dtype=torch.float32):
    """Images [B, 3, 6, 6] (9 tokens), timesteps, all different, and labels."""
    t = torch.randperm(TIMESTEPS)[:samples]
    return torch.randn(samples, 3, 6, 6, dtype=dtype), t, torch.randint(10, (samples,))


# --- compilers and exporters -----------------------------------------------------------------------------------------


@BOTH
def test_compile_with_a_dynamic_batch(make, seed, fresh_compiler):
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    model, counter = make(depth=1), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for samples in (4, 7, 3):
        batch = make_batch(samples)
        expected = results(model, batch)
        for tensor in batch:
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(results(compiled, batch), expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def export(model, strict=False):
    """The model for any number of samples."""
    B = torch.export.Dim("B", min=2, max=64)
    with torch.no_grad():
        return torch.export.export(model, make_batch(), dynamic_shapes=[{0: B}] * 3, strict=strict)


@BOTH
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_export(make, strict, seed, fresh_compiler):
    model = make(depth=1)
    program = export(model, strict=strict)
    names = {str(node.target) for node in program.graph.nodes}
    ops = ("inner_linear", "inner_projection", "inner_mlp") if make is inner else ("routed_linear", "routed_mlp")
    assert {f"dtr_kernels.{op}.default" for op in ("window_starts", *ops)} <= names
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program.module(), torch.export.load(file).module()):
        for samples in (4, 7):
            x, t, y = make_batch(samples)
            torch.testing.assert_close(exported(x, t, y), model(x, t, y))
        with pytest.raises(ValueError, match=r"t must be in 0\.\.49"):
            exported(x, t + TIMESTEPS, y)


@BOTH
def test_export_of_a_batch_on_both_sides_of_the_limit(make, seed, monkeypatch):
    """The limit for small tensors on a CPU, which an exported graph does not know."""
    model = make(depth=1)
    monkeypatch.setattr(dispatch, "LEAST_ELEMENTS_ON_CPU", 16 * 9 * DIM)  # 16 samples
    exported = export(model).module()
    for samples in (3, 40):
        batch = make_batch(samples)
        torch.testing.assert_close(exported(*batch), model(*batch), rtol=1e-4, atol=1e-5)


class NativeAndSwapped(nn.Module):
    """Both in one, since compiling takes long."""

    def __init__(self):
        super().__init__()
        self.native, self.swapped = native(depth=1), swapped(depth=1)

    def forward(self, x, t, y):
        return self.native(x, t, y), self.swapped(x, t, y)


IN_ANOTHER_PROCESS = """
import sys, torch
exported, package, results = sys.argv[1:]
batch, expected = torch.load(results)
load = [lambda: torch.export.load(exported).module(), lambda: torch._inductor.aoti_load_package(package)]
for function in load:
    try:
        function()
    except RuntimeError as error:
        print(error, file=sys.stderr)
    else:
        sys.exit("loads without dtr_kernels")
import dtr_kernels
for function in load:
    torch.testing.assert_close(function()(*batch), expected, rtol=1e-4, atol=1e-5)
"""


def test_aotinductor(seed, fresh_compiler, tmp_path):
    """Files of exported and of compiled programs run where dtr_kernels has been imported, and there alone."""
    model = NativeAndSwapped()
    program = export(model)
    files = [str(tmp_path / name) for name in ("model.pt2", "package.pt2", "results.pt")]
    torch.export.save(program, files[0])
    # Nothing is measured here, and one compilation does not pay for precompiled headers.
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
    torch._inductor.aoti_compile_and_package(program, package_path=files[1], inductor_configs=quick)
    batch = make_batch(7)
    with torch.no_grad():
        torch.save((batch, model(*batch)), files[2])
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, *files]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    for name in ("dtr_kernels.checked_labels", "dtr_kernels::checked_labels"):  # what each misses, by name
        assert name in ended.stderr


def block_inputs():
    return torch.randn(2, 9, DIM), torch.randn(2, DIM)


TORCHSCRIPT = {
    "DiT": lambda: (native(), make_batch()),
    "RoutedDiTBlock": lambda: (dtr.nn.RoutedDiTBlock(DIM, HEADS), block_inputs()),
    "RoutedResBlock": lambda: (dtr.nn.RoutedResBlock(32, 8), (torch.randn(2, 32, 4, 4), torch.randn(2, 8))),
    "FusedDiT": lambda: (swapped(), make_batch()),
    # An unrouted model is of its own class, and has swapped blocks.
    "FusedDiTBlock": lambda: (dtr.swap_blocks(unswapped()), make_batch()),
}


@pytest.mark.parametrize("name", TORCHSCRIPT)
def test_torchscript_is_refused(name):
    model, inputs = TORCHSCRIPT[name]()
    message = rf"^{name} cannot be {{}}.* use torch\.export\.export or torch\.compile"
    with pytest.raises(RuntimeError, match=message.format(r"scripted by torch\.jit\.script")):
        torch.jit.script(model)
    for trace in (torch.jit.trace, lambda *args: torch.onnx.export(*args, io.BytesIO(), dynamo=False)):
        with pytest.raises(RuntimeError, match=message.format(r"traced by torch\.jit\.trace")):
            trace(model, inputs)
    model(*inputs)


@BOTH
def test_onnx_is_refused(make, fresh_compiler):
    """By PyTorch, since ONNX has no such operators; that exporter needs onnxscript even to say so."""
    with pytest.raises(Exception) as raised:
        torch.onnx.export(make(depth=1), make_batch(), io.BytesIO(), dynamo=True, verbose=False)
    words = "".join(traceback.format_exception(raised.value))
    if importlib.util.find_spec("onnxscript"):
        assert "No ONNX function found for <OpOverload(op='dtr_kernels." in words
    else:
        assert "No module named 'onnxscript'" in words


@BOTH
def test_symbolic_trace_is_refused(make):
    with pytest.raises((torch.fx.proxy.TraceError, TypeError), match="Proxy"):
        torch.fx.symbolic_trace(make())


@pytest.mark.gpu
@BOTH
def test_a_captured_model_follows_its_timesteps(make, seed):
    model = make().cuda()
    x, t, y = (tensor.cuda() for tensor in make_batch())
    graph, out = capture(torch.no_grad()(model), x, t, y)
    for _ in range(2):
        t.copy_(torch.randperm(TIMESTEPS)[:4])
        graph.replay()
        torch.testing.assert_close(out, model(x, t, y))


# --- many processes --------------------------------------------------------------------------------------------------


def step(model, batch):
    model(*batch).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()


def replicated(model):
    return nn.parallel.DistributedDataParallel(model)


def sharded(model):
    """By FSDP2, each block for itself."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def step_of_two_processes(rank, store, seed):
    """A step of each kind of parallelism makes the parameters of one process that has the whole batch."""
    torch.set_num_threads(1)
    dispatch.LEAST_ELEMENTS_ON_CPU = 0
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), rank=rank, world_size=2)
    torch.manual_seed(seed)
    for make in (native, swapped):
        for parallel in (replicated, sharded, lambda model: sharded(apply_checkpointing(model))):
            model, batch = make(), make_batch()
            alone, before = copy.deepcopy(model), [p.clone() for p in model.parameters()]
            step(alone, batch)
            model = parallel(model)
            step(model, [tensor[2 * rank : 2 * rank + 2] for tensor in batch])
            found = [whole(p).detach() for p in model.parameters()]
            torch.testing.assert_close(found, [p.detach() for p in alone.parameters()], rtol=1e-4, atol=1e-5)
            assert not torch.equal(found[-1], before[-1])
    with pytest.raises(ValueError, match="swap before sharding"):
        dtr.swap_blocks(sharded(unswapped()), ROUTING)
    with pytest.raises(ValueError, match="its class was changed since, as fully_shard does"):
        dtr.restore_blocks(sharded(swapped()))
    dist.barrier()
    os._exit(0)  # the other may have left, for which destroying the group would wait


def test_ddp_and_fsdp2_in_two_processes(tmp_path, seed):
    run_ranks(step_of_two_processes, 2, str(tmp_path / "store"), seed)


# --- memory and copies -----------------------------------------------------------------------------------------------


def is_block(module):
    return isinstance(module, DiTBlock | dtr.nn.RoutedDiTBlock)


def apply_checkpointing(model, kind=CheckpointImpl.NO_REENTRANT, **options):
    """Checkpoint each block, as libraries do."""
    wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=kind, **options)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrapper, check_fn=is_block)
    return model


@BOTH
def test_checkpointing(make, seed):
    model, batch = make(), make_batch()
    batch[0].requires_grad_()  # the reentrant kind wants that
    expected = results(model, batch)
    for reentrant in (False, True):
        run = functools.partial(checkpoint, model, use_reentrant=reentrant)
        torch.testing.assert_close(results(Called(model, run), batch), expected)
    for kind in CheckpointImpl:
        torch.testing.assert_close(results(apply_checkpointing(copy.deepcopy(model), kind), batch), expected)


class Called:
    """A model that is called by another function."""

    def __init__(self, model, call):
        self.zero_grad, self.parameters, self.call = model.zero_grad, model.parameters, call

    def __call__(self, *args):
        return self.call(*args)


@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
def test_reentrant_checkpointing_of_a_block(scope, seed):
    block, (x, c) = dtr.nn.RoutedDiTBlock(DIM, HEADS, scope=scope), block_inputs()
    window = ROUTING.window(torch.tensor([3, 40]), block.routed_channels)
    x.requires_grad_()
    run = functools.partial(checkpoint, block, use_reentrant=True)
    expected = results(block, (x, c, window))
    torch.testing.assert_close(results(Called(block, run), (x, c, window)), expected)


class Calls(TorchDispatchMode):
    """Counts calls of ops."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.of[function] += 1
        return function(*args, **(kwargs or {}))


@BOTH
def test_selective_checkpointing(make, seed):
    """By a policy, and by a list of ops to save; what is saved is not computed again."""
    model, batch = make(), make_batch()
    expected = results(model, batch)
    ops = ("inner_linear", "inner_mlp") if make is inner else ("routed_linear", "routed_mlp")
    linear, mlp = (getattr(OPS, op).default for op in ops)

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is linear else CheckpointPolicy.PREFER_RECOMPUTE

    with torch.no_grad(), Calls() as forward:
        model(*batch)
    for saved, choice in {linear: policy, mlp: [mlp]}.items():
        contexts = functools.partial(create_selective_checkpoint_contexts, choice)
        run = functools.partial(checkpoint, model, use_reentrant=False, context_fn=contexts)
        with Calls() as calls:
            torch.testing.assert_close(results(Called(model, run), batch), expected)
        for op in (linear, mlp):
            assert (calls.of[op] > forward.of[op]) == (op is not saved)


def pickled(value):
    return pickle.loads(pickle.dumps(value))


CLONES = pytest.mark.parametrize("clone", [copy.deepcopy, saved_and_loaded, pickled])


@CLONES
def test_copies_of_a_native_model(clone, seed):
    model, batch = native(), make_batch()
    cloned = clone(model)
    assert cloned.routing == ROUTING
    torch.testing.assert_close(results(cloned, batch), results(model, batch), rtol=0, atol=0)
    with torch.no_grad():
        next(iter(cloned.blocks[0].parameters())).zero_()
    assert differ(results(cloned, batch), results(model, batch))


def surgery_step(model, surgery, batch, seed):
    """The gradients after a step of surgery."""
    surgery._weighting = dtr.GradientSurgery(model.parameters(), 4, generator=seeded(seed))._weighting
    model.zero_grad()
    surgery.backward_batch(lambda *args: model(*args).square().mean((1, 2, 3)), torch.arange(8) % 4, *batch)
    return [p.grad for p in model.parameters() if p.grad is not None]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@CLONES
def test_copies_of_surgery_and_its_model(clone, seed):
    """Copied together they belong together."""
    model, batch = native(), make_batch(8)
    surgery = dtr.GradientSurgery(model.named_parameters(), 4, engine="per_cluster")
    expected = surgery_step(model, surgery, batch, seed)
    found = surgery_step(*clone((model, surgery)), batch, seed)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@BOTH
def test_state_dict_loads_as_weights_only(make, seed):
    model, other, batch = make(), make(), make_batch()
    expected = results(model, batch)
    assert differ(results(other, batch), expected)
    other.load_state_dict(saved_and_loaded(model.state_dict(), weights_only=True))
    torch.testing.assert_close(results(other, batch), expected, rtol=0, atol=0)


def test_state_of_surgery_loads_as_weights_only(seed):
    model, batch = native(), make_batch(8)
    surgery = dtr.GradientSurgery(model.named_parameters(), 4, engine="per_cluster")
    surgery_step(model, surgery, batch, seed)
    surgery.load_state_dict(saved_and_loaded(surgery.state_dict(), weights_only=True))


@BOTH
def test_a_whole_module_does_not_load_as_weights_only(make):
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        saved_and_loaded(make(), weights_only=True)


# --- derivatives -----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_transforms(make, seed):
    """functional_call, grad, vmap, jvp, against autograd and finite differences."""
    model = make().double()
    x, t, y = make_batch(dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, t, y):
        return torch.func.functional_call(model, parameters, (x, t, y)).square().mean((1, 2, 3)).sum()

    model(x, t, y).square().mean((1, 2, 3)).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    total = torch.func.grad(loss)(parameters, x, t, y)
    torch.testing.assert_close({name: total[name] for name in expected}, expected)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(parameters, x[:, None], t[:, None], y[:, None])
    torch.testing.assert_close({name: each[name].sum(0) for name in expected}, expected)

    models = [make().double() for _ in range(2)]
    stacked = torch.func.stack_module_state(models)
    out = torch.func.vmap(lambda *state: torch.func.functional_call(model, state, (x, t, y)))(*stacked)
    torch.testing.assert_close(out, torch.stack([each(x, t, y) for each in models]))

    direction = torch.randn_like(x)
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's attention on a CPU has no forward derivative otherwise
        _, tangent = torch.func.jvp(lambda x: model(x, t, y), (x,), (direction,))
    difference = model(x + 1e-6 * direction, t, y) - model(x - 1e-6 * direction, t, y)
    torch.testing.assert_close(tangent, difference / 2e-6, rtol=1e-5, atol=1e-7)


@BOTH
def test_checkpointing_within_a_transform_is_refused(make):
    """By PyTorch. A swapped block relies on that: it does not remember its window there."""
    model, batch = make(), make_batch()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters):
        call = functools.partial(torch.func.functional_call, model, parameters)
        return checkpoint(lambda *args: call(args), *batch, use_reentrant=False).sum()

    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(loss)(parameters)


# --- numbers and modes -----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(make, dtype, seed, monkeypatch):
    """Next to plain PyTorch in the same dtype, against plain PyTorch in fp64."""
    model = make().to(dtype)
    x, t, y = make_batch()
    batch = x.to(dtype), t, y
    found = results(model, batch)
    monkeypatch.setattr(dispatch, "LEAST_ELEMENTS_ON_CPU", PLAIN_AT_EVERY_SIZE)
    exact = results(*widened(model, batch))
    assert_as_exact(found, results(model, batch), exact)


@BOTH
def test_inference_mode(make, seed):
    model, batch = make(), make_batch()
    with torch.inference_mode():
        out = model(*batch)
    assert out.is_inference()
    torch.testing.assert_close(out, model(*batch).detach(), rtol=0, atol=0)


@BOTH
def test_deterministic_algorithms(make, seed):
    torch.use_deterministic_algorithms(True)  # an error, where conftest.py only warns
    model, batch = make(), make_batch()
    first = results(model, batch)
    for _ in range(3):
        torch.testing.assert_close(results(model, batch), first, rtol=0, atol=0)


# --- the table -------------------------------------------------------------------------------------------------------


@functools.cache
def functions(path):
    """The tests of a file by name, as syntax."""
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def rows(text):
    """The cells of each row of the tables that end in a column of tests."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and "::" in cells[-1]:
            yield cells


def test_every_row_of_the_table_is_a_test():
    table = list(rows((ROOT / "docs" / "support.md").read_text()))
    assert len(table) > 20
    named = set()
    for cells in table:
        feature, *claims, _, tests = cells
        assert len(claims) == 3 and all(claims), feature
        found = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
        assert found and len(found) == tests.count("::"), tests
        nodes = [functions(ROOT / "tests" / file)[name] for file, name in found]
        gpu = [any("mark.gpu" in ast.unparse(mark) for mark in node.decorator_list) for node in nodes]
        assert ("not yet run on a GPU" in " ".join(claims)) == any(gpu), feature
        named |= set(found)
    own = {name for name in functions(Path(__file__)) if name.startswith("test_")} - {
        "test_every_row_of_the_table_is_a_test"
    }
    assert own == {name for file, name in named if file == Path(__file__).name}
