"""Readers of plain text, JSON lines and the sample texts of this package.

All three read bytes and split on b"\\n" only: `str.splitlines` also breaks at U+2028 and U+0085, which
may stand inside a JSON string.
"""

import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, Literal, cast

import pyarrow

from llm_jax.data.documents import Document, Rejects
from llm_jax.errors import DataError

Division = Literal["auto", "file", "line", "paragraphs"]

MAX_LINE_BYTES = 16 << 20  # a longer JSON line is a broken file rather than a document
WHOLE_FILE_BYTES = 64 << 10  # division "auto": up to here a file is one document
GROUP_CHARACTERS = 8_000  # division "paragraphs": blocks are gathered up to this size
BOM = b"\xef\xbb\xbf"


@contextmanager
def open_bytes(file: str) -> Iterator[BinaryIO]:
    """Opens a plain, .gz or .zst file for reading bytes; damage is a DataError naming the file."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(os.path.splitext(file)[1].lower())
    try:
        if compression is None:
            with open(file, "rb") as raw:
                yield raw
            return
        # pyarrow, because the zstandard package takes a truncated file for a complete one
        with pyarrow.input_stream(file, compression=compression) as stream:
            yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20))
    except OSError as error:
        if error.errno is None:  # pyarrow's way to say that the content is wrong
            raise DataError(
                f"{file}: damaged {compression} file ({error}); fetch it again"
            ) from error
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def lines(
    stream: BinaryIO, limit: int = MAX_LINE_BYTES, first: int = 1
) -> Iterator[tuple[int, bytes | None]]:
    """Yields (line number from `first`, bytes without line end); None for a line longer than `limit`.

    Never holds more than `limit` bytes, whatever the file.
    """
    number = first - 1
    while line := stream.readline(limit + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(BOM)
        if len(line) > limit and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(limit)
            yield number, None
        else:
            yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def line_blocks(
    stream: BinaryIO, size: int, limit: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, bytes]]:
    """Yields (number of the first line, bytes) that together are all lines of the stream.

    `lines` of each block, from that number on, gives what `lines` of the stream gives. A block has
    about `size` bytes; of a line longer than `limit` only so much is in it that this shows.
    """
    number = 1
    while block := stream.read(size):
        if not block.endswith(b"\n"):
            tail = stream.readline(limit + 1)
            block += tail
            while tail and not tail.endswith(b"\n"):
                tail = stream.readline(limit)  # the rest of a line that is too long
        yield number, block
        number += block.count(b"\n") + (not block.endswith(b"\n"))


def read_jsonl(
    source: str, file: str, place: str, text_field: str, rejects: Rejects
) -> Iterator[Document]:
    """One document per line: the string under `text_field` of a JSON object. Blank lines are skipped."""
    with open_bytes(file) as stream:
        yield from jsonl_documents(lines(stream), source, place, text_field, rejects)


def jsonl_documents(
    numbered: Iterable[tuple[int, bytes | None]],
    source: str,
    place: str,
    text_field: str,
    rejects: Rejects,
) -> Iterator[Document]:
    """The documents of numbered lines of one file."""
    for number, line in numbered:
        where = f"{place}:{number}"
        if line is None:
            rejects.refuse(f"line longer than {MAX_LINE_BYTES >> 20} MB", where)
        elif line.strip():
            value = parse_object(line, where, rejects)
            if value is None:
                continue
            if text_field not in value:
                rejects.refuse(f"no field {text_field!r}", where, line)
            elif document := rejects.accept(value[text_field], source, where):
                yield document


def parse_object(line: bytes, place: str, rejects: Rejects) -> dict | None:
    """The JSON object in `line`, or None after counting why there is none."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        rejects.refuse("not valid UTF-8", place, line)
    except RecursionError:
        rejects.refuse("JSON nested too deep", place, line)
    except json.JSONDecodeError:
        rejects.refuse("not valid JSON", place, line)
    except ValueError:  # Python refuses to parse integers of more than 4300 digits
        rejects.refuse("JSON number too long", place, line)
    else:
        if isinstance(value, dict):
            return value
        rejects.refuse("not a JSON object", place, line)
    return None


def read_text(
    source: str, file: str, place: str, division: Division, rejects: Rejects
) -> Iterator[Document]:
    """Documents of a plain text file; see `Division`.

    "auto" takes a file up to 64 KB as one document and divides a larger one into paragraphs.
    """
    if division == "auto":
        small = os.path.getsize(file) <= WHOLE_FILE_BYTES
        division = "file" if small else "paragraphs"
    with open_bytes(file) as stream:
        if division == "file":
            yield from _whole_file(source, stream.read(), place, rejects)
            return
        for number, text in _groups(lines(stream), division, place, rejects):
            if document := rejects.accept(text, source, f"{place}:{number}"):
                yield document


def _whole_file(source: str, data: bytes, place: str, rejects: Rejects) -> Iterator[Document]:
    try:
        text = data.removeprefix(BOM).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        rejects.refuse("not valid UTF-8", f"{place}:{line}", data[error.start :])
        return
    if document := rejects.accept(text.strip("\n"), source, place):
        yield document


def _groups(
    numbered: Iterable[tuple[int, bytes | None]], division: Division, place: str, rejects: Rejects
) -> Iterator[tuple[int, str]]:
    """Yields (first line number, text): single lines, or paragraphs gathered to GROUP_CHARACTERS.

    A text without blank lines is cut at line ends, once a group has twice that size.
    """
    first, group, size = 1, [], 0
    for number, line in numbered:
        try:
            text = None if line is None else line.decode("utf-8")
        except UnicodeDecodeError:
            rejects.refuse("not valid UTF-8", f"{place}:{number}", line or b"")
            continue
        if text is None:
            rejects.refuse(f"line longer than {MAX_LINE_BYTES >> 20} MB", f"{place}:{number}")
        elif division == "line":
            if text.strip():
                yield number, text
        else:
            full = size >= (2 * GROUP_CHARACTERS if text.strip() else GROUP_CHARACTERS)
            if full:
                yield first, "\n".join(group).strip("\n")
                group, size = [], 0
            if group or text.strip():
                first = first if group else number
                group.append(text)
                size += len(text) + 1
    if group:
        yield first, "\n".join(group).strip("\n")


def read_samples(source: str, files: list[str], rejects: Rejects) -> Iterator[Document]:
    """Passages of the package's sample texts, which a line `---` separates."""
    for file in files:
        with open_bytes(file) as stream:
            text = stream.read().decode("utf-8").replace("\r\n", "\n")
        passages = [p.strip() for p in f"\n{text}\n".split("\n---\n")]
        for number, passage in enumerate(filter(None, passages), start=1):
            if document := rejects.accept(passage, source, f"{os.path.basename(file)}#{number}"):
                yield document
