"""The families: for each what is always so, and the rules for the rest. The page to read.

Sources: the configurations and models of transformers 5.24, and the papers named in `ModelConfig`.
"""

from typing import Any, NamedTuple

from llm_jax.model.config import Alibi
from llm_jax.model.families import special
from llm_jax.model.families.rope import rope, rotary_dim
from llm_jax.model.families.rules import (
    MOST_LAYERS,
    Fields,
    Maybe,
    Number,
    Option,
    Rule,
    activation,
    derived_head_dim,
    flag,
    heads,
    one_kv_head_each,
    only,
    split_width,
)


class Family(NamedTuple):
    """What is always so in a family, and how the rest is said."""

    architecture: str  # the class of transformers
    always: Fields
    rules: tuple[Rule, ...]
    no_maths: tuple[str, ...] = ()  # fields of its own that change nothing


def tied(default: bool) -> Option:
    """Whether the output head is the embedding."""
    on, off = {"tied_embeddings": True}, {"tied_embeddings": False}
    return flag("tie_word_embeddings", default, on, off)


def biased(name: str, default: bool = False, **more: Any) -> Option:
    """A flag for biases of all four projections, and of what else is named in `more`."""
    on = {"attention_bias": "qkvo", **dict.fromkeys(more, True)}
    off = {"attention_bias": "none", **dict.fromkeys(more, False)}
    return flag(name, default, on, off)


# names as most families have them since Llama
WIDTHS = (
    Number("vocab_size", "vocab_size"),
    Number("hidden_size", "embed_dim"),
    Number("num_hidden_layers", "num_layers", most=MOST_LAYERS),
    Number("num_attention_heads", "num_heads"),
    Number("intermediate_size", "mlp_dim"),
    Number("max_position_embeddings", "max_seq_len"),
)
SIZES = (
    *WIDTHS,
    Number("num_key_value_heads", "num_kv_heads", heads),
    Number("head_dim", "head_dim", split_width),
)
# and as they were in GPT-2
GPT2_SIZES = (
    Number("vocab_size", "vocab_size"),
    Number("n_embd", "embed_dim", aliases=("hidden_size",)),
    Number("n_layer", "num_layers", aliases=("num_hidden_layers",), most=MOST_LAYERS),
    Number("n_head", "num_heads", aliases=("num_attention_heads",)),
    Number("n_positions", "max_seq_len", aliases=("max_position_embeddings", "n_ctx")),
    Number("n_inner", "mlp_dim", lambda fields: 4 * fields["embed_dim"]),
    Number("layer_norm_epsilon", "norm_eps", 1e-5, float),
    derived_head_dim(),
)
RMS_EPS = Number("rms_norm_eps", "norm_eps", 1e-6, float)

GATED_RMS: Fields = {"norm": "rms", "mlp": "gated"}
PLAIN_LAYER: Fields = {"norm": "layer", "mlp": "plain"}
UNSCALED = flag("scale_attn_weights", True, {"attention_scale": 0.0}, {"attention_scale": 1.0})

