"""The loop: batches in, state out. It is handed everything it touches, so a list of batches will do.

Each turn: 1 wait for the batch, 2 start the step, 3 read the metrics of the step before (so that the
device never waits for the host), 4 evaluate, sample and save where due, 5 look whether to stop.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple, NoReturn, Protocol

import jax

from llm_jax.data.batch import Batch
from llm_jax.errors import ConfigError, TrainingError
from llm_jax.train.metrics import LiveLine, MetricsWriter, Throughput
from llm_jax.train.phases import Phases
from llm_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train and how often to look."""

    steps: int = 1000  # updates in the whole run, resumed or not
    seed: int = 0  # of the initial parameters
    log_every_steps: int = 10
    eval_every_steps: int = 0  # held-out evaluation during training; 0: only at the end
    sample_every_steps: int = 0  # text written to samples/; 0: none
    max_skipped_in_row: int = 5  # skipped steps in a row after which the run stops or rolls back
    # times it may go back to the checkpoint before such steps and leave their batches out
    max_rollbacks: int = 0
    replica_check_every_steps: int = 0  # compare the copies of the state on all devices; 0: never
    watchdog_seconds: int = 0  # that a step may take before the process ends with status 75; 0: any
    watchdog_slow_seconds: int = 1800  # the same for a compile, an evaluation, a save and the start

    def __post_init__(self) -> None:
        for name in ("steps", "log_every_steps", "max_skipped_in_row", "watchdog_slow_seconds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least 1")
        for name in (
            "eval_every_steps",
            "sample_every_steps",
            "max_rollbacks",
            "watchdog_seconds",
            "replica_check_every_steps",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"train.seed={self.seed} must be from 0 to 4294967295")


class BadStepsError(TrainingError):
    """Too many steps in a row were skipped, and the config wants to go back and leave them out."""

    def __init__(self, told: str, first: int, last: int) -> None:
        super().__init__(told)
        self.first, self.last = first, last  # updates, counted from 1


class Hooks(Protocol):
    """What a run does besides stepping. `step` counts finished updates."""

    def evaluate(self, params: Any, step: int) -> dict[str, float]:
        """Held-out metrics of the parameters, under flat names; none if it was asked to stop meanwhile."""
        ...

    def is_worse(self, metrics: dict[str, float], step: int) -> bool:
        """True when what was just evaluated should end the run; the same on every process."""
        ...

    def sample(self, params: Any, step: int) -> None:
        """Writes some generated text."""
        ...

    def check_replicas(self, state: TrainState, step: int) -> None:
        """Raises TrainingError where copies of the state differ; all processes call it."""
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
    # of the training mixture by the step, counted from 1: turns nats per token into bits per byte; None: the loss is
    # something else
    bytes_per_token: Callable[[int], float] | None
    phases: Phases = dataclasses.field(default_factory=Phases)

    def close(self) -> None:
        """Ends the live line and closes the file."""
        if self.live:
            self.live.close()
        if self.writer:
            self.writer.close()

    def step(self, row: dict[str, Any]) -> None:
        """Logs one training step."""
        if self.bytes_per_token:
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
                f"{k} {v:.4f}"
                for k, v in metrics.items()
                if k.endswith(("bits_per_character", "preference_accuracy", "reward_margin"))
            )
            self.live.say(f"step {step}  held out: {shown}")


def run(
    state: TrainState,
    step_function: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]],
    batches: Iterator[Batch],
    config: TrainConfig,
    hooks: Hooks,
    reporter: Reporter,
    compiles: Container[int] = (),
) -> TrainState:
    """Trains from `state.step` to `config.steps` or until asked to stop; returns the last state.
    Programs are compiled by the first step and those in `compiles`.

    Raises:
      TrainingError: `config.max_skipped_in_row` steps in a row had a non-finite loss or gradient, or
        spikes; BadStepsError when `config.max_rollbacks` is not 0.
    """
    start, enter = int(state.step), reporter.phases.enter
    pending: tuple[int, dict[str, jax.Array], float] | None = None
    saved = start
    evaluated: tuple[int, dict[str, float]] = (-1, {})
    for step in range(start + 1, config.steps + 1):
        enter("data")
        begin = time.perf_counter()
        batch = next(batches)
        data_wait = time.perf_counter() - begin
        enter("compile" if step == start + 1 or step in compiles else "step")
        state, metrics = step_function(state, batch)
        bad = finish_step(*pending, config, reporter) if pending else {}
        pending = (step, metrics, data_wait)
        if reporter.phases.now == "compile":
            jax.block_until_ready(metrics)  # the other processes may compile for longer: no hang
            enter("step")
        due = due_after(step, config, hooks)
        stop = due.stop
        if due.anything or bad:
            this = finish_step(*pending, config, reporter)
            bad = bad or this  # the first to reach the limit, however late it was read
            pending = None
            reporter.throughput.pause()
        if bad:
            give_up(bad, state, step, config, hooks, reporter)
        if due.eval:
            enter("eval")
            evaluated = (step, hooks.evaluate(state.params, step))
            reporter.evaluation(*evaluated)
            stop = stop or hooks.is_worse(evaluated[1], step) or hooks.should_stop(step)
        if due.check:
            hooks.check_replicas(state, step)
        if due.sample:
            enter("sample")
            hooks.sample(state.params, step)
        if due.save or stop:
            enter("save")
            hooks.save(state, step, evaluated[1] if evaluated[0] == step else {})
            saved = step
        if stop:
            break
    enter("save")  # what the way out waits for
    assert saved == int(state.step), "the last state is always saved"
    return state


class Due(NamedTuple):
    """What happens after a step."""

    stop: bool
    eval: bool
    check: bool
    sample: bool
    save: bool

    @property
    def anything(self) -> bool:
        """Whether the metrics of the step are needed before the next one."""
        return any(self)


def due_after(step: int, config: TrainConfig, hooks: Hooks) -> Due:
    """What is due after `step`: asked to stop, a run neither evaluates nor samples, except at its end."""
    last, stop = step == config.steps, hooks.should_stop(step)
    every = lambda steps: bool(steps and step % steps == 0)  # noqa: E731
    return Due(
        stop=stop,
        eval=last or (not stop and every(config.eval_every_steps)),
        check=every(config.replica_check_every_steps),
        sample=not stop and every(config.sample_every_steps),
        # both are asked: each question is one that all processes answer together
        save=hooks.should_save(step) | hooks.save_due(step) | last | stop,
    )


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


def give_up(
    bad: dict[str, Any],
    state: TrainState,
    step: int,
    config: TrainConfig,
    hooks: Hooks,
    reporter: Reporter,
) -> NoReturn:
    """Says which steps were skipped, and saves the parameters, which they left alone, unless the run
    goes back to before them.
    """
    reporter.phases.enter("save")  # or restoring another checkpoint: not as quick as a step
    count, last = int(bad["skipped_in_row"]), bad["step"]
    first = last - count + 1
    told = (
        f"loss or gradient not finite, or a spike, for {count} steps in a row (steps {first} to {last}; "
        f"batch of step {last}: {hooks.describe_step(last)})"
    )
    if config.max_rollbacks:
        raise BadStepsError(told, first, last)
    hooks.save(state, step, {})
    raise TrainingError(
        f"{told}; the good parameters are saved as step {step}; lower optimizer.peak_lr or look at these "
        "batches, then resume"
    )
