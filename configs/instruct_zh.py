"""Chinese instruction tuning of the model that configs/continue_zh.py made.

Run:     llm-jax data conversations --tokenizer runs/zh/tokenizer --source zh=PATH --source en=PATH --template chatml
             --seq-len 1024 --output data/zh-talk
         llm-jax instruct configs/instruct_zh.py --init-from runs/zh --data.prepared data/zh-talk --run runs/zh-tuned
         llm-jax eval runs/zh-tuned --tasks tasks.jsonl --against runs/zh
Expect:  a table of held-out answers in bits per character by source, before the first step and every 200.
         Some English conversations keep the model's English; their share is here a fifth. What tuning
         does to a small model is measured: tools/results/sft.md.
"""

from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataConfig
from llm_jax.data.weights import SourceWeight
from llm_jax.run.instruct import InstructConfig
from llm_jax.run.parts import BEST_METRIC, SampleConfig
from llm_jax.sharding import MeshConfig
from llm_jax.train import OptimizerConfig, StepConfig, TrainConfig


def config() -> InstructConfig:
    """A fifth of the learning rate that carried the base to Chinese; the best checkpoint is kept."""
    return InstructConfig(
        run="runs/zh-tuned",
        init_from="runs/zh",
        data=DataConfig(
            prepared="data/zh-talk",
            sources=(SourceWeight(name="zh", weight=0.8), SourceWeight(name="en", weight=0.2)),
            seq_len=1024,
            packing="whole",
        ),
        optimizer=OptimizerConfig(peak_lr=2e-5, warmup_steps=50, weight_decay=0.0),
        step=StepConfig(batch_size=64, micro_batches=4),
        train=TrainConfig(steps=2000, eval_every_steps=200, sample_every_steps=200),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
        checkpoint=CheckpointConfig(save_every_steps=200, best_metric=BEST_METRIC),
        samples=SampleConfig(
            prompts=("介绍一下你自己。", "把“早上好”翻译成英文。", "Who are you?")
        ),
    )
