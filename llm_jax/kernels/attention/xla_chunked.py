"""Attention in tiles, in plain XLA: any device, any dtype, memory linear in T.

1. Rows are padded to whole tiles; padding gets segment 0.
2. Per query tile, the run of key tiles that any of its rows may see comes with the plan.
3. Forward: scan over query tiles; within one, loop over its key tiles with a running softmax.
4. Backward, written by hand: the same loops recompute each tile's shares from the saved lse.

Works under jit with batch and heads sharded: no operation mixes rows of the batch or kv heads, but
for the tile ranges, one bit per pair of tiles. Source: FlashAttention-2 (arXiv 2307.08691).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from llm_jax.kernels.attention.plan import (
    Places,
    Plan,
    Request,
    Rule,
    Tiles,
    key_ranges,
    pad_places,
    tile_length,
)
from llm_jax.kernels.attention.reference import accumulator, precision, score
from llm_jax.kernels.device import current_device

# (query, key) rows of a tile. CPU, 2 busy cores, float32, forward and gradients, best of 8 in ms,
# for tiles of 128 / 256 / 512: B=8 T=512 N=6 195 / 258 / 521; B=4 T=1024 N=8 326 / 540 / 991;
# B=1 T=4096 N=8 1163 / 1101 / 1472. Elsewhere larger, as a turn of the loop costs launches; not
# measured yet.
CPU_TILES, OTHER_TILES = Tiles(128, 128), Tiles(512, 512)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    slopes_N: jax.Array | None,
    plan: Plan,
    rule: Rule,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.attend`, with the scores of one pair of tiles at a time.

    The results are named `attention_out` and `attention_lse` for `jax.checkpoint` policies: saving
    both spares the backward pass a second forward.
    """
    return _attend(q_BTNH, k_BSKH, v_BSKH, slopes_N, plan, rule)


def make_ranges(places: Places, request: Request) -> tuple[jax.Array, ...]:
    """First and one past the last key tile of each query tile, [B, I, 2] int32."""
    B, T, S = request[:3]
    ranges_BI4 = key_ranges(places, request.rule, T, S, _tiles(T, S))
    return (jnp.broadcast_to(ranges_BI4[..., ::3], (B, ranges_BI4.shape[1], 2)),)


def _tiles(T: int, S: int) -> Tiles:
    longest = CPU_TILES if current_device().platform == "cpu" else OTHER_TILES
    return Tiles(tile_length(T, longest.query), tile_length(S, longest.key))


