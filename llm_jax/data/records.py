"""Whole records of a source: JSON objects, rows, examples; for data that is more than one text.

The files are those of `sources`; what a record means is the reader's business (`instruct`).
"""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from llm_jax.data import record_files, text_files
from llm_jax.data.documents import Rejects
from llm_jax.data.sources import SourceConfig, source_files, source_parts
from llm_jax.errors import DataError


class Record(NamedTuple):
    """One record of one source."""

    fields: dict[str, Any]  # plain values, lists and dictionaries; texts are str
    place: str  # "file:line" or "file:record"


def read_records(source: SourceConfig, rejects: Rejects) -> Iterator[Record]:
    """Yields the records of `source` in a fixed order; what is no record is counted in `rejects`.

    Of `source.max_bytes` count the texts anywhere in a record.

    Raises:
      DataError: a file is missing or damaged, or its format has no records.
    """
    spent = 0
    for record in _read_all(source, rejects):
        yield record
        if source.max_bytes:
            spent += _text_bytes(record.fields)
            if spent >= source.max_bytes:
                return


def _text_bytes(value: Any) -> int:
    """UTF-8 bytes of all texts in a value."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict):
        return sum(map(_text_bytes, value.values()))
    return sum(map(_text_bytes, value)) if isinstance(value, list) else 0


def _read_all(source: SourceConfig, rejects: Rejects) -> Iterator[Record]:
    if source.format == "tfds":
        yield from _tfds(source.path)
        return
    if source.format in ("package-docs", "sample"):
        raise DataError(
            f"source {source.name!r}: {source.format} holds texts, not records; give a file of .jsonl, "
            ".parquet or .array_record, or tfds:NAME:SPLIT"
        )
    parts = source_parts(source, source_files(source))
    if any(part.kind == "text" for part in parts):
        raise DataError(
            f"source {source.name!r}: {source.path!r} is plain text, which has no fields; give .jsonl, "
            ".parquet or .array_record"
        )
    readers = {"jsonl": _jsonl, "parquet": _parquet, "array_record": _array_record}
    for file, kind, place in parts:
        yield from readers[kind](file, place, rejects)


def _jsonl(file: str, place: str, rejects: Rejects) -> Iterator[Record]:
    with text_files.open_bytes(file) as stream:
        for number, line in text_files.lines(stream):
            where = f"{place}:{number}"
            if line is None:
                rejects.refuse(f"line longer than {text_files.MAX_LINE_BYTES >> 20} MB", where)
            elif line.strip():
                value = text_files.parse_object(line, where, rejects)
                if value is not None:
                    yield Record(value, where)


def _parquet(file: str, place: str, rejects: Rejects) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(record_files.ROWS_PER_READ):
                for index in range(len(batch)):
                    row += 1
                    where = f"{place}:{row}"
                    try:
                        yield Record(batch.slice(index, 1).to_pylist()[0], where)
                    except UnicodeDecodeError as error:  # of this row alone
                        rejects.refuse("not valid UTF-8", where, bytes(error.object))
    except (pa.ArrowException, OSError) as error:
        raise record_files.damaged(file, error) from error


def _array_record(file: str, place: str, rejects: Rejects) -> Iterator[Record]:
    from array_record.python.array_record_module import (  # pyright: ignore[reportMissingImports]
        ArrayRecordReader,
    )

    try:
        reader = ArrayRecordReader(file)
        try:
            for start in range(0, reader.num_records(), record_files.ROWS_PER_READ):
                stop = min(start + record_files.ROWS_PER_READ, reader.num_records())
                for number, content in enumerate(reader.read(start, stop), start=start + 1):
                    where = f"{place}:{number}"
                    value = text_files.parse_object(content, where, rejects)
                    if value is not None:
                        yield Record(value, where)
        finally:
            reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise record_files.damaged(file, error) from error


def _tfds(path: str) -> Iterator[Record]:
    name, split = record_files.split_of(path)
    examples = record_files.tfds_examples(name, split)
    for index in range(len(examples)):
        where = f"{os.path.basename(name.rstrip('/'))}:{split}:{index + 1}"
        yield Record({k: _plain(v) for k, v in examples[index].items()}, where)


def _plain(value: Any) -> Any:
    """A feature: TFDS gives bytes for text, arrays for lists, and a list of objects as an object of lists."""
    if isinstance(value, dict):
        found = {key: _plain(item) for key, item in value.items()}
        columns = list(found.values())
        if all(isinstance(c, list) for c in columns) and len({len(c) for c in columns}) == 1:
            return [dict(zip(found, row, strict=True)) for row in zip(*columns, strict=True)]
        return found
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
