"""Back to the checkpoint before steps that had to be skipped, and on without their batches.

What was left out is in every later checkpoint, so a run that is killed and resumed, or resumed elsewhere,
takes the same rows. Killed before the next save it meets the same steps again and decides the same.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llm_jax.checkpoint.processes import is_first
from llm_jax.checkpoint.run_folder import append_event
from llm_jax.checkpoint.store import Store
from llm_jax.data.mixture import DataPlan
from llm_jax.data.row_order import RowOrder
from llm_jax.errors import TrainingError
from llm_jax.run.parts import Parts
from llm_jax.run.provenance import order_after
from llm_jax.run.rebalance import Guard
from llm_jax.train import BadStepsError, TrainState
from llm_jax.train.metrics import lost

log = logging.getLogger(__name__)


def as_recorded(parts: Parts, record: Mapping[str, Any]) -> Parts:
    """The run as a checkpoint left it: which rows come next, and what the forgetting guard had done.

    Phases that the guard added after it come again.
    """
    return _ordered(_guarded(parts, record), order_after(record, parts.step.batch_size))


def _guarded(parts: Parts, record: Mapping[str, Any]) -> Parts:
    return replace(parts, guard=replace(Guard.of_record(record), phases=parts.guard.phases))


def _ordered(parts: Parts, order: RowOrder) -> Parts:
    """The run with this order of rows, and phases that begin where its steps then come to."""
    if order == parts.order:
        return parts
    plan = DataPlan(parts.plan.config, order=order, steps=parts.train.steps)
    return replace(parts, recorded_order=order, plan=plan)


def roll_back(
    parts: Parts, store: Store, abstract: Callable[[int], TrainState], bad: BadStepsError
) -> tuple[Parts, TrainState]:
    """The state before the bad steps, and the run with their batches left out.

    Raises:
      TrainingError: there is no such checkpoint, or it went back often enough.
    """
    store.wait()  # the newest may still be on its way
    before = [step for step in store.steps() if step < bad.first]
    remedy = "lower optimizer.peak_lr or look at these batches, then resume"
    if not before:
        raise TrainingError(f"{bad}, and there is no checkpoint before them; {remedy}")
    if len(parts.order.left_out) >= parts.train.max_rollbacks:
        raise TrainingError(
            f"{bad}, after train.max_rollbacks={parts.train.max_rollbacks} times of going back; {remedy}"
        )
    order = parts.order.without(bad.first - 1, bad.last - 1)
    newer = [step for step in store.steps() if step > before[-1]]
    state, record = store.restore(abstract, before[-1])
    if is_first():
        for step in newer:  # set aside by `restore`; going back often must not fill the disk
            shutil.rmtree(store.folder / f"{step}.abandoned", ignore_errors=True)
        steps, seconds = lost(parts.folder / "metrics.jsonl", before[-1])
        log.warning("%s; going back to step %d, without their batches", bad, before[-1])
        append_event(
            parts.folder,
            "rolled back",
            step=before[-1],
            bad_steps=[bad.first, bad.last],
            left_out_rows=list(order.left_out[-1]),
            told=str(bad),
            lost_steps=steps,
            lost_seconds=round(seconds, 3),
        )
    sizes = order_after(record, parts.step.batch_size).sizes
    return _ordered(_guarded(parts, record), replace(order, sizes=sizes)), state
