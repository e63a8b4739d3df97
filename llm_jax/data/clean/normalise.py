"""One spelling for what looks the same: NFC, widths, control characters, spaces.

Not NFKC: it turns ，！（） into ASCII, ① into 1 and ㎡ into m2. Every step looks first whether there is
anything for it to do, so clean text passes at the speed of the look.
"""

import functools
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from llm_jax.data.characters import INVISIBLE, Kind
from llm_jax.data.clean.page import Page

HanSpaces = Literal["prose", "all", "keep"]

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
PUNCTUATION = "，。！？；：、"
SPACE = "[ \\t\u00a0]"
# each starts with the space, which is what a regular expression can look for fastest
BETWEEN_HAN = re.compile(
    f"{SPACE}(?<=[{HAN}{PUNCTUATION}]{SPACE}){SPACE}*(?=[{HAN}])|{SPACE}(?<=[{HAN}]{SPACE}){SPACE}*(?=[{PUNCTUATION}])"
)
# four or more single characters, each apart: 今 天 天 气
SPACED_OUT = re.compile(
    f"(?<![^\\s{PUNCTUATION}])[{HAN}](?:{SPACE}+[{HAN}{PUNCTUATION}]){{3,}}(?![^\\s])"
)
HAS_SPACE = re.compile(f"{SPACE}(?<=[{HAN}{PUNCTUATION}]{SPACE}){SPACE}*[{HAN}{PUNCTUATION}]")
# the number of an article or chapter, whose space is part of its form: 第一条 为了规范管理，…
NUMBERED = re.compile(f"{SPACE}*第[0-9零〇一二三四五六七八九十百千]{{1,8}}[{HAN}]{SPACE}+")
LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
TRAILING = " \t\u00a0\u3000"
BLANK_LINES = re.compile("\n{3,}")


@dataclass(frozen=True, kw_only=True)
class NormaliseConfig:
    """What `normalise` does; with all of it off it returns what it was given."""

    nfc: bool = True  # composed letters; the ideographs that NFC replaces are compatibility ones
    line_ends: bool = True  # CRLF, CR, form feeds and Unicode's own become "\n"
    control: bool = True  # control and zero-width characters are removed
    width: bool = True  # full-width Latin letters and digits become ASCII; punctuation stays
    # spaces between Han characters: prose removes them in lines with Chinese punctuation and from
    # s p a c e d characters, and leaves titles (第一章 总则) and columns alone; all removes every one
    han_spaces: HanSpaces = "prose"
    blank_space: bool = True  # none at line ends, at most one blank line, none around the text


def normalise(page: Page, config: NormaliseConfig) -> str | None:
    """The normalised text, or None when there is nothing to do. Idempotent."""
    text, counts = page.text, page.counts
    if config.line_ends and (counts[Kind.CONTROL] or "\u2028" in text or "\u2029" in text):
        text = LINE_ENDS.sub("\n", text)
    if config.control and (counts[Kind.CONTROL] or counts[Kind.INVISIBLE]):
        text = text.translate(_removed())
    if config.width and counts[Kind.WIDE]:
        text = text.translate(_narrow())
    if config.nfc and not text.isascii() and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    if config.han_spaces != "keep" and page.han and HAS_SPACE.search(text):
        text = _close_up(text, config.han_spaces)
    if config.blank_space:
        text = _trim(text)
    return None if text == page.text else text


def _close_up(text: str, mode: HanSpaces) -> str:
    if mode == "all":
        return BETWEEN_HAN.sub("", text)
    lines = text.split("\n")
    for index, line in enumerate(lines):
        if not HAS_SPACE.search(line):
            continue
        # a table's row is no prose, whatever stands in its cells
        if any(mark in line for mark in PUNCTUATION) and not line.lstrip().startswith("|"):
            head = match.end() if (match := NUMBERED.match(line)) else 0
            lines[index] = line[:head] + BETWEEN_HAN.sub("", line[head:])
        else:
            lines[index] = SPACED_OUT.sub(lambda match: re.sub(SPACE, "", match[0]), line)
    return "\n".join(lines)


def _trim(text: str) -> str:
    if " \n" in text or "\t\n" in text or "\u3000\n" in text or "\u00a0\n" in text:
        text = "\n".join([line.rstrip(TRAILING) for line in text.split("\n")])
    if "\n\n\n" in text:
        text = BLANK_LINES.sub("\n\n", text)
    return text.rstrip("\n" + TRAILING).lstrip("\n")


@functools.cache
def _removed() -> dict[int, None]:
    controls = [code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"]
    return dict.fromkeys([*controls, *map(ord, INVISIBLE)])


@functools.cache
def _narrow() -> dict[int, int]:
    wide = "".join(
        map(chr, (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B)))
    )
    return {ord(character): ord(character) - 0xFEE0 for character in wide}
