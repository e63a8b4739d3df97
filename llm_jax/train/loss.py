"""The loss: nats of the counted targets, as sums. Division by the global count happens in the step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LossSums(NamedTuple):
    """Sums over target tokens, float32 scalars; they add up over micro-batches and shards."""

    nats: jax.Array  # negative log-likelihood of the targets
    z_penalty: jax.Array  # squared log-normalisers, see `token_loss`
    targets: jax.Array  # number of counted targets


def token_loss(logits_BTV: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array) -> LossSums:
    """Cross-entropy and z-penalty of next-token logits.

    The z-penalty log(Z)^2 keeps the softmax normaliser near 1, so that bf16 logits do not drift
    (PaLM, 2204.02311, section 5).

    Args:
      logits_BTV: float32 scores.
      targets_BT: int32 ids.
      mask_BT: float32 weights, 0 where the target does not count.
    """
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return LossSums(
        nats=jnp.sum((log_z_BT - target_BT) * mask_BT),
        z_penalty=jnp.sum(jnp.square(log_z_BT) * mask_BT),
        targets=jnp.sum(mask_BT),
    )
