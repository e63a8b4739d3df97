"""The lines of all documents, on disk until it is known which of them stay.

Workers hand over blocks of finished lines, compressed, and write the parts of the output from them: every
source is read and parsed once, and the parent moves bytes. On disk this takes what the output would take
without repeats found, about a third of the text, and 24 bytes a document; in memory 200 bytes a block.
"""

from contextlib import closing
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow

from llm_jax.data.document_files import (
    PART_BYTES,
    Compression,
    Lines,
    Part,
    PartWriter,
    part_name,
)

LINES, SIZES = "lines", "sizes"  # files
COLUMNS = 3  # of sizes, uint64: bytes of a line, bytes and characters of its text
PARTS, LEAST_PART_BYTES = 16, 8 << 20  # of a source; more where they would be above PART_BYTES
CODEC = pyarrow.Codec("zstd", compression_level=1)


class Packed(NamedTuple):
    """The lines of one block of documents."""

    data: bytes  # compressed
    size: int  # before that
    sizes: np.ndarray  # uint64 [D, COLUMNS]


class Place(NamedTuple):
    """Where a block is held."""

    offset: int
    packed: int  # bytes there
    size: int  # bytes unpacked
    first: int  # number of its first document
    documents: int


class PartTask(NamedTuple):
    """One part of the output, to be written by any process of this machine."""

    held: Path
    root: Path
    name: str  # of the part below `root`
    compression: Compression
    blocks: list[tuple[Place, np.ndarray]]  # with which documents stay, bool


def pack(lines: Lines) -> Packed:
    """What is held of a block."""
    sizes = [(len(line), *size) for line, size in zip(lines.lines, lines.sizes, strict=True)]
    joined = b"".join(lines.lines)
    table = np.array(sizes, np.uint64).reshape(-1, COLUMNS)
    return Packed(CODEC.compress(joined, asbytes=True), len(joined), table)


class Held:
    """Gathers blocks in two files of a folder, which is empty at first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[BinaryIO] = [open(folder / name, "wb") for name in (LINES, SIZES)]  # noqa: SIM115
        self._places: dict[str, list[Place]] = {}  # by source
        self._documents = self._offset = 0

    def close(self) -> None:
        """Ends the gathering; harmless when repeated."""
        for file in self._files:
            file.close()

    def add(self, source: str, block: Packed) -> None:
        """Appends a block."""
        self._files[0].write(block.data)
        self._files[1].write(block.sizes.tobytes())
        size = len(block.data), block.size
        place = Place(self._offset, *size, self._documents, len(block.sizes))
        self._places.setdefault(source, []).append(place)
        self._offset += len(block.data)
        self._documents += len(block.sizes)

    def documents(self, source: str) -> slice:
        """The numbers of a source's documents, after `close`."""
        places = self._places.get(source)
        return (
            slice(places[0].first, places[-1].first + places[-1].documents) if places else slice(0)
        )

    def line(self, number: int) -> tuple[str, bytes]:
        """The source and the line of one document, after `close`."""
        source = next(s for s in self._places if number < self.documents(s).stop)
        place = next(p for p in self._places[source] if number < p.first + p.documents)
        ends = np.cumsum(_sizes(self._folder, place)[:, 0])
        inside = number - place.first
        begin = int(ends[inside - 1]) if inside else 0
        return source, _unpacked(self._folder, place)[begin : int(ends[inside])]

    def parts(
        self,
        source: str,
        root: Path,
        compression: Compression,
        stays: np.ndarray,
        part_bytes: int | None = None,
    ) -> tuple[list[PartTask], dict[str, int]]:
        """How to write what stays of a source below `root`, and what the manifest counts; after `close`.

        Args:
          source: its name.
          root: folder of the stage's output.
          compression: of the parts.
          stays: which documents of all sources do, bool.
          part_bytes: a part ends after the block that fills it; None: so that workers have enough to
            do, whatever their number.
        """
        chosen, counts = [], np.zeros(1 + COLUMNS, np.int64)
        for place in self._places.get(source, []):
            here = stays[place.first : place.first + place.documents]
            if here.any():
                sums = _sizes(self._folder, place)[here].sum(axis=0).astype(np.int64)
                counts += [int(here.sum()), *sums]
                chosen.append((place, here, int(sums[0])))
        documents, written, size, characters = counts.tolist()
        if part_bytes is None:
            part_bytes = min(PART_BYTES, max(LEAST_PART_BYTES, written // PARTS))
        tasks: list[PartTask] = []
        room = 0
        for place, here, length in chosen:
            if room <= 0:
                name = part_name(source, len(tasks), compression)
                tasks.append(PartTask(self._folder, root, name, compression, []))
                room = part_bytes
            tasks[-1].blocks.append((place, here))
            room -= length
        return tasks, {"documents": documents, "bytes": size, "characters": characters}


def write_part(task: PartTask) -> Part:
    """Writes one part."""
    with closing(PartWriter(task.root, task.name, task.compression)) as writer:
        for place, stays in task.blocks:
            lines = _unpacked(task.held, place)
            if not stays.all():
                ends = list(accumulate(_sizes(task.held, place)[:, 0].tolist()))
                spans = zip([0, *ends], ends, stays.tolist(), strict=False)
                lines = b"".join(lines[begin:end] for begin, end, stay in spans if stay)
            writer.write(lines, int(stays.sum()))
        return writer.finish()


def _sizes(folder: Path, place: Place) -> np.ndarray:
    """uint64 [D, COLUMNS] of a block."""
    count, start = place.documents * COLUMNS, 8 * COLUMNS * place.first
    return np.fromfile(folder / SIZES, np.uint64, count, offset=start).reshape(-1, COLUMNS)


def _unpacked(folder: Path, place: Place) -> bytes:
    with open(folder / LINES, "rb") as file:
        file.seek(place.offset)
        data: Any = file.read(place.packed)
    return CODEC.decompress(data, place.size, asbytes=True)
