"""swap_blocks on diffusers' own DiTTransformer2DModel, in its pipeline and out of it."""

import copy
import functools
import json
import os
import pickle

os.environ["HF_HUB_OFFLINE"] = "1"

import any_torchvision  # noqa: F401  # before diffusers
import pytest
import torch
from comparing import assert_as_exact, differ, output_of, results, snapshot, widened
from models import LowRankLinear, change
from refusals import refused
from swapping import with_heads
from torch import nn

import dtr_kernels as dtr

pytest.importorskip("diffusers", reason="NOT RUN: needs diffusers; pip install '.[test]'")
import diffusers
from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.embeddings import SinusoidalPositionalEmbedding

C, HEADS, T, CLASSES = 64, 4, 1000, 1000  # DiTPipeline takes class 1000 for no class
ROUTING = dtr.DenoisingTaskRouting(num_timesteps=T)
RANDOM = dtr.RandomRouting(num_timesteps=T)

pytestmark = pytest.mark.usefixtures("one_thread", "seed")


def dit(**options):
    """A small model with diffusers' own initialisation, in which no gate is closed; in training mode, as it is made."""
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    return diffusers.DiTTransformer2DModel(**sizes, in_channels=4, num_embeds_ada_norm=CLASSES, **options).train()


def batch(times=(0, 700, 900, 999)):
    """Four images of different timesteps, and labels."""
    return torch.randn(4, 4, 8, 8), torch.tensor(times), torch.randint(CLASSES, (4,))


def seeded(model, *batches):
    """Results with labels dropped at random, the same ones each time."""
    torch.manual_seed(1)
    return results(model, *batches)


def paper_mask(t, channels=C):
    return dtr.reference.routing_mask(t, channels, T)


def masked_block(block, mask, scope, hidden_states, *args, timestep, class_labels, **kwargs):
    """A block of diffusers under a mask, by its own modules."""
    if scope == "inner":
        own = functools.partial(type(block).forward, block)
        with with_heads(mask, block.attn1.to_out[0], block.ff.net[2]):
            return own(hidden_states, *args, timestep=timestep, class_labels=class_labels, **kwargs)
    x, m = hidden_states, mask[:, None].to(hidden_states.dtype)
    norm, gate1, shift2, scale2, gate2 = block.norm1(m * x, timestep, class_labels, hidden_dtype=x.dtype)
    update = gate1[:, None] * block.attn1(norm)
    seen = m * x + update if scope == "block" else m * (x + update)
    mlp = block.ff(block.norm3(seen) * (1 + scale2[:, None]) + shift2[:, None])
    return x + update + gate2[:, None] * mlp


def oracle(model, mask_of, scope="block"):
    """A copy of the model that runs its blocks under the mask that mask_of makes of timesteps."""
    model = copy.deepcopy(model)
    for block in model.transformer_blocks:
        block.forward = lambda *args, _block=block, timestep, **kwargs: masked_block(
            _block, mask_of(timestep, HEADS if scope == "inner" else C), scope, *args, timestep=timestep, **kwargs
        )
    return model


# --- the same function


@pytest.mark.parametrize("processor", [AttnProcessor2_0, AttnProcessor])
def test_without_routing_keeps_the_models_own_function(processor):
    model, inputs = dit(), batch()
    for block in model.transformer_blocks:
        block.attn1.set_processor(processor())
    plain, exact = seeded(model, inputs), seeded(*widened(model, inputs))
    assert dtr.swap_blocks(model) is model
    assert_as_exact(seeded(model, inputs), plain, exact)


@pytest.mark.parametrize("scope", dtr.reference.SCOPES)
@pytest.mark.parametrize(("routing", "mask_of"), [(ROUTING, paper_mask), (RANDOM, RANDOM.mask)], ids=["DTR", "random"])
def test_a_given_routing_matches_the_masked_blocks(routing, mask_of, scope):
    model, inputs = dit(), batch()
    plain = seeded(oracle(model, mask_of, scope), inputs)
    wide, *batches = widened(model, inputs)
    exact = seeded(oracle(wide, mask_of, scope), *batches)
    assert differ(seeded(model, inputs), plain)
    assert_as_exact(seeded(dtr.swap_blocks(model, routing, scope), inputs), plain, exact)


def test_the_oracle_is_diffusers_block_on_the_masked_input():
    model, (_, t, y) = dit().eval(), batch()
    block, tokens, mask = model.transformer_blocks[0], torch.randn(4, 5, C), paper_mask(t)
    outside = tokens * (1 - mask[:, None])
    expected = block(tokens - outside, timestep=t, class_labels=y) + outside
    torch.testing.assert_close(masked_block(block, mask, "block", tokens, timestep=t, class_labels=y), expected)


