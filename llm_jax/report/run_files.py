"""The files of a run folder as plain values. A line cut short by a crash is left out; so is a missing file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_jax.errors import ConfigError

SAMPLES = 3  # newest sample files shown


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run wrote about itself."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    samples: dict[str, str]  # newest first
    checkpoints: list[int]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The rows of training steps."""
        return [row for row in self.metrics if "loss" in row]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of held-out evaluations."""
        return [row for row in self.metrics if any(name.startswith("eval/") for name in row)]


def read_run(folder: Path) -> RunFiles:
    """Raises ConfigError if the folder is no run's."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is no run folder: it has no config.json")
    texts = sorted((folder / "samples").glob("*.txt"), reverse=True)[:SAMPLES]
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return RunFiles(
        folder=folder,
        config=_object(folder / "config.json"),
        environment=_object(folder / "env.json"),
        metrics=[row for row in _lines(folder / "metrics.jsonl") if "step" in row],
        events=[row for row in _lines(folder / "events.jsonl") if "event" in row],
        samples={path.stem: path.read_text("utf-8", errors="replace") for path in texts},
        checkpoints=sorted(int(name) for name in names if name.isdecimal()),
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found
