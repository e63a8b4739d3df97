"""A stage that looks at each document once and sends it somewhere or nowhere.

`data language` and `data decontaminate` are this with different judges. A judge is a function of a
document's text; it is built once in every worker, so it can hold a model.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from llm_jax.data.document_files import (
    Compression,
    DocumentWriter,
    check_sources,
    document_line,
    write_manifest,
)
from llm_jax.data.documents import Document, Rejects, chunks
from llm_jax.data.lineage import input_records
from llm_jax.data.ordered_pool import ordered_map
from llm_jax.data.shard_writer import new_folder, write_file
from llm_jax.data.shards import REJECTS
from llm_jax.data.sources import SourceConfig, read_documents
from llm_jax.errors import ConfigError, DataError

SAMPLES = 8  # of each reason


class Judgement(NamedTuple):
    """What a judge says about a text."""

    keep: bool
    label: str  # the report counts by it: a language, or a reason
    suffix: str = ""  # of the output source's name
    detail: str = ""
    fields: tuple[tuple[str, Any], ...] = ()  # further fields of the written line


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
        seen: dict[str, Any] = {}
        unreadable = ""
        for source in config.sources:
            rejects = Rejects()
            with ExitStack() as stack:
                writers: dict[str, DocumentWriter] = {}

                def writer_of(name: str, writers=writers, stack=stack) -> DocumentWriter:
                    if name not in writers:
                        made = DocumentWriter(root, name, config.compression)
                        writers[name] = stack.enter_context(closing(made))
                    return writers[name]

                seen[source.name] = _sift_source(
                    source, config, make_judge, judge_settings, writer_of, rejects, progress
                )
                rejects.check(source.name, config.max_reject_fraction)
                for name, writer in sorted(writers.items()):
                    entries[name] = writer.finish()
            seen[source.name]["rejects"] = rejects.report()
            unreadable += rejects.lines(source.name)
        if not entries:
            raise DataError(f"data {stage}: no document of any source is kept; see its settings")
        write_file(root / REJECTS, unreadable.encode("utf-8", "replace"))
        return write_manifest(root, stage, settings, inputs, entries, seen=seen, **more)


def _sift_source(
    source: SourceConfig,
    config: SiftConfig,
    make_judge: Callable[..., Judge],
    judge_settings: tuple,
    writer_of: Callable[[str], DocumentWriter],
    rejects: Rejects,
    progress: Callable[[str, str], None],
) -> dict[str, Any]:
    """Sends one source's documents where they belong; returns counts and samples by label."""
    seen = Seen()
    documents = chunks(read_documents(source, rejects))
    settings = (make_judge, judge_settings)
    for results in ordered_map(chunk_judge, settings, documents, config.workers):
        for document, judgement, line in results:
            seen.add(document, judgement)
            if judgement.keep:
                writer_of(source.name + judgement.suffix).add_line(line, document.text)
        progress(source.name, f"{seen.kept.total():,} kept, {seen.dropped.total():,} dropped")
    return seen.report()


class Seen:
    """Counts of one source by label, and the first samples of what was dropped."""

    def __init__(self) -> None:
        self.kept: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.samples: list[dict[str, str]] = []

    def add(self, document: Document, judgement: Judgement) -> None:
        """Counts one document."""
        if judgement.keep:
            self.kept[judgement.label] += 1
            return
        self.dropped[judgement.label] += 1
        if self.dropped[judgement.label] <= SAMPLES:
            sample = {"id": document.id, "reason": judgement.label, "detail": judgement.detail}
            self.samples.append({**sample, "text": document.text[:200]})

    def report(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"kept": dict(self.kept), "dropped": dict(self.dropped), "samples": self.samples}


def chunk_judge(
    make_judge: Callable[..., Judge], settings: tuple
) -> Callable[[list[Document]], list[tuple[Document, Judgement, bytes]]]:
    """The function that a worker applies to every chunk."""
    return partial(_judge_chunk, make_judge(*settings))


def _judge_chunk(
    judge: Judge, documents: list[Document]
) -> list[tuple[Document, Judgement, bytes]]:
    results = []
    for document in documents:
        judgement = judge(document.text)
        line = document_line(document, **dict(judgement.fields)) if judgement.keep else b""
        results.append((document, judgement, line))
    return results
