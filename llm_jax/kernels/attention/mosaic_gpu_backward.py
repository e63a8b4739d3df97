"""The backward kernels for Hopper: one for dQ, one for dK and dV.

With P the softmax and dP = dO V', dS = P (dP - delta): dV = P' dO, dQ = dS K, dK = dS' Q. Both
kernels recompute P from the log-sum-exp, as nothing quadratic was saved (FlashAttention-2, arXiv
2307.08691), so that each can keep its sums in registers and needs no atomic additions.

1. The last warpgroup streams tiles of the other side into shared memory by TMA.
2. dQ: every other warpgroup holds 64 queries and loops over tiles of keys.
3. dK, dV: every other warpgroup holds 64 keys and loops over the query heads that share them, and over
   tiles of queries; scores are transposed. For heads of 256, whose two sums would not fit in the
   registers of one, both warpgroups hold the same keys: the first sums dV, the second dK. Where that
   makes too few blocks to fill the GPU, as with one kv head, each takes some of the query heads, and
   XLA adds up.

Scores are in units of log2. ALiBi counts from the first query of a group, `origins`; `level` is what
remains to subtract: the log-sum-exp from there, and infinity for a row that saw nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from llm_jax.kernels.attention.hopper import (
    CONSUMER_REGISTERS,
    LOG2_E,
    PRODUCER_REGISTERS,
    ROWS_PER_WARPGROUP,
    TILE,
    Block,
    ColumnBias,
    Operands,
    Range,
    Setting,
    copy_places,
    hide,
    own_row,
    spread,
    visible,
)
from llm_jax.kernels.attention.plan import Rule

CONSUMERS = 2  # of `grad_keys`, whatever the block
# Three for each of 132 multiprocessors. On an H200, 16k causal tokens and 16 query heads of 128, with
# 512 blocks (4 kv heads) dQ, dK and dV ran at 508 TFLOP/s, with 128 (1 kv head) at 335.
ENOUGH_BLOCKS = 396


class GradOperands(NamedTuple):
    """What both kernels read."""

    inputs: Operands  # with the ranges of this kernel
    grad_out_BTNH: Any
    level_BNT: Any
    delta_BNT: Any
    origins_BI: Any  # position that ALiBi counts from, of each tile of queries


def _weigh(
    rule: Rule, score: jax.Array, bias: jax.Array | None, level: jax.Array, seen: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Shares of the softmax from raw products, and share * d(score) / d(product), up to scale."""
    factor, bend = rule.scale * LOG2_E, None
    if rule.soft_cap:
        score, factor = jnp.tanh(score * (rule.scale / rule.soft_cap)), rule.soft_cap * LOG2_E
        bend = 1 - score * score
    score = score * factor
    if bias is not None:
        score = score + bias
    share = jnp.exp2(hide(score - level, seen))
    return share, share if bend is None else share * bend


def _stream(block: Block, count: jax.Array, fetch: Callable[[Any, Any], None], read: Any) -> None:
    """fetch(tile, slot) for `count` tiles, as many ahead as there are stages."""
    stages = block.setting.tiling.stages
    for slot in range(stages):
        pl.when(slot < count)(partial(fetch, jnp.int32(slot), slot))

    def refill(n: jax.Array, _: None) -> None:
        slot = lax.rem(n, jnp.int32(stages))
        plgpu.barrier_wait(read.at[slot])
        fetch(n + stages, slot)

    lax.fori_loop(jnp.int32(0), jnp.maximum(count - stages, 0), refill, None)
    if block.setting.machine.interpret:  # which insists that every arrival is waited for
        for slot in range(stages):
            pl.when(slot < count)(partial(plgpu.barrier_wait, read.at[slot]))


