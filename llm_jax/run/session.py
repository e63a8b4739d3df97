"""One training session in one run folder: what pretraining and instruction tuning have in common.

A command builds the data plan and the config; the session does the rest, in this order:

    1 lock the run folder                    2 restore the newest good checkpoint, or initialise
    3 compile the step on the mesh           4 hand batches, hooks and reporter to `train.run`
"""

import collections
import contextlib
import logging
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from llm_jax import config as config_files
from llm_jax.checkpoint.lock import RunLock
from llm_jax.checkpoint.processes import is_first
from llm_jax.checkpoint.record import DamagedError, read_meta
from llm_jax.checkpoint.run_folder import append_event
from llm_jax.checkpoint.store import Store
from llm_jax.data.batch import Batch, check_batch
from llm_jax.data.loader import batches
from llm_jax.data.mixture import DataPlan
from llm_jax.errors import ConfigError, DataError
from llm_jax.eval.perplexity import Evaluator
from llm_jax.generate import generate
from llm_jax.generate.decode import check_lengths, encode_prompt
from llm_jax.model import attention_choice, count_params, flops_per_token
from llm_jax.run.continuation import BASE_ROW, begin
from llm_jax.run.parts import Parts
from llm_jax.run.phases import mixture_lines, record_phases
from llm_jax.run.provenance import (
    check_continues,
    record_of,
    require_agreement,
    require_run_folder,
    write_provenance,
)
from llm_jax.run.rebalance import Guard, decide, what_next
from llm_jax.sharding import batch_sharding, local_rows, make_mesh, place_rows
from llm_jax.train import (
    Reporter,
    Stage,
    TrainState,
    abstract_state,
    beyond,
    compile_step,
    enter,
    forgotten,
    init_state,
    make_optimizer,
    plan_stages,
    run,
    stage_of,
    staged_step,
    state_of,
)
from llm_jax.train.metrics import LiveLine, MetricsWriter, Throughput
from llm_jax.train.stop import StopRequest

log = logging.getLogger(__name__)


def train_session(parts: Parts, console: Console) -> TrainState:
    """Trains in `parts.folder` to the end, or until asked to stop; resumes when there is a checkpoint."""
    mesh = make_mesh(parts.mesh)
    optimizer = make_optimizer(parts.optimizer)
    # raise here, before anything is written, if the model or the windows do not fit
    stages = make_stages(parts, mesh, optimizer)
    evaluator = make_evaluator(parts, mesh)
    if parts.train.sample_every_steps:
        prompts = [encode_prompt(parts.tokenizer, prompt) for prompt in parts.prompts]
        check_lengths(parts.model, prompts, parts.samples.sampling(seed=0))
    require_agreement(parts)
    require_run_folder(parts.folder)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(RunLock(parts.folder, parts.take_over))
        stop = stack.enter_context(StopRequest(parts.folder))
        store = stack.enter_context(
            Store(parts.folder / "checkpoints", parts.checkpoint, lock=lock)
        )
        stack.enter_context(jax.set_mesh(mesh))
        begun = None
        if store.steps():
            state, record = resume(parts, store, stages.state_at)
            # of the checkpoint that was read, with the phases of newer ones, which come again
            guard = replace(Guard.of_record(record), phases=parts.guard.phases)
            parts = replace(parts, guard=guard)
        elif parts.base:
            begun = begin(parts, mesh)
            parts = replace(parts, continuation=begun.facts)
            state = state_of(begun.params, parts.model, optimizer, mesh, stages.plan[0].trainable)
        else:
            state = init_state(parts.model, optimizer, mesh, parts.train.seed)
        start, steps = int(state.step), parts.train.steps
        if is_first():
            if start < steps:
                write_provenance(parts, start)
            say(console, summary(parts, mesh, start))
            if begun:
                append_event(parts.folder, "continuation", step=0, **begun.facts)
                say(console, begun.table or "start      not measured: there is no held-out text")
        hooks = RunHooks(parts, store, stop, evaluator, console)
        if start < steps:
            reporter = stack.enter_context(contextlib.closing(make_reporter(hooks, start, console)))
            if begun:
                reporter.evaluation(0, begun.metrics)
            again = partial(enter, model=parts.model, optimizer=optimizer, mesh=mesh)
            state = train_on(hooks, state, stages, mesh, again, reporter)
    if is_first():
        done = int(state.step)
        append_event(parts.folder, "end" if done >= steps else "stop", step=done, steps=steps)
        if start >= steps:
            say(console, f"already at step {start} of {steps}: nothing to do")
        elif done < steps:
            remedy = "" if hooks.complaints else "; the same command goes on"
            say(console, f"stopped at step {done} of {steps}, saved{remedy}")
    return state


def train_on(
    hooks: "RunHooks",
    state: TrainState,
    stages: "Stages",
    mesh: Mesh,
    again: Callable[..., TrainState],
    reporter: Reporter,
) -> TrainState:
    """Trains to the end, or until asked to stop; with other rows whenever the guard adds a phase."""
    while True:
        parts, start = hooks.parts, int(state.step)
        step = staged_step(stages.plan, stages.steps, start, again)
        with contextlib.closing(placed_batches(parts, mesh, start)) as feed:
            state = run(state, step, feed, parts.train, hooks, reporter)
        if hooks.parts.plan is parts.plan:
            return state


