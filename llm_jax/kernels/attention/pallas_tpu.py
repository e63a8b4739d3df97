"""Attention on TPU, in Pallas: what every kernel of it shares, and the op itself.

1. Arrays are turned to [B, heads, rows, H] and padded to whole tiles; padding gets segment 0.
2. Scores are held transposed, [keys, queries]: the softmax then reduces over sublanes, which is cheap,
   instead of over lanes, which is not (lane reductions were 61 % busy, and are 1 %).
3. ALiBi is one number per key, counted from the tile's origin; the term of the query is constant in
   its column, drops out of the softmax, and is put back into the log-sum-exp.
4. Forward: `pallas_tpu_forward`. Backward, one kernel of five products: `pallas_tpu_backward`.

Source: FlashAttention-2 (arXiv 2307.08691) for the recurrence; sizes of tiles in `tpu_tiles.json`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.kernels.attention import pallas_tpu_backward as backward
from llm_jax.kernels.attention import pallas_tpu_forward as forward
from llm_jax.kernels.attention.plan import (
    Places,
    Plan,
    Request,
    Rule,
    Tiles,
    first_position,
    key_ranges,
    pad_places,
    pad_rows,
    query_ranges,
)
from llm_jax.kernels.attention.tpu_spec import Blocks, Spec, blocks_for
from llm_jax.kernels.device import Device, current_device

DTYPES = ("bfloat16", "float32")
INTERPRET: Any = True  # on a CPU; a test for data races puts `pltpu.InterpretParams` here


def refuses(request: Request, device: Device) -> str | None:
    """Why the kernel cannot take this call; None: it can. On a CPU it runs interpreted, for tests."""
    if device.platform not in ("tpu", "cpu"):
        return f"needs a TPU (or a CPU, interpreted), not {device.kind}"
    if request.dtype not in DTYPES:
        return f"needs {' or '.join(DTYPES)}, not {request.dtype}"
    if request.H > 256:
        return f"needs a head size of at most 256, not {request.H}"
    return None


def make_ranges(places: Places, request: Request) -> tuple[jax.Array, ...]:
    """Runs of keys per query tile and per part of one, and of queries per key tile and slice of one.

    Each [B, tiles, 4] int32, or [B, parts, 2] for the parts, whose unmasked run is of no use.
    """
    B, T, S = request[:3]
    blocks = blocks_for(T, S, request.H, request.dtype, current_device().kind)
    rule = request.rule
    ranges = (
        key_ranges(places, rule, T, S, blocks.tiles),
        key_ranges(places, rule, T, S, blocks.parts)[..., ::3],
        query_ranges(places, rule, T, S, blocks.backward_tiles),
        query_ranges(places, rule, T, S, blocks.backward_parts)[..., ::3],
    )
    return tuple(jnp.broadcast_to(x, (B, *x.shape[1:])) for x in ranges)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    slopes_N: jax.Array | None,
    plan: Plan,
    rule: Rule,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.attend`, and as `xla_chunked.attend` in the names of what may be saved."""
    return _attend(q_BTNH, k_BSKH, v_BSKH, slopes_N, plan, rule)


