"""What no neural network at all reaches on the same text, for scale: `xz` and a character trigram.

Both are given in bits per character of the documents' text, like the model's own figure.
"""

import lzma
import math
from collections.abc import Iterable, Sequence

import numpy as np

# code points that can stand in a text: all but the surrogates; independent of the Unicode version
SCALAR_VALUES = 0x110000 - 0x800


def xz_bits_per_character(texts: Sequence[str], primer: Sequence[str] = ()) -> float:
    """Size of the texts compressed by `xz -9e`, laid end to end, in bits per character.

    Args:
      texts: the documents to measure.
      primer: documents that the compressor has seen before, such as training text: counted is the
        growth from compress(primer) to compress(primer + texts). About 1 MB/s.
    """
    before, text = "".join(primer), "".join(texts)
    compressed = _xz_bytes(before + text) - (_xz_bytes(before) if before else 0)
    return 8 * compressed / len(text)


def _xz_bytes(text: str) -> int:
    return len(lzma.compress(text.encode("utf-8", "replace"), preset=9 | lzma.PRESET_EXTREME))


class CharacterTrigram:
    """P(c | a, b) by interpolation with the lower orders (Witten and Bell 1991; Chen and Goodman 1999, 2.3).

    With n(.) a count and t(.) the number of different characters seen after a context:

        P(c | a, b) = (n(abc) + t(ab) P(c | b)) / (n(ab) + t(ab))
        P(c | b)    = (n(bc)  + t(b)  P(c))     / (n(b)  + t(b))
        P(c)        = (n(c)   + t     / |U|)    / (n     + t)

    U is every character that can be written, so unseen ones have a probability too and the
    probabilities sum to 1. A context that was never seen hands over to the shorter one. Documents
    are independent; their ends are not predicted.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        codes, first = _code_points(texts)
        self._alphabet = np.unique(codes)
        self._size = len(self._alphabet) + 2  # and one for unseen, one for before the start
        a, b, c = self._contexts(codes, first)
        # one sort of all occurrences; the lower orders are sums over it
        keys, n = np.unique((a * self._size + b) * self._size + c, return_counts=True)
        self._orders = [_Counts(keys % self._size**order, n, self._size) for order in (1, 2, 3)]

    def bits_per_character(self, texts: Iterable[str]) -> float:
        """Mean -log2 P over all characters of the texts."""
        codes, first = _code_points(texts)
        if not len(codes):
            raise ValueError("no characters to measure")
        return -float(np.log(self._probabilities(codes, first)).mean()) / math.log(2)

    def probability(self, before: str, character: str) -> float:
        """P(character | the last two characters of `before`); "" is the start of a document."""
        codes, first = _code_points([before + character])
        return float(self._probabilities(codes, first)[-1])

    def _probabilities(self, codes: np.ndarray, first: np.ndarray) -> np.ndarray:
        a, b, c = self._contexts(codes, first)
        p = np.full(len(c), 1 / SCALAR_VALUES)
        for counts, context in zip(
            self._orders, (np.zeros_like(c), b, a * self._size + b), strict=True
        ):
            p = counts.interpolate(context, c, p)
        return p

    def _contexts(
        self, codes: np.ndarray, first: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Dense symbols of the two characters before each one, and of itself, int64."""
        unseen, start = len(self._alphabet), len(self._alphabet) + 1
        at = np.minimum(np.searchsorted(self._alphabet, codes), max(unseen - 1, 0))
        c = np.where(self._alphabet[at] == codes, at, unseen) if unseen else np.full(len(codes), 0)
        b = np.where(first, start, np.roll(c, 1))
        a = np.where(first, start, np.roll(b, 1))
        return a.astype(np.int64), b.astype(np.int64), c.astype(np.int64)


class _Counts:
    """n and t of the contexts of one order, looked up for many contexts at once."""

    def __init__(self, keys: np.ndarray, n: np.ndarray, size: int) -> None:
        """`keys` are context * size + character; equal ones add up."""
        self._size = size
        self._pairs, inverse = np.unique(keys, return_inverse=True)
        self._n = np.bincount(inverse, weights=n).astype(np.int64)  # exact below 2^53
        owners = self._pairs // size
        self._contexts, begins, self._t = np.unique(owners, return_index=True, return_counts=True)
        self._totals = np.add.reduceat(self._n, begins) if len(begins) else self._n

    def interpolate(self, context: np.ndarray, c: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """(n(context, c) + t(context) lower) / (n(context) + t(context)); `lower` where unseen."""
        n = _look_up(self._pairs, self._n, context * self._size + c)
        total = _look_up(self._contexts, self._totals, context)
        t = _look_up(self._contexts, self._t, context)
        return np.where(total > 0, (n + t * lower) / np.maximum(total + t, 1), lower)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values of the sorted `keys` at `wanted`; 0 where a key is missing."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def _code_points(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """All characters of the texts as numbers, and True at the first of each text."""
    kept = [text for text in texts if text]
    codes = np.frombuffer("".join(kept).encode("utf-32-le", "replace"), np.uint32).astype(np.int64)
    first = np.zeros(len(codes), bool)
    if kept:
        first[np.cumsum([0, *map(len, kept[:-1])])] = True
    return codes, first
