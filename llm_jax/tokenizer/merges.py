"""Learning merges on top of a base: incremental pair counts over unique runs, in numpy.

The text is a flat array of symbols, a linked list of runs with -1 between them. For every pair that
may be merged there are its weighted count and the places where it was seen; a heap gives the pair
that saves most tokens. One merge touches only the places of its pair and their neighbours, all at
once, so that 6,000 merges on 10 MB of Chinese take seconds where a loop over symbols takes minutes
(the algorithm of Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, with lazy deletion).

Two encoders, two rules of what a merge is:
- by pair (byte-level BPE): a merge is (left, right); a text that is a piece already is not made again.
- by text (SentencePiece): any two neighbours that together spell a piece are merged, so all pairs of
  equal text are one candidate, and one that spells an existing piece is merged at once.

Equal gains are decided by the bytes of the piece: the result is a function of the runs alone.
"""

import heapq
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

SEPARATOR = -1
_DEAD = -2


class Runs(NamedTuple):
    """Unique runs of symbols: `symbols` is flat, with SEPARATOR first, last and between runs."""

    symbols: np.ndarray  # int32 [N]
    weights: np.ndarray  # int64 [N]: how often the run at this place occurs


class Made(NamedTuple):
    """One new piece: its bytes, the pieces it was joined from, the tokens it saved when chosen."""

    piece: bytes
    pair: tuple[bytes, bytes] | None  # None: a character that had no piece
    saved: int