class _Call(NamedTuple):
    """One call's arrays as the kernels read them, for one size of tiles."""

    spec: Spec
    q_BNTH: jax.Array
    k_BKSH: jax.Array
    v_BKSH: jax.Array
    slopes_N: jax.Array
    places: Places  # [B or 1, 1, T] of queries, [B or 1, J, 1, s] of keys in tiles of s

    @classmethod
    def arrange(
        cls,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        slopes_N: jax.Array | None,
        plan: Plan,
        rule: Rule,
        blocks: Blocks,
        tiles: Tiles,
    ) -> "_Call":
        (_, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
        places = pad_places(plan.places, T, S, tiles)
        spec = Spec(
            rule=rule,
            blocks=blocks,
            head_dim=H,
            group=N // K,
            first_position=first_position(T, S),
            alibi=slopes_N is not None,
            segments=places.q_segments_BT is not None,
            positions=places.q_positions_BT is not None,
            exact=q_BTNH.dtype == jnp.float32,
            interpret=INTERPRET if current_device().platform == "cpu" else False,
        )
        if places.q_segments_BT is not None:  # padding must not match padding
            queries = places.q_segments_BT
            places = places._replace(q_segments_BT=jnp.where(queries == 0, -1, queries))
        row = lambda x: None if x is None else x[:, None, :]  # noqa: E731
        chunk = tiles.key
        column = lambda x: None if x is None else x.reshape(x.shape[0], -1, 1, chunk)  # noqa: E731
        return cls(
            spec,
            pad_rows(q_BTNH.swapaxes(1, 2), 2, tiles.query),
            pad_rows(k_BSKH.swapaxes(1, 2), 2, tiles.key),
            pad_rows(v_BSKH.swapaxes(1, 2), 2, tiles.key),
            jnp.zeros((1,), jnp.float32) if slopes_N is None else slopes_N,
            Places(
                row(places.q_positions_BT),
                column(places.kv_positions_BS),
                row(places.q_segments_BT),
                column(places.kv_segments_BS),
            ),
        )


def _blocks(q_BTNH: jax.Array, k_BSKH: jax.Array) -> Blocks:
    (_, T, _, H), S = q_BTNH.shape, k_BSKH.shape[1]
    return blocks_for(T, S, H, q_BTNH.dtype.name, current_device().kind)


def _forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    slopes_N: jax.Array | None,
    plan: Plan,
    rule: Rule,
) -> tuple[jax.Array, jax.Array]:
    blocks, T = _blocks(q_BTNH, k_BSKH), q_BTNH.shape[1]
    # keys are padded to whole memory blocks, of which the plan's chunks are parts
    tiles = Tiles(blocks.query, blocks.key)
    call = _Call.arrange(q_BTNH, k_BSKH, v_BSKH, slopes_N, plan, rule, blocks, tiles)
    out_BNTH, lse_BN1T = forward.attend(*call, *plan.ranges[:2])
    return out_BNTH[:, :, :T].swapaxes(1, 2), lse_BN1T[:, :, 0, :T].swapaxes(1, 2)


def _forward_saving(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    slopes_N: jax.Array | None,
    plan: Plan,
    rule: Rule,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    out_BTNH, lse_BTN = _forward(q_BTNH, k_BSKH, v_BSKH, slopes_N, plan, rule)
    out_BTNH = checkpoint_name(out_BTNH, "attention_out")
    lse_BTN = checkpoint_name(lse_BTN, "attention_lse")
    return (out_BTNH, lse_BTN), (q_BTNH, k_BSKH, v_BSKH, slopes_N, plan, out_BTNH, lse_BTN)


def _backward(rule: Rule, saved: tuple, cotangents: tuple) -> tuple:
    q_BTNH, k_BSKH, v_BSKH, slopes_N, plan, out_BTNH, lse_BTN = saved
    grad_out_BTNH, grad_lse_BTN = cotangents
    blocks, T, S = _blocks(q_BTNH, k_BSKH), q_BTNH.shape[1], k_BSKH.shape[1]
    tiles = blocks.backward_tiles
    call = _Call.arrange(q_BTNH, k_BSKH, v_BSKH, slopes_N, plan, rule, blocks, tiles)
    products_BTNH = grad_out_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)
    delta_BTN = products_BTNH.sum(axis=-1) - grad_lse_BTN
    seen_BTN = ~jnp.isneginf(lse_BTN)  # rows that see nothing are masked wherever they are visited
    rows = lambda x_BTN: pad_rows(x_BTN.swapaxes(1, 2)[:, :, None], 3, tiles.query)  # noqa: E731
    ranges_BJ4, parts_BP2 = plan.ranges[2:]
    dq_BNTH, dk_BKSH, dv_BKSH = backward.attend(
        *call,
        ranges_BJ4,
        parts_BP2,
        pad_rows(grad_out_BTNH.swapaxes(1, 2), 2, tiles.query),
        rows(jnp.where(seen_BTN, lse_BTN, 0)),
        rows(jnp.where(seen_BTN, delta_BTN, 0)),
    )
    return (
        dq_BNTH[:, :, :T].swapaxes(1, 2),
        dk_BKSH[:, :, :S].swapaxes(1, 2),
        dv_BKSH[:, :, :S].swapaxes(1, 2),
        None,
        None,
    )


_attend = functools.partial(jax.custom_vjp, nondiff_argnums=(5,))(_forward)
_attend.defvjp(_forward_saving, _backward)
