"""The one public attention op: checks its arguments, chooses an implementation, calls it.

1. Every argument is checked before anything is compiled; a mistake is a one-line ConfigError.
2. `choose` picks by platform and shape, and says why; a named implementation is never replaced.
3. Absent positions become row indices; then the implementation gets (q, k, v, slopes, places, rule).
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

IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "reference": reference.attend,
    "xla_chunked": xla_chunked.attend,
}

# Up to how many queries dense scores win on a CPU. Milliseconds, reference against xla_chunked, from
# `python tools/bench_attention.py` (2 cores, float32, B=8, H=64):
#   with gradients, N=6 K=2:  T=S=16 0.47 / 0.35   64 3.3 / 3.0   128 12 / 9.8   256 (K=6) 113 / 74
#   forward, as in decoding:  T=1 S=512 0.30 / 0.59   T=16 S=1024 5.7 / 21   T=64 S=1024 31 / 31
# What decides is T, not T * S: with few queries the scores are no larger than K, and tiles copy K.
FEW_QUERIES_ON_CPU = 32


class Choice(NamedTuple):
    """An implementation's name and the reason it was taken, for the log."""

    name: str
    reason: str


def choose(platform: str, query_length: int) -> Choice:
    """What `implementation="auto"` takes on `platform` ("cpu", "gpu", "tpu") for T = query_length."""
    few = FEW_QUERIES_ON_CPU if platform == "cpu" else 1
    if query_length <= few:
        return Choice("reference", f"at most {few} queries: dense scores are small")
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

    A key is left out of the softmax if it lies ahead of the query (`causal`), `window` or more
    positions behind it, in another segment, or in padding. A query with no key left gives zeros, and
    zero gradients. Grouped and multi-query attention (N a multiple of K) never repeat K or V. Scores
    and softmax are summed in float32 whatever the dtype.

    Args:
      q_BTNH: queries; query head n reads kv head n // (N // K).
      k_BSKH: keys, of q's dtype.
      v_BSKH: values, of q's dtype.
      scale: factor on q.k; H**-0.5 when None.
      causal: a key must not lie ahead of its query.
      window: number of positions a query sees, itself included; 0: no limit. Needs `causal`.
      soft_cap: scores become cap * tanh(score / cap); 0: not capped.
      alibi_slopes_N: ALiBi slope of every (global) query head. They get no gradient.
      q_segments_BT: whole numbers; a query sees the keys of its own segment. 0 is padding, which
        sees nothing and is seen by nothing. Given together with `kv_segments_BS`, or not at all.
      kv_segments_BS: the same of the keys.
      q_positions_BT: whole numbers in any order, as in the slots of a KV cache. Given together with
        `kv_positions_BS`, or not at all: then row indices, aligned at the end when S > T.
      kv_positions_BS: the same of the keys.
      implementation: "auto" (see `choose`), "reference" or "xla_chunked".
      return_lse: also return the log of the sum of exp(score).

    Returns:
      out_BTNH in q's dtype; with `return_lse` the pair (out_BTNH, lse_BTN), lse in float32 and -inf
      where a query sees no key.

    Raises:
      ConfigError: an argument breaks one of these rules.

    References: FlashAttention-2 (arXiv 2307.08691), ALiBi (2108.12409), GQA (2305.13245), soft-cap
    (Gemma 2, 2408.00118).
    """
    B, T, N, H, S = _check_arrays(q_BTNH, k_BSKH, v_BSKH)
    _check_rule(scale, causal, window, soft_cap)
    _check_pair("segments", (q_segments_BT, (B, T)), (kv_segments_BS, (B, S)))
    _check_pair("positions", (q_positions_BT, (B, T)), (kv_positions_BS, (B, S)))
    if alibi_slopes_N is not None and alibi_slopes_N.shape != (N,):
        raise ConfigError(
            f"alibi_slopes_N has shape {alibi_slopes_N.shape}; it must be ({N},), one slope per query head"
        )
    if implementation == "auto":
        implementation = choose(jax.default_backend(), T).name
    if implementation not in IMPLEMENTATIONS:
        known = ["auto", *IMPLEMENTATIONS]
        raise ConfigError(
            f"implementation={implementation!r} is unknown; {nearest(implementation, known)}"
        )
    if q_positions_BT is None or kv_positions_BS is None:
        q_positions_BT = jnp.arange(T)[None] + max(S - T, 0)
        kv_positions_BS = jnp.arange(S)[None]
    places = Places(q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS)
    out_BTNH, lse_BTN = IMPLEMENTATIONS[implementation](
        q_BTNH,
        k_BSKH,
        v_BSKH,
        None if alibi_slopes_N is None else jnp.asarray(alibi_slopes_N, jnp.float32),
        jax.tree.map(lambda place: jnp.asarray(place, jnp.int32), places),
        Rule(H**-0.5 if scale is None else float(scale), causal, window, float(soft_cap)),
    )
    return (out_BTNH, lse_BTN) if return_lse else out_BTNH


def _check_arrays(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array
) -> tuple[int, int, int, int, int]:
    """Returns B, T, N, H, S."""
    for name, array in {"q_BTNH": q_BTNH, "k_BSKH": k_BSKH, "v_BSKH": v_BSKH}.items():
        if array.ndim != 4 or 0 in array.shape:
            raise ConfigError(
                f"{name} has shape {array.shape}; it must have 4 axes ({', '.join(name[2:])}), none empty"
            )
    B, T, N, H = q_BTNH.shape
    _, S, K, _ = k_BSKH.shape
    for name, array in {"k_BSKH": k_BSKH, "v_BSKH": v_BSKH}.items():
        if array.shape != (B, S, K, H):
            raise ConfigError(
                f"{name} has shape {array.shape}; with q_BTNH {q_BTNH.shape} it must be {(B, S, K, H)}"
            )
    if N % K:
        raise ConfigError(
            f"q_BTNH has N={N} heads and k_BSKH K={K}; N must be a multiple of K, as each kv head serves N/K query heads"
        )
    dtypes = [array.dtype.name for array in (q_BTNH, k_BSKH, v_BSKH)]
    if len(set(dtypes)) > 1 or not jnp.issubdtype(q_BTNH.dtype, jnp.floating):
        raise ConfigError(
            f"q, k, v have dtypes {', '.join(dtypes)}; they must be one floating type, so cast them first"
        )
    return B, T, N, H, S


def _check_rule(scale: float | None, causal: bool, window: int, soft_cap: float) -> None:
    for name, value in {"scale": scale, "soft_cap": soft_cap}.items():
        lowest = "above 0" if name == "scale" else "0 (off) or above"
        if value is None:
            continue
        if not math.isfinite(value) or value < 0 or (name == "scale" and value == 0):
            raise ConfigError(f"{name}={value!r} must be finite and {lowest}")
    if window < 0:
        raise ConfigError(f"window={window} must be 0 (no limit) or a number of positions above 0")
    if window and not causal:
        raise ConfigError(f"window={window} needs causal=True: it counts back from the query")


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