class Stages(NamedTuple):
    """The stages of a run, and of each its compiled step and what its state consists of."""

    plan: list[Stage]
    steps: list[Any]
    states: list[TrainState]

    def state_at(self, step: int) -> TrainState:
        """What the state after `step` updates consists of."""
        return self.states[stage_of(self.plan, step)]


def make_stages(parts: Parts, mesh: Mesh, optimizer: Any) -> Stages:
    """Raises ConfigError if the model, the batch or the stages do not fit."""
    plan = plan_stages(parts.stages, parts.optimizer, parts.train.steps, parts.first_new_row)
    steps = [
        compile_step(
            mesh,
            model=parts.model,
            config=parts.step,
            optimizer=optimizer,
            schedule=stage.schedule,
            clip_norm=parts.optimizer.clip_norm,
            trainable=stage.trainable,
        )
        for stage in plan
    ]
    states = [abstract_state(parts.model, optimizer, mesh, stage.trainable) for stage in plan]
    return Stages(plan, steps, states)


def make_evaluator(parts: Parts, mesh: Mesh) -> Evaluator | None:
    """Scores held-out text during training, without the intervals nobody sees there; None without text."""
    config = replace(parts.eval, bootstrap_samples=0)
    return Evaluator(parts.model, parts.corpora, config, mesh) if parts.corpora else None


