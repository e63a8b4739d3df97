"""Where a run comes from, and whether what is asked for now is still the same run."""

import contextlib
import json
import os
import platform
import socket
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import llm_jax
from llm_jax import config as config_files
from llm_jax.checkpoint.record import read_meta
from llm_jax.checkpoint.run_folder import (
    CHECKPOINTS,
    append_event,
    numbered_folders,
    write_json_atomic,
)
from llm_jax.data.row_order import RowOrder
from llm_jax.errors import CheckpointError, ConfigError
from llm_jax.run.parts import Parts
from llm_jax.run.phases import as_phase
from llm_jax.sharding import make_mesh
from llm_jax.tokenizer.base import digest
from llm_jax.train.metrics import lost

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

# as the whole of the model is
FIXED = ("method", "step.batch_size", "step.spike_window", "stages.new_rows_steps", "stages.train")


def require_run_folder(folder: Path) -> None:
    """A run writes only into a folder that is new, empty, or a run's. Writes nothing.

    Raises:
      ConfigError: it cannot be made or written, or holds something else, such as somebody's text.
    """
    there = nearest_there(folder)
    reason = ""
    if not there.is_dir():
        reason = f"{there} is no folder"
    elif not os.access(there, os.W_OK | os.X_OK):  # False on a read-only file system, for root too
        reason = f"nothing can be written in {there}"
    if reason:
        raise ConfigError(
            f"{folder}: cannot be made a run folder: {reason}; name another one with --run"
        )
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not any((folder / name).exists() for name in ("config.json", "run.lock", "checkpoints")):
        raise ConfigError(
            f"run={str(folder)!r} is a folder with other things in it; name a new one with --run"
        )


def nearest_there(path: Path) -> Path:
    """The path, or the nearest above it that exists: a folder that is to be made will lie in it."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def require_agreement(parts: Parts) -> None:
    """All processes must be started with the same config, data and packages, or they would hang or diverge.

    Raises:
      ConfigError: on every process, naming those that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    facts = {"record": record_of(parts, 0), "versions": versions(), "code": code_digest()}
    mine = np.uint32(int(digest(facts)[:8], 16))
    every = multihost_utils.process_allgather(mine)
    others = [str(index) for index, value in enumerate(every) if value != every[0]]
    if others:
        raise ConfigError(
            f"process {', '.join(others)} has another config, prepared data, code or package versions than process 0; "
            "start all of them with the same (llm-jax doctor CONFIG says what differs)"
        )


def versions() -> dict[str, str]:
    """Of every package whose numbers a run depends on."""
    return {name: version(name) for name in VERSIONED}


def code_digest() -> str:
    """Of this package's own source: hosts with different checkouts compute different things."""
    root = Path(llm_jax.__file__).parent
    files = sorted(root.rglob("*.py"))
    return digest({str(path.relative_to(root)): path.read_text("utf-8") for path in files})


def record_of(parts: Parts, step: int) -> dict[str, Any]:
    """What a checkpoint of `step` says about where it comes from."""
    return {
        "config": config_files.to_dict(parts.resolved),
        "plan_digest": parts.plan.digest,
        "rows_digest": parts.plan.digest_before(parts.rows_before(step)),
        "mixture": parts.plan.mixture(),
        "tokenizer_fingerprint": parts.tokenizer.fingerprint,
        "mesh": dict(make_mesh(parts.mesh).shape),
        # of a checkpoint: its own order, not what a config asks for
        "rows": parts.order.to_record(),
        **parts.origin,
        **({"continuation": dict(parts.continuation)} if parts.continuation else {}),
        **(
            {"guard": parts.guard.to_record()}
            if parts.forgetting.sources or parts.guard.phases
            else {}
        ),
    }


def order_after(record: Mapping[str, Any], batch_size: int) -> RowOrder:
    """Which rows the steps after a checkpoint take: as before it, with today's batch size from there on."""
    sizes = ((0, record["config"]["step"]["batch_size"]),)
    before = RowOrder.from_record(record["rows"]) if "rows" in record else RowOrder(sizes=sizes)
    return before.resized(record["step"], batch_size)


def recorded_order(run: Path, from_step: int, batch_size: int) -> RowOrder:
    """Of the checkpoint that a run goes on from: `from_step`, or the newest readable one if negative."""
    steps = numbered_folders(run / CHECKPOINTS)
    for step in reversed([step for step in steps if from_step in (-1, step)]):
        with contextlib.suppress(CheckpointError):  # `resume` tells and steps over it
            return order_after(read_meta(run / CHECKPOINTS / str(step)), batch_size)
    return RowOrder(sizes=((0, batch_size),))


def filled(recorded: dict[str, Any], resolved: Any, sections: Sequence[str]) -> dict[str, Any]:
    """A recorded config with the defaults of settings that its sections did not have yet."""
    full = dict(recorded)
    for name in sections:
        section = vars(resolved).get(name)
        if section is not None:
            loaded = config_files.from_dict(type(section), recorded.get(name, {}), name)
            full[name] = config_files.to_dict(loaded)
    if "method" in vars(resolved):
        full.setdefault("method", "sft")  # what runs were before there was a choice
    return full


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
    recorded = filled(record["config"], parts.resolved, ("model", "stages"))
    changed = dict(config_files.changes(recorded, config_files.to_dict(parts.resolved)))
    # how it is computed may change, what is computed may not
    free = ("model.attention", "model.remat", "model.dtype", "step.micro_batches")
    for name, (before, now) in changed.items():
        fixed = name.startswith("model.") or name in FIXED
        if name == "step.batch_size" and parts.optimizer.lr_with_batch:
            continue
        if name not in free and fixed:
            how = (
                ", or say by --optimizer.lr-with-batch linear (or sqrt) how the learning rate follows"
                if name == "step.batch_size"
                else ""
            )
            raise CheckpointError(
                f"{parts.folder}: {name} was {before!r} at step {step} and is {now!r} now; "
                f"a run cannot change it: put it back, or choose another run folder with --run{how}"
            )
    if record["plan_digest"] == parts.plan.digest:
        return
    # another phase from here on leaves the rows that were seen as they are
    if record.get("rows_digest") != parts.plan.digest_before(parts.rows_before(step)):
        data = ", ".join(
            f"{name} {before!r} -> {now!r}"
            for name, (before, now) in changed.items()
            if name.startswith("data.")
        )
        if "rows_digest" not in record:
            data = "an older version of this package planned its rows"
        raise CheckpointError(
            f"{parts.folder}: the data changed since step {step} ({data or 'the prepared shards differ'}), so rows "
            f"would be skipped or repeated; put it back{as_phase(parts, record, changed)}, or choose another run "
            "folder with --run"
        )


def write_provenance(parts: Parts, start: int) -> None:
    """config.json, env.json, tokenizer/ and a line in events.jsonl."""
    parts.folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(parts.folder / "config.json", json.loads(config_files.dumps(parts.resolved)))
    devices = jax.devices()
    write_json_atomic(
        parts.folder / "env.json",
        {
            "versions": versions(),
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
    steps, seconds = lost(parts.folder / "metrics.jsonl", start)
    redone = {"lost_steps": steps, "lost_seconds": round(seconds, 3)} if steps else {}
    host = socket.gethostname()
    append_event(parts.folder, "resume" if start else "start", step=start, host=host, **redone)
