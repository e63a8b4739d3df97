"""What a model's targets cost: hidden states into the fused head and loss, on the mesh in use.

Training and evaluation read the model here. Logits, [B, T, V], never exist: see
`llm_jax.kernels.cross_entropy`.
"""

from typing import Any

import jax
import numpy as np

from llm_jax.kernels.cross_entropy import LossSums, Split, cross_entropy, token_nats
from llm_jax.model.api import Params, head_weights, hidden_states
from llm_jax.model.config import ModelConfig
from llm_jax.sharding import mesh_axes

Array = jax.Array | np.ndarray


def target_loss(
    params: Params,
    config: ModelConfig,
    tokens_BT: Array,
    targets_BT: Array,
    positions_BT: Array,
    segments_BT: Array,
    weights_BT: Array,
    *,
    z_loss: float = 0.0,
    noise_BTD: jax.Array | None = None,
) -> tuple[jax.Array, LossSums]:
    """The sum of weight * (nats + z_loss * log(Z)^2), to be differentiated, and its parts.

    The arrays are the fields of a batch, in order.

    Args:
      tokens_BT, positions_BT, segments_BT: as in `forward`, which also tells the errors.
      targets_BT: int32 ids.
      weights_BT: float32, 0 where the target does not count.
      z_loss: weight of the z-penalty.
      noise_BTD: added to the embeddings.
    """
    places = (tokens_BT, positions_BT, segments_BT)
    x_BTD, _ = hidden_states(params, config, *places, noise_BTD=noise_BTD)
    head_DV = head_weights(params, config)
    options = _options(params, config, x_BTD)
    return cross_entropy(x_BTD, head_DV, targets_BT, weights_BT, z_loss=z_loss, **options)


def target_nats(
    params: Params,
    config: ModelConfig,
    tokens_BT: Array,
    targets_BT: Array,
    positions_BT: Array,
    segments_BT: Array,
    *,
    noise_BTD: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Negative log-probability of every target, and log Z: two float32 [B, T], differentiable.

    Arguments as in `target_loss`.
    """
    places = (tokens_BT, positions_BT, segments_BT)
    x_BTD, _ = hidden_states(params, config, *places, noise_BTD=noise_BTD)
    head_DV = head_weights(params, config)
    return token_nats(x_BTD, head_DV, targets_BT, **_options(params, config, x_BTD))


def _options(params: Params, config: ModelConfig, x_BTD: jax.Array) -> dict[str, Any]:
    """What turns states into logits besides the head, and how the mesh splits the arrays."""
    return {
        "bias_V": params["head_bias"] if config.head_bias else None,
        "soft_cap": config.logit_soft_cap,
        "split": _split(config, x_BTD),
    }


def _split(config: ModelConfig, x_BTD: jax.Array) -> Split:
    B, T, D = x_BTD.shape
    return Split(
        batch=mesh_axes("batch", B),
        time=mesh_axes("time", T),
        embed=mesh_axes("embed", D),
        vocab=mesh_axes("vocab", config.vocab_size),
    )
