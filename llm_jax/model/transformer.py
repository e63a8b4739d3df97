"""The decoder: embedding, a scan over identical blocks, final norm; the head is only declared here."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.model.attention import Attention, Context, View, plan_attention, windows
from llm_jax.model.cache import KVCache
from llm_jax.model.config import ModelConfig
from llm_jax.model.layers import HEAD_INIT, Mlp, Norm, declare, embedding_init
from llm_jax.model.positions import rope_tables
from llm_jax.sharding import constrain

# What backward keeps instead of recomputing. `dots` adds to the matrix products what attention names:
# its products are inside a custom gradient, and running it forward twice is dear. `full` keeps only
# each layer's input.
REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nn.Module):
    """One layer: attention and MLP around the residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        layer_cache: tuple[jax.Array, jax.Array] | None,
        is_local: jax.Array | None,
        context: Context,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """[B, T, D] -> [B, T, D] and the layer's updated cache."""
        config = self.config
        normed_BTD = self.norm_input("attention_norm", x_BTD)
        attended_BTD, layer_cache = Attention(config, name="attention")(
            normed_BTD, context, is_local, layer_cache
        )
        attended_BTD = self.norm_output("attention_out_norm", attended_BTD)
        if config.residual in ("sequential", "from_norm"):
            carried_BTD = normed_BTD if config.residual == "from_norm" else x_BTD
            x_BTD = constrain(carried_BTD + attended_BTD, "batch", "time", "act_embed")
            normed_BTD = self.norm_input("mlp_norm", x_BTD)
            carried_BTD = normed_BTD if config.residual == "from_norm" else x_BTD
        else:  # GPT-J, GPT-NeoX: both read the layer's input
            if config.residual == "parallel_two_norms":
                normed_BTD = self.norm_input("mlp_norm", x_BTD)
            carried_BTD = x_BTD + attended_BTD
        out_BTD = self.norm_output("mlp_out_norm", Mlp(config, name="mlp")(normed_BTD))
        return constrain(carried_BTD + out_BTD, "batch", "time", "act_embed"), layer_cache

    def norm_input(self, name: str, x_BTD: jax.Array) -> jax.Array:
        """What a sub-layer reads."""
        config = self.config
        return x_BTD if config.norm_placement == "output" else Norm(config, name=name)(x_BTD)

    def norm_output(self, name: str, x_BTD: jax.Array) -> jax.Array:
        """What a sub-layer adds to the residual stream."""
        config = self.config
        if config.norm_placement != "input":
            x_BTD = Norm(config, name=name)(x_BTD)
        return x_BTD if config.residual_multiplier == 1 else x_BTD * config.residual_multiplier


class Transformer(nn.Module):
    """Token ids to the hidden states that the head turns into logits."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        cache: KVCache | None,
        noise_BTD: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns the normed states [B, T, D] and the cache with this call's tokens in it."""
        config = self.config
        V, D = config.vocab_size, config.embed_dim
        init = embedding_init(config)
        embedding_VD = declare(self, "embedding", (V, D), ("vocab", "embed"), init)
        # Gathered over fsdp first: left to itself, SPMD splits the look-up's result by embed, and then
        # gathers the residual of the global batch on every device.
        x_BTD = jnp.take(constrain(embedding_VD, "vocab", None), tokens_BT, axis=0)
        if noise_BTD is not None:
            x_BTD = x_BTD + noise_BTD
        if config.embedding_multiplier != 1:
            x_BTD = x_BTD * config.embedding_multiplier
        if config.position == "learned":
            size = config.max_seq_len
            positions_TD = declare(self, "positions", (size, D), ("position", "embed"), init)
            x_BTD = x_BTD + jnp.take(constrain(positions_TD, None, None), positions_BT, axis=0)
        if config.embedding_norm:
            x_BTD = Norm(config, name="embedding_norm")(x_BTD)
        x_BTD = constrain(x_BTD.astype(config.dtype), "batch", "time", "act_embed")

        context, cache = make_context(config, positions_BT, segments_BT, cache)
        block = Block
        if config.remat != "none":
            # prevent_cse is needed only outside scan, where XLA could undo the recomputation
            block = nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
        scan: Any = nn.scan(  # one traced layer: compile time does not grow with depth
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        layer_caches = None if cache is None else (cache.k_LBSKH, cache.v_LBSKH)
        # one block for local layers and others: which it is comes in with the layer's parameters
        is_local_L = jnp.array(config.local_layers) if len(context.views) > 1 else None
        x_BTD, layer_caches = scan(config, name="layers")(x_BTD, layer_caches, is_local_L, context)
        if cache is not None and layer_caches is not None:
            cache = cache._replace(k_LBSKH=layer_caches[0], v_LBSKH=layer_caches[1])

        if not config.tied_embeddings:  # its product is fused with the loss: see `api.head_weights`
            declare(self, "head", (D, V), ("embed", "vocab"), HEAD_INIT)
        if config.head_bias:
            declare(self, "head_bias", (V,), ("vocab",), nn.initializers.zeros)
        final_norm = Norm(config, name="final_norm", multiplier=config.logit_multiplier)
        return final_norm(x_BTD), cache


def make_context(
    config: ModelConfig, positions_BT: jax.Array, segments_BT: jax.Array, cache: KVCache | None
) -> tuple[Context, KVCache | None]:
    """The shared inputs of all layers; with a cache, also writes this call's positions and segments to it."""
    kv_positions_BS, kv_segments_BS, slot = positions_BT, segments_BT, 0
    if cache is not None:
        slot = cache.used
        kv_positions_BS = jax.lax.dynamic_update_slice(cache.positions_BS, positions_BT, (0, slot))
        kv_segments_BS = jax.lax.dynamic_update_slice(cache.segments_BS, segments_BT, (0, slot))
        used = slot + positions_BT.shape[1]
        cache = cache._replace(positions_BS=kv_positions_BS, segments_BS=kv_segments_BS, used=used)
    places = (positions_BT, kv_positions_BS, segments_BT, kv_segments_BS)

    def view(window: int) -> View:
        rotary = None
        if config.position == "rope":
            rotary = rope_tables(config, positions_BT, segments_BT, is_local=window > 0)
        return View(plan_attention(config, *places, in_rows=cache is None, window=window), rotary)

    return Context(tuple(view(window) for window in windows(config)), slot), cache
