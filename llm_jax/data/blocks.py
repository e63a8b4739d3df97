"""What is sent to a worker of the sources: raw lines or values where the format has them, else documents.

Parsing costs more than all else that reading does, so workers do it: the parent only cuts JSON lines and the
column of a Parquet file into blocks (lines: 2 ms a MB, of which unpacking is most). It reads other formats itself.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from llm_jax.data.documents import Document, Rejects, chunks
from llm_jax.data.record_files import parquet_values, value_documents
from llm_jax.data.sources import (
    SourceConfig,
    SourcePart,
    read_documents,
    source_files,
    source_parts,
)
from llm_jax.data.text_files import jsonl_documents, line_blocks, lines, open_bytes

BLOCK_BYTES = 1 << 19  # 0.1 s of cleaning: what a worker may have left when the others are done


class RawLines(NamedTuple):
    """Some lines of a file of JSON lines."""

    source: str
    place: str  # how ids call the file
    text_field: str
    first: int  # number of the first line
    data: bytes


class RawValues(NamedTuple):
    """Some values of the text column of a Parquet file."""

    source: str
    place: str
    first: int  # number of the first row
    values: list[bytes | None]


Block = RawLines | RawValues | list[Document]


def blocks(
    source: SourceConfig, rejects: Rejects, block_bytes: int = BLOCK_BYTES
) -> Iterator[Block]:
    """All of a source in order. What this process reads itself is counted in `rejects`.

    The blocks depend on the files and nothing else. Raises as `read_documents`.
    """
    undivided = source.format in ("package-docs", "tfds", "sample")
    # where reading stops depends on all texts before
    if undivided or source.max_bytes:
        yield from chunks(read_documents(source, rejects))
        return
    parts = source_parts(source, source_files(source))
    raw = {"jsonl": _line_blocks, "parquet": _value_blocks}.get(parts[0].kind)
    if raw is None:
        yield from chunks(read_documents(source, rejects))
        return
    for part in parts:
        yield from raw(source, part, block_bytes)


def _line_blocks(source: SourceConfig, part: SourcePart, block_bytes: int) -> Iterator[Block]:
    with open_bytes(part.file) as stream:
        for first, data in line_blocks(stream, block_bytes):
            yield RawLines(source.name, part.place, source.text_field, first, data)


def _value_blocks(source: SourceConfig, part: SourcePart, block_bytes: int) -> Iterator[Block]:
    first = 1
    for values in parquet_values(part.file, source.text_field):
        block, size = [], 0
        for value in values:
            block.append(value)
            size += len(value or b"")
            if size >= block_bytes:
                yield RawValues(source.name, part.place, first, block)
                first, block, size = first + len(block), [], 0
        if block:
            yield RawValues(source.name, part.place, first, block)
            first += len(block)


def documents_of(block: Block, rejects: Rejects) -> Iterable[Document]:
    """The documents of a block; what is no document is counted in `rejects`."""
    if isinstance(block, list):
        return block
    if isinstance(block, RawValues):
        return value_documents(block.source, block.values, block.place, block.first, rejects)
    numbered = lines(io.BytesIO(block.data), first=block.first)
    return jsonl_documents(numbered, block.source, block.place, block.text_field, rejects)


def results_by_source(
    apply: Callable[[Iterable[Any]], Iterator[Any]], sources: Iterable[tuple[SourceConfig, Rejects]]
) -> Iterator[Iterator[Any]]:
    """For each source the results of its blocks, in order.

    Args:
      apply: of `ordered_pool`, with a function made by `numbered`.
      sources: each with what to count in.
    """
    listed = list(sources)
    tasks = ((n, block) for n, one in enumerate(listed) for block in blocks(*one))
    groups = groupby(apply(tasks), key=itemgetter(0))
    waiting = next(groups, None)
    for number in range(len(listed)):
        if waiting is not None and waiting[0] == number:
            yield map(itemgetter(1), waiting[1])
            waiting = next(groups, None)
        else:  # an empty one
            yield iter(())


def numbered(make: Callable[..., Callable[[Any], Any]], settings: tuple) -> Callable[[Any], Any]:
    """The function that a worker applies to (number, block): (number, result)."""
    return partial(_numbered, make(*settings))


def _numbered(function: Callable[[Any], Any], task: tuple[int, Any]) -> tuple[int, Any]:
    return task[0], function(task[1])
