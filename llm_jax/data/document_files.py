"""Documents on disk between two stages: a folder of compressed JSON lines, with a manifest.

    FOLDER/manifest.json                  the stage, its config, digests of inputs and outputs, counts
    FOLDER/SOURCE/part-00000.jsonl.zst    {"text": ..., "id": where it came from, ...} a line

Each FOLDER/SOURCE is a source like any other: `--source zh=FOLDER/zh`. Nothing is stamped with the
time, so the same input and config give the same bytes.
"""

import json
import os
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


class DocumentWriter:
    """Writes the documents of one source as parts of bounded size."""

    def __init__(self, root: Path, source: str, compression: Compression = "zst") -> None:
        self._root, self._source, self._ending = root, source, compression
        self._parts: list[Part] = []
        self._stream: Any = None
        self._in_part = self._documents = 0
        self.counts = {"documents": 0, "bytes": 0, "characters": 0}
        (root / source).mkdir()

    def add(self, document: Document, **more: Any) -> None:
        """Appends one document; `more` becomes further fields of its line."""
        self.add_line(document_line(document, **more), document.text)

    def add_line(self, line: bytes, text: str) -> None:
        """Appends a line made by `document_line`, maybe in another process, of `text`."""
        if self._stream is None:
            compression = {"zst": "zstd", "gz": "gzip"}[self._ending]
            self._stream = pyarrow.output_stream(str(self._path()), compression=compression)
        self._stream.write(line)
        self._in_part += len(line)
        self._documents += 1
        self.counts["documents"] += 1
        self.counts["bytes"] += len(text.encode())
        self.counts["characters"] += len(text)
        if self._in_part >= PART_BYTES:
            self._finish_part()

    def finish(self) -> dict[str, Any]:
        """Closes the last part; returns the source's counts and parts for the manifest."""
        self._finish_part()
        return {**self.counts, "parts": [asdict(part) for part in self._parts]}

    def close(self) -> None:
        """Closes an unfinished part; for when an error ends the run."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _path(self) -> Path:
        return self._root / self._source / f"part-{len(self._parts):05d}.jsonl.{self._ending}"

    def _finish_part(self) -> None:
        if self._stream is None:
            return
        path = self._path()
        self.close()
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        name = path.relative_to(self._root).as_posix()
        self._parts.append(Part(name, path.stat().st_size, sha256_of(path), self._documents))
        self._in_part = self._documents = 0


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
