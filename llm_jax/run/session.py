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
from llm_jax.errors import ConfigError
from llm_jax.eval.perplexity import Evaluator
from llm_jax.generate import generate
from llm_jax.generate.decode import check_lengths, encode_prompt
from llm_jax.model import attention_choice, count_params, flops_per_token
from llm_jax.run.continuation import BASE_ROW, begin
from llm_jax.run.parts import Parts
from llm_jax.run.provenance import (
    check_continues,
    record_of,
    record_phases,
    require_agreement,
    require_run_folder,
    write_provenance,
)
from llm_jax.sharding import batch_sharding, local_rows, make_mesh, place_rows
from llm_jax.train import (
    Reporter,
    Stage,
    TrainState,
    abstract_state,
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
        prompts = [encode_prompt(parts.tokenizer, prompt) for prompt in parts.samples.prompts]
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
            state = resume(parts, store, stages.state_at)
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
            feed = stack.enter_context(contextlib.closing(placed_batches(parts, mesh, start)))
            reporter = stack.enter_context(contextlib.closing(make_reporter(parts, start, console)))
            if begun:
                reporter.evaluation(0, begun.metrics)
            again = partial(enter, model=parts.model, optimizer=optimizer, mesh=mesh)
            step = staged_step(stages.plan, stages.steps, start, again)
            state = run(state, step, feed, parts.train, hooks, reporter)
    if is_first():
        done = int(state.step)
        append_event(parts.folder, "end" if done >= steps else "stop", step=done, steps=steps)
        if start >= steps:
            say(console, f"already at step {start} of {steps}: nothing to do")
        elif done < steps:
            remedy = "" if hooks.complaints else "; the same command goes on"
            say(console, f"stopped at step {done} of {steps}, saved{remedy}")
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


def resume(parts: Parts, store: Store, abstract: Callable[[int], TrainState]) -> TrainState:
    """The state of the newest good checkpoint, after a look at whether it is of the same run.

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
    return state


REMEDY = (
    "begin a new run from it or from the base with a larger share of that source or a lower "
    "optimizer.peak_lr, or raise --forgetting.max-increase and go on"
)


def reference(parts: Parts) -> Mapping[str, float]:
    """Bits per character that the forgetting guard compares with: those of the base model."""
    return parts.continuation.get("bits_per_character", {}).get(BASE_ROW, {})


def check_remembers(parts: Parts, record: dict[str, Any]) -> None:
    """Refuses to go on where the forgetting guard ended the run, under the same bound.

    Raises:
      ConfigError: the checkpoint's evaluation exceeds it.
    """
    told = forgotten(parts.forgetting, reference(parts), record["metrics"])
    if told and record["step"] < parts.train.steps:
        raise ConfigError(f"{parts.folder}: at step {record['step']} {told}; {REMEDY}")


@dataclass(frozen=True)
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
        """Whether the forgetting guard ends the run."""
        told = forgotten(self.parts.forgetting, reference(self.parts), metrics)
        if told:
            self.complaints.append(told)
        if told and is_first():
            append_event(self.parts.folder, "forgetting", step=step, told=told)
            say(self.console, f"step {step}  forgetting guard: {told}; {REMEDY}")
        return bool(told)

    def sample(self, params: Any, step: int) -> None:
        """Writes samples/<step>.txt. All processes generate the same; the first one writes."""
        config = self.parts.samples
        parts = self.parts
        texts = generate(
            params, parts.model, parts.tokenizer, config.prompts, config.sampling(seed=step)
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
            yield Batch(*(place_rows(local, rows, size, sharding) for local in batch))


def make_reporter(parts: Parts, start: int, console: Console) -> Reporter:
    """Where the numbers go: only the first process writes and shows them."""
    throughput = Throughput(flops_per_token(parts.model, parts.plan.seq_len))
    if not is_first():
        return Reporter(None, None, throughput, parts.bytes_per_token)
    writer = MetricsWriter(parts.folder / "metrics.jsonl", start)
    return Reporter(
        writer, LiveLine(parts.train.steps, start, console), throughput, parts.bytes_per_token
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


def mixture_lines(parts: Parts) -> list[str]:
    """The shares of every phase, and what of each source the run will have seen at its end."""
    plan, steps, size = parts.plan, parts.train.steps, parts.step.batch_size
    epochs = plan.epochs_at(steps * size)
    lines = []
    for phase in plan.mixture():
        total = sum(phase["weights"].values())
        shares = ", ".join(f"{n} {w / total:.1%}" for n, w in phase["weights"].items())
        begin, ramp = phase["from_step"], phase["ramp_steps"]
        told = f"step {begin}" + (f" to {begin + ramp}, changing into" if ramp else "")
        late = " (after the end)" if begin >= steps else ""
        lines.append(f"           from {told}{late}: {shares}")
    seen = ", ".join(f"{name} {count:.1f}" for name, count in epochs.items())
    return [*lines, f"           epochs at step {steps}: {seen}"]
