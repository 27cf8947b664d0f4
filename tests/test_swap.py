"""swap_blocks and restore_blocks: the same function and gradients in models of other code, and nothing else changed."""

import contextlib
import copy
import functools
import inspect
import pickle
import sys

import comparing
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from comparing import assert_same, differ, saved_and_loaded
from models import (
    DIM,
    HEADS,
    TIMESTEPS,
    Attention,
    DiT,
    DiTBlock,
    DropPath,
    LowRankLinear,
    become,
    change,
    facebook_dit,
    public_dtr,
    random_mapping,
)  # fmt: skip
from models import window_mapping as windows
from processes import run_ranks
from swapping import RANDOM, ROUTING, assert_block_is_refused, blocks_of, oracle, paper_mask
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from unets import TimestepBlock, UNetModel

import dtr_kernels as dtr
from dtr_kernels.swap import public_dtr as public_dtr_family
from dtr_kernels.swap import restore_blocks, swap_blocks
from dtr_kernels.swap.classes import BlockState

OTHER_DIM = 2 * DIM


pytestmark = pytest.mark.usefixtures("one_thread")
# Without what the public code's forward sets.
snapshot = functools.partial(comparing.snapshot, without=("active_task", "active_mask"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    public_dtr_family._warn_no_window.cache_clear()


def batch(times=(0, 30, 44, 49), seed=1):
    """Four images [4, 3, 6, 6] (9 tokens) of different timesteps, and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 6, 6, generator=generator), torch.tensor(times), torch.arange(4)


def results(model, *batches):
    """Outputs for each batch, and the gradient of every parameter of one backward pass through all of them."""
    model.zero_grad()
    outputs = [model(*inputs) for inputs in batches or [batch()]]
    sum(output.square().sum() for output in outputs).backward()
    return [output.detach() for output in outputs] + [p.grad.clone() for p in model.parameters()]


# --- the same function


@pytest.mark.parametrize(
    "make",
    [
        facebook_dit,
        functools.partial(facebook_dit, fused_attn=False),
        functools.partial(facebook_dit, qk_norm=True),
        public_dtr,
        lambda: public_dtr(random_mapping()),
    ],
    ids=["facebook", "unfused attention", "query and key norms", "public DTR", "public DTR, random"],
)
@pytest.mark.filterwarnings("ignore:routing._unit_mapping")
def test_keeps_the_models_own_function(make):
    model = make()
    expected = results(model)
    assert swap_blocks(model) is model
    assert_same(results(model), expected)


@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
@pytest.mark.parametrize("make", [facebook_dit, public_dtr])
@pytest.mark.parametrize(("routing", "mask_of"), [(ROUTING, paper_mask), (RANDOM, RANDOM.mask)], ids=["DTR", "random"])
def test_a_given_routing_matches_the_reference(make, routing, mask_of, scope):
    model = make()
    expected = results(oracle(model, mask_of, scope))
    assert differ(results(oracle(model, lambda t, C: None)), expected)
    assert_same(results(swap_blocks(model, routing, scope)), expected)


@pytest.mark.filterwarnings("ignore:routing._unit_mapping")
@pytest.mark.parametrize("mapping", [windows(), random_mapping()], ids=["windows", "random"])
def test_scope_branch_of_the_models_own_masks(mapping):
    model = public_dtr(mapping)
    expected = results(oracle(model, lambda t, C: mapping[t], "branch"))
    assert differ(results(model), expected)
    assert_same(results(swap_blocks(model, scope="branch")), expected)


def test_reference_applies_query_and_key_norms():
    block = facebook_dit(qk_norm=True).blocks[0]
    nn.init.normal_(block.attn.q_norm.weight)
    x, c, mask = torch.randn(4, 5, DIM), torch.randn(4, DIM), RANDOM.mask(batch()[1], DIM)[:, None]
    expected = block(x * mask, c) + x * ~mask
    assert_same([dtr.reference.dit_block(block, x, c, mask[:, 0])], [expected])


def test_follows_a_mapping_that_changes():
    model = swap_blocks(public_dtr())
    others = [public_dtr(windows(alpha=1.0)), public_dtr(windows(alpha=2.0)), public_dtr(windows(beta=0.5))]
    for other, assign in zip(others, (True, False, False), strict=True):  # replaced, then written into
        model.load_state_dict(other.state_dict(), assign=assign)
        assert_same(results(model), results(other))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        model.to(dtype)
    x, t, y = batch()
    assert_same([model(x.double(), t, y)], [others[-1].double()(x.double(), t, y)], rtol=2e-2)


def test_reads_wide_windows_in_bf16():
    mapping = ROUTING.window(torch.arange(TIMESTEPS), 1152).mask()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        reading = public_dtr_family._read(mapping.to(dtype))
        assert reading.width == 921
        assert torch.equal(reading.starts, ROUTING.window(torch.arange(TIMESTEPS), 1152).start)


def test_warns_once_where_masks_are_not_windows():
    with pytest.warns(UserWarning, match="not a window") as caught:
        model = swap_blocks(public_dtr(random_mapping()))
        model(*batch())
    assert len(caught) == 1


# --- where the timesteps come from


class NamedTimestep(DiT):
    def forward(self, x, *, y, timestep):
        return super().forward(x, timestep, y)


class NamedTimesteps(DiT):
    def forward(self, x, y, timesteps):
        return super().forward(x, timesteps, y)


class Preconditioned(nn.Module):
    """A wrapper whose own t is not the model's."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t, y):
        return self.model(x, TIMESTEPS - 1 - t, y)


def test_finds_the_timesteps():
    model = facebook_dit()
    x, t, y = batch()
    expected = results(oracle(model, paper_mask))[0]
    for kind, calls in {
        DiT: [lambda m: m(x, t, y), lambda m: m(t=t, y=y, x=x), lambda m: m.forward(x, t, y=y)],
        NamedTimestep: [lambda m: m(x, timestep=t, y=y)],
        NamedTimesteps: [lambda m: m(x, y, t), lambda m: m(x, timesteps=t, y=y)],
    }.items():
        model.__class__ = kind
        signature = inspect.signature(model.forward)
        swap_blocks(model, ROUTING)
        assert inspect.signature(model.forward) == signature
        for call in calls:
            assert_same([call(model)], [expected])
        restore_blocks(model)
    model.__class__ = DiT
    with pytest.raises(TypeError, match="routed by its argument 't'"):
        swap_blocks(model, ROUTING)(x)


def test_the_innermost_forward_counts():
    model = facebook_dit()
    x, t, y = batch()
    wrapper = swap_blocks(Preconditioned(model), ROUTING)
    assert type(wrapper) is Preconditioned
    expected = oracle(restore_blocks(copy.deepcopy(model)), paper_mask)(x, TIMESTEPS - 1 - t, y)
    assert_same([wrapper(x, t, y)], [expected])


def test_guided_forward_calls_forward_itself():
    model = facebook_dit()
    expected = oracle(model, paper_mask).forward_with_cfg(*batch(), 1.5)
    assert_same([swap_blocks(model, ROUTING).forward_with_cfg(*batch(), 1.5)], [expected])


def test_a_failed_forward_leaves_no_window_behind():
    model = swap_blocks(facebook_dit(), ROUTING)
    x, t, y = batch()
    with pytest.raises(IndexError):
        model(x, t, y + 100)
    with pytest.raises(RuntimeError, match=r"'blocks.0' was called outside its model's forward"):
        model.blocks[0](torch.randn(4, 5, DIM), torch.randn(4, DIM))


# --- gradient checkpointing

TWO_BATCHES = (batch(), batch(times=(49, 3, 2, 40), seed=2))


CASES = [(facebook_dit, ROUTING), (facebook_dit, RANDOM), (public_dtr, None), (UNetModel, ROUTING), (UNetModel, RANDOM)]
CHECKPOINTED = [(*case, kind) for case in CASES for kind in ("reentrant", "not reentrant")]
CHECKPOINTED += [(UNetModel, routing, "guided-diffusion's") for routing in (ROUTING, RANDOM)]


@pytest.mark.parametrize(("make", "routing", "kind"), CHECKPOINTED)
def test_checkpointed_blocks_recompute_for_their_own_timesteps(make, routing, kind, monkeypatch):
    model = swap_blocks(make(), routing)
    expected = results(model, *TWO_BATCHES)
    asked, own_window = [], BlockState.window
    with monkeypatch.context() as patch:
        patch.setattr(BlockState, "window", lambda *args: asked.append(args) or own_window(*args))
        for block in blocks_of(model):
            block.use_checkpoint = kind == "guided-diffusion's"
        if kind != "guided-diffusion's":
            setattr(model, "use_torch" if make is UNetModel else "reentrant", kind == "reentrant")
        assert_same(results(model, *TWO_BATCHES), expected)
    assert len(asked) == 2 * 2 * len(blocks_of(model))  # each again in the backward pass

    def window_of_latest_forward(state, block, marker):
        if state.model.call.windows is not None:
            state.latest = state.source.window_of(block)
        return state.latest

    monkeypatch.setattr(BlockState, "window", window_of_latest_forward)
    # The non-reentrant kind compares what was saved with what is recomputed, and may find out itself.
    with contextlib.suppress(*[torch.utils.checkpoint.CheckpointError] * (kind == "not reentrant")):
        assert differ(results(model, *TWO_BATCHES), expected)


def test_checkpoint_around_the_whole_model():
    model = swap_blocks(facebook_dit(), ROUTING)
    expected = results(model, *TWO_BATCHES)
    model.zero_grad()
    outputs = [checkpoint(model, *inputs, use_reentrant=False) for inputs in TWO_BATCHES]
    sum(output.square().sum() for output in outputs).backward()
    assert_same([p.grad for p in model.parameters()], expected[2:])


@pytest.mark.parametrize("make", [lambda: facebook_dit(reentrant=False), lambda: UNetModel(use_checkpoint=True)])
def test_no_window_outlives_its_forward(make):
    model = swap_blocks(make(), ROUTING)
    output = model(*batch())
    held = [len(block._dtr._windows) for block in blocks_of(model)]
    output.sum().backward()
    del output
    assert held == [1] * len(held)
    assert [len(block._dtr._windows) for block in blocks_of(model)] == [0] * len(held)


# --- nothing else changes


@pytest.mark.parametrize(
    ("make", "routing"),
    [
        (facebook_dit, None),
        (facebook_dit, ROUTING),
        (public_dtr, None),
        *((UNetModel, r) for r in (None, ROUTING, RANDOM)),
    ],
)
def test_restore_undoes_everything(make, routing):
    model = make()
    kind, rng = type(model), torch.get_rng_state()
    expected, before, keys = results(model), snapshot(model), list(model.state_dict())
    gradients = [p.grad for p in model.parameters()]
    swap_blocks(model, routing)
    assert torch.equal(torch.get_rng_state(), rng)
    assert isinstance(model, kind) and all(isinstance(block, DiTBlock | TimestepBlock) for block in blocks_of(model))
    assert all("Fused" not in type(m).__name__ for m in model.modules() if m is not model and m not in blocks_of(model))
    assert list(model.state_dict()) == keys
    model(*batch())
    assert restore_blocks(model) is model
    assert snapshot(model) == before
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    for after, first in zip(results(model), expected, strict=True):
        assert torch.equal(after, first)


def test_hooks_of_blocks_go_on_and_trial_leaves_no_trace():
    model = public_dtr()
    model.blocks[0].register_forward_hook(lambda module, inputs, output: calls.append(module))
    model.blocks[0].adaLN_modulation.register_forward_hook(lambda module, inputs, output: calls.append(module))
    calls, before, rng = [], snapshot(model), torch.get_rng_state()
    restore_blocks(swap_blocks(model))
    assert calls == [] and torch.equal(torch.get_rng_state(), rng) and snapshot(model) == before
    swap_blocks(model)(*batch())
    assert calls == [model.blocks[0].adaLN_modulation, model.blocks[0]]


def test_an_optimizer_made_before_trains_on():
    plain, swapped = (public_dtr() for _ in range(2))
    swapped.load_state_dict(plain.state_dict())
    for model in (plain, swapped):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        for step in range(3):
            if step == 1 and model is swapped:
                swap_blocks(model)
            results(model, batch(seed=step))
            optimizer.step()
    assert_same([p.detach() for p in swapped.parameters()], [p.detach() for p in plain.parameters()])


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, saved_and_loaded, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "torch.save", "pickle"],
)
@pytest.mark.parametrize(("make", "routing"), [(facebook_dit, ROUTING), (public_dtr, None), (UNetModel, ROUTING)])
def test_copies_stand_on_their_own(make, routing, clone):
    model = make()
    kinds = [type(module) for module in (model, *blocks_of(model))]
    expected = results(swap_blocks(model, routing))
    cloned = clone(model)
    assert type(cloned) is type(model) and [*map(type, blocks_of(cloned))] == [*map(type, blocks_of(model))]
    first, second, *_ = blocks_of(cloned)
    assert first._dtr.model is second._dtr.model is cloned._dtr is not model._dtr
    restore_blocks(model)
    assert_same(results(cloned), expected)
    assert [type(module) for module in (restore_blocks(cloned), *blocks_of(cloned))] == kinds


