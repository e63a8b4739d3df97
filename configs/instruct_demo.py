"""Instruction tuning of the demo's model, or of any small one, on a laptop CPU.

Run:     llm-jax data conversations --tokenizer runs/demo/tokenizer --source talk=PATH --seq-len 256 --output data/talk
         llm-jax instruct configs/instruct_demo.py --init-from runs/demo/run --data.prepared data/talk --run runs/tuned
         llm-jax chat runs/tuned
Expect:  bits per character of held-out answers before the first step and after the last. What 160 steps
         do to a model of 1.6 million parameters is measured: tools/results/sft.md (tools/show_sft.py).
"""

from llm_jax.data.mixture import DataConfig
from llm_jax.eval.windows import EvalConfig
from llm_jax.run.instruct import InstructConfig
from llm_jax.run.parts import SampleConfig
from llm_jax.train import OptimizerConfig, StepConfig, TrainConfig


def config() -> InstructConfig:
    """A learning rate for a model that has seen a million tokens: a large one wants a hundredth of it."""
    return InstructConfig(
        run="runs/tuned",
        init_from="runs/demo/run",
        data=DataConfig(prepared="data/talk", seq_len=256, packing="whole"),
        optimizer=OptimizerConfig(peak_lr=2e-3, warmup_steps=20, weight_decay=0.0),
        step=StepConfig(batch_size=4),
        train=TrainConfig(steps=400, log_every_steps=20, eval_every_steps=100),
        eval=EvalConfig(max_tokens=20_000),
        samples=SampleConfig(prompts=("What does a function return?", "函数返回什么？")),
    )
