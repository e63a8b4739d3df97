"""The waist of the model: functions on plain nested dicts. Nothing outside model/ sees a module."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.errors import ConfigError
from llm_jax.model.cache import KVCache
from llm_jax.model.config import ModelConfig
from llm_jax.model.layers import Named
from llm_jax.model.lora import adapters_of
from llm_jax.model.transformer import Transformer
from llm_jax.sharding import constrain

Params = dict[str, Any]  # nested dict of arrays; names are a file format


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters in config.param_dtype. The same key gives the same values on any mesh."""
    return nn.unbox(_init_boxed(config, key))


def forward(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array | np.ndarray,
    positions_BT: jax.Array | np.ndarray,
    segments_BT: jax.Array | np.ndarray,
    cache: KVCache | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Next-token logits, float32 [B, T, V], and the cache extended by these tokens.

    Args:
      tokens_BT: int32 ids.
      positions_BT: int32, index of each token inside its segment.
      segments_BT: int32; tokens see only their own segment, and 0 is padding.
      cache: from `init_cache`, or None. With a cache the tokens also see what it holds.

    Raises:
      ConfigError: the arrays differ in shape, or the row is longer than learned positions reach.
    """
    x_BTD, cache = hidden_states(params, config, tokens_BT, positions_BT, segments_BT, cache)
    head_DV = head_weights(params, config).astype(config.dtype)
    logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, head_DV, preferred_element_type=jnp.float32)
    if config.head_bias:
        logits_BTV += params["head_bias"].astype(jnp.float32)[None, None]
    if config.logit_soft_cap:
        logits_BTV = config.logit_soft_cap * jnp.tanh(logits_BTV / config.logit_soft_cap)
    return constrain(logits_BTV, "batch", "time", "vocab"), cache


def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array | np.ndarray,
    positions_BT: jax.Array | np.ndarray,
    segments_BT: jax.Array | np.ndarray,
    cache: KVCache | None = None,
    noise_BTD: jax.Array | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """What `forward` multiplies by the head, config.dtype [B, T, D]; arguments as there.

    `noise_BTD` is added to the embeddings as they are looked up, before they are multiplied or normed.
    """
    for name, array in (("positions_BT", positions_BT), ("segments_BT", segments_BT)):
        if array.shape != tokens_BT.shape:
            raise ConfigError(
                f"forward: {name} has shape {array.shape}; it must match tokens_BT, {tokens_BT.shape}"
            )
    if config.position == "learned" and tokens_BT.shape[1] > config.max_seq_len:
        raise ConfigError(
            f"forward: {tokens_BT.shape[1]} tokens in a row, but model.max_seq_len={config.max_seq_len} "
            "is all that learned positions know"
        )
    return Transformer(config).apply(
        {"params": params}, tokens_BT, positions_BT, segments_BT, cache, noise_BTD
    )  # pyright: ignore[reportReturnType]


def head_weights(params: Params, config: ModelConfig) -> jax.Array:
    """The output head, [D, V]: tied or not, in the wider of config.dtype and config.param_dtype.

    Products are in config.dtype; its gradient, a sum over all tokens, should not be.
    """
    head_DV = params["embedding"].T if config.tied_embeddings else params["head"]
    return head_DV.astype(jnp.promote_types(config.dtype, config.param_dtype))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """The tree of parameters with, in place of each array, the tuple of its logical axis names."""
    boxed = jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0)))
    is_box = lambda leaf: isinstance(leaf, Named)  # noqa: E731
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=is_box)


def abstract_params(config: ModelConfig) -> Params:
    """The tree of parameters as jax.ShapeDtypeStruct; costs nothing at any size."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


@functools.cache
def count_params(config: ModelConfig) -> int:
    """Number of parameters, embeddings included."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


@functools.cache  # a search of meshes asks hundreds of times, and tracing a model takes 30 ms
def count_adapters(config: ModelConfig) -> int:
    """Number of parameters in adapters."""
    if not config.lora.rank:
        return 0
    adapters = jax.tree.leaves(adapters_of(abstract_params(config)))
    return sum(math.prod(leaf.shape) for leaf in adapters)


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations to train on one token: forward, and twice that for backward.

    Two per multiply-add, matrix products only; attention counts the keys in sight: the causal half
    of T x T, in local layers no more than the window. The embedding look-up is free, the output head is not. Recomputation (remat) does not count.
    Where there are adapters they alone are trained: backward does not multiply for the gradients of the rest.
    """
    D, F, L, N, K, H = (
        config.embed_dim, config.mlp_dim, config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim,
    )  # fmt: skip
    projections = D * H * (2 * N + 2 * K)
    mlp = D * F * (3 if config.mlp == "gated" else 2)
    keys = 0.0  # in sight of the average token, summed over layers
    for is_local in config.local_layers:
        window = min(config.local.window, seq_len) if is_local else seq_len
        keys += (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
    attention = 2 * N * H * keys  # q.k and p.v
    weights, passes = L * (projections + mlp) + D * config.vocab_size, 2 if config.lora.rank else 3
    return 2 * (passes * weights + 3 * (attention + count_adapters(config)))


def _init_boxed(config: ModelConfig, key: jax.Array) -> Any:
    """Parameters still boxed with their axis names, as Flax returns them."""
    dummy = jnp.zeros((1, 1), jnp.int32)
    return Transformer(config).init(key, dummy, dummy, dummy + 1, None)["params"]
