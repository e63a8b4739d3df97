"""One training session in one run folder: what pretraining and instruction tuning have in common.

A command builds the data plan and the config; the session does the rest, in this order:

    1 lock the run folder                    2 restore the newest good checkpoint, or initialise
    3 compile the step on the mesh           4 hand batches, hooks and reporter to `train.run`
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from llm_jax import config as config_files
from llm_jax.checkpoint.lock import RunLock
from llm_jax.checkpoint.processes import is_first
from llm_jax.checkpoint.record import DamagedError, read_meta
from llm_jax.checkpoint.run_folder import CHECKPOINTS, append_event, numbered_folders
from llm_jax.checkpoint.store import Store
from llm_jax.errors import ConfigError
from llm_jax.eval.perplexity import Evaluator
from llm_jax.generate.decode import check_lengths, encode_prompt
from llm_jax.model import attention_choice, count_params
from llm_jax.run.continuation import begin
from llm_jax.run.course import Stages, make_stages, optimizer_of, train_on, watchdog
from llm_jax.run.hooks import REMEDY, RunHooks, reference_bits, say
from llm_jax.run.parts import Parts
from llm_jax.run.phases import mixture_lines, record_phases
from llm_jax.run.preference import PairEvaluator, load_reference
from llm_jax.run.provenance import (
    check_continues,
    require_agreement,
    require_run_folder,
    write_provenance,
)
from llm_jax.run.rebalance import Guard
from llm_jax.run.roll_back import as_recorded
from llm_jax.sharding import make_mesh
from llm_jax.train import (
    Phases,
    Stage,
    TrainState,
    count_trained,
    enter,
    forgotten,
    init_state,
    state_of,
)
from llm_jax.train.stop import StopRequest

log = logging.getLogger(__name__)


def train_session(parts: Parts, console: Console) -> TrainState:
    """Trains in `parts.folder` to the end, or until asked to stop; resumes when there is a checkpoint."""
    phases = Phases()
    mesh = make_mesh(parts.mesh)
    optimizer = optimizer_of(parts)
    stages, evaluator = fitted(parts, mesh, optimizer)
    require_agreement(parts)
    check_folder(parts)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(RunLock(parts.folder, parts.take_over))
        stack.enter_context(watchdog(parts, phases))
        stop = stack.enter_context(StopRequest(parts.folder))
        store = stack.enter_context(
            Store(parts.folder / "checkpoints", parts.checkpoint, lock=lock)
        )
        stack.enter_context(jax.set_mesh(mesh))
        begun = None
        if store.steps():
            state, record = resume(parts, store, stages.state_at)
            parts = as_recorded(parts, record)
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
            say(console, summary(parts, mesh, start, stages.plan))
            if begun:
                append_event(parts.folder, "continuation", step=0, **begun.facts)
                say(console, begun.table or "start      not measured: there is no held-out text")
        if parts.objective and start < steps:
            stages, evaluator = with_reference(parts, mesh, stages, evaluator)
        hooks = RunHooks(parts, store, stop, evaluator, console, phases)
        if start < steps:
            again = partial(enter, model=parts.model, optimizer=optimizer, mesh=mesh)
            before = begun.metrics if begun else {}
            if parts.objective and begun:
                before = hooks.evaluate(state.params, 0)
            state = train_on(hooks, state, stages, mesh, again, before)
    if is_first():
        done = int(state.step)
        kind = (
            "end" if done >= steps or hooks.complaints else "stop"
        )  # a "stop" may be gone on from
        append_event(parts.folder, kind, step=done, steps=steps, seconds=phases.totals())
        if start >= steps:
            say(console, f"already at step {start} of {steps}: nothing to do")
        elif done < steps:
            remedy = "" if hooks.complaints else "; the same command goes on"
            say(console, f"stopped at step {done} of {steps}, saved{remedy}")
    return state


def fitted(parts: Parts, mesh: Mesh, optimizer: Any) -> tuple[Stages, Evaluator | None]:
    """The steps and the evaluator of a session; nothing is written or computed.

    Raises:
      ConfigError: the model, the rows, the windows or the prompts do not fit the mesh or each other.
    """
    stages = make_stages(parts, mesh, optimizer)
    evaluator = make_evaluator(parts, mesh)
    if parts.train.sample_every_steps:
        prompts = [encode_prompt(parts.tokenizer, prompt) for prompt in parts.prompts]
        check_lengths(parts.model, prompts, parts.samples.sampling(seed=0))
    return stages, evaluator


def check_folder(parts: Parts) -> None:
    """Looks whether the session may go on, or begin, in its run folder. Writes nothing.

    Raises:
      CheckpointError: what is there is another run.
      ConfigError: it can be no run folder, or the forgetting guard would end the run where it stands.
    """
    require_run_folder(parts.folder)
    checkpoints = parts.folder / CHECKPOINTS
    for step in reversed(numbered_folders(checkpoints)):
        if parts.from_step not in (-1, step):
            continue
        try:
            record = read_meta(checkpoints / str(step))
        except DamagedError:  # `Store.restore` tells and steps over it
            continue
        check_continues(parts, record)
        check_remembers(parts, record)
        return


def make_evaluator(parts: Parts, mesh: Mesh) -> Evaluator | None:
    """Scores held-out text during training, without the intervals nobody sees there; None without text."""
    config = replace(parts.eval, bootstrap_samples=0)
    return Evaluator(parts.model, parts.corpora, config, mesh) if parts.corpora else None


def with_reference(
    parts: Parts, mesh: Mesh, stages: Stages, evaluator: Evaluator | None
) -> tuple[Stages, Evaluator | PairEvaluator | None]:
    """Steps and evaluator of learning from pairs of answers, with what they are compared with.

    Raises:
      CheckpointError: it cannot be read.
    """
    reference = load_reference(parts, mesh)
    stages = stages.with_reference(reference)
    if evaluator is None or not parts.pairs:
        return stages, None
    return stages, PairEvaluator(parts, parts.pairs, mesh, evaluator, reference)


def resume(
    parts: Parts, store: Store, abstract: Callable[[int], TrainState]
) -> tuple[TrainState, dict[str, Any]]:
    """The state and record of the newest good checkpoint.

    Raises:
      CheckpointError: no checkpoint is good, or it is of another run.
      ConfigError: the forgetting guard would end the run where it stands.
    """
    check_folder(parts)  # again: another process may have written before the lock was ours
    state, record = store.restore(abstract, parts.from_step)
    changes = dict(config_files.changes(record["config"], config_files.to_dict(parts.resolved)))
    if is_first():
        record_phases(parts, record)
    if is_first() and changes:
        append_event(parts.folder, "config changed", step=record["step"], changes=changes)
        told = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changes.items())
        log.warning("settings changed since step %d: %s", record["step"], told)
    return state, record


def check_remembers(parts: Parts, record: dict[str, Any]) -> None:
    """Refuses to go on where the forgetting guard ended the run, with the same bound and mixture.

    Raises:
      ConfigError: the checkpoint's evaluation exceeds it.
    """
    told = forgotten(parts.forgetting, reference_bits(parts), record["metrics"])
    same = record["plan_digest"] == parts.plan.digest
    goes_on = parts.forgetting.action == "rebalance" and not Guard.of_record(record).ended
    if told and same and not goes_on and record["step"] < parts.train.steps:
        raise ConfigError(f"{parts.folder}: at step {record['step']} {told}; {REMEDY}")


def summary(parts: Parts, mesh: Mesh, start: int, stages: Sequence[Stage]) -> str:
    """What is about to happen, in a few lines."""
    model, step = parts.model, parts.step
    every, trained = count_params(model), count_trained(model, stages[-1].trainable)
    part = "" if trained == every else f" ({trained:,} of them trained, {trained / every:.2%})"
    tokens = step.batch_size * parts.plan.seq_len
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    with jax.set_mesh(mesh):
        attention, reason = attention_choice(model, step.batch_size, parts.plan.seq_len)
    return "\n".join(
        [
            f"model      {every:,} parameters{part}, {model.num_layers} layers, position {model.position}, {model.dtype}",
            f"mesh       {shape} of {jax.devices()[0].device_kind}, {jax.process_count()} process(es)",
            f"attention  {attention}: {reason}",
            f"data       {tokens:,} tokens a step; plan {parts.plan.digest[:12]}",
            *mixture_lines(parts),
            f"run        {parts.folder}, from step {start} to {parts.train.steps}",
        ]
    )
