"""Tunes all parameters of a 7B model (Llama-2-7B's shape) on a TPU pod slice of 64 chips or more.

Run:     llm-jax import HF_DIR /mnt/runs/base
         llm-jax data conversations --tokenizer /mnt/runs/base/tokenizer --source talk=/mnt/talk --template llama2
             --seq-len 4096 --workers 16 --output /mnt/data/talk
         on every host: llm-jax instruct configs/instruct_7b_tpu.py --init-from /mnt/runs/base
             --data.prepared /mnt/data/talk --run /mnt/runs/7b-tuned
         (shared folders; JAX finds the hosts of the slice by itself)
Expect:  the base's 6,738,415,616 parameters, 80.9 GB of parameters and optimizer state over all devices
         (both checked by tests/test_configs.py): 1.3 GB each on 64. Template llama2 needs no new rows.
         Speed and quality on TPUs are not measured yet.
"""

import dataclasses

from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataConfig
from llm_jax.run.instruct import InstructConfig
from llm_jax.run.parts import BEST_METRIC
from llm_jax.run.pretrain import AS_BASE
from llm_jax.sharding import MeshConfig
from llm_jax.train import OptimizerConfig, StepConfig, TrainConfig


def config() -> InstructConfig:
    """Half a million tokens a step, two epochs of some 500 million tokens."""
    return InstructConfig(
        run="runs/7b-tuned",
        init_from="runs/base",
        model=dataclasses.replace(AS_BASE, dtype="bfloat16", remat="full"),
        data=DataConfig(prepared="data/talk", seq_len=4096, packing="whole", workers=8),
        optimizer=OptimizerConfig(peak_lr=1e-5, warmup_steps=60, weight_decay=0.0),
        step=StepConfig(batch_size=128),
        train=TrainConfig(steps=2000, eval_every_steps=200, sample_every_steps=500),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
        checkpoint=CheckpointConfig(save_every_steps=200, best_metric=BEST_METRIC),
    )
