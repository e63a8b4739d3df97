"""The order of sources: which one row k comes from, and how many of its rows came before.

A schedule is a list of pieces. Within a piece the shares are fixed and the sources are spread evenly;
at its end the schedule knows how many rows of each source were taken, and how far each is behind or
ahead of its share, in closed form. So any row is random access, the rows of a source go on across a
boundary with no skip and no repeat, and errors of rounding do not add up over boundaries. What comes
before a row never depends on what comes after it: a phase can be added to a run that has begun.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

PERIOD = (
    1 << 16
)  # rows after which the order of the sources repeats; shares are exact to 1 / PERIOD
# a ramp is stairs: within 0.05 % of the straight line, and within two rows where it is short
RAMP_STAIRS = 1024
LEAST_STAIR = 16  # rows


@dataclass(frozen=True)
class Interleave:
    """A fixed order of sources with exact shares, evenly spread.

    A period of rows holds `counts[s]` rows of source s, the i-th at the ideal place
    (i + 1/2 - owed[s]) / counts[s] of the period. So in any window the rows of a source are within
    two of its share, for two sources, and the error grows with the number of sources, never with the
    window.
    """

    counts: tuple[int, ...]
    owed: tuple[float, ...]  # rows that each source is behind at the start, at most 1/2

    @classmethod
    def of(cls, row_shares: np.ndarray, owed: np.ndarray | None = None) -> "Interleave":
        """An endless order.

        Args:
          row_shares: [sources] non-negative, not all 0; need not add up to 1.
          owed: [sources] rows that each source is behind.
        """
        counts = whole_parts(row_shares / row_shares.sum() * PERIOD, PERIOD, keep_all=True)
        counts //= max(1, int(np.gcd.reduce(counts)))  # one source: a period of one row
        behind = np.zeros(len(counts)) if owed is None else np.clip(owed, -0.5, 0.5)
        return cls(tuple(counts.tolist()), tuple(np.where(counts > 0, behind, 0.0).tolist()))

    @property
    def period(self) -> int:
        """Rows after which the order repeats."""
        return sum(self.counts)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number of earlier rows of that source) of each row; int64."""
        order, rank = _order(self.counts, self.owed)
        periods, place = np.divmod(np.asarray(rows, dtype=np.int64), self.period)
        source = order[place].astype(np.int64)
        return source, periods * np.array(self.counts)[source] + rank[place]

    def rows_before(self, row: int) -> np.ndarray:
        """Rows of each source among the first `row` rows; int64 [sources]."""
        periods, place = divmod(int(row), self.period)
        whole = periods * np.array(self.counts, dtype=np.int64)
        if not place:
            return whole
        order, _ = _order(self.counts, self.owed)
        return whole + np.bincount(order[:place], minlength=len(self.counts))


