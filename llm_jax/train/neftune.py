"""NEFTune: uniform noise on the embeddings of training tokens (2310.05914). Off unless asked for."""

import dataclasses

import jax
import jax.numpy as jnp

from llm_jax.errors import ConfigError
from llm_jax.sharding import constrain
from llm_jax.train.segments import segment_sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeftuneConfig:
    """How loud."""

    alpha: float = 0.0  # noise is uniform within alpha / sqrt(L D); the paper has 5 to 15. 0: none
    seed: int = 0

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ConfigError(f"step.neftune.alpha={self.alpha} must be 0 (off) or above")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"step.neftune.seed={self.seed} must be from 0 to 4294967295")


def embedding_noise(
    config: NeftuneConfig, step: jax.Array, rows_B: jax.Array, segments_BT: jax.Array, D: int
) -> jax.Array:
    """What is added to the embeddings [B, T, D] in one step, float32.

    L is the number of tokens of the token's own segment, so that a document gets as much noise in a packed
    row as alone. A row's noise depends on the step and on its index in the global batch, so devices and
    micro-batches do not change it; padding gets none.

    Args:
      config: with alpha above 0.
      step: int32 scalar, updates done before.
      rows_B: int32, indices in the global batch.
      segments_BT: int32, 0 is padding.
      D: width of the model.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    T = segments_BT.shape[1]
    draw = lambda row: jax.random.uniform(jax.random.fold_in(key, row), (T, D), minval=-1, maxval=1)  # noqa: E731
    noise_BTD = constrain(jax.vmap(draw)(rows_B), "batch", "time", "act_embed")
    is_token_BT = (segments_BT > 0).astype(jnp.float32)
    length_BS = segment_sums(is_token_BT, segments_BT)
    length_BT = jnp.take_along_axis(length_BS, segments_BT, axis=1)
    scale_BT = config.alpha * is_token_BT * jax.lax.rsqrt(jnp.maximum(length_BT, 1.0) * D)
    return noise_BTD * scale_BT[:, :, None]
