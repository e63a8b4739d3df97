"""Pretrain a 1B model (Llama-3.2-1B's shape, 4:1 grouped-query attention) on one multi-GPU host.

Run:     llm-jax pretrain configs/pretrain_1b.py --data.prepared data/main
Expect:  1,104,218,112 parameters, 13.3 GB of parameters and optimizer state over all devices (both checked by
         tests/test_configs.py): 1.7 GB each on 8. 21 billion tokens. One H200 did 68,000 tokens a
         second, 49 % MFU, in micro-batches of 16 (tools/results/h200.md).
"""

from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataConfig
from llm_jax.model import ModelConfig
from llm_jax.run.parts import BEST_METRIC
from llm_jax.run.pretrain import PretrainConfig
from llm_jax.sharding import MeshConfig
from llm_jax.train import OptimizerConfig, StepConfig, TrainConfig


def config() -> PretrainConfig:
    """1B: parameters and optimizer state split over the devices of the host."""
    return PretrainConfig(
        run="runs/1b",
        model=ModelConfig(
            vocab_size=32_000,
            embed_dim=2048,
            num_layers=16,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            mlp_dim=8192,
            max_seq_len=4096,
            rope_theta=500_000.0,
            dtype="bfloat16",
            remat="dots",
        ),
        data=DataConfig(prepared="data/main", seq_len=4096, workers=4),
        optimizer=OptimizerConfig(peak_lr=4e-4, warmup_steps=1000, schedule="wsd"),
        step=StepConfig(batch_size=256, micro_batches=4, z_loss=1e-4),
        train=TrainConfig(steps=20_000, eval_every_steps=1000, sample_every_steps=1000),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
        checkpoint=CheckpointConfig(save_every_steps=1000, best_metric=BEST_METRIC),
    )
