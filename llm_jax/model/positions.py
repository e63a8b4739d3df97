"""Where a token is: rotary angles and ALiBi slopes. Pure functions of positions and config."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.model.config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each rotated pair, float32 [rotary_dim / 2] (Su et al., 2104.09864)."""
    exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float64) / config.rotary_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.kind == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif scaling.kind == "yarn":
        frequencies = _yarn(frequencies, config)
    return frequencies.astype(np.float32)


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

    first = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    last = min(math.ceil(dimension_of(scaling.beta_slow)), config.rotary_dim - 1)
    stretched = np.clip((np.arange(len(frequencies)) - first) / max(last - first, 1e-3), 0, 1)
    return frequencies * (1 - stretched + stretched / scaling.factor)


def rope_amplitude(config: ModelConfig) -> float:
    """Factor on the rotated q and k: YaRN's attention temperature, 0.1 ln(factor) + 1; else 1."""
    scaling = config.rope_scaling
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.kind == "yarn" else 1.0


def rope_tables(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every rotation angle, float32 [B, T, 1, rotary_dim / 2], shared by all layers."""
    angles = positions_BT.astype(jnp.float32)[..., None] * rope_frequencies(config)[None, None, :]
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


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slope of each query head, float32 [N] (Press et al., 2108.12409; BLOOM's rule for other counts).

    For n a power of two: 2^(-8 i / n), i = 1 .. n. Otherwise the slopes of the power of two below,
    then every second slope of the power of two above.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * i / below) for i in range(1, below + 1)]
    slopes += [2.0 ** (-8 * i / (2 * below)) for i in range(1, 2 * below, 2)][: num_heads - below]
    return np.array(slopes, np.float32)
