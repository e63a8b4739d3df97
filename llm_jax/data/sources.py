"""Where documents come from: one config, one reader, whatever the format.

1. `parse_source_spec` turns a word of the command line into a `SourceConfig`.
2. `read_documents` finds the files and the format, and yields documents in a fixed order.

The order depends on the names and contents of the files only, never on the file system or the clock.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from llm_jax.config import nearest
from llm_jax.data import package_docs, record_files, text_files
from llm_jax.data.documents import Document, Reject, Rejects
from llm_jax.errors import ConfigError, DataError

__all__ = ["Document", "Reject", "Rejects", "SourceConfig", "parse_source_spec", "read_documents"]

Format = Literal[
    "auto", "text", "jsonl", "parquet", "array_record", "tfds", "package-docs", "sample"
]
SUFFIXES = {
    "text": (".txt", ".md"),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson"),
    "parquet": (".parquet",),
    "array_record": (".array_record", ".arrayrecord"),
}
NAME = re.compile(r"[^\W_][\w.-]*")
SAMPLES = Path(__file__).parent / "samples"


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of text. It becomes one folder of the prepared data and one entry of the mixture."""

    name: str  # also the name of its folder
    format: Format = "auto"  # auto: by the ending of the files
    path: str = ""  # file, folder or glob; "NAME:SPLIT" for tfds; packages for package-docs
    text_field: str = "text"  # field, column or feature that holds the text
    document: text_files.Division = "auto"  # what of a plain text file is one document
    max_bytes: int = 0  # stop after about this many UTF-8 bytes; 0 reads everything

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or self.name == "tokenizer":
            raise ConfigError(
                f"source name={self.name!r} must be letters, digits, '-', '_' or '.', start with a "
                "letter or digit, and not be 'tokenizer'; write it as NAME=PATH"
            )
        if self.format not in get_args(Format):
            raise ConfigError(
                f"source {self.name!r}: format={self.format!r}; "
                f"{nearest(self.format, get_args(Format))}"
            )
        if self.max_bytes < 0:
            raise ConfigError(f"source {self.name!r}: max_bytes={self.max_bytes} must be >= 0")
        if not self.path and self.format != "package-docs":
            raise ConfigError(f"source {self.name!r}: path is empty; give a file or a folder")


def parse_source_spec(spec: str) -> SourceConfig:
    """Reads `NAME=PATH`, `PATH`, `package-docs[:numpy,jax]`, `sample:zh` or `tfds:NAME:SPLIT`.

    A path alone is named after its file: `news/2024.jsonl.gz` becomes `2024`.
    """
    name, path = "", spec
    head, equals, tail = spec.partition("=")
    if equals and not os.path.exists(spec):  # a file may have "=" in its name
        name, path = head, tail
        if not name:
            raise ConfigError(f"source {spec!r} has no name before '='; write NAME=PATH")
    kind, _, rest = path.partition(":")
    if kind == "package-docs":
        return SourceConfig(name=name or "package-docs", format="package-docs", path=rest)
    if kind == "sample":
        return SourceConfig(name=name or rest, format="sample", path=rest)
    if kind == "tfds":
        return SourceConfig(name=name or _stem(rest.partition(":")[0]), format="tfds", path=rest)
    return SourceConfig(name=name or _stem(path), path=path)


def _stem(path: str) -> str:
    """A legal source name made of the last part of a path."""
    base = os.path.basename(path.rstrip("/"))
    endings = sorted((e for group in SUFFIXES.values() for e in group), key=len, reverse=True)
    base = next((base[: -len(e)] for e in endings if base.lower().endswith(e)), base)
    return re.sub(r"[^\w.-]+", "-", base).strip("-_.") or "text"


def read_documents(source: SourceConfig, rejects: Rejects) -> Iterator[Document]:
    """Yields the documents of `source` in a fixed order; counts what is left out in `rejects`.

    Raises:
      DataError: a file is missing, damaged, or has no field `text_field`. Bad records are not
        errors here, see `Rejects.check`.
    """
    spent = 0
    for document in _read_all(source, rejects):
        yield document
        if source.max_bytes:
            spent += len(document.text.encode())
            if spent >= source.max_bytes:
                return


