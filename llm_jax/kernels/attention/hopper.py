"""What the Hopper kernels share: launching, products, and the scores of a tile.

`Machine` is the one place that knows about versions of jax and about GPU interpret mode, in which
WGMMA does not run: there a product is `jnp.dot`, and everything else (copies, barriers, loops,
masks) is the real code. Layouts are stated for Mosaic's Lane semantics; Warpgroup semantics, the
default from jax 0.11, would infer them.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from llm_jax.kernels.attention.mosaic_gpu import Tiling
from llm_jax.kernels.attention.plan import Places, Rule

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

TILE = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)  # one number per row of a tile
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
LAYOUT_OF_AXIS = (ROWS, COLUMNS)

ROWS_PER_WARPGROUP = 64  # of every WGMMA instruction
# Of 512 registers per lane, shared by the warpgroups; the producer only starts copies.
PRODUCER_REGISTERS = 24
CONSUMER_REGISTERS = {1: 256, 2: 240}  # by the number of consumers; an instruction can name 255

# `plgpu.load` lost its index argument after 0.10.
_NO_INDEX = ((),) if jax.__version_info__ < (0, 11) else ()


class Operands(NamedTuple):
    """What every kernel reads, padded to whole tiles: arrays, or in a kernel their refs.

    Absent features are None. Segment 0 of keys is -1 here: padding then meets no query, padding
    included.
    """

    q_BTNH: Any
    k_BSKH: Any
    v_BSKH: Any
    slopes_N: Any  # times LOG2_E: scores are in units of log2
    places: Places
    ranges: Any  # of this kernel, as in `plan`

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.q_BTNH.shape[2] // self.k_BSKH.shape[2]

    @property
    def q_places(self) -> tuple[Any, Any]:
        """Positions and segments of queries."""
        return self.places.q_positions_BT, self.places.q_segments_BT

    @property
    def k_places(self) -> tuple[Any, Any]:
        return self.places.kv_positions_BS, self.places.kv_segments_BS

    def masks(self, rule: Rule) -> bool:
        """Whether any score may be out of sight."""
        return rule.causal or self.places.kv_segments_BS is not None

    @property
    def extras(self) -> int:
        """How many of them there are, and so how many copies go with a tile of q or k."""
        return sum(place is not None for place in self.k_places)


class Machine(NamedTuple):
    """Runs products on the tensor cores, or with jnp when `interpret` holds InterpretGPUParams."""

    interpret: Any = None

    def launch(
        self,
        body: Callable[..., None],
        operands: Any,
        results: tuple[jax.ShapeDtypeStruct, ...],
        scratch: Mapping[str, Any],
        grid: Mapping[str, int],
        warpgroups: int,
        name: str,
    ) -> Any:
        """Calls body(operands, *results, **scratch) with refs, in every block of the grid."""
        leaves, tree = jax.tree.flatten(operands)

        def flat_body(*refs: Any, **scratch_refs: Any) -> None:
            body(tree.unflatten(refs[: len(leaves)]), *refs[len(leaves) :], **scratch_refs)

        options = {} if self.interpret is None else {"interpret": self.interpret}
        return plgpu.kernel(
            flat_body,
            out_type=list(results),
            scratch_types=dict(scratch),
            grid=tuple(grid.values()),
            grid_names=tuple(grid),
            num_threads=warpgroups,
            thread_name="warpgroup",
            kernel_name=name,
            compiler_params=plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
            ),
            **options,
        )(*leaves)

    def matrices(self, *shape: int, dtype: Any) -> Any:
        """Shared memory that WGMMA reads: swizzled by 128 bytes."""
        tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(shape, dtype, transforms=() if self.interpret else tiled)

    def load(self, ref: Any, axis: int) -> jax.Array:
        """A vector from shared memory, one number per row (axis 0) or column (1) of a tile."""
        return plgpu.load(ref, *_NO_INDEX, layout=LAYOUT_OF_AXIS[axis])

    def release(self, barrier: Any, *, loaded: bool) -> None:
        """Lets the producer overwrite a slot; `loaded` says whether `load` read from it.

        WGMMA and TMA are ordered among themselves, but an ordinary load needs a fence.
        """
        if loaded:
            plgpu.commit_smem()
        plgpu.barrier_arrive(barrier)

    def product(self, a: Any, b: Any, *, meanwhile: Callable[[], None] = lambda: None) -> jax.Array:
        """a b' in float32, both in shared memory; `meanwhile` runs while it is computed."""
        if self.interpret:
            meanwhile()
            return _dot(_read(a), _read(b).T)

        def run(result: Any) -> jax.Array:
            plgpu.wgmma(result, a, b.transpose((1, 0)))
            meanwhile()
            return result[...]

        return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    def two_products(
        self, first: tuple[Any, Any], second: tuple[Any, Any], use_first: Callable[..., Any]
    ) -> tuple[Any, jax.Array]:
        """use_first(a b') and the second product, which is computed in the meantime."""
        if self.interpret:
            a, b = (_dot(_read(x), _read(y).T) for x, y in (first, second))
            return use_first(a), b

        def run(result: Any, other: Any) -> tuple[Any, jax.Array]:
            for into, (a, b) in ((result, first), (other, second)):
                plgpu.wgmma(into, a, b.transpose((1, 0)))
            done = lax.optimization_barrier(plgpu.wgmma_accumulator_load(result, wait_n=1))
            return use_first(done), other[...]

        accumulators = (
            plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32) for a, b in (first, second)
        )
        return pl.run_scoped(run, *accumulators)

    def add_product(
        self,
        total: jax.Array,
        a: jax.Array,
        b: Any,
        *,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Any:
        """total + a b, with a in registers; `meanwhile` runs while it is computed."""
        if self.interpret:
            meanwhile()
            return total + _dot(a, _read(b))

        def run(result: Any) -> None:
            plgpu.wgmma(result, a, b)
            meanwhile()

        return pl.run_state(run)(plgpu.ACC.init(total))

    def add_two_products(
        self,
        totals: tuple[jax.Array, jax.Array],
        a: jax.Array,
        b: Any,
        next_a: Callable[[], jax.Array],
        next_b: Any,
    ) -> Any:
        """totals + (a b, next_a() next_b): the left factor of the second is made during the first."""
        if self.interpret:
            return totals[0] + _dot(a, _read(b)), totals[1] + _dot(next_a(), _read(next_b))

        def run(results: Any) -> None:
            plgpu.wgmma(results[0], a, b)
            plgpu.wgmma(results[1], next_a(), next_b)

        return pl.run_state(run)(tuple(plgpu.ACC.init(total) for total in totals))


def _read(ref: Any) -> jax.Array:
    """What WGMMA would read: ordered before a TMA that a later barrier allows, as WGMMA's reads are."""
    value = ref[...]
    plgpu.commit_smem()
    return value


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


class Side(NamedTuple):
    """The queries, or the keys, of a tile of scores."""

    axis: int  # of the tile: 0, its rows, or 1, its columns
    length: int
    start: Any  # of its first row; int32 scalar
    positions: jax.Array | None  # None: start, start + 1, ...
    segments: jax.Array | None

    def offsets(self, origin: Any) -> jax.Array:
        """Positions counted from `origin`, [length] int32."""
        if self.positions is not None:
            return self.positions - origin
        rows = plgpu.broadcasted_iota(
            jnp.int32, (self.length,), 0, layout=LAYOUT_OF_AXIS[self.axis]
        )
        return rows + (self.start - origin)


class Setting(NamedTuple):
    """What is fixed at compile time for one kernel."""

    rule: Rule
    tiling: Tiling
    first_position: int  # of query 0, when positions are row indices
    machine: Machine


class Block(NamedTuple):
    """The refs and indices of one block of a kernel."""

    setting: Setting
    operands: Any  # refs
    results: tuple[Any, ...]
    smem: dict[str, Any]
    batch: jax.Array
    head: jax.Array
    number: jax.Array  # among the blocks of its head
    range: "Range"

    def side(self, axis: int, start: Any, copies: Any, slot: Any, wanted: Iterable[bool]) -> Side:
        """The rows or columns of a tile; positions and segments are loaded if `wanted`."""
        loaded = (
            self.setting.machine.load(copies.at[i, slot], axis) if want else None
            for i, want in enumerate(wanted)
        )
        return Side(axis, copies.shape[2], start, *loaded)


def spread(x: jax.Array, axis: int, shape: tuple[int, ...]) -> jax.Array:
    """A vector along one axis of a tile, repeated along the other."""
    return lax.broadcast_in_dim(x, shape, [axis])


def visible(rule: Rule, q: Side, k: Side) -> jax.Array | None:
    """Which scores of the tile count; None: all. As `reference.visible`."""
    shape = (q.length, k.length) if q.axis == 0 else (k.length, q.length)
    conditions = []
    if rule.causal:
        q_offset, k_offset = (spread(s.offsets(q.start), s.axis, shape) for s in (q, k))
        conditions.append(k_offset <= q_offset)
        if rule.window:
            conditions.append(q_offset - k_offset < rule.window)
    if q.segments is not None and k.segments is not None:
        conditions.append(spread(q.segments, q.axis, shape) == spread(k.segments, k.axis, shape))
    if not conditions:
        return None
    seen = conditions[0]
    for condition in conditions[1:]:
        seen = seen & condition
    return seen


class ColumnBias(NamedTuple):
    """ALiBi of a tile whose columns are keys: slope * (key position - origin)."""

    slope: jax.Array
    origin: jax.Array
    ramp: jax.Array  # slope * 0, 1, ..., so that a tile costs one number and no conversion

    @classmethod
    def make(cls, slope: jax.Array, origin: jax.Array, keys: int) -> "ColumnBias":
        columns = plgpu.broadcasted_iota(jnp.int32, (keys,), 0, layout=COLUMNS)
        return cls(slope, origin, columns.astype(jnp.float32) * slope)

    def split(self, k: Side) -> tuple[jax.Array, Any]:
        """A number per column and one for the tile, which add up to the bias."""
        if k.positions is not None:
            return k.offsets(self.origin).astype(jnp.float32) * self.slope, 0.0
        return self.ramp, (k.start - self.origin).astype(jnp.float32) * self.slope


def hide(score: jax.Array, seen: jax.Array | None) -> jax.Array:
    """-inf where the key is out of sight."""
    return score if seen is None else jnp.where(seen, score, -jnp.inf)


def own_row(ref: Any, batch: jax.Array) -> Any:
    """The row of a batch in an array whose leading axis is B, or 1 when all rows are alike."""
    return ref.at[batch if ref.shape[0] > 1 else 0]


def copy_places(
    places: tuple[Any, Any], batch: jax.Array, rows: Any, copies: Any, slot: Any, ready: Any
) -> None:
    """Copies the positions and segments that there are to copies[0, slot] and copies[1, slot]."""
    for i, place in enumerate(places):
        if place is not None:
            source = own_row(place, batch).at[rows]
            plgpu.copy_gmem_to_smem(source, copies.at[i, slot], ready)


class Range(NamedTuple):
    """Tiles to visit: masked from `first`, unmasked from `first_full`, masked from `last_full`."""

    first: jax.Array
    first_full: jax.Array
    last_full: jax.Array
    last: jax.Array

    @classmethod
    def read(cls, ranges: Any, batch: jax.Array, tile: jax.Array) -> "Range":
        row = own_row(ranges, batch)
        return cls(*(row[tile, i] for i in range(4)))

    def loop(self, step: Callable[..., Any], state: Any, *, masks: bool) -> Any:
        """step(tile, state, masked=...) over all of them; without `masks`, none is masked."""
        if not masks:
            return lax.fori_loop(self.first, self.last, partial(step, masked=False), state)
        state = lax.fori_loop(self.first, self.first_full, partial(step, masked=True), state)
        state = lax.fori_loop(self.first_full, self.last_full, partial(step, masked=False), state)
        return lax.fori_loop(self.last_full, self.last, partial(step, masked=True), state)
