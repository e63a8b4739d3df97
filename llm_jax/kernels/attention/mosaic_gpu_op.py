"""Attention on Hopper as one differentiable op: the XLA around the kernels.

Rows are padded to whole blocks and heads to a supported size; rows beyond the end get segment 0. What
depends on single rows (delta, the log-sum-exp in the kernels' units) is computed here, where XLA
fuses it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.kernels.attention import mosaic_gpu_backward as backward
from llm_jax.kernels.attention import mosaic_gpu_forward as forward
from llm_jax.kernels.attention.hopper import LOG2_E, Machine, Operands, Setting
from llm_jax.kernels.attention.mosaic_gpu import BLOCK, Tilings, head_size, tilings_for
from llm_jax.kernels.attention.plan import (
    Places,
    Plan,
    Rule,
    Tiles,
    first_position,
    pad_places,
    pad_rows,
)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    slopes_N: jax.Array | None,
    plan: Plan,
    rule: Rule,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """As `mosaic_gpu.attend`; `interpret` holds InterpretGPUParams when there is no GPU."""
    return _attend(q_BTNH, k_BSKH, v_BSKH, slopes_N, plan, rule, Machine(interpret))


def _pad(x_BTNH: jax.Array) -> jax.Array:
    """Rows to whole blocks, heads to a supported size."""
    missing = head_size(x_BTNH.shape[-1]) - x_BTNH.shape[-1]
    x_BTNH = pad_rows(x_BTNH, 1, BLOCK)
    return jnp.pad(x_BTNH, [(0, 0)] * 3 + [(0, missing)]) if missing else x_BTNH


def _operands(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    slopes_N: jax.Array | None,
    plan: Plan,
    rule: Rule,
) -> Operands:
    """What the kernels read, with the ranges of the forward kernel."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    places = pad_places(plan.places, T, S, Tiles(BLOCK, BLOCK))
    if places.kv_segments_BS is not None:
        hidden = places.kv_segments_BS == 0
        places = places._replace(kv_segments_BS=jnp.where(hidden, -1, places.kv_segments_BS))
    if not rule.causal and slopes_N is None:
        places = places._replace(q_positions_BT=None, kv_positions_BS=None)
    slopes_N = None if slopes_N is None else slopes_N * LOG2_E
    q, k, v = (_pad(x) for x in (q_BTNH, k_BSKH, v_BSKH))
    return Operands(q, k, v, slopes_N, places, plan.ranges[0])


def _forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    slopes_N: jax.Array | None,
    plan: Plan,
    rule: Rule,
    machine: Machine,
) -> tuple[jax.Array, jax.Array]:
    T, S, H = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[3]
    operands = _operands(q_BTNH, k_BSKH, v_BSKH, slopes_N, plan, rule)
    setting = Setting(rule, tilings_for(T, S, H).forward, first_position(T, S), machine)
    out_BTNH, lse_BNT = forward.forward(operands, setting)
    return out_BTNH[:, :T, :, :H], lse_BNT[:, :, :T].swapaxes(1, 2)


def _forward_saving(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    slopes_N: jax.Array | None,
    plan: Plan,
    rule: Rule,
    machine: Machine,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    out_BTNH, lse_BTN = _forward(q_BTNH, k_BSKH, v_BSKH, slopes_N, plan, rule, machine)
    out_BTNH = checkpoint_name(out_BTNH, "attention_out")
    lse_BTN = checkpoint_name(lse_BTN, "attention_lse")
    return (out_BTNH, lse_BTN), (q_BTNH, k_BSKH, v_BSKH, slopes_N, plan, out_BTNH, lse_BTN)


def _backward(rule: Rule, machine: Machine, saved: tuple, cotangents: tuple) -> tuple:
    q_BTNH, k_BSKH, v_BSKH, slopes_N, plan, out_BTNH, lse_BTN = saved
    grad_out_BTNH, grad_lse_BTN = cotangents
    T, S, H = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[3]
    tilings, first = tilings_for(T, S, H), first_position(T, S)
    inputs = _operands(q_BTNH, k_BSKH, v_BSKH, slopes_N, plan, rule)

    # the softmax's normaliser, and the lse, pass back one number per row
    wide = (grad_out_BTNH.astype(jnp.float32), out_BTNH.astype(jnp.float32))
    delta_BTN = (wide[0] * wide[1]).sum(axis=-1) - grad_lse_BTN
    empty_BTN = jnp.isneginf(lse_BTN)
    delta_BTN = jnp.where(empty_BTN, 0, delta_BTN)
    level_BNT = pad_rows(jnp.where(empty_BTN, jnp.inf, lse_BTN), 1, BLOCK).swapaxes(1, 2) * LOG2_E
    origins_BI = None
    if inputs.slopes_N is not None:
        origins_BI, behind_BT = _origins(inputs.places, level_BNT.shape[2], first, tilings)
        level_BNT += inputs.slopes_N[None, :, None] * behind_BT[:, None].astype(jnp.float32)
    operands = backward.GradOperands(
        inputs,
        _pad(grad_out_BTNH),
        level_BNT,
        pad_rows(delta_BTN, 1, BLOCK).swapaxes(1, 2),
        origins_BI,
    )

    def given(ranges: jax.Array) -> backward.GradOperands:
        return operands._replace(inputs=inputs._replace(ranges=ranges))

    settings = (Setting(rule, tiling, first, machine) for tiling in tilings[1:])
    dq_BTNH = backward.grad_queries(given(plan.ranges[1]), next(settings))
    dk_BSKH, dv_BSKH = backward.grad_keys(given(plan.ranges[2]), next(settings))
    return dq_BTNH[:, :T, :, :H], dk_BSKH[:, :S, :, :H], dv_BSKH[:, :S, :, :H], None, None


def _origins(places: Places, T: int, first: int, tilings: Tilings) -> tuple[jax.Array, jax.Array]:
    """The position of the first query of every tile, and how far each query is ahead of it."""
    positions_BT = places.q_positions_BT
    if positions_BT is None:
        positions_BT = jnp.arange(T, dtype=jnp.int32)[None] + first
    rows = tilings.grad_keys.rows
    origins_BI = positions_BT[:, ::rows]
    return origins_BI, positions_BT - jnp.repeat(origins_BI, rows, axis=1)


_attend = jax.custom_vjp(_forward, nondiff_argnums=(5, 6))
_attend.defvjp(_forward_saving, _backward)
