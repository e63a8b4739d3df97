"""Documents on disk between two stages: a folder of compressed JSON lines, with a manifest.

    FOLDER/manifest.json                  the stage, its config, digests of inputs and outputs, counts
    FOLDER/SOURCE/part-00000.jsonl.zst    {"text": ..., "id": where it came from, ...} a line

Each FOLDER/SOURCE is a source like any other: `--source zh=FOLDER/zh`. Nothing is stamped with the
time, so the same input and config give the same bytes.
"""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow

from llm_jax.config import to_dict
from llm_jax.data.lineage import documents_digest, record_digest
from llm_jax.data.shard_writer import write_file
from llm_jax.data.shards import MANIFEST, sha256_of
from llm_jax.data.sources import Document, SourceConfig
from llm_jax.errors import ConfigError
from llm_jax.tokenizer.base import digest

Compression = Literal["zst", "gz"]

FORMAT = 1
PART_BYTES = 256 << 20  # of text before compression, so that a later stage can spread the files


@dataclass(frozen=True)
class Part:
    """One file of documents, as the manifest names it."""

    file: str  # relative to the folder
    size: int
    sha256: str
    documents: int


class Lines:
    """Documents as the lines that are written, and what the manifest counts of them.

    Made where the documents are at hand, often in a worker, so that nothing else need be sent.
    """

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.sizes: list[tuple[int, int]] = []  # of each text: UTF-8 bytes, characters

    def add(self, document: Document, **more: Any) -> None:
        """Appends one document; `more` becomes further fields of its line."""
        self.lines.append(document_line(document, **more))
        self.sizes.append((len(document.text.encode()), len(document.text)))


class PartWriter:
    """Writes one file of lines."""

    def __init__(self, root: Path, name: str, compression: Compression) -> None:
        self._path, self._name = root / name, name
        self._stream: Any = pyarrow.output_stream(
            str(self._path), compression={"zst": "zstd", "gz": "gzip"}[compression]
        )
        self.bytes = self._documents = 0  # bytes before compression

    def write(self, lines: bytes, documents: int) -> None:
        """Appends the lines of some documents."""
        self._stream.write(lines)
        self.bytes += len(lines)
        self._documents += documents

    def finish(self) -> Part:
        """Closes the file, which then is on disk for good."""
        self.close()
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        size = self._path.stat().st_size
        return Part(self._name, size, sha256_of(self._path), self._documents)

    def close(self) -> None:
        """Closes an unfinished file; for when an error ends the run."""
        self._stream.close()


def part_name(source: str, number: int, compression: Compression) -> str:
    """The file of a part, relative to the folder of the stage."""
    return f"{source}/part-{number:05d}.jsonl.{compression}"


class DocumentWriter:
    """Writes the documents of one source as parts of bounded size."""

    def __init__(self, root: Path, source: str, compression: Compression = "zst") -> None:
        self._root, self._source = root, source
        self._compression: Compression = compression
        self._parts: list[Part] = []
        self._part: PartWriter | None = None
        self.counts: Counter[str] = Counter(documents=0, bytes=0, characters=0)
        (root / source).mkdir()

    def write(self, lines: Lines) -> None:
        """Appends documents; a part ends after those that fill it."""
        if not lines.lines:
            return
        if self._part is None:
            name = part_name(self._source, len(self._parts), self._compression)
            self._part = PartWriter(self._root, name, self._compression)
        self._part.write(b"".join(lines.lines), len(lines.lines))
        size, characters = map(sum, zip(*lines.sizes, strict=True))
        self.counts.update(documents=len(lines.lines), bytes=size, characters=characters)
        if self._part.bytes >= PART_BYTES:
            self._finish_part()

    def finish(self) -> dict[str, Any]:
        """Closes the last part; returns the source's counts and parts for the manifest."""
        self._finish_part()
        return {**self.counts, "parts": [asdict(part) for part in self._parts]}

    def close(self) -> None:
        """Closes an unfinished part; for when an error ends the run."""
        if self._part is not None:
            self._part.close()
            self._part = None

    def _finish_part(self) -> None:
        if self._part is not None:
            self._parts.append(self._part.finish())
            self._part = None


def document_line(document: Document, **more: Any) -> bytes:
    """One document as a JSON line."""
    fields = {"text": document.text, "id": document.id, **more}
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


def write_manifest(
    root: Path,
    stage: str,
    config: Any,
    inputs: dict[str, Any],
    entries: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """Writes and returns the manifest of a stage that made documents.

    Args:
      root: the folder of the stage's output.
      stage: its name, as in `llm-jax data STAGE`.
      config: the dataclass that decided what it did.
      inputs: `input_records` of what it read, made before it was read.
      entries: by name of an output source: what `DocumentWriter.finish` returned, and more.
      more: further entries.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "stage": stage,
        "inputs": inputs,
        "sources": entries,
        "config": to_dict(config),
        **more,
    }
    manifest["config_digest"] = digest(manifest["config"])
    manifest["digest"] = documents_digest(manifest)
    manifest["record_digest"] = record_digest(manifest)
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    write_file(root / MANIFEST, text.encode("utf-8", "replace"))
    return manifest


def check_sources(sources: tuple[SourceConfig, ...], output: str) -> None:
    """Raises ConfigError for what every stage refuses: no source, a name twice, no output."""
    if not sources:
        raise ConfigError("sources is empty; give at least one, such as --source NAME=PATH")
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"source name {name!r} occurs twice; give each its own, NAME=PATH")
    if not output:
        raise ConfigError("output is empty; name a folder to make")
