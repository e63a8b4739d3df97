"""Reading and writing config.json: what is said differently, and what is refused by name."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from llm_jax.checkpoint import names
from llm_jax.errors import ConfigError
from llm_jax.model import Alibi, Local, ModelConfig, RopeScaling, count_params, families
from llm_jax.model.families.rules import find_pattern
from tests.model.family_cases import CASES
from tests.tiny import BLOOM, GPT2, GPTJ, LLAMA, NEOX

LLAMA_JSON = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip


def config_of(changes, base=LLAMA_JSON):
    return families.read({**base, **changes})[1]


def plain(family, **changes):
    """config.json of a family, as this project writes it."""
    _, settings = CASES["falcon-7b" if family == "falcon" else family]
    return {"model_type": family, **settings, **changes}


def test_a_plain_llama_is_the_tiny_one():
    assert families.read(LLAMA_JSON) == ("llama", LLAMA)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"auto_map": {"AutoModel": "modeling_x.X"}}, "auto_map names code"),
        ({"model_type": "lama"}, "model_type='lama' is not a family.*llama"),
        ({"model_type": ["llama"]}, "model_type=.*must be the name of a family, such as 'llama'"),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size='32' must be a number"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5 must be a whole number"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000 must be at most 1024"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be finite"),
        (
            {"num_key_value_heads": 3},
            "^config.json: num_attention_heads=4 must be a multiple of num_key_value_heads=3",
        ),
        ({"rms_norm_eps": -1}, "^config.json: rms_norm_eps=-1.0 must be above 0"),
        ({"head_dim": 7}, "partial_rotary_factor=1.0 of head_dim=7 rotates 7"),
        ({"rope_theta": 0}, "^config.json: rope_theta=0.0 must be above 0"),
        ({"logit_cap": 30.0}, "logit_cap='30.0' is not known for llama"),
        ({"sliding_window": 8}, "sliding_window='8' is not known"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* dequantise the model"),
        ({"hidden_act": "mish"}, "hidden_act='mish' is not supported; it must be 'silu' or"),
        ({"attention_bias": 1}, "attention_bias=1 is not supported; it must be True or False"),
        ({"rope_scaling": {"rope_type": "ntk2", "factor": 2.0}}, "rope_type='ntk2'.*one of default"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing for rope_type='linear'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "rope_scaling.beta=1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "^config.json: rope_scaling.factor=0.5 must be"),
        ({"rope_scaling": {"type": ["linear"]}}, r"rope_scaling.type=\['linear'\] is not supported"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\] must be an object"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta=10000.0 disagrees with rope_parameters.rope_theta=500000.0",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not known to this family"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": 1.0, "factor": 4.0}},
            "short_factor=1.0 must be a list",
        ),
    ],
)  # fmt: skip
def test_what_would_change_the_maths_is_refused_in_one_line_that_names_it(changes, told):
    with pytest.raises(ConfigError, match=told) as error:
        config_of(changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt2", {"n_embd": 37}, "a width of 37 must be a multiple of 3 heads"),
        ("gpt2", {"hidden_size": 40}, "are names of one thing and must agree"),
        ("gptj", {"rotary_dim": 13}, "rotary_dim=13 must be 1 to 12"),
        ("gpt_bigcode", {"num_key_value_heads": 3}, "must be 1 with multi_query=True"),
        ("gpt_bigcode", {"multi_query": "yes"}, "multi_query='yes' must be true or false"),
        ("gemma", {"hidden_act": "relu"}, "hidden_act='relu' is not supported for gemma"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types=.*must be a list of 3"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0.0 must be above 0"),
        ("gemma2", {"sliding_window": None}, "sliding_window=None must be a number"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma3_text", {"rope_parameters": {"chunked": {}}}, "rope_parameters.chunked"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types=.*not known for mistral"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ("bloom", {"n_inner": 100}, "n_inner=100 is not supported; transformers makes it 144"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2 fits no decoder"),
        ("falcon", {"multi_query": False, "num_kv_heads": 2}, "num_kv_heads=2 must be 4"),
        (
            "falcon", {"new_decoder_architecture": True, "parallel_attn": False},
            "parallel_attn=False is not supported",
        ),
        ("mpt", {"attn_config": {"qk_ln": True}}, "attn_config.qk_ln=True is not supported"),
        ("mpt", {"attn_config": {"alibi": False}}, "attn_config.alibi=False"),
        ("mpt", {"attn_config": {"rope": True}}, "attn_config.rope=True is not known"),
        ("mpt", {"norm_type": "rmsnorm"}, "norm_type='rmsnorm'"),
        ("mpt", {"no_bias": False}, "no_bias=False"),
        ("mpt", {"expansion_ratio": 2}, "expansion_ratio=2"),
        ("mpt", {"logit_scale": "inv_sqrt_d_model"}, "logit_scale='inv_sqrt_d_model'"),
        ("granite", {"logits_scaling": 0}, "logits_scaling=0.0 must be above 0"),
        ("starcoder2", {"norm_type": "rms"}, "norm_type='rms'"),
    ],
)  # fmt: skip
def test_each_family_refuses_what_its_decoder_would_do_otherwise(family, changes, told):
    with pytest.raises(ConfigError, match=told):
        families.read(plain(family, **changes))


def test_fields_that_do_not_touch_the_maths_and_nulls_are_taken():
    changes = {"torch_dtype": "bfloat16", "bos_token_id": 1, "pretraining_tp": 1, "novelty": None}
    assert config_of(changes) == LLAMA


def test_old_and_new_rope_fields_say_the_same():
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **numbers}}
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **numbers}}
    assert config_of(old) == config_of(new)
    assert config_of(old).rope_scaling == RopeScaling(
        kind="llama3", factor=8.0, original_max_seq_len=64
    )
    phi3 = {"rope_scaling": {"type": "yarn"}, "original_max_position_embeddings": 16}
    assert config_of(phi3).rope_scaling == RopeScaling(
        kind="yarn", factor=4.0, original_max_seq_len=16
    )


# published files, shortened to what their families read or must know to skip
PUBLISHED = {
    "gpt2": {
        "activation_function": "gelu_new", "attn_pdrop": 0.1, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "summary_type": "cls_index", "task_specific_params": {"text": 1},
        "vocab_size": 50257,
    },
    "gpt_neox": {
        "hidden_act": "gelu", "hidden_size": 512, "intermediate_size": 2048, "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "num_attention_heads": 8, "num_hidden_layers": 6,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
        "use_parallel_residual": True, "vocab_size": 50304,
    },
    "falcon": {
        "alibi": False, "apply_residual_connection_post_layernorm": False, "bias": False,
        "hidden_dropout": 0.0, "hidden_size": 4544, "layer_norm_epsilon": 1e-5, "multi_query": True,
        "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32,
        "parallel_attn": True, "vocab_size": 65024,
    },
    "starcoder2": {
        "activation_function": "gelu", "attention_softmax_in_fp32": True,
        "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072, "intermediate_size": 12288,
        "layer_norm_epsilon": 1e-5, "max_position_embeddings": 16384, "mlp_type": "default",
        "norm_epsilon": 1e-5, "norm_type": "layer_norm", "num_attention_heads": 24,
        "num_hidden_layers": 30, "num_key_value_heads": 2, "rope_theta": 999999.4420358813,
        "scale_attn_weights": True, "sliding_window": 4096, "use_bias": True, "vocab_size": 49152,
    },
}  # fmt: skip
COUNTS = {
    "gpt2": 124_439_808, "gpt_neox": 70_426_624, "falcon": 6_921_720_704, "starcoder2": 3_030_371_328,
}  # fmt: skip


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_files_are_read_and_have_the_published_number_of_parameters(family):
    """GPT-2, Pythia-70M, Falcon-7B, StarCoder2-3B."""
    _, config = families.read({"model_type": family, **PUBLISHED[family]})
    assert count_params(config) == COUNTS[family]


def test_tensors_are_taken_apart_as_views_of_any_type_and_joined_bit_for_bit():
    _, config = families.read(plain("falcon", num_kv_heads=2, new_decoder_architecture=True))
    fused = next(t for t in names.tensors("falcon", config) if len(t.slots) == 3)
    bits = np.random.default_rng(0).integers(0, 2**16, fused.shape, dtype=np.uint16)
    array = bits.view(ml_dtypes.bfloat16)  # NaNs of every kind among them
    parts = fused.split(array)
    assert [slot.path.rsplit("/")[-1] for slot in fused.slots] == ["query", "key", "value"]
    assert [part.shape for part in parts] == [(32, 4, 8), (32, 2, 8), (32, 2, 8)]
    assert all(np.shares_memory(part, array) for part in parts[1:])
    np.testing.assert_array_equal(fused.join(*parts).view(np.uint16), bits)
    # groups of two queries, a key and a value: the second key is row 6 of eight
    np.testing.assert_array_equal(parts[1][:, 1].view(np.uint16), bits.reshape(8, 8, 32)[6].T)


def test_windows_are_read_as_each_family_means_them():
    qwen = plain("qwen2", sliding_window=8, max_window_layers=1, num_hidden_layers=4)
    assert families.read(qwen)[1].local == Local()  # not used
    used = families.read({**qwen, "use_sliding_window": True})[1]
    assert used.local_layers == (False, True, True, True)
    gemma = families.read(plain("gemma3_text", num_hidden_layers=7, sliding_window_pattern=6))[1]
    assert gemma.local_layers == (True,) * 5 + (False, True)
    assert (gemma.rope_theta, gemma.local.rope_theta) == (1e6, 1e4)
    assert families.read(plain("mistral"))[1].local_layers == (True,) * 3
    assert families.read(plain("starcoder2"))[1].local_layers == (False,) * 3


def test_the_simplest_pattern_of_layers_is_found_or_none():
    assert find_pattern([True, False, True, False]) == (0, 2)
    assert find_pattern([False, False, True, True]) == (2, 0)
    assert find_pattern([True, True, False, True]) == (0, 3)
    assert find_pattern([True, False, False, True]) is None
    layer_types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    with pytest.raises(ConfigError, match=r"layer_types=.* follow no pattern"):
        families.read(plain("gemma2", num_hidden_layers=4, layer_types=layer_types))


def test_falcon_ignores_the_number_of_kv_heads_where_the_old_decoder_has_one():
    assert families.read(plain("falcon", num_kv_heads=4))[1].num_kv_heads == 1
    new = families.read(plain("falcon", num_kv_heads=2, new_decoder_architecture=True))[1]
    assert (new.num_kv_heads, new.residual) == (2, "parallel_two_norms")


def test_gemmas_legacy_gelu_is_the_tanh_form():
    assert families.read(plain("gemma", hidden_act="gelu"))[1].activation == "gelu_tanh"


def test_mpts_largest_slope_exponent_is_read_though_transformers_does_not():
    mpt = plain("mpt", attn_config={"alibi_bias_max": 16})
    family, config = families.read(mpt)
    assert config.alibi == Alibi(max=16)
    assert families.write(family, config)["attn_config"]["alibi_bias_max"] == 16


@pytest.mark.parametrize("family", families.FAMILIES)
def test_each_family_finds_its_own_config_in_what_it_writes_and_says_no_token_ids(family):
    _, config = families.read(plain(family))
    written = families.write(family, config)
    assert written["model_type"] == family
    assert len(written["architectures"]) == 1
    assert not [name for name in written if name.endswith("token_id")]
    assert families.canonical(families.read(written)[1]) == families.canonical(config)


def test_a_model_of_our_own_gets_a_family_that_says_all_of_it():
    assert families.family_of(LLAMA) == "llama"
    mine = dataclasses.replace(LLAMA, dtype="bfloat16", remat="full", attention="reference")
    assert families.family_of(mine) == "llama"
    assert families.family_of(dataclasses.replace(LLAMA, attention_bias="qkv")) == "qwen2"
    assert families.family_of(dataclasses.replace(LLAMA, local=Local(window=8))) == "mistral"
    assert families.family_of(dataclasses.replace(LLAMA, qk_norm="whole", norm_placement="output")) == "olmo2"  # fmt: skip
    neox = dataclasses.replace(NEOX, norm="layer", mlp_bias=True, attention_bias="qkvo")
    assert families.family_of(neox) == "gpt_neox"
    for config in (BLOOM, GPT2, GPTJ):
        with pytest.raises(ConfigError, match=r"cannot be exported; for llama: model\.\w+="):
            families.family_of(config)


def test_writing_names_the_setting_a_family_cannot_say():
    with pytest.raises(
        ConfigError, match=r"model\.logit_soft_cap=30.0 cannot be said.* llama model"
    ):
        families.write("llama", dataclasses.replace(LLAMA, logit_soft_cap=30.0))
    with pytest.raises(ConfigError, match=r"model\.mlp_dim=48 cannot be said.* mpt model"):
        families.write("mpt", mpt_like(mlp_dim=48))
    with pytest.raises(ConfigError, match=r"family='lama' is unknown.*llama"):
        families.write("lama", LLAMA)


def mpt_like(**changes) -> ModelConfig:
    _, config = families.read(plain("mpt"))
    return dataclasses.replace(config, **changes)


def test_a_model_a_family_cannot_hold_has_no_names_in_it():
    with pytest.raises(ConfigError, match=r"a llama model has no parameter 'head_bias'"):
        names.tensors("llama", dataclasses.replace(LLAMA, head_bias=True))
    with pytest.raises(ConfigError, match="family='opt' has no table"):
        names.tensors("opt", LLAMA)


def test_every_family_has_names_and_what_saves_without_a_head_leave_out():
    for family in families.FAMILIES:
        _, config = families.read(plain(family))
        prefix = names.base_prefix(family)
        heads = {"lm_head.weight", "lm_head.bias", "embed_out.weight"}
        for tensor in names.tensors(family, config):
            assert tensor.name.startswith(prefix) or tensor.name in heads
