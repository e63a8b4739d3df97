"""Rotary settings of a Hugging Face `config.json`, old style and new, both ways.

Old: `rope_theta`, `rope_scaling`, `partial_rotary_factor` at the top. New (transformers 5): all in
`rope_parameters`, for Gemma 3 once per kind of layer. Both are read; both are written, so that older
readers of the file find what they look for.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from llm_jax.errors import ConfigError
from llm_jax.model.config import Local, ModelConfig, RopeScaling
from llm_jax.model.families.rules import (
    Custom,
    Fields,
    Json,
    fraction_of,
    given,
    number,
    refuse,
)

# What each kind may say besides itself; anything else would change the angles and is refused.
FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
    "yarn": (
        "factor", "attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim",
        "original_max_position_embeddings",
    ),
    "longrope": (
        "factor", "attention_factor", "short_factor", "long_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip
KINDS = {"default": "none", **{kind: kind for kind in FIELDS if kind != "default"}}
ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def rope(
    *,
    theta: float = 10_000.0,
    fraction: float = 0.0,  # default share; 0: the family rotates whole heads
    theta_names: tuple[str, ...] = ("rope_theta",),
    fraction_names: tuple[str, ...] = ("partial_rotary_factor",),
    by_layer: bool = False,  # Gemma 3: local layers have a theta of their own
) -> Custom:
    """The rule of a rotary family, with what transformers takes where config.json says nothing."""
    names = (
        *theta_names, *fraction_names, "rope_scaling", "rope_parameters",
        "original_max_position_embeddings",
    )  # fmt: skip

    def reader(hf: Json, fields: Fields) -> Fields:
        if by_layer:
            return _read_by_layer(hf, fields)
        said = _one(hf, ("rope_scaling", "rope_parameters"))
        found = {"rope_theta": _theta(hf, said, theta_names, theta)}
        share = given(
            {**hf, **_some(said, "partial_rotary_factor")}, fraction_names, fraction or 1.0
        )
        share = number(fraction_names[0], share, float)
        if not fraction and share != 1:
            raise refuse(fraction_names[0], share, "is not known to this family; it must be 1")
        scaling = read_scaling(said, hf, fields)
        return {**found, "rope_fraction": share, "rope_scaling": scaling}

    def writer(config: ModelConfig) -> dict[str, Any]:
        if by_layer:
            return _write_by_layer(config)
        said: dict[str, Any] = write_scaling(config)
        said["rope_theta"] = config.rope_theta
        out: dict[str, Any] = {theta_names[0]: config.rope_theta}
        if fraction:
            said["partial_rotary_factor"] = out[fraction_names[0]] = config.rope_fraction
        if config.rope_scaling.kind != "none":
            out["rope_scaling"] = dict(said)
        return {**out, "rope_parameters": said}

    extra = ("rope_local_base_freq",) if by_layer else ()
    return Custom((*names, *extra), reader, writer)


def rotary_dim() -> Custom:
    """GPT-J: the number of rotated dimensions, where others give their share."""

    def reader(hf: Json, fields: Fields) -> Fields:
        size = number("rotary_dim", given(hf, ("rotary_dim",), 64), int)
        if not 0 < size <= fields["head_dim"]:
            raise refuse(
                "rotary_dim", size, f"must be 1 to {fields['head_dim']}, the size of a head"
            )
        return {"rope_fraction": fraction_of(size, fields["head_dim"])}

    return Custom(("rotary_dim",), reader, lambda config: {"rotary_dim": config.rotary_dim})


def read_scaling(said: Json, hf: Json, fields: Fields) -> RopeScaling:
    """One dict of rotary parameters as RopeScaling.

    Raises:
      ConfigError: the kind or a field of it is not known, or a number is missing.
    """
    name = "rope_type" if "rope_type" in said else "type"
    kind = said.get(name, "default")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise refuse(
            f"rope_parameters.{name}",
            kind,
            f"is not supported; it must be one of {', '.join(FIELDS)}",
        )
    for name, value in said.items():
        if name not in (*ALWAYS, *FIELDS[kind]) and value is not None:
            raise refuse(f"rope_parameters.{name}", value, f"is not known for rope_type={kind!r}")
    if kind == "default":
        return RopeScaling()
    context = fields["max_seq_len"]
    original = given(hf, ("original_max_position_embeddings",), None)
    original = original or given(said, ("original_max_position_embeddings",), context)
    original = number("original_max_position_embeddings", original, int)
    by_ratio = context / original if kind in ("yarn", "longrope") and original else None
    factor = given(said, ("factor",), by_ratio)
    if factor is None:
        raise ConfigError(f"config.json: rope_parameters.factor is missing for rope_type={kind!r}")
    out: Fields = {"kind": KINDS[kind], "factor": number("rope_parameters.factor", factor, float)}
    if kind != "linear":
        out["original_max_seq_len"] = original
    names = {"low_freq_factor": "low_frequency_factor", "high_freq_factor": "high_frequency_factor"}
    if kind == "yarn":
        names = {"beta_fast": "beta_fast", "beta_slow": "beta_slow"}
        out["truncate"] = given(said, ("truncate",), True)
    if kind in ("yarn", "longrope"):
        names = {**names, "attention_factor": "attention_factor"}
    for theirs, ours in names.items():
        if said.get(theirs) is not None:
            out[ours] = number(f"rope_parameters.{theirs}", said[theirs], float)
    if kind == "yarn" and "attention_factor" not in out:
        out["attention_factor"] = _yarn_attention_factor(said, out["factor"])
    if kind == "longrope":
        out["short_factors"], out["long_factors"] = (
            _list(said, f"{n}_factor") for n in ("short", "long")
        )
    return RopeScaling(**out)


def write_scaling(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_scaling`."""
    scaling = config.rope_scaling
    kind = "default" if scaling.kind == "none" else scaling.kind
    ours = {
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
        "attention_factor": scaling.attention_factor or None,
        "short_factor": list(scaling.short_factors),
        "long_factor": list(scaling.long_factors),
    }
    said = {name: ours[name] for name in FIELDS[kind] if ours.get(name) is not None}
    return {"rope_type": kind, **said}


