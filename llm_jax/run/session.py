"""One training session in one run folder: what pretraining and instruction tuning have in common.

A command builds the data plan and the config; the session does the rest, in this order:

    1 lock the run folder                    2 restore the newest good checkpoint, or initialise
    3 compile the step on the mesh           4 hand batches, hooks and reporter to `train.run`
"""

import collections
import contextlib
import json
import logging
import platform
import socket
import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from llm_jax import config as config_files
from llm_jax.checkpoint.lock import RunLock
from llm_jax.checkpoint.processes import is_first
from llm_jax.checkpoint.record import DamagedError, read_meta
from llm_jax.checkpoint.run_folder import append_event, write_json_atomic
from llm_jax.checkpoint.store import CheckpointConfig, Store
from llm_jax.data.batch import Batch
from llm_jax.data.loader import batches
from llm_jax.data.mixture import DataPlan
from llm_jax.errors import CheckpointError, ConfigError
from llm_jax.eval.perplexity import Evaluator
from llm_jax.eval.windows import Corpus, EvalConfig
from llm_jax.generate import SamplingConfig, generate
from llm_jax.kernels.attention import choose
from llm_jax.model import ModelConfig, count_params, flops_per_token
from llm_jax.sharding import MeshConfig, batch_sharding, local_rows, make_mesh, place_rows
from llm_jax.tokenizer import Tokenizer
from llm_jax.tokenizer.base import digest
from llm_jax.train import (
    OptimizerConfig,
    Reporter,
    StepConfig,
    TrainConfig,
    TrainState,
    abstract_state,
    compile_step,
    init_state,
    make_optimizer,
    make_schedule,
    run,
)
from llm_jax.train.metrics import LiveLine, MetricsWriter, Throughput
from llm_jax.train.stop import StopRequest

log = logging.getLogger(__name__)

