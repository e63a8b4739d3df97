"""Every answer, as it came: the one file that a run cannot do without. All others are made from it.

`requests.jsonl` grows by whole lines, each flushed to the disk before its answer is used. A kill leaves at
most one torn line at the end, which is cut off when the log is opened again; any other damage is an error,
found by a digest in every line.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_jax.errors import CheckpointError
from llm_jax.instruct.self_instruct.generator import Answer, Generator, Request

NAME = "requests.jsonl"


class RequestLog:
    """Answers by request key, in memory and on disk."""

    def __init__(self, folder: str | os.PathLike[str], check: Callable[[], None]) -> None:
        """Reads what is there; `check` is called before every write and may raise (a lost lock)."""
        self.path = Path(folder) / NAME
        self._check = check
        self._answers: dict[str, tuple[str, Answer]] = {}  # key -> (digest of its request, answer)
        self.repaired = _cut_torn_line(self.path)
        for place, row in _rows(self.path):
            self._remember(place, row)
        self.begun_with = len(self._answers)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def __len__(self) -> int:
        return len(self._answers)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def ask(self, requests: Sequence[Request], generator: Generator) -> list[Answer]:
        """The answers to `requests`, in order: from the log, or else from the generator, logged.

        Raises:
          CheckpointError: a logged answer is to another request than this one.
          GeneratorError: the generator cannot go on; what it answered is logged.
        """
        missing: list[Request] = []
        for first in range(0, len(requests), generator.together):
            group = requests[first : first + generator.together]
            if not all(map(self._has, group)):
                missing += group
        by_key = {request.key: request for request in missing}
        if missing:
            for answers in generator.answers(missing):
                # of a group that was logged in part, the logged part stands
                self._append([(by_key[a.key], a) for a in answers if a.key not in self._answers])
        return [self._answers[request.key][1] for request in requests]

    def _has(self, request: Request) -> bool:
        if request.key not in self._answers:
            return False
        if self._answers[request.key][0] != request.digest:
            raise CheckpointError(
                f"{self.path}: {request.key} was asked otherwise than it would be now; the log is of other "
                "settings or of another version of this program: use another folder with --output"
            )
        return True

    def _append(self, pairs: list[tuple[Request, Answer]]) -> None:
        if not pairs:
            return
        self._check()
        data = b""
        for request, answer in pairs:
            row = {"key": answer.key, "request": request.digest, "finished": answer.finished}
            row |= {"prompt_characters": len(request.prompt), "text": answer.text}
            line = json.dumps({**row, "digest": _digest(row)}, ensure_ascii=False)
            data += line.encode("utf-8") + b"\n"
        while data:  # a disk that is nearly full takes a part
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)
        for request, answer in pairs:
            self._answers[answer.key] = (request.digest, answer)

    def _remember(self, place: str, row: dict[str, Any]) -> None:
        found = row.pop("digest", None)
        if found != _digest(row) or row["key"] in self._answers:
            what = "a key that came before" if found == _digest(row) else "a line that was changed"
            raise CheckpointError(
                f"{place}: {what}; the file is damaged: remove what follows from there, to ask for it again"
            )
        answer = Answer(key=row["key"], text=row["text"], finished=row["finished"])
        self._answers[row["key"]] = (row["request"], answer)


def _digest(row: dict[str, Any]) -> str:
    told = json.dumps(row, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                row = {}
            yield f"{path}:{number}", row


def _cut_torn_line(path: Path) -> int:
    """Cuts an unfinished last line off; returns its bytes, 0 if the file is whole."""
    if not path.exists():
        return 0
    with open(path, "rb+") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - (1 << 16))
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())
        return size - end