def gather(flat: np.ndarray) -> Runs:
    """Unique runs in `flat`, which SEPARATOR divides. Single symbols stay: they may be uncovered.

    Runs keep the order of their first occurrence.
    """
    flat = np.concatenate([[SEPARATOR], flat, [SEPARATOR]]).astype(np.int32)
    inside = flat != SEPARATOR
    starts = np.flatnonzero(inside[1:] & ~inside[:-1]) + 1
    ends = np.flatnonzero(inside[:-1] & ~inside[1:]) + 1
    counts: dict[bytes, int] = {}
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        run = flat[start:end].tobytes()
        counts[run] = counts.get(run, 0) + 1
    lengths = np.fromiter((len(run) // 4 for run in counts), np.int64, len(counts))
    weights = np.fromiter(counts.values(), np.int64, len(counts))
    symbols = np.full(int(lengths.sum()) + len(counts) + 1, SEPARATOR, np.int32)
    separators = np.cumsum(np.concatenate([[0], lengths + 1]))
    inside = np.ones(len(symbols), bool)
    inside[separators] = False
    symbols[inside] = np.frombuffer(b"".join(counts), np.int32)
    return Runs(symbols, np.concatenate([[0], np.repeat(weights, lengths + 1)]))


def _always(left: bytes, right: bytes) -> bool:
    del left, right
    return True


class MergeLearner:
    """Greedy merges over `runs`, most saved tokens first."""

    def __init__(
        self,
        runs: Runs,
        pieces: Mapping[int, bytes],
        allowed: Callable[[bytes], bool],
        *,
        known: Mapping[bytes, int],
        by_text: bool,
        uncovered: Mapping[int, int] | None = None,
    ):
        """Counts every pair.

        Args:
          runs: the text.
          pieces: bytes of every symbol in it.
          allowed: whether a text may be a new piece.
          known: the pieces there are already, as text -> symbol.
          by_text: the rule of SentencePiece, see above.
          uncovered: symbol -> tokens, for characters without a piece of their own, which cost that
            many tokens and cannot be merged before they get one.
        """
        self._symbol, self._weight = runs.symbols.copy(), runs.weights
        size = len(self._symbol)
        self._next = np.arange(1, size + 1, dtype=np.int32)
        self._before = np.arange(-1, size - 1, dtype=np.int32)
        self._key = np.zeros(size, np.int32)  # of the pair that starts here; 0: none
        self._pieces, self._known = dict(pieces), dict(known)
        self._allowed, self._by_text = allowed, by_text
        self._key_of_pair: dict[int, int] = {}
        self._key_of_text: dict[bytes, int] = {}
        self._texts: list[bytes] = [b""]
        self._pairs: list[tuple[int, int]] = [(0, 0)]  # the first pair seen with the key
        self._counts: list[int] = [0]
        self._places: list[list[np.ndarray]] = [[]]
        self._heap: list[tuple[int, bytes, int]] = []
        self._uncovered = dict(uncovered or {})
        self._new_symbol = max(self._pieces, default=-1) + 1
        self._queue_uncovered()
        self._count_pairs(np.flatnonzero(self._symbol[:-1] >= 0))

    def _queue_uncovered(self) -> None:
        places: dict[int, np.ndarray] = {}
        if self._uncovered:
            found = np.flatnonzero(
                np.isin(self._symbol, np.fromiter(self._uncovered, np.int32, len(self._uncovered)))
            )
            found = found[np.argsort(self._symbol[found], kind="stable")]
            symbols, firsts = np.unique(self._symbol[found], return_index=True)
            for symbol, part in zip(symbols.tolist(), np.split(found, firsts[1:]), strict=True):
                places[symbol] = part
        self._places_uncovered = places
        for symbol, tokens in self._uncovered.items():
            if symbol in places and self._allowed(self._pieces[symbol]):
                saved = (tokens - 1) * int(self._weight[places[symbol]].sum())
                heapq.heappush(self._heap, (-saved, self._pieces[symbol], -symbol - 1))

    def next(
        self, min_saved: int = 1, reaches: Callable[[bytes, bytes], bool] = _always
    ) -> Made | None:
        """Makes the piece that saves most, or returns None when none saves `min_saved` tokens.

        `reaches` is asked about the two halves of a candidate; one that is refused is not made.
        """
        while self._heap:
            minus, text, key = heapq.heappop(self._heap)
            if key < 0:
                if -minus < min_saved:
                    continue
                self._cover(-key - 1)
                return Made(text, None, -minus)
            count = self._counts[key]
            if text in self._known:
                if self._by_text and count:
                    self._merge(key, self._known[text])
                continue
            if count != -minus:  # went down since it was put here; went up: it is here twice
                if 0 < count < -minus:
                    heapq.heappush(self._heap, (-count, text, key))
                continue
            if count < min_saved:
                return None
            left, right = self._pairs[key]
            pair = self._pieces[left], self._pieces[right]
            if not reaches(*pair):
                continue
            symbol = self._new_symbol
            self._new_symbol += 1
            self._pieces[symbol], self._known[text] = text, symbol
            self._merge(key, symbol)
            return Made(text, pair, count)
        return None

    def counts(self) -> dict[bytes, int]:
        """Occurrences of every piece in the text as it is now."""
        alive = self._symbol >= 0
        totals = np.bincount(self._symbol[alive], self._weight[alive])
        found = np.flatnonzero(totals).tolist()
        return {self._pieces[symbol]: int(totals[symbol]) for symbol in found}

    def _cover(self, symbol: int) -> None:
        """The character of `symbol` gets its piece: its pairs now count."""
        del self._uncovered[symbol]
        self._known[self._pieces[symbol]] = symbol
        places = self._places_uncovered[symbol]
        self._count_pairs(np.unique(np.concatenate([self._before[places], places])))

    def _merge(self, key: int, symbol: int) -> None:
        """Joins every occurrence of the pair, leftmost first where two overlap."""
        at = np.unique(np.concatenate(self._places[key]))
        self._places[key] = []
        at = at[self._key[at] == key]
        at = at[_leftmost(self._next[at][:-1] == at[1:])] if len(at) else at
        right = self._next[at]
        touched = np.unique(np.concatenate([self._before[at], at, right]))
        self._discount(touched)
        after = self._next[right]
        self._symbol[at], self._symbol[right] = symbol, _DEAD
        self._next[at], self._before[after] = after, at
        self._key[touched] = 0
        self._count_pairs(np.unique(np.concatenate([self._before[at], at])))

    def _discount(self, places: np.ndarray) -> None:
        keys, inverse = np.unique(self._key[places], return_inverse=True)
        weights = np.bincount(inverse, self._weight[places])
        for key, weight in zip(keys.tolist(), weights.tolist(), strict=True):
            if key:
                self._counts[key] -= int(weight)

    def _count_pairs(self, places: np.ndarray) -> None:
        """Gives the pairs that start at `places`, which have no key, their keys; counts and queues them."""
        left = self._symbol[places].astype(np.int64)
        right = self._symbol[self._next[places]]
        real = (left >= 0) & (right >= 0)
        places = places[real]
        pairs, inverse = np.unique(left[real] << 32 | right[real], return_inverse=True)
        if not len(pairs):
            return
        keys = [self._find_key(pair) for pair in pairs.tolist()]
        self._key[places] = np.asarray(keys, np.int32)[inverse]
        weights = np.bincount(inverse, self._weight[places]).tolist()
        order = places[np.argsort(inverse, kind="stable")]
        ends = np.cumsum(np.bincount(inverse)).tolist()
        start, changed = 0, set()
        for key, weight, end in zip(keys, weights, ends, strict=True):
            if key:
                self._places[key].append(order[start:end])
                self._counts[key] += int(weight)
                changed.add(key)
            start = end
        for key in changed:
            text = self._texts[key]
            # what spells a piece already goes first, before anything is chosen
            saved = 1 << 62 if self._by_text and text in self._known else self._counts[key]
            heapq.heappush(self._heap, (-saved, text, key))

    def _find_key(self, pair: int) -> int:
        """The key of a pair of symbols: 0 when it may not be merged."""
        key = self._key_of_pair.get(pair)
        if key is not None:
            return key
        left, right = pair >> 32, pair & 0xFFFFFFFF
        if left in self._uncovered or right in self._uncovered:
            return 0  # not remembered: it changes when they are covered
        text = self._pieces[left] + self._pieces[right]
        key = self._key_of_text.get(text, 0) if self._by_text else 0
        known = text in self._known
        if not key and (self._by_text if known else self._allowed(text)):
            key = len(self._texts)
            self._texts.append(text)
            self._pairs.append((left, right))
            self._counts.append(0)
            self._places.append([])
            if self._by_text:
                self._key_of_text[text] = key
        self._key_of_pair[pair] = key
        return key


def _leftmost(chained: np.ndarray) -> np.ndarray:
    """Mask of the places to merge: in a chain of overlapping ones, every second from its first.

    Args:
      chained: bool [n - 1]: whether place i + 1 is the right half of place i.
    """
    count = len(chained) + 1
    starts = np.concatenate([[0], np.where(chained, 0, np.arange(1, count))])
    return (np.arange(count) - np.maximum.accumulate(starts)) % 2 == 0