@functools.lru_cache(maxsize=64)  # 512 KB each at most; a batch needs one or two
def _order(counts: tuple[int, ...], owed: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(source, rank among the rows of that source) of every place of a period; int32."""
    amount = np.array(counts)
    source = np.repeat(np.arange(len(counts)), amount)
    rank = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((rank + 0.5 - np.array(owed)[source]) / amount[source], kind="stable")
    return source[order].astype(np.int32), rank[order].astype(np.int32)


def whole_parts(exact: np.ndarray, total: int, *, keep_all: bool) -> np.ndarray:
    """Whole numbers near `exact` that add up to `total`, by largest remainder; int64.

    Args:
      exact: [parts] that add up to about `total`; what is not positive gets 0.
      total: the sum.
      keep_all: positive parts get at least 1.
    """
    counts = np.floor(np.maximum(exact, 0)).astype(np.int64)
    least = int(keep_all)
    counts[(exact > 0) & (counts < least)] = least
    while (missing := total - int(counts.sum())) != 0:
        # ties go to the earlier source, so the result is the same everywhere
        step = 1 if missing > 0 else -1
        error = np.where((counts > least) | (step > 0), step * (exact - counts), -np.inf)
        error[exact <= 0] = -np.inf
        counts[int(np.argmax(error))] += step
    return counts


@dataclass(frozen=True)
class Stretch:
    """Token shares from a row on."""

    from_row: int
    shares: np.ndarray  # [sources], not negative
    ramp_rows: int = 0  # the shares before it turn into these in a straight line over so many rows


class _Line(NamedTuple):
    """Shares that go from one value to another, and stay there."""

    from_row: int
    rows: int
    first: np.ndarray
    last: np.ndarray

    def at(self, row: float) -> np.ndarray:
        part = min(1.0, (row - self.from_row) / self.rows) if self.rows else 1.0
        return self.first + (self.last - self.first) * part


class Piece(NamedTuple):
    """Rows of one fixed order, up to where the next piece begins."""

    from_row: int
    interleave: Interleave
    before: np.ndarray  # rows of each source before `from_row`, int64 [sources]
    shares: np.ndarray  # of the tokens, [sources], adding up to 1


class Schedule:
    """The order of sources of a whole run."""

    def __init__(self, stretches: Sequence[Stretch], tokens_per_row: np.ndarray) -> None:
        """Lays out the pieces.

        Args:
          stretches: in order; the first starts at row 0, without a ramp.
          tokens_per_row: [sources] mean tokens in a row of each source.
        """
        self._per_row = tokens_per_row
        self._owed = np.zeros(len(tokens_per_row))
        self._ideal = self._owed  # shares of the rows of the last piece
        self._line = _Line(0, 0, self._owed, self._owed)
        self.pieces: list[Piece] = []
        for number, stretch in enumerate(stretches):
            last = number + 1 == len(stretches)
            self._lay(stretch, None if last else stretches[number + 1].from_row)
        self._starts = np.array([piece.from_row for piece in self.pieces])

    def _lay(self, stretch: Stretch, end: int | None) -> None:
        start, total = stretch.from_row, stretch.ramp_rows
        target = stretch.shares / stretch.shares.sum()
        line = _Line(start, total, self._line.at(start) if total else target, target)
        stair = min(PERIOD, max(LEAST_STAIR, -(-total // RAMP_STAIRS)))
        for begin in range(start, start + total, stair):
            if end is not None and begin >= end:
                break
            length = min(stair, start + total - begin)
            self._add_stair(begin, line.at(begin + length / 2), length)
        if end is None or start + total < end:
            before = self._settle(start + total)
            order = Interleave.of(target / self._per_row, self._owed)
            self._ideal = np.array(order.counts) / order.period
            self.pieces.append(Piece(start + total, order, before, target))
        self._line = line

    def _add_stair(self, from_row: int, shares: np.ndarray, length: int) -> None:
        """A piece of exactly `length` rows, which pays what is owed by its counts."""
        before = self._settle(from_row)
        self._ideal = shares / self._per_row
        self._ideal = self._ideal / self._ideal.sum()
        wanted = np.where(self._ideal > 0, self._ideal * length + self._owed, 0.0)
        counts = whole_parts(wanted, length, keep_all=False)
        order = Interleave(tuple(counts.tolist()), (0.0,) * len(counts))
        self.pieces.append(Piece(from_row, order, before, shares))

    def _settle(self, row: int) -> np.ndarray:
        """Ends the last piece at `row`: rows taken of each source, and what is owed to whom."""
        if not self.pieces:
            return np.zeros(len(self._per_row), dtype=np.int64)
        piece = self.pieces[-1]
        length = row - piece.from_row
        taken = piece.interleave.rows_before(length)
        self._owed = np.where(self._ideal > 0, self._owed + self._ideal * length - taken, 0.0)
        return piece.before + taken

    def piece_of(self, row: int) -> Piece:
        """The piece that `row` lies in."""
        return self.pieces[int(np.searchsorted(self._starts, row, side="right")) - 1]

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number of earlier rows of that source) of each row; int64."""
        rows = np.asarray(rows, dtype=np.int64)
        source, number = np.empty_like(rows), np.empty_like(rows)
        places = np.searchsorted(self._starts, rows, side="right") - 1
        for place in np.unique(places):
            here, piece = places == place, self.pieces[place]
            source[here], number[here] = piece.interleave.locate(rows[here] - piece.from_row)
            number[here] += piece.before[source[here]]
        return source, number

    def rows_before(self, row: int) -> np.ndarray:
        """Rows of each source among the first `row` rows; int64 [sources]."""
        piece = self.piece_of(row)
        return piece.before + piece.interleave.rows_before(row - piece.from_row)
