"""Twelve steps from a base model, the first six of the new rows alone; tests say `--init-from` and the rest."""

from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataConfig, SourceWeight
from llm_jax.eval.windows import EvalConfig
from llm_jax.run.parts import BEST_METRIC
from llm_jax.run.pretrain import PretrainConfig
from llm_jax.train import ForgettingConfig, OptimizerConfig, StageConfig, StepConfig, TrainConfig

STEPS, ALONE = 12, 6


def config() -> PretrainConfig:
    """Saves every 2 steps and keeps all, evaluates every 4; the model is the base's."""
    return PretrainConfig(
        run="unnamed",
        init_from="unnamed",
        data=DataConfig(
            prepared="unnamed",
            sources=(SourceWeight(name="en", weight=0.4), SourceWeight(name="zh", weight=0.6)),
            seq_len=64,
        ),
        stages=StageConfig(new_rows_steps=ALONE, new_rows_lr=1e-2, new_rows_warmup_steps=2),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=2),
        forgetting=ForgettingConfig(sources=("en",), max_increase=10.0),
        step=StepConfig(batch_size=8),
        train=TrainConfig(steps=STEPS, log_every_steps=1, eval_every_steps=4),
        checkpoint=CheckpointConfig(save_every_steps=2, keep_last=10, best_metric=BEST_METRIC),
        eval=EvalConfig(max_documents=2, bootstrap_samples=10),
    )
