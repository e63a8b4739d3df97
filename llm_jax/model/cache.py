"""The KV cache: an argument and a return value of `forward`, never hidden state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.model.config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, in slots. A slot's position is data, not its index.

    Rows of different lengths share the slots: a slot whose segment is 0 is empty and never attended,
    so prompts may be padded on either side.
    """

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    positions_BS: jax.Array  # int32, position of the token in each slot
    segments_BS: jax.Array  # int32, 0 where the slot is empty
    used: jax.Array  # int32 scalar: the next T tokens go to slots used .. used + T - 1


def init_cache(config: ModelConfig, batch_size: int, max_len: int) -> KVCache:
    """An empty cache of `max_len` slots for `batch_size` rows."""
    shape = (config.num_layers, batch_size, max_len, config.num_kv_heads, config.head_dim)
    return KVCache(
        k_LBSKH=jnp.zeros(shape, config.dtype),
        v_LBSKH=jnp.zeros(shape, config.dtype),
        positions_BS=jnp.zeros((batch_size, max_len), jnp.int32),
        segments_BS=jnp.zeros((batch_size, max_len), jnp.int32),
        used=jnp.zeros((), jnp.int32),
    )