def _split(x: jax.Array, count: int, length: int) -> jax.Array:
    """[B, T, ...] to tiles [count, B, length, ...], zeros behind the last row."""
    B, T, *rest = x.shape
    x = jnp.pad(x, [(0, 0), (0, count * length - T)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(x.reshape(B, count, length, *rest), 1, 0)


def _shared(ranges_BI2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tiles to visit for any row of the batch, [I] and [I]: the loop runs over all rows at once."""
    first_BI, last_BI = ranges_BI2[..., 0], ranges_BI2[..., 1]
    last_I = last_BI.max(axis=0)
    return jnp.where(first_BI < last_BI, first_BI, last_I).min(axis=0), last_I


def _cut(places: Places, tiles: Tiles) -> Places:
    """Padded places in tiles: [I, B or 1, t] and [J, B or 1, s]."""
    cut = lambda x, tile: x.reshape(x.shape[0], -1, tile).swapaxes(0, 1)  # noqa: E731
    sizes = Places(tiles.query, tiles.key, tiles.query, tiles.key)
    return Places(*(None if x is None else cut(x, n) for x, n in zip(places, sizes, strict=True)))


def _queries(x_BTNH: jax.Array, K: int, I: int, t: int) -> jax.Array:
    """[B, T, N, H] to [I, B, K, G, t, H]."""
    B, T, N, H = x_BTNH.shape
    return _split(x_BTNH.reshape(B, T, K, N // K, H), I, t).transpose(0, 1, 3, 4, 2, 5)


def _keys(x_BSKH: jax.Array, J: int, s: int) -> jax.Array:
    """[B, S, K, H] to [J, B, K, s, H]."""
    return _split(x_BSKH, J, s).swapaxes(2, 3)


def _rows(x_IBKGtH: jax.Array, T: int) -> jax.Array:
    """The inverse of `_queries`."""
    I, B, K, G, t, H = x_IBKGtH.shape
    return x_IBKGtH.transpose(1, 0, 4, 2, 3, 5).reshape(B, I * t, K * G, H)[:, :T]


def _columns(x_JBKsH: jax.Array, S: int) -> jax.Array:
    """The inverse of `_keys`."""
    J, B, K, s, H = x_JBKsH.shape
    return x_JBKsH.transpose(1, 0, 3, 2, 4).reshape(B, J * s, K, H)[:, :S]


class _Grid(NamedTuple):
    """One call cut into I query tiles of t rows and J key tiles of s rows."""

    q_IBKGtH: jax.Array
    k_JBKsH: jax.Array
    v_JBKsH: jax.Array
    slopes_KG: jax.Array | None
    places: Places
    first_I: jax.Array
    last_I: jax.Array

    @classmethod
    def cut(
        cls,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        slopes_N: jax.Array | None,
        plan: Plan,
    ) -> "_Grid":
        T, N, S, K = *q_BTNH.shape[1:3], *k_BSKH.shape[1:3]
        tiles = _tiles(T, S)
        I, J = -(-T // tiles.query), -(-S // tiles.key)
        padded = pad_places(plan.places.with_positions(T, S), T, S, tiles)
        return cls(
            _queries(q_BTNH, K, I, tiles.query),
            _keys(k_BSKH, J, tiles.key),
            _keys(v_BSKH, J, tiles.key),
            None if slopes_N is None else slopes_N.reshape(K, N // K),
            _cut(padded, tiles),
            *_shared(*plan.ranges),
        )

    def pair(self, i: jax.Array, j: jax.Array) -> Places:
        """Places of query tile i and key tile j, as `score` takes them."""
        q_positions, kv_positions, q_segments, kv_segments = self.places
        return Places(
            q_positions[i],
            kv_positions[j],
            None if q_segments is None else q_segments[i],
            None if kv_segments is None else kv_segments[j],
        )


def _forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    slopes_N: jax.Array | None,
    plan: Plan,
    rule: Rule,
) -> tuple[jax.Array, jax.Array]:
    grid = _Grid.cut(q_BTNH, k_BSKH, v_BSKH, slopes_N, plan)
    product = _product(q_BTNH.dtype)

    def query_tile(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_BKGtH = grid.q_IBKGtH[i]

        def key_tile(j: jax.Array, state: tuple) -> tuple:
            out_BKGtH, peak_BKGt, total_BKGt = state
            raw_BKGts = product("bkgth,bksh->bkgts", q_BKGtH, grid.k_JBKsH[j])
            score_BKGts = score(raw_BKGts, grid.slopes_KG, grid.pair(i, j), rule)
            new_peak_BKGt = jnp.maximum(peak_BKGt, score_BKGts.max(axis=-1))
            shift_BKGt = _finite(new_peak_BKGt)
            weight_BKGts = jnp.exp(score_BKGts - shift_BKGt[..., None])
            decay_BKGt = jnp.exp(peak_BKGt - shift_BKGt)
            total_BKGt = total_BKGt * decay_BKGt + weight_BKGts.sum(axis=-1)
            more_BKGtH = product(
                "bkgts,bksh->bkgth", weight_BKGts.astype(v_BSKH.dtype), grid.v_JBKsH[j]
            )
            return out_BKGtH * decay_BKGt[..., None] + more_BKGtH, new_peak_BKGt, total_BKGt

        zero_BKGtH = jnp.zeros(q_BKGtH.shape, accumulator(q_BTNH.dtype))
        start = (zero_BKGtH, jnp.full_like(zero_BKGtH[..., 0], -jnp.inf), zero_BKGtH[..., 0])
        out_BKGtH, peak_BKGt, total_BKGt = lax.fori_loop(
            grid.first_I[i], grid.last_I[i], key_tile, start
        )
        divisor_BKGt = jnp.where(total_BKGt > 0, total_BKGt, 1)
        out_BKGtH = out_BKGtH / divisor_BKGt[..., None]
        return out_BKGtH.astype(q_BTNH.dtype), peak_BKGt + jnp.log(divisor_BKGt)

    out_IBKGtH, lse_IBKGt = lax.map(query_tile, jnp.arange(grid.q_IBKGtH.shape[0]))
    T = q_BTNH.shape[1]
    return _rows(out_IBKGtH, T), _rows(lse_IBKGt[..., None], T)[..., 0]


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
    """With P the softmax: dV = P'dO, dS = P (dO V' - delta), dQ = dS K, dK = dS'Q."""
    q_BTNH, k_BSKH, v_BSKH, slopes_N, plan, out_BTNH, lse_BTN = saved
    grad_out_BTNH, grad_lse_BTN = cotangents
    grid = _Grid.cut(q_BTNH, k_BSKH, v_BSKH, slopes_N, plan)
    dtype, product = accumulator(q_BTNH.dtype), _product(q_BTNH.dtype)
    I, _, K, _, t, _ = grid.q_IBKGtH.shape
    # the softmax's normaliser, and the lse, pass back one number per row
    delta_BTN = (grad_out_BTNH.astype(dtype) * out_BTNH.astype(dtype)).sum(axis=-1) - grad_lse_BTN
    grad_out_IBKGtH = _queries(grad_out_BTNH, K, I, t)
    delta_IBKGt = _queries(delta_BTN[..., None], K, I, t)[..., 0]
    lse_IBKGt = _finite(_queries(lse_BTN[..., None], K, I, t)[..., 0])

    def query_tile(grads: tuple, i: jax.Array) -> tuple[tuple, jax.Array]:
        q_BKGtH, grad_out_BKGtH = grid.q_IBKGtH[i], grad_out_IBKGtH[i]

        def key_tile(j: jax.Array, state: tuple) -> tuple:
            dq_BKGtH, dk_JBKsH, dv_JBKsH = state
            k_BKsH, v_BKsH = grid.k_JBKsH[j], grid.v_JBKsH[j]
            raw_BKGts = product("bkgth,bksh->bkgts", q_BKGtH, k_BKsH)
            score_BKGts, pull_back = jax.vjp(
                lambda raw: score(raw, grid.slopes_KG, grid.pair(i, j), rule), raw_BKGts
            )
            share_BKGts = jnp.exp(score_BKGts - lse_IBKGt[i][..., None])
            grad_share_BKGts = product("bkgth,bksh->bkgts", grad_out_BKGtH, v_BKsH)
            (grad_raw_BKGts,) = pull_back(
                share_BKGts * (grad_share_BKGts - delta_IBKGt[i][..., None])
            )
            grad_raw_BKGts = grad_raw_BKGts.astype(q_BTNH.dtype)
            share_BKGts = share_BKGts.astype(v_BSKH.dtype)
            return (
                dq_BKGtH + product("bkgts,bksh->bkgth", grad_raw_BKGts, k_BKsH),
                dk_JBKsH.at[j].add(product("bkgts,bkgth->bksh", grad_raw_BKGts, q_BKGtH)),
                dv_JBKsH.at[j].add(product("bkgts,bkgth->bksh", share_BKGts, grad_out_BKGtH)),
            )

        start = (jnp.zeros(q_BKGtH.shape, dtype), *grads)
        first, last = grid.first_I[i], grid.last_I[i]
        dq_BKGtH, dk_JBKsH, dv_JBKsH = lax.fori_loop(first, last, key_tile, start)
        return (dk_JBKsH, dv_JBKsH), dq_BKGtH.astype(q_BTNH.dtype)

    start = (jnp.zeros(grid.k_JBKsH.shape, dtype), jnp.zeros(grid.v_JBKsH.shape, dtype))
    (dk_JBKsH, dv_JBKsH), dq_IBKGtH = lax.scan(query_tile, start, jnp.arange(I))
    dq_BTNH = _rows(dq_IBKGtH, q_BTNH.shape[1])
    dk_BSKH = _columns(dk_JBKsH, k_BSKH.shape[1]).astype(k_BSKH.dtype)
    dv_BSKH = _columns(dv_JBKsH, v_BSKH.shape[1]).astype(v_BSKH.dtype)
    return dq_BTNH, dk_BSKH, dv_BSKH, None, None


def _product(dtype: jnp.dtype) -> Callable[..., jax.Array]:
    """einsum for operands of `dtype`, summed in the accumulator's."""
    return partial(
        jnp.einsum, precision=precision(dtype), preferred_element_type=accumulator(dtype)
    )


def _finite(x: jax.Array) -> jax.Array:
    """0 for -inf, so that -inf - x stays -inf instead of NaN."""
    return jnp.where(jnp.isneginf(x), 0, x)


_attend = jax.custom_vjp(_forward, nondiff_argnums=(5,))
_attend.defvjp(_forward_saving, _backward)
