"""UTF-8 that was read as Latin-1, Windows-1252 or GBK, put right.

Latin-1 is `ftfy`'s trade. GBK is what Chinese pages suffer from and `ftfy` does not know: 浣犲ソ for
你好. Such text is made of rare characters, so it is found by their share and believed only if the
share of common ones rises when it is read again.
"""

import re

import ftfy
import numpy as np

from llm_jax.data.characters import Kind, codes, counts, kinds
from llm_jax.data.clean.page import Page

# a lead byte of UTF-8 seen as Latin-1 or Windows-1252, then a continuation byte seen the same way
LATIN = re.compile(
    "[\u00c2-\u00f4][\u0080-\u00bf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039"
    "\u0152\u017d\u2018\u2019\u201c\u201d\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153\u017e\u0178]"
)
SUSPICIOUS_RARE_SHARE = (
    0.08  # clean Chinese of any register stays below 0.05, GBK mojibake has a half
)
MIN_HAN = 2
RISE = 0.2  # by how much the share of common Han characters must rise
GBK_CODECS = ("gb18030", "gbk")


def repair(page: Page) -> str | None:
    """The text read as it was written, or None when nothing suggests that it was misread."""
    text = page.text
    if text.isascii():
        return None
    if LATIN.search(text):
        text = ftfy.fix_encoding(text)
    if page.counts[Kind.HAN_RARE] >= 1 and page.han >= MIN_HAN:
        lines = text.split("\n")
        for index in _lines_with_rare(text):
            lines[index] = _repair_gbk(lines[index])
        text = "\n".join(lines)
    return None if text == page.text else text


def _lines_with_rare(text: str) -> list[int]:
    """Numbers of the lines that hold a rare character; most texts have few."""
    kinds_N = kinds(codes(text))
    ends = np.flatnonzero(kinds_N == Kind.NEWLINE)
    rare = np.flatnonzero(kinds_N == Kind.HAN_RARE)
    return np.unique(np.searchsorted(ends, rare)).tolist()


def _repair_gbk(line: str) -> str:
    common, rare = _han(line)
    if rare == 0 or common + rare < MIN_HAN or rare < SUSPICIOUS_RARE_SHARE * (common + rare):
        return line
    for codec in GBK_CODECS:
        try:
            # 0x80 begins nothing in GBK; Windows shows it as the euro sign
            pieces = (piece.encode(codec) for piece in line.split("\u20ac"))
            # strictly: where a reader put U+FFFD a byte is gone, and a guess makes wrong words of it
            again = b"\x80".join(pieces).decode("utf-8")
        except UnicodeError:
            continue
        after, still_rare = _han(again)
        if after and after / (after + still_rare) >= common / (common + rare) + RISE:
            return again
    return line


def _han(text: str) -> tuple[int, int]:
    """How many common and how many rare Han characters, private use counted with the rare ones."""
    counted = counts(codes(text))
    rare = counted[Kind.HAN_RARE] + counted[Kind.PRIVATE] + counted[Kind.REPLACEMENT]
    return int(counted[Kind.HAN] + counted[Kind.HAN_FUNCTION]), int(rare)