def _read_all(source: SourceConfig, rejects: Rejects) -> Iterator[Document]:
    if source.format == "package-docs":
        packages = tuple(p.strip() for p in source.path.split(",") if p.strip())
        yield from package_docs.read(source.name, packages, rejects)
    elif source.format == "tfds":
        yield from record_files.read_tfds(source.name, source.path, source.text_field, rejects)
    elif source.format == "sample":
        yield from text_files.read_samples(source.name, source_files(source), rejects)
    else:
        for part in source_parts(source, source_files(source)):
            yield from read_part(source, part, rejects)


class SourcePart(NamedTuple):
    """One file of a source."""

    file: str
    kind: str  # a format, never "auto"
    place: str  # how ids and messages call it


def source_parts(source: SourceConfig, files: list[str]) -> list[SourcePart]:
    """`files`, which `source_files` named, each with its format and its name in ids."""
    kind = source.format if source.format != "auto" else _format_of(source, files)
    folder = source.path.rstrip("/") + "/"
    below = folder if files[0].startswith(folder) else os.path.dirname(files[0])
    places = [os.path.relpath(f, below) if len(files) > 1 else os.path.basename(f) for f in files]
    return [SourcePart(f, kind, place) for f, place in zip(files, places, strict=True)]


def source_files(source: SourceConfig) -> list[str]:
    """The files that `read_documents` reads, in order; none for packages and TFDS.

    Raises:
      DataError: there are none, or their format cannot be told.
    """
    if source.format in ("package-docs", "tfds"):
        return []
    if source.format == "sample":
        return _sample_files(source)
    return choose_files(source, find_files(source.path))


def choose_files(source: SourceConfig, files: list[str]) -> list[str]:
    """Those of the files found at `source.path` that are of its format.

    Raises:
      DataError: there are none, or their format cannot be told.
    """
    kind = source.format if source.format != "auto" else _format_of(source, files)
    wanted = [f for f in files if f.lower().endswith(SUFFIXES[kind])]
    # a file named outright is read whatever its ending; in a folder the ending decides
    files = wanted or (files if files == [source.path] else [])
    if not files:
        raise DataError(
            f"source {source.name!r}: no {' or '.join(SUFFIXES[kind])} files in {source.path!r}"
        )
    return files


def read_part(source: SourceConfig, part: SourcePart, rejects: Rejects) -> Iterator[Document]:
    """Yields the documents of one file in order."""
    file, kind, place = part
    if kind == "text":
        yield from text_files.read_text(source.name, file, place, source.document, rejects)
    elif kind == "jsonl":
        yield from text_files.read_jsonl(source.name, file, place, source.text_field, rejects)
    elif kind == "parquet":
        yield from record_files.read_parquet(source.name, file, place, source.text_field, rejects)
    else:
        yield from record_files.read_array_record(
            source.name, file, place, source.text_field, rejects
        )


def find_files(path: str) -> list[str]:
    """The file, every file below the folder, or the matches of the glob; sorted, no hidden ones."""
    import glob

    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        found = []
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            found += [os.path.join(folder, n) for n in names if not n.startswith(".")]
        if not found:
            raise DataError(f"path {path!r} is an empty folder; give one with text in it")
        return sorted(found)
    matches = sorted(m for m in glob.glob(path, recursive=True) if os.path.isfile(m))
    if not matches:
        raise DataError(f"path {path!r} does not exist; give a file, a folder or a glob")
    return matches


def _format_of(source: SourceConfig, files: list[str]) -> str:
    """The one format whose endings occur among `files`."""
    kinds = {
        kind
        for kind, endings in SUFFIXES.items()
        if any(f.lower().endswith(endings) for f in files)
    }
    if len(kinds) == 1:
        return kinds.pop()
    known = ", ".join(ending for endings in SUFFIXES.values() for ending in endings)
    if not kinds:
        raise DataError(
            f"source {source.name!r}: cannot tell the format of {source.path!r}; files end in "
            f"{known}, or set format"
        )
    raise DataError(
        f"source {source.name!r}: {source.path!r} mixes {', '.join(sorted(kinds))} files; set format"
    )


def _sample_files(source: SourceConfig) -> list[str]:
    """The sample texts of the package in one language, such as `zh-stories.txt` for `zh`."""
    files = sorted(str(f) for f in SAMPLES.glob(f"{source.path}-*.txt"))
    if not files:
        known = sorted({f.name.partition("-")[0] for f in SAMPLES.glob("*-*.txt")})
        raise DataError(
            f"source {source.name!r}: no sample text {source.path!r}; known: {', '.join(known)}"
        )
    return files
