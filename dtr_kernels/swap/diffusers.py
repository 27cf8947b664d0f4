"""Blocks of diffusers' DiTTransformer2DModel: BasicTransformerBlock with adaptive norms of type "ada_norm_zero"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dtr_kernels.swap.checks import has, missing_problems
from dtr_kernels.swap.family import TRIAL_TOKENS, Family, RandomTensor, open_gates
from dtr_kernels.swap.views import AttentionLayers, Layers, MlpLayers, StackedLinear

# Processors whose attention the fused one computes, by name, as diffusers is not imported here.
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")
_KNOWN_BY = ("attn1", "ff", "norm1.linear", "norm1.emb.timestep_embedder", "norm1.emb.class_embedder")
_NEEDED = (
    "norm1.norm",
    "norm1.silu",
    "norm3",
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn1.heads",
    "attn1.processor",
    "ff.net.0.proj",
    "ff.net.2",
)


class _Conditioning(NamedTuple):
    """The inputs of a block's modulation, which the block's own embedding takes."""

    timestep: Tensor
    class_labels: Tensor
    dtype: torch.dtype


class Diffusers(Family):
    """The family of diffusers' blocks, each with its own embedding of timestep and label."""

    name = "DiT block of diffusers"
    anatomy = "a module with children norm1 (with emb for timestep and class, and linear), attn1, norm3 and ff"
    called = ("norm1.emb", "norm1.silu", "norm1.linear")

    @classmethod
    def matches(cls, block: nn.Module) -> bool:
        return all(has(block, path) for path in _KNOWN_BY)

    @classmethod
    def layers(cls, block: Any) -> Layers:
        attn, norm, mlp = block.attn1, block.norm1, block.ff.net

        def modulation(c: _Conditioning) -> Tensor:
            return norm.linear(norm.silu(norm.emb(c.timestep, c.class_labels, hidden_dtype=c.dtype)))

        return Layers(
            norm.norm,
            AttentionLayers(StackedLinear((attn.to_q, attn.to_k, attn.to_v)), attn.to_out[0], attn.heads),
            block.norm3,
            MlpLayers(mlp[0].proj, mlp[0].gelu, mlp[2]),
            modulation,
        )

    @classmethod
    def arguments(
        cls,
        hidden_states: Any,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        class_labels: Any = None,
        added_cond_kwargs: Any = None,
    ) -> tuple[Tensor, Any]:
        others = {
            "attention_mask": attention_mask,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "cross_attention_kwargs": cross_attention_kwargs or None,
            "added_cond_kwargs": added_cond_kwargs or None,
        }
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)} must be None in swapped blocks, which know timestep and class_labels only; leave "
                "it out, or call restore_blocks"
            )
        return hidden_states, _Conditioning(timestep, class_labels, hidden_states.dtype)

    @classmethod
    def conditioned(cls, block: Any) -> tuple[nn.Module, ...]:
        return block.norm1.emb, block.norm1.linear

    @classmethod
    def marker(cls, c: _Conditioning) -> Tensor:
        return c.timestep

    @classmethod
    def problems(cls, block: Any) -> Iterator[str]:
        yield from missing_problems(block, _NEEDED, cls.name)
        if problem := _processor_problem(block.attn1):
            yield problem
        if block._chunk_size is not None:
            yield "its MLP is computed in chunks, which the fused one is not; call set_chunk_feed_forward(None)"
        act = block.ff.net[0]
        if type(act).__name__ != "GELU":
            yield (
                f'ff.net.0 is {type(act).__name__}, but the fused MLP is that of activation_fn="gelu-approximate"; '
                "leave this model unswapped"
            )
        yield from super().problems(block)

    @classmethod
    def trial_input(cls, copy: Any, random: RandomTensor) -> tuple[Any, ...]:
        x = random(2, TRIAL_TOKENS, cls.channels(copy))
        last = copy.norm1.emb.class_embedder.embedding_table.num_embeddings - 1
        timestep, class_labels = (torch.tensor(values, device=x.device) for values in ([1, 30], [0, last]))
        return x, None, None, None, timestep, None, class_labels

    @classmethod
    def prepare_trial(cls, copy: Any, c: _Conditioning, random: RandomTensor) -> None:
        open_gates(copy, "norm1.linear", random(2, 6 * cls.channels(copy)))


def _processor_problem(attn: Any) -> str | None:
    kind = type(attn.processor).__name__
    if kind in _PROCESSORS:
        return None
    return (
        f"attn1.processor is {kind}, which the fused attention does not call; set one of {', '.join(_PROCESSORS)}, or "
        "leave this model unswapped"
    )
