"""The stage `llm-jax data clean`: sources in, cleaned sources and a report out.

One pass for each source: read, send chunks through the rules (here or in worker processes, in the same
order either way), write what is kept, count the rest by rule and reason with the first samples.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from llm_jax.data.clean.report import RuleCounts, write_reports
from llm_jax.data.clean.rules import CleanConfig, Outcome, cleaner
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
from llm_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CleanStage:
    """What to clean, by which rules, and where to put it."""

    sources: tuple[SourceConfig, ...]  # what to read, in this order
    output: str  # folder to make
    rules: CleanConfig = CleanConfig()
    max_reject_fraction: float = (
        0.001  # stop when more than this share of the records is unreadable
    )
    max_drop_fraction: float = 1.0  # stop when the rules reject more than this share of a source
    compression: Compression = "zst"
    workers: int = 0  # processes that clean; 0 cleans in this one
    overwrite: bool = False  # replace a cleaned folder that is already at `output`

    def __post_init__(self) -> None:
        check_sources(self.sources, self.output)
        for field in ("max_reject_fraction", "max_drop_fraction"):
            value = getattr(self, field)
            if not 0 <= value <= 1:
                raise ConfigError(f"{field}={value} must be between 0 and 1")
        if self.workers < 0:
            raise ConfigError(f"workers={self.workers} must be 0 or more")


class Progress(NamedTuple):
    """How far one source is."""

    source: str
    documents: int
    kept: int
    bytes: int


class Cleaned(NamedTuple):
    """One document that has been through the rules."""

    document: Document  # as it was read
    outcome: Outcome
    line: bytes  # what is written; empty for a rejected one


def clean_stage(
    config: CleanStage, progress: Callable[[Progress], None] = lambda _: None
) -> dict[str, Any]:
    """Cleans all sources into `config.output`; returns the manifest.

    Raises:
      DataError: an unusable source, too many unreadable records or rejected documents, an output
        that exists, a full disk. Nothing is left at `config.output` then.
    """
    cleaner(config.rules)  # a mistake in a list is told before anything is read
    with new_folder(config.output, config.overwrite) as root:
        inputs = input_records(config.sources)
        entries, counted, samples = {}, {}, ""
        for source in config.sources:
            rejects, rules = Rejects(), RuleCounts(config.rules.rules)
            with closing(DocumentWriter(root, source.name, config.compression)) as writer:
                _clean_source(source, config, writer, rejects, rules, progress)
                rejects.check(source.name, config.max_reject_fraction)
                rules.check(source.name, config.max_drop_fraction)
                entries[source.name] = {**writer.finish(), "rejects": rejects.report()}
            counted[source.name] = rules
            entries[source.name]["rules"] = rules.counts()
            samples += rejects.lines(source.name)
        write_file(root / REJECTS, samples.encode("utf-8", "replace"))
        write_reports(root, counted)
        return write_manifest(root, "clean", config, inputs, entries)


def _clean_source(
    source: SourceConfig,
    config: CleanStage,
    writer: DocumentWriter,
    rejects: Rejects,
    rules: RuleCounts,
    progress: Callable[[Progress], None],
) -> None:
    documents = chunks(read_documents(source, rejects))
    seen = size = 0
    for results in ordered_map(chunk_cleaner, (config.rules,), documents, config.workers):
        for cleaned in results:
            rules.add(cleaned.document, cleaned.outcome)
            if cleaned.line:
                writer.add_line(cleaned.line, cleaned.outcome.text)
        seen += len(results)
        size += sum(len(cleaned.document.text) for cleaned in results)
        progress(Progress(source.name, seen, writer.counts["documents"], size))


def chunk_cleaner(config: CleanConfig) -> Callable[[list[Document]], list[Cleaned]]:
    """The function that a worker applies to every chunk."""
    return partial(_clean_chunk, cleaner(config))


def _clean_chunk(clean: Callable[[str], Outcome], documents: list[Document]) -> list[Cleaned]:
    results = []
    for document in documents:
        outcome = clean(document.text)
        line = b"" if outcome.rejected_by else document_line(document._replace(text=outcome.text))
        results.append(Cleaned(document, outcome, line))
    return results
