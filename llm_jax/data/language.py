"""Which language a text is in, told from the scripts of its letters.

For Chinese and English this is faster than a model, and it explains itself: shares of scripts first,
then, inside Latin, the share of words that English cannot do without.
"""

from typing import NamedTuple

import numpy as np

from llm_jax.data.characters import Kind, codes, counts

UNDETERMINED = "und"  # ISO 639-2: no letters to tell by
# A Latin letter counts a third of a Han character: an English word of five letters takes 1.7 in Chinese.
LATIN_LETTERS_PER_HAN = 3.0
HAN_SHARE = (
    0.12  # Chinese manuals full of code go down to 0.15; English that quotes Chinese, below 0.05
)
KANA_SHARE = (
    0.05  # of Han and kana: Japanese has at least a quarter; Chinese quotes a の now and then
)
SCRIPT_SHARE = 0.3  # of all letters
ENGLISH_SHARE = 0.03  # of the words; prose has 0.25 and more, API lists 0.05
WORDS = (
    "the of and to in is for that it as with on this are be or by from at an was not you can if which "
    "have will has when all but we use used their they were one there your more no any other"
)
ENGLISH_WORDS = frozenset(WORDS.split())
MAX_WORDS = 600  # looked at; a longer text has told its language by then


class Verdict(NamedTuple):
    """A language and what spoke for it."""

    language: str  # ISO 639 code; "latin" for a Latin script that is not English; "und"
    shares: dict[str, float]  # script -> share of the letters, Latin ones weighed as above


def identify(text: str, counts_K: np.ndarray | None = None) -> Verdict:
    """The language of `text`; `counts_K` are `characters.counts` of it, where they are known."""
    counts_K = counts(codes(text)) if counts_K is None else counts_K
    letters = {
        "Han": float(counts_K[[Kind.HAN, Kind.HAN_FUNCTION, Kind.HAN_RARE]].sum()),
        "Kana": float(counts_K[Kind.KANA]),
        "Hangul": float(counts_K[Kind.HANGUL]),
        "Latin": float(counts_K[Kind.LATIN] + counts_K[Kind.WIDE]) / LATIN_LETTERS_PER_HAN,
        "Cyrillic": float(counts_K[Kind.CYRILLIC]) / LATIN_LETTERS_PER_HAN,
        "other": float(counts_K[Kind.LETTER]) / LATIN_LETTERS_PER_HAN,
    }
    total = sum(letters.values())
    if total == 0:
        return Verdict(UNDETERMINED, {})
    shares = {script: count / total for script, count in letters.items() if count}
    return Verdict(_decide(text, letters, shares), shares)


def _decide(text: str, letters: dict[str, float], shares: dict[str, float]) -> str:
    han_and_kana = letters["Han"] + letters["Kana"]
    if letters["Kana"] > KANA_SHARE * han_and_kana and shares["Kana"] > HAN_SHARE:
        return "ja"
    for script, language in (("Hangul", "ko"), ("Cyrillic", "ru"), ("other", UNDETERMINED)):
        if shares.get(script, 0.0) >= SCRIPT_SHARE:
            return language
    if shares.get("Han", 0.0) >= HAN_SHARE:
        return "zh"
    return "en" if english_share(text) >= ENGLISH_SHARE else "latin"


def english_share(text: str) -> float:
    """Share of a text's words that are among the commonest of English; 0 without words."""
    words = text[: 8 * MAX_WORDS].lower().split(maxsplit=MAX_WORDS)[:MAX_WORDS]
    words = [word for word in words if word[0].isalpha()]
    return sum(map(ENGLISH_WORDS.__contains__, words)) / max(1, len(words))