VERSIONED = (
    "llm-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "sentencepiece",
)
BEST_METRIC = "eval/bits_per_character"  # what `keep_best` compares, over all sources together


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Text generated during training, to see with one's own eyes what the numbers mean."""

    prompts: tuple[str, ...] = ("The ", "这是")
    max_new_tokens: int = 48
    temperature: float = 0.8
    top_p: float = 0.95

    def __post_init__(self) -> None:
        try:
            self.sampling(seed=0)
        except ConfigError as error:  # now, not at the first sample hours later
            raise ConfigError(str(error).replace("sampling.", "samples.")) from None

    def sampling(self, seed: int) -> SamplingConfig:
        """The same for `generate`."""
        return SamplingConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a session needs, whatever kind of training it is."""

    folder: Path
    take_over: bool  # ignore a run lock whose owner seems alive
    model: ModelConfig
    optimizer: OptimizerConfig
    step: StepConfig
    train: TrainConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    samples: SampleConfig
    resolved: Any  # the whole config dataclass, saved as config.json and in every checkpoint
    plan: DataPlan
    bytes_per_token: float  # of the training mixture, for bits per byte on the live line
    tokenizer: Tokenizer
    corpora: Mapping[str, Corpus]  # held-out documents by source
    eval: EvalConfig


def train_session(parts: Parts, console: Console) -> TrainState:
    """Trains in `parts.folder` to the end, or until asked to stop; resumes when there is a checkpoint."""
    mesh = make_mesh(parts.mesh)
    optimizer = make_optimizer(parts.optimizer)
    step_function = compile_step(
        mesh,
        model=parts.model,
        config=parts.step,
        optimizer=optimizer,
        schedule=make_schedule(parts.optimizer, parts.train.steps),
        clip_norm=parts.optimizer.clip_norm,
    )
    # raise here, before anything is written, if the model or the windows do not fit
    abstract = abstract_state(parts.model, optimizer, mesh)
    evaluator = Evaluator(parts.model, parts.corpora, parts.eval, mesh) if parts.corpora else None
    require_agreement(parts)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(RunLock(parts.folder, parts.take_over))
        stop = stack.enter_context(StopRequest(parts.folder))
        store = stack.enter_context(
            Store(parts.folder / "checkpoints", parts.checkpoint, lock=lock)
        )
        stack.enter_context(jax.set_mesh(mesh))
        if store.steps():
            state = resume(parts, store, abstract)
        else:
            state = init_state(parts.model, optimizer, mesh, parts.train.seed)
        start, steps = int(state.step), parts.train.steps
        if is_first():
            write_provenance(parts, start)
            say(console, summary(parts, mesh, start))
        if start < steps:
            feed = stack.enter_context(contextlib.closing(placed_batches(parts, mesh, start)))
            reporter = stack.enter_context(contextlib.closing(make_reporter(parts, start, console)))
            hooks = RunHooks(parts, store, stop, evaluator)
            state = run(state, step_function, feed, parts.train, hooks, reporter)
    if is_first():
        done = int(state.step)
        append_event(parts.folder, "end" if done >= steps else "stop", step=done, steps=steps)
        if start >= steps:
            say(console, f"already at step {start} of {steps}: nothing to do")
        elif done < steps:
            say(console, f"stopped at step {done} of {steps}, saved; the same command goes on")
    return state


def say(console: Console, text: str) -> None:
    """Prints plain text, whole lines."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def require_agreement(parts: Parts) -> None:
    """All processes must be started with the same config, data and packages, or they would hang or diverge.

    Raises:
      ConfigError: on every process, naming those that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    facts = {"record": record_of(parts), "versions": {name: version(name) for name in VERSIONED}}
    mine = np.uint32(int(digest(facts)[:8], 16))
    every = multihost_utils.process_allgather(mine)
    others = [str(index) for index, value in enumerate(every) if value != every[0]]
    if others:
        raise ConfigError(
            f"process {', '.join(others)} has another config, prepared data or package versions than process 0; "
            "start all of them with the same"
        )


def resume(parts: Parts, store: Store, abstract: TrainState) -> TrainState:
    """The state of the newest good checkpoint, after a look at whether it is of the same run.

    Raises:
      CheckpointError: it is not, and nothing was touched; or no checkpoint is good.
    """
    for step in reversed(store.steps()):
        try:
            record = read_meta(store.folder / str(step))
        except DamagedError:  # `restore` tells and steps over it
            continue
        check_continues(parts, record)
        break
    state, record = store.restore(abstract)
    changes = dict(config_files.changes(record["config"], config_files.to_dict(parts.resolved)))
    if is_first() and changes:
        append_event(parts.folder, "config changed", step=record["step"], changes=changes)
    return state


@dataclass(frozen=True)
class RunHooks:
    """`train.loop.Hooks` of a run folder."""

    parts: Parts
    store: Store
    stop: StopRequest
    evaluator: Evaluator | None  # None when there is no held-out text

    def evaluate(self, params: Any, step: int) -> dict[str, float]:
        """Held-out metrics as `eval/...`; none when there is no held-out text."""
        metrics = self.evaluator.evaluate(params).metrics if self.evaluator else {}
        return {f"eval/{name}": value for name, value in metrics.items()}

    def sample(self, params: Any, step: int) -> None:
        """Writes samples/<step>.txt; nothing when there are several processes, whose prompts must agree."""
        if jax.process_count() > 1:
            return
        config = self.parts.samples
        parts = self.parts
        texts = generate(
            params, parts.model, parts.tokenizer, config.prompts, config.sampling(seed=step)
        )
        shown = [
            f"{prompt}|{made.text}\n" for prompt, made in zip(config.prompts, texts, strict=True)
        ]
        path = parts.folder / "samples" / f"{step:07d}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(shown), encoding="utf-8")
        except OSError as error:  # a full disk; the checkpoints decide whether the run can go on
            log.error("%s cannot be written: %s", path, error.strerror)

    def save(self, state: TrainState, step: int, metrics: dict[str, float]) -> None:
        """A checkpoint that describes itself."""
        parts = self.parts
        folder = parts.folder / "tokenizer"
        files = {
            path.name: path.read_bytes()
            for path in sorted(folder.iterdir())
            if not path.name.startswith(".")  # what a killed process left
        }
        self.store.save(step, state, record_of(parts), files, metrics)

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
    sharding = batch_sharding(mesh, size)
    rows = local_rows(sharding, size)
    with contextlib.closing(
        batches(parts.plan, size, rows, start, reading.workers, reading.prefetch)
    ) as feed:
        for batch in feed:
            yield Batch(*(place_rows(local, rows, size, sharding) for local in batch))


def record_of(parts: Parts) -> dict[str, Any]:
    """What a checkpoint says about where it comes from."""
    return {
        "config": config_files.to_dict(parts.resolved),
        "plan_digest": parts.plan.digest,
        "tokenizer_fingerprint": parts.tokenizer.fingerprint,
        "mesh": dict(make_mesh(parts.mesh).shape),
    }


def check_continues(parts: Parts, record: dict[str, Any]) -> None:
    """Refuses to resume what would silently be another run.

    Raises:
      CheckpointError: model, tokenizer, data or batch size differ from those of the checkpoint.
    """
    step = record["step"]
    if record["tokenizer_fingerprint"] != parts.tokenizer.fingerprint:
        raise CheckpointError(
            f"{parts.folder}: step {step} was trained with another tokenizer (fingerprint "
            f"{record['tokenizer_fingerprint'][:12]}, the data has {parts.tokenizer.fingerprint[:12]}); "
            "prepare the data with the run's own tokenizer/, or start a new run"
        )
    changed = dict(config_files.changes(record["config"], config_files.to_dict(parts.resolved)))
    # how it is computed may change, what is computed may not
    free = ("model.attention", "model.remat", "model.dtype", "step.micro_batches")
    for name, (before, now) in changed.items():
        if name not in free and (name.startswith("model.") or name == "step.batch_size"):
            raise CheckpointError(
                f"{parts.folder}: {name} was {before!r} at step {step} and is {now!r} now; "
                "a run cannot change it: put it back, or choose another run folder with --run"
            )
    if record["plan_digest"] != parts.plan.digest:
        data = ", ".join(
            f"{name} {before!r} -> {now!r}"
            for name, (before, now) in changed.items()
            if name.startswith("data.")
        )
        raise CheckpointError(
            f"{parts.folder}: the data changed since step {step} ({data or 'the prepared shards differ'}), so rows "
            "would be skipped or repeated; put it back, or choose another run folder with --run"
        )


def write_provenance(parts: Parts, start: int) -> None:
    """config.json, env.json, tokenizer/ and a line in events.jsonl."""
    parts.folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(parts.folder / "config.json", json.loads(config_files.dumps(parts.resolved)))
    devices = jax.devices()
    write_json_atomic(
        parts.folder / "env.json",
        {
            "versions": {name: version(name) for name in VERSIONED},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "devices": {
                "kind": devices[0].device_kind,
                "count": len(devices),
                "processes": jax.process_count(),
            },
            "command": sys.argv,
            "plan_digest": parts.plan.digest,
            "tokenizer_fingerprint": parts.tokenizer.fingerprint,
        },
    )
    parts.tokenizer.save(parts.folder / "tokenizer")
    append_event(
        parts.folder, "resume" if start else "start", step=start, host=socket.gethostname()
    )


def make_reporter(parts: Parts, start: int, console: Console) -> Reporter:
    """Where the numbers go: only the first process writes and shows them."""
    throughput = Throughput(flops_per_token(parts.model, parts.plan.seq_len))
    if not is_first():
        return Reporter(None, None, throughput, parts.bytes_per_token)
    writer = MetricsWriter(parts.folder / "metrics.jsonl", start)
    return Reporter(
        writer, LiveLine(parts.train.steps, start, console), throughput, parts.bytes_per_token
    )


def attention_choice(model: ModelConfig, seq_len: int) -> tuple[str, str]:
    """Which implementation of attention training uses, and why."""
    if model.attention != "auto":
        return model.attention, "asked for by model.attention"
    return choose(jax.default_backend(), seq_len)


def summary(parts: Parts, mesh: Mesh, start: int) -> str:
    """What is about to happen, in a few lines."""
    model, step = parts.model, parts.step
    tokens = step.batch_size * parts.plan.seq_len
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    name, reason = attention_choice(model, parts.plan.seq_len)
    shares = ", ".join(f"{name} {share:.1%}" for name, share in parts.plan.shares.items())
    return "\n".join(
        [
            f"model      {count_params(model):,} parameters, {model.num_layers} layers, position {model.position}, {model.dtype}",
            f"mesh       {shape} of {jax.devices()[0].device_kind}, {jax.process_count()} process(es)",
            f"attention  {name}: {reason}",
            f"data       {shares}; {tokens:,} tokens a step; plan {parts.plan.digest[:12]}",
            f"run        {parts.folder}, from step {start} to {parts.train.steps}",
        ]
    )
