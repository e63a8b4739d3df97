"""ROUGE-L, in Chinese and English alike: for answers beside references, and instructions beside each other.

ROUGE-L (Lin 2004, https://aclanthology.org/W04-1013) is the F1 of the longest common subsequence of two token lists.
The usual package, `rouge-score`, drops everything but a-z and 0-9, so that two equal Chinese texts score 0 there.
`words` are its tokens, and scores over them its figures to the last bit; `units` serve any language.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import LCSseq

WORD = re.compile("[a-z0-9]+")
# Han, kana, Hangul syllables, Thai: written without spaces
SINGLE = (
    "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\uac00-\ud7af"
    "\u0e00-\u0e7f"
)
# one of these, or a run of other letters with their marks and digits, such as Python or 2024
UNIT = re.compile(rf"[{SINGLE}]|[^\W_{SINGLE}]+")


def normalised(text: str) -> str:
    """The text without differences of width, case and spacing."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """Words of a-z and 0-9, as `rouge-score` has them without a stemmer."""
    return WORD.findall(text.lower())


def units(text: str) -> list[str]:
    """Words of scripts with spaces and characters of those without; of a text without any, all its characters but
    spaces.
    """
    plain = normalised(text)
    return UNIT.findall(plain) or list(plain.replace(" ", ""))


def f_measure(common: np.ndarray, length: int, lengths: np.ndarray) -> np.ndarray:
    """ROUGE-L of token lists with `common` tokens in common, float64; 0 where nothing is."""
    precision, recall = common / max(length, 1), common / np.maximum(lengths, 1)
    total = precision + recall
    # in this order of operations the result has the bits of rouge-score's
    return np.where(total > 0, 2 * precision * recall / np.where(total > 0, total, 1.0), 0.0)


def rouge_l(one: Sequence[str], other: Sequence[str]) -> float:
    """ROUGE-L of two token lists, 0 to 1."""
    common = np.array([LCSseq.similarity(one, other)])
    return float(f_measure(common, len(one), np.array([len(other)]))[0])
