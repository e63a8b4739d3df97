"""The stages of a run: the new rows of an extended vocabulary alone first, then what the run is for.

Staged freezing is from EEVE, https://arxiv.org/abs/2402.14714. Each stage has its own warm-up and its
own optimizer state: entering the second one starts Adam afresh, since it has seen none of the gradients.
"""

import dataclasses
import itertools
from collections.abc import Callable, Container, Sequence
from typing import Any, Literal, NamedTuple

import optax
from jax.sharding import Mesh

from llm_jax.data.batch import Batch
from llm_jax.errors import ConfigError
from llm_jax.model import ModelConfig
from llm_jax.train.guard import forget
from llm_jax.train.optimizer import OptimizerConfig, make_schedule
from llm_jax.train.state import TrainState, state_of
from llm_jax.train.trainable import ALL, Trainable

Step = Callable[[TrainState, Batch], tuple[TrainState, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What is trained: in a first stage, if there is one, the vocabulary's new rows alone."""

    # in the main stage. auto: everything; of a model with adapters these, and the vocabulary's new rows if
    # it has any. body: all but embedding, head and its bias
    train: Literal["auto", "all", "body", "new_rows", "adapters", "adapters_and_new_rows"] = "auto"
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


def main_part(config: StageConfig, model: ModelConfig, first_new_row: int) -> Trainable:
    """What the main stage trains.

    Raises:
      ConfigError: the model has no such part, or cannot train it in the dtype it is stored in.
    """
    train, rank = config.train, model.lora.rank
    if train == "auto":
        train = "adapters_and_new_rows" if rank and first_new_row else "adapters" if rank else "all"
    if train.startswith("adapters") != bool(rank):
        raise ConfigError(
            f"stages.train={config.train!r} does not fit model.lora.rank={rank}: adapters are trained alone or "
            "with new rows, and only where there are some; set both, or leave stages.train at 'auto'"
        )
    if train.endswith("new_rows"):
        require_new_rows(f"stages.train={train!r}", first_new_row)
    if train == "new_rows" and config.new_rows_steps:
        raise ConfigError(
            "stages.train='new_rows' trains them in the whole run; leave stages.new_rows_steps at 0"
        )
    frozen = train == "adapters" and not config.new_rows_steps
    if model.param_dtype != "float32" and not frozen:
        raise ConfigError(
            f"model.param_dtype={model.param_dtype!r} holds frozen weights only: one of 1 does not move by a "
            "learning rate below 0.004; keep 'float32', or train adapters alone (--model.lora.rank 8)"
        )
    return {
        "all": ALL,
        "body": Trainable("body"),
        "new_rows": Trainable("none", first_new_row),
        "adapters": Trainable("adapters"),
        "adapters_and_new_rows": Trainable("adapters", first_new_row),
    }[train]


def require_new_rows(what: str, first_new_row: int) -> None:
    """Raises ConfigError if there are none."""
    if not first_new_row:
        raise ConfigError(
            f"{what}, but there are no new rows to train: give --init-from a model "
            "and data prepared with an extension of its tokenizer, or leave it out"
        )


def plan_stages(
    config: StageConfig,
    optimizer: OptimizerConfig,
    steps: int,
    model: ModelConfig,
    first_new_row: int = 0,
) -> list[Stage]:
    """The stages of a run of `steps` updates.

    Args:
      first_new_row: where the new rows of the vocabulary begin; 0: there are none.

    Raises:
      ConfigError: a first stage without new rows or as long as the run, a warm-up that is too long, or
        the model has not what is to be trained.
    """
    main, alone = main_part(config, model, first_new_row), config.new_rows_steps
    if not alone:
        return [Stage(0, main, make_schedule(optimizer, steps))]
    require_new_rows(f"stages.new_rows_steps={alone}", first_new_row)
    if alone >= steps:
        raise ConfigError(
            f"stages.new_rows_steps={alone} must be below train.steps={steps}, which counts both stages"
        )
    rows = OptimizerConfig(
        peak_lr=config.new_rows_lr,
        schedule="constant",
        warmup_steps=min(config.new_rows_warmup_steps, alone - 1),
    )
    after = make_schedule(optimizer, steps - alone)
    return [
        Stage(0, Trainable("none", first_new_row), make_schedule(rows, alone)),
        Stage(alone, main, lambda step: after(step - alone)),
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
    turns: Container[int] = (),
) -> Step:
    """The step of whichever stage is next, with the optimizer's state made anew where one begins.

    Args:
      stages: of the run.
      steps: the compiled step of each.
      start: updates done before; from there they are counted on the host, so that none is waited for.
      begin: `enter` with the model, the optimizer and the mesh filled in.
      turns: updates done before steps whose rows are of another kind: spikes are not judged by what was before.
    """
    counter = itertools.count(start)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        done = next(counter)
        index = stage_of(stages, done + 1)
        if index and done == stages[index].first:
            state = begin(state, stages[index].trainable)
        if done in turns:
            state = state._replace(opt_state=forget(state.opt_state))
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
