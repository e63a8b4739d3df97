"""Tiny models of every family, said as transformers' settings; weights made from names alone.

What transformers gets of them is compared live (`test_families_oracle`) and stored
(`tools/make_family_goldens.py`, `test_family_goldens`).
"""

import hashlib
from typing import Any

import numpy as np

from llm_jax.checkpoint import names
from llm_jax.model import ModelConfig, Params

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
OLD = {"vocab_size": 61, "n_embd": 36, "n_layer": 3, "n_head": 3, "n_positions": 64}
FALCON = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
NEOX = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 44, "num_hidden_layers": 3,
    "num_attention_heads": 3, "max_position_embeddings": 64,
}  # fmt: skip
MPT = {"vocab_size": 61, "d_model": 36, "n_layers": 3, "n_heads": 3, "max_seq_len": 64}
WINDOWED = {"sliding_window": 5}
ODD = {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 36}
ONE_KV = {"num_key_value_heads": 1}

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {  # with heads of 16 the blend lies between pairs 5 and 7
    "rope_type": "yarn", "rope_theta": 1e2, "factor": 4.0, "original_max_position_embeddings": 4096,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


EPS = {
    **dict.fromkeys(("gpt_neox", "phi", "stablelm", "cohere"), "layer_norm_eps"),
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "olmo2",
            "granite",
        ),
        "rms_norm_eps",
    ),
    "starcoder2": "norm_epsilon",
}


def case(family: str, *settings: dict[str, Any], **more: Any) -> tuple[str, dict[str, Any]]:
    """A family and the settings of one model of it; the norms' epsilon is large enough to tell."""
    out: dict[str, Any] = {EPS.get(family, "layer_norm_epsilon"): 0.05}
    for part in settings:
        out |= part
    return family, out | more


# one model a line: every switch of every family, on and off
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": case("llama", SIZES),
    "llama-biased-tied": case(
        "llama", SIZES, ONE_KV, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama-head-dim-odd": case("llama", SIZES, ODD, head_dim=10),
    "llama-llama3": case("llama", SIZES, rope_parameters=LLAMA3),
    "llama-linear": case("llama", SIZES, rope_parameters=LINEAR),
    "llama-dynamic-short": case("llama", SIZES, rope_parameters=DYNAMIC),
    "llama-dynamic-long": case(
        "llama", SIZES, max_position_embeddings=8, rope_parameters=DYNAMIC
    ),
    "llama-yarn": case("llama", SIZES, head_dim=16, rope_parameters=YARN),
    "llama-yarn-fields": case(
        "llama", SIZES, head_dim=16,
        rope_parameters={**YARN, "beta_fast": 50.0, "beta_slow": 4.0, "truncate": False, "mscale": 0.7,
                         "mscale_all_dim": 1.2},
    ),
    "llama-longrope-short": case(
        "llama", SIZES, rope_parameters={**LONG, "original_max_position_embeddings": 32}
    ),
    "llama-longrope-long": case(
        "llama", SIZES,
        rope_parameters={**LONG, "original_max_position_embeddings": 16, "attention_factor": 1.3},
    ),
    "mistral": case("mistral", SIZES, WINDOWED),
    "mistral-no-window": case("mistral", SIZES, sliding_window=None, tie_word_embeddings=True),
    "qwen2": case("qwen2", SIZES, tie_word_embeddings=True),
    "qwen2-window": case(
        "qwen2", SIZES, WINDOWED, ODD, use_sliding_window=True, max_window_layers=1
    ),
    "qwen3": case("qwen3", SIZES, head_dim=10),
    "qwen3-biased-window": case(
        "qwen3", SIZES, WINDOWED, head_dim=16, attention_bias=True, use_sliding_window=True,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters=YARN,
    ),
    "gpt2": case("gpt2", OLD),
    "gpt2-untied-unscaled": case(
        "gpt2", OLD, tie_word_embeddings=False, scale_attn_weights=False, n_inner=50,
        activation_function="gelu",
    ),
    "gpt_neox": case("gpt_neox", NEOX),
    "gpt_neox-sequential": case(
        "gpt_neox", NEOX, use_parallel_residual=False, attention_bias=False,
        tie_word_embeddings=True, rope_parameters={**LINEAR, "partial_rotary_factor": 0.5},
    ),
    "gemma": case("gemma", SIZES, ONE_KV, head_dim=12),
    "gemma-biased": case("gemma", SIZES, ODD, head_dim=8, attention_bias=True),
    "gemma2": case(
        "gemma2", SIZES, WINDOWED, head_dim=8, query_pre_attn_scalar=20,
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
    ),
    "gemma2-uncapped": case(
        "gemma2", SIZES, WINDOWED, head_dim=8, query_pre_attn_scalar=8,
        attn_logit_softcapping=None, final_logit_softcapping=None, tie_word_embeddings=False,
    ),
    "gemma3_text": case(
        "gemma3_text", SIZES, WINDOWED, head_dim=8, query_pre_attn_scalar=20,
        sliding_window_pattern=2,
    ),
    "gemma3_text-scaled-capped": case(
        "gemma3_text", SIZES, WINDOWED, head_dim=8, num_hidden_layers=7,
        final_logit_softcapping=3.0, rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
        },
    ),
    "bloom": case("bloom", vocab_size=61, hidden_size=36, n_layer=3, n_head=3),
    "bloom-from-norm": case(
        "bloom", vocab_size=61, hidden_size=32, n_layer=3, n_head=4,
        apply_residual_connection_post_layernorm=True, tie_word_embeddings=False,
    ),
    "falcon-7b": case("falcon", FALCON),
    "falcon-7b-biased-untied": case(
        "falcon", FALCON, bias=True, tie_word_embeddings=False, ffn_hidden_size=40
    ),
    "falcon-40b": case("falcon", FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-11b": case(
        "falcon", FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
    "falcon-rw": case(
        "falcon", FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True
    ),
    "mpt": case("mpt", MPT),
    "mpt-clipped-scaled": case(
        "mpt", MPT, n_heads=6, tie_word_embeddings=False,
        attn_config={"clip_qkv": 1.5, "softmax_scale": 0.2},
    ),
    "gptj": case("gptj", OLD, rotary_dim=6),
    "gptj-tied": case("gptj", OLD, rotary_dim=12, tie_word_embeddings=True, n_inner=50),
    "gpt_bigcode": case("gpt_bigcode", OLD),
    "gpt_bigcode-multi-head": case(
        "gpt_bigcode", OLD, multi_query=False, scale_attn_weights=False, tie_word_embeddings=False
    ),
    "olmo2": case("olmo2", SIZES),
    "olmo2-odd-biased": case("olmo2", SIZES, ODD, attention_bias=True, rope_parameters=LINEAR),
    "phi": case("phi", SIZES),
    "phi-qk-norm": case(
        "phi", SIZES, ODD, qk_layernorm=True, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4},
    ),
    "stablelm": case("stablelm", SIZES, use_qkv_bias=True),
    "stablelm-parallel-qk-norm": case(
        "stablelm", SIZES, qk_layernorm=True, use_parallel_residual=True, tie_word_embeddings=True
    ),
    "starcoder2": case("starcoder2", SIZES),
    "starcoder2-window": case(
        "starcoder2", SIZES, WINDOWED, ODD, use_bias=False, tie_word_embeddings=False
    ),
    "cohere": case("cohere", SIZES),
    "cohere-qk-norm": case(
        "cohere", SIZES, use_qk_norm=True, attention_bias=True, logit_scale=0.3,
        tie_word_embeddings=False,
    ),
    "granite": case(
        "granite", SIZES, embedding_multiplier=3.0, residual_multiplier=0.4,
        attention_multiplier=0.2, logits_scaling=7.0,
    ),
    "granite-biased": case(
        "granite", SIZES, ONE_KV, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
        rope_parameters=LLAMA3,
    ),
}  # fmt: skip


