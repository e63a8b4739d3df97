"""Reads a config.json into a `ModelConfig`, writes one back, and finds a family for any config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llm_jax.config import nearest
from llm_jax.errors import ConfigError
from llm_jax.model.config import Alibi, Local, ModelConfig, RopeScaling
from llm_jax.model.families.rules import NO_MATHS, Fields, find_pattern
from llm_jax.model.families.table import FAMILIES


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