def grad_queries(operands: GradOperands, setting: Setting) -> jax.Array:
    """Returns dq_BTNH, in q's dtype."""
    inputs, machine = operands.inputs, setting.machine
    B, _, N, H = inputs.q_BTNH.shape
    dtype, consumers = inputs.q_BTNH.dtype, setting.tiling.block // ROWS_PER_WARPGROUP
    own, tiles = (consumers, ROWS_PER_WARPGROUP), (setting.tiling.stages, setting.tiling.rows)
    scratch = {
        "q_smem": machine.matrices(*own, H, dtype=dtype),
        "grad_smem": machine.matrices(*own, H, dtype=dtype),
        "rows_smem": plgpu.SMEM((2, *own), jnp.float32),  # level and delta
        "q_places": plgpu.SMEM((2, *own), jnp.int32),
        "k_smem": machine.matrices(*tiles, H, dtype=dtype),
        "v_smem": machine.matrices(*tiles, H, dtype=dtype),
        "k_places": plgpu.SMEM((2, *tiles), jnp.int32),
        "q_ready": plgpu.Barrier(num_arrivals=4 + inputs.extras, num_barriers=consumers),
        "ready": plgpu.Barrier(num_arrivals=2 + inputs.extras, num_barriers=setting.tiling.stages),
        "read": plgpu.Barrier(num_arrivals=consumers, num_barriers=setting.tiling.stages),
    }
    (grad,) = machine.launch(
        partial(_query_block, setting),
        operands,
        (jax.ShapeDtypeStruct(inputs.q_BTNH.shape, dtype),),
        scratch,
        {"block": inputs.ranges.shape[1], "head": N, "batch": B},
        consumers + 1,
        "attention_backward_q",
    )
    return grad


def _query_block(setting: Setting, operands: GradOperands, grad: Any, **smem: Any) -> None:
    number, batch, head = (lax.axis_index(axis) for axis in ("block", "batch", "head"))
    if setting.rule.causal:  # the longest first, so that short ones fill up the end
        number = operands.inputs.ranges.shape[1] - 1 - number
    tiles = Range.read(operands.inputs.ranges, batch, number)
    block = Block(setting, operands, (grad,), smem, batch, head, number, tiles)
    warpgroup, consumers = lax.axis_index("warpgroup"), setting.tiling.block // ROWS_PER_WARPGROUP
    pl.when(warpgroup < consumers)(lambda: _sum_over_keys(block, warpgroup))
    pl.when(warpgroup == consumers)(lambda: _stream_keys(block))


def _stream_keys(block: Block) -> None:
    """Brings the tiles of keys, for all warpgroups."""
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
    inputs, smem, tiles = block.operands.inputs, block.smem, block.range
    kv_head = lax.div(block.head, jnp.int32(inputs.group))

    def fetch(n: jax.Array, slot: Any) -> None:
        rows = pl.ds((tiles.first + n) * block.setting.tiling.rows, block.setting.tiling.rows)
        ready = smem["ready"].at[slot]
        for source, name in ((inputs.k_BSKH, "k_smem"), (inputs.v_BSKH, "v_smem")):
            copy = smem[name].at[slot]
            plgpu.copy_gmem_to_smem(source.at[block.batch, rows, kv_head], copy, ready)
        copy_places(inputs.k_places, block.batch, rows, smem["k_places"], slot, ready)

    _stream(block, tiles.last - tiles.first, fetch, smem["read"])


def _sum_over_keys(block: Block, warpgroup: jax.Array) -> None:
    """dQ of 64 queries."""
    consumers = block.setting.tiling.block // ROWS_PER_WARPGROUP
    plgpu.set_max_registers(CONSUMER_REGISTERS[consumers], action="increase")
    (grad,), smem, setting = block.results, block.smem, block.setting
    first_row = block.number * setting.tiling.block + warpgroup * ROWS_PER_WARPGROUP
    rows = pl.ds(first_row, ROWS_PER_WARPGROUP)
    _copy_queries(block, rows, warpgroup)
    step = _make_key_step(block, warpgroup, first_row)
    zeros = jnp.zeros((ROWS_PER_WARPGROUP, grad.shape[3]), jnp.float32)
    masks = block.operands.inputs.masks(setting.rule)
    total = block.range.loop(step, plgpu.layout_cast(zeros, TILE), masks=masks)
    result = smem["q_smem"].at[warpgroup]
    result[...] = (total * setting.rule.scale).astype(grad.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result, grad.at[block.batch, rows, block.head])
    plgpu.wait_smem_to_gmem(0)


