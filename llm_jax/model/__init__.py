"""The decoder, in a narrow pure-functional dialect of Flax Linen.

1. Only the `params` collection: no mutable state, no hidden random numbers.
2. The KV cache is an argument and a return value.
3. Names of parameters and submodules are always given: they are a file format.
4. Each parameter is declared with shape, logical axes and initialiser on one line.
5. Nothing outside model/ sees a module instance; the functions below are the whole surface.

Shape letters, everywhere in the project: B batch, T query time, S key time, D embed, F mlp, N query
heads, K kv heads, G = N/K, H head dim, V vocab, L layers.
"""

from llm_jax.model.api import (
    Params,
    abstract_params,
    count_adapters,
    count_params,
    flops_per_token,
    forward,
    head_weights,
    hidden_states,
    init_params,
    logical_axes,
)
from llm_jax.model.attention import attention_choice
from llm_jax.model.cache import KVCache, init_cache
from llm_jax.model.config import PROJECTIONS, Alibi, Local, Lora, ModelConfig, RopeScaling
from llm_jax.model.lora import adapters_of, is_adapter, join, merge, unmerge, without_adapters
from llm_jax.model.scoring import LossSums, target_loss, target_nats

__all__ = [
    "PROJECTIONS",
    "Alibi",
    "KVCache",
    "Local",
    "Lora",
    "LossSums",
    "ModelConfig",
    "Params",
    "RopeScaling",
    "abstract_params",
    "adapters_of",
    "attention_choice",
    "count_adapters",
    "count_params",
    "flops_per_token",
    "forward",
    "head_weights",
    "hidden_states",
    "init_cache",
    "init_params",
    "is_adapter",
    "join",
    "logical_axes",
    "merge",
    "target_loss",
    "target_nats",
    "unmerge",
    "without_adapters",
]
