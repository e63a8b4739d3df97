"""Reads a config.json into a `ModelConfig`, writes one back, and finds a family for any config."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from llm_jax.config import nearest
from llm_jax.errors import ConfigError
from llm_jax.model.config import Alibi, Local, ModelConfig, RopeScaling
from llm_jax.model.families.rules import NO_MATHS, Fields, Maybe, Number, find_pattern, refuse
from llm_jax.model.families.table import FAMILIES, Family

# ours -> the names that families have for it, where a rule of its own kind reads it
ROTARY = {
    "rope_theta": ("rotary_emb_base", "rope_theta"),
    "rope_fraction": ("rotary_pct", "partial_rotary_factor", "rotary_dim"),
    "rope_scaling": ("rope_scaling", "rope_parameters"),
}


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
    if not isinstance(name, str):
        raise refuse("model_type", name, "must be the name of a family, such as 'llama'")
    family = FAMILIES.get(name)
    if family is None:
        raise ConfigError(
            f"config.json: model_type={name!r} is not a family this decoder covers; "
            f"{nearest(name, list(FAMILIES))}"
        )
    if hf.get("quantization_config") is not None:
        raise refuse(
            "quantization_config",
            hf["quantization_config"],
            "says that the weights are quantised, which is not supported; dequantise the model first "
            "(model.dequantize() and model.save_pretrained(FOLDER) in transformers)",
        )
    known = {n for rule in family.rules for n in rule.names} | NO_MATHS | set(family.no_maths)
    for field, value in hf.items():
        if field not in known and value is not None:
            raise ConfigError(
                f"config.json: {field}={str(value)[:60]!r} is not known for {name} and may change the "
                "maths; delete the field if it does not"
            )
    fields: Fields = dict(family.always)
    try:
        for rule in family.rules:
            fields.update(rule.read(hf, fields))
        return name, ModelConfig(**fields)
    except ConfigError as error:
        raise ConfigError(_in_their_words(str(error), family, hf)) from None


def _in_their_words(told: str, family: Family, hf: Mapping[str, Any]) -> str:
    """A message about `model.norm_eps` as one about `rms_norm_eps`, the name in this file."""
    theirs = {r.field: r.names for r in family.rules if isinstance(r, Number | Maybe)}
    names = [name for rule in family.rules for name in rule.names]
    for field, some in ROTARY.items():
        theirs[field] = tuple(name for name in some if name in names)

    def spelled(found: re.Match[str]) -> str:
        known = theirs.get(found[1])
        return next((n for n in known if n in hf), known[0]) if known else found[0]

    about_ours = told.startswith("model.")
    told = re.sub(r"model\.(\w+)", spelled, told)
    if hf.get("rope_scaling") and not hf.get("rope_parameters"):
        told = told.replace("rope_parameters", "rope_scaling")
    return f"config.json: {told}" if about_ours else told


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
