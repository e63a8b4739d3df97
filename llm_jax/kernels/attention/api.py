"""The one public attention op: checks its arguments, chooses an implementation, calls it.

1. Every argument is checked before anything is compiled; a mistake is a one-line ConfigError.
2. `choose` picks by platform and shape, and says why; a named implementation is never replaced.
3. Absent positions become row indices; the implementation gets (q, k, v, slopes, places, rule).
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp

from llm_jax.config import nearest
from llm_jax.errors import ConfigError
from llm_jax.kernels.attention import reference, xla_chunked
from llm_jax.kernels.attention.reference import Places, Rule

Implementation = Callable[..., tuple[jax.Array, jax.Array]]  # as `reference.attend`

IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": reference.attend,
    "xla_chunked": xla_chunked.attend,
}

# Up to how many queries dense scores win: they are then no larger than K, and tiles copy K. What
# counts is T, not T * S. From `python tools/bench_attention.py` (2 busy cores, float32, N=6 K=2
# H=64), ms of reference / xla_chunked. Forward, B=8: T=1 S=4096 9.4 / 27, T=4 S=1024 1.5 / 3.2,
# T=8 4.1 / 5.2, T=16 7.8 / 6.1. With gradients, S=T: B=8 T=16 0.33 / 0.32, T=128 13 / 11,
# T=256 83 / 40, B=4 T=512 215 / 56, B=1 T=2048 1606 / 195.
FEW_QUERIES = 8


class Choice(NamedTuple):
    """An implementation's name and the reason it was taken, for the log."""

    name: str
    reason: str


def choose(platform: str, query_length: int) -> Choice:
    """What "auto" takes on `platform` ("cpu", "gpu", "tpu") for T = query_length."""
    if query_length <= FEW_QUERIES:
        return Choice("reference", f"at most {FEW_QUERIES} queries: dense scores are small")
    return Choice("xla_chunked", f"memory linear in length; no fused kernel for {platform} yet")


# The overloads tell a type checker what `return_lse` returns; `options` are those spelt out below.
@overload
def flash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    return_lse: Literal[True],
    **options: Any,
) -> tuple[jax.Array, jax.Array]: ...


@overload
def flash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    return_lse: Literal[False] = False,
    **options: Any,
) -> jax.Array: ...


