"""Adapters (LoRA, 2106.09685) as parameters: their names, merging them into the weights and taking them out.

The forward pass adds scale (x A) B beside x W (`layers.add_adapter`) and never holds a merged copy of W. Beside
`query` [L, D, N, H] stand `query_lora_a` [L, D, R] and `query_lora_b` [L, R, N, H]; of `out`, which sums over two
axes, A is [L, N, H, R].
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from llm_jax.model.config import Lora, ModelConfig

A, B = "_lora_a", "_lora_b"  # ends of their names


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name (the last part of its path) belongs to an adapter."""
    return name.endswith((A, B))


def adapters_of(params: dict[str, Any]) -> dict[str, Any]:
    """The adapters alone, as a tree of the same paths; empty if there are none."""
    return _filter(params, keep_adapters=True)


def without_adapters(
    params: dict[str, Any], config: ModelConfig
) -> tuple[dict[str, Any], ModelConfig]:
    """The model below the adapters: its parameters, not copied, and its config."""
    return _filter(params, keep_adapters=False), dataclasses.replace(config, lora=Lora())


def merge(params: dict[str, Any], config: ModelConfig) -> tuple[dict[str, Any], ModelConfig]:
    """The same maths without adapters: every W becomes W + scale A B, summed in float32, in W's dtype."""
    base, bare = without_adapters(params, config)
    return _add(base, adapters_of(params), config.lora.scale if config.lora.rank else 0.0), bare


def unmerge(
    params: dict[str, Any], adapters: dict[str, Any], config: ModelConfig
) -> dict[str, Any]:
    """Undoes `merge`, but for the rounding of two sums: the weights below the adapters, and these.

    Args:
      params: merged.
      adapters: as `adapters_of` gave them before.
      config: of the model with adapters.
    """
    return join(_add(params, adapters, -config.lora.scale), adapters)


def join(params: dict[str, Any], adapters: dict[str, Any]) -> dict[str, Any]:
    """The model's parameters and its adapters in one tree."""
    joined = dict(params)
    for name, value in adapters.items():
        joined[name] = join(params[name], value) if isinstance(value, dict) else value
    return joined


def _filter(params: dict[str, Any], keep_adapters: bool) -> dict[str, Any]:
    found = {}
    for name, value in params.items():
        if isinstance(value, dict):
            inner = _filter(value, keep_adapters)
            if inner:
                found[name] = inner
        elif is_adapter(name) == keep_adapters:
            found[name] = value
    return found


def _add(params: dict[str, Any], adapters: dict[str, Any], factor: float) -> dict[str, Any]:
    """Every W with an adapter plus factor A B."""
    summed = dict(params)
    for name, value in adapters.items():
        if isinstance(value, dict):
            summed[name] = _add(params[name], value, factor)
        elif name.endswith(A):
            target = name.removesuffix(A)
            w, b = params[target], adapters[target + B]
            L, R = b.shape[:2]
            product = jnp.matmul(value.reshape(L, -1, R), b.reshape(L, R, -1), precision="highest")
            total = w.astype(jnp.float32) + factor * product.reshape(w.shape)
            summed[target] = total.astype(w.dtype)
    return summed
