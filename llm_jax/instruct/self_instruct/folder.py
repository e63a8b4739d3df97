"""The folder of a run: what it was told, and the files that are made anew from the log each time.

    config.json      the settings                  provenance.json  seeds and generator, by digest
    requests.jsonl   every answer (request_log)    tasks.jsonl      the result, a line an instance
    rejects.jsonl    what was left out, and why    report.json, report.html

While a run goes on, tasks and rejects grow as `*.partial`, and take their names when it ends.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax import config as config_files
from llm_jax.errors import CheckpointError
from llm_jax.instruct.self_instruct.settings import FREE, SelfInstructConfig

CONFIG, PROVENANCE = "config.json", "provenance.json"
TASKS, REJECTS = "tasks.jsonl", "rejects.jsonl"


def begin(folder: Path, config: SelfInstructConfig, provenance: dict[str, Any]) -> None:
    """Records what a run is told, or checks that a run that is there already was told the same.

    Raises:
      CheckpointError: the folder is of a run with other settings, seeds or generator.
    """
    if not (folder / CONFIG).exists():
        write_whole(
            folder / PROVENANCE, json.dumps(provenance, indent=2, ensure_ascii=False) + "\n"
        )
        write_whole(folder / CONFIG, config_files.dumps(config))
        return
    before = config_files.load(folder / CONFIG, SelfInstructConfig)
    found = config_files.changes(config_files.to_dict(before), config_files.to_dict(config))
    changed = {name: values for name, values in found if name not in FREE}
    try:
        recorded = json.loads((folder / PROVENANCE).read_text("utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(
            f"{folder / PROVENANCE}: missing or damaged; choose another folder with --output"
        ) from None
    changed |= dict(config_files.changes(recorded, provenance))
    if changed:
        name, (old, new) = next(iter(changed.items()))
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise CheckpointError(
            f"{folder}: this run has {name}={_short(old)}, not {_short(new)}{more}; answers to other requests "
            "cannot be mixed: put it back, or choose another folder with --output"
        )
    write_whole(folder / CONFIG, config_files.dumps(config))


def _short(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 60 else told[:57] + "..."


class Rows(NamedTuple):
    """The two growing files."""

    tasks: Any
    rejects: Any

    def accept(self, row: dict[str, Any]) -> None:
        """Writes one instance."""
        self.tasks.write(_line(row))

    def reject(self, row: dict[str, Any]) -> None:
        """Writes what was left out."""
        self.rejects.write(_line(row))

    def flush(self) -> None:
        """Shows what was written to who looks on; the log alone must survive a crash."""
        self.tasks.flush()
        self.rejects.flush()


@contextlib.contextmanager
def growing(folder: Path) -> Iterator[Rows]:
    """Both files under `.partial` names; they take their own when the block ends without an error."""
    paths = [folder / TASKS, folder / REJECTS]
    partial = [path.with_name(path.name + ".partial") for path in paths]
    with open(partial[0], "wb") as tasks, open(partial[1], "wb") as rejects:
        yield Rows(tasks, rejects)
        for file in (tasks, rejects):
            file.flush()
            os.fsync(file.fileno())
    for path, made in zip(paths, partial, strict=True):
        os.replace(made, path)


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(text.encode("utf-8", "replace"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
