"""Rules that one family has, or a few: windows, Falcon's heads, MPT's nested settings."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from llm_jax.model.config import Alibi, ModelConfig
from llm_jax.model.families.rules import (
    MOST_LAYERS,
    NO_MATHS,
    Custom,
    Fields,
    Json,
    Number,
    Rule,
    derived_head_dim,
    given,
    layer_types,
    local_layers,
    number,
    one_kv_head_each,
    only,
    refuse,
)


def window_everywhere(*, default: int | None) -> Custom:
    """Mistral, StarCoder2: all layers or none."""

    def reader(hf: Json, fields: Fields) -> Fields:
        window = hf.get("sliding_window", default)
        return {"local": local_layers({}, fields, window, lambda layer: window is not None)}

    def writer(config: ModelConfig) -> dict[str, Any]:
        return {"sliding_window": config.local.window or None}

    return Custom(("sliding_window",), reader, writer)


def window_from_a_layer() -> Custom:
    """Qwen2 and 3: where it is used at all, from a layer up, or as `layer_types` says."""

    def reader(hf: Json, fields: Fields) -> Fields:
        window = hf.get("sliding_window", 4096)
        if not given(hf, ("use_sliding_window",), False):
            window = None
        first = number("max_window_layers", given(hf, ("max_window_layers",), 28), int)
        local = local_layers(
            hf, fields, window, lambda layer: window is not None and layer >= first
        )
        return {"local": local}

    def writer(config: ModelConfig) -> dict[str, Any]:
        window = config.local.window
        return {
            "use_sliding_window": bool(window),
            "sliding_window": window or None,
            "max_window_layers": config.local.first if window else config.num_layers,
            "layer_types": layer_types(config),
        }

    names = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
    return Custom(names, reader, writer)


def window_by_pattern(*, full_every: int) -> Custom:
    """Gemma 2 and 3: all layers but every so manieth."""

    def reader(hf: Json, fields: Fields) -> Fields:
        names = ("sliding_window_pattern", "_sliding_window_pattern")
        every = number(names[0], given(hf, names, full_every), int)
        if every < 1:
            raise refuse(names[0], every, "must be at least 1")
        window = hf.get("sliding_window", 4096)
        return {"local": local_layers(hf, fields, window, lambda layer: (layer + 1) % every != 0)}

    def writer(config: ModelConfig) -> dict[str, Any]:
        # null would not load: transformers asks for the window even where no layer is local
        return {"sliding_window": config.local.window or 4096, "layer_types": layer_types(config)}

    names = ("sliding_window", "layer_types", "sliding_window_pattern", "_sliding_window_pattern")
    return Custom(names, reader, writer)


def sqrt_embedding() -> Custom:
    """Gemma: embeddings times sqrt(D); config.json does not say so."""
    return Custom(
        (),
        lambda hf, fields: {"embedding_multiplier": math.sqrt(fields["embed_dim"])},
        lambda config: {},
    )


def gemma_activation() -> Custom:
    """Gemma 1 was published with `gelu` for what is the tanh form; transformers takes it so."""
    names = ("hidden_act", "hidden_activation")

    def reader(hf: Json, fields: Fields) -> Fields:
        for name in names:
            value = given(hf, (name,), "gelu_pytorch_tanh")
            if value not in ("gelu", "gelu_pytorch_tanh"):
                raise refuse(
                    name, value, "is not supported for gemma; it must be gelu_pytorch_tanh"
                )
        return {"activation": "gelu_tanh"}

    return Custom(names, reader, lambda config: {"hidden_act": "gelu_pytorch_tanh"})


def query_scalar(default: int) -> Custom:
    """Gemma 2 and 3: scores are divided by the square root of this."""

    def reader(hf: Json, fields: Fields) -> Fields:
        scalar = number("query_pre_attn_scalar", given(hf, NAMES, default), float)
        if scalar <= 0:
            raise refuse("query_pre_attn_scalar", scalar, "must be above 0")
        return {"attention_scale": 0.0 if scalar == fields["head_dim"] else scalar**-0.5}

    NAMES = ("query_pre_attn_scalar",)
    return Custom(NAMES, reader, lambda config: {NAMES[0]: round(config.score_scale**-2)})


def attention_multiplier() -> Custom:
    """Granite: the factor on q.k itself."""

    def reader(hf: Json, fields: Fields) -> Fields:
        scale = number("attention_multiplier", given(hf, ("attention_multiplier",), 1.0), float)
        if scale <= 0:
            raise refuse("attention_multiplier", scale, "must be above 0")
        return {"attention_scale": scale}

    return Custom(
        ("attention_multiplier",),
        reader,
        lambda config: {"attention_multiplier": config.score_scale},
    )


def logits_divisor() -> Custom:
    """Granite: logits are divided by this; ours are multiplied."""

    def reader(hf: Json, fields: Fields) -> Fields:
        divisor = number("logits_scaling", given(hf, ("logits_scaling",), 1.0), float)
        if divisor <= 0:
            raise refuse("logits_scaling", divisor, "must be above 0")
        return {"logit_multiplier": 1 / divisor}

    def writer(config: ModelConfig) -> dict[str, Any]:
        near = 1 / config.logit_multiplier
        tries = (round(near, 6), near, math.nextafter(near, 0), math.nextafter(near, math.inf))
        exact = [x for x in tries if x and 1 / x == config.logit_multiplier]
        return {"logits_scaling": exact[0] if exact else near}

    return Custom(("logits_scaling",), reader, writer)


def multi_query() -> Custom:
    """GPT-BigCode: one key-value head, or one for every query head."""

    def reader(hf: Json, fields: Fields) -> Fields:
        single = given(hf, ("multi_query",), True)
        if not isinstance(single, bool):
            raise refuse("multi_query", single, "must be true or false")
        heads = 1 if single else fields["num_heads"]
        told = given(hf, ("num_key_value_heads",), heads)
        if told != heads:
            raise refuse("num_key_value_heads", told, f"must be {heads} with multi_query={single}")
        return {"num_kv_heads": heads}

    return Custom(
        ("multi_query", "num_key_value_heads"),
        reader,
        lambda config: {"multi_query": config.num_kv_heads == 1},
    )


def four_times_width(name: str = "") -> Custom:
    """BLOOM, MPT: the MLP is four times as wide as the model; a field, if any, says nothing else."""

    def reader(hf: Json, fields: Fields) -> Fields:
        width = 4 * fields["embed_dim"]
        if name and given(hf, (name,), width) != width:
            raise refuse(name, hf[name], f"is not supported; transformers makes it {width}")
        return {"mlp_dim": width}

    return Custom((name,) if name else (), reader, lambda config: {})


BLOOM_SIZES: tuple[Rule, ...] = (
    Number("vocab_size", "vocab_size"),
    Number("hidden_size", "embed_dim", aliases=("n_embed",)),
    Number("n_layer", "num_layers", aliases=("num_hidden_layers",), most=MOST_LAYERS),
    Number("n_head", "num_heads", aliases=("num_attention_heads",)),
    Number("seq_length", "max_seq_len", 2048),  # not read by transformers: ALiBi has no limit
    Number("layer_norm_epsilon", "norm_eps", 1e-5, float),
    derived_head_dim(),
    one_kv_head_each(),
    four_times_width("n_inner"),
)

FALCON_SIZES: tuple[Rule, ...] = (
    Number("vocab_size", "vocab_size"),
    Number("hidden_size", "embed_dim", aliases=("n_embed",)),
    Number("num_hidden_layers", "num_layers", aliases=("n_layer",), most=MOST_LAYERS),
    Number("num_attention_heads", "num_heads", aliases=("n_head",)),
    Number("ffn_hidden_size", "mlp_dim", lambda fields: 4 * fields["embed_dim"]),
    Number("max_position_embeddings", "max_seq_len", 2048),
    derived_head_dim(),
)


def falcon_heads() -> Custom:
    """Falcon's flags for block form and key-value heads, whose meaning depends on each other.

    The old decoder (7B, RW) has one key-value head or one for each query head, whatever
    num_kv_heads says if multi_query is set; the new one (40B) has num_kv_heads groups.
    """
    names = (
        "new_decoder_architecture", "multi_query", "parallel_attn", "num_kv_heads",
        "num_ln_in_parallel_attn",
    )  # fmt: skip

    def reader(hf: Json, fields: Fields) -> Fields:
        new, single, parallel = (
            given(hf, (name,), default)
            for name, default in zip(names, (False, True, True), strict=False)
        )
        N = fields["num_heads"]
        K = number("num_kv_heads", given(hf, ("num_kv_heads",), N), int)
        norms = given(hf, ("num_ln_in_parallel_attn",), 2 if new else 1)
        if norms not in ((1, 2) if new else (1,)):
            raise refuse("num_ln_in_parallel_attn", norms, "fits no decoder of transformers")
        if new and not parallel:
            raise refuse(
                "parallel_attn", parallel, "is not supported with new_decoder_architecture"
            )
        if not new and not single and K != N:
            raise refuse("num_kv_heads", K, f"must be {N} with multi_query=False")
        if norms == 2:
            residual = "parallel_two_norms"
        else:
            residual = "parallel_one_norm" if new or parallel else "sequential"
        return {"num_kv_heads": K if new or not single else 1, "residual": residual}

    def writer(config: ModelConfig) -> dict[str, Any]:
        N, K = config.num_heads, config.num_kv_heads
        new = config.residual == "parallel_two_norms" or K not in (1, N)
        return {
            "new_decoder_architecture": new,
            "multi_query": K == 1,
            "parallel_attn": config.residual != "sequential",
            "num_kv_heads": K,
            "num_ln_in_parallel_attn": (2 if config.residual == "parallel_two_norms" else 1)
            if new
            else None,
        }

    return Custom(names, reader, writer)


MPT_SIZES: tuple[Rule, ...] = (
    Number("vocab_size", "vocab_size"),
    Number("d_model", "embed_dim", aliases=("hidden_size",)),
    Number("n_layers", "num_layers", aliases=("num_hidden_layers",), most=MOST_LAYERS),
    Number("n_heads", "num_heads", aliases=("num_attention_heads",)),
    Number("max_seq_len", "max_seq_len"),
    Number("layer_norm_epsilon", "norm_eps", 1e-5, float),
    derived_head_dim(),
    one_kv_head_each(),
    four_times_width(),
    only("expansion_ratio", 4),
    only("no_bias", True),
    only("logit_scale", None),
    only("embedding_fraction", 1.0),
)


def mpt_attention() -> Custom:
    """MPT's `attn_config`, and the two names of its norm.

    transformers does not read alibi_bias_max (it takes 8) nor qk_ln (it has none); we follow the
    first as the model's authors do, and refuse the second.
    """
    fixed = {
        "attn_type": "multihead_attention", "prefix_lm": False, "qk_ln": False,
        "attn_uses_sequence_id": False, "alibi": True,
    }  # fmt: skip
    unread = (*NO_MATHS, "attn_impl")

    def reader(hf: Json, fields: Fields) -> Fields:
        said = given(hf, ("attn_config",), {})
        if not isinstance(said, Mapping):
            raise refuse("attn_config", said, "must be an object")
        for name, value in said.items():
            if name in fixed and value not in (None, fixed[name]):
                raise refuse(
                    f"attn_config.{name}", value, f"is not supported; it must be {fixed[name]!r}"
                )
            known = (*fixed, *unread, "clip_qkv", "softmax_scale", "alibi_bias_max")
            if name not in known and value:
                raise refuse(f"attn_config.{name}", value, "is not known and may change the maths")
        norm = given(hf, ("norm_type",), "layernorm")
        if norm not in ("low_precision_layernorm", "layernorm"):
            raise refuse("norm_type", norm, "is not supported; it must be layernorm")
        largest = number("attn_config.alibi_bias_max", given(said, ("alibi_bias_max",), 8), float)
        get: Callable[[str], float] = lambda name: number(name, given(said, (name,), 0.0), float)  # noqa: E731
        return {
            "alibi": Alibi(max=largest),
            "qkv_clip": get("clip_qkv"),
            "attention_scale": get("softmax_scale"),
        }

    def writer(config: ModelConfig) -> dict[str, Any]:
        largest = config.alibi.max
        said = {
            **fixed,
            "clip_qkv": config.qkv_clip or None,
            "softmax_scale": config.attention_scale or None,
            "alibi_bias_max": int(largest) if largest == int(largest) else largest,
        }
        return {"attn_config": said, "norm_type": "low_precision_layernorm"}

    return Custom(("attn_config", "norm_type"), reader, writer)
