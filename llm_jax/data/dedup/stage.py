"""The stage `llm-jax data dedup`: sources in, the same sources without repeats out.

1. Every document of every source is sketched, here or in worker processes, into files.
2. The index finds exact and near repeats over all sources at once; the first of a cluster stays.
3. The sources are read again, and what stays is written.
Texts are never held, so memory is that of the index (see there) and one chunk.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from llm_jax.data.dedup.index import EXACT, NEAR, Index, Sketch, Verdicts
from llm_jax.data.dedup.minhash import PLACES, choose_rows, signature
from llm_jax.data.document_files import Compression, DocumentWriter, check_sources, write_manifest
from llm_jax.data.documents import Document, Rejects, chunks
from llm_jax.data.lineage import input_records
from llm_jax.data.ordered_pool import ordered_map
from llm_jax.data.shard_writer import new_folder, write_file
from llm_jax.data.shards import REJECTS
from llm_jax.data.sources import SourceConfig, read_documents
from llm_jax.errors import ConfigError, DataError

REPORT = "report.json"
SAMPLES = 50
EXCERPT = 200
MIN_LETTERS = 20  # shorter texts have too few shingles to be called near


@dataclass(frozen=True, kw_only=True)
class DedupStage:
    """What to compare, when two documents are the same, and where to put what is left."""

    sources: tuple[SourceConfig, ...]  # of two repeats the one in the earlier source stays
    output: str  # folder to make
    threshold: float = 0.7  # estimated Jaccard similarity from which on two texts are near repeats
    shingle: int = 5  # characters
    exact_only: bool = False  # equal texts only
    memory_mb: int = 1024  # for sorting one band's keys; below it they are sorted in parts
    max_reject_fraction: float = (
        0.001  # stop when more than this share of the records is unreadable
    )
    compression: Compression = "zst"
    workers: int = 0  # processes that make signatures
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_sources(self.sources, self.output)
        if not 0.3 <= self.threshold <= 1:
            raise ConfigError(f"threshold={self.threshold} must be between 0.3 and 1")
        if not 2 <= self.shingle <= 50:
            raise ConfigError(f"shingle={self.shingle} must be between 2 and 50 characters")
        if not 0 <= self.max_reject_fraction <= 1:
            raise ConfigError(
                f"max_reject_fraction={self.max_reject_fraction} must be between 0 and 1"
            )
        if self.memory_mb < 1 or self.workers < 0:
            raise ConfigError(
                f"memory_mb={self.memory_mb} must be at least 1 and workers={self.workers} 0 or more"
            )


class Progress(NamedTuple):
    """How far one source is."""

    source: str
    documents: int
    doing: str  # "sketched" or "written"


Callback = Callable[[Progress], None]


def dedup_stage(config: DedupStage, progress: Callback = lambda _: None) -> dict[str, Any]:
    """Writes the sources without repeats; returns the manifest.

    Raises:
      DataError: an unusable source, one that changed between the two readings, an output that
        exists, a full disk. Nothing is left at `config.output` then.
    """
    with new_folder(config.output, config.overwrite) as root:
        inputs = input_records(config.sources)
        scratch = root / "scratch"
        scratch.mkdir()
        rows = choose_rows(config.threshold)
        memory = config.memory_mb << 20
        with closing(Index(scratch, rows, config.threshold, memory)) as index:
            rejects = {source.name: Rejects() for source in config.sources}
            for source in config.sources:
                _sketch_source(source, config, index, rejects[source.name], progress)
                rejects[source.name].check(source.name, config.max_reject_fraction)
            verdicts = index.verdicts()
            entries, report, start = {}, _Report(index, verdicts), 0
            for source in config.sources:
                with closing(DocumentWriter(root, source.name, config.compression)) as writer:
                    start = _write_source(source, writer, index, report, start, progress)
                    counts = report.counts.pop()
                    entries[source.name] = {
                        **writer.finish(),
                        "rejects": rejects[source.name].report(),
                        "repeats": counts,
                    }
        shutil.rmtree(scratch)
        text = json.dumps({"samples": report.samples}, indent=1, ensure_ascii=False)
        write_file(root / REPORT, text.encode("utf-8", "replace"))
        samples = "".join(counted.lines(name) for name, counted in rejects.items())
        write_file(root / REJECTS, samples.encode("utf-8", "replace"))
        return write_manifest(root, "dedup", config, inputs, entries, rows_per_band=rows)


def _sketch_source(
    source: SourceConfig, config: DedupStage, index: Index, rejects: Rejects, progress: Callback
) -> None:
    texts = ([d.text for d in chunk] for chunk in chunks(read_documents(source, rejects)))
    seen = 0
    settings = (config.shingle, config.exact_only)
    for sketched in ordered_map(sketcher, settings, texts, config.workers):
        index.add(sketched)
        seen += len(sketched.text_hashes)
        progress(Progress(source.name, seen, "sketched"))


def sketcher(shingle: int, exact_only: bool) -> Callable[[list[str]], Sketch]:
    """The function that a worker applies to every chunk of texts."""
    return partial(sketch, shingle, exact_only)


def sketch(shingle: int, exact_only: bool, texts: list[str]) -> Sketch:
    """What the index keeps of some texts."""
    hashes = np.frombuffer(b"".join(map(text_digest, texts)), dtype="<u8").reshape(-1, 2)
    signatures = np.zeros((len(texts), PLACES), np.uint32)
    for row, (text, low) in enumerate(zip(texts, hashes[:, 0].tolist(), strict=True)):
        if exact_only or sum(map(str.isalnum, text[: 4 * MIN_LETTERS])) < MIN_LETTERS:
            # a signature that no other text has
            signatures[row] = (np.arange(PLACES, dtype=np.uint64) + np.uint64(low)) & 0xFFFFFFFF
        else:
            signatures[row] = signature(text, shingle)
    return Sketch(hashes, signatures)


def text_digest(text: str) -> bytes:
    """16 bytes, by which equal texts are told."""
    return xxhash.xxh3_128_digest(text.encode())[::-1]


class _Report:
    """Counts per source, and the first samples of pairs."""

    def __init__(self, index: Index, verdicts: Verdicts) -> None:
        self.verdicts = verdicts
        self.counts: list[dict[str, int]] = []
        self.samples: list[dict[str, Any]] = []
        self._index = index
        repeats = np.flatnonzero(verdicts.kind == NEAR)[:SAMPLES]
        self._wanted = {int(verdicts.first[i]): "" for i in repeats}
        self._sampled = {int(i) for i in repeats}

    def see(self, number: int, document: Document) -> None:
        """Keeps the text of the first of a sampled pair, then writes the pair down."""
        name = f"{document.source}/{document.id}"
        if number in self._wanted:
            self._wanted[number] = f"{name}\n{document.text[:EXCERPT]}"
        if number in self._sampled:
            first = int(self.verdicts.first[number])
            kept_id, _, kept = self._wanted[first].partition("\n")
            self.samples.append(
                {
                    "dropped": name,
                    "kept": kept_id,
                    "similarity": round(self._index.similarity(first, number), 3),
                    "dropped_text": document.text[:EXCERPT],
                    "kept_text": kept,
                }
            )


def _write_source(
    source: SourceConfig,
    writer: DocumentWriter,
    index: Index,
    report: _Report,
    start: int,
    progress: Callback,
) -> int:
    """Writes what stays of one source; returns the number of the next source's first document."""
    counts = {"documents": 0, "exact": 0, "near": 0}
    number = start
    for chunk in chunks(read_documents(source, Rejects())):
        known = index.text_hash(number, number + len(chunk))
        for place, document in enumerate(chunk):
            low = int.from_bytes(text_digest(document.text)[:8], "little")
            if place >= len(known) or low != known[place]:
                raise DataError(
                    f"source {source.name!r} changed while it was read, at {document.id}; run it again"
                )
            kind = report.verdicts.kind[number]
            report.see(number, document)
            counts["documents"] += 1
            counts["exact"] += kind == EXACT
            counts["near"] += kind == NEAR
            if report.verdicts.first[number] == number:
                writer.add(document)
            number += 1
        progress(Progress(source.name, number - start, "written"))
    report.counts.append({key: int(value) for key, value in counts.items()})
    return number


def repeats(texts: list[str], folder: Path, threshold: float = 0.7, shingle: int = 5) -> Verdicts:
    """The verdicts on a list of texts; `folder` is empty and holds the index's files afterwards."""
    with closing(Index(folder, choose_rows(threshold), threshold, 1 << 30)) as index:
        index.add(sketch(shingle, False, texts))
        return index.verdicts()
