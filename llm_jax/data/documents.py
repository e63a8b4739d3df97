"""A document, and the account of records that could not become one.

A bad record is never an error by itself: it is counted under its reason, with the first few places
kept as samples. `Rejects.check` stops the stage when they are more than the user allows.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from llm_jax.errors import DataError

SAMPLES_PER_REASON = 20
EXCERPT_CHARACTERS = 120
CHUNK_CHARACTERS = 1 << 19  # what one message to a worker holds
CHUNK_DOCUMENTS = 512
WORST = 3  # files that an error names


class Document(NamedTuple):
    """One text of one source."""

    text: str  # not blank, no lone surrogates
    source: str  # name of the source
    id: str  # where it comes from, unique inside the source: "part-1.jsonl:37"


def chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents of bounded size, in order."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= CHUNK_CHARACTERS or len(chunk) >= CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def file_of(place: str) -> str:
    """The file of a place such as "part-1.jsonl:37"."""
    head, _, tail = place.rpartition(":")
    return head if head and tail.isdigit() else place


def worst_files(counts: Counter[str]) -> str:
    """What an error says of the files that most of its records are from; nothing of a single one."""
    if len(counts) < 2:
        return ""
    named = ", ".join(f"{file} ({n})" for file, n in counts.most_common(WORST))
    return f"; most of them in {named}"


class Reject(NamedTuple):
    """One record that was left out."""

    reason: str  # a fixed phrase, such as "not valid JSON"
    place: str  # "file:line" or "file:record"
    excerpt: str  # the start of what stood there


class Rejects:
    """Counts records of one source: read, rejected by reason, repaired by reason."""

    def __init__(self) -> None:
        self.records = 0
        self.counts: dict[str, int] = {}
        self.repairs: dict[str, int] = {}
        self.samples: list[Reject] = []
        self.files: Counter[str] = Counter()  # rejected records by file

    @property
    def total(self) -> int:
        """Number of rejected records."""
        return sum(self.counts.values())

    def add(self, reason: str, place: str, content: str | bytes = "") -> None:
        """Counts one rejected record; keeps the first samples of each reason."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.files[file_of(place)] += 1
        if self.counts[reason] <= SAMPLES_PER_REASON:
            head = content[: 4 * EXCERPT_CHARACTERS]
            text = head.decode("utf-8", "backslashreplace") if isinstance(head, bytes) else head
            self.samples.append(Reject(reason, place, text[:EXCERPT_CHARACTERS]))

    def repair(self, reason: str) -> None:
        """Counts one record that was used after a harmless repair."""
        self.repairs[reason] = self.repairs.get(reason, 0) + 1

    def accept(self, text: object, source: str, place: str) -> Document | None:
        """The document made of `text`, or None when it is not usable; counts it either way."""
        self.records += 1
        if not isinstance(text, str):
            self.add("text is not a string", place, repr(text)[: 2 * EXCERPT_CHARACTERS])
            return None
        if not text or text.isspace():
            self.add("empty text", place)
            return None
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            # JSON may spell half of a surrogate pair; SentencePiece raises on it
            self.repair("lone surrogate replaced by '?'")
            text = text.encode("utf-8", "replace").decode("utf-8")
        return Document(text, source, place)

    def refuse(self, reason: str, place: str, content: str | bytes = "") -> None:
        """Counts one record that never became a text."""
        self.records += 1
        self.add(reason, place, content)

    def merge(self, later: "Rejects") -> None:
        """Adds what was counted of the records that follow, as if all had been counted here."""
        self.records += later.records
        for mine, more in ((self.counts, later.counts), (self.repairs, later.repairs)):
            for reason, count in more.items():
                mine[reason] = mine.get(reason, 0) + count
        self.files.update(later.files)
        held = Counter(sample.reason for sample in self.samples)
        for sample in later.samples:
            held[sample.reason] += 1
            if held[sample.reason] <= SAMPLES_PER_REASON:
                self.samples.append(sample)

    def check(self, source: str, max_fraction: float) -> None:
        """Raises DataError naming the worst reason when too many records were rejected."""
        if self.records == 0:
            raise DataError(f"source {source!r} holds no records; give a path with text in it")
        if self.total == 0 or (
            self.total < self.records and self.total <= max_fraction * self.records
        ):
            return
        worst = max(self.counts, key=lambda reason: self.counts[reason])
        first = next(sample for sample in self.samples if sample.reason == worst)
        rule = (
            "none is usable"
            if self.total == self.records
            else f"more than max_reject_fraction={max_fraction:g} allows; mend them or raise it"
        )
        raise DataError(
            f"source {source!r}: {self.total} of {self.records} records rejected, {rule}. "
            f"Most often {worst!r} ({self.counts[worst]}), first at {first.place}"
            f"{worst_files(self.files)}"
        )

    def report(self) -> dict:
        """Counts as plain JSON values, for the manifest."""
        return {"records": self.records, "rejected": self.counts, "repaired": self.repairs}

    def lines(self, source: str) -> str:
        """The samples as JSON lines, for the rejects file."""
        rows = [{"source": source, **sample._asdict()} for sample in self.samples]
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
