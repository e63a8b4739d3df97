"""What one worker reads: one file, or a whole source where a source cannot be divided.

Paths with "://" (gs://, s3://, hdfs://) go through Beam's file systems: fetched before they are read,
published once they are whole. All others must be the same on every machine, such as a mounted share.
"""

import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from llm_jax.data.clean.rules import CleanConfig
from llm_jax.data.documents import Document, Rejects
from llm_jax.data.lineage import file_record
from llm_jax.data.shard_writer import sync_folder
from llm_jax.data.shards import sha256_of
from llm_jax.data.sources import (
    SourceConfig,
    SourcePart,
    choose_files,
    read_documents,
    read_part,
    source_files,
    source_parts,
)
from llm_jax.errors import ConfigError, DataError

# index of the source, label of its language, number of the unit, number inside the unit: compared as
# bytes they give the order in which one machine would have read
ORDER = struct.Struct(">H8sIQ")


AS_IT_IS = (
    CompressionTypes.UNCOMPRESSED
)  # Beam would open .gz and .zst by itself, and torn ones too


class Unit(NamedTuple):
    """What is read in one go."""

    number: int  # counts the units of all sources, in order
    source_index: int
    source: SourceConfig
    part: SourcePart | None  # None: all of the source


def order_key(unit: Unit, label: str, number: int) -> bytes:
    """Where document `number` of a unit stands; `label` is the end of its source's name."""
    return ORDER.pack(unit.source_index, label.encode(), unit.number, number)


def is_remote(path: str) -> bool:
    """Whether Beam's file systems must be asked for it."""
    return "://" in path


def list_units(sources: tuple[SourceConfig, ...]) -> list[Unit]:
    """The units of all sources in order.

    Raises:
      DataError: a source without files, or with files of more than one format.
      ConfigError: a limit in bytes on a remote source, where no one reads in order.
    """
    units: list[Unit] = []
    for index, source in enumerate(sources):
        whole = source.max_bytes or source.format in ("tfds", "package-docs", "sample")
        if whole and is_remote(source.path) and source.format != "tfds":
            raise ConfigError(
                f"source {source.name!r}: max_bytes={source.max_bytes} needs a path that is not "
                "remote; name fewer files instead"
            )
        if whole:
            units.append(Unit(len(units), index, source, None))
            continue
        files = _remote_files(source) if is_remote(source.path) else source_files(source)
        units += [
            Unit(len(units) + place, index, source, part)
            for place, part in enumerate(source_parts(source, files))
        ]
    return units


def _remote_files(source: SourceConfig) -> list[str]:
    path = source.path
    patterns = [path] if any(mark in path for mark in "*?[") else [path, path.rstrip("/") + "/**"]
    found = [file.path for match in FileSystems.match(patterns) for file in match.metadata_list]
    return choose_files(source, sorted(set(found)))


@contextmanager
def at_hand(unit: Unit, folder: Path) -> Iterator[tuple[Unit, list[dict[str, Any]]]]:
    """A unit that can be read here, and the name, size and sha256 of each of its files.

    A remote file lies in `folder` meanwhile.
    """
    if unit.part is None:
        yield unit, [file_record(file) for file in source_files(unit.source)]
        return
    named = unit.part.file
    here = fetch(named, folder)
    try:
        record = file_record(here)
        if is_remote(named):
            record["file"] = named
        yield unit._replace(part=unit.part._replace(file=here)), [record]
    finally:
        if here != named:
            os.unlink(here)


def read_unit(unit: Unit, rejects: Rejects) -> Iterator[Document]:
    """Yields the documents of a unit at hand, in order."""
    if unit.part is None:
        return read_documents(unit.source, rejects)
    return read_part(unit.source, unit.part, rejects)


def fetch(path: str, folder: Path) -> str:
    """A path that can be opened here: the path itself, or a copy in `folder` of a remote file."""
    if not is_remote(path):
        return path
    target = folder / os.path.basename(path)  # the ending tells the format
    try:
        with (
            FileSystems.open(path, compression_type=AS_IT_IS) as source,
            open(target, "wb") as copy,
        ):
            shutil.copyfileobj(source, copy, 1 << 20)
    except Exception as error:  # every file system has its own
        raise DataError(f"{path}: cannot be read ({str(error).partition(chr(10))[0]})") from error
    return str(target)


def fetched_rules(rules: CleanConfig, folder: Path) -> CleanConfig:
    """The rules with their lists where they can be opened."""
    return replace(
        rules, terms=fetch(rules.terms, folder), block_list=fetch(rules.block_list, folder)
    )


def publish(file: Path, target: str) -> None:
    """Copies a finished file to where others look for it; it appears whole or not at all.

    A task that Beam runs twice publishes the same bytes twice.
    """
    if is_remote(target):
        with (
            open(file, "rb") as source,
            FileSystems.create(target, compression_type=AS_IT_IS) as copy,
        ):
            shutil.copyfileobj(source, copy, 1 << 20)  # an object appears when it is closed
        return
    place = Path(target)
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}.{sha256_of(file)[:8]}-{os.getpid()}.partial")
    with open(file, "rb") as source, open(partial, "wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())
    os.replace(partial, place)
    sync_folder(place.parent)
