"""Which documents are repeats of earlier ones: signatures on disk, pairs by banding, clusters.

The files hold, per document, 16 bytes of a hash of its text, 2 bytes for each of 128 places and 8 for
each band. Memory: 4 bytes per document for the clusters, 1 for what is known of it, and one band's keys
while they are sorted, which are split by value when they would take more than `memory_bytes`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from llm_jax.data.dedup.minhash import PLACES, band_keys

SORT_BYTES = 40  # per key: the key, its place, and what argsort and the two gathers hold
PAIRS_AT_ONCE = 1 << 16
UNIQUE, EXACT, NEAR = 0, 1, 2


class Sketch(NamedTuple):
    """What the index keeps of a chunk of documents."""

    text_hashes: np.ndarray  # uint64 [D, 2]
    signatures: np.ndarray  # uint32 [D, PLACES]


class Verdicts(NamedTuple):
    """For every document, in the order they were added."""

    first: (
        np.ndarray
    )  # int32 [N], the earliest document of its cluster: itself for one that is kept
    kind: np.ndarray  # uint8 [N], UNIQUE, EXACT or NEAR


class Index:
    """Gathers sketches in files below a folder, then tells the repeats."""

    def __init__(self, folder: Path, rows: int, threshold: float, memory_bytes: int) -> None:
        self._folder, self._rows, self._threshold = folder, rows, threshold
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
        """Appends a chunk of documents."""
        self.num_documents += len(sketch.text_hashes)
        keys = band_keys(sketch.signatures, self._rows)
        for column, name in enumerate(("low", "high")):
            self._files[name].write(np.ascontiguousarray(sketch.text_hashes[:, column]).tobytes())
        # half of each value: two places agree by chance once in 65,536
        self._files["signatures"].write(sketch.signatures.astype(np.uint16).tobytes())
        for band in range(self._bands):
            self._files[f"band-{band}"].write(np.ascontiguousarray(keys[:, band]).tobytes())

    def verdicts(self) -> Verdicts:
        """Finds the clusters; call once, after the last `add`."""
        self.close()
        first = np.arange(self.num_documents, dtype=np.int32)
        kind = np.zeros(self.num_documents, np.uint8)
        if not self.num_documents:
            return Verdicts(first, kind)
        high = self._map("high", np.uint64)
        for a, b in self._pairs("low", kind):
            same = high[a] == high[b]
            _join(first, a[same], b[same])
        _settle(first)
        kind[first != np.arange(self.num_documents, dtype=np.int32)] = EXACT
        signatures = self._map("signatures", np.uint16).reshape(-1, PLACES)
        for band in range(self._bands):
            for a, b in self._pairs(f"band-{band}", kind):
                apart = first[a] != first[b]
                a, b = a[apart], b[apart]
                self.compared += len(a)
                near = (signatures[a] == signatures[b]).mean(axis=1) >= self._threshold
                _join(first, a[near], b[near])
            _settle(first)
        moved = first != np.arange(self.num_documents, dtype=np.int32)
        kind[moved & (kind == UNIQUE)] = NEAR
        return Verdicts(first, kind)

    def similarity(self, a: int, b: int) -> float:
        """Estimated Jaccard similarity of two documents."""
        signatures = self._map("signatures", np.uint16).reshape(-1, PLACES)
        return float((signatures[a] == signatures[b]).mean())

    def text_hash(self, start: int, end: int) -> np.ndarray:
        """Low halves of the text hashes of documents [start, end), uint64."""
        return np.array(self._map("low", np.uint64)[start:end])

    def _map(self, name: str, dtype: Any) -> np.ndarray:
        return np.memmap(self._folder / name, dtype=dtype, mode="r")

    def _pairs(self, name: str, kind: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs (earlier, later) of documents with the same key, exact repeats left out.

        Of a run of equal keys every document is paired with the first and with the one before it.
        """
        column = self._map(name, np.uint64)
        parts = -(-self.num_documents * SORT_BYTES // self._memory)
        for part in range(parts):
            if parts == 1:
                chosen = np.flatnonzero(kind != EXACT).astype(np.int32)
            else:
                chosen = _in_part(column, kind, part, parts)
            keys = column[chosen]
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            repeat = np.flatnonzero(keys[1:] == keys[:-1]) + 1  # not the first of their run
            starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
            firsts = starts[np.searchsorted(starts, repeat, side="right") - 1]
            for begin in range(0, len(repeat), PAIRS_AT_ONCE):
                cut = slice(begin, begin + PAIRS_AT_ONCE)
                later = chosen[order[repeat[cut]]]
                yield chosen[order[firsts[cut]]], later
                yield chosen[order[repeat[cut] - 1]], later


def _in_part(column: np.ndarray, kind: np.ndarray, part: int, parts: int) -> np.ndarray:
    """Documents whose key falls into one of `parts` equal parts, read in pieces; int32."""
    found = []
    for start in range(0, len(column), 1 << 20):
        keys = column[start : start + (1 << 20)]
        here = (keys % np.uint64(parts) == part) & (kind[start : start + (1 << 20)] != EXACT)
        found.append((np.flatnonzero(here) + start).astype(np.int32))
    return np.concatenate(found)


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
