"""Self-attention: projections, positions, cache write, and one call into `kernels.attention`.

The kernels compute whole arrays. Here is what they see on a mesh: every device its own rows of the
batch and its own heads, the keys and values of all tokens, and the slopes of those very heads.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.kernels.attention import Choice, Plan, Request, Rule, api, choose, flash_attention
from llm_jax.kernels.attention.plan import Places
from llm_jax.kernels.device import current_device
from llm_jax.model.config import ModelConfig
from llm_jax.model.layers import Norm, add_adapter, add_bias, fan_in, matrix, residual_scale
from llm_jax.model.positions import config_slopes, rotate
from llm_jax.sharding import axis_index, constrain, map_shards, part_of

Q_AXES, KV_AXES = ("batch", "time", "heads", None), ("batch", None, "kv_heads", None)
PLACES_AXES = Places(("batch", "time"), ("batch", None), ("batch", "time"), ("batch", None))


Rotary = tuple[jax.Array, jax.Array]  # cos and sin, [B, T, 1, rotary_dim / 2]


class View(NamedTuple):
    """What layers of one kind know about the tokens."""

    plan: Plan  # who sees whom, and which tiles that leaves to compute
    rotary: Rotary | None  # None without RoPE


class Context(NamedTuple):
    """What every layer needs to know about the tokens, computed once per forward pass."""

    views: tuple[View, ...]  # one for each of `windows`
    slot: jax.Array | int  # where this call's keys go in the cache; 0 without one


def windows(config: ModelConfig) -> tuple[int, ...]:
    """The windows of the model's layers: 0 for those that see all, then that of local ones."""
    return tuple(config.local.window * local for local in sorted(set(config.local_layers)))


def attention_request(
    config: ModelConfig, B: int, T: int, S: int, in_rows: bool = True, window: int = 0
) -> Request:
    """What one device of the mesh in use asks of attention, for a batch of [B, T] tokens."""
    N, K = part_of("heads", config.num_heads), part_of("kv_heads", config.num_kv_heads)
    soft_cap = config.attention_soft_cap
    rule = Rule(scale=config.score_scale, causal=True, window=window, soft_cap=soft_cap)
    return Request(
        B=part_of("batch", B),
        T=part_of("time", T),
        S=S,
        N=N,
        K=min(K, N),
        H=config.head_dim,
        dtype=config.dtype,
        rule=rule,
        alibi=config.position == "alibi",
        segments=True,
        positions=not in_rows or part_of("time", T) < T,
        lse=False,
    )


def attention_choice(config: ModelConfig, batch_size: int, seq_len: int) -> Choice:
    """The implementation of attention that training takes on the mesh in use, and why.

    Where local layers take another than the rest, both are named.

    Raises:
      ConfigError: model.attention names one that cannot take this model on this device.
    """
    choices = []
    for window in windows(config):
        request = attention_request(config, batch_size, seq_len, seq_len, window=window)
        if config.attention == "auto":
            choices.append(choose(request, current_device()))
        else:
            name = api.implementation_for(request, config.attention)
            choices.append(Choice(name, "asked for by model.attention"))
    first, last = choices[0], choices[-1]
    if first.name == last.name:
        return first
    return Choice(f"{first.name} and {last.name}", f"{first.reason}; in a window: {last.reason}")


def plan_attention(
    config: ModelConfig,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    q_segments_BT: jax.Array,
    kv_segments_BS: jax.Array,
    *,
    in_rows: bool,
    window: int = 0,
) -> Plan:
    """The plan all layers of a kind share. `in_rows`: keys are the queries' own tokens, in order.

    Then row indices serve for positions: inside a segment they differ alike, and across segments
    they bound the tiles to visit more tightly than positions that restart.
    """
    (B, T), S = q_positions_BT.shape, kv_positions_BS.shape[1]
    request = attention_request(config, B, T, S, in_rows, window)
    name = api.implementation_for(request, config.attention)
    places = Places(q_positions_BT, kv_positions_BS, q_segments_BT, kv_segments_BS)
    if not request.positions:
        places = places._replace(q_positions_BT=None, kv_positions_BS=None)
    elif in_rows:  # a device's first query is not row 0, so its rows are spelt out
        rows_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        places = places._replace(q_positions_BT=rows_BT, kv_positions_BS=rows_BT)
    axes = Places(*(None if p is None else a for p, a in zip(places, PLACES_AXES, strict=True)))
    ranges = map_shards(
        lambda places: api.IMPLEMENTATIONS[name].make_ranges(places, request),
        (places,),
        (axes,),
        ("batch", "time"),
    )
    return Plan(places, ranges, name, causal=True, window=window)


