"""Packing: which pieces of which documents make up each row of T tokens.

A document of n tokens gives n - 1 pairs: inputs tokens[0:n-1], targets tokens[1:n]. No pair spans
two documents and the final EOS is never an input. A piece is a run of pairs of one document; it becomes one
segment of a row with positions from 0. Both planners use every pair exactly once and are pure
functions of (document lengths, T, key), planned ahead so that any row is random access.

`concat`: pairs of all documents in a seeded order, cut every T. Rows are full except the last, but
  a document goes on in the next row as a new segment, without what came before.
`best_fit`: documents longer than T are cut into pieces of T; every rest and every shorter document
  stays whole and goes where it leaves the least room (best-fit decreasing; "Fewer Truncations
  Improve Language Modeling", Ding et al. 2024). Some per cent of padding instead of cut documents.
`whole`: the same, and a document longer than T is an error: for conversations, which make no sense
  without their beginning.
"""

import itertools
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from typing import Literal

import numpy as np

from llm_jax.data.permutation import permute
from llm_jax.errors import DataError

Packing = Literal["concat", "best_fit", "whole"]


class RowPlan(ABC):
    """The pieces of every row."""

    seq_len: int
    num_pairs: int

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(starts, counts) of the pieces of one row: token offsets in the split, pairs; int64."""

    @property
    def fill(self) -> float:
        """Share of row positions that hold a pair, between 0 and 1."""
        return self.num_pairs / max(1, len(self) * self.seq_len)


def plan_rows(document_starts: np.ndarray, seq_len: int, packing: Packing, key: str) -> RowPlan:
    """Plans the rows of one split.

    Args:
      document_starts: int64 [documents + 1] token offsets, as `Split.document_starts`.
      seq_len: T, pairs per row.
      packing: which planner.
      key: seeds the order of documents and rows.

    Raises:
      DataError: a document is longer than T and may not be cut.
    """
    starts = np.asarray(document_starts, dtype=np.int64)
    pairs = np.maximum(np.diff(starts) - 1, 0)
    if packing == "whole" and pairs.max(initial=0) > seq_len:
        raise DataError(
            f"data.packing='whole' cannot cut the longest document, of {pairs.max()} pairs; raise data.seq_len="
            f"{seq_len} to that, or prepare the data with --seq-len {seq_len}"
        )
    order = permute(np.arange(len(pairs)), max(1, len(pairs)), key + "/documents")
    order = order[pairs[order] > 0]
    planner = ConcatPlan if packing == "concat" else BestFitPlan
    return planner(starts[order], pairs[order], seq_len, key)


class ConcatPlan(RowPlan):
    """Row i holds pairs [i * T, (i + 1) * T) of all documents laid end to end."""

    def __init__(self, starts: np.ndarray, pairs: np.ndarray, seq_len: int, key: str) -> None:
        del key  # the order of the documents is all the chance there is
        self.seq_len = seq_len
        self.starts = starts  # first token of each document, in packing order
        self.ends = np.cumsum(pairs)  # pairs up to and including each document
        self.num_pairs = int(self.ends[-1]) if len(pairs) else 0

    def __len__(self) -> int:
        return -(-self.num_pairs // self.seq_len)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """See `RowPlan.row`."""
        begin = index * self.seq_len
        end = min(begin + self.seq_len, self.num_pairs)
        first = int(np.searchsorted(self.ends, begin, side="right"))
        last = int(np.searchsorted(self.ends, end, side="left"))
        ends = self.ends[first : last + 1]
        begins = np.concatenate([self.ends[first - 1 : first] if first else [0], ends[:-1]])
        inside = np.maximum(begin - begins, 0)  # pairs of the first document already used
        counts = np.minimum(ends, end) - begins - inside
        return self.starts[first : last + 1] + inside, counts


class BestFitPlan(RowPlan):
    """Rows of whole documents; the pieces of row i are [row_starts[i], row_starts[i + 1])."""

    def __init__(self, starts: np.ndarray, pairs: np.ndarray, seq_len: int, key: str) -> None:
        self.seq_len = seq_len
        self.num_pairs = int(pairs.sum())
        starts, pairs = _cut(starts, pairs, seq_len)
        descending = np.argsort(-pairs, kind="stable")
        starts, pairs = starts[descending], pairs[descending]
        bins, num_bins = best_fit_decreasing(pairs, seq_len)
        rows = permute(np.arange(num_bins), max(1, num_bins), key + "/rows")[bins]
        by_row = np.argsort(rows, kind="stable")
        self.piece_starts = starts[by_row]
        self.piece_counts = pairs[by_row].astype(np.int32)
        self.row_starts = np.searchsorted(rows[by_row], np.arange(num_bins + 1))

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """See `RowPlan.row`."""
        pieces = slice(self.row_starts[index], self.row_starts[index + 1])
        return self.piece_starts[pieces], self.piece_counts[pieces].astype(np.int64)


def _cut(starts: np.ndarray, pairs: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts documents of more than T pairs into pieces of T pairs and one rest."""
    pieces = -(-pairs // seq_len)
    owner = np.repeat(np.arange(len(pairs)), pieces)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    offset = number * seq_len
    return starts[owner] + offset, np.minimum(pairs[owner] - offset, seq_len)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Assigns items to bins: each goes to the fullest bin that still holds it, longest first.

    Items of equal length and bins of equal room are handled in bulk, so the work grows with the
    number of distinct lengths: ten million documents take seconds.

    Args:
      lengths: [items], descending, each between 1 and `capacity`.
      capacity: room of a bin.

    Returns:
      The bin of each item (int64), and the number of bins.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    rooms = _Rooms()
    num_bins = 0
    changes = np.flatnonzero(np.diff(lengths)) + 1
    edges = np.concatenate([[0], changes, [len(lengths)]]).tolist() if len(lengths) else []
    for item, stop in itertools.pairwise(edges):
        length = int(lengths[item])
        while item < stop:
            room, run = rooms.take(length)
            if not room:  # open as many new bins as the rest needs
                room, opened = capacity, -(-(stop - item) // (capacity // length))
                run = np.arange(num_bins, num_bins + opened)
                num_bins += opened
            # the fullest bin that fits stays the fullest that fits until it cannot take another
            each = room // length
            full = min(len(run), (stop - item) // each)
            bins[item : item + full * each] = np.repeat(run[:full], each)
            item += full * each
            rooms.put(room - each * length, run[:full])
            if full < len(run):  # fewer than `each` items are left for the next bin
                bins[item:stop] = run[full]
                rooms.put(room - (stop - item) * length, run[full : full + 1])
                rooms.put(room, run[full + 1 :])
                item = stop
    return bins, num_bins


class _Rooms:
    """Bins by the room they have left."""

    def __init__(self) -> None:
        self.sizes: list[int] = []  # sorted
        self.runs: dict[int, list[np.ndarray]] = {}  # size -> runs of bins

    def put(self, size: int, run: np.ndarray) -> None:
        """Gives back bins that have `size` left."""
        if size and len(run):
            if size not in self.runs:
                insort(self.sizes, size)
                self.runs[size] = []
            self.runs[size].append(run)

    def take(self, length: int) -> tuple[int, np.ndarray]:
        """(room, bins) of a run of the fullest bins that hold `length`; room 0 when none does."""
        place = bisect_left(self.sizes, length)
        if place == len(self.sizes):
            return 0, np.empty(0, dtype=np.int64)
        size = self.sizes[place]
        run = self.runs[size].pop()
        if not self.runs[size]:
            del self.runs[size], self.sizes[place]
        return size, run
