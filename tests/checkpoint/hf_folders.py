"""Hugging Face folders made without transformers: tiny random weights under the names of a family."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from llm_jax.checkpoint import names
from llm_jax.model import families

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 336, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "vocab_size": 300, "n_embd": 36, "n_layer": 2, "n_head": 3, "n_positions": 64,
}  # fmt: skip


def weights(config: dict[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random tensors by name, of the size that keeps activations near one."""
    draw = np.random.default_rng(0)
    family, ours = families.read(config)
    made = {}
    for tensor in names.tensors(family, ours):
        fan_in = 30.0 if len(tensor.shape) > 1 else 1.0
        made[tensor.name] = (draw.standard_normal(tensor.shape) / fan_in**0.5).astype(dtype)
    return made


def write(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray] | None = None,
    shards: int = 1,
    dtype: Any = np.float32,
) -> dict[str, np.ndarray]:
    """A model folder; returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = weights(config, dtype) if tensors is None else tensors
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return tensors
    placed = {}
    for part in range(shards):
        file = f"model-{part + 1:05}-of-{shards:05}.safetensors"
        chosen = dict(list(tensors.items())[part::shards])
        save_file(chosen, folder / file, {"format": "pt"})
        placed |= dict.fromkeys(chosen, file)
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def read(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, by the library that everyone uses."""
    from safetensors.numpy import load_file

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    """The same names, dtypes, shapes and bits."""
    return first.keys() == second.keys() and all(
        (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        for a, b in ((first[name], second[name]) for name in first)
    )


BFLOAT16 = ml_dtypes.bfloat16
