"""From raw text to token shards: every stage records what it read, and `verify` follows the records.

A stage's manifest names each file of its input by size and sha256 and, where the files were made by a
stage of ours, that stage's folder and digest. So a chain is proven by reading: the files of a folder
are what its manifest says, and its inputs are what they were when it was made.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax.data import shards
from llm_jax.data.shards import MANIFEST, content_digest, sha256_of
from llm_jax.data.sources import SourceConfig, source_files
from llm_jax.errors import DataError
from llm_jax.tokenizer.base import digest

UNTRACKED = (
    "tfds",
    "package-docs",
)  # what an installed package or builder holds; named, not hashed

MISSING = "missing"
MOVED = " (if it was moved, pass --root OLD=NEW)"


class Finding(NamedTuple):
    """One thing that was checked, and what is wrong with it."""

    depth: int  # 0 for the folder that was asked about, 1 for what it was made of, ...
    item: str
    problem: str  # "" when it is as recorded


def input_records(sources: tuple[SourceConfig, ...]) -> dict[str, Any]:
    """`input_record` of each source by its name; before reading, so that a later change shows."""
    return {source.name: input_record(source) for source in sources}


def input_record(source: SourceConfig) -> dict[str, Any]:
    """What a stage says about one source: its files, each with size and sha256, and who made them."""
    record: dict[str, Any] = {"format": source.format, "path": source.path}
    if source.format in UNTRACKED:
        return {**record, "files": []}
    files = source_files(source)
    record["files"] = [file_record(f) for f in files]
    record["made_by"] = maker_records(files)
    return record


def maker_records(files: list[str]) -> list[dict[str, str]]:
    """The folders of stages that the files are of, each with its digest."""
    makers = sorted({maker for maker in map(_maker, files) if maker})
    return [{"folder": m, "digest": read_manifest(Path(m))["digest"]} for m in makers]


def file_record(file: str) -> dict[str, Any]:
    """What is recorded of one input file."""
    size, sha256 = os.path.getsize(file), sha256_of(Path(file))
    return {"file": os.path.abspath(file), "size": size, "sha256": sha256}


def _maker(file: str) -> str | None:
    """The folder of the stage that made a file: the one above the source's, if it has a manifest."""
    folder = Path(os.path.abspath(file)).parent.parent
    return str(folder) if (folder / MANIFEST).is_file() else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that any stage made.

    Raises:
      DataError: there is none, or it is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise DataError(f"{folder}: holds no {MANIFEST}; give a folder made by `llm-jax data ...`")
    try:
        manifest = json.loads(file.read_bytes())
        assert isinstance(manifest["digest"], str)
        assert isinstance(manifest["sources"], dict)
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise DataError(f"{file}: damaged manifest ({error}); make the folder again") from error
    return manifest


Roots = tuple[tuple[str, str], ...]  # (where a folder was, where it is now)


def verify(folder: str, depth: int = 0, roots: Roots = ()) -> Iterator[Finding]:
    """Checks a folder and all it was made of; yields a finding for every file and manifest.

    Args:
      folder: made by any stage.
      depth: how far it is from the one that was asked about.
      roots: what has been moved since; of several that fit a path the longest counts.

    Raises:
      DataError: `folder` holds no readable manifest.
    """
    path = Path(os.path.abspath(folder))
    manifest = read_manifest(path)
    stage = manifest.get("stage", "prepare")
    title = f"{path} (data {stage}, digest {manifest['digest'][:16]})"
    yield Finding(depth, title, _manifest_problem(manifest))
    for file, size, sha256 in _outputs(manifest):
        yield Finding(depth, str(path / file), _file_problem(path / file, size, sha256))
    if "inputs" not in manifest:
        yield Finding(depth + 1, "inputs", "not recorded: made before stages recorded their inputs")
        return
    followed: set[str] = set()
    for name, record in _read_records(manifest):
        if "files" not in record:
            problem = "files not recorded: made before they were; make the folder again"
            yield Finding(depth + 1, name, problem)
            continue
        made_by = {maker["folder"]: maker["digest"] for maker in record.get("made_by", [])}
        if record["format"] in UNTRACKED:
            origin = f"{name}: {record['format']} {record['path']} (named, not hashed)"
            yield Finding(depth + 1, origin.strip(), "")
        for entry in record["files"]:
            if "://" in entry["file"]:
                yield Finding(depth + 1, f"{name}: {entry['file']} (remote, not read)", "")
                continue
            file = where_now(entry["file"], roots)
            problem = _file_problem(Path(file), entry["size"], entry["sha256"])
            yield Finding(depth + 1, f"{name}: {file}", problem + MOVED * (problem == MISSING))
        for maker, expected in made_by.items():
            yield from _follow(where_now(maker, roots), expected, depth + 1, followed, roots)


