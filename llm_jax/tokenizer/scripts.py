"""Scripts: which characters belong to which, how they look in UTF-8, which of them are common.

A piece of a second language holds characters of its script only. Text without such a character can
then never be spelled with the piece, which is why English keeps its ids when Chinese is added.

Ranges are of Unicode 16's Blocks.txt and Scripts.txt. Punctuation that other languages use too (the
curly quotes, dashes and ellipsis of U+2010..U+2027) belongs to no script.
"""

import bisect
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from llm_jax.config import nearest
from llm_jax.errors import ConfigError

Ranges = tuple[tuple[int, int], ...]

_HAN: Ranges = (
    (0x3005, 0x3007),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3347F),
)
_KANA: Ranges = ((0x3041, 0x30FF), (0x31F0, 0x31FF))
_WIDE_MARKS: Ranges = ((0x3000, 0x3004), (0x3008, 0x303F), (0xFF00, 0xFFEF))


@dataclasses.dataclass(frozen=True)
class Script:
    """The characters of a script. `letters` join with letters, `marks` with marks."""

    name: str
    letters: Ranges
    marks: Ranges = ()
    spaced: bool = True  # words stand between spaces, so that a piece may start with one

    @functools.cached_property
    def characters(self) -> Ranges:
        """Letters and marks, sorted and joined where they touch."""
        joined: list[tuple[int, int]] = []
        for first, last in sorted(self.letters + self.marks):
            if joined and first <= joined[-1][1] + 1:
                joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
            else:
                joined.append((first, last))
        return tuple(joined)

    @functools.cached_property
    def any_character(self) -> re.Pattern[str]:
        """Finds a character of the script."""
        return re.compile(f"[{_class(self.characters)}]")

    @functools.cached_property
    def letter_run(self) -> re.Pattern[str]:
        """Finds letters of the script that follow one another."""
        return re.compile(f"[{_class(self.letters)}]+")

    @functools.cached_property
    def piece(self) -> re.Pattern[str]:
        """Matches, as a whole, a text that may become a piece: letters alone or marks alone."""
        space = " ?" if self.spaced else ""
        marks = f"|[{_class(self.marks)}]+" if self.marks else ""
        return re.compile(f"{space}[{_class(self.letters)}]+{marks}")

    def covers(self, first: int, last: int) -> bool:
        """Whether all code points of `first .. last` belong to the script."""
        at = bisect.bisect_right(self.characters, (first, 0x110000)) - 1
        return at >= 0 and self.characters[at][0] <= first and last <= self.characters[at][1]

    def meets(self, first: int, last: int) -> bool:
        """Whether one of `first .. last` belongs to the script."""
        return any(low <= last and first <= high for low, high in self.characters)


def _class(ranges: Ranges) -> str:
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


SCRIPTS: Mapping[str, Script] = {
    script.name: script
    for script in (
        Script("han", _HAN, _WIDE_MARKS, spaced=False),
        Script("japanese", _HAN + _KANA, _WIDE_MARKS, spaced=False),
        Script("hangul", ((0x1100, 0x11FF), (0x3131, 0x318E), (0xAC00, 0xD7A3)), _WIDE_MARKS),
        Script("cyrillic", ((0x0400, 0x052F),)),
        Script("greek", ((0x0370, 0x03FF), (0x1F00, 0x1FFF))),
        Script("hebrew", ((0x0591, 0x05F4),)),
        Script("arabic", ((0x0600, 0x06FF), (0x0750, 0x077F))),
        Script("devanagari", ((0x0900, 0x097F),)),
        Script("bengali", ((0x0980, 0x09FF),)),
        Script("tamil", ((0x0B80, 0x0BFF),)),
        Script("thai", ((0x0E01, 0x0E5B),), spaced=False),
        Script("georgian", ((0x10A0, 0x10FF),)),
        Script("armenian", ((0x0531, 0x058F),)),
    )
}


def script_of(name: str) -> Script:
    """The script called `name`. Raises ConfigError with the nearest name."""
    if name not in SCRIPTS:
        raise ConfigError(f"script={name!r} is not known; {nearest(name, list(SCRIPTS))}")
    return SCRIPTS[name]


