"""Who sees whom, and what that leaves to compute: rules, places, and the plan all layers share.

A kernel works in tiles: some query rows by some key rows. From the least and greatest position and
segment of every tile follows which pairs of tiles hold a visible pair of rows (they are visited) and
in which every pair is visible (no mask is needed there). Per query tile that is four integers,

    [first, first_full, last_full, last)

in key tiles: masked from `first`, unmasked from `first_full`, masked again from `last_full`. Packing,
causality and windows are then skipped alike, forward and backward, for 16 bytes a tile, and the
integers depend on the batch alone: they are computed once and reused by every layer.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FAR = jnp.iinfo(jnp.int32).max


class Rule(NamedTuple):
    """What is fixed at compile time (hashable). `window` and `soft_cap` are off at 0."""

    scale: float
    causal: bool
    window: int
    soft_cap: float


class Places(NamedTuple):
    """Where queries and keys stand, int32. The leading axis is B, or 1 when all rows are alike.

    Without positions, they are row indices, and the last query stands where the last key does.
    """

    q_positions_BT: Any  # jax.Array; None: row indices
    kv_positions_BS: Any
    q_segments_BT: Any  # jax.Array; None: no segments and no padding
    kv_segments_BS: Any

    def with_positions(self, T: int, S: int) -> "Places":
        """The same, with row indices spelt out."""
        if self.q_positions_BT is not None:
            return self
        rows = jnp.arange(T, dtype=jnp.int32)[None] + first_position(T, S)
        return self._replace(
            q_positions_BT=rows, kv_positions_BS=jnp.arange(S, dtype=jnp.int32)[None]
        )


class Request(NamedTuple):
    """What decides who can take a call: sizes, dtype and features. Hashable."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    dtype: str
    rule: Rule
    alibi: bool
    segments: bool
    positions: bool
    lse: bool  # whether the log-sum-exp is wanted, with its gradient


class Tiles(NamedTuple):
    """Rows of a tile."""

    query: int
    key: int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["places", "ranges"],
    meta_fields=["implementation", "causal", "window"],
)
@dataclasses.dataclass(frozen=True)
class Plan:
    """What attention needs to know of a batch beside q, k and v. Made by `api.make_plan`."""

    places: Places
    ranges: tuple[Any, ...]  # arrays [B, tiles, ...], as the implementation wants them
    implementation: str
    causal: bool
    window: int


def first_position(T: int, S: int) -> int:
    """Where the first query stands when positions are row indices: aligned at the end."""
    return max(S - T, 0)


def tile_length(length: int, longest: int, step: int = 16) -> int:
    """Rows per tile: all when they fit, else near-equal tiles of a multiple of `step` rows."""
    if length <= longest:
        return length
    per_tile = -(-length // -(-length // longest))
    return min(longest, -(-per_tile // step) * step)


def pad_rows(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Zeros behind the last row, up to a whole number of tiles."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def pad_places(places: Places, T: int, S: int, tiles: Tiles) -> Places:
    """Places of whole tiles. Rows beyond T and S are told from the rest by segment 0."""
    ragged = T % tiles.query or S % tiles.key
    q_segments_BT, kv_segments_BS = places.q_segments_BT, places.kv_segments_BS
    if q_segments_BT is None and ragged:
        q_segments_BT, kv_segments_BS = (jnp.ones((1, n), jnp.int32) for n in (T, S))
    pad = lambda x, tile: None if x is None else pad_rows(x, 1, tile)  # noqa: E731
    return Places(
        pad(places.q_positions_BT, tiles.query),
        pad(places.kv_positions_BS, tiles.key),
        pad(q_segments_BT, tiles.query),
        pad(kv_segments_BS, tiles.key),
    )


class _Extent(NamedTuple):
    """Least and greatest of each tile, [B or 1, I]: of its real rows, and whether all are real."""

    least_position: jax.Array
    most_position: jax.Array
    least_segment: jax.Array
    most_segment: jax.Array
    whole: jax.Array


def _extent(positions_BT: jax.Array, segments_BT: jax.Array | None, tile: int) -> _Extent:
    cut = lambda x: x.reshape(x.shape[0], -1, tile)  # noqa: E731
    positions_BIt = cut(positions_BT)
    segments_BIt = jnp.ones_like(positions_BIt) if segments_BT is None else cut(segments_BT)
    real = segments_BIt != 0
    least = lambda x: jnp.where(real, x, FAR).min(axis=-1)  # noqa: E731
    most = lambda x: jnp.where(real, x, -FAR).max(axis=-1)  # noqa: E731
    return _Extent(
        least(positions_BIt),
        most(positions_BIt),  # a tile of padding: least > greatest
        least(segments_BIt),
        most(segments_BIt),
        real.all(axis=-1),
    )


def _pairs(places: Places, rule: Rule, T: int, S: int, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """Which pairs of tiles to visit, and which need no mask: two [B or 1, I, J] bool.

    The test of the extents is cheap, safe for any order of positions and segments, and exact for
    contiguous documents in tiles that lie within one of them.
    """
    q_positions, k_positions, q_segments, k_segments = pad_places(
        places.with_positions(T, S), T, S, tiles
    )
    q = jax.tree.map(lambda x: x[:, :, None], _extent(q_positions, q_segments, tiles.query))
    k = jax.tree.map(lambda x: x[:, None, :], _extent(k_positions, k_segments, tiles.key))
    touch = (q.least_segment <= k.most_segment) & (k.least_segment <= q.most_segment)
    full = (q.least_segment == k.most_segment) & (k.least_segment == q.most_segment)
    full &= q.whole & k.whole
    if rule.causal:
        touch &= k.least_position <= q.most_position
        full &= k.most_position <= q.least_position
    if rule.window:
        touch &= k.most_position > q.least_position - rule.window
        full &= k.least_position > q.most_position - rule.window
    return touch, full


def _runs(touch_BIJ: jax.Array, full_BIJ: jax.Array) -> jax.Array:
    """[first, first_full, last_full, last) of each row, [B, I, 4] int32."""
    J = touch_BIJ.shape[-1]

    def run(mask_BIJ: jax.Array) -> tuple[jax.Array, jax.Array]:
        some = mask_BIJ.any(axis=-1)
        first = jnp.where(some, mask_BIJ.argmax(axis=-1), 0)
        return first, jnp.where(some, J - mask_BIJ[..., ::-1].argmax(axis=-1), 0)

    first, last = run(touch_BIJ)
    first_full, last_full = run(full_BIJ)
    # the unmasked run must have no gap; positions in no order may leave one
    unbroken = (last_full - first_full == full_BIJ.sum(axis=-1)) & (last_full > first_full)
    first_full = jnp.where(unbroken, first_full, last)
    last_full = jnp.where(unbroken, last_full, last)
    return jnp.stack([first, first_full, last_full, last], axis=-1).astype(jnp.int32)


def key_ranges(places: Places, rule: Rule, T: int, S: int, tiles: Tiles) -> jax.Array:
    """For each query tile its run of key tiles, [B or 1, I, 4] int32; see the module's head."""
    return _runs(*_pairs(places, rule, T, S, tiles))


def query_ranges(places: Places, rule: Rule, T: int, S: int, tiles: Tiles) -> jax.Array:
    """For each key tile its run of query tiles, [B or 1, J, 4] int32: the transpose."""
    touch_BIJ, full_BIJ = _pairs(places, rule, T, S, tiles)
    return _runs(touch_BIJ.swapaxes(1, 2), full_BIJ.swapaxes(1, 2))
