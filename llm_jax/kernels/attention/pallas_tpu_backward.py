"""The backward kernel on TPU: dq, dk and dv in one pass of five products a tile.

Grid (B, K, key tile, head of the group, step): dk and dv of a key tile stay in VMEM over all steps of
all its query heads, so grouped heads are summed without being written. dq of a query tile is needed
again at every key tile: it lies in HBM in float32, [B, N, query tile, H, q], and each step adds to
its tile by two copies of its own, read while the step computes, and written while the next one does.
Memory is linear in T, and no product is computed twice.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm_jax.kernels.attention.plan import Places, Tiles
from llm_jax.kernels.attention.tpu_spec import (
    CONTRACT_FIRST,
    CONTRACT_LAST,
    LOG2E,
    PLAIN,
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


def attend(
    spec: Spec,
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    slopes_N: jax.Array,
    places: Places,
    ranges_BJ4: jax.Array,
    parts_BP2: jax.Array,
    grad_out_BNTH: jax.Array,
    lse_BN1T: jax.Array,
    delta_BN1T: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns dq_BNTH, dk_BKSH and dv_BKSH of padded rows. P counts slices of key tiles.

    Args:
      delta_BN1T: sum of grad_out * out over H, less the gradient of the log-sum-exp.
    """
    B, N, T, H = q_BNTH.shape
    _, K, S, _ = k_BKSH.shape
    tiles = spec.blocks.backward_tiles
    I, J = T // tiles.query, S // tiles.key
    steps = ranges_BJ4[..., 3] - ranges_BJ4[..., 0]
    slices = J * (tiles.key // spec.blocks.backward_slice)
    parts_BP2 = jnp.pad(parts_BP2, ((0, 0), (0, slices - parts_BP2.shape[1]), (0, 0)))
    scalars = (ranges_BJ4.reshape(-1), parts_BP2.reshape(-1), slopes_N)
    zero_BNIHq = jnp.zeros((B, N, I, H, tiles.query), jnp.float32)
    inputs = (q_BNTH, k_BKSH, v_BKSH, grad_out_BNTH, lse_BN1T, delta_BN1T)
    inputs = (*inputs, *(x for x in places if x is not None), zero_BNIHq)
    in_specs, out_specs = _block_specs(spec, H, J, places)
    pairs = T * S // (2 if spec.rule.causal else 1)
    dq_BNIHq, dk_BKSH, dv_BKSH = pl.pallas_call(
        functools.partial(_kernel, spec=spec, I=I, J=J),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, K, J, spec.group, jnp.maximum(steps.max(), 1)),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=_scratch(tiles, H),
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (zero_BNIHq, k_BKSH, v_BKSH)],
        input_output_aliases={len(scalars) + len(inputs) - 1: 0},
        cost_estimate=pl.CostEstimate(
            flops=10 * B * N * pairs * H,
            transcendentals=B * N * pairs,
            bytes_accessed=2 * J * (q_BNTH.nbytes + zero_BNIHq.nbytes) + 4 * k_BKSH.nbytes,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_limit(current_device().kind),
        ),
        interpret=spec.interpret,
        name="llm_jax_attention_backward",
    )(*scalars, *inputs)
    dq_BNIqH = (dq_BNIHq * spec.rule.scale).astype(q_BNTH.dtype).swapaxes(3, 4)
    return dq_BNIqH.reshape(q_BNTH.shape), dk_BKSH, dv_BKSH


def _scratch(tiles: Tiles, H: int) -> list[Any]:
    """dk, dv and dq of a tile, two buffers of dq, and what `_Accumulator` keeps count with."""
    return [
        pltpu.VMEM((tiles.key, H), jnp.float32),
        pltpu.VMEM((tiles.key, H), jnp.float32),
        pltpu.VMEM((H, tiles.query), jnp.float32),
        pltpu.VMEM((2, H, tiles.query), jnp.float32),
        pltpu.SMEM((4,), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2,)),
    ]


