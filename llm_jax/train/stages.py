"""The stages of a run: the new rows of an extended vocabulary alone first, then everything.

Staged freezing is from EEVE, https://arxiv.org/abs/2402.14714. Each stage has its own warm-up and its
own optimizer state: entering the second one starts Adam afresh, since it has seen none of the gradients.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optax
from jax.sharding import Mesh

from llm_jax.data.batch import Batch
from llm_jax.errors import ConfigError
from llm_jax.model import ModelConfig
from llm_jax.train.optimizer import OptimizerConfig, make_schedule
from llm_jax.train.state import TrainState, state_of
from llm_jax.train.trainable import ALL, Trainable

Step = Callable[[TrainState, Batch], tuple[TrainState, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The first stage of continued pretraining, in which only the vocabulary's new rows are trained."""

    new_rows_steps: int = 0  # updates of it, out of train.steps; 0: there is no such stage
    new_rows_lr: float = 1e-3  # constant after its warm-up
    new_rows_warmup_steps: int = 10  # linear from 0

    def __post_init__(self) -> None:
        for name in ("new_rows_steps", "new_rows_warmup_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"stages.{name}={getattr(self, name)} must not be negative")
        if self.new_rows_lr <= 0:
            raise ConfigError(f"stages.new_rows_lr={self.new_rows_lr} must be above 0")


class Stage(NamedTuple):
    """One of them."""

    first: int  # updates done before it
    trainable: Trainable
    schedule: optax.Schedule  # of the step of the whole run


def plan_stages(
    config: StageConfig, optimizer: OptimizerConfig, steps: int, first_new_row: int = 0
) -> list[Stage]:
    """The stages of a run of `steps` updates.

    Args:
      first_new_row: where the new rows of the vocabulary begin; 0: there are none.

    Raises:
      ConfigError: a first stage without new rows or as long as the run, or a warm-up that is too long.
    """
    alone = config.new_rows_steps
    if not alone:
        return [Stage(0, ALL, make_schedule(optimizer, steps))]
    if not first_new_row:
        raise ConfigError(
            f"stages.new_rows_steps={alone}, but there are no new rows to train: give --init-from a model "
            "and data prepared with an extension of its tokenizer, or set it to 0"
        )
    if alone >= steps:
        raise ConfigError(
            f"stages.new_rows_steps={alone} must be below train.steps={steps}, which counts both stages"
        )
    rows = OptimizerConfig(
        peak_lr=config.new_rows_lr,
        schedule="constant",
        warmup_steps=min(config.new_rows_warmup_steps, alone - 1),
    )
    everything = make_schedule(optimizer, steps - alone)
    return [
        Stage(0, Trainable(first_new_row), make_schedule(rows, alone)),
        Stage(alone, ALL, lambda step: everything(step - alone)),
    ]


def stage_of(stages: Sequence[Stage], steps_done: int) -> int:
    """Index of the stage that a state after `steps_done` updates was made in.

    The state between two stages is still the earlier one's.
    """
    return max(index for index, stage in enumerate(stages) if stage.first < max(steps_done, 1))


def staged_step(
    stages: Sequence[Stage],
    steps: Sequence[Step],
    start: int,
    begin: Callable[[TrainState, Trainable], TrainState],
) -> Step:
    """The step of whichever stage is next, with the optimizer's state made anew where one begins.

    Args:
      stages: of the run.
      steps: the compiled step of each.
      start: updates done before; from there they are counted on the host, so that none is waited for.
      begin: `enter` with the model, the optimizer and the mesh filled in.
    """
    counter = itertools.count(start)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        done = next(counter)
        index = stage_of(stages, done + 1)
        if index and done == stages[index].first:
            state = begin(state, stages[index].trainable)
        return steps[index](state, batch)

    return step


def enter(
    state: TrainState,
    trainable: Trainable,
    *,
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """The state as a stage begins with it: its optimizer state is for another part of the parameters."""
    fresh = state_of(state.params, model, optimizer, mesh, trainable)
    return state._replace(params=fresh.params, opt_state=fresh.opt_state)
