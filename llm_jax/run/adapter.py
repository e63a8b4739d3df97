"""Adapters alone, to and from PEFT: `llm-jax export MODEL OUT --adapter`, `llm-jax import MODEL OUT --adapter PEFT_DIR`.

Both leave a folder behind only when what was written has been read again and is the same.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_jax.config import to_dict
from llm_jax.errors import ConfigError
from llm_jax.run.import_model import PARITY

if TYPE_CHECKING:
    from llm_jax.api import Model
    from llm_jax.checkpoint.parity import Report

MAX_DIFFERENCE = (
    1e-6  # of products A B, relative to the largest; scales and ranks may be written otherwise
)


def export_adapter(model: "Model", out: Path) -> "Report":
    """Writes the adapters of `model` as the folder `out`, which PEFT puts on the exported base.

    Raises:
      ConfigError: it has none, other parameters were trained besides, or `out` exists.
    """
    from llm_jax.checkpoint import making, read_meta, write_json_atomic
    from llm_jax.checkpoint.adapter import read_adapter, write_adapter
    from llm_jax.checkpoint.hf_export import choose_family
    from llm_jax.checkpoint.parity import Report
    from llm_jax.model import adapters_of

    if not model.config.lora.rank:
        raise ConfigError(f"{model.path}: has no adapters; export it without --adapter")
    meta = read_meta(model.path)
    first = meta.get("continuation", {}).get("first_new_row")
    if first:
        raise ConfigError(
            f"{model.path}: its vocabulary was extended (from row {first} on), which PEFT's format does not "
            "hold; export it without --adapter, merged"
        )
    adapters = adapters_of(model.params)["layers"]
    bare = model.merged().config
    family = choose_family(meta, bare)
    with making(out) as partial:
        partial.mkdir()
        said = write_adapter(partial, adapters, family, model.config)
        report = Report("export adapter", {"family": family, "model": model.path})
        report.passed("tensors", modules=said["target_modules"], rank=said["r"])
        lora, again = read_adapter(partial, family, bare)
        worst = _difference(adapters, model.config.lora.scale, again, lora.scale)
        report.require("round_trip", worst <= MAX_DIFFERENCE, f"products differ by {worst:.1e}")
        report.passed("round_trip", max_relative=worst)
        write_json_atomic(partial / PARITY, report.to_dict())
    return report


def import_adapter(folder: Path, base: str, out: Path) -> "Report":
    """Makes the model folder `out`: the model `base` with the adapter of `folder` on it, not merged.

    Raises:
      CheckpointError, ConfigError: it cannot be read, or does not fit; `out` is not there.
    """
    import jax.numpy as jnp

    from llm_jax import load
    from llm_jax.checkpoint import inspect, making, read_meta, write_json_atomic, write_model
    from llm_jax.checkpoint.adapter import read_adapter
    from llm_jax.checkpoint.hf_export import choose_family
    from llm_jax.checkpoint.parity import Report
    from llm_jax.model import join

    with making(out) as partial:
        model = load(base).merged()
        meta = read_meta(model.path)
        family = choose_family(meta, model.config)
        lora, layers = read_adapter(folder, family, model.config)
        config = dataclasses.replace(model.config, lora=lora)
        adapters = {g: {n: jnp.asarray(x) for n, x in part.items()} for g, part in layers.items()}
        report = Report("import adapter", {"family": family, "source": folder.name})
        report.passed("tensors", targets=list(lora.targets), rank=lora.rank, scale=lora.scale)
        kept = {key: meta[key] for key in ("tokenizer_fingerprint", "hf") if key in meta}
        made: dict[str, Any] = {
            "config": {"model": to_dict(config)}, **kept, "family": family,
            "source": {"folder": model.path, "adapter": folder.name},
        }  # fmt: skip
        files = model.own_tokenizer.files if model.own_tokenizer else {}
        write_model(partial, out, join(model.params, {"layers": adapters}), made, files)
        for found in inspect(partial):
            report.require("round_trip", not found.problem, f"{found.item}: {found.problem}")
        report.passed("round_trip", bitwise=True)
        write_json_atomic(partial / PARITY, report.to_dict())
    return report


def _difference(ours: Any, scale: float, theirs: Any, their_scale: float) -> float:
    """The largest difference between scale A B of two trees, over the largest value."""
    worst, largest = 0.0, 0.0
    for group, part in ours.items():
        for name in part:
            if name.endswith("_lora_a"):
                target = name.removesuffix("_lora_a")
                one, other = (
                    _products(tree[group], target, factor)
                    for tree, factor in ((ours, scale), (theirs, their_scale))
                )
                worst = max(worst, float(np.abs(one - other).max()))
                largest = max(largest, float(np.abs(one).max()))
    return worst / largest if largest else worst


def _products(group: Any, target: str, factor: float) -> np.ndarray:
    """factor A B of every layer, float64."""
    a, b = (np.asarray(group[f"{target}_lora_{x}"], np.float64) for x in "ab")
    layers, rank = b.shape[:2]
    return factor * (a.reshape(layers, -1, rank) @ b.reshape(layers, rank, -1))