def _block_specs(
    spec: Spec, H: int, J: int, places: Places
) -> tuple[list[pl.BlockSpec], list[pl.BlockSpec]]:
    """Of q, k, v, grad_out, lse, delta, the places there are and dq, and of the three results."""
    tiles, G = spec.blocks.backward_tiles, spec.group

    def query_tile(b: Any, j: Any, s: Any, ranges: Any) -> Any:
        at = (b * J + j) * 4
        return jnp.minimum(ranges[at] + s, jnp.maximum(ranges[at + 3] - 1, 0))

    def query_spec(shared: bool) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, 1, tiles.query),
            lambda b, m, j, g, s, ranges, *_: (0 if shared else b, 0, query_tile(b, j, s, ranges)),
        )

    def key_spec(shared: bool) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, 1, tiles.key), lambda b, m, j, *_: (0 if shared else b, j, 0, 0)
        )

    rows = pl.BlockSpec(
        (None, None, tiles.query, H),
        lambda b, m, j, g, s, ranges, *_: (b, m * G + g, query_tile(b, j, s, ranges), 0),
    )
    row = pl.BlockSpec(
        (None, None, 1, tiles.query),
        lambda b, m, j, g, s, ranges, *_: (b, m * G + g, 0, query_tile(b, j, s, ranges)),
    )
    keys = pl.BlockSpec((None, None, tiles.key, H), lambda b, m, j, *_: (b, m, j, 0))
    makers = (query_spec, key_spec, query_spec, key_spec)
    extra = [make(x.shape[0] == 1) for x, make in zip(places, makers, strict=True) if x is not None]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return [rows, keys, keys, rows, row, row, *extra, anywhere], [anywhere, keys, keys]


class _Accumulator:
    """dq's tiles in HBM, added to by copies that overlap with the computation.

    Two buffers take turns, so that a tile's write may last until the step after the next. The one
    hazard is the same tile in two steps running, which then waits for the write.
    """

    def __init__(self, hbm: Any, buffers: Any, state: Any, reads: Any, writes: Any) -> None:
        self.hbm, self.buffers, self.state, self.reads, self.writes = (
            hbm,
            buffers,
            state,
            reads,
            writes,
        )

    def reset(self) -> None:
        """Before a sweep: nothing is under way."""
        for at, value in enumerate((0, 0, 0, -1)):  # buffer to use; writes under way; latest tile
            self.state[at] = value

    def settle(self, slot: Any) -> None:
        """Waits for the write from a buffer, if one is under way."""

        @pl.when(self.state[1 + slot] == 1)
        def _() -> None:
            buffer = self.buffers.at[slot]
            pltpu.make_async_copy(buffer, buffer, self.writes.at[slot]).wait()
            self.state[1 + slot] = 0

    def begin(self, tile: tuple[Any, ...], number: Any) -> tuple[Any, Any]:
        """Starts to read a tile into the buffer whose turn it is."""
        slot = self.state[0]
        self.settle(slot)
        pl.when(self.state[3] == number)(lambda: self.settle(1 - slot))
        read = pltpu.make_async_copy(self.hbm.at[tile], self.buffers.at[slot], self.reads.at[slot])
        read.start()
        self.state[3] = number
        return slot, read

    def finish(self, tile: tuple[Any, ...], slot: Any, read: Any, more: jax.Array) -> None:
        """Adds `more` to the tile that was read, and starts to write it back."""
        read.wait()
        self.buffers[slot] += more
        pltpu.make_async_copy(
            self.buffers.at[slot], self.hbm.at[tile], self.writes.at[slot]
        ).start()
        self.state[1 + slot] = 1
        self.state[0] = 1 - slot


