"""The two public losses from hidden states: arguments checked, then one implementation called.

`cross_entropy` is for training: one number and its gradients in three matrix products.
`token_nats` is for scoring: a value per token, with gradients (in four) by any cotangent.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llm_jax.errors import ConfigError
from llm_jax.kernels.cross_entropy import xla_tiled
from llm_jax.kernels.cross_entropy.reference import LossSums
from llm_jax.kernels.cross_entropy.xla_tiled import Rule, Split


def cross_entropy(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array | np.ndarray,
    weights_BT: jax.Array | np.ndarray,
    *,
    bias_V: jax.Array | np.ndarray | None = None,
    z_loss: float = 0.0,
    soft_cap: float = 0.0,
    split: Split | None = None,
) -> tuple[jax.Array, LossSums]:
    """Sum over tokens of weight * (nats + z_loss * log(Z)^2), and its parts; no [B, T, V] array.

    The z-penalty log(Z)^2 keeps the softmax normaliser near 1, so that bf16 logits do not drift
    (PaLM, 2204.02311, section 5). Logits and softmax are summed in float32 whatever the dtype. The
    first result passes gradients back to x and head; the parts, for the log, do not.

    Args:
      x_BTD: hidden states, floating; logits are products in their dtype.
      head_DV: of that dtype, or float32 parameters, cast here: then dhead is not rounded.
      targets_BT: ids. One outside the vocabulary costs inf nats, unless its weight is 0.
      weights_BT: float32, 0 where the target does not count.
      bias_V: floating, added to the logits (GPT-J, Phi); None: not.
      z_loss: weight of the z-penalty; 0: none.
      soft_cap: logits become soft_cap * tanh(logit / soft_cap) (Gemma 2, 2408.00118); 0: not.
      split: how the mesh in use splits the arrays; None: it does not.

    Raises:
      ConfigError: an argument breaks one of these rules. Raised before anything is compiled.
    """
    _check(x_BTD, head_DV, bias_V, targets_BT, soft_cap)
    if weights_BT.shape != targets_BT.shape or not jnp.issubdtype(weights_BT.dtype, jnp.floating):
        raise ConfigError(
            f"weights_BT is {weights_BT.dtype.name} {weights_BT.shape}; it must be floating, "
            f"{targets_BT.shape} as targets_BT"
        )
    if not (math.isfinite(z_loss) and z_loss >= 0):
        raise ConfigError(f"z_loss={z_loss!r} must be finite and 0 (off) or above")
    rule = Rule(float(z_loss), float(soft_cap), split or Split())
    targets_BT, weights_BT = jnp.asarray(targets_BT), jnp.asarray(weights_BT, jnp.float32)
    bias_V = None if bias_V is None else jnp.asarray(bias_V)
    objective, sums = xla_tiled.cross_entropy(x_BTD, head_DV, bias_V, targets_BT, weights_BT, rule)
    return objective, jax.tree.map(lax.stop_gradient, sums)


def token_nats(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array | np.ndarray,
    *,
    bias_V: jax.Array | np.ndarray | None = None,
    soft_cap: float = 0.0,
    split: Split | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Of every token: nats of its target, and log Z. Two float32 [B, T], both differentiable.

    Arguments and errors as in `cross_entropy`; like there no [B, T, V] array, in backward neither.
    """
    _check(x_BTD, head_DV, bias_V, targets_BT, soft_cap)
    rule = Rule(0.0, float(soft_cap), split or Split())
    bias_V = None if bias_V is None else jnp.asarray(bias_V)
    return xla_tiled.token_nats(x_BTD, head_DV, bias_V, jnp.asarray(targets_BT), rule)


def _check(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    bias_V: jax.Array | np.ndarray | None,
    targets_BT: jax.Array | np.ndarray,
    soft_cap: float,
) -> None:
    if x_BTD.ndim != 3 or 0 in x_BTD.shape:
        raise ConfigError(
            f"x_BTD has shape {x_BTD.shape}; it must have 3 axes (B, T, D), none empty"
        )
    D = x_BTD.shape[2]
    if head_DV.ndim != 2 or head_DV.shape[0] != D or not head_DV.shape[1]:
        raise ConfigError(
            f"head_DV has shape {head_DV.shape}; with x_BTD {x_BTD.shape} it must be ({D}, V)"
        )
    if bias_V is not None and (
        bias_V.shape != head_DV.shape[1:] or not jnp.issubdtype(bias_V.dtype, jnp.floating)
    ):
        raise ConfigError(
            f"bias_V is {bias_V.dtype.name} {bias_V.shape}; it must be floating, "
            f"{head_DV.shape[1:]} as the head has columns"
        )
    if not jnp.issubdtype(x_BTD.dtype, jnp.floating) or x_BTD.dtype == jnp.float64:
        raise ConfigError(f"x_BTD is {x_BTD.dtype.name}; it must be float32 or narrower floating")
    if head_DV.dtype not in (x_BTD.dtype, jnp.float32):
        raise ConfigError(
            f"head_DV is {head_DV.dtype.name} and x_BTD {x_BTD.dtype.name}; "
            "the head must be of x's dtype or float32, so cast it first"
        )
    if targets_BT.shape != x_BTD.shape[:2] or not jnp.issubdtype(targets_BT.dtype, jnp.integer):
        raise ConfigError(
            f"targets_BT is {targets_BT.dtype.name} {targets_BT.shape}; it must hold "
            f"whole numbers, {x_BTD.shape[:2]} as x_BTD"
        )
    if not (math.isfinite(soft_cap) and soft_cap >= 0):
        raise ConfigError(f"soft_cap={soft_cap!r} must be finite and 0 (off) or above")
