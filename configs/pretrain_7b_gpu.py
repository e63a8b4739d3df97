"""Pretrain a 7B model (Llama-2-7B's shape) on one host with 8 GPUs of 80 GB or more.

Run:     llm-jax pretrain configs/pretrain_7b_gpu.py --data.prepared data/main
Expect:  6,738,415,616 parameters, 80.9 GB of parameters and optimizer state over all devices (both checked by
         tests/test_configs.py): 10.1 GB each on 8. Speed and loss on GPUs are not measured yet.
"""

from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataConfig
from llm_jax.model import ModelConfig
from llm_jax.run.parts import BEST_METRIC
from llm_jax.run.pretrain import PretrainConfig
from llm_jax.sharding import MeshConfig
from llm_jax.train import OptimizerConfig, StepConfig, TrainConfig

LLAMA_2_7B = ModelConfig(
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
)


def config() -> PretrainConfig:
    """7B on 8 GPUs: fully sharded, every layer recomputed in backward."""
    return PretrainConfig(
        run="runs/7b",
        model=LLAMA_2_7B,
        data=DataConfig(prepared="data/main", seq_len=4096, workers=4),
        optimizer=OptimizerConfig(peak_lr=3e-4, warmup_steps=2000),
        step=StepConfig(batch_size=256, micro_batches=16, z_loss=1e-4),
        train=TrainConfig(steps=130_000, eval_every_steps=2000, sample_every_steps=2000),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
        checkpoint=CheckpointConfig(save_every_steps=1000, best_metric=BEST_METRIC),
    )