def flash_attention(  # pyright: ignore[reportInconsistentOverload]
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes_N: jax.Array | None = None,
    q_segments_BT: jax.Array | None = None,
    kv_segments_BS: jax.Array | None = None,
    q_positions_BT: jax.Array | None = None,
    kv_positions_BS: jax.Array | None = None,
    implementation: str = "auto",
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(score) v, where score = cap(scale * q.k) + slope * (key position - query position).

    Keys out of sight take no part, and a query that sees none gives zeros, with zero gradients.
    Scores and softmax are summed in float32 whatever the dtype; K and V are never repeated.

    Args:
      q_BTNH: queries; N is a multiple of K, and head n reads kv head n // (N // K).
      k_BSKH: keys, of q's dtype. Values likewise.
      scale: H**-0.5 when None.
      causal: keys ahead of the query are out of sight.
      window: so are keys this many positions behind it, or more; 0: no limit. Needs `causal`.
      soft_cap: cap(x) = soft_cap * tanh(x / soft_cap); 0: not capped.
      alibi_slopes_N: of every (global) query head. They get no gradient.
      q_segments_BT: only keys of the same segment are in sight, and nothing of segment 0, padding.
        Both segments are given, or neither.
      q_positions_BT: in any order, as in the slots of a KV cache. Both positions are given, or
        neither: then they are row indices, aligned at the end when S > T.
      implementation: "auto" (see `choose`), "reference" or "xla_chunked"; taken, or refused.
      return_lse: also return the log-sum-exp of the scores, [B, T, N] float32, -inf if none.

    Raises:
      ConfigError: an argument breaks one of these rules. Raised before anything is compiled.

    References: FlashAttention-2 (arXiv 2307.08691), ALiBi (2108.12409), GQA (2305.13245).
    """
    B, T, N, H, S = _check_arrays(q_BTNH, k_BSKH, v_BSKH)
    _check_pair("segments", (q_segments_BT, (B, T)), (kv_segments_BS, (B, S)))
    _check_pair("positions", (q_positions_BT, (B, T)), (kv_positions_BS, (B, S)))
    rule = _make_rule(H**-0.5 if scale is None else scale, causal, window, soft_cap)
    attend, slopes_N = _implementation(implementation, T), _make_slopes(alibi_slopes_N, N)
    if q_positions_BT is None or kv_positions_BS is None:
        q_positions_BT, kv_positions_BS = jnp.arange(T)[None] + max(S - T, 0), jnp.arange(S)[None]
    places = Places(q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS)
    places = jax.tree.map(lambda place: jnp.asarray(place, jnp.int32), places)
    out_BTNH, lse_BTN = attend(q_BTNH, k_BSKH, v_BSKH, slopes_N, places, rule)
    return (out_BTNH, lse_BTN) if return_lse else out_BTNH


def _implementation(name: str, T: int) -> Implementation:
    if name == "auto":
        name = choose(jax.default_backend(), T).name
    if name not in IMPLEMENTATIONS:
        remedy = nearest(name, ["auto", *IMPLEMENTATIONS])
        raise ConfigError(f"implementation={name!r} is unknown; {remedy}")
    return IMPLEMENTATIONS[name]


def _make_slopes(slopes_N: jax.Array | None, N: int) -> jax.Array | None:
    if slopes_N is None:
        return None
    if slopes_N.shape != (N,):
        raise ConfigError(
            f"alibi_slopes_N has shape {slopes_N.shape}; it must be ({N},), one per query head"
        )
    return jnp.asarray(slopes_N, jnp.float32)


def _make_rule(scale: float, causal: bool, window: int, soft_cap: float) -> Rule:
    if not (math.isfinite(scale) and scale > 0):
        raise ConfigError(f"scale={scale!r} must be finite and above 0; None gives H**-0.5")
    if not (math.isfinite(soft_cap) and soft_cap >= 0):
        raise ConfigError(f"soft_cap={soft_cap!r} must be finite and 0 (off) or above")
    if window < 0:
        raise ConfigError(f"window={window} must be 0 (no limit) or a number of positions above 0")
    if window and not causal:
        raise ConfigError(f"window={window} needs causal=True: it counts back from the query")
    return Rule(float(scale), bool(causal), int(window), float(soft_cap))


def _check_arrays(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array
) -> tuple[int, int, int, int, int]:
    """Returns B, T, N, H, S."""
    for name, array in {"q_BTNH": q_BTNH, "k_BSKH": k_BSKH, "v_BSKH": v_BSKH}.items():
        if array.ndim != 4 or 0 in array.shape:
            raise ConfigError(
                f"{name} has shape {array.shape}; it must have 4 axes "
                f"({', '.join(name[2:])}), none empty"
            )
    B, T, N, H = q_BTNH.shape
    _, S, K, _ = k_BSKH.shape
    for name, array in {"k_BSKH": k_BSKH, "v_BSKH": v_BSKH}.items():
        if array.shape != (B, S, K, H):
            raise ConfigError(
                f"{name} has shape {array.shape}; with q_BTNH {q_BTNH.shape} "
                f"it must be {(B, S, K, H)}"
            )
    if N % K:
        raise ConfigError(
            f"q_BTNH has N={N} heads and k_BSKH K={K}; N must be a multiple of K, "
            "as each kv head serves N/K query heads"
        )
    dtypes = [array.dtype.name for array in (q_BTNH, k_BSKH, v_BSKH)]
    if len(set(dtypes)) > 1 or not jnp.issubdtype(q_BTNH.dtype, jnp.floating):
        raise ConfigError(
            f"q, k, v have dtypes {', '.join(dtypes)}; "
            "they must be one floating type, so cast them first"
        )
    return B, T, N, H, S


def _check_pair(
    what: str,
    query: tuple[jax.Array | None, tuple[int, int]],
    key: tuple[jax.Array | None, tuple[int, int]],
) -> None:
    """Segments or positions, each with the shape it must have: both or none, whole numbers."""
    names = (f"q_{what}_BT", f"kv_{what}_BS")
    given = [array is not None for array, _ in (query, key)]
    if given[0] != given[1]:
        here, absent = names if given[0] else names[::-1]
        raise ConfigError(f"{here} is given without {absent}; give both or neither")
    for name, (array, shape) in zip(names, (query, key), strict=True):
        if array is None:
            continue
        if array.shape != shape:
            raise ConfigError(f"{name} has shape {array.shape}; it must be {shape}, as q and k are")
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ConfigError(f"{name} has dtype {array.dtype.name}; it must hold whole numbers")