def _kernel(
    ranges: Any,
    part_ranges: Any,
    slopes: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    grad_out_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    *refs: Any,
    spec: Spec,
    I: int,
    J: int,
) -> None:
    *places, _, dq_hbm, dk_ref, dv_ref, dk_acc, dv_acc, dq_acc, buffers, state, reads, writes = refs
    b, m, j, g, s = (pl.program_id(axis) for axis in range(5))
    last_step = (g == spec.group - 1) & (s == pl.num_programs(4) - 1)
    first, first_full, last_full, last = (ranges[(b * J + j) * 4 + at] for at in range(4))
    n, i = m * spec.group + g, first + s
    total = _Accumulator(dq_hbm, buffers, state, reads, writes)
    pl.when((j == 0) & (g == 0) & (s == 0))(total.reset)

    @pl.when((g == 0) & (s == 0))
    def _() -> None:
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    slope = slopes[n] if spec.alibi else None
    tile = _Tile(
        spec,
        slope,
        (i * spec.blocks.backward_query + spec.first_position, j * spec.blocks.backward_key),
        (q_ref, k_ref, v_ref, grad_out_ref, lse_ref, delta_ref),
        places,
        (dk_acc, dv_acc, dq_acc),
    )

    @pl.when(i < last)
    def _() -> None:
        slot, read = total.begin((b, n, i), n * I + i)
        dq_acc[...] = jnp.zeros_like(dq_acc)
        full = (i >= first_full) & (i < last_full)
        pl.when(full if spec.masked else True)(tile.whole)
        if spec.masked:
            work = functools.partial(tile.in_parts, part_ranges, b * J + j, i)
            pl.when(jnp.logical_not(full))(work)
        total.finish((b, n, i), slot, read, dq_acc[...])

    @pl.when(last_step)
    def _() -> None:
        dk_ref[...] = (dk_acc[...] * spec.rule.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

    @pl.when(last_step & (j == J - 1))
    def _() -> None:
        total.settle(0)
        total.settle(1)


class _Tile(NamedTuple):
    """One pair of tiles: adds its share to dk, dv and dq, a slice of keys at a time."""

    spec: Spec
    slope: Any
    corner: tuple[Any, Any]  # position of the first query and key, where positions are row indices
    inputs: tuple[Any, ...]
    places: list[Any]
    outputs: tuple[Any, ...]

    def whole(self) -> None:
        """Every key and query, without a mask."""
        blocks = self.spec.blocks
        for start in range(0, blocks.backward_key, blocks.backward_slice):
            self.add(start, slice(0, blocks.backward_query), masked=False)

    def in_parts(self, part_ranges: Any, key_tile: Any, query_tile: Any) -> None:
        """Under a mask: of each slice of keys the parts of the query tile that see it."""
        blocks = self.spec.blocks
        slices = blocks.backward_key // blocks.backward_slice
        parts = blocks.backward_query // blocks.backward_part
        for number in range(slices):
            at = (key_tile * slices + number) * 2
            for part in range(parts):
                index = query_tile * parts + part
                sees = (index >= part_ranges[at]) & (index < part_ranges[at + 1])
                columns = slice(part * blocks.backward_part, (part + 1) * blocks.backward_part)
                start = number * blocks.backward_slice
                pl.when(sees)(functools.partial(self.add, start, columns, masked=True))

    def add(self, start: int, columns: slice, *, masked: bool) -> None:
        """The keys from row `start` of the tile on, a slice of them, and the queries `columns`."""
        spec, slope = self.spec, self.slope
        q_ref, k_ref, v_ref, grad_out_ref, lse_ref, delta_ref = self.inputs
        dk_acc, dv_acc, dq_acc = self.outputs
        q_positions, k_positions = self.places[:2] if spec.positions else (None, None)
        q_segments, k_segments = self.places[-2:] if spec.segments else (None, None)
        count = spec.blocks.backward_slice
        rows = slice(start, start + count)
        key = lambda ref: None if ref is None else column(ref[:, rows])  # noqa: E731
        query = lambda ref: None if ref is None else ref[:, columns]  # noqa: E731
        tile = Tile(
            self.corner[1] + start,
            self.corner[0] + columns.start,
            key(k_positions),
            query(q_positions),
            key(k_segments) if masked else None,
            query(q_segments),
        )
        origin = self.corner[1] if k_positions is None else k_positions[:1, :1]
        q, grad_out, k, v = (
            q_ref[columns, :],
            grad_out_ref[columns, :],
            k_ref[rows, :],
            v_ref[rows, :],
        )
        dtype, exact = q.dtype, products(q.dtype)
        lse = lse_ref[:, columns] * LOG2E - left_out(spec, slope, q.shape[0], tile, origin)
        raw_kq = lax.dot_general(k, q, CONTRACT_LAST, **exact)
        offset = bias(spec, slope, raw_kq.shape, tile, origin)
        score_kq, bent_kq = logits(spec, raw_kq, offset, tile, masked)
        share_kq = jnp.exp2(score_kq - lse)
        dshare_kq = lax.dot_general(v, grad_out, CONTRACT_LAST, **exact)
        draw_kq = share_kq * (dshare_kq - delta_ref[:, columns])
        if bent_kq is not None:
            draw_kq = draw_kq * (1 - bent_kq * bent_kq)
        draw_kq = draw_kq.astype(dtype)
        dv_acc[rows, :] += lax.dot_general(share_kq.astype(dtype), grad_out, PLAIN, **exact)
        dk_acc[rows, :] += lax.dot_general(draw_kq, q, PLAIN, **exact)
        dq_acc[:, columns] += lax.dot_general(k, draw_kq, CONTRACT_FIRST, **exact)
