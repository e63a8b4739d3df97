"""Attention by its definition: dense scores, every rule written once. The others answer to it.

`score` turns raw products q.k into masked scores and is shared with `xla_chunked`, tile by tile, so
the rules cannot drift apart. Memory is quadratic: a few [B, N, T, S] arrays in float32.
"""

import jax
import jax.numpy as jnp
from jax import lax

from llm_jax.kernels.attention.plan import Places, Plan, Rule


def precision(dtype: jnp.dtype) -> lax.Precision:
    """float32 means float32: the default would be bfloat16 passes on TPU and TF32 on a GPU."""
    return lax.Precision.DEFAULT if jnp.finfo(dtype).bits < 32 else lax.Precision.HIGHEST


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """float32 for everything narrower; float64 stays (tests check gradients in it)."""
    return jnp.promote_types(dtype, jnp.float32)


def visible(rule: Rule, places: Places) -> jax.Array | None:
    """Which key each query may attend to, [B or 1, T, S]; None when all of them."""
    rows, columns = (slice(None), slice(None), None), (slice(None), None, slice(None))
    conditions = []
    if rule.causal:
        distance_BTS = places.kv_positions_BS[columns] - places.q_positions_BT[rows]
        conditions.append(distance_BTS <= 0)
        if rule.window:
            conditions.append(distance_BTS > -rule.window)
    if places.q_segments_BT is not None and places.kv_segments_BS is not None:
        q_segment, kv_segment = places.q_segments_BT[rows], places.kv_segments_BS[columns]
        conditions += [q_segment == kv_segment, kv_segment != 0]
    if not conditions:
        return None
    seen = conditions[0]
    for condition in conditions[1:]:
        seen = seen & condition
    return seen


def score(
    raw_BKGTS: jax.Array, slopes_KG: jax.Array | None, places: Places, rule: Rule
) -> jax.Array:
    """Products q.k to scores: scaled, soft-capped, plus ALiBi; -inf where the key is hidden."""
    score_BKGTS = raw_BKGTS * rule.scale
    if rule.soft_cap:
        score_BKGTS = rule.soft_cap * jnp.tanh(score_BKGTS / rule.soft_cap)
    if slopes_KG is not None:
        key_B11S = places.kv_positions_BS[:, None, None, None, :]
        distance_B11TS = key_B11S - places.q_positions_BT[:, None, None, :, None]
        score_BKGTS += slopes_KG[None, :, :, None, None] * distance_B11TS.astype(raw_BKGTS.dtype)
    seen_BTS = visible(rule, places)
    if seen_BTS is not None:
        score_BKGTS = jnp.where(seen_BTS[:, None, None], score_BKGTS, -jnp.inf)
    return score_BKGTS


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    slopes_N: jax.Array | None,
    plan: Plan,
    rule: Rule,
) -> tuple[jax.Array, jax.Array]:
    """Returns out_BTNH in q's dtype and the log-sum-exp of the scores, lse_BTN, in float32.

    Rows that see no key give out 0 and lse -inf, with zero gradients. Differentiable in q, k and v.
    """
    B, T, N, H = q_BTNH.shape
    K, dtype = k_BSKH.shape[2], accumulator(q_BTNH.dtype)
    exact = {"precision": precision(q_BTNH.dtype), "preferred_element_type": dtype}
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    slopes_KG = None if slopes_N is None else lax.stop_gradient(slopes_N).reshape(K, N // K)

    raw_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, **exact)
    places = plan.places.with_positions(T, k_BSKH.shape[1])
    score_BKGTS = score(raw_BKGTS, slopes_KG, places, rule)
    peak_BKGT = lax.stop_gradient(score_BKGTS.max(axis=-1))
    peak_BKGT = jnp.where(jnp.isneginf(peak_BKGT), 0, peak_BKGT)  # -inf - -inf would be NaN
    weight_BKGTS = jnp.exp(score_BKGTS - peak_BKGT[..., None])
    total_BKGT = weight_BKGTS.sum(axis=-1)
    seen_BKGT = total_BKGT > 0
    divisor_BKGT = jnp.where(seen_BKGT, total_BKGT, 1)

    share_BKGTS = (weight_BKGTS / divisor_BKGT[..., None]).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("bkgts,bskh->btkgh", share_BKGTS, v_BSKH, **exact)
    lse_BKGT = jnp.where(seen_BKGT, peak_BKGT + jnp.log(divisor_BKGT), -jnp.inf)
    lse_BTN = lse_BKGT.transpose(0, 3, 1, 2).reshape(B, T, N)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype), lse_BTN
