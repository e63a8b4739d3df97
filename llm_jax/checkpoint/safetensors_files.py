"""Safetensors folders, single or sharded: every byte of the layout is checked before a tensor is read.

The `safetensors` library validates a file as it maps it; here the header is read by hand, because a
mapped file counts as memory of the process, because its errors do not name what to do, and because
nothing may be written before all files are known to be sound. Rules of a file:

1. eight bytes, little-endian: the size of the header, at most `MAX_HEADER`;
2. the header, a JSON object without repeated keys: name -> dtype, shape, data_offsets;
3. the data: tensors side by side from the first byte to the last, no gap, no overlap, each as long as
   its shape times its dtype says.
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llm_jax.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # the library's own limit
MAX_INDEX = 256 << 20
LFS_POINTER = b"version "  # as a size of a header 7e17 bytes, so no header starts so
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where a tensor lies and what it is."""

    file: Path
    start: int  # first byte of the tensor in the file
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_tensor(stored: Stored, into: np.ndarray | None = None) -> np.ndarray:
    """The tensor, in memory of its own or at the start of the bytes `into`, which must have room for it.

    Raises CheckpointError if the file shrank since it was checked.
    """
    flat = np.empty(stored.nbytes, np.uint8) if into is None else into[: stored.nbytes]
    view, done = memoryview(flat.data), 0
    with open(stored.file, "rb", buffering=0) as file:
        file.seek(stored.start)
        while done < stored.nbytes:  # Linux reads at most 2 GiB at once
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError(
                    f"{stored.file}: ends early; it changed while it was read, copy it again"
                )
            done += count
    return flat.view(stored.dtype).reshape(stored.shape)


def open_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of the model in `folder`, in the order of files and bytes.

    Raises:
      CheckpointError: no safetensors there (pickle files are never read), or a file or the index breaks a
        rule; told in one line.
    """
    if (folder / SINGLE).exists():
        return open_file(folder, SINGLE)
    if (folder / INDEX).exists():
        return _read_sharded(folder)
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: {pickles[0]} is a pickle file, which can run code when it is opened; convert it "
            "elsewhere: model.save_pretrained(FOLDER, safe_serialization=True) in transformers"
        )
    raise CheckpointError(
        f"{folder}: holds neither {SINGLE} nor {INDEX}; give a Hugging Face model folder"
    )


def open_file(folder: Path, name: str) -> dict[str, Stored]:
    """Every tensor of one file of the folder, in the order of its bytes. Raises as `open_folder`."""
    return _read_header(_inside(folder, name))


def _read_sharded(folder: Path) -> dict[str, Stored]:
    where = folder / INDEX
    index = read_json(_inside(folder, INDEX), MAX_INDEX)
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(
            f"{where}: has no weight_map, an object from tensor to file; copy it again"
        )
    for name, file in placed.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise CheckpointError(
                f"{where}: {name!r} lies in {file!r}; a shard must be a *.safetensors file beside the index"
            )
    found: dict[str, Stored] = {}
    for file in sorted(set(placed.values())):
        for name, stored in open_file(folder, file).items():
            if placed.get(name) != file:
                told = f"in {placed[name]}" if name in placed else "nowhere"
                raise CheckpointError(
                    f"{folder / file}: holds {name!r}, which {INDEX} puts {told}; copy the model again"
                )
            found[name] = stored
    for name, file in placed.items():
        if name not in found:
            raise CheckpointError(
                f"{where}: puts {name!r} into {file}, which does not hold it; copy the model again"
            )
    return found


def _is_plain(name: str) -> bool:
    plain = name == os.path.basename(name) and "\\" not in name and "\0" not in name
    return plain and name.endswith(".safetensors")


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of the folder, links resolved. Raises CheckpointError if a link leads out of it.

    The cache of huggingface_hub is made of links, from `snapshots/COMMIT/` to `blobs/`: those are followed.
    """
    path, root = folder / name, folder.resolve()
    try:
        real = path.resolve(strict=True)
        regular = stat.S_ISREG(real.stat().st_mode)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a loop of links"
        raise CheckpointError(f"{path}: cannot be read: {reason}; copy the model again") from None
    if not regular:
        raise CheckpointError(f"{path}: is no file; copy the model again")
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path}: is a link out of its folder; put the file itself there")
    return real


def _read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file in the order of their bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == LFS_POINTER:
            raise CheckpointError(
                f"{path}: is a pointer of Git LFS, not the file itself; run git lfs pull in its folder"
            )
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{path}: says that its header has {length:,} bytes, but the file has {size:,} and a header "
                f"at most {MAX_HEADER:,}; it is truncated or no safetensors file, copy it again"
            )
        text = file.read(length)
    header = parse_object(text, str(path))
    header.pop("__metadata__", None)
    found = {name: _entry(path, name, entry) for name, entry in header.items()}
    end = 0
    for name, (start, stop, _) in sorted(found.items(), key=lambda item: item[1][:2]):
        if start != end:
            kind = "overlaps the one before" if start < end else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: {name!r} starts at byte {start} of the data and {kind}, which ends at {end}; "
                "the file is damaged, copy it again"
            )
        end = stop
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path}: its tensors need {8 + length + end:,} bytes, the file has {size:,}; it is truncated "
            "or damaged, copy it again"
        )
    return {
        name: Stored(file=path, start=8 + length + start, dtype=entry.dtype, shape=entry.shape)
        for name, (start, _, entry) in sorted(found.items(), key=lambda item: item[1][:2])
    }


