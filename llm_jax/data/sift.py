"""A stage that looks at each document once and sends it somewhere or nowhere.

`data language` and `data decontaminate` are this with different judges. A judge is a function of a
document's text; it is built once in every worker, so it can hold a model.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax.data.blocks import Block, documents_of, numbered, results_by_source
from llm_jax.data.document_files import (
    Compression,
    DocumentWriter,
    Lines,
    check_sources,
    write_manifest,
)
from llm_jax.data.documents import Document, Rejects
from llm_jax.data.lineage import input_records
from llm_jax.data.ordered_pool import ordered_pool
from llm_jax.data.shard_writer import new_folder, write_file
from llm_jax.data.shards import REJECTS
from llm_jax.data.sources import SourceConfig
from llm_jax.errors import ConfigError, DataError

SAMPLES = 8  # of each reason


class Judgement(NamedTuple):
    """What a judge says about a text."""

    keep: bool
    label: str  # the report counts by it: a language, or a reason
    suffix: str = ""  # of the output source's name
    detail: str = ""
    fields: tuple[tuple[str, Any], ...] = ()  # further fields of the written line
    remark: str = ""  # counted beside the label, kept or dropped


Judge = Callable[[str], Judgement]


@dataclass(frozen=True, kw_only=True)
class SiftConfig:
    """What every such stage is told."""

    sources: tuple[SourceConfig, ...]
    output: str  # folder to make
    max_reject_fraction: float = (
        0.001  # stop when more than this share of the records is unreadable
    )
    compression: Compression = "zst"
    workers: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_sources(self.sources, self.output)
        if not 0 <= self.max_reject_fraction <= 1:
            raise ConfigError(
                f"max_reject_fraction={self.max_reject_fraction} must be between 0 and 1"
            )
        if self.workers < 0:
            raise ConfigError(f"workers={self.workers} must be 0 or more")


def sift(
    stage: str,
    config: SiftConfig,
    settings: Any,
    make_judge: Callable[..., Judge],
    judge_settings: tuple,
    progress: Callable[[str, str], None] = lambda _name, _text: None,
    **more: Any,
) -> dict[str, Any]:
    """Writes what the judge keeps; returns the manifest.

    Args:
      stage: its name in the manifest.
      config: what to read and where to write.
      settings: the dataclass that the manifest records.
      make_judge: a module's own function that builds the judge.
      judge_settings: its arguments; they are sent to the workers.
      progress: called with a source's name and what to say about it.
      more: further entries of the manifest.

    Raises:
      DataError: an unusable source, nothing kept of all sources, an output that exists.
    """
    with new_folder(config.output, config.overwrite) as root:
        inputs = input_records(config.sources)
        entries: dict[str, Any] = {}
        counted: dict[str, Any] = {}
        unreadable = ""
        read = [(source, Rejects()) for source in config.sources]
        block_judge_settings = (block_judge, (make_judge, judge_settings))
        with ordered_pool(numbered, block_judge_settings, config.workers) as apply:
            found = results_by_source(apply, read)
            for (source, rejects), results in zip(read, found, strict=True):
                seen = Seen()
                entries |= _write_source(
                    source, results, config.compression, root, seen, rejects, progress
                )
                rejects.check(source.name, config.max_reject_fraction)
                counted[source.name] = {**seen.report(), "rejects": rejects.report()}
                unreadable += rejects.lines(source.name)
        if not entries:
            raise DataError(f"data {stage}: no document of any source is kept; see its settings")
        write_file(root / REJECTS, unreadable.encode("utf-8", "replace"))
        return write_manifest(root, stage, settings, inputs, entries, seen=counted, **more)


class Sifted(NamedTuple):
    """What became of one block of documents."""

    kept: dict[str, Lines]  # by suffix
    seen: "Seen"
    rejects: Rejects


def _write_source(
    source: SourceConfig,
    results: Iterable[Sifted],
    compression: Compression,
    root: Path,
    seen: "Seen",
    rejects: Rejects,
    progress: Callable[[str, str], None],
) -> dict[str, Any]:
    """Sends one source's documents where they belong; returns the entries of its outputs."""
    writers: dict[str, DocumentWriter] = {}
    with ExitStack() as stack:
        for sifted in results:
            for suffix, lines in sifted.kept.items():
                name = source.name + suffix
                if name not in writers:
                    made = DocumentWriter(root, name, compression)
                    writers[name] = stack.enter_context(closing(made))
                writers[name].write(lines)
            seen.merge(sifted.seen)
            rejects.merge(sifted.rejects)
            progress(source.name, f"{seen.kept.total():,} kept, {seen.dropped.total():,} dropped")
        return {name: writer.finish() for name, writer in sorted(writers.items())}


class Seen:
    """Counts of one source by label and remark, and the first samples of what was dropped or remarked on."""

    def __init__(self) -> None:
        self.kept: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.remarks: Counter[str] = Counter()
        self.samples: list[dict[str, str]] = []

    def add(self, document: Document, judgement: Judgement) -> None:
        """Counts one document."""
        if judgement.remark:
            self.remarks[judgement.remark] += 1
            self._sample(document, judgement.remark, self.remarks, judgement.detail)
        if judgement.keep:
            self.kept[judgement.label] += 1
            return
        self.dropped[judgement.label] += 1
        self._sample(document, judgement.label, self.dropped, judgement.detail)

    def _sample(self, document: Document, reason: str, counts: Counter[str], detail: str) -> None:
        if counts[reason] <= SAMPLES:
            sample = {"id": document.id, "reason": reason, "detail": detail}
            self.samples.append({**sample, "text": document.text[:200]})

    def merge(self, later: "Seen") -> None:
        """Adds what was seen of the documents that follow, as if all had been seen here."""
        self.kept.update(later.kept)
        self.dropped.update(later.dropped)
        self.remarks.update(later.remarks)
        held = Counter(sample["reason"] for sample in self.samples)
        for sample in later.samples:
            held[sample["reason"]] += 1
            if held[sample["reason"]] <= SAMPLES:
                self.samples.append(sample)

    def report(self) -> dict[str, Any]:
        """Plain JSON values."""
        counts = {"kept": self.kept, "dropped": self.dropped, "remarks": self.remarks}
        # remarks only where there are some: most judges make none
        told = {name: dict(count) for name, count in counts.items() if count or name != "remarks"}
        return {**told, "samples": self.samples}


def block_judge(make_judge: Callable[..., Judge], settings: tuple) -> Callable[[Block], Sifted]:
    """The function that a worker applies to every block."""
    return partial(_judge_block, make_judge(*settings))


def _judge_block(judge: Judge, block: Block) -> Sifted:
    sifted = Sifted({}, Seen(), Rejects())
    for document in documents_of(block, sifted.rejects):
        judgement = judge(document.text)
        sifted.seen.add(document, judgement)
        if judgement.keep:
            lines = sifted.kept.setdefault(judgement.suffix, Lines())
            lines.add(document, **dict(judgement.fields))
    return sifted
