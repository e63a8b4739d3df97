"""Pretrain a 7B model (Llama-2-7B's shape) on a TPU pod slice of 64 chips or more, such as v5p-128.

Run:     on every host: llm-jax pretrain configs/pretrain_7b_tpu.py --data.prepared /mnt/data/main --run /mnt/runs/7b
         (a shared folder; JAX finds the hosts of the slice by itself)
Expect:  6,738,415,616 parameters, 80.9 GB of parameters and optimizer state over all devices (both checked by
         tests/test_configs.py): 1.3 GB each on 64. Speed and loss on TPUs are not measured yet.
"""

from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataConfig
from llm_jax.model import ModelConfig
from llm_jax.run.parts import BEST_METRIC
from llm_jax.run.pretrain import PretrainConfig
from llm_jax.sharding import MeshConfig
from llm_jax.train import OptimizerConfig, StepConfig, TrainConfig


def config() -> PretrainConfig:
    """7B on a pod slice: 4 million tokens a step, tensor parallelism off while fsdp still scales."""
    return PretrainConfig(
        run="runs/7b-tpu",
        model=ModelConfig(
            vocab_size=32_000,
            embed_dim=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
            mlp_dim=11_008,
            max_seq_len=4096,
            dtype="bfloat16",
            remat="full",
        ),
        data=DataConfig(prepared="data/main", seq_len=4096, workers=8),
        optimizer=OptimizerConfig(peak_lr=3e-4, warmup_steps=2000),
        step=StepConfig(batch_size=1024, z_loss=1e-4),
        train=TrainConfig(steps=32_000, eval_every_steps=1000),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
        checkpoint=CheckpointConfig(save_every_steps=500, best_metric=BEST_METRIC),
    )