def _copy_queries(block: Block, rows: Any, warpgroup: jax.Array) -> None:
    """Brings this warpgroup's queries, and all that belongs to them, to shared memory."""
    operands, smem = block.operands, block.smem
    ready = smem["q_ready"].at[warpgroup]
    whole = (block.batch, rows, block.head)
    plgpu.copy_gmem_to_smem(operands.inputs.q_BTNH.at[whole], smem["q_smem"].at[warpgroup], ready)
    plgpu.copy_gmem_to_smem(
        operands.grad_out_BTNH.at[whole], smem["grad_smem"].at[warpgroup], ready
    )
    for i, numbers in enumerate((operands.level_BNT, operands.delta_BNT)):
        row = numbers.at[block.batch, block.head, rows]
        plgpu.copy_gmem_to_smem(row, smem["rows_smem"].at[i, warpgroup], ready)
    copy_places(operands.inputs.q_places, block.batch, rows, smem["q_places"], warpgroup, ready)
    plgpu.barrier_wait(ready)


def _make_key_step(block: Block, warpgroup: jax.Array, first_row: jax.Array) -> Any:
    """step(j, dq, masked): one tile of keys more."""
    setting, smem, tiles = block.setting, block.smem, block.range
    inputs, rule, machine = block.operands.inputs, setting.rule, setting.machine
    shape, slopes = (ROWS_PER_WARPGROUP, setting.tiling.rows), inputs.slopes_N
    level, delta = (machine.load(smem["rows_smem"].at[i, warpgroup], 0) for i in range(2))
    positions, segments = (place is not None for place in inputs.q_places)
    start = first_row + setting.first_position
    q = block.side(0, start, smem["q_places"], warpgroup, (positions, segments))
    q_smem, grad_smem = smem["q_smem"].at[warpgroup], smem["grad_smem"].at[warpgroup]
    alibi = None
    if slopes is not None:
        alibi = ColumnBias.make(slopes[block.head], _origin(block, first_row), setting.tiling.rows)

    def step(j: jax.Array, total: jax.Array, *, masked: bool) -> jax.Array:
        slot = lax.rem(j - tiles.first, jnp.int32(setting.tiling.stages))
        k_smem, v_smem = smem["k_smem"].at[slot], smem["v_smem"].at[slot]
        plgpu.barrier_wait(smem["ready"].at[slot])
        wanted = positions and (masked or alibi is not None), segments and masked
        k = block.side(1, j * setting.tiling.rows, smem["k_places"], slot, wanted)

        def weigh(score: jax.Array) -> tuple[jax.Array, jax.Array]:
            bias, height = None, level
            if alibi is not None:
                column, shift = alibi.split(k)
                bias, height = spread(column, 1, shape), level - shift
            seen = visible(rule, q, k) if masked else None
            return _weigh(rule, score, bias, spread(height, 0, shape), seen)

        (_, bent), grad_share = machine.two_products((q_smem, k_smem), (grad_smem, v_smem), weigh)
        grad_score = bent * (grad_share - spread(delta, 0, shape))
        total = machine.add_product(total, grad_score.astype(inputs.q_BTNH.dtype), k_smem)
        machine.release(smem["read"].at[slot], loaded=any(wanted))
        return total

    return step


def _origin(block: Block, first_row: jax.Array) -> jax.Array:
    origins = block.operands.origins_BI
    rows = block.operands.level_BNT.shape[2] // origins.shape[1]
    return own_row(origins, block.batch)[lax.div(first_row, jnp.int32(rows))]


def grad_keys(operands: GradOperands, setting: Setting) -> tuple[jax.Array, jax.Array]:
    """Returns dk_BSKH and dv_BSKH, in k's dtype; rows beyond the last block are not written."""
    inputs, machine = operands.inputs, setting.machine
    B, S, K, H = inputs.k_BSKH.shape
    dtype, blocks = inputs.k_BSKH.dtype, inputs.ranges.shape[1]
    parts = _parts(inputs.group, blocks * K * B)
    own = (setting.tiling.block // ROWS_PER_WARPGROUP, ROWS_PER_WARPGROUP)
    tiles = (setting.tiling.stages, setting.tiling.rows)
    scratch = {
        "k_smem": machine.matrices(*own, H, dtype=dtype),
        "v_smem": machine.matrices(*own, H, dtype=dtype),
        "k_places": plgpu.SMEM((2, *own), jnp.int32),
        "q_smem": machine.matrices(*tiles, H, dtype=dtype),
        "grad_smem": machine.matrices(*tiles, H, dtype=dtype),
        "columns_smem": plgpu.SMEM((2, *tiles), jnp.float32),  # level and delta
        "q_places": plgpu.SMEM((2, *tiles), jnp.int32),
        "k_ready": plgpu.Barrier(num_arrivals=2 + inputs.extras, num_barriers=own[0]),
        "ready": plgpu.Barrier(num_arrivals=4 + inputs.extras, num_barriers=setting.tiling.stages),
        "read": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=setting.tiling.stages),
        "done": plgpu.Barrier(num_arrivals=CONSUMERS),
    }
    result = jax.ShapeDtypeStruct((B, S, K * parts, H), dtype)
    grads = machine.launch(
        partial(_key_block, setting),
        operands,
        (result, result),
        scratch,
        # the first keys, with the most queries when causal, come first by themselves
        {"block": blocks, "head": K * parts, "batch": B},
        CONSUMERS + 1,
        "attention_backward_kv",
    )
    if parts == 1:
        return grads
    add_up = lambda x: x.reshape(B, S, K, parts, H).astype(jnp.float32).sum(3).astype(dtype)  # noqa: E731
    return tuple(add_up(grad) for grad in grads)


