"""Self-attention: projections, positions, cache write, and one call into `kernels.attention`."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.kernels.attention import flash_attention
from llm_jax.model.config import ModelConfig
from llm_jax.model.layers import add_bias, fan_in, matrix, residual_scale
from llm_jax.model.positions import alibi_slopes, rotate
from llm_jax.sharding import constrain


class Context(NamedTuple):
    """What every layer needs to know about the tokens, computed once per forward pass."""

    positions_BT: jax.Array  # of the queries
    segments_BT: jax.Array
    kv_positions_BS: jax.Array  # of the keys: the same, or the cache's slots
    kv_segments_BS: jax.Array
    cos: jax.Array | None  # rotary tables [B, T, 1, rotary_dim / 2]; None without RoPE
    sin: jax.Array | None
    slot: jax.Array | int  # where this call's keys go in the cache; 0 without one


class Attention(nn.Module):
    """Full, grouped-query (2305.13245) or multi-query (1911.02150) causal attention."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, layer_cache: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """[B, T, D] -> [B, T, D] and the layer's updated cache (k_BSKH, v_BSKH), if any."""
        config = self.config
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        q_BTNH = self.project("query", x_BTD, N, "heads")
        k_BTKH = self.project("key", x_BTD, K, "kv_heads")
        v_BTKH = self.project("value", x_BTD, K, "kv_heads")
        if context.cos is not None and context.sin is not None:
            q_BTNH = rotate(config, q_BTNH, context.cos, context.sin)
            k_BTKH = rotate(config, k_BTKH, context.cos, context.sin)
        k_BSKH, v_BSKH = k_BTKH, v_BTKH
        if layer_cache is not None:
            at = (0, context.slot, 0, 0)
            k_BSKH = jax.lax.dynamic_update_slice(layer_cache[0], k_BTKH, at)
            v_BSKH = jax.lax.dynamic_update_slice(layer_cache[1], v_BTKH, at)
            layer_cache = (k_BSKH, v_BSKH)
        out_BTNH = flash_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            scale=H**-0.5,
            causal=True,
            alibi_slopes_N=jnp.asarray(alibi_slopes(N)) if config.position == "alibi" else None,
            q_segments_BT=context.segments_BT,
            kv_segments_BS=context.kv_segments_BS,
            q_positions_BT=context.positions_BT,
            kv_positions_BS=context.kv_positions_BS,
            implementation=config.attention,
        )
        out_BTNH = constrain(out_BTNH, "batch", "time", "heads", "head_dim")
        out_init = fan_in(residual_scale(config), (0, 1), (2,))
        out_NHD = matrix(self, "out", (N, H, D), ("heads", "head_dim", "embed"), out_init)
        out_BTD = jnp.einsum("BTNH,NHD->BTD", out_BTNH, out_NHD)
        if config.attention_bias == "qkvo":
            out_BTD = add_bias(self, "out_bias", out_BTD, ("act_embed",))
        return out_BTD, layer_cache

    def project(self, name: str, x_BTD: jax.Array, heads: int, axis: str) -> jax.Array:
        """x W (+ b), split into heads: [B, T, D] -> [B, T, heads, H]."""
        D, H = self.config.embed_dim, self.config.head_dim
        init = fan_in(1.0, (0,), (1, 2))
        w_DNH = matrix(self, name, (D, heads, H), ("embed", axis, "head_dim"), init)
        y_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, w_DNH)
        if self.config.attention_bias != "none":
            y_BTNH = add_bias(self, f"{name}_bias", y_BTNH, (axis, "head_dim"))
        return constrain(y_BTNH, "batch", "time", axis, "head_dim")
