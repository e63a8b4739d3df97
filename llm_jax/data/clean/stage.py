"""The stage `llm-jax data clean`: sources in, cleaned sources and a report out.

One pass: blocks of each source are read and sent through the rules (here or in worker processes, in the
same order either way), and come back as lines to write and counts by rule and reason with first samples.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from llm_jax.data.blocks import Block, documents_of, numbered, results_by_source
from llm_jax.data.clean.report import RuleCounts, write_reports
from llm_jax.data.clean.rules import CleanConfig, Outcome, cleaner
from llm_jax.data.document_files import (
    Compression,
    DocumentWriter,
    Lines,
    check_sources,
    write_manifest,
)
from llm_jax.data.documents import Rejects
from llm_jax.data.lineage import input_records
from llm_jax.data.ordered_pool import ordered_pool
from llm_jax.data.shard_writer import new_folder, write_file
from llm_jax.data.shards import REJECTS
from llm_jax.data.sources import SourceConfig
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
    """What became of one block of documents."""

    lines: Lines  # what is kept
    rules: RuleCounts
    rejects: Rejects


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
        settings = (block_cleaner, (config.rules,))
        read = [(source, Rejects()) for source in config.sources]
        with ordered_pool(numbered, settings, config.workers) as apply:
            found = results_by_source(apply, read)
            for (source, rejects), results in zip(read, found, strict=True):
                rules = RuleCounts(config.rules.rules)
                with closing(DocumentWriter(root, source.name, config.compression)) as writer:
                    for cleaned in results:
                        writer.write(cleaned.lines)
                        rules.merge(cleaned.rules)
                        rejects.merge(cleaned.rejects)
                        kept = rules.documents, rules.kept, rules.characters
                        progress(Progress(source.name, *kept))
                    rejects.check(source.name, config.max_reject_fraction)
                    rules.check(source.name, config.max_drop_fraction)
                    entries[source.name] = {**writer.finish(), "rejects": rejects.report()}
                counted[source.name] = rules
                entries[source.name]["rules"] = rules.counts()
                samples += rejects.lines(source.name)
        write_file(root / REJECTS, samples.encode("utf-8", "replace"))
        write_reports(root, counted)
        return write_manifest(root, "clean", config, inputs, entries)


def block_cleaner(config: CleanConfig) -> Callable[[Block], Cleaned]:
    """The function that a worker applies to every block."""
    return partial(_clean_block, config, cleaner(config))


def _clean_block(config: CleanConfig, clean: Callable[[str], Outcome], block: Block) -> Cleaned:
    cleaned = Cleaned(Lines(), RuleCounts(config.rules), Rejects())
    for document in documents_of(block, cleaned.rejects):
        outcome = clean(document.text)
        cleaned.rules.add(document, outcome)
        if not outcome.rejected_by:
            cleaned.lines.add(document._replace(text=outcome.text))
    return cleaned