def _parts(group: int, blocks: int) -> int:
    """In how many parts to split the query heads that share keys: the fewest that give enough blocks."""
    divisors = (n for n in range(1, group) if group % n == 0)
    return next((n for n in divisors if n * blocks >= ENOUGH_BLOCKS), group)


def _split(block: Block) -> tuple[int, int]:
    """Parts of the query heads that share keys, and query heads of each; `block.head` counts parts."""
    inputs = block.operands.inputs
    parts = block.results[0].shape[2] // inputs.k_BSKH.shape[2]
    return parts, inputs.group // parts


def _key_block(
    setting: Setting, operands: GradOperands, grad_k: Any, grad_v: Any, **smem: Any
) -> None:
    number, batch, head = (lax.axis_index(axis) for axis in ("block", "batch", "head"))
    tiles = Range.read(operands.inputs.ranges, batch, number)
    block = Block(setting, operands, (grad_k, grad_v), smem, batch, head, number, tiles)
    warpgroup = lax.axis_index("warpgroup")
    if setting.tiling.block == ROWS_PER_WARPGROUP:
        pl.when(warpgroup == 0)(lambda: _sum_over_queries(block, 0, sums="v"))
        pl.when(warpgroup == 1)(lambda: _sum_over_queries(block, 0, sums="k"))
    else:
        pl.when(warpgroup < CONSUMERS)(lambda: _sum_over_queries(block, warpgroup, sums="kv"))
    pl.when(warpgroup == CONSUMERS)(lambda: _stream_queries(block))


