"""The forward kernel on TPU.

Grid (B, N, query tile, step). A step has one memory block of keys and values in VMEM and visits those
of its chunks that the plan names: the whole block unrolled where it needs no mask, which is where the
time goes, and else chunk by chunk, of each the parts of the query tile that see it. The number of steps is the largest that any tile of this batch
needs, not the number of blocks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm_jax.kernels.attention.plan import Places
from llm_jax.kernels.attention.tpu_spec import (
    HIDDEN,
    LOG2E,
    Blocks,
    Spec,
    Tile,
    bias,
    column,
    left_out,
    logits,
    part_of_queries,
    products,
    vmem_limit,
)
from llm_jax.kernels.device import current_device

CONTRACT_LAST = (((1,), (1,)), ((), ()))  # [a, H], [b, H] -> [a, b]
CONTRACT_FIRST = (((0,), (0,)), ((), ()))  # [s, a], [s, b] -> [a, b]


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
    S = k_BKSH.shape[2]
    blocks, G = spec.blocks, spec.group
    per_block, I = blocks.key // blocks.chunk, T // blocks.query
    first_BI, last_BI = ranges_BI4[..., 0], ranges_BI4[..., 3]
    steps = (last_BI + per_block - 1) // per_block - first_BI // per_block
    # of one axis: SMEM pads two to 128 lanes
    scalars = (ranges_BI4.reshape(-1), _whole_tiles(parts_BP2, I, blocks), slopes_N)

    def key_block(b: Any, n: Any, i: Any, j: Any, ranges: Any, *_: Any) -> Any:
        at = (b * I + i) * 4
        block = lax.div(ranges[at], per_block) + j
        # beyond the last block, the same again: nothing is fetched
        return jnp.minimum(block, lax.div(jnp.maximum(ranges[at + 3] - 1, 0), per_block))

    def query_spec(x: jax.Array) -> pl.BlockSpec:
        shared = x.shape[0] == 1
        return pl.BlockSpec(
            (None, 1, blocks.query), lambda b, n, i, j, *_: (0 if shared else b, 0, i)
        )

    def key_spec(x: jax.Array) -> pl.BlockSpec:
        shared = x.shape[0] == 1
        return pl.BlockSpec(
            (None, per_block, 1, blocks.chunk),
            lambda b, *at: (0 if shared else b, key_block(b, *at), 0, 0),
        )

    rows = pl.BlockSpec((None, None, blocks.query, H), lambda b, n, i, j, *_: (b, n, i, 0))
    keys = pl.BlockSpec(
        (None, None, blocks.key, H), lambda b, n, *at: (b, lax.div(n, G), key_block(b, n, *at), 0)
    )
    # positions and segments, queries' and keys', those that there are
    makers = (query_spec, key_spec, query_spec, key_spec)
    places = places._replace(
        kv_positions_BS=_by_chunk(places.kv_positions_BS, blocks.chunk),
        kv_segments_BS=_by_chunk(places.kv_segments_BS, blocks.chunk),
    )
    extra = [(x, make(x)) for x, make in zip(places, makers, strict=True) if x is not None]
    scratch = (blocks.query,)
    pairs = T * S // (2 if spec.rule.causal else 1)
    return pl.pallas_call(
        functools.partial(_kernel, spec=spec, I=I),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, N, I, jnp.maximum(steps.max(), 1)),
            in_specs=[rows, keys, keys, *(spec for _, spec in extra)],
            out_specs=[
                rows,
                pl.BlockSpec((None, None, 1, blocks.query), lambda b, n, i, j, *_: (b, n, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((1, *scratch), jnp.float32),
                pltpu.VMEM((1, *scratch), jnp.float32),
                pltpu.VMEM((H, *scratch), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q_BNTH.shape, q_BNTH.dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
        ],
        cost_estimate=pl.CostEstimate(
            flops=4 * B * N * pairs * H,
            transcendentals=B * N * pairs,
            bytes_accessed=2 * q_BNTH.nbytes + I * G * (k_BKSH.nbytes + v_BKSH.nbytes),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_limit(current_device().kind),
        ),
        interpret=spec.interpret,
        name="llm_jax_attention_forward",
    )(*scalars, q_BNTH, k_BKSH, v_BKSH, *(x for x, _ in extra))


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
    *refs, out_ref, lse_ref, peak_ref, total_ref, acc_ref = refs
    absent = (None, None)
    q_positions, k_positions = refs[:2] if spec.positions else absent
    q_segments, k_segments = refs[-2:] if spec.segments else absent
    blocks = spec.blocks
    per_block = blocks.key // blocks.chunk
    b, n, i, j = (pl.program_id(axis) for axis in range(4))
    first, first_full, last_full, last = (ranges[(b * I + i) * 4 + at] for at in range(4))
    start = (lax.div(first, per_block) + j) * per_block  # the block's first chunk
    query_row = i * blocks.query + spec.first_position
    query = Tile(
        query_row,
        query_row,
        None,
        None if q_positions is None else q_positions[...],
        None,
        None if q_segments is None else q_segments[...],
    )
    origin = query_row if query.query_positions is None else query.query_positions[:1, :1]
    slope = slopes[n] if spec.alibi else None

    @pl.when(j == 0)
    def _() -> None:
        peak_ref[...] = jnp.full_like(peak_ref, HIDDEN)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def visit(chunk: Any, columns: slice, masked: bool) -> None:
        """One chunk of the block, in slices: running softmax of some queries (columns)."""
        queries = part_of_queries(query, columns)
        for part in range(blocks.chunk // blocks.slice):
            rows = pl.ds(
                pl.multiple_of(chunk * blocks.chunk, blocks.chunk) + part * blocks.slice,
                blocks.slice,
            )
            lanes = slice(part * blocks.slice, (part + 1) * blocks.slice)
            place = lambda ref: None if ref is None else column(ref[chunk][:, lanes])  # noqa: B023, E731
            tile = queries._replace(
                key_row=(start + chunk) * blocks.chunk + part * blocks.slice,
                key_positions=place(k_positions),
                key_segments=place(k_segments) if masked else None,
            )
            raw_kq = lax.dot_general(
                k_ref[rows, :], q_ref[columns, :], CONTRACT_LAST, **products(q_ref.dtype)
            )
            offset = bias(spec, slope, raw_kq.shape, tile, origin)
            score_kq, _ = logits(spec, raw_kq, offset, tile, masked)
            old_peak = peak_ref[:, columns]
            peak = jnp.maximum(old_peak, score_kq.max(axis=0, keepdims=True))
            weight_kq = jnp.exp2(score_kq - peak)
            decay = jnp.exp2(old_peak - peak)
            peak_ref[:, columns] = peak
            total_ref[:, columns] = total_ref[:, columns] * decay + weight_kq.sum(
                axis=0, keepdims=True
            )
            more_Hq = lax.dot_general(
                v_ref[rows, :],
                weight_kq.astype(v_ref.dtype),
                CONTRACT_FIRST,
                **products(v_ref.dtype),
            )
            acc_ref[:, columns] = acc_ref[:, columns] * decay + more_Hq

    parts = blocks.query // blocks.part
    everyone = slice(0, blocks.query)

    def visit_masked(chunk: Any) -> None:
        for part in range(parts):
            at = ((b * I + i) * parts + part) * 2
            sees = (start + chunk >= part_ranges[at]) & (start + chunk < part_ranges[at + 1])
            columns = slice(part * blocks.part, (part + 1) * blocks.part)
            pl.when(sees)(functools.partial(visit, chunk, columns, masked=True))

    lo, hi = jnp.maximum(first, start), jnp.minimum(last, start + per_block)
    whole = (first_full <= start) & (start + per_block <= last_full) if spec.masked else lo < hi

    @pl.when(whole)
    def _() -> None:
        for chunk in range(per_block):
            visit(chunk, everyone, masked=False)

    @pl.when(jnp.logical_not(whole) & (lo < hi))
    def _() -> None:
        if not spec.masked:
            return
        if per_block == 1:
            visit_masked(0)
            return
        left, right = jnp.clip(first_full, lo, hi), jnp.clip(last_full, lo, hi)
        masked = lambda chunk, _: visit_masked(chunk)  # noqa: E731
        lax.fori_loop(lo - start, left - start, masked, None)
        plain = lambda chunk, _: visit(chunk, everyone, masked=False)  # noqa: E731
        lax.fori_loop(left - start, right - start, plain, None)
        lax.fori_loop(right - start, hi - start, masked, None)

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        peak, total = peak_ref[...], total_ref[...]
        seen = peak > HIDDEN / 2  # else every weight so far was exp2(HIDDEN - HIDDEN)
        total = jnp.where(seen, total, 1)
        out_ref[...] = jnp.where(seen, acc_ref[...] / total, 0).T.astype(out_ref.dtype)
        lse = peak + jnp.log2(total) + left_out(spec, slope, blocks.query, query, origin)
        lse_ref[...] = jnp.where(seen, lse / LOG2E, -jnp.inf)
