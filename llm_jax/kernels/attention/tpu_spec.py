"""What the TPU kernels are compiled for: features, sizes of tiles, and a tile's masked scores."""

import functools
import json
import math
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from llm_jax.kernels.attention.plan import Rule, Tiles

LOG2E = math.log2(math.e)
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: -inf minus -inf is NaN
LANES = 128

# what `lax.dot_general` contracts
PLAIN = (((1,), (0,)), ((), ()))  # [a, b], [b, c] -> [a, c]
CONTRACT_LAST = (((1,), (1,)), ((), ()))  # [a, b], [c, b] -> [a, c]
CONTRACT_FIRST = (((0,), (0,)), ((), ()))  # [a, b], [a, c] -> [b, c]


class Blocks(NamedTuple):
    """Rows of the tiles of both kernels, all multiples of 128 lanes.

    Large tiles feed the matrix units best; where a mask is needed they are worked off in parts, and
    parts that nobody sees are skipped. So rows of short documents do not pay for large tiles.
    """

    query: int  # forward: queries of a grid step
    part: int  # forward: queries at a time under a mask; divides `query`
    key: int  # forward: keys fetched at once
    chunk: int  # forward: keys of one entry of the plan; divides `key`
    slice: int  # forward: keys of one matrix product; divides `chunk`
    backward_query: int
    backward_part: int  # divides `backward_query`
    backward_key: int
    backward_slice: int  # keys at a time; divides `backward_key`

    @property
    def tiles(self) -> Tiles:
        """Of the forward plan: what is visited."""
        return Tiles(self.query, self.chunk)

    @property
    def parts(self) -> Tiles:
        """Of the forward plan: what is visited under a mask."""
        return Tiles(self.part, self.chunk)

    @property
    def backward_tiles(self) -> Tiles:
        """Of the backward plan: what is visited."""
        return Tiles(self.backward_query, self.backward_key)

    @property
    def backward_parts(self) -> Tiles:
        """Of the backward plan: what is visited under a mask."""
        return Tiles(self.backward_part, self.backward_slice)


class Spec(NamedTuple):
    """Everything a kernel is specialised for. Hashable."""

    rule: Rule
    blocks: Blocks
    head_dim: int
    group: int  # query heads per kv head
    first_position: int  # of query row 0, where positions are row indices
    alibi: bool
    segments: bool
    positions: bool
    exact: bool  # float32: ALiBi to the last bit, at one more operation a score
    interpret: Any  # as of `pl.pallas_call`

    @property
    def masked(self) -> bool:
        """Whether any tile can hold a hidden pair; else no code for masks is emitted."""
        return self.rule.causal or self.segments


@functools.cache
def _table() -> dict[str, Any]:
    text = (
        resources.files("llm_jax.kernels.attention").joinpath("tpu_tiles.json").read_text("utf-8")
    )
    return json.loads(text)


def blocks_for(T: int, S: int, H: int, dtype: str, kind: str) -> Blocks:
    """The table's tiles for a chip, head size, dtype and length, cut down to the lengths at hand."""
    chip = chip_table(kind)
    heads = sorted(int(name) for name in chip if name.isdigit())
    nearest = next((h for h in heads if h >= H), heads[-1])
    entries = chip["float32"] if dtype == "float32" else chip[str(nearest)]
    entry = next((e for e in entries if e["length"] >= max(T, S)), entries[-1])
    best = Blocks(*(entry[name] for name in Blocks._fields))
    query, key = _fit(T, best.query), _fit(S, best.key)
    chunk = math.gcd(key, best.chunk)
    back_query, back_key = _fit(T, best.backward_query), _fit(S, best.backward_key)
    return Blocks(
        query=query,
        part=math.gcd(query, best.part),
        key=key,
        chunk=chunk,
        slice=math.gcd(chunk, best.slice),
        backward_query=back_query,
        backward_part=math.gcd(back_query, best.backward_part),
        backward_key=back_key,
        backward_slice=math.gcd(back_key, best.backward_slice),
    )


def chip_table(kind: str) -> dict[str, Any]:
    """What the table says of a chip, or of any other."""
    chips = _table()["chips"]
    return chips.get(kind, chips["other"])


def vmem_limit(kind: str) -> int:
    """Bytes of on-chip memory a kernel may use."""
    return chip_table(kind)["vmem_limit_bytes"]