def test_averaged_models():
    model = public_dtr()
    before = torch.optim.swa_utils.AveragedModel(model)
    swap_blocks(model)
    after = torch.optim.swa_utils.AveragedModel(model)
    results(model)
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    for average in (before, after):
        average.update_parameters(model)
        average.update_parameters(model)
    assert_same([after(*batch())], [before(*batch())])


def test_dtypes_and_modes():
    model, plain = swap_blocks(public_dtr()), public_dtr()
    plain.load_state_dict(model.state_dict())
    x, t, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same([model(x, t, y)], [plain(x, t, y)], rtol=3e-2)
    for changed in (model.eval(), model.train()):
        assert_same(results(changed), results(plain))
    with torch.inference_mode():
        assert_same([model.double()(x.double(), t, y)], [plain.double()(x.double(), t, y)], rtol=1e-10)


@pytest.mark.parametrize(
    ("make", "routing", "scope"),
    [(facebook_dit, ROUTING, "block"), (public_dtr, None, "block"), (facebook_dit, ROUTING, "inner")],
)
def test_compiles_whole_and_once(make, routing, scope):
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    model = swap_blocks(make(), routing, scope)
    expected = results(model, *TWO_BATCHES)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_same(results(compiled, *TWO_BATCHES), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
@pytest.mark.parametrize("dynamic", [None, True])
def test_blocks_and_models_compile_whole_for_every_batch(fresh_compiler, monkeypatch, scope, dynamic):
    """Blocks one by one, where the window is what first compares the sizes of small x and c, or the model at once."""
    monkeypatch.setattr("dtr_kernels.ops.dispatch.LEAST_ELEMENTS_ON_CPU", sys.maxsize)
    model, whole = swap_blocks(facebook_dit(), ROUTING, scope), batch()
    batches = [whole, [tensor[:3] for tensor in whole], [tensor[:2] for tensor in whole]]
    expected = [model(*each) for each in batches]
    for module in [model] if dynamic else model.blocks:
        module.compile(backend="eager", fullgraph=True, dynamic=dynamic)
    assert_same([model(*each) for each in batches], expected)


def test_compiled_model_notices_a_mapping_of_another_width():
    model = swap_blocks(public_dtr())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(*batch())
    other = public_dtr(windows(alpha=1.0))
    model.load_state_dict(other.state_dict())
    assert_same([compiled(*batch())], [other(*batch())])
    model.load_state_dict(public_dtr(windows(beta=0.5)).state_dict())
    with pytest.raises(RuntimeError, match="compile the model again"):
        compiled(*batch())


def test_meta_device():
    with torch.device("meta"):
        model = swap_blocks(public_dtr())
    source = public_dtr()
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert_same(results(model), results(source))


# --- distributed


@pytest.mark.parametrize("swap_first", [True, False])
@pytest.mark.parametrize("make", [facebook_dit, lambda: UNetModel(use_checkpoint=True)])
def test_ddp(gloo, make, swap_first):
    model = make()
    kind, expected = type(model), results(oracle(model, paper_mask))
    model = DistributedDataParallel(swap_blocks(model, ROUTING)) if swap_first else DistributedDataParallel(model)
    if not swap_first:
        swap_blocks(model, ROUTING)
    assert_same(results(model), expected)
    assert type(restore_blocks(model).module) is kind


def _ddp_worker(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = public_dtr()
    half = [tensor[2 * rank : 2 * rank + 2] for tensor in batch()]
    whole = results(model)[1:]
    gradients = results(DistributedDataParallel(swap_blocks(model)), half)[1:]
    assert_same(gradients, [gradient / 2 for gradient in whole])  # DDP averages over ranks
    dist.destroy_process_group()


def test_ddp_in_two_processes(tmp_path):
    run_ranks(_ddp_worker, 2, str(tmp_path / "store"))


def test_data_parallel_is_refused():
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        swap_blocks(facebook_dit(), ROUTING)._replicate_for_data_parallel()


# --- refusals


class PostNormBlock(DiTBlock):
    """A DiT block by its attributes, but with another forward."""

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.norm1(self.attn(x * (1 + scale1) + shift1))
        return x + gate2 * self.norm2(self.mlp(x * (1 + scale2) + shift2))


class SkipBlock(DiTBlock):
    def forward(self, x, c, skip=None):
        return self.branches(x, c)


class TwiceActivated(DiTBlock):
    def forward(self, x, c):
        return self.branches(x, torch.sigmoid(c))


class Local(Attention):
    """Attention to neighbours alone."""

    def forward(self, x):
        near = (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs() <= 8
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).transpose(1, 3).unbind(2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
        return self.proj(out.transpose(1, 2).flatten(2))


class Dropping(Attention):
    """Drops by a function, and so only in training."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


REFUSED_BLOCKS = {
    "dropout by a function": (change("attn", Dropping(DIM, HEADS)), "something else than a DiT block in training mode"),
    "attention dropout": (change("attn.attn_drop.p", 0.1), "attn.attn_drop drops with probability 0.1"),
    "projection dropout": (change("attn.proj_drop.p", 0.1), "attn.proj_drop drops with probability 0.1"),
    "MLP dropout": (change("mlp.drop1.p", 0.2), "mlp.drop1 drops with probability 0.2"),
    "second MLP dropout": (change("mlp.drop2.p", 0.2), "mlp.drop2 drops with probability 0.2"),
    "drop path": (change("drop_path", DropPath()), "drop_path drops with probability 0.1"),
    "activation": (change("mlp.act", nn.GELU()), r"mlp.act is GELU\(approximate='none'\)"),
    "MLP norm": (change("mlp.norm", nn.LayerNorm(4 * DIM)), "mlp.norm is not nn.Identity"),
    "scale norm": (change("attn.norm", nn.LayerNorm(DIM)), "attn.norm is not nn.Identity"),
    "attention gate": (change("attn.gate", nn.Linear(DIM, DIM)), "attn.gate is set"),
    "rope": (change("attn.rope", nn.Identity()), "attn.rope is set"),
    "RMS norm": (change("norm1", nn.RMSNorm(DIM)), "norm1 is RMSNorm"),
    "affine norm": (change("norm2", nn.LayerNorm(DIM)), "norm2 has affine parameters"),
    "other norm": (change("norm1", nn.LayerNorm(64, elementwise_affine=False)), r"norm1 normalises shape \[64\]"),
    "heads": (change("attn.num_heads", 5), "attn.num_heads is 5, which does not divide the hidden size 32"),
    "modulation": (change("adaLN_modulation", nn.Linear(DIM, 4 * DIM)), r"adaLN_modulation makes \[2, 128\]"),
    "head size": (change("attn.qkv", nn.Linear(DIM, 6 * DIM)), "attn.qkv maps 32 features to 192"),
    "MLP input": (change("mlp.fc1", nn.Linear(OTHER_DIM, 4 * DIM)), "mlp.fc1 maps 64 features"),
    "MLP output": (change("mlp.fc2", nn.Linear(4 * DIM, OTHER_DIM)), "mlp.fc2 maps 128 features to 64"),
    "projection": (change("attn.proj", nn.Linear(DIM, OTHER_DIM)), "attn.proj maps 32 features to 64"),
    "wrapped linear": (change("attn.qkv", LowRankLinear(DIM, 3 * DIM)), "attn.qkv is models.LowRankLinear"),
    "missing layer": (lambda block: delattr(block.mlp, "fc2"), "it has no mlp.fc2"),
    "layer scale": (change("attn.gamma", nn.Parameter(torch.ones(DIM))), "has a parameter attn.gamma"),
    "inner hook": (lambda block: block.attn.qkv.register_forward_hook(print), "attn.qkv has hooks"),
    "patched forward": (change("attn.forward", print), "forward of attn was patched"),
    "other arguments": (become(SkipBlock), r"its forward takes \(x, c, skip\)"),
    "other forward": (become(PostNormBlock), "computes something else than a DiT block"),
    "other conditioning": (become(TwiceActivated), "computes something else than a DiT block"),
    "failing forward": (change("attn.q_norm", nn.LayerNorm(5)), "could not be compared with a DiT block"),
    "attention scale": (change("attn.scale", 3.0), "computes something else than a DiT block"),
    "local attention": (change("attn", Local(DIM, HEADS)), "computes something else than a DiT block"),
}


@pytest.mark.parametrize("case", REFUSED_BLOCKS)
def test_refuses_a_block_by_name_and_changes_nothing(case):
    model = facebook_dit(fused_attn=case != "attention scale")
    for block in model.blocks:  # a model as it is before training: no gate is open
        nn.init.zeros_(block.adaLN_modulation[-1].weight)
        nn.init.zeros_(block.adaLN_modulation[-1].bias)
    spoil, message = REFUSED_BLOCKS[case]
    spoil(model.blocks[1])
    assert_block_is_refused(model, "blocks.1", message, snapshot)


class Untimed(DiT):
    def forward(self, x, noise, y):
        return super().forward(x, noise, y)


def patched():
    model = facebook_dit()
    model.forward = functools.partial(model.forward)
    return model


def odd_mlp():
    model = facebook_dit()
    for block in model.blocks:
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(DIM, 66), nn.Linear(66, DIM)
    return model


def two_models():
    return nn.ModuleList([facebook_dit(), facebook_dit()])


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2)), {}, ValueError, "this Sequential: it has no DiT block"),
        (lambda: swap_blocks(facebook_dit()), {}, ValueError, "'blocks.0' .*swapped already; call restore_blocks"),
        (facebook_dit, {"scope": "all"}, ValueError, "scope must be one of 'block', 'branch', 'inner', got 'all'"),
        (public_dtr, {"scope": "inner"}, ValueError, "'blocks.0' .*its own masks are of channels"),
        (
            facebook_dit,
            {"scope": "inner", "routing": dtr.DenoisingTaskRouting(beta=0.2)},
            ValueError,
            "'blocks.0' .*beta 0.2 of 4 channels leaves none active",
        ),
        (
            odd_mlp,
            {"scope": "inner", "routing": ROUTING},
            ValueError,
            "'blocks.0' .*66 of them for 4 heads",
        ),
        (facebook_dit, {"routing": 0.8}, TypeError, "routing must be DenoisingTaskRouting, RandomRouting or None"),
        (lambda: torch.compile(facebook_dit()), {}, ValueError, "it is compiled; swap first, then compile"),
        (lambda: dtr.nn.RoutedDiTBlock(DIM, 4), {}, ValueError, "runs the fused kernels as it is"),
        (facebook_dit, {"routing": dtr.DenoisingTaskRouting(beta=0.01)}, ValueError, "'blocks.0' .*leaves none active"),
        (lambda: facebook_dit().blocks, {"routing": ROUTING}, ValueError, "argument named t, timestep, timesteps"),
        (lambda: Untimed([DiTBlock(DIM, 4)], DIM), {"routing": ROUTING}, ValueError, "looked for in this Untimed"),
        (two_models, {"routing": ROUTING}, ValueError, "looked for in this ModuleList; .*each model of a container"),
        (patched, {"routing": ROUTING}, ValueError, "forward was patched; swap first"),
    ],
)
def test_refuses_a_model_and_changes_nothing(make, arguments, error, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        swap_blocks(model, **arguments)
    assert snapshot(model) == before


def test_compiled_blocks_are_refused():
    model = facebook_dit()
    model.blocks[1].compile()
    with pytest.raises(ValueError, match=r"'blocks.1' \(DiTBlock\): it is compiled"):
        swap_blocks(model)


def test_restore_refusals():
    with pytest.raises(ValueError, match="nothing to restore: no block of this DiT is swapped"):
        restore_blocks(facebook_dit())
    model = swap_blocks(facebook_dit(), ROUTING)
    model.forward = functools.partial(model.forward)
    with pytest.raises(ValueError, match="cannot restore this FusedDiT: its forward was patched since"):
        restore_blocks(model)
    assert repr(model.blocks[0]).startswith("FusedDiTBlock(")
