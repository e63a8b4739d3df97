"""Where a run comes from, and whether what is asked for now is still the same run."""

import json
import platform
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm_jax import config as config_files
from llm_jax.checkpoint.run_folder import append_event, write_json_atomic
from llm_jax.errors import CheckpointError, ConfigError
from llm_jax.run.parts import Parts
from llm_jax.run.phases import as_phase
from llm_jax.sharding import make_mesh
from llm_jax.tokenizer.base import digest

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

FIXED = ("step.batch_size", "stages.new_rows_steps", "stages.train")  # as the whole of the model is


def require_run_folder(folder: Path) -> None:
    """A run writes only into a folder that is new, empty, or a run's.

    Raises:
      ConfigError: it holds something else, such as somebody's text.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not any((folder / name).exists() for name in ("config.json", "run.lock", "checkpoints")):
        raise ConfigError(
            f"run={str(folder)!r} is a folder with other things in it; name a new one with --run"
        )


def require_agreement(parts: Parts) -> None:
    """All processes must be started with the same config, data and packages, or they would hang or diverge.

    Raises:
      ConfigError: on every process, naming those that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    facts = {"record": record_of(parts, 0), "versions": {name: version(name) for name in VERSIONED}}
    mine = np.uint32(int(digest(facts)[:8], 16))
    every = multihost_utils.process_allgather(mine)
    others = [str(index) for index, value in enumerate(every) if value != every[0]]
    if others:
        raise ConfigError(
            f"process {', '.join(others)} has another config, prepared data or package versions than process 0; "
            "start all of them with the same"
        )


def record_of(parts: Parts, step: int) -> dict[str, Any]:
    """What a checkpoint of `step` says about where it comes from."""
    return {
        "config": config_files.to_dict(parts.resolved),
        "plan_digest": parts.plan.digest,
        "rows_digest": parts.plan.digest_before(parts.rows_before(step)),
        "mixture": parts.plan.mixture(),
        "tokenizer_fingerprint": parts.tokenizer.fingerprint,
        "mesh": dict(make_mesh(parts.mesh).shape),
        **({"continuation": dict(parts.continuation)} if parts.continuation else {}),
        **({"guard": parts.guard.to_record()} if parts.forgetting.sources else {}),
    }


def filled(recorded: dict[str, Any], resolved: Any, sections: Sequence[str]) -> dict[str, Any]:
    """A recorded config with the defaults of settings that its sections did not have yet."""
    full = dict(recorded)
    for name in sections:
        section = vars(resolved).get(name)
        if section is not None:
            loaded = config_files.from_dict(type(section), recorded.get(name, {}), name)
            full[name] = config_files.to_dict(loaded)
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
        if name not in free and fixed:
            raise CheckpointError(
                f"{parts.folder}: {name} was {before!r} at step {step} and is {now!r} now; "
                "a run cannot change it: put it back, or choose another run folder with --run"
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