def _entry(path: Path, name: str, entry: Any) -> tuple[int, int, Stored]:
    """Start, end and kind of one header entry, checked for itself."""
    wrong = f"{path}: the header entry of {name!r} is not valid"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{wrong}: it needs dtype, shape and data_offsets; copy it again")
    shape, offsets = entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [-1]
    if len(offsets) != 2 or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise CheckpointError(f"{wrong}: shape={shape!r}, data_offsets={offsets!r}; copy it again")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{wrong}: dtype {entry['dtype']!r} is not one of {', '.join(DTYPES)}; quantised models "
            "must be converted to bfloat16 first"
        )
    kind = Stored(file=path, start=0, dtype=DTYPES[entry["dtype"]], shape=tuple(shape))
    start, stop = offsets
    if stop - start != kind.nbytes:
        raise CheckpointError(
            f"{path}: {name!r} has {stop - start} bytes, but {entry['dtype']}{shape} needs {kind.nbytes}; "
            "the file is damaged, copy it again"
        )
    return start, stop, kind


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            text = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if len(text) > limit:
        raise CheckpointError(f"{path}: larger than {limit:,} bytes; that is no such file")
    return parse_object(text, str(path))


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object in which no key is given twice: readers would differ in which one they take."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{where}: {twice!r} is there twice; copy it again")
        return found

    try:
        data = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = str(error).split(":")[0]
        raise CheckpointError(f"{where}: not valid JSON ({reason}); copy it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: must hold a JSON object, not a {type(data).__name__}")
    return data


def find_file(folder: Path, name: str) -> Path | None:
    """A file of the folder that may be read, or None. Raises CheckpointError if it is a link out of it."""
    return _inside(folder, name) if (folder / name).exists() else None


class ShardWriter:
    """Writes tensors one after the other into files of bounded size, and the index that finds them."""

    def __init__(
        self, folder: Path, planned: Mapping[str, tuple[str, tuple[int, ...]]], limit: int
    ):
        """Plans the files for `{name: (dtype, shape)}` in that order, each at most `limit` bytes of data.

        A tensor larger than that gets a file of its own.
        """
        self._folder, self._planned = folder, planned
        self._shards: list[list[str]] = []
        room = 0
        for name in planned:
            size = self._size(name)
            if not self._shards or size > room:
                self._shards.append([])
                room = limit
            self._shards[-1].append(name)
            room -= size
        self.files = [SINGLE] if len(self._shards) == 1 else self._numbered()
        self._left = [(name, file) for file, names in self._pairs() for name in names]
        self._open: Any = None

    def _numbered(self) -> list[str]:
        count = len(self._shards)
        return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]

    def _pairs(self) -> list[tuple[str, list[str]]]:
        return list(zip(self.files, self._shards, strict=True))

    def _size(self, name: str) -> int:
        dtype, shape = self._planned[name]
        return math.prod(shape) * DTYPES[dtype].itemsize

    def write(self, name: str, value: np.ndarray) -> None:
        """Adds the next tensor; they must come in the planned order."""
        expected, file = self._left.pop(0)
        dtype, shape = self._planned[name]
        if name != expected or value.shape != shape or value.dtype != DTYPES[dtype]:
            raise ValueError(f"{name}: {value.dtype}{value.shape} is not what was planned next")
        if self._open is None or self._open.name != os.fspath(self._folder / file):
            self._start(file)
        # as bytes: numpy writes bfloat16 through an object loop otherwise
        assert self._open is not None
        self._open.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

    def _start(self, file: str) -> None:
        self._finish()
        names = dict(self._pairs())[file]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
        at = 0
        for name in names:
            dtype, shape = self._planned[name]
            end = at + self._size(name)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data aligned for readers that map the file
        self._open = open(self._folder / file, "wb")  # noqa: SIM115
        self._open.write(len(text).to_bytes(8, "little") + text)

    def _finish(self) -> None:
        if self._open is not None:
            self._open.flush()
            os.fsync(self._open.fileno())
            self._open.close()
            self._open = None

    def close(self) -> None:
        """Ends the last file and, where there are several, writes the index."""
        if self._left:
            raise ValueError(f"{self._left[0][0]} was not written")
        self._finish()
        if len(self.files) > 1:
            total = sum(self._size(name) for name in self._planned)
            placed = {name: file for file, names in self._pairs() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": placed}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def abandon(self) -> None:
        """Closes the file that is open after a failure; the caller removes the folder."""
        if self._open is not None:
            self._open.close()
            self._open = None
