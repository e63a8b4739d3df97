"""Our parameters as safetensors files that transformers loads, one tensor in memory at a time."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.checkpoint import names
from llm_jax.checkpoint.fingerprint import named_leaves
from llm_jax.checkpoint.hf_import import lead
from llm_jax.checkpoint.safetensors_files import DTYPES, ShardWriter
from llm_jax.errors import CheckpointError, ConfigError
from llm_jax.model import ModelConfig, Params, families, logical_axes

WRITABLE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
LARGEST_FLOAT16 = 65504.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """How a model is written."""

    dtype: str = ""  # float32, bfloat16 or float16; empty: that of the parameters
    max_shard_bytes: int = 5_000_000_000  # of one file; a larger tensor gets a file of its own

    def __post_init__(self) -> None:
        if self.dtype and self.dtype not in WRITABLE:
            raise ConfigError(f"dtype={self.dtype!r} must be one of {', '.join(WRITABLE)}")
        if self.max_shard_bytes < 1:
            raise ConfigError(f"max_shard_bytes={self.max_shard_bytes} must be at least 1")


def choose_family(meta: Mapping[str, Any], config: ModelConfig) -> str:
    """The family that the model came from, or one that can say its config.

    Raises:
      ConfigError: no family of transformers has this combination of switches.
    """
    family = meta.get("family")
    if isinstance(family, str) and family in families.FAMILIES:
        try:
            families.write(family, config)
        except ConfigError:  # changed since it was imported
            return families.family_of(config)
        return family
    return families.family_of(config)


def trimmed(params: Params, config: ModelConfig, rows: int) -> tuple[Params, ModelConfig]:
    """The model with the first `rows` of the vocabulary; the others are padding."""
    if rows == config.vocab_size:
        return params, config

    def cut(leaf: Any, axes: tuple[str | None, ...]) -> Any:
        kept = tuple(slice(rows) if axis == "vocab" else slice(None) for axis in axes)
        return leaf[kept] if "vocab" in axes else leaf

    smaller = jax.tree.map(cut, params, logical_axes(config))
    return smaller, dataclasses.replace(config, vocab_size=rows)


def write_weights(
    folder: Path, params: Params, family: str, config: ModelConfig, settings: ExportConfig
) -> list[str]:
    """Writes the tensors and returns the names of the files.

    Args:
      folder: an existing one.
      params: the parameters, on any devices of this process.
      family: whose names and layouts.
      config: the model's.
      settings: dtype and size of the files.

    Raises:
      CheckpointError: a value does not fit float16.
    """
    dtype = settings.dtype or config.param_dtype
    leaves = named_leaves(params)
    tensors = names.tensors(family, config)
    planned = {tensor.name: (WRITABLE[dtype], tensor.shape) for tensor in tensors}
    writer = ShardWriter(folder, planned, settings.max_shard_bytes)
    try:
        for tensor in tensors:
            parts = [
                _converted(leaves[slot.path][lead(slot)], dtype, tensor.name)
                for slot in tensor.slots
            ]
            writer.write(tensor.name, tensor.join(*parts))
        writer.close()
    finally:
        writer.abandon()
    return writer.files


def _converted(part: jax.Array, dtype: str, name: str) -> np.ndarray:
    """On the host, in `dtype`."""
    if dtype == "float16" and float(jnp.max(jnp.abs(part), initial=0.0)) > LARGEST_FLOAT16:
        raise CheckpointError(
            f"{name}: holds values above {LARGEST_FLOAT16:,.0f}, which float16 does not have; "
            "export with --dtype bfloat16 or float32"
        )
    return np.asarray(part).astype(DTYPES[WRITABLE[dtype]], copy=False)
