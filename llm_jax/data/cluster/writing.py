"""Documents that stay -> token shards in reading order, and one file that says what was found out.

A shard is a run of blocks of documents, and is sorted in the memory of the worker that writes it. Which
blocks it holds follows from the counts of tokens alone, so that shards are written side by side.
"""

import json
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np

from llm_jax import tokenizer as tokenizers
from llm_jax.data.cluster.holdout import Moved, moved_documents, split_of
from llm_jax.data.cluster.reading import Passing
from llm_jax.data.cluster.units import ORDER, fetch, is_remote, publish
from llm_jax.data.prepare import encode_chunk
from llm_jax.data.shard_writer import Encoded, SplitWriter
from llm_jax.data.shards import TOKENIZER

BATCH = 256  # documents encoded at once
BLOCK_BITS = 12  # documents of a unit that a shard takes together: 4,096 at most
RESULT = "scratch/result.jsonl"

# a document on its way into a shard: (sort key, tokens, UTF-8 bytes, characters)
Item = tuple[bytes, bytes, int, int]


class Encode(beam.DoFn):
    """Batches of documents -> (output source, order key, position, tokens, bytes, characters)."""

    def __init__(self, root: str, files: tuple[str, ...]) -> None:
        self._folder, self._files = f"{root}/{TOKENIZER}", files

    def setup(self) -> None:
        with tempfile.TemporaryDirectory(prefix="llm-jax-") as scratch:
            folder = Path(self._folder)
            if is_remote(self._folder):
                folder = Path(scratch)
                for name in self._files:
                    fetch(f"{self._folder}/{name}", folder)
            self._tokenizer = tokenizers.load(folder)

    def process(self, batch: list[Passing]) -> Iterator[Any]:
        encoded = encode_chunk(self._tokenizer, [text for _, (_, _, text) in batch])
        for (key, (output, _, _)), document in zip(batch, encoded, strict=True):
            tokens = document.tokens.astype("<u4").tobytes()
            sizes = document.num_bytes, document.num_characters
            yield (output, key, document.position, tokens, *sizes)


def place(
    document: tuple[Any, ...], fraction: float, moved: dict[str, dict[bytes, Moved]]
) -> tuple[tuple[str, str], Item]:
    """The split of a document and its place in it."""
    output, key, position, *rest = document
    found = moved.get(output, {}).get(key)
    if found is None:
        return (output, split_of(position, fraction)), (key + b"\1", *rest)
    return (output, found.split), (found.order, *rest)


def block_of(sort_key: bytes) -> bytes:
    """The block that a document belongs to; blocks are ordered like their documents."""
    head = ORDER.size - 8
    number = int.from_bytes(sort_key[head : ORDER.size], "big") >> BLOCK_BITS
    return sort_key[:head] + number.to_bytes(8, "big")


def first_blocks(totals: Iterable[tuple[bytes, int]], max_tokens: int) -> list[bytes]:
    """The first block of every shard: as many as fit, or one larger one."""
    starts, inside = [], 0
    for block, tokens in sorted(totals):
        if not starts or inside + tokens > max_tokens:
            starts.append(block)
            inside = 0
        inside += tokens
    return starts


def shard_of(
    placed: tuple[tuple[str, str], Item], starts: dict[tuple[str, str], list[bytes]]
) -> tuple[tuple[str, str, int], Item]:
    """A document with the number of its shard."""
    split, item = placed
    number = bisect_right(starts[split], block_of(item[0])) - 1
    return (*split, number), item


class WriteShard(beam.DoFn):
    """The documents of one shard -> its files, and ("shard", what the manifest says of it)."""

    def __init__(self, root: str, dtype: str) -> None:
        self._root, self._dtype = root, dtype

    def process(self, element: tuple[tuple[str, str, int], Iterable[Item]]) -> Iterator[Any]:
        (output, split, number), items = element
        with tempfile.TemporaryDirectory(prefix="llm-jax-") as scratch:
            folder = Path(scratch)
            (folder / output).mkdir()
            writer = SplitWriter(folder, output, split, self._dtype, 1 << 62)
            for _, tokens, num_bytes, num_characters in sorted(items):
                writer.add(Encoded(np.frombuffer(tokens, "<u4"), num_bytes, num_characters, 0.0))
            entry = writer.finish()
            shard = entry.pop("shards")[0]
            named = {
                f"{kind}_file": f"{output}/{split}-{number:05d}.{kind}.npy"
                for kind in ("tokens", "documents", "mask", "checks")
                if shard.get(f"{kind}_file")
            }
            for file, name in named.items():
                publish(folder / shard[file], f"{self._root}/{name}")
        made = {**entry, "shard": {**shard, **named}}
        yield "shard", {"output": output, "split": split, "number": number, **made}


def write_shards(
    documents: Any, encode: Encode, write: WriteShard, fraction: float, max_tokens: int
) -> Any:
    """("shard", entry) of every shard written."""
    encoded = (
        documents
        | "batch to encode" >> beam.BatchElements(min_batch_size=1, max_batch_size=BATCH)
        | "encode" >> beam.ParDo(encode)
        | "encoded once" >> beam.Reshuffle()
    )
    moved: Any = {}
    if fraction:
        metas = encoded | "positions" >> beam.Map(lambda document: document[:3])
        moved = beam.pvalue.AsDict(moved_documents(metas, fraction))
    placed = encoded | "place" >> beam.Map(place, fraction, moved=moved)
    starts = (
        placed
        | "tokens of blocks"
        >> beam.MapTuple(lambda split, item: ((split, block_of(item[0])), len(item[1]) // 4))
        | "sum of blocks" >> beam.CombinePerKey(sum)
        | "blocks of splits" >> beam.MapTuple(lambda key, tokens: (key[0], (key[1], tokens)))
        | "gather blocks" >> beam.GroupByKey()
        | "first blocks"
        >> beam.MapTuple(lambda split, totals: (split, first_blocks(totals, max_tokens)))
    )
    return (
        placed
        | "shard" >> beam.Map(shard_of, starts=beam.pvalue.AsDict(starts))
        | "shards" >> beam.GroupByKey()
        | "write" >> beam.ParDo(write)
    )


def write_result(pieces: list[tuple[str, Any]], root: str) -> None:
    """All (kind, JSON value) as lines of one file."""
    with tempfile.TemporaryDirectory(prefix="llm-jax-") as scratch:
        file = Path(scratch) / "result.jsonl"
        with open(file, "w", encoding="utf-8") as lines:
            for kind, value in pieces:
                lines.write(json.dumps([kind, value]) + "\n")
        publish(file, f"{root}/{RESULT}")