def _yarn_attention_factor(said: Json, factor: float) -> float:
    """DeepSeek's two multipliers of YaRN's temperature, in one number; 0: neither is set."""
    scales = [said.get(name) for name in ("mscale", "mscale_all_dim")]
    if not all(scales):
        return 0.0
    above, below = (0.1 * number("mscale", s, float) * math.log(max(factor, 1)) + 1 for s in scales)
    return above / below


def _list(said: Json, name: str) -> tuple[float, ...]:
    values = said.get(name)
    if not isinstance(values, list):
        raise refuse(f"rope_parameters.{name}", values, "must be a list of numbers")
    return tuple(number(f"rope_parameters.{name}", value, float) for value in values)


def _one(hf: Json, names: tuple[str, ...]) -> Json:
    """The dict under one of the names; {} if there is none. As transformers, the first wins."""
    for name in names:
        said = hf.get(name)
        if said is not None and not isinstance(said, Mapping):
            raise refuse(name, said, "must be an object")
        if said:
            return said
    return {}


def _some(said: Json, name: str) -> Fields:
    return {name: said[name]} if said.get(name) is not None else {}


def _theta(hf: Json, said: Json, names: tuple[str, ...], default: float) -> float:
    """Raises ConfigError where old style and new disagree."""
    inside, outside = said.get("rope_theta"), given(hf, names, None)
    if inside is not None and outside is not None and inside != outside:
        raise refuse(names[0], outside, f"disagrees with rope_parameters.rope_theta={inside}")
    value = inside if inside is not None else outside
    return number(names[0], default if value is None else value, float)


def _read_by_layer(hf: Json, fields: Fields) -> Fields:
    """Gemma 3: full layers, local layers."""
    said = _one(hf, ("rope_parameters",))
    for name in said:
        if name not in ("full_attention", "sliding_attention"):
            raise refuse(f"rope_parameters.{name}", said[name], "must name a kind of layer")
    full, near = dict(_one(said, ("full_attention",))), _one(said, ("sliding_attention",))
    full.update(_one(hf, ("rope_scaling",)))
    if read_scaling(near, hf, fields).kind != "none":
        raise refuse("rope_parameters.sliding_attention", near, "must have rope_type 'default'")
    theta = _theta(hf, full, ("rope_theta",), 1_000_000.0)
    near_theta = _theta(hf, near, ("rope_local_base_freq",), 10_000.0)
    scaling, local = read_scaling(full, hf, fields), fields["local"]
    if not local.window or (scaling.kind == "none" and near_theta == theta):
        near_theta = 0.0
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "local": dataclasses.replace(local, rope_theta=near_theta),
    }


def _write_by_layer(config: ModelConfig) -> dict[str, Any]:
    local: Local = config.local
    full = {**write_scaling(config), "rope_theta": config.rope_theta}
    near = {"rope_type": "default", "rope_theta": local.rope_theta or config.rope_theta}
    out = {"rope_theta": config.rope_theta, "rope_local_base_freq": near["rope_theta"]}
    if config.rope_scaling.kind != "none":
        out["rope_scaling"] = write_scaling(config)
    return {**out, "rope_parameters": {"full_attention": full, "sliding_attention": near}}
