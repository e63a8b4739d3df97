"""Prepared data on disk, written: a whole folder appears at once, or nothing does.

1. `new_folder` gives a temporary folder beside the target and renames it at the very end.
2. `SplitWriter` streams documents into the shards of one split, in constant memory.
3. `HoldOut` says which documents are held out.
"""

import errno
import os
import re
import shutil
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from llm_jax.data.page_checks import checks_of
from llm_jax.data.shards import HELDOUT, MANIFEST, TRAIN, Shard, is_target, sha256_of
from llm_jax.errors import DataError

# a full disk, a full quota, a file-size limit
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Encoded(NamedTuple):
    """One document ready to be stored."""

    tokens: np.ndarray  # with BOS and EOS
    num_bytes: int  # of the text in UTF-8
    num_characters: int
    # in [0, 1), from a hash of the text or of its opening: below the held-out share means held out
    position: float
    mask: np.ndarray | None = None  # uint8 per token, see `shards`; None: no split has masks


@contextmanager
def new_folder(target: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `target` when the block ends without error.

    Raises:
      DataError: `target` exists (and `overwrite` is off, or it is not prepared data), cannot be
        made, or the disk is full. Nothing is left behind, and an existing `target` stays as it was.
    """
    folder = Path(os.path.abspath(target))
    _refuse(folder, overwrite)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        _sync_folders(temporary)
        _swap(temporary, folder)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DataError(
                f"{folder}: no room to write ({error.strerror}); nothing was left there, free some "
                "space or choose another output"
            ) from error
        if error.filename is not None and str(folder.parent) in str(error.filename):
            raise DataError(f"{folder}: cannot be written ({error.strerror})") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if not overwrite:
        raise DataError(f"{folder} already exists; choose another output or pass --overwrite")
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} exists and is not prepared data; it will not be overwritten")


def _remove_stale(folder: Path) -> None:
    """Removes what killed runs of this machine left beside `folder`."""
    for path in folder.parent.glob(f"{folder.name}.*-*"):
        match = re.fullmatch(re.escape(folder.name) + r"\.(tmp|old)-(\d+)", path.name)
        if match and int(match[2]) != os.getpid() and not _alive(int(match[2])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _swap(temporary: Path, folder: Path) -> None:
    """Renames `temporary` to `folder`; an existing one goes only once the new one is in place."""
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folders(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        sync_folder(Path(folder))


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Writes and fsyncs one file of the temporary folder."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


class SplitWriter:
    """Writes one split of one source as shards of at most `max_tokens` (or one longer document)."""

    def __init__(self, root: Path, source: str, split: str, dtype: str, max_tokens: int) -> None:
        self._root, self._name = root, f"{source}/{split}"
        self._dtype, self._max_tokens = np.dtype(dtype), max_tokens
        self._shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._table = array("q")  # token end, bytes, characters of each document of this shard
        self._in_shard = 0
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0, "characters": 0}
        self._mask = bytearray()  # of this shard
        self._targets: int | None = None  # None until a document with a mask comes

    def add(self, document: Encoded) -> None:
        """Appends one document."""
        size = len(document.tokens)
        if self._file is not None and self._in_shard + size > self._max_tokens:
            self._finish_shard()
        if self._file is None:
            self._file = open(self._path("tokens"), "w+b")  # noqa: SIM115 (closed by finish or close)
            self._file.write(_npy_header(self._dtype, (0,)))
        self._file.write(document.tokens.astype(self._dtype).tobytes())
        self._in_shard += size
        self._table.extend((self._in_shard, document.num_bytes, document.num_characters))
        if document.mask is not None:
            self._mask += document.mask.astype(np.uint8).tobytes()
            # the first token of a document is nobody's target
            self._targets = (self._targets or 0) + int(is_target(document.mask[1:]).sum())
        self.counts["documents"] += 1
        self.counts["tokens"] += size
        self.counts["bytes"] += document.num_bytes
        self.counts["characters"] += document.num_characters

    def finish(self) -> dict[str, Any]:
        """Closes the last shard; returns the split's entry for the manifest."""
        self._finish_shard()
        masked = self._targets is not None
        own = ("mask_file", "mask_size", "mask_sha256")
        shards = [
            {key: value for key, value in asdict(shard).items() if masked or key not in own}
            for shard in self._shards
        ]
        targets = {"targets": self._targets} if masked else {}
        return {**self.counts, **targets, "shards": shards}

    def close(self) -> None:
        """Closes an unfinished file; for when an error ends the run."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _path(self, kind: str) -> Path:
        return self._root / f"{self._name}-{len(self._shards):05d}.{kind}.npy"

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.seek(0)  # the header has room for any length, so the array need not move
        self._file.write(_npy_header(self._dtype, (self._in_shard,)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        tokens, documents = self._path("tokens"), self._path("documents")
        table = np.frombuffer(self._table.tobytes(), dtype=np.int64).reshape(-1, 3)
        # not np.save: on a full disk it raises an OSError that does not say so (no errno)
        write_file(documents, _npy_header(table.dtype, table.shape) + table.tobytes())
        files = {"tokens": tokens, "documents": documents}
        checks = checks_of(tokens)
        if self._targets is not None:
            files["mask"] = self._path("mask")
            header = _npy_header(np.dtype(np.uint8), (self._in_shard,))
            write_file(files["mask"], header + self._mask)
            checks = np.concatenate([checks, checks_of(files["mask"])])
        files["checks"] = self._path("checks")
        write_file(files["checks"], _npy_header(checks.dtype, checks.shape) + checks.tobytes())
        named: dict[str, Any] = {}
        for kind, path in files.items():
            named[f"{kind}_file"] = path.relative_to(self._root).as_posix()
            named[f"{kind}_size"] = path.stat().st_size
            named[f"{kind}_sha256"] = sha256_of(path)
        self._shards.append(Shard(num_tokens=self._in_shard, num_documents=len(table), **named))
        self._table, self._in_shard, self._mask = array("q"), 0, bytearray()


def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """A .npy header (version 1.0) that takes 128 bytes whatever the shape."""
    fields = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    return (
        b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + f"{fields}".ljust(117).encode() + b"\n"
    )


class HoldOut:
    """Deals documents to the two splits by `Encoded.position`, at least one to each when it can.

    While one split is still empty, the document nearest to it is kept back: with two documents or
    more, both splits get one whatever the fraction. A fraction of 0 holds nothing out.
    """

    def __init__(self, fraction: float, together: bool = False) -> None:
        """`together`: documents of one position never part. One that has company is not kept back then, and
        a small source may have nothing held out.
        """
        self._fraction, self._together = fraction, together
        self._kept: Encoded | None = None
        self._nearest = float("inf")  # distance of the nearest document so far
        self._seen: dict[str, int] = {TRAIN: 0, HELDOUT: 0}

    def deal(self, document: Encoded) -> Iterator[tuple[str, Encoded]]:
        """Yields the (split, document) that are settled once `document` has come."""
        split = self._split(document)
        self._seen[split] += 1
        if self._fraction == 0 or (self._seen[TRAIN] and self._seen[HELDOUT]):
            if self._kept is not None:
                yield self._split(self._kept), self._kept
                self._kept = None
            yield split, document
            return
        distance = abs(document.position - self._fraction)
        if distance < self._nearest:
            settled, self._kept, self._nearest = self._kept, document, distance
            if settled is not None:
                yield split, settled
            return
        if self._together and self._kept is not None and distance == self._nearest:
            yield split, self._kept
            self._kept = None
        yield split, document

    def rest(self) -> Iterator[tuple[str, Encoded]]:
        """Yields the document still kept back, if any; the last call."""
        if self._kept is None:
            return
        split = self._split(self._kept)
        other = HELDOUT if split == TRAIN else TRAIN
        yield (other if self._seen[split] > 1 else TRAIN), self._kept

    def _split(self, document: Encoded) -> str:
        return HELDOUT if document.position < self._fraction else TRAIN
