"""The run folder: where things are, which checkpoint MODEL means, and files written whole.

    RUN/  config.json  env.json  metrics.jsonl  events.jsonl  samples/  checkpoints/<step>/  tokenizer/

Everything in it is plain files; every view of a run is made from them.
"""

import datetime
import json
import os
from pathlib import Path
from typing import Any

from llm_jax.checkpoint.record import RECORD, replace_file
from llm_jax.errors import CheckpointError

CHECKPOINTS = "checkpoints"
EVENTS = "events.jsonl"


def numbered_folders(checkpoints: str | os.PathLike[str]) -> list[int]:
    """The numbers that name folders in `RUN/checkpoints`, ascending; empty if there is no such folder."""
    folder = Path(checkpoints)
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def steps_in(checkpoints: str | os.PathLike[str]) -> list[int]:
    """The steps with a whole checkpoint in `RUN/checkpoints`, ascending."""
    return [
        step
        for step in numbered_folders(checkpoints)
        if (Path(checkpoints) / str(step) / RECORD).is_file()
    ]


def find_checkpoint(model: str | os.PathLike[str], step: int = -1) -> Path:
    """The checkpoint folder that MODEL means.

    Args:
      model: a run folder, one of its checkpoints (`RUN/checkpoints/300`), or an imported model folder.
      step: which checkpoint of a run folder; -1 is the newest.

    Raises:
      CheckpointError: the folder is none of these, or has no such step.
    """
    if step < -1:
        raise CheckpointError(f"step={step} must be 0 or above, or -1 for the newest checkpoint")
    folder = Path(model)
    if not folder.exists():
        raise CheckpointError(
            f"{folder} does not exist; give a run folder, a checkpoint in it, or an imported model"
        )
    if (folder / RECORD).is_file():
        if step >= 0 and folder.name != str(step):
            raise CheckpointError(
                f"{folder} is a single checkpoint, it has no step {step}; give its run folder"
            )
        return folder
    if folder.name == CHECKPOINTS:
        folder = folder.parent
    steps = steps_in(folder / CHECKPOINTS)
    if step >= 0 and steps and step not in steps:
        raise CheckpointError(
            f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
        )
    if steps:
        return folder / CHECKPOINTS / str(steps[-1] if step < 0 else step)
    if (folder / CHECKPOINTS).is_dir():
        raise CheckpointError(
            f"{folder} is a run folder without a checkpoint yet; train until the first save (checkpoint.save_every_steps)"
        )
    raise CheckpointError(
        f"{folder} holds no model: neither {RECORD} (a checkpoint or imported model) nor {CHECKPOINTS}/ (a run folder)"
    )


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file whole or not at all. Raises CheckpointError if the disk does not take it."""
    try:
        replace_file(Path(path), (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"{os.fspath(path)} cannot be written: {error.strerror}") from None


def append_event(run: str | os.PathLike[str], kind: str, **facts: Any) -> None:
    """Adds a line `{"time": ..., "event": kind, **facts}` to the run's events.jsonl. For process 0.

    A line cut short by a crash is closed first, so that it spoils nothing but itself.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = json.dumps({"time": now, "event": kind, **facts}, ensure_ascii=False).encode() + b"\n"
    with open(Path(run) / EVENTS, "a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)
