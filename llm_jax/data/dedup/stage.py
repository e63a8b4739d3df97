"""The stage `llm-jax data dedup`: sources in, the same sources without repeats out.

1. Every document of every source is read and sketched, here or in worker processes; sketches go into the
   files of an index, and the lines that are to be written into those of `held`.
2. The index finds exact and near repeats over all sources at once; the first of a cluster stays.
3. What stays is written, a part by each worker.
Texts are held on disk only, so memory is that of the index (see there) and a few blocks.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from llm_jax.data.blocks import Block, documents_of, numbered, results_by_source
from llm_jax.data.dedup.held import Held, Packed, PartTask, pack, write_part
from llm_jax.data.dedup.index import EXACT, NEAR, Index, Sketch, Verdicts
from llm_jax.data.dedup.minhash import PLACES, choose_rows, signature
from llm_jax.data.document_files import Compression, Lines, Part, check_sources, write_manifest
from llm_jax.data.documents import Rejects
from llm_jax.data.lineage import input_records
from llm_jax.data.ordered_pool import ordered_pool
from llm_jax.data.shard_writer import new_folder, write_file
from llm_jax.data.shards import REJECTS
from llm_jax.data.sources import SourceConfig
from llm_jax.errors import ConfigError

REPORT = "report.json"
SAMPLES = 50
EXCERPT = 200
SAMPLE = ("dropped", "kept", "similarity", "dropped_text", "kept_text")
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
    workers: int = 0  # processes that read, sketch and write
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
      DataError: an unusable source, an output that exists, a full disk. Nothing is left at
        `config.output` then.
    """
    with new_folder(config.output, config.overwrite) as root, ExitStack() as stack:
        inputs = input_records(config.sources)
        scratch = root / "scratch"
        scratch.mkdir()
        rows = choose_rows(config.threshold)
        index = Index(scratch, rows, config.threshold, config.memory_mb << 20)
        held = Held(scratch)
        for open_files in (index, held):
            stack.callback(open_files.close)
        settings = (worker, (config.shingle, config.exact_only, rows))
        apply = stack.enter_context(ordered_pool(numbered, settings, config.workers))
        rejects = _read(config, index, held, apply, progress)
        held.close()
        verdicts = index.verdicts()
        entries = _write(config, root, held, verdicts, apply, progress)
        for name, counted in rejects.items():
            entries[name]["rejects"] = counted.report()
            kind = verdicts.kind[held.documents(name)]
            near, exact = (int(np.count_nonzero(kind == one)) for one in (NEAR, EXACT))
            entries[name]["repeats"] = {"documents": len(kind), "exact": exact, "near": near}
        pairs = {"samples": _samples(index, held, verdicts)}
        shutil.rmtree(scratch)
        text = json.dumps(pairs, indent=1, ensure_ascii=False)
        write_file(root / REPORT, text.encode("utf-8", "replace"))
        unreadable = "".join(counted.lines(name) for name, counted in rejects.items())
        write_file(root / REJECTS, unreadable.encode("utf-8", "replace"))
        return write_manifest(root, "dedup", config, inputs, entries, rows_per_band=rows)


Apply = Callable[[Iterable[Any]], Iterator[Any]]


def _read(
    config: DedupStage, index: Index, held: Held, apply: Apply, progress: Callback
) -> dict[str, Rejects]:
    """Sketches all sources; returns what was unreadable in each."""
    read = [(source, Rejects()) for source in config.sources]
    for (source, rejects), results in zip(read, results_by_source(apply, read), strict=True):
        seen = 0
        for block in results:
            index.add(block.sketch)
            held.add(source.name, block.packed)
            rejects.merge(block.rejects)
            seen += len(block.packed.sizes)
            progress(Progress(source.name, seen, "sketched"))
        rejects.check(source.name, config.max_reject_fraction)
    return {source.name: rejects for source, rejects in read}


def _write(
    config: DedupStage, root: Path, held: Held, verdicts: Verdicts, apply: Apply, progress: Callback
) -> dict[str, dict[str, Any]]:
    """Writes what stays; returns counts and parts by source."""
    stays = verdicts.first == np.arange(len(verdicts.first), dtype=np.int32)
    entries, tasks = {}, []
    for number, source in enumerate(config.sources):
        (root / source.name).mkdir()
        of_source, counts = held.parts(source.name, root, config.compression, stays)
        entries[source.name] = {**counts, "parts": []}
        tasks += [(number, task) for task in of_source]
    for number, part in apply(tasks):
        name = config.sources[number].name
        parts = entries[name]["parts"]
        parts.append(asdict(part))
        progress(Progress(name, sum(part["documents"] for part in parts), "written"))
    return entries


class Sketched(NamedTuple):
    """What a worker makes of one block."""

    sketch: Sketch
    packed: Packed
    rejects: Rejects


def worker(shingle: int, exact_only: bool, rows: int) -> Callable[[Block | PartTask], Any]:
    """The function that a worker applies to every task: a block to sketch or a part to write."""
    return partial(_work, shingle, exact_only, rows)


def _work(shingle: int, exact_only: bool, rows: int, task: Block | PartTask) -> Sketched | Part:
    if isinstance(task, PartTask):
        return write_part(task)
    rejects, lines, texts = Rejects(), Lines(), []
    for document in documents_of(task, rejects):
        lines.add(document)
        texts.append(document.text)
    sketched = Sketch.of(*sketch(shingle, exact_only, texts), rows)
    return Sketched(sketched, pack(lines), rejects)


def sketch(shingle: int, exact_only: bool, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes, uint64 [D, 2], and signatures, uint32 [D, PLACES], of some texts."""
    hashes = np.frombuffer(b"".join(map(text_digest, texts)), dtype="<u8").reshape(-1, 2)
    signatures = np.zeros((len(texts), PLACES), np.uint32)
    for row, (text, low) in enumerate(zip(texts, hashes[:, 0].tolist(), strict=True)):
        if exact_only or sum(map(str.isalnum, text[: 4 * MIN_LETTERS])) < MIN_LETTERS:
            # a signature that no other text has
            signatures[row] = (np.arange(PLACES, dtype=np.uint64) + np.uint64(low)) & 0xFFFFFFFF
        else:
            signatures[row] = signature(text, shingle)
    return hashes, signatures


def text_digest(text: str) -> bytes:
    """16 bytes, by which equal texts are told."""
    return xxhash.xxh3_128_digest(text.encode())[::-1]


def _samples(index: Index, held: Held, verdicts: Verdicts) -> list[dict[str, Any]]:
    """The first pairs of near repeats, to look at."""
    samples = []
    for number in np.flatnonzero(verdicts.kind == NEAR)[:SAMPLES].tolist():
        first = int(verdicts.first[number])
        sample: dict[str, Any] = {"similarity": round(index.similarity(first, number), 3)}
        for role, which in (("dropped", number), ("kept", first)):
            source, line = held.line(which)
            fields = json.loads(line)
            sample[role] = f"{source}/{fields['id']}"
            sample[f"{role}_text"] = fields["text"][:EXCERPT]
        samples.append({key: sample[key] for key in SAMPLE})
    return samples


def repeats(texts: list[str], folder: Path, threshold: float = 0.7, shingle: int = 5) -> Verdicts:
    """The verdicts on a list of texts; `folder` is empty and holds the index's files afterwards."""
    with closing(Index(folder, choose_rows(threshold), threshold, 1 << 30)) as index:
        index.add(Sketch.of(*sketch(shingle, False, texts), choose_rows(threshold)))
        return index.verdicts()