def _fit(length: int, longest: int) -> int:
    """A multiple of 128: near-equal tiles, or one tile for a short length."""
    lanes = math.ceil(length / LANES)
    return min(longest, math.ceil(lanes / math.ceil(length / longest)) * LANES)


def column(row_1k: jax.Array) -> jax.Array:
    """[1, k] to [k, 1]."""
    return jnp.broadcast_to(row_1k, (LANES, row_1k.shape[1])).T[:, :1]


class Tile(NamedTuple):
    """Where the keys and queries of one tile of scores stand; what is absent is None."""

    key_row: jax.Array  # position of the first key and query, where positions are row indices
    query_row: jax.Array
    key_positions: Any  # [k, 1]
    query_positions: Any  # [1, q]
    key_segments: Any
    query_segments: Any


def visible(spec: Spec, tile: Tile, shape: tuple[int, ...]) -> jax.Array | None:
    """Which key (rows) each query (columns) may attend to; None: all."""
    rule, conditions = spec.rule, []
    if rule.causal and spec.positions:
        conditions.append(tile.key_positions <= tile.query_positions)
        if rule.window:
            conditions.append(tile.key_positions > tile.query_positions - rule.window)
    elif rule.causal:
        # one iota difference for all tiles, compared with a scalar of each
        behind = lax.broadcasted_iota(jnp.int32, shape, 1) - lax.broadcasted_iota(
            jnp.int32, shape, 0
        )
        offset = tile.key_row - tile.query_row
        conditions.append(behind >= offset)
        if rule.window:
            conditions.append(behind < offset + rule.window)
    if spec.segments:
        conditions.append(tile.key_segments == tile.query_segments)
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def logits(
    spec: Spec, raw_kq: jax.Array, offset: jax.Array | None, tile: Tile, masked: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Products k.q to scores in units of log 2; the soft-cap's tanh too, where there is one."""
    rule, bent_kq, factor = spec.rule, None, spec.rule.scale * LOG2E
    if rule.soft_cap:
        raw_kq = bent_kq = jnp.tanh(raw_kq * (rule.scale / rule.soft_cap))
        factor = rule.soft_cap * LOG2E
    if (
        offset is not None
    ):  # before the factor, where it fits the schedule better: 1 % of all bundles
        raw_kq = raw_kq + offset * (1 / factor)
    score_kq = raw_kq * factor
    seen_kq = visible(spec, tile, raw_kq.shape) if masked else None
    return (score_kq if seen_kq is None else jnp.where(seen_kq, score_kq, HIDDEN)), bent_kq


def bias(
    spec: Spec, slope: jax.Array, shape: tuple[int, ...], tile: Tile, origin: jax.Array
) -> jax.Array | None:
    """ALiBi of the keys of a tile in units of log 2, relative to `origin`: [keys, 1].

    Counted from the tile's origin, far from most of its queries, it has a rounding error of 2^-24 of
    slope times tile: 1e-5, nothing beside bfloat16's. In float32 it is counted from every query:
    [keys, queries].
    """
    if not spec.alibi:
        return None
    if spec.positions:
        distance = tile.key_positions - (tile.query_positions if spec.exact else origin)
    elif spec.exact:
        distance = lax.broadcasted_iota(jnp.int32, shape, 0) - lax.broadcasted_iota(
            jnp.int32, shape, 1
        )
        distance = distance + (tile.key_row - tile.query_row)
    else:
        distance = lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0) + (tile.key_row - origin)
    return distance.astype(jnp.float32) * (slope * LOG2E)


def left_out(spec: Spec, slope: jax.Array, count: int, tile: Tile, origin: jax.Array) -> Any:
    """What `bias` leaves out of the scores of `count` queries, in units of log 2: [1, count] or 0."""
    if not spec.alibi or spec.exact:
        return 0.0
    behind = tile.query_positions
    if behind is None:
        behind = lax.broadcasted_iota(jnp.int32, (1, count), 1) + tile.query_row
    return (origin - behind).astype(jnp.float32) * (slope * LOG2E)


def products(dtype: Any) -> dict[str, Any]:
    """Keywords of `lax.dot_general`: float32 means float32, whatever the default of the device."""
    exact = dtype == jnp.float32
    return {
        "precision": lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        "preferred_element_type": jnp.float32,
    }
