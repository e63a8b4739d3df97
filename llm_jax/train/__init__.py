"""Training: optimizer, state, the pure step, and the loop around it.

Read `step.py` first. `loop.run` is handed its batches and hooks by the commands in run/, so that
pretraining and instruction tuning share one loop.
"""

from llm_jax.train.forgetting import ForgettingConfig, beyond, forgotten
from llm_jax.train.guard import watch
from llm_jax.train.loop import BadStepsError, Reporter, TrainConfig, run
from llm_jax.train.neftune import NeftuneConfig
from llm_jax.train.optimizer import OptimizerConfig, follow_batch, make_optimizer, make_schedule
from llm_jax.train.phases import Phases
from llm_jax.train.preference import (
    Objective,
    PreferenceConfig,
    compile_preference_step,
    preference_step,
)
from llm_jax.train.resize import ResizeConfig
from llm_jax.train.stages import Stage, StageConfig, enter, plan_stages, stage_of, staged_step
from llm_jax.train.state import (
    TrainState,
    abstract_state,
    count_trained,
    init_state,
    new_state,
    state_of,
    state_shardings,
)
from llm_jax.train.step import StepConfig, compile_step, train_step
from llm_jax.train.trainable import ALL, Trainable

__all__ = [
    "ALL",
    "BadStepsError",
    "ForgettingConfig",
    "NeftuneConfig",
    "Objective",
    "OptimizerConfig",
    "Phases",
    "PreferenceConfig",
    "Reporter",
    "ResizeConfig",
    "Stage",
    "StageConfig",
    "StepConfig",
    "TrainConfig",
    "TrainState",
    "Trainable",
    "abstract_state",
    "beyond",
    "compile_preference_step",
    "compile_step",
    "count_trained",
    "enter",
    "follow_batch",
    "forgotten",
    "init_state",
    "make_optimizer",
    "make_schedule",
    "new_state",
    "plan_stages",
    "preference_step",
    "run",
    "stage_of",
    "staged_step",
    "state_of",
    "state_shardings",
    "train_step",
    "watch",
]
