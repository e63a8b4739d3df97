"""From logits to the next id: temperature, then top-k, then top-p, row by row."""

import dataclasses

import jax
import jax.numpy as jnp

from llm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How text is continued."""

    max_new_tokens: int = (
        128  # most ids added to a prompt; the end of the document may come earlier
    )
    temperature: float = 1.0  # logits are divided by it; 0 takes the likeliest id (greedy)
    top_k: int = 0  # only the k likeliest ids may be drawn; 0: all
    top_p: float = 1.0  # only the fewest likeliest ids that reach this probability; 1: all
    seed: int = 0  # of the random numbers; a prompt's also depend on its index and nothing else
    stop: tuple[str, ...] = ()  # generation ends before the first of these strings
    batch_size: int = 32  # prompts continued at once; more wait their turn

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sampling.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"sampling.temperature={self.temperature} must be 0 (greedy) or above, and finite"
            )
        if self.top_k < 0:
            raise ConfigError(f"sampling.top_k={self.top_k} must be 0 (off) or above")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p={self.top_p} must be above 0 and at most 1 (off)")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"sampling.seed={self.seed} must be from 0 to 4294967295")
        if "" in self.stop:
            raise ConfigError("sampling.stop holds an empty string, which is everywhere; remove it")


def row_keys(seed: jax.Array | int, rows: jax.Array, step: jax.Array) -> jax.Array:
    """One random key per row, from (seed, prompt index, step) alone: batch neighbours do not matter."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def sample(
    keys_B: jax.Array,
    logits_BV: jax.Array,
    temperature: jax.Array | float,
    top_k: jax.Array | int = 0,
    top_p: jax.Array | float = 1.0,
    num_ids: jax.Array | int | None = None,
) -> jax.Array:
    """Draws one id per row, int32 [B].

    All settings may be traced, so one compiled program serves every request. Ties at the edge of
    top-k or top-p go to the smaller id.

    Args:
      keys_B: a random key per row.
      logits_BV: float32.
      temperature: 0 takes the likeliest id.
      top_k: 0 keeps all ids; see `keep_likeliest`.
      top_p: 1 keeps all ids; nucleus sampling (Holtzman et al., 1904.09751).
      num_ids: ids from here on are padding rows of the vocabulary and never drawn; None: no padding.
    """
    V = logits_BV.shape[-1]
    if num_ids is not None:
        logits_BV = jnp.where(jnp.arange(V)[None, :] < num_ids, logits_BV, -jnp.inf)
    greedy_B = jnp.argmax(logits_BV, axis=-1)

    def draw() -> jax.Array:
        scaled_BV = logits_BV / jnp.where(temperature > 0, temperature, 1.0)
        # sorting V ids costs more than a small model's step, so it is done only when asked for
        kept_BV = jax.lax.cond(
            (jnp.asarray(top_k) > 0) | (jnp.asarray(top_p) < 1),
            lambda: keep_likeliest(scaled_BV, top_k, top_p),
            lambda: scaled_BV,
        )
        # argmax(logits + Gumbel noise) is a draw from softmax(logits)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (V,), logits_BV.dtype))(keys_B)
        return jnp.argmax(kept_BV + noise_BV, axis=-1)

    return jax.lax.cond(jnp.asarray(temperature) > 0, draw, lambda: greedy_B).astype(jnp.int32)


def keep_likeliest(
    logits_BV: jax.Array, top_k: jax.Array | int, top_p: jax.Array | float
) -> jax.Array:
    """The logits with -inf for every id that top-k, or then top-p on what is left, leaves out.

    The likeliest id always stays. Top-p keeps the fewest ids whose probability, renormalised after
    top-k, sums to at least p.
    """
    B, V = logits_BV.shape
    ids_BV = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32)[None, :], (B, V))
    # stable: of equal logits the smaller id comes first, as in argmax
    falling_BV, order_BV = jax.lax.sort((-logits_BV, ids_BV), num_keys=1, is_stable=True)
    ranked_BV = -falling_BV
    limit = jnp.where(jnp.asarray(top_k) > 0, top_k, V)
    ranked_BV = jnp.where(jnp.arange(V)[None, :] < limit, ranked_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(ranked_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    # rounding: the sum may stay just below 1, and top_p = 1 must keep everything
    kept_BV = (before_BV < top_p) | (jnp.asarray(top_p) >= 1)
    kept_BV = kept_BV.at[:, 0].set(True)
    ranked_BV = jnp.where(kept_BV, ranked_BV, -jnp.inf)
    rows_B1 = jnp.arange(B)[:, None]
    return jnp.zeros_like(logits_BV).at[rows_B1, order_BV].set(ranked_BV)
