"""Tiny real objects that tests share: models of a few thousand parameters, and packed batches for them."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import pytest

from llm_jax.data.batch import Batch
from llm_jax.model import Local, ModelConfig, abstract_params

LLAMA = ModelConfig(
    vocab_size=64,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_seq_len=64,
)
# every switch away from LLAMA's at least once
BLOOM = dataclasses.replace(
    LLAMA, position="alibi", norm="layer", mlp="plain", activation="gelu_tanh", attention_bias="qkvo",
    mlp_bias=True, num_heads=6, num_kv_heads=1, tied_embeddings=True,
)  # fmt: skip
NEOX = dataclasses.replace(
    LLAMA, residual="parallel_two_norms", norm="layer_no_bias", rope_fraction=0.25, mlp="plain",
    activation="gelu", attention_bias="qkv", num_kv_heads=4,
)  # fmt: skip
GPTJ = dataclasses.replace(
    LLAMA, residual="parallel_one_norm", rope_pairing="interleaved", activation="relu_squared"
)
GPT2 = dataclasses.replace(LLAMA, position="learned", activation="relu", mlp_bias=True)
# every switch of the decoder that those above leave alone
GEMMA = dataclasses.replace(
    LLAMA, norm="rms_plus_one", norm_placement="both", qk_norm="head", num_layers=3,
    embedding_multiplier=32**0.5, tied_embeddings=True, attention_scale=0.3, attention_soft_cap=2.0,
    logit_soft_cap=3.0, local=Local(window=5, full_every=2, rope_theta=100.0),
)  # fmt: skip
COHERE = dataclasses.replace(
    LLAMA, norm="layer_no_bias", qk_norm="each_head", residual="parallel_one_norm", head_bias=True,
    logit_multiplier=0.25, local=Local(window=4, first=1),
)  # fmt: skip
OLMO = dataclasses.replace(
    LLAMA, norm_placement="output", qk_norm="whole", residual_multiplier=0.5, qkv_clip=1.0,
    embedding_norm=True,
)  # fmt: skip
FAMILIES = {"llama": LLAMA, "bloom": BLOOM, "neox": NEOX, "gptj": GPTJ, "gpt2": GPT2}
SWITCHED = {"gemma": GEMMA, "cohere": COHERE, "olmo": OLMO}


def drawn_params(config: ModelConfig, seed: int = 0) -> dict:
    """Parameters of the right names and shapes, all normal with deviation 0.1: nothing to compile."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, abstract_params(config))


def random_batch(seed: int, rows: int, length: int, vocab_size: int = 64) -> Batch:
    """Rows packed from documents of random lengths, with padding at the end of some."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (rows, length), dtype=np.int32)
    targets = rng.integers(0, vocab_size, (rows, length), dtype=np.int32)
    positions = np.zeros((rows, length), np.int32)
    segments = np.zeros((rows, length), np.int32)
    for row in range(rows):
        at, segment = 0, 1
        while at < length - rng.integers(0, 4):
            size = min(int(rng.integers(1, length // 2 + 1)), length - at)
            positions[row, at : at + size] = np.arange(size)
            segments[row, at : at + size] = segment
            at, segment = at + size, segment + 1
    mask = (segments > 0).astype(np.float32)
    return Batch(tokens * (segments > 0), targets * (segments > 0), positions, segments, mask)


def some(families: Iterable[str], *quick: str) -> list[Any]:
    """All of them as parameters of a test; those that are not `quick` are slow."""
    return [
        pytest.param(family, marks=() if family in quick else pytest.mark.slow)
        for family in families
    ]