# documents of one row, and of another in which two are packed; longer than the windows, and on both
# sides of the lengths that dynamic and longrope look at
DOCUMENTS = tuple(
    np.random.default_rng(length).integers(0, 61, length, dtype=np.int32) for length in (19, 8, 11)
)
COMPARED = 2  # positions of each document whose logits are stored, the last ones


def random_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor's values from its name alone, so large that every switch of a tiny model matters.

    Scales of norms are moved from 1 (0 where they are added to 1) and biases from 0.
    """
    rng = np.random.default_rng(list(name.encode()))
    is_scale = (name.endswith("weight") and len(shape) == 1) or "q_norm" in name or "k_norm" in name
    values = rng.standard_normal(shape, np.float32) * np.float32(0.3)
    return values + np.float32(1) if is_scale else values


def tensor_digest(shapes: dict[str, tuple[int, ...]]) -> str:
    """A short name for a set of tensors: their names and shapes."""
    lines = [f"{name} {list(shape)}" for name, shape in sorted(shapes.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def as_params(
    family: str, config: ModelConfig, weights: dict[str, np.ndarray]
) -> tuple[Params, set[str]]:
    """Our parameters from theirs, through the table of names, and the names that it did not use."""
    flat = {
        path: np.full(shape, np.nan, np.float32)
        for path, shape in names.parameter_shapes(config).items()
    }
    left = set(weights)
    for tensor in names.tensors(family, config):
        array = weights[tensor.name]
        left.remove(tensor.name)  # raises when it is used twice
        assert array.shape == tensor.shape, tensor.name
        for slot, part in zip(tensor.slots, tensor.split(array), strict=True):
            place = flat[slot.path]
            for index in (slot.layer, slot.head):
                place = place if index is None else place[index]
            assert place.shape == part.shape, tensor.name
            assert np.isnan(place).all(), f"{slot} is filled twice"
            place[...] = part
    params: Params = {}
    for path, array in flat.items():
        assert not np.isnan(array).any(), f"{path} is not filled"
        *folders, leaf = path.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = array
    return params, left
