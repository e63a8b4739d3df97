"""A task: an instruction and its instances; and the files of seed tasks."""

import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax.data.language import identify
from llm_jax.data.text_files import lines, open_bytes
from llm_jax.errors import DataError
from llm_jax.tokenizer.base import digest


class Instance(NamedTuple):
    """One case of a task."""

    input: str  # "" where the instruction says all
    output: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """An instruction with instances."""

    id: str
    language: str  # "en" or "zh"
    instruction: str
    instances: tuple[Instance, ...]
    is_classification: bool


def package_seeds() -> list[Path]:
    """The seed files of this package, written for it."""
    folder = importlib.resources.files("llm_jax.instruct.self_instruct") / "seeds"
    return sorted(Path(str(folder)).glob("*.jsonl"))


def read_seeds(
    files: Sequence[str], languages: Sequence[str], examples: int
) -> dict[str, list[Task]]:
    """Seed tasks by language, those of other languages left out.

    A line is `{"id", "instruction", "instances": [{"input", "output"}], "is_classification"}`, and
    "language", which is told from the instruction where it is missing; other fields are ignored.

    Args:
      files: JSONL, or none for the package's own.
      languages: the ones that are needed.
      examples: how many a prompt shows: as many seeds must be there.

    Raises:
      DataError: a line is not usable, or a language has too few seeds; names file and line.
    """
    tasks: dict[str, list[Task]] = {language: [] for language in languages}
    known: dict[str, str] = {}
    for file in map(str, files or package_seeds()):
        with open_bytes(file) as stream:
            for number, line in lines(stream):
                place = f"{file}:{number}"
                if line is not None and not line.strip():
                    continue
                task = _task(line, place)
                if task.id in known:
                    raise DataError(
                        f"{place}: id {task.id!r} was used at {known[task.id]}; give it another"
                    )
                known[task.id] = place
                if task.language in tasks:
                    tasks[task.language].append(task)
    for language, found in tasks.items():
        kinds = {task.is_classification for task in found}
        if len(found) < examples or len(kinds) < 2:
            raise DataError(
                f"seeds: {len(found)} tasks in {language!r}, {sum(t.is_classification for t in found)} of them "
                f"classification; at least {examples} are needed (human_examples + machine_examples), of both kinds"
            )
    return tasks


def seeds_digest(seeds: dict[str, list[Task]]) -> str:
    """Tells whether two runs began with the same seeds."""
    return digest({language: [asdict(task) for task in tasks] for language, tasks in seeds.items()})


def _task(line: bytes | None, place: str) -> Task:
    """The task on one line. Raises DataError."""
    try:
        row = json.loads(line.decode("utf-8")) if line is not None else None
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise DataError(f"{place}: not a JSON object in UTF-8; a seed is one object a line")
    instruction = _text(row, "instruction", place)
    instances = row.get("instances")
    if not isinstance(instances, list) or not instances:
        raise DataError(f"{place}: 'instances' must be a list with at least one input and output")
    if not isinstance(row.get("is_classification"), bool):
        raise DataError(f"{place}: 'is_classification' must be true or false")
    language = row.get("language") or identify(instruction).language
    return Task(
        id=_text(row, "id", place),
        language="en" if language == "latin" else str(language),
        instruction=instruction,
        instances=tuple(_instance(item, place) for item in instances),
        is_classification=row["is_classification"],
    )


def _instance(item: Any, place: str) -> Instance:
    if not isinstance(item, dict) or not isinstance(item.get("input", ""), str):
        raise DataError(f"{place}: an instance must be an object with texts 'input' and 'output'")
    return Instance(item.get("input", "").strip(), _text(item, "output", place))


def _text(row: dict[str, Any], field: str, place: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {field!r} must be a text that is not empty")
    # SentencePiece refuses half of a surrogate pair, which JSON may spell
    return value.strip().encode("utf-8", "replace").decode("utf-8")
