"""`meta.json` of a checkpoint folder: what is in it, and the evidence that it is still what was saved.

A checkpoint folder (a run's `checkpoints/300`, or an imported model) is

    meta.json     what the caller recorded (config, plan digest, ...) and the keys in `RESERVED`
    state/        the arrays
    tokenizer/    the tokenizer's files, as they were given

`meta.json` is written last. It holds the fingerprint of every array, the size of every file, the
sha256 of every file but the array data, and its own digest, so damage is found and named.
"""

import datetime
import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llm_jax.errors import CheckpointError

RECORD = "meta.json"
TOKENIZER = "tokenizer"
FORMAT = "llm_jax checkpoint 1"
RESERVED = ("format", "step", "saved", "versions", "metrics", "arrays", "files", "digest")
_PACKAGES = ("llm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class DamagedError(CheckpointError):
    """There is evidence that a checkpoint is not what was saved: an older one may be used instead."""


def describe_arrays(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> shape and dtype, of arrays or of their `jax.ShapeDtypeStruct`."""
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in leaves.items()
    }


def add_fingerprints(
    described: Mapping[str, Mapping[str, Any]], prints: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """`describe_arrays` with the fingerprint of each array: the entry `arrays` of a record."""
    return {name: {**facts, "fingerprint": prints[name]} for name, facts in described.items()}


def check_meta(meta: Mapping[str, Any]) -> None:
    """Raises ValueError or TypeError if the caller's `meta` cannot be recorded: before anything is saved."""
    taken = sorted(set(meta) & set(RESERVED))
    if taken:
        raise ValueError(
            f"meta must not have the keys {', '.join(taken)}: the record of a checkpoint uses them"
        )
    json.dumps(meta, ensure_ascii=False).encode()


def write_record(
    folder: Path,
    meta: Mapping[str, Any],
    step: int,
    arrays: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> None:
    """Writes `meta.json` over the files now in `folder`, and makes all of them durable."""
    record = {
        "format": FORMAT,
        "step": step,
        "saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "metrics": {name: float(v) if math.isfinite(v) else None for name, v in metrics.items()},
        **meta,
        "arrays": arrays,
        "files": {name: _fact(folder / name) for name in _file_names(folder)},
    }
    rewrite_record(folder, record)
    _make_durable(folder)


def rewrite_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Replaces `meta.json` at once, with a new digest."""
    # through JSON first: the digest must see what a reader will see (lists for tuples, text keys)
    record = json.loads(
        json.dumps({key: value for key, value in record.items() if key != "digest"})
    )
    text = json.dumps({**record, "digest": _digest(record)}, indent=1, ensure_ascii=False) + "\n"
    replace_file(folder / RECORD, text.encode())


def read_meta(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """The record of a checkpoint folder: the caller's meta and the keys in `RESERVED`.

    Raises:
      CheckpointError: the folder is not a checkpoint; DamagedError: its record is.
    """
    path = Path(checkpoint) / RECORD
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(
            f"{path} is missing: the folder is not a checkpoint, or not a whole one"
        ) from None
    except ValueError:  # not JSON, or not UTF-8
        raise DamagedError(f"{path} is damaged: not valid JSON") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(record, dict) or "digest" not in record:
        raise DamagedError(f"{path} is damaged: it has no digest")
    if record["digest"] != _digest(
        {key: value for key, value in record.items() if key != "digest"}
    ):
        raise DamagedError(f"{path} is damaged: its contents do not match its digest")
    if record["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {record['format']!r}, this version reads {FORMAT!r}; use the version that wrote it"
        )
    return record


def damaged_files(checkpoint: Path, record: Mapping[str, Any]) -> list[str]:
    """What is wrong with the files, a line each: missing, another size, other contents."""
    found = []
    for name, expected in record["files"].items():
        path = checkpoint / name
        try:
            actual = _fact(path)
        except FileNotFoundError:
            found.append(f"{path} is missing")
            continue
        except OSError as error:
            found.append(f"{path} cannot be read: {error.strerror}")
            continue
        if actual["bytes"] != expected["bytes"]:
            found.append(f"{path} has {actual['bytes']} bytes, {expected['bytes']} were saved")
        elif actual != expected:
            found.append(f"{path} is damaged: its sha256 is not the one saved")
    return found


def write_tokenizer(folder: Path, files: Mapping[str, bytes]) -> None:
    """Puts the tokenizer's files, by plain name, under `folder/tokenizer`."""
    for name, contents in files.items():
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise ValueError(f"tokenizer file {name!r} must be a plain file name")
        (folder / TOKENIZER).mkdir(exist_ok=True)
        (folder / TOKENIZER / name).write_bytes(contents)


def replace_file(path: Path, contents: bytes) -> None:
    """Writes a file so that readers, and a crash, see the old contents or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable: a rename survives a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _fact(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file; of array data only the size, because fingerprints cover it at device speed."""
    fact: dict[str, Any] = {"bytes": path.stat().st_size}
    is_array_data = path.parent.name == "d" and path.parent.parent.name.startswith("ocdbt.process_")
    if not is_array_data:
        with open(path, "rb") as file:
            fact["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return fact


def _file_names(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != RECORD)


def _make_durable(folder: Path) -> None:
    """Orbax does not fsync: without this a power cut could lose a checkpoint that was reported as saved."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed
            continue
    return found
