"""Pretrain a 125M model (GPT-3 small's shape, with RoPE, RMS norm and SwiGLU) on one multi-GPU host.

Run:     llm-jax data prepare --tokenizer TOKENIZER --output data/main --source en=PATH --source zh=PATH
         llm-jax pretrain configs/pretrain_125m.py --data.prepared data/main
Expect:  134,105,856 parameters, 1.6 GB of parameters and optimizer state over all devices (both checked by
         tests/test_configs.py). 2.5 billion tokens, about the compute-optimal 20 a parameter. One H200
         did 377,000 tokens a second, 29 % MFU, in micro-batches of 64 (tools/results/h200.md).
"""

from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataConfig
from llm_jax.model import ModelConfig
from llm_jax.run.parts import BEST_METRIC
from llm_jax.run.pretrain import PretrainConfig
from llm_jax.sharding import MeshConfig
from llm_jax.train import OptimizerConfig, StepConfig, TrainConfig


def config() -> PretrainConfig:
    """125M: every device holds all parameters and its share of the batch."""
    return PretrainConfig(
        run="runs/125m",
        model=ModelConfig(
            vocab_size=32_000,
            embed_dim=768,
            num_layers=12,
            num_heads=12,
            num_kv_heads=12,
            head_dim=64,
            mlp_dim=2048,
            max_seq_len=2048,
            dtype="bfloat16",
        ),
        data=DataConfig(prepared="data/main", seq_len=2048, workers=2),
        optimizer=OptimizerConfig(peak_lr=6e-4, warmup_steps=200),
        step=StepConfig(batch_size=256, micro_batches=4, z_loss=1e-4),
        train=TrainConfig(steps=4_800, eval_every_steps=500, sample_every_steps=500),
        mesh=MeshConfig(data=-1, fsdp=1, tensor=1),
        checkpoint=CheckpointConfig(save_every_steps=500, best_metric=BEST_METRIC),
    )
