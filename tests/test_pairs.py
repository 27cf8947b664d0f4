"""Pairs of what docs/support.md says yes to: applied together, they change nothing. What does not go together is
listed there and here."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import pickle

import pytest
import torch
import torch.distributed as dist
from test_support import apply_checkpointing, is_block, native, swapped
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

pytestmark = [
    pytest.mark.usefixtures("one_thread", "seed"),
    pytest.mark.filterwarnings("ignore"),  # of PyTorch's, about backends and deprecations
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def keeping_linear_layers():
    def policy(ctx, op, *args, **kwargs):
        kept = op is torch.ops.dtr_kernels.routed_linear.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Whole(nn.Module):
    """Checkpoints a whole model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batch):
        return checkpoint(self.model, *batch, use_reentrant=False)


class Functional(nn.Module):
    """Calls a model by ``torch.func.functional_call`` with parameters of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batch):
        return torch.func.functional_call(self.model, dict(self.model.named_parameters()), batch)


def with_compiled_blocks(model):
    for module in model.modules():
        if is_block(module):
            module.compile(backend="eager")
    return model


def sharded(model):
    mesh = init_device_mesh("cpu", (1,))
    for module in [*filter(is_block, model.modules()), model]:
        fully_shard(module, mesh=mesh)
    return model


def with_loaded_state(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return model


# In the order in which they are applied.
FEATURES = {
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "state_dict": with_loaded_state,
    "AveragedModel": AveragedModel,
    "checkpointing": apply_checkpointing,
    "reentrant checkpointing": functools.partial(apply_checkpointing, kind=CheckpointImpl.REENTRANT),
    "selective checkpointing": functools.partial(apply_checkpointing, context_fn=keeping_linear_layers),
    "compiled blocks": with_compiled_blocks,
    "FSDP2": sharded,
    "DistributedDataParallel": DistributedDataParallel,
    "checkpointing of the whole": Whole,
    "functional_call": Functional,
    "torch.compile": functools.partial(torch.compile, backend="eager"),
    "autocast": lambda model: Within(model, functools.partial(torch.autocast, "cpu", torch.bfloat16)),
    "deterministic algorithms": lambda model: Within(model, deterministic),
}


class Within(nn.Module):
    def __init__(self, model, context):
        super().__init__()
        self.model, self.context = model, context

    def forward(self, *batch):
        with self.context():
            return self.model(*batch)


@contextlib.contextmanager
def deterministic():
    before = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=before)


# PyTorch's own limits, which docs/support.md lists: a plain model fails too after two forwards in a row.
ONE_FORWARD = [
    ("reentrant checkpointing", "FSDP2"),
    ("reentrant checkpointing", "DistributedDataParallel"),
    ("FSDP2", "functional_call"),
]
# Features of one kind: the second would take the place of the first, or wrap the same blocks once more.
KINDS = [{"checkpointing", "reentrant checkpointing", "selective checkpointing"}, {"FSDP2", "DistributedDataParallel"}]
PAIRS = [pair for pair in itertools.combinations(FEATURES, 2) if not any(set(pair) <= kind for kind in KINDS)]
COMPILERS = {"torch.compile", "compiled blocks"}


def outcome(model, batches):
    """The outputs for two batches whose backward passes come after both forwards, and all gradients."""
    inputs = [(x.clone().requires_grad_(), t, y) for x, t, y in batches]
    outputs = [model(*batch) for batch in inputs]
    sum(out.square().mean() for out in outputs).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    gradients = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
    return [*(out.detach() for out in outputs), *(x.grad for x, _, _ in inputs), *gradients]


@pytest.mark.parametrize("make", [native, swapped])
@pytest.mark.parametrize("pair", PAIRS, ids=[" and ".join(pair) for pair in PAIRS])
def test_features_go_together(make, pair):
    model = make(depth=1 if COMPILERS & set(pair) else 2)  # compiling takes long
    batches = [(torch.randn(2, 3, 6, 6), torch.tensor(times), torch.randint(10, (2,))) for times in ((1, 30), (49, 3))]
    batches = batches[: 1 if pair in ONE_FORWARD else 2]
    rounded = "autocast" in pair
    plain = copy.deepcopy(model)
    expected = outcome(FEATURES["autocast"](plain) if rounded else plain, batches)
    for feature in pair:
        model = FEATURES[feature](model)
    found = outcome(model, batches)
    assert len(found) == len(expected)
    for a, e in zip(found, expected, strict=True):
        tolerance = (3e-2 if rounded else 1e-4) * max(e.abs().max().item(), 0.1)
        torch.testing.assert_close(a, e, rtol=0, atol=tolerance)
