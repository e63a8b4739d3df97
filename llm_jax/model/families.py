"""A Hugging Face `config.json` as a `ModelConfig` and back, for every family the decoder covers.

One decoder, many families: a family is no code but a list of rules (`family_rules`), so what a family
is can be read off this page. What a rule does not know is refused by name, never ignored: a field that
changed the maths unseen would give a fluent model with wrong logits.

Sources: the configurations and models of transformers 5.24, the papers named in `ModelConfig`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from llm_jax.config import nearest
from llm_jax.errors import ConfigError
from llm_jax.model.config import Alibi, Local, ModelConfig, RopeScaling
from llm_jax.model.family_rope import rope
from llm_jax.model.family_rules import (
    Fields,
    Number,
    Option,
    Rule,
    activation,
    derived_head_dim,
    flag,
    find_pattern,
    heads,
    one_kv_head_each,
    only,
    split_width,
)

# Fields that no forward pass of a text decoder in inference reads: names, ids, dropout, initialisers,
# how to generate, other heads than the language model's.
NO_MATHS = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype _name_or_path name_or_path
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    attn_pdrop embd_pdrop resid_pdrop emb_pdrop attention_dropout hidden_dropout residual_dropout
    embedding_dropout classifier_dropout dropout initializer_range use_cache gradient_checkpointing
    task_specific_params id2label label2id num_labels problem_type finetuning_task
    return_dict output_attentions output_hidden_states use_return_dict tokenizer_class
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    is_encoder_decoder is_decoder chunk_size_feed_forward cache_implementation
    attn_implementation _attn_implementation _attn_implementation_autoset attention_implementation
    use_flash_attention_2 _commit_hash initializer_factor
    """.split()
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
    Number("num_hidden_layers", "num_layers"),
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
    Number("n_layer", "num_layers", aliases=("num_hidden_layers",)),
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
    "gpt2": Family(
        "GPT2LMHeadModel",
        {**PLAIN_LAYER, "position": "learned", "attention_bias": "qkvo", "mlp_bias": True},
        (
            *GPT2_SIZES, activation("activation_function", "gelu_new"), tied(True), UNSCALED,
            one_kv_head_each(),
            only("scale_attn_by_inverse_layer_idx", False), only("add_cross_attention", False),
        ),
        ("reorder_and_upcast_attn",),
    ),
}  # fmt: skip


def read(hf: Mapping[str, Any]) -> tuple[str, ModelConfig]:
    """The family (model_type) and settings that a Hugging Face config.json describes.

    Raises:
      ConfigError: the family is unknown, a field is missing, or a field says, or may say, something
        that this decoder does not do; in one line that names it.
    """
    if hf.get("auto_map") is not None:
        raise ConfigError(
            "config.json: auto_map names code that would come with the model and is never run; "
            "if transformers' own class is meant, delete the field"
        )
    name = hf.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None or not isinstance(name, str):
        hint = nearest(name, list(FAMILIES)) if isinstance(name, str) else ""
        raise ConfigError(
            f"config.json: model_type={name!r} is not a family this decoder covers; {hint}"
        )
    known = {n for rule in family.rules for n in rule.names} | NO_MATHS | set(family.no_maths)
    for field, value in hf.items():
        if field not in known and value is not None:
            raise ConfigError(
                f"config.json: {field}={str(value)[:60]!r} is not known for {name} and may change the "
                "maths; delete the field if it does not"
            )
    fields: Fields = dict(family.always)
    for rule in family.rules:
        fields.update(rule.read(hf, fields))
    return name, ModelConfig(**fields)


def write(family: str, config: ModelConfig) -> dict[str, Any]:
    """What transformers loads as this model, without token ids. `read` gives the same maths back.

    Raises:
      ConfigError: the family is unknown, or cannot say one of the settings, which is named.
    """
    if family not in FAMILIES:
        raise ConfigError(f"family={family!r} is unknown; {nearest(family, list(FAMILIES))}")
    out: dict[str, Any] = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
    }
    for rule in FAMILIES[family].rules:
        out.update(rule.write(config))
    back, wanted = canonical(read(out)[1]), canonical(config)
    for name, value in vars(wanted).items():
        if vars(back)[name] != value:
            raise ConfigError(
                f"model.{name}={value!r} cannot be said in the config.json of a {family} model, "
                f"which has {vars(back)[name]!r}"
            )
    return out


def family_of(config: ModelConfig) -> str:
    """A family that says all of this config, the most common first; for models of our own.

    Raises:
      ConfigError: no family does.
    """
    objections = {}
    for family in FAMILIES:
        try:
            write(family, config)
        except ConfigError as error:
            objections[family] = str(error)
        else:
            return family
    raise ConfigError(
        "no family of transformers has this combination of settings, so the model cannot be exported; "
        f"for llama: {objections['llama']}"
    )


def canonical(config: ModelConfig) -> ModelConfig:
    """The config with what does not change the maths, or says nothing here, at its default."""
    changes: Fields = {"dtype": "float32", "param_dtype": "float32", "remat": "none"}
    changes["attention"] = "auto"
    if config.attention_scale == config.head_dim**-0.5:
        changes["attention_scale"] = 0.0
    scaling = config.rope_scaling
    if config.position != "rope":
        changes |= {"rope_theta": 10_000.0, "rope_fraction": 1.0, "rope_pairing": "half"}
        changes["rope_scaling"] = RopeScaling()
    elif scaling.kind == "none":
        changes["rope_scaling"] = RopeScaling()
    elif scaling.kind == "linear":
        changes["rope_scaling"] = RopeScaling(kind="linear", factor=scaling.factor)
    if config.position == "rope":
        changes["rope_fraction"] = config.rotary_dim / config.head_dim
    if config.position != "alibi":
        changes["alibi"] = Alibi()
    if not any(config.local_layers):
        changes["local"] = Local()
    elif pattern := find_pattern(list(config.local_layers)):
        changes["local"] = dataclasses.replace(config.local, **pattern._asdict())
    return dataclasses.replace(config, **changes)
