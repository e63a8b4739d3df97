"""Tiny real objects that tests share: models of a few thousand parameters, and packed batches for them."""

import dataclasses

import numpy as np

from llm_jax.data.batch import Batch
from llm_jax.model import ModelConfig

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
FAMILIES = {"llama": LLAMA, "bloom": BLOOM, "neox": NEOX, "gptj": GPTJ, "gpt2": GPT2}


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
