"""A list of pieces that the user wants in a vocabulary: read, and checked one by one.

A file ending in `.json` holds a JSON list of strings; any other holds one piece a line.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from llm_jax.errors import DataError
from llm_jax.tokenizer import files as tokenizer_files

MAX_CHARACTERS = 64


class Given(NamedTuple):
    """One wanted piece and where it stands, for messages."""

    piece: str
    where: str


def read_pieces(file: Path) -> list[Given]:
    """The pieces in `file`, in its order. Raises DataError naming the line of what is no piece."""
    content = tokenizer_files.read_file(file)
    if file.suffix == ".json":
        found = tokenizer_files.parse_json_value(content, str(file))
        if not isinstance(found, list):
            raise DataError(
                f"{file}: must hold a JSON list of strings, not a {type(found).__name__}"
            )
        rows = [(piece, f"{file}: entry {number}") for number, piece in enumerate(found, 1)]
    else:
        rows = [(line, f"{file}:{number}") for number, line in _lines(content, file)]
    given = [Given(checked(piece, where), where) for piece, where in rows]
    if not given:
        raise DataError(f"{file}: holds no pieces; write one a line")
    return given


def _lines(content: bytes, file: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file}:{number}: not valid UTF-8 at byte {error.start} of the line "
                f"({line[error.start : error.start + 4].hex(' ')}); convert the list to UTF-8"
            ) from None
        if text:
            yield number, text


def checked(piece: object, where: str) -> str:
    """`piece`, if it can be one. Raises DataError naming it and the rule it breaks."""
    if not isinstance(piece, str):
        raise DataError(f"{where}: {piece!r} is not a string")
    rule = ""
    if not piece.strip():
        rule = "is blank"
    elif len(piece) > MAX_CHARACTERS:
        rule = f"has {len(piece)} characters, more than {MAX_CHARACTERS}"
    elif any("\ud800" <= character <= "\udfff" for character in piece):
        rule = "holds a lone surrogate, which is no character"
    elif any(character < " " or character == "\x7f" for character in piece):
        rule = "holds a control character" if "\0" not in piece else "holds a NUL"
    if rule:
        raise DataError(f"{where}: piece {ascii(piece)[:80]} {rule}; remove it")
    return piece


def new_ones(
    given: Iterable[Given],
    has: Callable[[bytes], bool],
    trouble: Callable[[str], str],
    skip_known: bool,
) -> list[str]:
    """The pieces to add: each once, none that is there, none that could never be produced.

    Args:
      given: what was asked for.
      has: whether the base has a piece.
      trouble: why a piece could never be produced, or "".
      skip_known: leave out repeated and known pieces instead of refusing them.

    Raises:
      DataError: a piece that cannot be added.
    """
    first: dict[str, str] = {}
    wanted = []
    for piece, where in given:
        if piece in first:
            reason = f"is given twice, first at {first[piece]}"
        elif has(piece.encode()):
            reason = "is in the base already"
        elif why := trouble(piece):
            raise DataError(f"{where}: piece {piece!r} could never be produced: {why}; remove it")
        else:
            wanted.append(piece)
            reason = ""
        first.setdefault(piece, where)
        if reason and not skip_known:
            raise DataError(f"{where}: piece {piece!r} {reason}; remove it, or add --skip-known")
    return wanted