def say(console: Console, text: str) -> None:
    """Prints plain text, whole lines."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def resume(
    parts: Parts, store: Store, abstract: Callable[[int], TrainState]
) -> tuple[TrainState, dict[str, Any]]:
    """State and record of the newest good checkpoint, after a look at whether it is of the same run.

    Raises:
      CheckpointError: it is not, and nothing was touched; or no checkpoint is good.
      ConfigError: the forgetting guard would end the run where it stands.
    """
    wanted = [parts.from_step] if parts.from_step >= 0 else reversed(store.steps())
    for step in wanted:
        if step not in store.steps():
            break  # `restore` says which ones there are
        try:
            record = read_meta(store.folder / str(step))
        except DamagedError:  # `restore` tells and steps over it
            continue
        check_continues(parts, record)
        check_remembers(parts, record)
        break
    state, record = store.restore(abstract, parts.from_step)
    changes = dict(config_files.changes(record["config"], config_files.to_dict(parts.resolved)))
    if is_first():
        record_phases(parts, record)
    if is_first() and changes:
        append_event(parts.folder, "config changed", step=record["step"], changes=changes)
        told = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changes.items())
        log.warning("settings changed since step %d: %s", record["step"], told)
    return state, record


REMEDY = (
    "begin a new run from it or from the base with a larger share of that source or a lower "
    "optimizer.peak_lr, or raise --forgetting.max-increase or that share, by a phase of --data.phases, and go on"
)


def reference(parts: Parts) -> Mapping[str, float]:
    """Bits per character that the forgetting guard compares with: those of the base model."""
    return parts.continuation.get("bits_per_character", {}).get(BASE_ROW, {})


def check_remembers(parts: Parts, record: dict[str, Any]) -> None:
    """Refuses to go on where the forgetting guard ended the run, with the same bound and mixture.

    Raises:
      ConfigError: the checkpoint's evaluation exceeds it.
    """
    told = forgotten(parts.forgetting, reference(parts), record["metrics"])
    same = record["plan_digest"] == parts.plan.digest
    goes_on = parts.forgetting.action == "rebalance" and not Guard.of_record(record).ended
    if told and same and not goes_on and record["step"] < parts.train.steps:
        raise ConfigError(f"{parts.folder}: at step {record['step']} {told}; {REMEDY}")


def rebalanced(parts: Parts, metrics: Mapping[str, float], step: int) -> Parts:
    """The run after an evaluation at `step`, with another plan where the guard adds a phase to it."""
    found = beyond(parts.forgetting, reference(parts), metrics)
    shares = parts.plan.shares_at(parts.rows_before(step))
    guard = decide(parts.guard, parts.forgetting, shares, found, step)
    if guard.phases == parts.guard.phases:
        return replace(parts, guard=guard)
    data = guard.applied(parts.plan.config)
    return replace(
        parts,
        guard=guard,
        plan=DataPlan(data, rows_before=parts.rows_before, steps=parts.train.steps),
        resolved=replace(parts.resolved, data=data),
    )


@dataclass
class RunHooks:
    """`train.loop.Hooks` of a run folder."""

    parts: Parts
    store: Store
    stop: StopRequest
    evaluator: Evaluator | None  # None when there is no held-out text
    console: Console
    complaints: list[str] = field(default_factory=list)  # of the forgetting guard

    def evaluate(self, params: Any, step: int) -> dict[str, float]:
        """Held-out metrics as `eval/...`; none when there is no held-out text."""
        metrics = self.evaluator.evaluate(params).metrics if self.evaluator else {}
        return {f"eval/{name}": value for name, value in metrics.items()}

    def is_worse(self, metrics: dict[str, float], step: int) -> bool:
        """Whether the forgetting guard ends the run, or this part of it: it goes on with other rows."""
        parts, then = self.parts, REMEDY
        told = forgotten(parts.forgetting, reference(parts), metrics)
        if parts.forgetting.action == "rebalance" and step < parts.train.steps:
            self.parts = rebalanced(parts, metrics, step)
            then = what_next(parts.guard, self.parts.guard) or REMEDY
        ends = bool(told) and then == REMEDY
        if ends:
            self.complaints.append(told)
        if told and is_first():
            append_event(parts.folder, "forgetting", step=step, told=told, then=then)
            say(self.console, f"step {step}  forgetting guard: {told}; {then}")
        return ends or self.parts.plan is not parts.plan

    def sample(self, params: Any, step: int) -> None:
        """Writes samples/<step>.txt. All processes generate the same; the first one writes."""
        config = self.parts.samples
        parts = self.parts
        texts = generate(
            params, parts.model, parts.tokenizer, parts.prompts, config.sampling(seed=step)
        )
        shown = [
            f"{prompt}|{made.text}\n" for prompt, made in zip(config.prompts, texts, strict=True)
        ]
        path = parts.folder / "samples" / f"{step:07d}.txt"
        if not is_first():
            return
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(shown), encoding="utf-8")
        except OSError as error:  # a full disk; the checkpoints decide whether the run can go on
            log.error("%s cannot be written: %s", path, error.strerror)

    def save(self, state: TrainState, step: int, metrics: dict[str, float]) -> None:
        """A checkpoint that describes itself."""
        parts = self.parts
        self.store.save(step, state, record_of(parts, step), parts.tokenizer.files, metrics)

    def save_due(self, step: int) -> bool:
        """By `checkpoint.save_every_steps`."""
        return self.store.due(step)

    def describe_step(self, step: int) -> str:
        """`en 75 %, zh 25 %`: the rows of the batch that update number `step` used."""
        size = self.parts.step.batch_size
        names = [self.parts.plan.source_of(row) for row in range((step - 1) * size, step * size)]
        return ", ".join(
            f"{name} {count / size:.0%}" for name, count in collections.Counter(names).most_common()
        )

    def should_stop(self, step: int) -> bool:
        """SIGTERM or Ctrl-C."""
        return self.stop.should_stop(step)

    def should_save(self, step: int) -> bool:
        """SIGUSR1 or a file `save` in the run folder."""
        return self.stop.should_save(step)


def placed_batches(parts: Parts, mesh: Mesh, start: int) -> Generator[Batch]:
    """Global batches on the mesh from step `start` on; this process reads only the rows its devices hold."""
    size, reading = parts.step.batch_size, parts.plan.config
    sharding = batch_sharding(mesh, size, parts.plan.seq_len)
    rows = local_rows(sharding, size)
    with contextlib.closing(
        batches(parts.plan, size, rows, start, reading.workers, reading.prefetch)
    ) as feed:
        for number, batch in enumerate(feed):
            if number == 0:  # a mistake in the data shows at once, or hardly ever
                check_batch(batch, parts.model.vocab_size)
            if not batch.loss_mask_BT.any():
                raise DataError(
                    f"the batch of step {start + number + 1} has no target token; prepare the data again, with "
                    "answers in every conversation"
                )
            yield Batch(*(place_rows(local, rows, size, sharding) for local in batch))


def make_reporter(hooks: RunHooks, start: int, console: Console) -> Reporter:
    """Where the numbers go: only the first process writes and shows them."""
    parts = hooks.parts
    throughput = Throughput(flops_per_token(parts.model, parts.plan.seq_len))

    def bytes_per_token(step: int) -> float:
        return hooks.parts.bytes_per_token_at(step)  # of the plan as it is by then

    if not is_first():
        return Reporter(None, None, throughput, bytes_per_token)
    writer = MetricsWriter(parts.folder / "metrics.jsonl", start)
    return Reporter(
        writer, LiveLine(parts.train.steps, start, console), throughput, bytes_per_token
    )


def summary(parts: Parts, mesh: Mesh, start: int) -> str:
    """What is about to happen, in a few lines."""
    model, step = parts.model, parts.step
    tokens = step.batch_size * parts.plan.seq_len
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    with jax.set_mesh(mesh):
        attention, reason = attention_choice(model, step.batch_size, parts.plan.seq_len)
    return "\n".join(
        [
            f"model      {count_params(model):,} parameters, {model.num_layers} layers, position {model.position}, {model.dtype}",
            f"mesh       {shape} of {jax.devices()[0].device_kind}, {jax.process_count()} process(es)",
            f"attention  {attention}: {reason}",
            f"data       {tokens:,} tokens a step; plan {parts.plan.digest[:12]}",
            *mixture_lines(parts),
            f"run        {parts.folder}, from step {start} to {parts.train.steps}",
        ]
    )
