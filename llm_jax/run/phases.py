"""The mixture of a run by phases: shown at the start, recorded when it changes, and what to type to change it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_jax.checkpoint.run_folder import CHECKPOINTS, append_event, steps_in
from llm_jax.config import to_dict
from llm_jax.data.mixture import DataConfig
from llm_jax.data.page_checks import DamagedShardError
from llm_jax.data.phases import LeftOut
from llm_jax.data.shards import MANIFEST, TRAIN
from llm_jax.errors import DataError
from llm_jax.run.parts import Parts

# settings whose change can be written as a phase
WEIGHTS = ("data.sources", "data.phases", "data.rule", "data.temperature", "data.max_epochs")


def as_phase(parts: Parts, record: dict[str, Any], changed: dict[str, Any]) -> str:
    """What to type so that the change becomes a phase; "" where no phase could say it."""
    data, step = record["config"]["data"], record["step"]
    if any(name in changed for name in ("data.seq_len", "data.packing", "data.seed")):
        return ""
    if data.get("rule") == "unimax" and "train.steps" in changed:
        return f" or keep the steps it shares out: --data.budget-steps {changed['train.steps'][0]}"
    if "data.prepared" in changed and not data["sources"] and "mixture" in record:
        # the sizes of another folder give every source another share
        sized = data.get("rule", "fixed") == "fixed"
        weights = record["mixture"][0]["weights"].items()
        sources = [{"name": name, "weight": weight if sized else 1.0} for name, weight in weights]
        told = json.dumps(sources, ensure_ascii=False)
        return (
            f", or name the sources as they were and add others by a phase: --data.sources '{told}'"
        )
    if "data.leave_out" in changed:
        return f" and leave shards out from here on: from_step {step} in --data.leave-out"
    if any(name in changed for name in WEIGHTS):
        kept = [phase for phase in data.get("phases", []) if phase["from_step"] < step]
        first = "data.phases" not in changed  # the weights of step 0 are what was changed
        weights = parts.plan.weights[0 if first else -1].items()
        sources = [{"name": name, "weight": round(weight, 6)} for name, weight in weights]
        phases = json.dumps([*kept, {"from_step": step, "sources": sources}], ensure_ascii=False)
        return f" and write the change as a phase: --data.phases '{phases}'"
    return ""


@contextlib.contextmanager
def leaving_out(run: Path, data: DataConfig) -> Iterator[None]:
    """Adds to the error about a damaged shard what goes on without it, from the newest checkpoint on."""
    try:
        yield
    except DamagedShardError as error:
        if "/train-" not in error.shard:  # held-out text is measured whole, or not at all
            raise
        source = error.shard.partition("/train-")[0]
        splits = json.loads((Path(data.prepared) / MANIFEST).read_bytes())["sources"][source][
            "splits"
        ]
        if len(splits[TRAIN]["shards"]) == 1:
            raise DataError(
                f"{error}, or begin a new run whose data.sources do not name {source!r}"
            ) from None
        newest = max(steps_in(run / CHECKPOINTS), default=0)
        others = [left for left in data.leave_out if left.shard != error.shard]
        wanted = (*others, LeftOut(shard=error.shard, from_step=newest))
        raise DataError(
            f"{error}, or go on without it: --data.leave-out '{json.dumps(to_dict(wanted), ensure_ascii=False)}'"
        ) from None


def record_phases(parts: Parts, record: dict[str, Any]) -> None:
    """A line in events.jsonl when the mixture from here on is another than at the checkpoint."""
    if record["plan_digest"] != parts.plan.digest:
        append_event(
            parts.folder,
            "data phases",
            step=record["step"],
            before=record["mixture"],
            now=parts.plan.mixture(),
            left_out=parts.plan.left_out(),
            plan_digest=parts.plan.digest,
        )


def mixture_lines(parts: Parts) -> list[str]:
    """The shares of every phase, and what of each source the run will have seen at its end."""
    plan, steps = parts.plan, parts.train.steps
    epochs = plan.epochs_at(parts.rows_before(steps))
    lines = []
    for phase in plan.mixture():
        total = sum(phase["weights"].values())
        shares = ", ".join(f"{n} {w / total:.1%}" for n, w in phase["weights"].items())
        begin, ramp = phase["from_step"], phase["ramp_steps"]
        told = f"step {begin}" + (f" to {begin + ramp}, changing into" if ramp else "")
        late = " (after the end)" if begin >= steps else ""
        lines.append(f"           from {told}{late}: {shares}")
    for left in plan.left_out():
        told = f"step {left['from_step']}: without {left['shard']}, {left['share']:.1%} of {left['source']}"
        lines.append(f"           from {told}")
    seen = ", ".join(f"{name} {count:.1f}" for name, count in epochs.items())
    return [*lines, f"           epochs at step {steps}: {seen}"]
