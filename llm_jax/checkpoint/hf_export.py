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


def write_weights(
    folder: Path,
    params: Params,
    family: str,
    config: ModelConfig,
    rows: int,
    settings: ExportConfig,
) -> list[str]:
    """Writes the tensors and returns the names of the files.

    Args:
      folder: an existing one.
      params: the parameters, on any devices of this process.
      family: whose names and layouts.
      config: the model's.
      rows: of the vocabulary that are kept; the rest is padding.
      settings: dtype and size of the files.

    Raises:
      CheckpointError: a value does not fit float16.
    """
    dtype = settings.dtype or config.param_dtype
    trimmed = dataclasses.replace(config, vocab_size=rows)
    leaves, axes = named_leaves(params), axis_names(config)
    tensors = names.tensors(family, trimmed)
    planned = {tensor.name: (WRITABLE[dtype], tensor.shape) for tensor in tensors}
    writer = ShardWriter(folder, planned, settings.max_shard_bytes)
    try:
        for tensor in tensors:
            parts = []
            for slot in tensor.slots:
                part = leaves[slot.path][lead(slot)]
                kept = tuple(
                    slice(rows) if axis == "vocab" else slice(None)
                    for axis in axes[slot.path][len(lead(slot)) :]
                )
                parts.append(_converted(part[kept], dtype, tensor.name))
            writer.write(tensor.name, tensor.join(*parts))
        writer.close()
    finally:
        writer.abandon()
    return writer.files


def axis_names(config: ModelConfig) -> dict[str, tuple[str | None, ...]]:
    """Path -> logical axes of each parameter."""
    tree = logical_axes(config)
    is_names = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_names)
    return {"/".join(str(key.key) for key in path): axes for path, axes in found}


def _converted(part: jax.Array, dtype: str, name: str) -> np.ndarray:
    """On the host, in `dtype`."""
    if dtype == "float16" and float(jnp.max(jnp.abs(part), initial=0.0)) > LARGEST_FLOAT16:
        raise CheckpointError(
            f"{name}: holds values above {LARGEST_FLOAT16:,.0f}, which float16 does not have; "
            "export with --dtype bfloat16 or float32"
        )
    return np.asarray(part).astype(DTYPES[WRITABLE[dtype]], copy=False)
