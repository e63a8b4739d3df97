"""The loop: batches in, state out. It is handed everything it touches, so a list of batches will do.

Each turn: 1 wait for the batch, 2 start the step, 3 read the metrics of the step before (so that the
device never waits for the host), 4 evaluate, sample and save where due, 5 look whether to stop.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol

import jax

from llm_jax.data.batch import Batch
from llm_jax.errors import ConfigError, TrainingError
from llm_jax.train.metrics import LiveLine, MetricsWriter, Throughput
from llm_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train and how often to look."""

    steps: int = 1000  # updates in the whole run, resumed or not
    seed: int = 0  # of the initial parameters
    log_every_steps: int = 10
    eval_every_steps: int = 0  # held-out evaluation during training; 0: only at the end
    sample_every_steps: int = 0  # text written to samples/; 0: none
    max_skipped_in_row: int = 5  # non-finite steps in a row after which the run stops

    def __post_init__(self) -> None:
        for name in ("steps", "log_every_steps", "max_skipped_in_row"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least 1")
        for name in ("eval_every_steps", "sample_every_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"train.seed={self.seed} must be from 0 to 4294967295")


class Hooks(Protocol):
    """What a run does besides stepping. `step` counts finished updates."""

    def evaluate(self, params: Any, step: int) -> dict[str, float]:
        """Held-out metrics of the parameters, under flat names."""
        ...

    def is_worse(self, metrics: dict[str, float], step: int) -> bool:
        """True when what was just evaluated should end the run; the same on every process."""
        ...

    def sample(self, params: Any, step: int) -> None:
        """Writes some generated text."""
        ...

    def save(self, state: TrainState, step: int, metrics: dict[str, float]) -> None:
        """Saves a checkpoint; returns as soon as the state's buffers may be reused."""
        ...

    def save_due(self, step: int) -> bool:
        """True at the steps that are saved on schedule."""
        ...

    def describe_step(self, step: int) -> str:
        """The source mix of a step's batch, for a message about it."""
        ...

    def should_stop(self, step: int) -> bool:
        """True when the run was asked to stop; the same on every process."""
        ...

    def should_save(self, step: int) -> bool:
        """True when a save was asked for; the same on every process."""
        ...


@dataclasses.dataclass
class Reporter:
    """Where the numbers go."""

    writer: MetricsWriter | None  # None on all processes but the first
    live: LiveLine | None
    throughput: Throughput
    # of the training mixture by the step, counted from 1: turns nats per token into bits per byte
    bytes_per_token: Callable[[int], float]

    def close(self) -> None:
        """Ends the live line and closes the file."""
        if self.live:
            self.live.close()
        if self.writer:
            self.writer.close()

    def step(self, row: dict[str, Any]) -> None:
        """Logs one training step."""
        row["bits_per_byte"] = row["loss"] / math.log(2) / self.bytes_per_token(row["step"])
        row.update(self.throughput.rates())
        if self.writer:
            self.writer.write(row)
        if self.live:
            self.live.show(row)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Logs one held-out evaluation; nothing where there was nothing to evaluate."""
        if not metrics:
            return
        if self.writer:
            self.writer.write({"step": step, **metrics})
        if self.live:
            shown = "  ".join(
                f"{k} {v:.4f}" for k, v in metrics.items() if "bits_per_character" in k
            )
            self.live.say(f"step {step}  held out: {shown}")


def run(
    state: TrainState,
    step_function: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]],
    batches: Iterator[Batch],
    config: TrainConfig,
    hooks: Hooks,
    reporter: Reporter,
) -> TrainState:
    """Trains from `state.step` to `config.steps` or until asked to stop; returns the last state.

    Raises:
      TrainingError: `config.max_skipped_in_row` steps in a row had a non-finite loss or gradient.
    """
    start = int(state.step)
    pending: tuple[int, dict[str, jax.Array], float] | None = None
    saved = start
    evaluated: tuple[int, dict[str, float]] = (-1, {})
    for step in range(start + 1, config.steps + 1):
        begin = time.perf_counter()
        batch = next(batches)
        data_wait = time.perf_counter() - begin
        state, metrics = step_function(state, batch)
        bad = finish_step(*pending, config, reporter) if pending else {}
        pending = (step, metrics, data_wait)

        last = step == config.steps
        stop = hooks.should_stop(step)
        due_eval = last or (
            not stop and config.eval_every_steps and step % config.eval_every_steps == 0
        )
        due_save = last or stop or hooks.save_due(step) or hooks.should_save(step)
        due_sample = (
            not stop and config.sample_every_steps and step % config.sample_every_steps == 0
        )
        if due_eval or due_save or due_sample or bad:
            bad = finish_step(*pending, config, reporter) or bad
            pending = None
        if bad:
            give_up(bad, state, step, hooks)
        if due_eval:
            evaluated = (step, hooks.evaluate(state.params, step))
            reporter.evaluation(*evaluated)
            if hooks.is_worse(evaluated[1], step):
                stop = due_save = True
        if due_sample:
            hooks.sample(state.params, step)
        if due_save:
            hooks.save(state, step, evaluated[1] if evaluated[0] == step else {})
            saved = step
        if due_eval or due_save or due_sample:
            reporter.throughput.pause()
        if stop:
            break
    assert saved == int(state.step), "the last state is always saved"
    return state


def finish_step(
    step: int,
    metrics: dict[str, jax.Array],
    data_wait: float,
    config: TrainConfig,
    reporter: Reporter,
) -> dict[str, Any]:
    """Reads a step's metrics (waiting for the device) and logs them where due.

    Returns:
      {} as long as training may go on; the step's row when too many in a row were not finite.
    """
    row = {"step": step, **{name: float(value) for name, value in metrics.items()}}
    reporter.throughput.mark(row["target_tokens"], data_wait)
    if step % config.log_every_steps == 0 or step == config.steps or row["skipped_in_row"]:
        reporter.step(row)
    return row if row["skipped_in_row"] >= config.max_skipped_in_row else {}


def give_up(bad: dict[str, Any], state: TrainState, step: int, hooks: Hooks) -> NoReturn:
    """Saves the parameters, which the bad steps left alone, and says which steps they were."""
    hooks.save(state, step, {})
    count, last = int(bad["skipped_in_row"]), bad["step"]
    raise TrainingError(
        f"loss or gradient not finite for {count} steps in a row (steps {last - count + 1} to {last}; "
        f"batch of step {last}: {hooks.describe_step(last)}); the good parameters are saved as step "
        f"{step}; lower optimizer.peak_lr or look at these batches, then resume"
    )
