"""How like an instruction is to those there already: ROUGE-L over words (English) or characters (Chinese).

`Pool.nearest` finds the highest score against the whole pool without computing most of them. Two texts
have at most as many tokens in common, in order, as they share at all, and an inverted index counts those for
the whole pool at once. Only pairs whose score could reach the best one found so far are computed, so the
result is that of computing all of them.
"""

from array import array
from typing import NamedTuple

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from llm_jax.data import rouge
from llm_jax.errors import DataError

FIRST_SURROGATE, NUM_SURROGATES = 0xD800, 0x800
MAX_TOKENS = (
    0x110000 - NUM_SURROGATES
)  # distinct ones: rapidfuzz compares strings, a token a character
GUESS = 0.8  # pairs with a bound of this share of the highest one are computed first
SLACK = 1e-9  # bounds are rounded otherwise than scores, by 1e-16


class Nearest(NamedTuple):
    """The text of a pool that is most like another one."""

    score: float  # ROUGE-L, 0 to 1; 0 for an empty pool
    row: int  # the first with that score, in the order of adding; -1 for an empty pool


def tokens(text: str, language: str) -> list[str]:
    """The tokens that ROUGE-L compares: those of `rouge-score` for "en", characters for "zh"."""
    return rouge.words(text) if language == "en" else rouge.units(text)


def rouge_l(one: str, other: str, language: str) -> float:
    """ROUGE-L of two texts, 0 to 1."""
    return rouge.rouge_l(tokens(one, language), tokens(other, language))


class Pool:
    """Texts of one language, to find the nearest of. Grows by `add`."""

    def __init__(self, language: str) -> None:
        """`language` is "en" or "zh"; it chooses the tokens."""
        self.language = language
        self._ids: dict[str, int] = {}
        self._texts: list[str] = []  # a character stands for a token
        self._lengths = array("i")
        # (token, how often it came before in its text) -> the texts that hold it, in order: what two
        # texts share is then a set, repeated tokens included
        self._rows: dict[tuple[str, int], array[int]] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        """Puts one more text into the pool."""
        encoded = self._encode(text)
        for token in _numbered(encoded):
            self._rows.setdefault(token, array("i")).append(len(self._texts))
        self._texts.append(encoded)
        self._lengths.append(len(encoded))

    def nearest(self, text: str) -> Nearest:
        """The highest ROUGE-L of `text` to a text of the pool, and which one it is."""
        if not self._texts:
            return Nearest(0.0, -1)
        encoded = self._encode(text)
        lengths_N = np.array(self._lengths, np.int32)
        bounds_N = self._bounds(encoded, lengths_N)
        first = self._best_of(encoded, bounds_N >= GUESS * bounds_N.max(), lengths_N)
        # none of the others can reach the score found; equal ones stay, as they may stand before
        return self._best_of(encoded, bounds_N >= first.score - SLACK, lengths_N)

    def _best_of(self, encoded: str, chosen_N: np.ndarray, lengths_N: np.ndarray) -> Nearest:
        """The nearest of the chosen rows."""
        rows = np.flatnonzero(chosen_N)
        texts = [self._texts[row] for row in rows]
        scorer = LCSseq.similarity
        common = process.cdist([encoded], texts, scorer=scorer, dtype=np.int32, workers=1)[0]
        scores = rouge.f_measure(common, len(encoded), lengths_N[rows])
        best = int(scores.argmax())
        return Nearest(float(scores[best]), int(rows[best]))

    def _encode(self, text: str) -> str:
        ids = [self._ids.setdefault(token, len(self._ids)) for token in tokens(text, self.language)]
        if len(self._ids) > MAX_TOKENS:
            raise DataError(
                f"the pool of instructions has more than {MAX_TOKENS:,} different words, which is no language; "
                "look at what the generator writes"
            )
        return "".join(chr(id if id < FIRST_SURROGATE else id + NUM_SURROGATES) for id in ids)

    def _bounds(self, encoded: str, lengths_N: np.ndarray) -> np.ndarray:
        """What every text's score is at most, float64 [N]: the score if all shared tokens are in order."""
        found = [self._rows[token] for token in _numbered(encoded) if token in self._rows]
        if not found:
            return np.zeros(len(self._texts))
        shared_N = np.bincount(np.concatenate(found), minlength=len(self._texts))
        return 2 * shared_N / (lengths_N + len(encoded))


def _numbered(encoded: str) -> list[tuple[str, int]]:
    """Every token with how often it came before in this text."""
    seen: dict[str, int] = {}
    numbered = []
    for token in encoded:
        seen[token] = seen.get(token, -1) + 1
        numbered.append((token, seen[token]))
    return numbered
