"""Texts that say the same thing over and over: repeated lines, repeated phrases.

After Gopher (Rae et al. 2021, table A1) and FineWeb-2's Mandarin limits, with n-grams of characters
instead of words, so that one definition serves languages with and without spaces.
"""

from dataclasses import dataclass

import numpy as np

from llm_jax.data.characters import Kind
from llm_jax.data.clean.page import Page, Rejection

MIX = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd: Fibonacci hashing
MAX_CHARACTERS = 20_000  # looked at; what repeats in a book repeats in its first 20,000
WORDLIKE = np.isin(
    np.arange(len(Kind)),
    (
        Kind.DIGIT,
        Kind.LATIN,
        Kind.HAN,
        Kind.HAN_FUNCTION,
        Kind.HAN_RARE,
        Kind.KANA,
        Kind.HANGUL,
        Kind.CYRILLIC,
        Kind.LETTER,
    ),
)

HAN = (Kind.HAN, Kind.HAN_FUNCTION, Kind.HAN_RARE)


@dataclass(frozen=True, kw_only=True)
class RepetitionConfig:
    """Limits; shares of letters and digits, or of characters for lines."""

    max_line_share: float = (
        0.3  # characters in lines that came before; Gopher: 0.2, FineWeb-2: 0.287
    )
    gram: int = 20  # characters; about ten words of Chinese, four of English
    max_gram_share: float = 0.45  # characters in n-grams that came before; API pages reach 0.4
    max_top_share: float = 0.2  # characters in the most frequent n-gram of `top_gram`
    top_gram: int = 8
    # of the most frequent n-gram of `short_gram`, in Chinese, where a search phrase has four characters;
    # FineWeb-2's limit for two words is 0.256
    max_short_share: float = 0.2
    short_gram: int = 4
    min_characters: int = 80  # shorter texts are not judged


def repetition(page: Page, config: RepetitionConfig) -> Rejection | None:
    """A rejection naming the share that is too high, or None."""
    if page.visible < config.min_characters:
        return None
    share = duplicate_line_share(page.prose)
    if share > config.max_line_share:
        return Rejection("repeated lines", f"{share:.3f} > {config.max_line_share:g}")
    # letters and digits only: the rulers and bars of tables are no phrases
    codes_N = page.codes[:MAX_CHARACTERS][WORDLIKE[page.kinds[:MAX_CHARACTERS]]]
    share = _duplicate_share(codes_N, config.gram)
    if share > config.max_gram_share:
        return Rejection("repeated phrases", f"{share:.3f} > {config.max_gram_share:g}")
    share = _top_share(codes_N, config.top_gram)
    if share > config.max_top_share:
        return Rejection("one phrase", f"{share:.3f} > {config.max_top_share:g}")
    if page.language == "zh":
        # Han alone: the names of code repeat as they must
        han = np.isin(page.kinds[:MAX_CHARACTERS], HAN)
        share = _top_share(page.codes[:MAX_CHARACTERS][han], config.short_gram)
        if share > config.max_short_share:
            return Rejection("one phrase", f"{share:.3f} > {config.max_short_share:g}")
    return None


def duplicate_line_share(lines: list[str]) -> float:
    """Characters in lines that stood in the text before, of all."""
    unique = set(lines)
    if len(unique) == len(lines):
        return 0.0
    total = sum(map(len, lines))
    return 1 - sum(map(len, unique)) / max(1, total)


def _grams(codes_N: np.ndarray, width: int) -> np.ndarray:
    """Hash of every n-gram, uint32 [N - width + 1]; doubling makes it log2(width) passes."""
    hashes = (codes_N.astype(np.uint64) + np.uint64(1)) * MIX
    have, multiplier = 1, MIX
    while have < width:
        step = min(have, width - have)
        hashes = (hashes[:-step] * (multiplier | np.uint64(1))) ^ (hashes[step:] >> np.uint64(7))
        hashes *= MIX
        have += step
        multiplier = np.uint64((int(multiplier) * 0xD6E8FEB86659FD93) & 0xFFFFFFFFFFFFFFFF)
    # halves sort twice as fast; among 20,000 half a pair collides by chance
    return (hashes >> np.uint64(32)).astype(np.uint32)


def _duplicate_share(codes_N: np.ndarray, width: int) -> float:
    if len(codes_N) <= width:
        return 0.0
    hashes = np.sort(_grams(codes_N, width))
    return float(np.count_nonzero(hashes[1:] == hashes[:-1])) / len(hashes)


def _top_share(codes_N: np.ndarray, width: int) -> float:
    if len(codes_N) <= width:
        return 0.0
    hashes = np.sort(_grams(codes_N, width))
    edges = np.flatnonzero(hashes[1:] != hashes[:-1])
    runs = np.diff(np.concatenate([[-1], edges, [len(hashes) - 1]]))
    top = int(runs.max())
    return min(1.0, top * width / len(codes_N)) if top > 2 else 0.0
