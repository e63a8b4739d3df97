"""Eight steps of DPO on a tiny base; tests say `--init-from` and the rest."""

from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataConfig
from llm_jax.eval.windows import EvalConfig
from llm_jax.run.instruct import InstructConfig
from llm_jax.train import OptimizerConfig, StepConfig, TrainConfig

STEPS = 8


def config() -> InstructConfig:
    """Saves every 2 steps and keeps all, evaluates every 4."""
    return InstructConfig(
        run="unnamed",
        init_from="unnamed",
        data=DataConfig(prepared="unnamed", seq_len=64, packing="whole"),
        method="dpo",
        optimizer=OptimizerConfig(peak_lr=2e-2, warmup_steps=1, weight_decay=0.0),
        step=StepConfig(batch_size=4),
        train=TrainConfig(steps=STEPS, log_every_steps=1, eval_every_steps=4),
        checkpoint=CheckpointConfig(save_every_steps=2, keep_last=10, best_metric="eval/loss"),
        eval=EvalConfig(bootstrap_samples=0),
    )