@pytest.mark.parametrize("routing", [None, ROUTING])
def test_bf16(routing):
    model, (x, t, y) = dit().to(torch.bfloat16), batch()
    inputs = x.bfloat16(), t, y
    masked = functools.partial(oracle, mask_of=paper_mask) if routing else copy.deepcopy
    wide, *batches = widened(model, inputs)
    plain, exact = seeded(masked(model), inputs), seeded(masked(wide), *batches)
    assert_as_exact(seeded(dtr.swap_blocks(model, routing), inputs), plain, exact)


def test_a_swapped_model_changes_its_dtype():
    model, (x, t, y) = dit().eval(), batch()
    wide, *batches = widened(dtr.swap_blocks(copy.deepcopy(model)).to(torch.bfloat16), (x.bfloat16(), t, y))
    exact = results(oracle(dtr.restore_blocks(wide), paper_mask), *batches)
    plain = results(oracle(model, paper_mask).to(torch.bfloat16), (x.bfloat16(), t, y))
    actual = results(dtr.swap_blocks(model, ROUTING).to(torch.bfloat16), (x.bfloat16(), t, y))
    assert_as_exact(actual, plain, exact)


def test_autocast():
    model, inputs = dit(), batch()
    wide, *batches = widened(model, inputs)
    exact = seeded(oracle(wide, paper_mask), *batches)
    with torch.autocast("cpu", torch.bfloat16):
        plain = seeded(oracle(model, paper_mask), inputs)
        actual = seeded(dtr.swap_blocks(model, ROUTING), inputs)
    assert_as_exact(actual, plain, exact, torch.bfloat16)


