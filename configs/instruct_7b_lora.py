"""Tunes adapters of rank 16 on all projections of a 7B model (Llama-2-7B's shape), on one host with 8 GPUs.

Run:     llm-jax import HF_DIR runs/base
         llm-jax data conversations --tokenizer runs/base/tokenizer --source talk=talks.jsonl --template llama2
             --seq-len 4096 --workers 4 --output data/talk
         llm-jax instruct configs/instruct_7b_lora.py --init-from runs/base --data.prepared data/talk --run runs/7b-lora
         llm-jax export runs/7b-lora 7b-lora-hf          # merged; --adapter writes the adapters alone, for PEFT
Expect:  6,778,392,576 parameters, 39,976,960 of them trained (0.59 %), 14.0 GB of parameters and optimizer state
         over all devices (all three checked by tests/test_configs.py): the frozen ones are bfloat16, adapters and
         their moments float32. Speed and quality on GPUs are not measured yet.
"""

import dataclasses

from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataConfig
from llm_jax.model import Lora
from llm_jax.run.instruct import InstructConfig
from llm_jax.run.parts import BEST_METRIC
from llm_jax.run.pretrain import AS_BASE
from llm_jax.sharding import MeshConfig
from llm_jax.train import OptimizerConfig, StepConfig, TrainConfig


def config() -> InstructConfig:
    """A learning rate ten times that of full tuning, as is usual for adapters; the base in half the memory."""
    adapted = dataclasses.replace(
        AS_BASE,
        dtype="bfloat16",
        param_dtype="bfloat16",
        remat="full",
        lora=Lora(rank=16, rank_stabilised=True),
    )
    return InstructConfig(
        run="runs/7b-lora",
        init_from="runs/base",
        model=adapted,
        data=DataConfig(prepared="data/talk", seq_len=4096, packing="whole", workers=4),
        optimizer=OptimizerConfig(peak_lr=2e-4, warmup_steps=60, weight_decay=0.0),
        step=StepConfig(batch_size=64, micro_batches=4),
        train=TrainConfig(steps=2000, eval_every_steps=200, sample_every_steps=500),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
        checkpoint=CheckpointConfig(save_every_steps=200, best_metric=BEST_METRIC),
    )
