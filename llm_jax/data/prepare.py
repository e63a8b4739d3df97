"""Text to token shards: the stage `llm-jax data prepare`.

For each source, in one pass:
1. read documents (`sources`), drop exact duplicates;
2. encode them in chunks, here or in worker processes, in the same order either way;
3. frame each as [start] + ids + [EOS] (start: BOS, or EOS where there is no BOS), deal it to train or heldout by a hash of its text;
4. write shards; stop when more records were rejected than allowed.
Then the manifest is written and the whole folder renamed into place.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm_jax import tokenizer as tokenizers
from llm_jax.config import to_dict
from llm_jax.data import shards
from llm_jax.data.documents import Document, Rejects
from llm_jax.data.lineage import input_records, record_digest
from llm_jax.data.ordered_pool import ordered_map
from llm_jax.data.shard_writer import Encoded, HoldOut, SplitWriter, new_folder, write_file
from llm_jax.data.sources import SourceConfig, read_documents
from llm_jax.errors import ConfigError, DataError
from llm_jax.tokenizer.base import Tokenizer, start_id

CHUNK_CHARACTERS = 1 << 20  # text encoded at once; also what one message to a worker holds
CHUNK_DOCUMENTS = 1024
COUNTED = ("documents", "tokens", "bytes")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to prepare, with which tokenizer, and where to put it."""

    sources: tuple[SourceConfig, ...]  # what to read, in this order
    tokenizer: str  # folder or file of the tokenizer
    output: str  # folder to make
    holdout_fraction: float = 0.01  # share of each source's documents held out; 0 holds none out
    max_reject_fraction: float = 0.001  # stop when more than this share of a source is unusable
    drop_duplicates: bool = True  # drop exact repeats inside a source; about 100 bytes of RAM each
    shard_max_tokens: int = 1 << 27  # tokens per shard file: 256 MB of uint16
    workers: int = 0  # processes that encode; 0 encodes in this one
    overwrite: bool = False  # replace prepared data that is already at `output`

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("sources is empty; give at least one, such as --source NAME=PATH")
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"source name {name!r} occurs twice; give each its own, NAME=PATH"
                )
        if not self.output:
            raise ConfigError("output is empty; name a folder to make")
        for field, low, high in (("holdout_fraction", 0, 0.5), ("max_reject_fraction", 0, 1)):
            value = getattr(self, field)
            if not low <= value <= high:
                raise ConfigError(f"{field}={value} must be between {low} and {high}")
        if self.shard_max_tokens < 1:
            raise ConfigError(f"shard_max_tokens={self.shard_max_tokens} must be at least 1")
        if self.workers < 0:
            raise ConfigError(f"workers={self.workers} must be 0 or more")


class Progress(NamedTuple):
    """How far one source is."""

    source: str
    documents: int
    tokens: int
    bytes: int
    rejected: int


def prepare(
    config: PrepareConfig, progress: Callable[[Progress], None] | None = None
) -> shards.Prepared:
    """Prepares all sources and returns the opened result.

    Args:
      config: what to do.
      progress: called after every chunk of documents and at the end of every source.

    Raises:
      DataError: an unusable source or tokenizer, an output that exists, a full disk. Nothing is
        left at `config.output` then.
    """
    tokenizer = tokenizers.load(Path(config.tokenizer))
    dtype = token_dtype(tokenizer)
    with new_folder(config.output, config.overwrite) as root:
        tokenizer_folder = root / shards.TOKENIZER
        tokenizer_folder.mkdir()
        tokenizer.save(tokenizer_folder)
        entries, samples = {}, ""
        inputs = input_records(config.sources)
        for source in config.sources:
            rejects = Rejects()
            entries[source.name] = _prepare_source(
                source, config, root, dtype, rejects, progress or (lambda _: None)
            )
            samples += rejects.lines(source.name)
        write_manifest(root, samples, prepared_manifest(tokenizer, config, inputs, entries))
    return shards.open_prepared(config.output)


