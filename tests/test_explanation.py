"""explain: what it says ran is what ran, and each reason has a case in which it is the reason."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import facebook_dit
from unets import UNetModel

import dtr_kernels as dtr
from dtr_kernels.nn.block import Stream
from dtr_kernels.ops import dispatch, extension
from dtr_kernels.ops.linear import _op as routed_linear_op

C, T = 32, 20
ROUTING = dtr.DenoisingTaskRouting(num_timesteps=T)
BATCH = torch.randn(2, 2, 8, 8), torch.tensor([3, 17]), torch.tensor([0, 5])
FUSED = ["routed_linear", "routed_mlp", "gated_residual"]


def make_model(routing=ROUTING, **options):
    sizes = {"input_size": 8, "in_channels": 2, "hidden_size": C, "depth": 2, "num_heads": 4, "num_classes": 5}
    return dtr.nn.DiT(**sizes, routing=routing, **options)


def only(report):
    """Return the report that all blocks share."""
    first, *others = ({**block, "name": ""} for block in report.as_dict()["blocks"])
    assert all(other == first for other in others)
    return first


def test_says_what_ran(monkeypatch):
    calls = []
    monkeypatch.setattr(
        type(routed_linear_op), "__call__", lambda op, *args: calls.append(op.name) or op._overload(*args)
    )
    report = only(dtr.explain(make_model(), BATCH))
    assert list(report["ops"]) == ["routed_linear", "routed_mlp"]  # and the next norm adds what the block leaves open
    # Before the blocks the embedder's, after them the final layer's.
    assert calls == ["checked_labels", *report["ops"], *report["ops"], "routed_linear"]
    assert report["routing"] == "25 of 32 channels, a window per sample"
    assert report["input"] == "[2, 16, 32] in float32 on cpu" and report["why_plain"] is None


def test_says_what_runs_where_somebody_looks():
    """Between the block with a hook and its neighbours there are tensors, which costs each of them an op."""
    model = make_model()
    model.blocks[1].register_forward_hook(lambda block, inputs, out: None)
    first, second = dtr.explain(model, BATCH).blocks
    assert list(first.ops) == ["routed_linear", "routed_mlp"]
    assert list(second.ops) == FUSED and second.input == "[2, 16, 32] in float32 on cpu"


def test_one_timestep_for_all():
    x, _, y = BATCH
    assert only(dtr.explain(make_model(), {"x": x, "t": 19, "y": y}))["routing"] == "channels 7 to 31 of 32"


@pytest.mark.parametrize("scope", ["block", "branch"])
@pytest.mark.parametrize("tokens, size", [(16, 8), (256, 32)])
def test_gemms_on_slices(scope, tokens, size):
    """Two samples of 256 tokens at one timestep make a slice of 25 of 32 channels worth it, of 16 tokens not."""
    model = make_model(scope=scope)
    model.input_size, model.pos_embed = size, torch.nn.Parameter(torch.zeros(1, tokens, C))
    ops = only(dtr.explain(model, (torch.randn(2, 2, size, size), torch.tensor([4, 4]), BATCH[2])))["ops"]
    large = "compiled CPU kernels; GEMMs on slices of the weight"
    assert (ops["routed_linear"] == large) == (tokens == 256)
    assert ops["routed_mlp"].endswith("; GELU in a pass of its own")
    assert ops["routed_mlp"].startswith(large) == (tokens == 256 and scope == "branch")
    if tokens == 16:
        assert "with 25 of 32 channels active, a slice of the weight for 32 tokens saves" in ops["routed_linear"]


def test_heads_of_scope_inner():
    model = make_model(scope="inner")
    report = only(dtr.explain(model, BATCH))
    assert report["routing"] == "3 of 4 heads, a window per sample"
    slices = "compiled CPU kernels; GEMMs on slices of the weight, one for each different window"
    assert report["ops"] == {
        "inner_linear": slices,
        "inner_projection": slices,
        "inner_mlp": f"{slices}; GELU in a pass of its own",
    }
    x, _, y = BATCH
    assert only(dtr.explain(model, {"x": x, "t": 0, "y": y}))["routing"].startswith("heads 0 to ")


def test_16_bit_gemms_are_dense_on_a_cpu():
    x, t, y = BATCH
    report = only(dtr.explain(make_model().bfloat16(), (x.bfloat16(), t, y)))
    assert "repacks a slice" in report["ops"]["routed_linear"] and "bfloat16" in report["input"]


def test_on_a_gpu_says_at_what_width_products_are_dense(monkeypatch):
    monkeypatch.setattr("dtr_kernels.ops.tiles._forced", {})
    x, t, y = BATCH
    with dispatch.recording(90):
        ops = only(dtr.explain(make_model().bfloat16(), (x.bfloat16(), t, y)))["ops"]
    assert ops["routed_linear"].startswith("Triton kernels; cuBLAS over all channels: with 25 of 32 channels active, ")
    assert "not known to be faster for 32 tokens; measure it with python -m benchmarks tune" in ops["routed_linear"]


def test_a_block_chooses_its_path_once(seed):
    """Its ops are handed what was chosen; inside, each chooses its GEMM."""
    block = make_model().blocks[0]
    x, c = torch.randn(2, 16, C), torch.randn(2, C)
    with dispatch.choices() as made:
        block(Stream(x), c, ROUTING.window(torch.tensor([3, 17]), C))
    assert [choice.path for choice in made] == ["cpu", "dense", "dense", "pass"]
    dispatch.choose(x)
    assert len(made) == 4  # outside, nothing listens


def test_small_batches(monkeypatch):
    monkeypatch.setattr("dtr_kernels.ops.dispatch.LEAST_ELEMENTS_ON_CPU", 1025)
    report = dtr.explain(make_model(), BATCH)
    assert only(report)["why_plain"].startswith("x has 1,024 elements") and not only(report)["ops"]
    assert str(report).startswith("0 of 2 blocks run fused ops")
    monkeypatch.setattr("dtr_kernels.ops.dispatch.LEAST_ELEMENTS_ON_CPU", 1024)
    assert only(dtr.explain(make_model(), BATCH))["ops"]


def test_masks_and_missing_kernels(monkeypatch):
    random = make_model(dtr.RandomRouting(num_timesteps=T, beta=0.8, seed=0))
    assert "RandomRouting" in only(dtr.explain(random, BATCH))["why_plain"]
    monkeypatch.setattr(extension, "kernels", None)
    monkeypatch.setattr(extension, "unavailable", "the extension was lost")
    assert only(dtr.explain(make_model(None), BATCH)) == {
        "name": "",
        "kind": "RoutedDiTBlock",
        "routing": "unrouted",
        "input": "[2, 16, 32] in float32 on cpu",
        "ops": {},
        "why_plain": "the extension was lost",
    }


def test_models_before_and_after_a_swap():
    model, batch = facebook_dit(), (torch.randn(2, 3, 8, 8), torch.tensor([3, 17]), torch.tensor([0, 1]))
    assert "call dtr_kernels.swap_blocks" in only(dtr.explain(model, batch))["why_plain"]
    dtr.swap_blocks(model, ROUTING)
    report = only(dtr.explain(model, batch))
    assert list(report["ops"]) == FUSED and "a window per sample" in report["routing"]
    dtr.restore_blocks(model)
    model.blocks[0].mlp.act = model.blocks[1].mlp.act = torch.nn.SiLU()
    assert "it is not swapped: mlp.act is SiLU" in only(dtr.explain(model, batch))["why_plain"]


def test_blocks_called_by_keywords():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = facebook_dit().blocks[0]

        def forward(self, x, t):
            return self.block(x=x, c=x.mean(1))

    model = dtr.swap_blocks(Model(), ROUTING)
    assert list(only(dtr.explain(model, (torch.randn(2, 16, C), torch.tensor([3, 17]))))["ops"]) == FUSED


def test_a_block_that_is_not_called_as_most_are():
    class Turned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = facebook_dit().blocks[0]
            self.norm = torch.nn.BatchNorm1d(16)

        def forward(self, x, c):
            return self.block(c=c, x=self.norm(x))

    model = Turned()
    before = copy.deepcopy(model.state_dict())
    report = only(dtr.explain(model, (torch.randn(2, 16, C), torch.randn(2, C))))
    assert report["input"].startswith("[2, 16, 32]") and report["routing"] == "as the model has it"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with_rope = facebook_dit().blocks[0]
    with_rope.forward = lambda x, c, rope: x
    report = only(dtr.explain(with_rope, (torch.randn(2, 16, C), torch.randn(2, C), (None, None))))
    assert report["why_plain"].startswith("it is not swapped")


def test_a_swapped_block_whose_forward_was_replaced():
    model = dtr.swap_blocks(facebook_dit())
    for block in model.blocks:
        block.forward = lambda x, c: x
    report = only(dtr.explain(model, (torch.randn(2, 3, 8, 8), torch.tensor([3, 17]), torch.tensor([0, 1]))))
    assert report["why_plain"] == "its forward was replaced, and called no fused op"


def test_unets():
    model = dtr.swap_blocks(UNetModel(), ROUTING)
    reports = dtr.explain(model, (torch.randn(2, 3, 8, 8), torch.tensor([3, 17]))).blocks
    assert reports and all("a window of its own" in report.why_plain for report in reports)


def test_leaves_no_trace():
    model = make_model(class_dropout_prob=0.5).train()
    state = torch.get_rng_state()
    dtr.explain(model, BATCH)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="must have shape"):
        dtr.explain(model, (*BATCH[:2], BATCH[2][:1]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_blocks_that_a_batch_does_not_reach():
    model = torch.nn.ModuleDict({"used": torch.nn.Identity(), "block": dtr.nn.RoutedDiTBlock(C, 4)})
    model.forward = lambda x: x
    (report,) = dtr.explain(model, torch.zeros(1)).blocks
    assert report.why_plain == "the batch did not reach this block" and report.input is None


def test_is_json_and_a_page(capsys):
    report = dtr.explain(make_model(), BATCH)
    assert json.loads(json.dumps(report.as_dict()))["blocks"][1]["name"] == "blocks.1"
    print(report)
    assert "blocks.0 to blocks.1, 2 blocks (RoutedDiTBlock): 25 of 32 channels" in capsys.readouterr().out


@pytest.mark.parametrize(
    "model, batch, error, says",
    [
        (torch.nn.Linear(2, 2), BATCH, ValueError, "this Linear has no block"),
        (make_model(), "x", TypeError, "batch must hold the arguments"),
        (torch.compile(make_model()), BATCH, ValueError, "compiled; explain the model before torch.compile"),
    ],
)
def test_refusals(model, batch, error, says):
    with pytest.raises(error, match=says):
        dtr.explain(model, batch)


def test_choices_of_another_thread_are_not_heard():
    with dispatch.choices() as heard, ThreadPoolExecutor(1) as other:
        other.submit(dispatch.choose, torch.ones(1)).result()
        assert heard == []
        choice = dispatch.choose(torch.ones(1))
        assert heard == [choice]