def _read_records(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The record of everything that was read, with what it was: sources, and what they were held against."""
    yield from manifest["inputs"].items()
    for name, record in (manifest.get("references") or {}).items():
        yield f"reference {name}", record
    for name, record in manifest.get("against", {}).get("files", {}).items():
        yield f"against {name}", record


def where_now(path: str, roots: Roots) -> str:
    """Where a recorded path is, after what has been moved."""
    fitting = [
        (old, new) for old, new in roots if path == old or path.startswith(old.rstrip("/") + "/")
    ]
    if not fitting:
        return path
    old, new = max(fitting, key=lambda root: len(root[0]))
    return new.rstrip("/") + path[len(old.rstrip("/")) :]


def _follow(
    maker: str, expected: str, depth: int, followed: set[str], roots: Roots
) -> Iterator[Finding]:
    """The chain above a folder that an input came from, once."""
    if maker in followed:
        return
    followed.add(maker)
    if not (Path(maker) / MANIFEST).is_file():
        yield Finding(depth, maker, MISSING + MOVED)
        return
    try:
        found = read_manifest(Path(maker))["digest"]
    except DataError as error:
        yield Finding(depth, maker, str(error))
        return
    if found != expected:
        problem = f"digest {found[:16]}, but {expected[:16]} was read; it was made again since"
        yield Finding(depth, maker, problem)
    yield from verify(maker, depth, roots)


def _manifest_problem(manifest: dict[str, Any]) -> str:
    try:
        if "stage" in manifest:
            intact = documents_digest(manifest) == manifest["digest"]
        else:
            intact = content_digest(manifest) == manifest["digest"]
        # absent in prepared data of before, whose other entries nothing covers
        intact = intact and manifest.get("record_digest") in (None, record_digest(manifest))
    except (KeyError, TypeError, AttributeError) as error:
        return f"damaged manifest ({error})"
    return "" if intact else "the manifest was changed after it was written"


def _outputs(manifest: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
    """Every file of a folder as (name, size, sha256)."""
    for entry in manifest["sources"].values():
        for part in entry.get("parts", []):
            yield part["file"], part["size"], part["sha256"]
        for split in entry.get("splits", {}).values():
            for shard in (shards.Shard(**shard) for shard in split["shards"]):
                yield from shard.files


def record_digest(manifest: dict[str, Any]) -> str:
    """Digest of all that a manifest says, inputs and config included."""
    return digest({key: value for key, value in manifest.items() if key != "record_digest"})


def documents_digest(manifest: dict[str, Any]) -> str:
    """Digest of all that decides what a reader gets."""
    parts = {name: entry["parts"] for name, entry in manifest["sources"].items()}
    return digest({"format": manifest["format"], "stage": manifest["stage"], "sources": parts})


def _file_problem(path: Path, size: int, sha256: str) -> str:
    if not path.is_file():
        return MISSING
    if path.stat().st_size != size:
        return f"{path.stat().st_size} bytes, but {size} were recorded"
    return "" if sha256_of(path) == sha256 else "content differs from what was recorded (sha256)"