def token_dtype(tokenizer: Tokenizer) -> str:
    """How ids are stored."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def prepared_manifest(
    tokenizer: Tokenizer, config: Any, inputs: dict[str, Any], entries: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """What the manifest of prepared data says.

    Args:
      tokenizer: what the shards were encoded with.
      config: the dataclass that decided what was done.
      inputs: `input_records` of what was read, made before it was read.
      entries: by name of a source: its splits with their counts and shards, and more.
      more: further entries.
    """
    manifest: dict[str, Any] = {
        "format": shards.FORMAT,
        "dtype": token_dtype(tokenizer),
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        "inputs": inputs,
        "sources": entries,
        "config": to_dict(config),
        **{name: to_dict(part) for name, part in more.items()},
    }
    manifest["digest"] = shards.content_digest(manifest)
    manifest["record_digest"] = record_digest(manifest)
    return manifest


def write_manifest(root: Path, samples: str, manifest: dict[str, Any]) -> None:
    """The last files of a folder of token shards; `samples` are lines of rejects.jsonl."""
    write_file(root / shards.REJECTS, samples.encode("utf-8", "replace"))
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    write_file(root / shards.MANIFEST, text.encode())


def _prepare_source(
    source: SourceConfig,
    config: PrepareConfig,
    root: Path,
    dtype: str,
    rejects: Rejects,
    progress: Callable[[Progress], None],
) -> dict[str, Any]:
    """Writes the shards of one source; returns its entry for the manifest."""
    stream = _Stream(source, config.drop_duplicates, rejects)
    encoded = ordered_map(make_encoder, (config.tokenizer,), stream.chunks(), config.workers)
    writers = SourceWriters(
        root, source.name, dtype, config.holdout_fraction, config.shard_max_tokens
    )
    splits = writers.write(encoded, lambda now: progress(now._replace(rejected=rejects.total)))
    rejects.check(source.name, config.max_reject_fraction)
    return {
        "input_digest": stream.digest.hexdigest(),
        "duplicates": stream.duplicates,
        "rejects": rejects.report(),
        "splits": splits,
    }


class SourceWriters:
    """The writers of both splits of one source."""

    def __init__(
        self,
        root: Path,
        source: str,
        dtype: str,
        holdout_fraction: float,
        max_tokens: int,
        together: bool = False,
    ) -> None:
        """`together` as in `HoldOut`."""
        (root / source).mkdir()
        self._source, self._holdout = source, HoldOut(holdout_fraction, together)
        self._writers = {
            split: SplitWriter(root, source, split, dtype, max_tokens) for split in shards.SPLITS
        }

    def write(
        self, chunks: Iterable[list[Encoded]], progress: Callable[[Progress], None]
    ) -> dict[str, Any]:
        """Writes all documents; returns the entries of the splits for the manifest."""
        with ExitStack() as stack:
            for writer in self._writers.values():
                stack.callback(writer.close)
            for chunk in chunks:
                for document in chunk:
                    self._add(self._holdout.deal(document))
                progress(self._progress())
            self._add(self._holdout.rest())
            progress(self._progress())
            return {split: writer.finish() for split, writer in self._writers.items()}

    def _add(self, settled: Iterable[tuple[str, Encoded]]) -> None:
        for split, document in settled:
            self._writers[split].add(document)

    def _progress(self) -> Progress:
        counts = [writer.counts for writer in self._writers.values()]
        total = {key: sum(count[key] for count in counts) for key in COUNTED}
        return Progress(source=self._source, rejected=0, **total)


class _Stream:
    """Documents of a source without exact repeats, in chunks; counts and digests as they pass."""

    def __init__(self, source: SourceConfig, drop_duplicates: bool, rejects: Rejects) -> None:
        self._source, self._drop, self._rejects = source, drop_duplicates, rejects
        self._seen: set[bytes] = set()
        self.digest = hashlib.sha256()  # of every text that is kept, in order
        self.duplicates = 0

    def chunks(self) -> Iterator[list[str]]:
        """Yields lists of texts of bounded size."""
        chunk, size = [], 0
        for document in self._unique():
            chunk.append(document.text)
            size += len(document.text)
            if size >= CHUNK_CHARACTERS or len(chunk) >= CHUNK_DOCUMENTS:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    def _unique(self) -> Iterator[Document]:
        for document in read_documents(self._source, self._rejects):
            key = text_key(document.text)
            if self._drop:
                if key in self._seen:
                    self.duplicates += 1
                    continue
                self._seen.add(key)
            self.digest.update(key)
            yield document


def text_key(text: str) -> bytes:
    """A 16-byte hash of a text: equal texts are one document, whatever file they are in."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def position_of(key: bytes) -> float:
    """`Encoded.position` of a text by its key."""
    return int.from_bytes(key[:8], "little") / 2**64


def make_encoder(folder: str) -> Callable[[list[str]], list[Encoded]]:
    """The function that a worker applies to every chunk of texts."""
    return partial(encode_chunk, tokenizers.load(Path(folder)))


def encode_chunk(tokenizer: Tokenizer, texts: list[str]) -> list[Encoded]:
    """Encodes and frames texts.

    Raises:
      DataError: the tokenizer gives an id outside its vocabulary.
    """
    head = [start_id(tokenizer)]
    documents = []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        tokens = np.concatenate([head, ids, [tokenizer.eos_id]]).astype(np.int64)
        if tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size:
            raise DataError(
                f"the tokenizer gives id {int(tokens.max())}, but vocab_size is "
                f"{tokenizer.vocab_size}; its files do not belong together"
            )
        position = position_of(text_key(text))
        documents.append(Encoded(tokens.astype(np.uint32), len(text.encode()), len(text), position))
    return documents