def test_timesteps_may_be_expanded():
    """As the pipeline passes them: one timestep, expanded over the batch without a copy; or a single one."""
    model, (x, _, y) = dit().eval(), batch()
    t = torch.tensor([0, 917])[1:]
    expected = oracle(model, paper_mask)(x, t.repeat(4), y).sample
    dtr.swap_blocks(model, ROUTING)
    for times in (t.expand(4), t):
        torch.testing.assert_close(model(x, times, y).sample, expected, rtol=1e-4, atol=1e-4)
    found = model(x, timestep=t, class_labels=y, return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def sigma_of(t):
    """The noise level of a scheduler's floating-point timestep numbers."""
    return t / (T - 1)


def test_floating_point_timestep_numbers():
    """Such as EulerDiscreteScheduler's, which lie between the numbers of training."""
    model, (x, _, y) = dit().eval(), batch()
    t = torch.tensor([3.5, 500.25, 901.0, 999.0])
    expected = oracle(model, lambda t, C: ROUTING.window(t / (T - 1), C).mask())(x, t, y).sample
    with pytest.raises(ValueError, match="timestep numbers need an integer dtype"):
        dtr.swap_blocks(model, ROUTING)(x, t, y)
    dtr.swap_blocks(dtr.restore_blocks(model), ROUTING, noise_level=sigma_of)
    torch.testing.assert_close(model(x, t, y).sample, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("routing", [ROUTING, RANDOM])
def test_checkpointed_blocks_recompute_for_their_own_timesteps(routing):
    model = dtr.swap_blocks(dit(), routing)
    times = torch.tensor([0, 300, 500, 999, 998, 3, 2, 600])
    batches = [(x, t, y) for (x, _, y), t in zip((batch(), batch()), times.split(4), strict=True)]  # slices of one
    expected = seeded(model, *batches)
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(seeded(model, *batches), expected, rtol=1e-4, atol=1e-5)


def test_compiles_whole_and_once():
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    model = dtr.swap_blocks(dit().eval(), ROUTING)
    batches = batch(), batch((5, 6, 7, 8))
    expected = results(model, *batches)
    counter = CompileCounterWithBackend("aot_eager")
    found = results(torch.compile(model, backend=counter, fullgraph=True), *batches)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


# --- files, copies, restoring


def test_restore_undoes_everything():
    model, inputs = dit(), batch()
    expected, before, keys = seeded(model, inputs), snapshot(model), list(model.state_dict())
    dtr.swap_blocks(model, ROUTING)
    assert isinstance(model, diffusers.DiTTransformer2DModel) and list(model.state_dict()) == keys
    seeded(model, inputs)
    assert dtr.restore_blocks(model) is model
    assert snapshot(model) == before
    torch.testing.assert_close(seeded(model, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("routing", [None, ROUTING])
def test_saved_and_loaded(routing, tmp_path):
    model, inputs = dit().eval(), batch()
    own = output_of(model(*inputs))
    dtr.swap_blocks(model, routing).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "DiTTransformer2DModel"
    for kind in (diffusers.DiTTransformer2DModel, diffusers.AutoModel, type(model)):
        loaded = kind.from_pretrained(str(tmp_path))
        assert type(loaded) is diffusers.DiTTransformer2DModel
        assert torch.equal(output_of(loaded(*inputs)), own)
        assert torch.equal(output_of(dtr.swap_blocks(loaded, routing)(*inputs)), output_of(model(*inputs)))
    assert type(type(model).from_config(model.config)) is diffusers.DiTTransformer2DModel


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stand_on_their_own(clone):
    model, inputs = dtr.swap_blocks(dit().eval(), ROUTING, noise_level=sigma_of), batch()
    x, t, y = inputs
    expected = model(x, t.float(), y).sample
    cloned = clone(model)
    assert type(dtr.restore_blocks(model)) is diffusers.DiTTransformer2DModel
    assert torch.equal(cloned(x, t.float(), y).sample, expected)


# --- the pipeline


def pipeline(scheduler):
    torch.manual_seed(3)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, layers_per_block=1, sample_size=8
    )
    pipe = diffusers.DiTPipeline(dit(out_channels=8).eval(), vae.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe):
    return pipe(
        [1, 207, 999], num_inference_steps=3, generator=torch.Generator().manual_seed(4), output_type="pt"
    ).images


@pytest.mark.parametrize("scheduler", [diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler])
@pytest.mark.parametrize("routing", [None, ROUTING])
def test_the_pipeline_draws_the_same(routing, scheduler, tmp_path):
    pipe = pipeline(scheduler())
    own = images(pipe)
    model = pipe.transformer
    if routing is not None:
        pipe.transformer = oracle(model, paper_mask)
    expected = images(pipe)
    pipe.transformer = dtr.swap_blocks(model, routing)
    assert (expected - own).abs().max() > 1e-3 or routing is None
    torch.testing.assert_close(images(pipe), expected, rtol=0, atol=1e-4)
    pipe.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "model_index.json").read_text())
    assert saved["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(images(loaded), own)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda block: block.set_chunk_feed_forward(2), "its MLP is computed in chunks"),
        (lambda block: nn.utils.weight_norm(block.attn1.to_k), "attn1.to_k has hooks"),
        (lambda block: block.ff.net.__setitem__(0, GEGLU(C, 4 * C)), "ff.net.0 is GEGLU"),
        (lambda block: block.ff.register_forward_hook(print), "ff has hooks"),
        (lambda block: block.attn1.set_processor(Recording()), r"attn1\.processor is Recording"),
    ],
    ids=["chunks", "weight norm", "gated GELU", "hook", "processor"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_blocks_that_were_changed_after_the_swap_are_refused(spoil, message):
    model = dtr.swap_blocks(dit().eval())
    spoil(model.transformer_blocks[1])
    with pytest.raises(RuntimeError, match=f"'transformer_blocks.1' was changed: {message}"):
        model(torch.randn(2, 4, 8, 8), timestep=torch.tensor([1, 2]), class_labels=torch.tensor([1, 2]))


def test_the_pipeline_draws_the_same_at_the_float_timesteps_of_euler():
    routing, pipe = dtr.DenoisingTaskRouting(float_timesteps=True), pipeline(diffusers.EulerDiscreteScheduler())
    model = pipe.transformer
    pipe.transformer = oracle(model, lambda t, C: routing.window(t, C).mask())
    expected = images(pipe)
    pipe.transformer = dtr.swap_blocks(model, routing)
    torch.testing.assert_close(images(pipe), expected, rtol=0, atol=1e-4)
    pipe.transformer = dtr.swap_blocks(dtr.restore_blocks(model), ROUTING)
    with pytest.raises(ValueError, match=r"float_timesteps=True; .* noise_level"):
        images(pipe)


def test_one_number_is_the_timestep_of_the_batch():
    model, latents, labels = dtr.swap_blocks(dit().eval(), ROUTING), torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    expected = model(latents, timestep=torch.tensor([640, 640]), class_labels=labels).sample
    for t in (640, torch.tensor(640)):
        torch.testing.assert_close(model(latents, timestep=t, class_labels=labels).sample, expected)


def test_a_pipeline_made_of_a_swapped_model(tmp_path):
    parts = pipeline(diffusers.DDIMScheduler()).components
    parts["transformer"] = dtr.swap_blocks(parts["transformer"], ROUTING)
    pipe = diffusers.DiTPipeline(**parts)
    assert pipe.config["transformer"] == ("diffusers", "DiTTransformer2DModel")
    pipe.save_pretrained(tmp_path)
    assert type(diffusers.DiTPipeline.from_pretrained(tmp_path).transformer) is diffusers.DiTTransformer2DModel


# --- refusals


class Recording(AttnProcessor2_0):
    """A user's processor that computes the same, and would no longer be called."""


REFUSED_BLOCKS = {
    "processor": (lambda block: block.attn1.set_processor(Recording()), "attn1.processor is Recording"),
    "fused projections": (lambda block: block.attn1.fuse_projections(), "a parameter attn1.to_qkv.weight"),
    "attention dropout": (change("attn1.to_out.1.p", 0.1), "attn1.to_out.1 drops with probability 0.1"),
    "MLP dropout": (change("ff.net.1.p", 0.1), "ff.net.1 drops with probability 0.1"),
    "exact GELU": (change("ff.net.0.approximate", "none"), "fused MLP computes nn.GELU"),
    "gated GELU": (change("ff.net.0", GEGLU(C, 4 * C)), "ff.net.0 is GEGLU, but the fused MLP is"),
    "SwiGLU": (change("ff.net.0", SwiGLU(C, 4 * C)), "ff.net.0 is SwiGLU"),
    "affine norm": (change("norm3", nn.LayerNorm(C)), "norm3 has affine parameters"),
    "chunks": (lambda block: block.set_chunk_feed_forward(2), "its MLP is computed in chunks"),
    "wrapped linear": (change("attn1.to_k", LowRankLinear(C, C)), "attn1.to_k is models.LowRankLinear"),
    "narrow values": (change("attn1.to_v", nn.Linear(C, C // 2)), "attn1.to_v maps 64 features to 32"),
    "one bias": (change("attn1.to_q", nn.Linear(C, C, bias=False)), "have a bias and some not"),
    "heads": (change("attn1.heads", 5), "attn.num_heads is 5"),
    "rescaled": (change("attn1.rescale_output_factor", 2.0), "computes something else than a DiT block"),
    "other kind": (change("norm_type", "ada_norm_continuous"), "could not be compared with a DiT block"),
    "positions": (change("pos_embed", SinusoidalPositionalEmbedding(C, 64)), "computes something else than a DiT"),
    "hook": (lambda block: block.ff.register_forward_hook(print), "ff has hooks"),
}


@pytest.mark.parametrize("case", REFUSED_BLOCKS)
def test_refuses_a_block_by_name_and_changes_nothing(case):
    model = dit()
    nn.init.zeros_(model.transformer_blocks[1].norm1.linear.weight)  # gates as closed as before training
    nn.init.zeros_(model.transformer_blocks[1].norm1.linear.bias)
    spoil, message = REFUSED_BLOCKS[case]
    spoil(model.transformer_blocks[1])
    before, state = snapshot(model), torch.get_rng_state()
    name = "cannot swap block 'transformer_blocks.1' (BasicTransformerBlock): "
    refused(lambda: dtr.swap_blocks(model, ROUTING), ValueError, [name, message])
    assert snapshot(model) == before and torch.equal(torch.get_rng_state(), state)


def test_hooks_of_embeddings_go_on():
    model, calls = dit(), []
    model.transformer_blocks[1].norm1.emb.register_forward_hook(lambda *_: calls.append(1))
    dtr.swap_blocks(model, ROUTING)
    assert not calls
    model(*batch())
    assert len(calls) == 1


def test_refuses_arguments_that_would_be_lost():
    model, (x, t, y) = dtr.swap_blocks(dit(), ROUTING), batch()
    assert model(x, t, y, cross_attention_kwargs={}).sample.isfinite().all()
    with pytest.raises(ValueError, match="cross_attention_kwargs must be None"):
        model(x, t, y, cross_attention_kwargs={"scale": 0.5})
    tokens = torch.randn(4, 5, C)
    for name in ("attention_mask", "encoder_hidden_states", "encoder_attention_mask"):
        with pytest.raises(ValueError, match=f"{name} must be None"):
            model.transformer_blocks[0](tokens, timestep=t, class_labels=y, **{name: torch.ones(4, 5)})
    with pytest.raises(TypeError, match="routed by its argument 'timestep', which is missing"):
        model(x, class_labels=y)


def test_gradients_of_clusters():
    """The surgery's rules know the queries', keys' and values' weights in their stacked form."""
    model, (x, t, y) = dit().eval(), batch()
    cluster = torch.tensor([0, 1, 0, 1])

    def loss(x, t, y):
        return output_of(model(x, t, y)).square().mean(dim=(1, 2, 3))

    dtr.swap_blocks(model, ROUTING)
    updates = []
    for engine in ("per_cluster", "one_pass"):
        generator = torch.Generator().manual_seed(0)
        surgery = dtr.GradientSurgery(model.named_parameters(), num_clusters=2, engine=engine, generator=generator)
        model.zero_grad()
        surgery.backward_batch(loss, cluster, x, t, y)
        updates.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*updates, rtol=1e-3, atol=1e-6)
