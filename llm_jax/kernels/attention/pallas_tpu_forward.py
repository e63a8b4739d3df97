"""The forward kernel on TPU.

Grid (B, N, query tile, step). A step has one memory block of keys and values in VMEM and visits those
of its chunks that the plan names: the whole block unrolled where it needs no mask, which is where the
time goes, and else chunk by chunk, of each the parts of the query tile that see it. The number of steps
is the largest that any tile of this batch needs, not the number of blocks.

The sum of the weights is one more row of the output, for values that are all 1: without a mask the MXU has
room where the vector units have none (4 % fewer bundles on v5e and v5p, 14 % on v4), and ALiBi takes its
place there. Small parts under a mask are summed as usual, which costs them 3 % less.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm_jax.kernels.attention.plan import Places
from llm_jax.kernels.attention.tpu_spec import (
    CONTRACT_LAST,
    HIDDEN,
    LOG2E,
    PLAIN,
    Blocks,
    Spec,
    Tile,
    bias,
    column,
    left_out,
    logits,
    products,
    vmem_limit,
)
from llm_jax.kernels.device import current_device

SUM_ROWS = (
    16  # below the output, each the sum of the weights: as many as bfloat16 packs into a tile
)


def attend(
    spec: Spec,
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    slopes_N: jax.Array,
    places: Places,
    ranges_BI4: jax.Array,
    parts_BP2: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns out_BNTH and the log-sum-exp [B, N, 1, T] of padded rows. P counts parts of tiles."""
    B, N, T, H = q_BNTH.shape
    S, blocks = k_BKSH.shape[2], spec.blocks
    per_block, I = blocks.key // blocks.chunk, T // blocks.query
    first_BI, last_BI = ranges_BI4[..., 0], ranges_BI4[..., 3]
    steps = (last_BI + per_block - 1) // per_block - first_BI // per_block
    # of one axis: SMEM pads two to 128 lanes
    scalars = (ranges_BI4.reshape(-1), _whole_tiles(parts_BP2, I, blocks), slopes_N)
    places = places._replace(
        kv_positions_BS=_by_chunk(places.kv_positions_BS, blocks.chunk),
        kv_segments_BS=_by_chunk(places.kv_segments_BS, blocks.chunk),
    )
    inputs = (q_BNTH, k_BKSH, v_BKSH, *(x for x in places if x is not None))
    in_specs, out_specs = _block_specs(spec, H, I, places)
    pairs = T * S // (2 if spec.rule.causal else 1)
    return pl.pallas_call(
        functools.partial(_kernel, spec=spec, I=I),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, N, I, jnp.maximum(steps.max(), 1)),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((rows, blocks.query), jnp.float32) for rows in (1, H + SUM_ROWS)
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q_BNTH.shape, q_BNTH.dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
        ],
        cost_estimate=pl.CostEstimate(
            flops=4 * B * N * pairs * H,
            transcendentals=B * N * pairs,
            bytes_accessed=2 * q_BNTH.nbytes + I * spec.group * (k_BKSH.nbytes + v_BKSH.nbytes),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_limit(current_device().kind),
        ),
        interpret=spec.interpret,
        name="llm_jax_attention_forward",
    )(*scalars, *inputs)


def _block_specs(
    spec: Spec, H: int, I: int, places: Places
) -> tuple[list[pl.BlockSpec], list[pl.BlockSpec]]:
    """Of q, k, v and the places there are, and of the two results."""
    blocks, G = spec.blocks, spec.group
    per_block = blocks.key // blocks.chunk

    def key_block(b: Any, n: Any, i: Any, j: Any, ranges: Any, *_: Any) -> Any:
        at = (b * I + i) * 4
        block = lax.div(ranges[at], per_block) + j
        # beyond the last block, the same again: nothing is fetched
        return jnp.minimum(block, lax.div(jnp.maximum(ranges[at + 3] - 1, 0), per_block))

    def query_spec(shared: bool) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, 1, blocks.query), lambda b, n, i, j, *_: (0 if shared else b, 0, i)
        )

    def key_spec(shared: bool) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, per_block, 1, blocks.chunk),
            lambda b, *at: (0 if shared else b, key_block(b, *at), 0, 0),
        )

    rows = pl.BlockSpec((None, None, blocks.query, H), lambda b, n, i, j, *_: (b, n, i, 0))
    keys = pl.BlockSpec(
        (None, None, blocks.key, H), lambda b, n, *at: (b, lax.div(n, G), key_block(b, n, *at), 0)
    )
    makers = (query_spec, key_spec, query_spec, key_spec)
    extra = [make(x.shape[0] == 1) for x, make in zip(places, makers, strict=True) if x is not None]
    lse = pl.BlockSpec((None, None, 1, blocks.query), lambda b, n, i, j, *_: (b, n, 0, i))
    return [rows, keys, keys, *extra], [rows, lse]


