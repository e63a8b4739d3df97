"""Two layers of width 32 on two packed, mixed sources: a run that steps in milliseconds and saves often.

A config file as users write them; tests say `--run` and `--data.prepared`.
"""

from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataConfig, SourceWeight
from llm_jax.eval.windows import EvalConfig
from llm_jax.model import ModelConfig
from llm_jax.run.parts import BEST_METRIC
from llm_jax.run.pretrain import PretrainConfig
from llm_jax.train import OptimizerConfig, StepConfig, TrainConfig

STEPS = 80


def config() -> PretrainConfig:
    """Saves every 4 steps, evaluates every 40, logs every step."""
    return PretrainConfig(
        run="unnamed",
        model=ModelConfig(
            vocab_size=384,
            embed_dim=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            mlp_dim=64,
            max_seq_len=64,
        ),
        data=DataConfig(
            prepared="unnamed",
            sources=(SourceWeight(name="en", weight=0.6), SourceWeight(name="zh", weight=0.4)),
            seq_len=64,
            packing="best_fit",
        ),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=5),
        step=StepConfig(batch_size=8),
        train=TrainConfig(steps=STEPS, log_every_steps=1, eval_every_steps=40),
        checkpoint=CheckpointConfig(save_every_steps=4, keep_last=3, best_metric=BEST_METRIC),
        eval=EvalConfig(max_documents=2, bootstrap_samples=10),
    )
