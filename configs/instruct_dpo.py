"""Preferences after instruction tuning: DPO on pairs of a better and a worse answer, on one host with 8 GPUs.

Run:     llm-jax data conversations --format preference --tokenizer runs/zh-tuned/tokenizer --template base
             --source pairs=pairs.jsonl --seq-len 2048 --output data/pairs
         llm-jax instruct configs/instruct_dpo.py --init-from runs/zh-tuned --data.prepared data/pairs --run runs/zh-dpo
         llm-jax eval runs/zh-dpo --tasks tasks.jsonl --against runs/zh-tuned
Expect:  loss 0.693 at the first step (the model is its own reference); held out before it and every 100 steps: loss,
         share of pairs whose better answer wins, its lead in rewards, bits per character of the better answers. What
         DPO does to a small model is measured: tools/results/sft.md. With --model.lora.rank 16 and ten times the
         learning rate the reference takes no memory of its own; --method simpo (and 5 times the rate) needs none.
"""

from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataConfig
from llm_jax.run.instruct import InstructConfig
from llm_jax.run.parts import SampleConfig
from llm_jax.sharding import MeshConfig
from llm_jax.train import OptimizerConfig, PreferenceConfig, StepConfig, TrainConfig


def config() -> InstructConfig:
    """A learning rate 40 times below that of tuning, as in the paper; the smallest held-out loss is kept."""
    return InstructConfig(
        run="runs/zh-dpo",
        init_from="runs/zh-tuned",
        method="dpo",
        preference=PreferenceConfig(beta=0.1),
        data=DataConfig(prepared="data/pairs", seq_len=2048, packing="whole"),
        optimizer=OptimizerConfig(peak_lr=5e-7, warmup_steps=50, weight_decay=0.0),
        step=StepConfig(batch_size=32, micro_batches=2),
        train=TrainConfig(steps=500, eval_every_steps=100, sample_every_steps=100),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
        checkpoint=CheckpointConfig(save_every_steps=100, best_metric="eval/loss"),
        samples=SampleConfig(prompts=("介绍一下你自己。", "Who are you?")),
    )
