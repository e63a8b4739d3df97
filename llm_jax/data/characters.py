"""What kind of character each one is, looked up for a whole text at once.

`kinds(text)` is one table look-up per character (about 5 ns with the decoding); counts of kinds are what language,
quality and mojibake rules are made of. The sets of common Han characters come from the two national
standards as Python's codecs know them: GB 2312 level 1 (3,755 simplified) and Big5 level 1 (5,401
traditional), so no frequency list is shipped.
"""

import functools
import unicodedata
from enum import IntEnum

import numpy as np

TABLE_SIZE = 0x20001  # the BMP and the first supplementary plane; beyond lie rare Han only


class Kind(IntEnum):
    """Kinds of characters; every character has one."""

    SYMBOL = 0  # what is in none of the others
    SPACE = 1
    NEWLINE = 2
    DIGIT = 3
    LATIN = 4
    HAN = 5  # common
    HAN_FUNCTION = 6  # common, and such that no sentence does for long without one
    HAN_RARE = 7
    KANA = 8
    HANGUL = 9
    CYRILLIC = 10
    LETTER = 11  # of any other script
    STOP = 12  # ends a sentence: . ! ? 。！？…
    PUNCTUATION = 13
    CONTROL = 14  # C0 and C1 except tab and line feed
    INVISIBLE = 15  # zero width, direction marks, soft hyphens, byte order marks
    WIDE = 16  # full-width ASCII letters and digits
    PRIVATE = 17  # private use and unassigned
    REPLACEMENT = 18  # U+FFFD
    MARK = 19  # combining


# grammatical characters of modern Chinese in both scripts: a quarter to a third of the Han characters of
# prose and manuals, at least 0.19 of 95 % of them, 0.09 of Tang poems (measured on ../shared/corpus)
FUNCTION_CHARACTERS = frozenset(
    "的一是了不在有和这這个個我他她们們你它以为為到就也都而及与與或等可能会會要从從对對将將把被让讓"
    "上下中之其所于於者如若则則但并並且因此由使用时時后後来來那没沒还還去过過得地着著很最更已只又"
)
STOPS = frozenset(".!?。！？…．")
INVISIBLE = frozenset(
    "\u00ad\u034f\u061c\u180e\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2061\u2062"
    "\u2063\u2064\u206a\u206b\u206c\u206d\u206e\u206f\ufeff"
)  # not U+200C and U+200D: Persian, Indic scripts and emoji are spelled with them
SCRIPTS = (
    ("CJK ", Kind.HAN_RARE),
    ("HIRAGANA", Kind.KANA),
    ("KATAKANA", Kind.KANA),
    ("HANGUL", Kind.HANGUL),
    ("LATIN", Kind.LATIN),
    ("CYRILLIC", Kind.CYRILLIC),
)


def codes(text: str) -> np.ndarray:
    """Code points of a text, uint32 [len(text)]. A lone surrogate is passed through."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def kinds(codes_N: np.ndarray) -> np.ndarray:
    """The `Kind` of each code point, uint8 [N]."""
    return kind_table()[np.minimum(codes_N, TABLE_SIZE - 1)]


def counts(codes_N: np.ndarray) -> np.ndarray:
    """How many characters of each kind, int64 [len(Kind)]."""
    return np.bincount(kinds(codes_N), minlength=len(Kind))


@functools.cache
def kind_table() -> np.ndarray:
    """uint8 [TABLE_SIZE]; the last entry stands for every code point from there on."""
    table = np.array([_kind(chr(code)) for code in range(TABLE_SIZE)], dtype=np.uint8)
    common = np.array([ord(character) for character in common_han()])
    table[common] = Kind.HAN
    table[[ord(character) for character in FUNCTION_CHARACTERS]] = Kind.HAN_FUNCTION
    return table


@functools.cache
def common_han() -> frozenset[str]:
    """Level 1 of GB 2312 and of Big5."""
    simplified = _decoded("gb2312", range(0xB0, 0xD8), range(0xA1, 0xFF))
    second = [*range(0x40, 0x7F), *range(0xA1, 0xFF)]
    traditional = _decoded("big5", range(0xA4, 0xC7), second)
    return frozenset(simplified + traditional)


def _decoded(codec: str, firsts: range, seconds: range | list[int]) -> str:
    pairs = (bytes((first, second)) for first in firsts for second in seconds)
    text = "".join(pair.decode(codec, "ignore") for pair in pairs)
    return "".join(character for character in text if "\u4e00" <= character <= "\u9fff")


def _kind(character: str) -> Kind:
    """The kind by Unicode's own categories and names; the common Han characters come on top."""
    category = unicodedata.category(character)
    if character == "\n":
        return Kind.NEWLINE
    if character == "\ufffd":
        return Kind.REPLACEMENT
    if character == "\t" or category in ("Zs", "Zl", "Zp"):
        return Kind.SPACE
    if character in INVISIBLE:
        return Kind.INVISIBLE
    if character in STOPS:
        return Kind.STOP
    if "\uff10" <= character <= "\uff5a" and category[0] in "LN":
        return Kind.WIDE
    if category[0] == "L":
        name = unicodedata.name(character, "")
        return next((kind for start, kind in SCRIPTS if name.startswith(start)), Kind.LETTER)
    if category == "Nd":
        return Kind.DIGIT
    if category == "Cc":
        return Kind.CONTROL
    if category in ("Co", "Cn", "Cs"):
        return Kind.PRIVATE
    return {"M": Kind.MARK, "P": Kind.PUNCTUATION}.get(category[0], Kind.SYMBOL)