def attend(
    config: ModelConfig, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, plan: Plan
) -> jax.Array:
    """Causal attention of the plan's rows, [B, T, N, H], each device its own heads and rows."""
    group = config.num_heads // config.num_kv_heads
    slopes_N = jnp.asarray(config_slopes(config)) if config.position == "alibi" else None

    def part(q_BTNH, k_BSKH, v_BSKH, slopes_N, plan):
        # fewer kv heads than devices: each has all of them, and takes those its queries read
        needed = max(q_BTNH.shape[2] // group, 1)
        if needed < k_BSKH.shape[2]:
            first = axis_index("heads", config.num_heads) * q_BTNH.shape[2] // group
            k_BSKH, v_BSKH = (
                jax.lax.dynamic_slice_in_dim(x, first, needed, axis=2) for x in (k_BSKH, v_BSKH)
            )
        return flash_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            scale=config.score_scale,
            window=plan.window,
            soft_cap=config.attention_soft_cap,
            alibi_slopes_N=slopes_N,
            plan=plan,
        )

    places = Places(
        *(None if p is None else a for p, a in zip(plan.places, PLACES_AXES, strict=True))
    )
    plan_axes = Plan(
        places, tuple(("batch", "time", *[None] * (x.ndim - 2)) for x in plan.ranges),
        plan.implementation, plan.causal, plan.window,
    )  # fmt: skip
    slopes_axes = None if slopes_N is None else ("heads",)
    arguments = (q_BTNH, k_BSKH, v_BSKH, slopes_N, plan)
    return map_shards(part, arguments, (Q_AXES, KV_AXES, KV_AXES, slopes_axes, plan_axes), Q_AXES)


def rotary_tables(
    config: ModelConfig, context: Context, is_local: jax.Array | None
) -> Rotary | None:
    """cos and sin of the layer's kind."""
    usual, local = context.views[0].rotary, context.views[-1].rotary
    if is_local is None or not config.local.rope_theta or usual is None or local is None:
        return usual
    return jnp.where(is_local, local[0], usual[0]), jnp.where(is_local, local[1], usual[1])


class Attention(nn.Module):
    """Full, grouped-query (2305.13245) or multi-query (1911.02150) causal attention."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        context: Context,
        is_local: jax.Array | None,
        layer_cache: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """[B, T, D] -> [B, T, D] and the layer's updated cache (k_BSKH, v_BSKH), if any."""
        config = self.config
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        q_BTNH = self.project("query", x_BTD, N, "heads")
        k_BTKH = self.project("key", x_BTD, K, "kv_heads")
        v_BTKH = self.project("value", x_BTD, K, "kv_heads")
        q_BTNH = self.norm_heads("query_norm", q_BTNH, "heads")
        k_BTKH = self.norm_heads("key_norm", k_BTKH, "kv_heads")
        rotary = rotary_tables(config, context, is_local)
        if rotary is not None:
            q_BTNH, k_BTKH = (rotate(config, x, *rotary) for x in (q_BTNH, k_BTKH))
        k_BSKH, v_BSKH = k_BTKH, v_BTKH
        if layer_cache is not None:
            at = (0, context.slot, 0, 0)
            k_BSKH = jax.lax.dynamic_update_slice(layer_cache[0], k_BTKH, at)
            v_BSKH = jax.lax.dynamic_update_slice(layer_cache[1], v_BTKH, at)
            layer_cache = (k_BSKH, v_BSKH)
        attends = [
            functools.partial(attend, config, plan=view.plan) for view in reversed(context.views)
        ]
        if is_local is None:
            out_BTNH = attends[0](q_BTNH, k_BSKH, v_BSKH)
        else:
            out_BTNH = jax.lax.cond(is_local, *attends, q_BTNH, k_BSKH, v_BSKH)
        out_BTNH = constrain(out_BTNH, "batch", "time", "heads", "head_dim")
        out_init = fan_in(residual_scale(config), (0, 1), (2,))
        out_NHD = matrix(self, "out", (N, H, D), ("heads", "head_dim", "embed"), out_init)
        out_BTD = jnp.einsum("BTNH,NHD->BTD", out_BTNH, out_NHD)
        out_BTD = add_adapter(self, "out", out_BTD, out_BTNH, ("heads", "head_dim"), ("embed",))
        if config.attention_bias == "qkvo":
            out_BTD = add_bias(self, "out_bias", out_BTD, ("act_embed",))
        return out_BTD, layer_cache

    def norm_heads(self, name: str, x_BTNH: jax.Array, axis: str) -> jax.Array:
        """Queries or keys, normed as config.qk_norm says."""
        kind = self.config.qk_norm
        if kind == "none":
            return x_BTNH
        axes = ("head_dim",) if kind == "head" else (axis, "head_dim")
        over, biased = (2 if kind == "whole" else 1), kind != "each_head"
        return Norm(self.config, axes=axes, over=over, biased=biased, name=name)(x_BTNH)

    def project(self, name: str, x_BTD: jax.Array, heads: int, axis: str) -> jax.Array:
        """x W (+ b), split into heads: [B, T, D] -> [B, T, heads, H]."""
        D, H = self.config.embed_dim, self.config.head_dim
        init = fan_in(1.0, (0,), (1, 2))
        w_DNH = matrix(self, name, (D, heads, H), ("embed", axis, "head_dim"), init)
        y_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, w_DNH)
        y_BTNH = add_adapter(self, name, y_BTNH, x_BTD, ("embed",), (axis, "head_dim"))
        if self.config.attention_bias != "none":
            y_BTNH = add_bias(self, f"{name}_bias", y_BTNH, (axis, "head_dim"))
        if self.config.qkv_clip:
            y_BTNH = jnp.clip(y_BTNH, -self.config.qkv_clip, self.config.qkv_clip)
        return constrain(y_BTNH, "batch", "time", axis, "head_dim")
