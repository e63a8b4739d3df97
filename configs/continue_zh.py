"""From an English base model to a Chinese one: extended vocabulary, new rows first, then everything.

Run:     llm-jax tokenizer extend MODEL_TOKENIZER --input zh=PATH --keep en=PATH --add-pieces 6000 --output runs/zh-tokenizer
         llm-jax data prepare --tokenizer runs/zh-tokenizer --source zh=PATH --source en=PATH --output data/zh
         llm-jax pretrain configs/continue_zh.py --init-from MODEL --data.prepared data/zh --run runs/zh
Expect:  before the first step a table: bits per character of held-out Chinese and English for the base
         and for each way to start the new rows; the best is taken. Then 500 steps of the new rows alone
         and 9,500 of everything, on 30 % English, stopping when English gets 5 % worse than the base.
         The number of parameters is the base model's and 6,000 rows in embedding and head. What it does
         to a small model is measured: tools/results/continuation.md.
"""

from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataConfig, SourceWeight
from llm_jax.run.parts import BEST_METRIC
from llm_jax.run.pretrain import PretrainConfig
from llm_jax.sharding import MeshConfig
from llm_jax.train import ForgettingConfig, OptimizerConfig, StageConfig, StepConfig, TrainConfig


def config() -> PretrainConfig:
    """The model's sizes and switches are those of --init-from; a learning rate below its pretraining's."""
    return PretrainConfig(
        run="runs/zh",
        init_from="runs/english",
        data=DataConfig(
            prepared="data/zh",
            # the share of English is replay: what the model must not forget
            sources=(SourceWeight(name="zh", weight=0.7), SourceWeight(name="en", weight=0.3)),
            seq_len=1024,
        ),
        stages=StageConfig(new_rows_steps=500, new_rows_lr=1e-3, new_rows_warmup_steps=50),
        optimizer=OptimizerConfig(peak_lr=1e-4, final_lr_fraction=0.1, warmup_steps=200),
        forgetting=ForgettingConfig(sources=("en",), max_increase=0.05),
        step=StepConfig(batch_size=64, micro_batches=4, z_loss=1e-4),
        train=TrainConfig(steps=10_000, eval_every_steps=250, sample_every_steps=1000),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
        checkpoint=CheckpointConfig(save_every_steps=500, best_metric=BEST_METRIC),
    )
