"""What the tests of the plan ask about."""

import dataclasses
from typing import Any

from configs.pretrain_7b_gpu import LLAMA_2_7B as LLAMA_2_7B
from llm_jax.model import ModelConfig
from llm_jax.plan import Request
from llm_jax.sharding import MeshConfig
from llm_jax.train import OptimizerConfig, StepConfig

SMALL = ModelConfig(
    vocab_size=4096,
    embed_dim=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=704,
    max_seq_len=512,
)


def ask(
    model: ModelConfig = SMALL,
    *,
    batch_size: int = 32,
    seq_len: int = 512,
    micro_batches: int = 1,
    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1),
    **switches: Any,
) -> Request:
    return Request(
        model=dataclasses.replace(model, **switches),
        step=StepConfig(batch_size=batch_size, micro_batches=micro_batches),
        optimizer=OptimizerConfig(),
        mesh=mesh,
        seq_len=seq_len,
        steps=1000,
    )
