"""The forward kernel for Hopper: a block of 128 queries of one head, in three warpgroups.

1. Warpgroup 2 streams the block's tiles of K and V into shared memory by TMA, some stages ahead.
2. Warpgroups 0 and 1 take 64 queries each and keep a running softmax. A barrier makes them take
   turns: while one multiplies, the other computes exponentials (FlashAttention-3, arXiv
   2407.08608).
3. out leaves through the queries' shared memory; the log-sum-exp beside it.

Scores are in units of log2, and ALiBi counts from the block's first query: the rest of
`slope * (key position - query position)` is the same for a whole row, so it drops out of the softmax
and comes back in the log-sum-exp. That costs one multiply-add per score, exact near the diagonal.
"""

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from llm_jax.kernels.attention.hopper import (
    CONSUMER_REGISTERS,
    LN_2,
    LOG2_E,
    PRODUCER_REGISTERS,
    ROWS,
    ROWS_PER_WARPGROUP,
    TILE,
    Block,
    ColumnBias,
    Operands,
    Range,
    Setting,
    Side,
    copy_places,
    hide,
    own_row,
    spread,
    visible,
)

CONSUMERS = 2
QUERIES = CONSUMERS * ROWS_PER_WARPGROUP  # of a block


def forward(operands: Operands, setting: Setting) -> tuple[jax.Array, jax.Array]:
    """Returns out_BTNH, in q's dtype, and the log-sum-exp of the scores, [B, N, T] float32."""
    B, T, N, H = operands.q_BTNH.shape
    dtype, machine = operands.q_BTNH.dtype, setting.machine
    keys, stages = setting.tiling.rows, setting.tiling.stages
    scratch = {
        "q_smem": machine.matrices(CONSUMERS, ROWS_PER_WARPGROUP, H, dtype=dtype),
        "k_smem": machine.matrices(stages, keys, H, dtype=dtype),
        "v_smem": machine.matrices(stages, keys, H, dtype=dtype),
        "lse_smem": plgpu.SMEM((CONSUMERS, ROWS_PER_WARPGROUP), jnp.float32),
        "q_places": plgpu.SMEM((2, CONSUMERS, ROWS_PER_WARPGROUP), jnp.int32),
        "k_places": plgpu.SMEM((2, stages, keys), jnp.int32),
        "q_ready": plgpu.Barrier(num_arrivals=1 + operands.extras, num_barriers=CONSUMERS),
        "k_ready": plgpu.Barrier(num_arrivals=1 + operands.extras, num_barriers=stages),
        "v_ready": plgpu.Barrier(num_barriers=stages),
        "k_read": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        "v_read": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        "turn": plgpu.Barrier(num_arrivals=CONSUMERS),
    }
    return machine.launch(
        partial(_block, setting),
        operands,
        (
            jax.ShapeDtypeStruct((B, T, N, H), dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ),
        scratch,
        # queries of a head are neighbours in time: they share its K and V in the L2 cache
        {"block": operands.ranges.shape[1], "head": N, "batch": B},
        CONSUMERS + 1,
        "attention_forward",
    )


def _block(setting: Setting, operands: Operands, out: Any, lse: Any, **smem: Any) -> None:
    number, batch, head = (lax.axis_index(axis) for axis in ("block", "batch", "head"))
    if setting.rule.causal:  # the longest first, so that short ones fill up the end
        number = operands.ranges.shape[1] - 1 - number
    tiles = Range.read(operands.ranges, batch, number)
    block = Block(setting, operands, (out, lse), smem, batch, head, number, tiles)
    warpgroup = lax.axis_index("warpgroup")
    pl.when(warpgroup < CONSUMERS)(lambda: _consume(block, warpgroup))
    pl.when(warpgroup == CONSUMERS)(lambda: _produce(block))


def _produce(block: Block) -> None:
    """Keeps `stages` tiles of K and V under way."""
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
    stages, keys = block.setting.tiling.stages, block.setting.tiling.rows
    operands, smem, tiles = block.operands, block.smem, block.range
    kv_head = lax.div(block.head, jnp.int32(operands.group))

    def fetch_k(j: jax.Array, slot: Any) -> None:
        rows, ready = pl.ds(j * keys, keys), smem["k_ready"].at[slot]
        k_rows = operands.k_BSKH.at[block.batch, rows, kv_head]
        plgpu.copy_gmem_to_smem(k_rows, smem["k_smem"].at[slot], ready)
        copy_places(operands.k_places, block.batch, rows, smem["k_places"], slot, ready)

    def fetch_v(j: jax.Array, slot: Any) -> None:
        v_rows = operands.v_BSKH.at[block.batch, pl.ds(j * keys, keys), kv_head]
        plgpu.copy_gmem_to_smem(v_rows, smem["v_smem"].at[slot], smem["v_ready"].at[slot])

    for slot in range(stages):

        @pl.when(tiles.first + slot < tiles.last)
        def _(slot: int = slot) -> None:
            fetch_k(tiles.first + slot, slot)
            fetch_v(tiles.first + slot, slot)

    def refill(j: jax.Array, _: None) -> None:
        slot = lax.rem(j - tiles.first, jnp.int32(stages))
        plgpu.barrier_wait(smem["k_read"].at[slot])
        fetch_k(j + stages, slot)
        plgpu.barrier_wait(smem["v_read"].at[slot])
        fetch_v(j + stages, slot)

    lax.fori_loop(tiles.first, jnp.maximum(tiles.last - stages, tiles.first), refill, None)
    if block.setting.machine.interpret:  # which insists that every arrival is waited for
        for slot in range(stages):

            @pl.when(tiles.first + slot < tiles.last)
            def _(slot: int = slot) -> None:
                plgpu.barrier_wait(smem["k_read"].at[slot])
                plgpu.barrier_wait(smem["v_read"].at[slot])


def _queries(block: Block, warpgroup: jax.Array) -> Side:
    """Copies this warpgroup's queries to shared memory; returns where they stand."""
    operands, smem = block.operands, block.smem
    first_row = block.number * QUERIES + warpgroup * ROWS_PER_WARPGROUP
    rows, ready = pl.ds(first_row, ROWS_PER_WARPGROUP), smem["q_ready"].at[warpgroup]
    q_rows = operands.q_BTNH.at[block.batch, rows, block.head]
    plgpu.copy_gmem_to_smem(q_rows, smem["q_smem"].at[warpgroup], ready)
    copy_places(operands.q_places, block.batch, rows, smem["q_places"], warpgroup, ready)
    plgpu.barrier_wait(ready)
    there = tuple(place is not None for place in operands.q_places)
    start = first_row + block.setting.first_position
    return block.side(0, start, smem["q_places"], warpgroup, there)


def _origin(block: Block) -> jax.Array:
    """The position from which ALiBi counts: that of the block's first query."""
    positions = block.operands.places.q_positions_BT
    first_row = block.number * QUERIES
    if positions is None:
        return first_row + block.setting.first_position
    return own_row(positions, block.batch)[first_row]


def _consume(block: Block, warpgroup: jax.Array) -> None:
    """Attention of 64 queries."""
    plgpu.set_max_registers(CONSUMER_REGISTERS[CONSUMERS], action="increase")
    smem, tiles = block.smem, block.range
    H, turn = block.results[0].shape[3], smem["turn"]

    def take_turn() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    q = _queries(block, warpgroup)
    state = (
        plgpu.layout_cast(jnp.zeros((ROWS_PER_WARPGROUP, H), jnp.float32), TILE),
        plgpu.layout_cast(jnp.full((ROWS_PER_WARPGROUP,), -jnp.inf, jnp.float32), ROWS),
        plgpu.layout_cast(jnp.zeros((ROWS_PER_WARPGROUP,), jnp.float32), ROWS),
    )
    pl.when(tiles.last > tiles.first)(lambda: plgpu.barrier_wait(smem["k_ready"].at[0]))
    pl.when(warpgroup == 1)(take_turn)
    step = _make_step(block, warpgroup, q, take_turn)
    out, peak, total = tiles.loop(step, state, masks=block.operands.masks(block.setting.rule))
    pl.when(warpgroup == 0)(take_turn)
    _write(block, warpgroup, q, out, peak, total)


def _make_step(block: Block, warpgroup: jax.Array, q: Side, take_turn: Any) -> Any:
    """step(j, (out, peak, total), masked): one tile of keys more."""
    setting, smem, tiles = block.setting, block.smem, block.range
    rule, machine, slopes = setting.rule, setting.machine, block.operands.slopes_N
    shape = (ROWS_PER_WARPGROUP, setting.tiling.rows)
    alibi = None
    if slopes is not None:
        alibi = ColumnBias.make(slopes[block.head], _origin(block), setting.tiling.rows)
    positions, segments = (place is not None for place in block.operands.k_places)

    def step(j: jax.Array, state: tuple, *, masked: bool) -> tuple:
        out, peak, total = state
        slot = lax.rem(j - tiles.first, jnp.int32(setting.tiling.stages))
        q_smem = smem["q_smem"].at[warpgroup]
        score = machine.product(q_smem, smem["k_smem"].at[slot], meanwhile=take_turn)
        wanted = positions and (masked or alibi is not None), segments and masked
        k = block.side(1, j * setting.tiling.rows, smem["k_places"], slot, wanted)
        machine.release(smem["k_read"].at[slot], loaded=any(wanted))

        factor, shift = rule.scale * LOG2_E, 0.0  # a score is factor * score + shift, in log2
        if rule.soft_cap:
            score, factor = jnp.tanh(score * (rule.scale / rule.soft_cap)), rule.soft_cap * LOG2_E
        if alibi is not None:
            bias, shift = alibi.split(k)
            score, factor = score * factor + spread(bias, 1, shape), 1.0
        if masked:
            score = hide(score, visible(rule, q, k))
        new_peak = jnp.maximum(peak, score.max(axis=1) * factor + shift)
        # -inf - -inf would be NaN
        anchor = jnp.where(new_peak == -jnp.inf, 0.0, new_peak) if masked else new_peak
        decay = jnp.exp2(peak - anchor)
        weight = jnp.exp2(score * factor - spread(anchor - shift, 0, shape))
        out = out * spread(decay, 0, out.shape)
        total = total * decay + weight.sum(axis=1)
        share = weight.astype(block.results[0].dtype)
        out, total, new_peak, share = lax.optimization_barrier((out, total, new_peak, share))

        plgpu.barrier_arrive(smem["turn"])
        plgpu.barrier_wait(smem["v_ready"].at[slot])
        plgpu.barrier_wait(smem["turn"])
        next_slot = lax.rem(j + 1 - tiles.first, jnp.int32(setting.tiling.stages))

        def await_k() -> None:
            wait = partial(plgpu.barrier_wait, smem["k_ready"].at[next_slot])
            pl.when(j + 1 < tiles.last)(wait)

        out = machine.add_product(out, share, smem["v_smem"].at[slot], meanwhile=await_k)
        machine.release(smem["v_read"].at[slot], loaded=False)
        return out, new_peak, total

    return step


def _write(
    block: Block,
    warpgroup: jax.Array,
    q: Side,
    out: jax.Array,
    peak: jax.Array,
    total: jax.Array,
) -> None:
    """Divides by the total; rows that saw nothing become 0, and their log-sum-exp -inf."""
    slopes, smem = block.operands.slopes_N, block.smem
    out_smem, lse_smem = smem["q_smem"].at[warpgroup], smem["lse_smem"].at[warpgroup]
    inverse = jnp.where(total > 0, 1 / total, 0.0)
    lse = peak * LN_2 + jnp.log(total)
    if slopes is not None:
        behind = q.offsets(_origin(block)).astype(jnp.float32)
        lse = lse - behind * (slopes[block.head] * LN_2)
    out_smem[...] = (out * spread(inverse, 0, out.shape)).astype(block.results[0].dtype)
    lse_smem[...] = lse
    plgpu.commit_smem()
    first_row = block.number * QUERIES + warpgroup * ROWS_PER_WARPGROUP
    rows = pl.ds(first_row, ROWS_PER_WARPGROUP)
    plgpu.copy_smem_to_gmem(out_smem, block.results[0].at[block.batch, rows, block.head])
    plgpu.copy_smem_to_gmem(lse_smem, block.results[1].at[block.batch, block.head, rows])
    plgpu.wait_smem_to_gmem(0)
