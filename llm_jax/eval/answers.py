"""How like a reference an answer is: exact match and ROUGE-L, in Chinese and English alike.

ROUGE-L (Lin 2004, https://aclanthology.org/W04-1013) is the F1 of the longest common subsequence. Its
units here are words of scripts that put spaces between them, and single characters of those that do not;
the usual package drops everything but a-z and 0-9, so that equal Chinese answers score 0 there.
"""

import re
import unicodedata

from rapidfuzz.distance import LCSseq

# Han, kana, Hangul syllables, Thai: written without spaces; then words with their marks and digits
_UNIT = re.compile(
    r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u3040-\u30ff\uac00-\ud7af\u0e00-\u0e7f]"
    r"|[^\W_\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u3040-\u30ff\uac00-\ud7af\u0e00-\u0e7f]+"
)


def normalised(text: str) -> str:
    """The text without differences of width, case and spacing."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def units(text: str) -> list[str]:
    """Words and characters that ROUGE-L compares; of a text without any, all its characters but spaces."""
    plain = normalised(text)
    return _UNIT.findall(plain) or list(plain.replace(" ", ""))


def exact_match(answer: str, reference: str) -> bool:
    """Whether two texts are the same but for width, case and spacing."""
    return normalised(answer) == normalised(reference)


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence, from 0 to 1; of two texts without content 1 if both are empty."""
    ours, theirs = units(answer), units(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * LCSseq.similarity(ours, theirs) / (len(ours) + len(theirs))
