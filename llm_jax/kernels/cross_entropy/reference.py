"""Cross-entropy by its definition: all logits at once. `xla_tiled` answers to it, tile by tile.

Also what both share: how scores are capped, and how per-token values add up to a loss.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class LossSums(NamedTuple):
    """Sums over target tokens, float32 scalars; they add up over micro-batches and shards."""

    nats: jax.Array  # negative log-likelihood of the targets
    z_penalty: jax.Array  # squared log-normalisers
    targets: jax.Array  # number of counted targets


def precision(dtype: jnp.dtype) -> lax.Precision:
    """float32 means float32: the default would be bfloat16 passes on TPU and TF32 on a GPU."""
    return lax.Precision.DEFAULT if jnp.finfo(dtype).bits < 32 else lax.Precision.HIGHEST


def logits(
    x_MD: jax.Array, head_DV: jax.Array, bias_V: jax.Array | None, soft_cap: float
) -> jax.Array:
    """Scores [M, V], summed in float32; soft_cap * tanh(score / soft_cap) where it is not 0."""
    logits_MV = jnp.einsum(
        "md,dv->mv",
        x_MD,
        head_DV.astype(x_MD.dtype),
        precision=precision(x_MD.dtype),
        preferred_element_type=jnp.float32,
    )
    if bias_V is not None:
        logits_MV += bias_V.astype(jnp.float32)[None]
    return soft_cap * jnp.tanh(logits_MV / soft_cap) if soft_cap else logits_MV


def token_nats(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    soft_cap: float = 0.0,
    bias_V: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Of every token: log Z - logit of its target, and log Z. Two float32 [B, T]."""
    B, T, D = x_BTD.shape
    logits_BTV = logits(x_BTD.reshape(B * T, D), head_DV, bias_V, soft_cap).reshape(B, T, -1)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return log_z_BT - target_BT, log_z_BT


def weigh(nats_BT: jax.Array, log_z_BT: jax.Array, weights_BT: jax.Array) -> LossSums:
    """The weighted sums. Where the weight is 0 the target may be anything."""

    def total(values_BT: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(weights_BT != 0, weights_BT * values_BT, 0))

    return LossSums(total(nats_BT), total(jnp.square(log_z_BT)), jnp.sum(weights_BT))