BIASED: Fields = {"attention_bias": "qkvo", "mlp_bias": True}
PARALLEL = ({"residual": "parallel_one_norm"}, {"residual": "sequential"})
LAYER_EPS = Number("layer_norm_eps", "norm_eps", 1e-5, float)
GEMMA: Fields = {"norm": "rms_plus_one", "mlp": "gated"}
GEMMA_RULES: tuple[Rule, ...] = (
    *SIZES,
    RMS_EPS,
    special.sqrt_embedding(),
    tied(True),
    biased("attention_bias"),
    only("use_bidirectional_attention", False),
)
SANDWICH_RULES: tuple[Rule, ...] = (
    *GEMMA_RULES,
    activation("hidden_activation", "gelu_pytorch_tanh", "hidden_act"),
    special.query_scalar(256),
)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        GATED_RMS,
        (
            *SIZES, RMS_EPS, rope(), activation("hidden_act", "silu"), tied(False),
            biased("attention_bias"), flag("mlp_bias", False, {"mlp_bias": True}, {"mlp_bias": False}),
        ),
        ("pretraining_tp", "rope_interleaved"),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        GATED_RMS,
        (
            *SIZES, RMS_EPS, rope(), activation("hidden_act", "silu"), tied(False),
            special.window_everywhere(default=4096),
        ),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {**GATED_RMS, "attention_bias": "qkv"},
        (
            *SIZES, RMS_EPS, rope(), activation("hidden_act", "silu"), tied(False),
            special.window_from_a_layer(), only("use_mrope", False),
        ),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**GATED_RMS, "qk_norm": "head"},
        (
            *SIZES, RMS_EPS, rope(), activation("hidden_act", "silu"), tied(False),
            biased("attention_bias"), special.window_from_a_layer(),
        ),
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {**PLAIN_LAYER, **BIASED, "position": "learned"},
        (
            *GPT2_SIZES, activation("activation_function", "gelu_new"), tied(True), UNSCALED,
            one_kv_head_each(), only("scale_attn_by_inverse_layer_idx", False),
            only("add_cross_attention", False),
        ),
        ("reorder_and_upcast_attn",),
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        {**PLAIN_LAYER, "mlp_bias": True},
        (
            *WIDTHS, derived_head_dim(), one_kv_head_each(), LAYER_EPS,
            activation("hidden_act", "gelu"), tied(False), biased("attention_bias", True),
            flag("use_parallel_residual", True, {"residual": "parallel_two_norms"}, PARALLEL[1]),
            rope(
                fraction=0.25,
                theta_names=("rotary_emb_base", "rope_theta"),
                fraction_names=("rotary_pct", "partial_rotary_factor"),
            ),
        ),
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        GEMMA,
        (*GEMMA_RULES, rope(), special.gemma_activation()),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {**GEMMA, "norm_placement": "both"},
        (
            *SANDWICH_RULES, special.window_by_pattern(full_every=2), rope(),
            Maybe("attn_logit_softcapping", "attention_soft_cap", 50.0),
            Maybe("final_logit_softcapping", "logit_soft_cap", 30.0),
        ),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {**GEMMA, "norm_placement": "both", "qk_norm": "head"},
        (
            *SANDWICH_RULES, special.window_by_pattern(full_every=6), rope(by_layer=True),
            only("attn_logit_softcapping", None),  # transformers has the field but does not cap
            Maybe("final_logit_softcapping", "logit_soft_cap"),
        ),
    ),
    "bloom": Family(
        "BloomForCausalLM",
        {
            **PLAIN_LAYER, **BIASED, "position": "alibi", "embedding_norm": True,
            "activation": "gelu_tanh",
        },
        (
            *special.BLOOM_SIZES, tied(True),
            flag(
                "apply_residual_connection_post_layernorm", False, {"residual": "from_norm"},
                {"residual": "sequential"},
            ),
        ),
        (
            "masked_softmax_fusion", "bias_dropout_fusion", "attention_softmax_in_fp32",
            "skip_bias_add", "skip_bias_add_qkv", "offset_alibi", "pretraining_tp", "slow_but_exact",
        ),
    ),
    "falcon": Family(
        "FalconForCausalLM",
        PLAIN_LAYER,
        (
            *special.FALCON_SIZES, Number("layer_norm_epsilon", "norm_eps", 1e-5, float),
            activation("activation", "gelu"), tied(True), biased("bias", mlp_bias=True),
            special.falcon_heads(), rope(),
            only("apply_residual_connection_post_layernorm", False),
            flag(
                "alibi", False, {"position": "alibi", "alibi": Alibi(scaled=True)},
                {"position": "rope"},
            ),
        ),
    ),
    "mpt": Family(
        "MptForCausalLM",
        {
            "norm": "layer_no_bias", "mlp": "plain", "activation": "gelu", "position": "alibi",
        },
        (*special.MPT_SIZES, tied(True), special.mpt_attention()),
        ("learned_pos_emb", "init_config", "init_device", "verbose", "tokenizer_name"),
    ),
    "gptj": Family(
        "GPTJForCausalLM",
        {
            **PLAIN_LAYER, **PARALLEL[0], "mlp_bias": True, "head_bias": True,
            "rope_pairing": "interleaved",
        },
        (
            *GPT2_SIZES, one_kv_head_each(), rotary_dim(), tied(False),
            activation("activation_function", "gelu_new"), only("scale_attn_weights", True),
            only("rotary", True),
        ),
    ),
    "gpt_bigcode": Family(
        "GPTBigCodeForCausalLM",
        {**PLAIN_LAYER, **BIASED, "position": "learned"},
        (
            *GPT2_SIZES, special.multi_query(), tied(True), UNSCALED,
            activation("activation_function", "gelu_pytorch_tanh"),
            only("add_cross_attention", False),
        ),
        (
            "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "inference_runner",
            "max_batch_size", "max_sequence_length", "pad_key_length", "pre_allocate_kv_cache",
            "validate_runner_input",
        ),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {**GATED_RMS, "norm_placement": "output", "qk_norm": "whole"},
        (
            *SIZES, Number("rms_norm_eps", "norm_eps", 1e-5, float), rope(),
            activation("hidden_act", "silu"), tied(False), biased("attention_bias"),
        ),
    ),
    "phi": Family(
        "PhiForCausalLM",
        {**PLAIN_LAYER, **BIASED, **PARALLEL[0], "head_bias": True},
        (
            *SIZES, LAYER_EPS, rope(fraction=0.5), activation("hidden_act", "gelu_new"), tied(False),
            flag("qk_layernorm", False, {"qk_norm": "head"}, {"qk_norm": "none"}),
        ),
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        {"norm": "layer", "mlp": "gated"},
        (
            *SIZES, LAYER_EPS, rope(fraction=0.25), activation("hidden_act", "silu"), tied(False),
            flag("use_qkv_bias", False, {"attention_bias": "qkv"}, {"attention_bias": "none"}),
            flag("qk_layernorm", False, {"qk_norm": "each_head"}, {"qk_norm": "none"}),
            flag("use_parallel_residual", False, *PARALLEL),
        ),
    ),
    "starcoder2": Family(
        "Starcoder2ForCausalLM",
        PLAIN_LAYER,
        (
            *SIZES, Number("norm_epsilon", "norm_eps", 1e-5, float), rope(), tied(True),
            activation("hidden_act", "gelu_pytorch_tanh"), biased("use_bias", True, mlp_bias=True),
            special.window_everywhere(default=None), only("mlp_type", "default"),
            only("norm_type", "layer_norm"), only("scale_attn_weights", True),
        ),
        (  # in published files; transformers does not read them
            "activation_function", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32",
            "layer_norm_epsilon",
        ),
    ),
    "cohere": Family(
        "CohereForCausalLM",
        {
            "norm": "layer_no_bias", "mlp": "gated", **PARALLEL[0], "rope_pairing": "interleaved",
        },
        (
            *SIZES, LAYER_EPS, rope(theta=500_000.0), activation("hidden_act", "silu"), tied(True),
            biased("attention_bias"), Number("logit_scale", "logit_multiplier", 0.0625, float),
            flag("use_qk_norm", False, {"qk_norm": "each_head"}, {"qk_norm": "none"}),
        ),
        ("pretraining_tp",),
    ),
    "granite": Family(
        "GraniteForCausalLM",
        GATED_RMS,
        (
            *SIZES, RMS_EPS, rope(), activation("hidden_act", "silu"), tied(False),
            biased("attention_bias"), flag("mlp_bias", False, {"mlp_bias": True}, {"mlp_bias": False}),
            Number("embedding_multiplier", "embedding_multiplier", 1.0, float),
            Number("residual_multiplier", "residual_multiplier", 1.0, float),
            special.attention_multiplier(), special.logits_divisor(),
        ),
    ),
}  # fmt: skip
