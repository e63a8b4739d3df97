"""Readers of Parquet, ArrayRecord and TFDS, the last without TensorFlow."""

import json
import os
from collections.abc import Iterator
from typing import Any

from llm_jax.config import nearest
from llm_jax.data.documents import Document, Rejects
from llm_jax.data.text_files import parse_object
from llm_jax.errors import DataError

ROWS_PER_READ = 1024


def read_parquet(
    source: str, file: str, place: str, text_field: str, rejects: Rejects
) -> Iterator[Document]:
    """One document per row of the column `text_field`, read in record batches."""
    first = 1
    for values in parquet_values(file, text_field):
        yield from value_documents(source, values, place, first, rejects)
        first += len(values)


def parquet_values(file: str, text_field: str) -> Iterator[list[bytes | None]]:
    """The values of a column as UTF-8 bytes, some rows at a time.

    Raises:
      DataError: a damaged file, no such column, or one that holds no strings.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            if text_field not in schema.names:
                raise DataError(
                    f"{file}: has no column {text_field!r}; {nearest(text_field, schema.names)}"
                )
            kind = schema.field(text_field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(f"{file}: column {text_field!r} holds {kind}, not strings")
            for batch in table.iter_batches(ROWS_PER_READ, columns=[text_field]):
                # as bytes: converting a column with one bad UTF-8 value to str would lose the batch
                yield batch.column(0).cast(pa.large_binary()).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise damaged(file, error) from error


def value_documents(
    source: str, values: list[bytes | None], place: str, first: int, rejects: Rejects
) -> Iterator[Document]:
    """The documents of values that stand in a file from row `first` on."""
    for row, value in enumerate(values, start=first):
        yield from _decoded(source, value, f"{place}:{row}", rejects)


def _decoded(source: str, value: bytes | None, place: str, rejects: Rejects) -> Iterator[Document]:
    """Zero or one document of UTF-8 bytes."""
    if value is None:
        rejects.refuse("text is null", place)
        return
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        rejects.refuse("not valid UTF-8", place, value)
        return
    if document := rejects.accept(text, source, place):
        yield document


def read_array_record(
    source: str, file: str, place: str, text_field: str, rejects: Rejects
) -> Iterator[Document]:
    """One document per record: UTF-8 text, or a JSON object with `text_field`.

    The first record of the file decides which of the two it holds.
    """
    from array_record.python.array_record_module import (  # pyright: ignore[reportMissingImports]
        ArrayRecordReader,
    )

    try:
        reader = ArrayRecordReader(file)
        try:
            is_json = None
            for start in range(0, reader.num_records(), ROWS_PER_READ):
                stop = min(start + ROWS_PER_READ, reader.num_records())
                for number, record in enumerate(reader.read(start, stop), start=start + 1):
                    where = f"{place}:{number}"
                    is_json = _is_json_object(record) if is_json is None else is_json
                    if not is_json:
                        yield from _decoded(source, record, where, rejects)
                    elif (value := parse_object(record, where, rejects)) is not None:
                        if text_field not in value:
                            rejects.refuse(f"no field {text_field!r}", where, record)
                        elif document := rejects.accept(value[text_field], source, where):
                            yield document
        finally:
            reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise damaged(file, error) from error


def _is_json_object(record: bytes) -> bool:
    try:
        return isinstance(json.loads(record), dict)
    except (ValueError, RecursionError):
        return False


def read_tfds(source: str, path: str, text_field: str, rejects: Rejects) -> Iterator[Document]:
    """One document per example of a prepared TFDS dataset in ArrayRecord format.

    `path` is `NAME:SPLIT` (looked up in the TFDS data folder; nothing is downloaded) or
    `FOLDER:SPLIT` with the folder that holds `dataset_info.json`. Without `:SPLIT` it is `train`.
    `text_field` may be a feature inside another: `translation.zh`.
    """
    name, split = split_of(path)
    examples: Any = tfds_examples(name, split)
    if len(examples):
        _feature(examples[0], text_field, path)
    for index in range(len(examples)):
        value = _feature(examples[index], text_field, path)
        where = f"{os.path.basename(name.rstrip('/'))}:{split}:{index + 1}"
        if isinstance(value, bytes):
            yield from _decoded(source, value, where, rejects)
        elif document := rejects.accept(value, source, where):
            yield document


def _feature(example: Any, path: str, dataset: str) -> Any:
    """The value of a feature, or of one inside another: `translation.zh`.

    Raises:
      DataError: the example has none of that name.
    """
    if path in example:
        return example[path]
    value = example
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            names = sorted(_feature_names(example))
            raise DataError(f"tfds {dataset!r}: has no feature {path!r}; {nearest(path, names)}")
        value = value[name]
    return value


def _feature_names(example: dict[str, Any], before: str = "") -> Iterator[str]:
    for name, value in example.items():
        if isinstance(value, dict):
            yield from _feature_names(value, f"{before}{name}.")
        else:
            yield before + name


def split_of(path: str) -> tuple[str, str]:
    """`NAME:SPLIT` as its two parts; without a split it is `train`."""
    if os.path.isdir(path) or ":" not in path:
        return path, "train"
    name, _, split = path.rpartition(":")
    return name, split


def tfds_examples(name: str, split: str) -> Any:
    """A random-access view of one split."""
    import tensorflow_datasets as tfds

    try:
        read_builder = tfds.builder_from_directory if os.path.isdir(name) else tfds.builder
        builder: Any = read_builder(name)
        if split not in builder.info.splits:
            known = (
                ", ".join(sorted(builder.info.splits))
                or "none: prepare it with the tfds command first"
            )
            raise DataError(f"tfds {name!r}: has no split {split!r}; known: {known}")
        return builder.as_data_source(split)
    except DataError:
        raise
    except Exception as error:  # tfds raises many types for a missing or damaged dataset
        detail = str(error).strip().partition("\n")[0]
        raise DataError(f"tfds {name!r}: cannot be read ({detail})") from error


def damaged(file: str, error: Exception) -> DataError:
    """A file that its library cannot read."""
    detail = str(error).strip().partition("\n")[0]
    return DataError(f"{file}: cannot be read, damaged or not of this format ({detail})")