# how vocabularies are counted: the first that holds a letter of the piece
_KINDS = ("han", "japanese", *(name for name in SCRIPTS if name not in ("han", "japanese")))


def kind_of(text: str) -> str:
    """The script a piece counts under: one of `SCRIPTS`, latin, digits, space, other."""
    for name in _KINDS:
        if SCRIPTS[name].letter_run.search(text):
            return "kana" if name == "japanese" else name
    if any(c.isalpha() and (c.isascii() or 0xC0 <= ord(c) <= 0x24F) for c in text):
        return "latin"
    if any(c.isdigit() for c in text):
        return "digits"
    return "space" if not text.strip() else "other"


CommonCharacters = Literal["gb2312-1", "gb2312-2"]


def common_characters(level: str) -> list[str]:
    """Common simplified Chinese characters, by the standard library's GB2312 codec.

    `gb2312-1` gives the 3,755 of level 1 (rows 16-55, by pinyin), `gb2312-2` the 3,008 of level 2 as
    well (rows 56-87, by radical).
    """
    rows = {"gb2312-1": range(16, 56), "gb2312-2": range(16, 88)}
    if level not in rows:
        raise ConfigError(f"common_characters={level!r} is not known; {nearest(level, list(rows))}")
    cells = (bytes((0xA0 + row, 0xA0 + cell)) for row in rows[level] for cell in range(1, 95))
    return [c for cell in cells if (c := cell.decode("gb2312", "ignore"))]


@dataclasses.dataclass(frozen=True)
class ByteRule:
    """Which byte strings may become a piece of a byte-level vocabulary for `script`.

    A piece may begin or end inside a character. It must hold enough of one that no text without a
    character of the script has these bytes: a whole character, or a start that only the script has.
    """

    script: Script
    max_characters: int

    def usable(self, piece: bytes) -> bool:
        """Whether the piece may be part of a larger one."""
        return self._parts(piece) is not None

    def allowed(self, piece: bytes) -> bool:
        """Whether the piece may be new: `usable`, not too long, and never in other text."""
        parts = self._parts(piece)
        if parts is None:
            return False
        whole, head = parts
        if len(whole.strip(" ")) > self.max_characters:
            return False
        return bool(whole.strip(" ")) or (bool(head) and self.script.covers(*_completions(head)))

    def _parts(self, piece: bytes) -> tuple[str, bytes] | None:
        """(whole characters, start of the last character), or None when not of the script."""
        start = 0
        while start < len(piece) and 0x80 <= piece[start] < 0xC0:
            start += 1
        if start > 3 or start == len(piece):
            return ("", b"") if start <= 3 else None
        end = len(piece)
        for back in range(1, min(3, end - start) + 1):
            if piece[end - back] >= 0xC0:
                end -= back if _length(piece[end - back]) > back else 0
                break
        try:
            whole, head = piece[start:end].decode(), piece[end:]
        except UnicodeDecodeError:
            return None
        if whole and not self.script.piece.fullmatch(whole) and not self._bare_space(whole, start):
            return None
        if head and not self.script.meets(*_completions(head)):
            return None
        return whole, head

    def _bare_space(self, whole: str, start: int) -> bool:
        return self.script.spaced and whole == " " and not start


def _length(lead: int) -> int:
    """Bytes of the UTF-8 character with this first byte."""
    return 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


def _completions(head: bytes) -> tuple[int, int]:
    """First and last code point whose UTF-8 begins with `head`."""
    length = _length(head[0])
    first = head[0] & (0x7F >> length)
    for byte in head[1:]:
        first = first << 6 | byte & 0x3F
    missing = 6 * (length - len(head))
    return first << missing, ((first + 1) << missing) - 1


def count_by_kind(texts: Iterable[str]) -> dict[str, int]:
    """Number of texts by `kind_of`, largest first."""
    counts: dict[str, int] = {}
    for text in texts:
        kind = kind_of(text)
        counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
