"""Twelve steps of tuning a tiny base; tests say `--init-from` and the rest."""

from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataConfig
from llm_jax.eval.windows import EvalConfig
from llm_jax.run.instruct import InstructConfig
from llm_jax.run.parts import BEST_METRIC, SampleConfig
from llm_jax.train import OptimizerConfig, StepConfig, TrainConfig

STEPS = 12


def config() -> InstructConfig:
    """Saves every 2 steps and keeps all, evaluates every 6, two micro-batches of uneven targets."""
    return InstructConfig(
        run="unnamed",
        init_from="unnamed",
        data=DataConfig(prepared="unnamed", seq_len=64, packing="whole"),
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=2, weight_decay=0.0),
        step=StepConfig(batch_size=8, micro_batches=2),
        train=TrainConfig(steps=STEPS, log_every_steps=1, eval_every_steps=6),
        checkpoint=CheckpointConfig(save_every_steps=2, keep_last=10, best_metric=BEST_METRIC),
        eval=EvalConfig(bootstrap_samples=10),
        samples=SampleConfig(prompts=("the river", "你好"), max_new_tokens=8),
    )
