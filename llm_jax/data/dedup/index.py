"""Which documents are repeats of earlier ones: signatures on disk, pairs by banding, clusters.

The files hold, per document, 16 bytes of a hash of its text, 2 bytes for each of 128 places and 8 for
each band. Memory: 4 bytes per document for the clusters, 1 for what is known of it, and one band's keys
while they are sorted, which are split by value when they would take more than `memory_bytes`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from llm_jax.data.dedup.minhash import PLACES, band_keys

SORT_BYTES = 150  # per key while a part is sorted, measured: read, joined, ordered, compared
PAIRS_AT_ONCE = 1 << 14  # two signatures each: 10 MB
KEYS_AT_ONCE = 1 << 20
UNIQUE, EXACT, NEAR = 0, 1, 2


class Sketch(NamedTuple):
    """What the index keeps of some documents."""

    text_hashes: np.ndarray  # uint64 [D, 2]
    signatures: (
        np.ndarray
    )  # uint16 [D, PLACES]; half of each value: two agree by chance once in 65,536
    keys: np.ndarray  # uint64 [D, bands]

    @classmethod
    def of(cls, text_hashes: np.ndarray, signatures: np.ndarray, rows: int) -> "Sketch":
        """That of whole signatures, uint32 [D, PLACES]."""
        return cls(text_hashes, signatures.astype(np.uint16), band_keys(signatures, rows))


class Verdicts(NamedTuple):
    """For every document, in the order they were added."""

    first: (
        np.ndarray
    )  # int32 [N], the earliest document of its cluster: itself for one that is kept
    kind: np.ndarray  # uint8 [N], UNIQUE, EXACT or NEAR


class Index:
    """Gathers sketches in files below a folder, then tells the repeats."""

    def __init__(self, folder: Path, rows: int, threshold: float, memory_bytes: int) -> None:
        self._folder, self._threshold = folder, threshold
        self._bands = PLACES // rows
        self._memory = memory_bytes
        self.num_documents = 0
        self.compared = 0  # pairs whose signatures were compared
        names = ["low", "high", "signatures", *(f"band-{band}" for band in range(self._bands))]
        self._files: dict[str, BinaryIO] = {n: open(folder / n, "wb") for n in names}  # noqa: SIM115

    def close(self) -> None:
        """Closes the files; harmless when repeated."""
        for file in self._files.values():
            file.close()

    def add(self, sketch: Sketch) -> None:
        """Appends documents; their keys are of as many rows as the index was made for."""
        self.num_documents += len(sketch.text_hashes)
        for column, name in enumerate(("low", "high")):
            self._files[name].write(np.ascontiguousarray(sketch.text_hashes[:, column]).tobytes())
        self._files["signatures"].write(sketch.signatures.tobytes())
        for band in range(self._bands):
            self._files[f"band-{band}"].write(np.ascontiguousarray(sketch.keys[:, band]).tobytes())

    def verdicts(self) -> Verdicts:
        """Finds the clusters; call once, after the last `add`."""
        self.close()
        first = np.arange(self.num_documents, dtype=np.int32)
        kind = np.zeros(self.num_documents, np.uint8)
        if not self.num_documents:
            return Verdicts(first, kind)
        for a, b in self._pairs("low", kind):
            same = self._look_up("high", np.uint64, 1, a) == self._look_up("high", np.uint64, 1, b)
            same = same[:, 0]
            _join(first, a[same], b[same])
        _settle(first)
        kind[first != np.arange(self.num_documents, dtype=np.int32)] = EXACT
        for band in range(self._bands):
            for a, b in self._pairs(f"band-{band}", kind):
                apart = first[a] != first[b]
                a, b = a[apart], b[apart]
                self.compared += len(a)
                near = self._similarities(a, b) >= self._threshold
                _join(first, a[near], b[near])
            _settle(first)
        moved = first != np.arange(self.num_documents, dtype=np.int32)
        kind[moved & (kind == UNIQUE)] = NEAR
        return Verdicts(first, kind)

    def similarity(self, a: int, b: int) -> float:
        """Estimated Jaccard similarity of two documents."""
        return float(self._similarities(np.array([a]), np.array([b]))[0])

    def _similarities(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        one = self._look_up("signatures", np.uint16, PLACES, a)
        return (one == self._look_up("signatures", np.uint16, PLACES, b)).mean(axis=1)

    def _look_up(self, name: str, dtype: Any, columns: int, documents: np.ndarray) -> np.ndarray:
        """Rows of a file, [D, columns]. Read, not mapped: every look at a map keeps 64 kB around."""
        width = np.dtype(dtype).itemsize * columns
        descriptor = os.open(self._folder / name, os.O_RDONLY)
        try:
            rows = [os.pread(descriptor, width, width * place) for place in documents.tolist()]
        finally:
            os.close(descriptor)
        return np.frombuffer(b"".join(rows), dtype=dtype).reshape(-1, columns)

    def _pairs(self, name: str, kind: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs (earlier, later) of documents with the same key, exact repeats left out.

        Of a run of equal keys every document is paired with the first and with the one before it.
        """
        parts = -(-self.num_documents * SORT_BYTES // self._memory)
        for part in range(parts):
            chosen, keys = self._keys(name, kind, part, parts)
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            repeat = np.flatnonzero(keys[1:] == keys[:-1]) + 1  # not the first of their run
            starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
            for begin in range(0, len(repeat), PAIRS_AT_ONCE):
                places = repeat[begin : begin + PAIRS_AT_ONCE]
                firsts = starts[np.searchsorted(starts, places, side="right") - 1]
                later = chosen[order[places]]
                yield chosen[order[firsts]], later
                yield chosen[order[places - 1]], later

    def _keys(
        self, name: str, kind: np.ndarray, part: int, parts: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Documents, int32, and keys, uint64, of one of `parts` parts by key, exact repeats left out."""
        documents, keys = [], []
        for start in range(0, self.num_documents, KEYS_AT_ONCE):
            count = min(KEYS_AT_ONCE, self.num_documents - start)
            read = np.fromfile(self._folder / name, np.uint64, count, offset=8 * start)
            here = kind[start : start + count] != EXACT
            if parts > 1:
                here &= read % np.uint64(parts) == part
            documents.append((np.flatnonzero(here) + start).astype(np.int32))
            keys.append(read[here])
        return np.concatenate(documents), np.concatenate(keys)


def _root(first: np.ndarray, document: int) -> int:
    while first[document] != document:
        first[document] = first[first[document]]
        document = int(first[document])
    return document


def _join(first: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Makes one cluster of each pair; the earlier root stays the root."""
    for one, other in zip(a.tolist(), b.tolist(), strict=True):
        x, y = _root(first, one), _root(first, other)
        if x != y:
            first[max(x, y)] = min(x, y)


def _settle(first: np.ndarray) -> None:
    """Points every document straight at its root, in place."""
    while True:
        above = first[first]
        if np.array_equal(above, first):
            return
        first[:] = above
