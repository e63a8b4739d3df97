"""Cross-entropy in tiles of tokens, in plain XLA: any device, memory linear in tokens plus a tile.

1. [B, T] tokens are flattened to M, padded to I tiles of t rows, and scanned tile by tile.
2. A tile's logits [t, V] give its log Z and its targets' logits, and are gone with the tile.
3. Where gradients are wanted they come in the same turn: dlogits, this tile's dx, and its part of
   dhead, added up in float32.

So the loss and its gradients are three matrix products, as if all logits were kept; recomputing
them in backward would be a fourth. On a mesh every device has its own tokens and its own slice of
the vocabulary: one small collective per tile joins the slices' log Z; after the last tile dx is
added up over the vocabulary's axis, and dhead over the tokens'.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from llm_jax.kernels.cross_entropy.reference import LossSums, logits, precision, weigh
from llm_jax.kernels.device import current_device

# Every tile reads and writes dhead, 8 bytes an entry, beside 2 t operations on it: below
# t = 4 * FLOP/s / bytes/s that waits for memory (computed, not measured: v5e 960 rows, v5p 660,
# H200 at 800 TFLOP/s 670). CPU, seconds at M=2048 D=512 V=151,936 for 256 / 512 / 1024 rows
# 6.8 / 6.3 / 5.9, all logits at once 6.5.
MOST_ROWS = 1024
TILE_BYTES = 512 << 20  # of a tile's float32 logits: 832 rows at V=151,936, M=8192
# CPU: XLA writes the product before it adds it to dhead. Whole, that is another dhead (2.7 times
# the temporaries at M=8192 D=2048 V=151,936); in slabs of this size it is small.
SLAB_BYTES = 64 << 20


class Split(NamedTuple):
    """The axes of the mesh in use (`jax.set_mesh`) that split each axis of the arrays."""

    batch: tuple[str, ...] = ()
    time: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()  # of the head as it is stored; hidden states are whole
    vocab: tuple[str, ...] = ()


class Rule(NamedTuple):
    """What does not depend on the arrays."""

    z_loss: float
    soft_cap: float
    split: Split


class Head(NamedTuple):
    """What turns hidden states into logits, and their gradients."""

    head_DV: jax.Array
    bias_V: jax.Array | None


class _Tile(NamedTuple):
    """One tile after the softmax: p_tV = share_tV * scale_t."""

    logits_tV: jax.Array
    share_tV: jax.Array
    scale_t: jax.Array
    column_t: jax.Array  # of the target in this device's slice; not inside it: another device's
    nats_t: jax.Array
    log_z_t: jax.Array


# (log Z, what the caller gave per token) -> gradients of the objective by nats and by log Z
Weighing = Callable[..., tuple[jax.Array, jax.Array]]


def tile_rows(M: int, V: int) -> int:
    """Rows per tile: all when they fit, else near-equal tiles of a multiple of 16 rows."""
    most = max(16, min(MOST_ROWS, TILE_BYTES // (4 * V)) // 16 * 16)
    if most >= M:
        return M
    per_tile = -(-M // -(-M // most))
    return -(-per_tile // 16) * 16


def _softmax(x_tD: jax.Array, head: Head, target_t: jax.Array, rule: Rule) -> _Tile:
    head_DV, bias_V = head
    logits_tV = logits(x_tD, head_DV, bias_V, rule.soft_cap)
    V, vocab = head_DV.shape[1], rule.split.vocab
    column_t = target_t - (lax.axis_index(vocab) * V if vocab else 0)
    own_t = (column_t >= 0) & (column_t < V)
    picked_t = jnp.take_along_axis(logits_tV, column_t.clip(0, V - 1)[:, None], axis=1)[:, 0]
    # no larger than the maximum; but taken into it, XLA reads it before exp overwrites the logits
    peak_t = jnp.maximum(logits_tV.max(axis=1), picked_t)
    share_tV = jnp.exp(logits_tV - peak_t[:, None])
    log_z_t = peak_t + jnp.log(share_tV.sum(axis=1))
    picked_t = jnp.where(own_t, picked_t, -jnp.inf)
    if vocab:
        slices = lax.all_gather(jnp.stack([log_z_t, picked_t]), vocab)
        log_z_t, picked_t = jax.nn.logsumexp(slices[:, 0], axis=0), slices[:, 1].max(axis=0)
    scale_t = jnp.exp(peak_t - log_z_t)
    return _Tile(logits_tV, share_tV, scale_t, column_t, log_z_t - picked_t, log_z_t)


def _grad_logits(tile: _Tile, grad_nats_t: jax.Array, grad_log_z_t: jax.Array, rule: Rule):
    """With p the softmax: dlogits = (dnats + dlog_z) p - dnats at the target."""
    columns_1V = jnp.arange(tile.logits_tV.shape[1], dtype=tile.column_t.dtype)[None]
    scale_t = tile.scale_t * (grad_nats_t + grad_log_z_t)
    at_target_tV = jnp.where(columns_1V == tile.column_t[:, None], grad_nats_t[:, None], 0)
    grad_tV = tile.share_tV * scale_t[:, None] - at_target_tV
    if rule.soft_cap:
        grad_tV *= 1 - jnp.square(tile.logits_tV / rule.soft_cap)
    return grad_tV


def _add_product(total_DV: jax.Array, x_tD: jax.Array, grad_tV: jax.Array) -> jax.Array:
    """total + x' grad, in place."""
    product = partial(
        jnp.einsum,
        "td,tv->dv",
        precision=precision(x_tD.dtype),
        preferred_element_type=jnp.float32,
    )
    D, V = total_DV.shape
    width = max(SLAB_BYTES // (4 * D), 1)
    if current_device().platform != "cpu" or width >= V:
        return total_DV + product(x_tD, grad_tV)

    def add(at: jax.Array | int, total_DV: jax.Array, width: int) -> jax.Array:
        slab = product(x_tD, lax.dynamic_slice_in_dim(grad_tV, at, width, axis=1))
        slab += lax.dynamic_slice_in_dim(total_DV, at, width, axis=1)
        return lax.dynamic_update_slice_in_dim(total_DV, slab, at, axis=1)

    slabs, rest = divmod(V, width)
    total_DV = lax.fori_loop(0, slabs, lambda i, total: add(i * width, total, width), total_DV)
    return add(V - rest, total_DV, rest) if rest else total_DV


def _sweep(
    x_BTD: jax.Array,
    head: Head,
    targets_BT: jax.Array,
    given: tuple[jax.Array, ...],
    rule: Rule,
    weighing: Weighing | None,
) -> tuple[Any, ...]:
    """One device's tokens, tile by tile: nats_BT, log_z_BT and, with a `weighing`, dx and dhead.

    `given` are [B, T] arrays that `weighing` gets a tile of, after log Z. dx and dhead are float32
    where they are yet to be added up over the mesh.
    """
    (B, T, _), V = x_BTD.shape, head.head_DV.shape[1]
    M = B * T
    t = tile_rows(M, V)
    I = -(-M // t)

    def tiles(x: jax.Array) -> jax.Array:
        x = x.reshape(M, *x.shape[2:])
        return jnp.pad(x, [(0, I * t - M)] + [(0, 0)] * (x.ndim - 1)).reshape(I, t, *x.shape[1:])

    def tokens(x: jax.Array) -> jax.Array:
        return x.reshape(I * t, *x.shape[2:])[:M].reshape(B, T, *x.shape[2:])

    grad_dtype = jnp.float32 if rule.split.vocab else x_BTD.dtype

    def turn(dhead: Any, rows: tuple) -> tuple[Any, tuple]:
        x_tD, target_t, *given_t = rows
        tile = _softmax(x_tD, head, target_t, rule)
        if weighing is None:
            return dhead, (tile.nats_t, tile.log_z_t)
        exact_tV = _grad_logits(tile, *weighing(tile.log_z_t, *given_t), rule)
        grad_tV = exact_tV.astype(x_tD.dtype)
        dx_tD = jnp.einsum(
            "tv,dv->td",
            grad_tV,
            head.head_DV,
            precision=precision(x_tD.dtype),
            preferred_element_type=jnp.float32,
        )
        dbias_V = None if head.bias_V is None else dhead.bias_V + exact_tV.sum(axis=0)
        dhead = Head(_add_product(dhead.head_DV, x_tD, grad_tV), dbias_V)
        return dhead, (tile.nats_t, tile.log_z_t, dx_tD.astype(grad_dtype))

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head)
    start = None if weighing is None else zeros
    dhead, results = lax.scan(turn, start, jax.tree.map(tiles, (x_BTD, targets_BT, *given)))
    results = tuple(tokens(x) for x in results)
    return results if weighing is None else (*results, dhead)


def _on_mesh(
    x_BTD: jax.Array,
    head: Head,
    targets_BT: jax.Array,
    given: tuple[jax.Array, ...],
    rule: Rule,
    weighing: Weighing | None,
) -> tuple[Any, ...]:
    """`_sweep` of whole arrays: each device its part, gradients summed, laid out as x and head."""
    split = rule.split
    token_axes = (*split.batch, *split.time)
    scattered = tuple(axis for axis in split.embed if axis in token_axes)
    summed = tuple(axis for axis in token_axes if axis not in scattered)

    def part(x_BTD: jax.Array, head: Head, *per_token: jax.Array) -> tuple[Any, ...]:
        targets_BT, *given = per_token
        results = _sweep(x_BTD, head, targets_BT, tuple(given), rule, weighing)
        if weighing is None:
            return results
        nats_BT, log_z_BT, dx_BTD, (dhead_DV, dbias_V) = results
        dx_BTD = lax.psum(dx_BTD, split.vocab) if split.vocab else dx_BTD
        if scattered:
            dhead_DV = lax.psum_scatter(dhead_DV, scattered, scatter_dimension=0, tiled=True)
            # before the layers' backward: XLA puts it off, and keeps the whole sum all the while
            dx_BTD, dhead_DV = lax.optimization_barrier((dx_BTD, dhead_DV))
        dhead_DV = lax.psum(dhead_DV, summed) if summed else dhead_DV
        if dbias_V is not None and token_axes:
            dbias_V = lax.psum(dbias_V, token_axes)
        return nats_BT, log_z_BT, dx_BTD.astype(x_BTD.dtype), Head(dhead_DV, dbias_V)

    head = head._replace(
        head_DV=head.head_DV.astype(x_BTD.dtype)
    )  # before it is gathered over the axes of `embed`
    if not any(split):
        return part(x_BTD, head, targets_BT, *given)
    by_token = PartitionSpec(split.batch or None, split.time or None)
    bias = None if head.bias_V is None else PartitionSpec(split.vocab or None)
    by_vocab = Head(PartitionSpec(None, split.vocab or None), bias)  # pyright: ignore
    dhead = Head(PartitionSpec(scattered or None, split.vocab or None), bias)  # pyright: ignore
    mapped = jax.shard_map(
        part,
        in_specs=(by_token, by_vocab, by_token, *(by_token for _ in given)),
        out_specs=(by_token,) * 2 if weighing is None else (*(by_token,) * 3, dhead),
        check_vma=False,  # nothing is differentiated inside
    )
    return mapped(x_BTD, head, targets_BT, *given)


def _as_stored(dhead: Head, head: Head) -> Head:
    return jax.tree.map(lambda gradient, weight: gradient.astype(weight.dtype), dhead, head)


def _scaled(gradient: jax.Array, factor: jax.Array) -> jax.Array:
    return (gradient.astype(jnp.float32) * factor).astype(gradient.dtype)


def _objective(
    nats_BT: jax.Array, log_z_BT: jax.Array, weights_BT: jax.Array, rule: Rule
) -> tuple[jax.Array, LossSums]:
    sums = weigh(nats_BT, log_z_BT, weights_BT)
    return sums.nats + rule.z_loss * sums.z_penalty, sums


def _loss(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    bias_V: jax.Array | None,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    rule: Rule,
) -> tuple[jax.Array, LossSums]:
    nats_BT, log_z_BT = _on_mesh(x_BTD, Head(head_DV, bias_V), targets_BT, (), rule, None)
    return _objective(nats_BT, log_z_BT, weights_BT, rule)


def _loss_saving(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    bias_V: jax.Array | None,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    rule: Rule,
) -> tuple[tuple[jax.Array, LossSums], tuple[jax.Array, Head]]:
    """The objective is one number, so its gradients are known before backward, up to a factor."""

    def weighing(log_z_t: jax.Array, weight_t: jax.Array) -> tuple[jax.Array, jax.Array]:
        return weight_t, 2 * rule.z_loss * weight_t * log_z_t

    head = Head(head_DV, bias_V)
    nats_BT, log_z_BT, dx_BTD, dhead = _on_mesh(
        x_BTD, head, targets_BT, (weights_BT,), rule, weighing
    )
    gradients = (dx_BTD, _as_stored(dhead, head))
    return _objective(nats_BT, log_z_BT, weights_BT, rule), gradients


def _loss_backward(rule: Rule, saved: tuple, cotangents: tuple) -> tuple:
    factor, _ = cotangents
    dx_BTD, (dhead_DV, dbias_V) = jax.tree.map(lambda x: _scaled(x, factor), saved)
    return dx_BTD, dhead_DV, dbias_V, None, None


def _nats(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    bias_V: jax.Array | None,
    targets_BT: jax.Array,
    rule: Rule,
) -> tuple[jax.Array, jax.Array]:
    nats_BT, log_z_BT = _on_mesh(x_BTD, Head(head_DV, bias_V), targets_BT, (), rule, None)
    return nats_BT, log_z_BT


def _nats_saving(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    bias_V: jax.Array | None,
    targets_BT: jax.Array,
    rule: Rule,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    saved = (x_BTD, Head(head_DV, bias_V), targets_BT)
    return _nats(x_BTD, head_DV, bias_V, targets_BT, rule), saved


def _nats_backward(rule: Rule, saved: tuple, cotangents: tuple) -> tuple:
    """Computes the logits again, tile by tile."""
    x_BTD, head, targets_BT = saved

    def weighing(
        log_z_t: jax.Array, grad_nats_t: jax.Array, grad_log_z_t: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return grad_nats_t, grad_log_z_t

    _, _, dx_BTD, dhead = _on_mesh(x_BTD, head, targets_BT, cotangents, rule, weighing)
    return (dx_BTD, *_as_stored(dhead, head), None)


# nats + z_loss * z_penalty, which alone passes gradients back, and LossSums
cross_entropy = jax.custom_vjp(_loss, nondiff_argnums=(5,))
cross_entropy.defvjp(_loss_saving, _loss_backward)

# as reference.token_nats
token_nats = jax.custom_vjp(_nats, nondiff_argnums=(4,))
token_nats.defvjp(_nats_saving, _nats_backward)
