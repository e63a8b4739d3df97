"""The one public attention op: checks its arguments, chooses an implementation, calls it.

1. Every argument is checked before anything is compiled; a mistake is a one-line ConfigError.
2. `choose` picks by device and features, and says why; a named implementation is never replaced.
3. `make_plan` finds what need not be computed, once per batch; every layer takes it as `plan`.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp

from llm_jax.config import nearest
from llm_jax.errors import ConfigError
from llm_jax.kernels.attention import cudnn, mosaic_gpu, pallas_tpu, reference, xla_chunked
from llm_jax.kernels.attention.plan import Places, Plan, Request, Rule
from llm_jax.kernels.device import Device, current_device


class Implementation(NamedTuple):
    """One way to compute attention."""

    # (q, k, v, slopes, plan, rule) -> out, lse; as `reference.attend`
    attend: Callable[..., tuple[jax.Array, jax.Array]]
    # what it wants of the places, computed once per batch
    make_ranges: Callable[[Places, Request], tuple[jax.Array, ...]]
    # why it cannot take a call, in words that follow its name; None: it can
    refuses: Callable[[Request, Device], str | None]


def _anything(request: Request, device: Device) -> str | None:
    return None


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(reference.attend, lambda places, request: (), _anything),
    "xla_chunked": Implementation(xla_chunked.attend, xla_chunked.make_ranges, _anything),
    "pallas_tpu": Implementation(pallas_tpu.attend, pallas_tpu.make_ranges, pallas_tpu.refuses),
    "mosaic_gpu": Implementation(mosaic_gpu.attend, mosaic_gpu.make_ranges, mosaic_gpu.refuses),
    "cudnn": Implementation(cudnn.attend, lambda places, request: (), cudnn.refuses),
}

PLACE_NAMES = ("q_segments_BT", "kv_segments_BS", "q_positions_BT", "kv_positions_BS")

# Fused kernels of each platform, the preferred first.
FUSED = {"tpu": ("pallas_tpu",), "gpu": ("cudnn", "mosaic_gpu")}

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


def choose(request: Request, device: Device) -> Choice:
    """What "auto" takes on a device: its fused kernel, or tiles in XLA and why not the kernel."""
    if request.T <= FEW_QUERIES:
        return Choice("reference", f"at most {FEW_QUERIES} queries: dense scores are small")
    objections = []
    for name in FUSED.get(device.platform, ()):
        objection = IMPLEMENTATIONS[name].refuses(request, device)
        if objection is None:
            return Choice(name, f"fused kernel for {device.kind}")
        objections.append(f"{name} {objection}")
    reason = "; ".join(objections) or f"no fused kernel for {device.platform}"
    return Choice("xla_chunked", f"memory linear in length; {reason}")


def make_plan(
    q_BTNH: jax.Array | jax.ShapeDtypeStruct,
    k_BSKH: jax.Array | jax.ShapeDtypeStruct,
    *,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi: bool = False,
    q_segments_BT: jax.Array | None = None,
    kv_segments_BS: jax.Array | None = None,
    q_positions_BT: jax.Array | None = None,
    kv_positions_BS: jax.Array | None = None,
    implementation: str = "auto",
    return_lse: bool = False,
) -> Plan:
    """What all layers share for one batch: the implementation, the places, the tiles to visit.

    Arguments as of `flash_attention`; of q and k only shape and dtype are read, `alibi` and
    `soft_cap` only to choose an implementation that can. Layers whose window differs need a plan
    of their own.

    Raises:
      ConfigError: as `flash_attention`.
    """
    B, T, N, H = q_BTNH.shape
    _, S, K, _ = k_BSKH.shape
    _check_pair("segments", (q_segments_BT, (B, T)), (kv_segments_BS, (B, S)))
    _check_pair("positions", (q_positions_BT, (B, T)), (kv_positions_BS, (B, S)))
    rule = _make_rule(1.0, causal, window, soft_cap)
    segments, positions = q_segments_BT is not None, q_positions_BT is not None
    dtype = jnp.dtype(q_BTNH.dtype).name
    request = Request(B, T, S, N, K, H, dtype, rule, alibi, segments, positions, return_lse)
    name = implementation_for(request, implementation)
    places = Places(q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS)
    places = jax.tree.map(lambda place: jnp.asarray(place, jnp.int32), places)
    ranges = IMPLEMENTATIONS[name].make_ranges(places, request)
    return Plan(places, ranges, name, rule.causal, rule.window)


def implementation_for(request: Request, name: str) -> str:
    """The implementation that takes a call: `name`, or what "auto" chooses.

    Raises:
      ConfigError: the name is unknown, or the implementation named cannot take the call.
    """
    device = current_device()
    if name == "auto":
        return choose(request, device).name
    if name not in IMPLEMENTATIONS:
        remedy = nearest(name, ["auto", *IMPLEMENTATIONS])
        raise ConfigError(f"implementation={name!r} is unknown; {remedy}")
    objection = IMPLEMENTATIONS[name].refuses(request, device)
    if objection is not None:
        raise ConfigError(f"implementation={name!r} {objection}; auto or xla_chunked can")
    return name


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
    plan: Plan | None = None,
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
      implementation: "auto" (see `choose`) or a name in `IMPLEMENTATIONS`; taken, or refused.
      plan: from `make_plan`, for the same `causal` and `window`. It brings segments, positions and
        implementation, which are then not given again.
      return_lse: also return the log-sum-exp of the scores, [B, T, N] float32, -inf if none.

    Raises:
      ConfigError: an argument breaks one of these rules. Raised before anything is compiled.

    References: FlashAttention-2 (arXiv 2307.08691), ALiBi (2108.12409), GQA (2305.13245).
    """
    N, H = _check_arrays(q_BTNH, k_BSKH, v_BSKH)
    rule = _make_rule(H**-0.5 if scale is None else scale, causal, window, soft_cap)
    slopes_N = _make_slopes(alibi_slopes_N, N)
    given = (q_segments_BT, kv_segments_BS, q_positions_BT, kv_positions_BS)
    places: dict[str, Any] = dict(zip(PLACE_NAMES, given, strict=True))
    if plan is None:
        features = {"soft_cap": soft_cap, "alibi": slopes_N is not None, "return_lse": return_lse}
        rows = {"causal": causal, "window": window, "implementation": implementation}
        plan = make_plan(q_BTNH, k_BSKH, **rows, **features, **places)
    else:
        _check_plan(plan, rule, places, implementation)
    attend = IMPLEMENTATIONS[plan.implementation].attend
    out_BTNH, lse_BTN = attend(q_BTNH, k_BSKH, v_BSKH, slopes_N, plan, rule)
    return (out_BTNH, lse_BTN) if return_lse else out_BTNH


def _check_plan(plan: Plan, rule: Rule, places: dict[str, Any], implementation: str) -> None:
    if any(place is not None for place in places.values()) or implementation not in (
        "auto",
        plan.implementation,
    ):
        raise ConfigError(
            f"plan={plan.implementation} is given together with segments, positions or "
            f"implementation={implementation!r}; these are the plan's, so give them to make_plan only"
        )
    if (plan.causal, plan.window) != (rule.causal, rule.window):
        raise ConfigError(
            f"plan is for causal={plan.causal} window={plan.window}, the call for "
            f"causal={rule.causal} window={rule.window}; make a plan for each"
        )


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


def _check_arrays(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> tuple[int, int]:
    """Returns N and H."""
    for name, array in {"q_BTNH": q_BTNH, "k_BSKH": k_BSKH, "v_BSKH": v_BSKH}.items():
        if array.ndim != 4 or 0 in array.shape:
            raise ConfigError(
                f"{name} has shape {array.shape}; it must have 4 axes "
                f"({', '.join(name[2:])}), none empty"
            )
    B, _, N, H = q_BTNH.shape
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
    return N, H


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
