"""Where a token is: rotary angles and ALiBi slopes. Pure functions of positions and config."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.model.config import Alibi, ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each rotated pair, float32 [rotary_dim / 2] (Su et al., 2104.09864).

    For `dynamic` and `longrope` those of short documents; `document_frequencies` has the others.
    """
    frequencies = config.rope_theta ** -_exponents(config)
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.kind == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif scaling.kind == "yarn":
        frequencies = _yarn(frequencies, config)
    elif scaling.kind == "longrope":
        frequencies = frequencies / np.array(scaling.short_factors)
    return frequencies.astype(np.float32)


def _exponents(config: ModelConfig) -> np.ndarray:
    return np.arange(0, config.rotary_dim, 2, dtype=np.float64) / config.rotary_dim


def document_frequencies(config: ModelConfig, lengths_BT: jax.Array) -> jax.Array:
    """Angles per position where they depend on the document's length, float32 [B, T, rotary_dim / 2].

    `dynamic` (transformers' dynamic NTK): theta grows with the length beyond that of the unscaled
    model. `longrope` (2402.13753): one set of divisors up to that length, another beyond it.
    """
    scaling, short = config.rope_scaling, rope_frequencies(config)
    lengths_BT1 = lengths_BT.astype(jnp.float32)[..., None]
    original = float(scaling.original_max_seq_len)
    if scaling.kind == "longrope":
        divisors = np.array(scaling.long_factors) / np.array(scaling.short_factors)
        long = (short / divisors).astype(np.float32)
        return jnp.where(lengths_BT1 > original, long[None, None], short[None, None])
    dim, factor = config.rotary_dim, scaling.factor
    stretch_BT1 = factor * jnp.maximum(lengths_BT1, original) / original - (factor - 1)
    exponents = (_exponents(config) * dim / (dim - 2)).astype(np.float32)
    return jnp.asarray(short)[None, None] * stretch_BT1 ** -exponents[None, None]


def document_lengths(positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """For every token, how long its document is so far as this call knows it: its last position + 1.

    So a document has the angles it would have alone, whatever it is packed with, and the next token
    in cached decoding those of all tokens up to it.
    """
    T = positions_BT.shape[1]
    after_BT = jnp.concatenate([segments_BT[:, 1:], jnp.full_like(segments_BT[:, :1], -1)], axis=1)
    rows_T = jnp.arange(T, dtype=jnp.int32)[None]
    ends_BT = jnp.where(after_BT != segments_BT, rows_T, T - 1)
    last_BT = jax.lax.cummin(ends_BT, axis=1, reverse=True)
    return jnp.take_along_axis(positions_BT, last_BT, axis=1) + 1


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: long waves stretched, short ones kept, a linear blend between."""
    turns = scaling.original_max_seq_len * frequencies / (2 * np.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn(frequencies: np.ndarray, config: ModelConfig) -> np.ndarray:
    """YaRN (Peng et al., 2309.00071): the blend is linear in the dimension, between two turn counts."""
    scaling = config.rope_scaling

    def dimension_of(turns: float) -> float:
        wavelength_ratio = scaling.original_max_seq_len / (turns * 2 * math.pi)
        return config.rotary_dim * math.log(wavelength_ratio) / (2 * math.log(config.rope_theta))

    first, last = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.rotary_dim - 1)
    stretched = np.clip((np.arange(len(frequencies)) - first) / max(last - first, 1e-3), 0, 1)
    return frequencies * (1 - stretched + stretched / scaling.factor)


def rope_amplitude(config: ModelConfig) -> float:
    """Factor on the rotated q and k, of half the effect on scores; 1 unless the kind has one.

    YaRN: 0.1 ln(factor) + 1. LongRoPE: sqrt(1 + ln(factor) / ln(original length)).
    """
    scaling = config.rope_scaling
    if scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor:
        return scaling.attention_factor
    if scaling.kind == "yarn":
        return 0.1 * math.log(scaling.factor) + 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_seq_len))


def rope_tables(
    config: ModelConfig, positions_BT: jax.Array, segments_BT: jax.Array, is_local: bool = False
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every rotation angle, float32 [B, T, 1, rotary_dim / 2], shared by all layers
    of a kind.
    """
    if is_local and config.local.rope_theta:
        theta = config.local.rope_theta
        config = dataclasses.replace(config, rope_theta=theta, rope_scaling=RopeScaling())
    if config.rope_scaling.kind in ("dynamic", "longrope"):
        lengths_BT = document_lengths(positions_BT, segments_BT)
        frequencies = document_frequencies(config, lengths_BT)
    else:
        frequencies = rope_frequencies(config)[None, None]
    angles = positions_BT.astype(jnp.float32)[..., None] * frequencies
    amplitude = rope_amplitude(config)
    return (jnp.cos(angles) * amplitude)[:, :, None, :], (jnp.sin(angles) * amplitude)[
        :, :, None, :
    ]


def rotate(config: ModelConfig, x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the first rotary_dim dimensions of each head by the angles; the rest pass through."""
    dim = config.rotary_dim
    turned = x_BTNH[..., :dim].astype(jnp.float32)
    if config.rope_pairing == "half":
        a, b = jnp.split(turned, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    turned = turned.astype(x_BTNH.dtype)
    return (
        turned if dim == x_BTNH.shape[-1] else jnp.concatenate([turned, x_BTNH[..., dim:]], axis=-1)
    )


def alibi_slopes(num_heads: int, alibi: Alibi = Alibi()) -> np.ndarray:
    """Slope of each query head, float32 [N] (Press et al., 2108.12409).

    For n a power of two: 2^(-max i / n), i = 1 .. n. Otherwise the slopes of the power of two below,
    then every second slope of the power of two above: BLOOM's rule, Falcon's, and, though it is
    written from the power above, MPT's too.
    """

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-alibi.max * i / n) for i in range(1, n + 1)]

    below = 2 ** math.floor(math.log2(num_heads))
    slopes = geometric(below) + geometric(2 * below)[::2]
    return np.array(slopes[:num_heads], np.float32)


def config_slopes(config: ModelConfig) -> np.ndarray:
    """The slopes as they are added to scaled scores, float32 [N].

    transformers rounds Falcon's biases to bfloat16, distance by distance; here they are exact.
    """
    slopes = alibi_slopes(config.num_heads, config.alibi)
    return slopes * np.float32(config.score_scale) if config.alibi.scaled else slopes