def _by_chunk(x: jax.Array | None, chunk: int) -> jax.Array | None:
    """A chunk is picked by an index in front: lanes cannot be sliced at an offset found at run time."""
    return None if x is None else x.reshape(x.shape[0], -1, 1, chunk)


def _whole_tiles(parts_BP2: jax.Array, I: int, blocks: Blocks) -> jax.Array:
    """The parts of whole query tiles, flat: T padded to parts may be shorter than padded to tiles."""
    count = I * (blocks.query // blocks.part)
    missing = count - parts_BP2.shape[1]
    return jnp.pad(parts_BP2, ((0, 0), (0, missing), (0, 0))).reshape(-1)


def _kernel(
    ranges: Any,
    part_ranges: Any,
    slopes: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    spec: Spec,
    I: int,
) -> None:
    *places, out_ref, lse_ref, peak_ref, acc_ref = refs
    blocks = spec.blocks
    per_block = blocks.key // blocks.chunk
    b, n, i, j = (pl.program_id(axis) for axis in range(4))
    tile = b * I + i
    first, first_full, last_full, last = (ranges[tile * 4 + at] for at in range(4))
    start = (lax.div(first, per_block) + j) * per_block  # the block's first chunk
    softmax = _Softmax(
        spec,
        slopes[n] if spec.alibi else None,
        i * blocks.query + spec.first_position,
        start,
        (q_ref, k_ref, v_ref),
        places,
        (peak_ref, acc_ref),
    )
    pl.when(j == 0)(softmax.begin)
    lo, hi = jnp.maximum(first, start), jnp.minimum(last, start + per_block)
    whole = (first_full <= start) & (start + per_block <= last_full) if spec.masked else lo < hi

    @pl.when(whole)
    def _() -> None:
        for chunk in range(per_block):
            softmax.visit(chunk, slice(0, blocks.query), masked=False)

    @pl.when(jnp.logical_not(whole) & (lo < hi))
    def _() -> None:
        if not spec.masked:
            return
        masked = lambda chunk, _: softmax.visit_parts(chunk, part_ranges, tile)  # noqa: E731
        if per_block == 1:
            masked(0, None)
            return
        plain = lambda chunk, _: softmax.visit(chunk, slice(0, blocks.query), masked=False)  # noqa: E731
        left, right = jnp.clip(first_full, lo, hi), jnp.clip(last_full, lo, hi)
        lax.fori_loop(lo - start, left - start, masked, None)
        lax.fori_loop(left - start, right - start, plain, None)
        lax.fori_loop(right - start, hi - start, masked, None)

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        softmax.finish(out_ref, lse_ref)


class _Softmax(NamedTuple):
    """The running softmax of one query tile over the chunks of a block, one query a column."""

    spec: Spec
    slope: Any
    query_row: Any  # position of the first query, where positions are row indices
    start: Any  # the block's first chunk
    inputs: tuple[Any, ...]
    places: list[Any]
    state: tuple[
        Any, Any
    ]  # greatest score so far [1, q]; output and sum of weights [H + SUM_ROWS, q]

    def begin(self) -> None:
        """Nothing seen yet."""
        peak_ref, acc_ref = self.state
        peak_ref[...] = jnp.full_like(peak_ref, HIDDEN)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def visit_parts(self, chunk: Any, part_ranges: Any, tile: Any) -> None:
        """One chunk under a mask: only the parts of the query tile that see some of it."""
        blocks, number = self.spec.blocks, self.start + chunk
        parts = blocks.query // blocks.part
        for part in range(parts):
            at = (tile * parts + part) * 2
            sees = (number >= part_ranges[at]) & (number < part_ranges[at + 1])
            columns = slice(part * blocks.part, (part + 1) * blocks.part)
            pl.when(sees)(functools.partial(self.visit, chunk, columns, masked=True))

    def visit(self, chunk: Any, columns: slice, *, masked: bool) -> None:
        """One chunk of the block, a slice of keys at a time, for the queries `columns`."""
        spec, blocks = self.spec, self.spec.blocks
        (q_ref, k_ref, v_ref), (peak_ref, acc_ref) = self.inputs, self.state
        q, exact = q_ref[columns, :], products(q_ref.dtype)
        for begin in range(0, blocks.chunk, blocks.slice):
            rows = pl.ds(pl.multiple_of(chunk * blocks.chunk, blocks.chunk) + begin, blocks.slice)
            tile, origin = self.place(chunk, begin, columns, masked)
            raw_kq = lax.dot_general(k_ref[rows, :], q, CONTRACT_LAST, **exact)
            offset = bias(spec, self.slope, raw_kq.shape, tile, origin)
            score_kq, _ = logits(spec, raw_kq, offset, tile, masked)
            old_peak = peak_ref[:, columns]
            peak = jnp.maximum(old_peak, score_kq.max(axis=0, keepdims=True))
            weight_kq = jnp.exp2(score_kq - peak)
            decay = jnp.exp2(old_peak - peak)
            peak_ref[:, columns] = peak
            values_as = v_ref[rows, :].T
            if not masked:
                ones_Rs = jnp.ones((SUM_ROWS, values_as.shape[1]), values_as.dtype)
                values_as = jnp.concatenate([values_as, ones_Rs])
            more_aq = lax.dot_general(values_as, weight_kq.astype(v_ref.dtype), PLAIN, **exact)
            H, known = v_ref.shape[1], more_aq.shape[0]
            acc_ref[:known, columns] = acc_ref[:known, columns] * decay + more_aq
            if masked:
                total = weight_kq.sum(axis=0, keepdims=True)
                acc_ref[H : H + 1, columns] = acc_ref[H : H + 1, columns] * decay + total

    def place(self, chunk: Any, begin: int, columns: slice, masked: bool) -> tuple[Tile, Any]:
        """Where a slice of keys and some queries stand, and what ALiBi is counted from."""
        spec, blocks = self.spec, self.spec.blocks
        q_positions, k_positions = self.places[:2] if spec.positions else (None, None)
        q_segments, k_segments = self.places[-2:] if spec.segments else (None, None)
        lanes = slice(begin, begin + blocks.slice)
        key = lambda ref: None if ref is None else column(ref[chunk][:, lanes])  # noqa: E731
        query = lambda ref: None if ref is None else ref[:, columns]  # noqa: E731
        tile = Tile(
            key_row=(self.start + chunk) * blocks.chunk + begin,
            query_row=self.query_row + columns.start,
            key_positions=key(k_positions),
            query_positions=query(q_positions),
            key_segments=key(k_segments) if masked else None,
            query_segments=query(q_segments),
        )
        return tile, self.query_row if q_positions is None else q_positions[:1, :1]

    def finish(self, out_ref: Any, lse_ref: Any) -> None:
        """Divides, and turns the output to rows."""
        spec, (peak_ref, acc_ref) = self.spec, self.state
        peak, H = peak_ref[...], self.inputs[0].shape[1]
        total = acc_ref[H : H + 1, :]
        seen = peak > HIDDEN / 2  # else every weight so far was exp2(HIDDEN - HIDDEN)
        total = jnp.where(seen, total, 1)
        out_ref[...] = jnp.where(seen, acc_ref[:H, :] / total, 0).T.astype(out_ref.dtype)
        everyone = slice(0, spec.blocks.query)
        tile, origin = self.place(0, 0, everyone, masked=False)
        lse = peak + jnp.log2(total) + left_out(spec, self.slope, everyone.stop, tile, origin)
        lse_ref[...] = jnp.where(seen, lse / LOG2E, -jnp.inf)