def _stream_queries(block: Block) -> None:
    """Brings the block's keys once, then the tiles of queries of every head that shares them."""
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
    operands, smem, tiles = block.operands, block.smem, block.range
    inputs, setting = operands.inputs, block.setting
    parts, heads = _split(block)
    kv_head = lax.div(block.head, jnp.int32(parts))
    for group in range(setting.tiling.block // ROWS_PER_WARPGROUP):
        first_row = block.number * setting.tiling.block + group * ROWS_PER_WARPGROUP
        rows, ready = pl.ds(first_row, ROWS_PER_WARPGROUP), smem["k_ready"].at[group]
        for source, name in ((inputs.k_BSKH, "k_smem"), (inputs.v_BSKH, "v_smem")):
            copy = smem[name].at[group]
            plgpu.copy_gmem_to_smem(source.at[block.batch, rows, kv_head], copy, ready)
        copy_places(inputs.k_places, block.batch, rows, smem["k_places"], group, ready)
    count = tiles.last - tiles.first

    def fetch(n: jax.Array, slot: Any) -> None:
        member = lax.div(n, count)
        head = block.head * heads + member
        rows = pl.ds((tiles.first + n - member * count) * setting.tiling.rows, setting.tiling.rows)
        ready = smem["ready"].at[slot]
        for source, name in ((inputs.q_BTNH, "q_smem"), (operands.grad_out_BTNH, "grad_smem")):
            copy = smem[name].at[slot]
            plgpu.copy_gmem_to_smem(source.at[block.batch, rows, head], copy, ready)
        for i, numbers in enumerate((operands.level_BNT, operands.delta_BNT)):
            row = numbers.at[block.batch, head, rows]
            plgpu.copy_gmem_to_smem(row, smem["columns_smem"].at[i, slot], ready)
        copy_places(inputs.q_places, block.batch, rows, smem["q_places"], slot, ready)

    _stream(block, count * heads, fetch, smem["read"])


def _sum_over_queries(block: Block, group: Any, sums: str) -> None:
    """dK and dV of 64 keys, or one of them."""
    plgpu.set_max_registers(CONSUMER_REGISTERS[CONSUMERS], action="increase")
    smem, setting, tiles = block.smem, block.setting, block.range
    inputs, H = block.operands.inputs, block.results[0].shape[3]
    plgpu.barrier_wait(smem["k_ready"].at[group])
    zeros = jnp.zeros((ROWS_PER_WARPGROUP, H), jnp.float32)
    totals = tuple(plgpu.layout_cast(zeros, TILE) for _ in sums)

    def one_head(member: jax.Array, totals: tuple) -> tuple:
        step = _make_query_step(block, group, member, sums)
        return tiles.loop(step, totals, masks=inputs.masks(setting.rule))

    totals = lax.fori_loop(jnp.int32(0), jnp.int32(_split(block)[1]), one_head, totals)
    if setting.tiling.block == ROWS_PER_WARPGROUP:  # the other warpgroup may still read our keys
        plgpu.barrier_arrive(smem["done"])
        plgpu.barrier_wait(smem["done"])
    first_row = block.number * setting.tiling.block + group * ROWS_PER_WARPGROUP
    rows = pl.ds(first_row, ROWS_PER_WARPGROUP)
    for name, total in zip(sums, totals, strict=True):
        grad = block.results["kv".index(name)]
        result, factor = smem[f"{name}_smem"].at[group], setting.rule.scale if name == "k" else 1.0
        result[...] = (total * factor).astype(grad.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(result, grad.at[block.batch, rows, block.head])
    plgpu.wait_smem_to_gmem(0)


def _make_query_step(block: Block, group: Any, member: jax.Array, sums: str) -> Any:
    """step(i, totals, masked): one tile of queries more, of one of the heads that share the keys."""
    setting, smem, tiles = block.setting, block.smem, block.range
    inputs, rule, machine = block.operands.inputs, setting.rule, setting.machine
    shape, slopes = (ROWS_PER_WARPGROUP, setting.tiling.rows), inputs.slopes_N
    head = block.head * _split(block)[1] + member
    there = tuple(place is not None for place in inputs.k_places)
    start = block.number * setting.tiling.block + group * ROWS_PER_WARPGROUP
    k = block.side(0, start, smem["k_places"], group, there)
    k_smem, v_smem = smem["k_smem"].at[group], smem["v_smem"].at[group]
    earlier = member * (tiles.last - tiles.first)  # tiles of the heads before this one

    def step(i: jax.Array, totals: tuple, *, masked: bool) -> tuple:
        slot = lax.rem(earlier + i - tiles.first, jnp.int32(setting.tiling.stages))
        q_smem, grad_smem = smem["q_smem"].at[slot], smem["grad_smem"].at[slot]
        plgpu.barrier_wait(smem["ready"].at[slot])
        column = lambda n: spread(machine.load(smem["columns_smem"].at[n, slot], 1), 1, shape)  # noqa: E731

        def weigh(score: jax.Array) -> tuple[jax.Array, jax.Array]:
            bias = seen = None
            if slopes is not None:
                offsets = k.offsets(_origin(block, i * setting.tiling.rows)).astype(jnp.float32)
                bias = spread(offsets * slopes[head], 0, shape)
            if masked:
                start = i * setting.tiling.rows + setting.first_position
                seen = visible(rule, block.side(1, start, smem["q_places"], slot, there), k)
            return _weigh(rule, score, bias, column(0), seen)

        def narrow(x: jax.Array) -> jax.Array:
            return x.astype(inputs.q_BTNH.dtype)

        if sums == "v":
            share, _ = weigh(machine.product(k_smem, q_smem))
            totals = (machine.add_product(totals[0], narrow(share), grad_smem),)
        else:
            (share, bent), grad_share = machine.two_products(
                (k_smem, q_smem), (v_smem, grad_smem), weigh
            )
            grad_score = lambda: narrow(bent * (grad_share - column(1)))  # noqa: E731
            if sums == "k":
                totals = (machine.add_product(totals[0], grad_score(), q_smem),)
            else:
                grad_v, grad_k = machine.add_two_products(
                    (totals[1], totals[0]), narrow(share), grad_smem, grad_score, q_smem
                )
                totals = (grad_k, grad_v)
        machine.release(smem["read"].at[slot], loaded=True)
        return totals

    return step
