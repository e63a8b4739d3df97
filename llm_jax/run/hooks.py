"""What a run does besides stepping: evaluates, samples, saves, guards, and listens to requests."""

import collections
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

from llm_jax.checkpoint.processes import is_first
from llm_jax.checkpoint.replicas import differing_replicas
from llm_jax.checkpoint.run_folder import append_event
from llm_jax.checkpoint.store import Store
from llm_jax.data.mixture import DataPlan
from llm_jax.errors import TrainingError
from llm_jax.eval.perplexity import BrokenOffError, Evaluator
from llm_jax.generate import generate
from llm_jax.run.continuation import BASE_ROW
from llm_jax.run.parts import Parts
from llm_jax.run.preference import PairEvaluator
from llm_jax.run.provenance import record_of
from llm_jax.run.rebalance import decide, what_next
from llm_jax.train import Phases, TrainState, beyond, forgotten
from llm_jax.train.stop import StopRequest

log = logging.getLogger(__name__)


def say(console: Console, text: str) -> None:
    """Prints plain text, whole lines."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


REMEDY = (
    "begin a new run from it or from the base with a larger share of that source or a lower "
    "optimizer.peak_lr, or raise --forgetting.max-increase or that share, by a phase of --data.phases, and go on"
)


def reference_bits(parts: Parts) -> Mapping[str, float]:
    """Bits per character that the forgetting guard compares with: those of the base model."""
    return parts.continuation.get("bits_per_character", {}).get(BASE_ROW, {})


def rebalanced(parts: Parts, metrics: Mapping[str, float], step: int) -> Parts:
    """The run after an evaluation at `step`, with another plan where the guard adds a phase to it."""
    found = beyond(parts.forgetting, reference_bits(parts), metrics)
    shares = parts.plan.shares_at(parts.rows_before(step))
    guard = decide(parts.guard, parts.forgetting, shares, found, step)
    if guard.phases == parts.guard.phases:
        return replace(parts, guard=guard)
    data = guard.applied(parts.plan.config)
    return replace(
        parts,
        guard=guard,
        plan=DataPlan(data, order=parts.order, steps=parts.train.steps),
        resolved=replace(parts.resolved, data=data),
    )


@dataclass
class RunHooks:
    """`train.loop.Hooks` of a run folder."""

    parts: Parts
    store: Store
    stop: StopRequest
    evaluator: Evaluator | PairEvaluator | None  # None when there is no held-out text
    console: Console
    phases: Phases
    complaints: list[str] = field(default_factory=list)  # of the forgetting guard

    def evaluate(self, params: Any, step: int) -> dict[str, float]:
        """Held-out metrics as `eval/...`; none without held-out text, or when asked to stop meanwhile."""
        if not self.evaluator:
            return {}
        # the last one is the run's result: it is finished whatever comes
        ends = step == self.parts.train.steps
        try:
            result = self.evaluator.evaluate(
                params, lambda: not ends and self.stop.should_stop(step)
            )
        except BrokenOffError:
            return {}
        return {f"eval/{name}": value for name, value in result.metrics.items()}

    def is_worse(self, metrics: dict[str, float], step: int) -> bool:
        """Whether the forgetting guard ends the run, or this part of it: it goes on with other rows."""
        parts, then = self.parts, REMEDY
        told = forgotten(parts.forgetting, reference_bits(parts), metrics)
        if parts.forgetting.action == "rebalance" and step < parts.train.steps and metrics:
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

    def check_replicas(self, state: TrainState, step: int) -> None:
        """Before a save: a corrupted state must not become the newest checkpoint."""
        self.phases.enter("eval")  # of the whole state: not as quick as a step
        problems = differing_replicas(state)
        if problems and is_first():
            append_event(self.parts.folder, "replicas differ", step=step, problems=problems)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise TrainingError(
                f"step {step}: {problems[0]}{more}; take that device's host out and resume: the state is not saved"
            )

    def save(self, state: TrainState, step: int, metrics: dict[str, float]) -> None:
        """A checkpoint that describes itself."""
        parts = self.parts
        self.store.save(step, state, record_of(parts, step), parts.tokenizer.files, metrics)
        if is_first():
            append_event(parts.folder, "ledger", step=step, seconds=self.phases.totals())

    def save_due(self, step: int) -> bool:
        """By `checkpoint.save_every_steps`."""
        return self.store.due(step)

    def describe_step(self, step: int) -> str:
        """`en 75 %, zh 25 %`: the rows of the batch that update number `step` used."""
        rows = self.parts.order.rows(step - 1).tolist()
        names = [self.parts.plan.source_of(row) for row in rows]
        return ", ".join(
            f"{name} {count / len(rows):.0%}"
            for name, count in collections.Counter(names).most_common()
        )

    def should_stop(self, step: int) -> bool:
        """SIGTERM or Ctrl-C."""
        return self.stop.should_stop(step)

    def should_save(self, step: int) -> bool:
        """SIGUSR1 or a file `save` in the run folder."""
        return self.stop.should_save(step)
