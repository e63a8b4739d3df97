"""The course of a session: from a state to the end of the run, with the compiled steps, the batches and the
reporter that it needs; back to a checkpoint and on from there where the config wants that.
"""

import contextlib
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from llm_jax.checkpoint.processes import is_first
from llm_jax.checkpoint.run_folder import append_event
from llm_jax.data.batch import Batch, check_batch
from llm_jax.data.loader import batches
from llm_jax.errors import DataError
from llm_jax.model import Params, flops_per_token
from llm_jax.run.hooks import RunHooks
from llm_jax.run.parts import Parts
from llm_jax.run.roll_back import roll_back
from llm_jax.sharding import batch_sharding, local_rows, place_rows
from llm_jax.train import (
    BadStepsError,
    Phases,
    Reporter,
    Stage,
    TrainState,
    abstract_state,
    compile_preference_step,
    compile_step,
    follow_batch,
    make_optimizer,
    plan_stages,
    run,
    stage_of,
    staged_step,
    watch,
)
from llm_jax.train.metrics import LiveLine, MetricsWriter, Throughput
from llm_jax.train.watchdog import Watchdog


class Stages(NamedTuple):
    """The stages of a run, and of each its compiled step and what its state consists of."""

    plan: list[Stage]
    steps: list[Any]
    states: list[TrainState]

    def state_at(self, step: int) -> TrainState:
        """What the state after `step` updates consists of."""
        return self.states[stage_of(self.plan, step)]

    def with_reference(self, reference: Params | None) -> "Stages":
        """The same for pairs of answers, with what they are compared with."""
        # no keyword: jit takes none where shardings are stated
        steps = [
            lambda state, batch, step=step: step(state, batch, reference) for step in self.steps
        ]
        return self._replace(steps=steps)


def make_stages(parts: Parts, mesh: Mesh, optimizer: Any) -> Stages:
    """Raises ConfigError if the model, the batch, the length of its rows or the stages do not fit."""
    batch_sharding(mesh, parts.step.batch_size, parts.plan.seq_len)
    first_size = parts.order.sizes[0][1]
    plan = plan_stages(
        parts.stages, parts.optimizer, parts.train.steps, parts.model, parts.first_new_row
    )
    compiled = compile_step
    if parts.objective:
        compiled = partial(compile_preference_step, objective=parts.objective)
    steps = [
        compiled(
            mesh,
            model=parts.model,
            config=parts.step,
            optimizer=optimizer,
            schedule=follow_batch(
                stage.schedule, parts.optimizer, first_size, parts.step.batch_size
            ),
            clip_norm=parts.optimizer.clip_norm,
            trainable=stage.trainable,
        )
        for stage in plan
    ]
    states = [abstract_state(parts.model, optimizer, mesh, stage.trainable) for stage in plan]
    return Stages(plan, steps, states)


def optimizer_of(parts: Parts) -> Any:
    """The optimizer, with the history that spikes are judged by if the step asks for one."""
    return watch(make_optimizer(parts.optimizer), parts.step.spike_window)


def watchdog(parts: Parts, phases: Phases) -> Watchdog:
    """Ends the process, with stacks in the run folder, when training makes no progress."""
    file = parts.folder / f"hang-{jax.process_index()}.txt"
    seconds, slow_seconds = parts.train.watchdog_seconds, parts.train.watchdog_slow_seconds
    tell = partial(append_event, parts.folder, "hang", process=jax.process_index())
    return Watchdog(phases, file, seconds, slow_seconds, lambda told: tell(told=told))


def train_on(
    hooks: RunHooks,
    state: TrainState,
    stages: Stages,
    mesh: Mesh,
    again: Callable[..., TrainState],
    before: dict[str, float],
) -> TrainState:
    """Trains to the end, or until asked to stop. With other rows whenever the guard adds a phase; back to a
    checkpoint and on from there as often as the config wants it.

    `before` are the held-out metrics of the parameters that a run begins with.
    """
    while True:
        parts, start = hooks.parts, int(state.step)
        step = staged_step(stages.plan, stages.steps, start, again, parts.turns)
        compiles = [stage.first + 1 for stage in stages.plan]
        bad: BadStepsError | None = None
        with (
            contextlib.closing(placed_batches(parts, mesh, start)) as feed,
            contextlib.closing(make_reporter(hooks, start)) as reporter,
        ):
            if not start:
                reporter.evaluation(0, before)
            try:
                state = run(state, step, feed, parts.train, hooks, reporter, compiles)
            except BadStepsError as error:
                bad = error.with_traceback(None)  # which would keep the state alive
        if bad:
            hooks.parts, state = roll_back(hooks.parts, hooks.store, stages.state_at, bad)
        elif hooks.parts.plan is parts.plan:
            return state


def placed_batches(parts: Parts, mesh: Mesh, start: int) -> Generator[Batch]:
    """Global batches on the mesh from step `start` on; this process reads only the rows its devices hold."""
    size, reading = parts.step.batch_size, parts.plan.config
    sharding = batch_sharding(mesh, size, parts.plan.seq_len)
    rows = local_rows(sharding, size)
    with contextlib.closing(
        batches(parts.plan, size, rows, start, reading.workers, reading.prefetch, order=parts.order)
    ) as feed:
        for number, batch in enumerate(feed):
            if number == 0:  # a mistake in the data shows at once, or hardly ever
                check_batch(batch, parts.model.vocab_size)
            # a shard that is left out may have filled all rows of this process: the others' count
            if not reading.leave_out and not batch.loss_mask_BT.any():
                raise DataError(
                    f"the batch of step {start + number + 1} has no target token; prepare the data again, with "
                    "answers in every conversation"
                )
            yield Batch(*(place_rows(local, rows, size, sharding) for local in batch))


def make_reporter(hooks: RunHooks, start: int) -> Reporter:
    """Where the numbers go: only the first process writes and shows them."""
    parts, phases = hooks.parts, hooks.phases
    throughput = Throughput(flops_per_token(parts.model, parts.plan.seq_len))

    def bytes_per_token(step: int) -> float:
        return hooks.parts.bytes_per_token_at(step)  # of the plan as it is by then

    of_text = None if parts.objective else bytes_per_token
    if not is_first():
        return Reporter(None, None, throughput, of_text, phases)
    writer = MetricsWriter(parts.folder / "metrics.jsonl", start)
    live = LiveLine(parts.train.steps, start, hooks.console)
    return Reporter(writer, live, throughput, of_text, phases)
