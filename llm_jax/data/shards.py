"""Prepared data on disk, read: token shards that are written once and never change.

    FOLDER/manifest.json                      counts, digests, the tokenizer's ids, the config
    FOLDER/tokenizer/                         the tokenizer's own files
    FOLDER/rejects.jsonl                      samples of the records that were left out
    FOLDER/SOURCE/SPLIT-00000.tokens.npy      uint16 or uint32 [tokens]
    FOLDER/SOURCE/SPLIT-00000.documents.npy   int64 [documents, 3]: token end, UTF-8 bytes, characters
    FOLDER/SOURCE/SPLIT-00000.mask.npy        uint8 [tokens], of conversations alone: 0, ANSWER, MARK or SECOND
    FOLDER/SOURCE/SPLIT-00000.checks.npy      uint32 [pages]: CRC-32 of the pages of tokens, then of the mask

Of a conversation, bytes and characters are those of its answers. A pair of a better and a worse answer is one
document, the better conversation first, and SECOND marks where the worse one begins; bytes and characters are
those of the better answer. A stored document is [BOS] + its text's ids + [EOS]
(EOS first too where there is no BOS) and lies in one shard. Opening reads the manifest and compares file sizes; the
shards are memory-mapped when first used, and every page is compared as it is read. Data prepared before there were
checks are read without.
"""

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.data.page_checks import PAGE, DamagedShardError, first_damaged, pages_in
from llm_jax.errors import DataError
from llm_jax.tokenizer.base import digest

FORMAT = 1
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
TOKENIZER = "tokenizer"
TRAIN, HELDOUT = "train", "heldout"
SPLITS = (TRAIN, HELDOUT)
# values of a mask: a target that is text of an answer, and one that is not (end of turn, header)
ANSWER, MARK = 1, 2
SECOND = 3  # no target: the first token of the worse one of a pair


def is_target(mask: np.ndarray) -> np.ndarray:
    """Of every value of a mask, whether the token counts as a target; bool."""
    return (mask == ANSWER) | (mask == MARK)


@dataclass(frozen=True)
class Shard:
    """The files of one shard of a split, as the manifest names them."""

    tokens_file: str  # relative to the folder
    tokens_size: int  # bytes on disk
    tokens_sha256: str
    documents_file: str
    documents_size: int
    documents_sha256: str
    num_tokens: int
    num_documents: int
    mask_file: str = ""  # "": every token is a target
    mask_size: int = 0
    mask_sha256: str = ""
    checks_file: str = ""  # "": its pages have no checksums
    checks_size: int = 0
    checks_sha256: str = ""

    @property
    def name(self) -> str:
        """As in SOURCE/train-00003."""
        return self.tokens_file.removesuffix(".tokens.npy")

    @property
    def files(self) -> list[tuple[str, int, str]]:
        """Name, size and sha256 of each file."""
        every = [
            (self.tokens_file, self.tokens_size, self.tokens_sha256),
            (self.documents_file, self.documents_size, self.documents_sha256),
            (self.mask_file, self.mask_size, self.mask_sha256),
            (self.checks_file, self.checks_size, self.checks_sha256),
        ]
        return [file for file in every if file[0]]


def damaged(shard: Shard, file: str, told: str) -> DataError:
    """The error about a file of a shard; DamagedShardError when it can be left out.

    Where documents begin decides every row: without that file there is no plan.
    """
    told += "; put a good copy back, or prepare the data again"
    return DataError(told) if file == shard.documents_file else DamagedShardError(told, shard.name)


class Split:
    """Documents of one source and split, as one stream of tokens across its shards. Picklable."""

    def __init__(self, folder: Path, entry: dict[str, Any], dtype: str) -> None:
        self._folder = folder
        self._dtype = np.dtype(dtype)
        self.shards = tuple(Shard(**shard) for shard in entry["shards"])
        self.num_documents: int = entry["documents"]
        self.num_tokens: int = entry["tokens"]  # with BOS and EOS
        self.num_bytes: int = entry["bytes"]  # UTF-8 bytes of text
        self.num_characters: int = entry["characters"]  # code points of text
        self.has_mask: bool = "targets" in entry
        # pairs (input, target) whose target counts
        self.num_targets: int = entry.get("targets", self.num_tokens - self.num_documents)
        counts = [shard.num_tokens for shard in self.shards]
        self._bases = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.digest = digest(content_of(entry))  # the shards are named with their sha256
        self._maps: dict[str, np.ndarray] = {}
        # of the same files: all their bytes, those of the header, checks by page
        self._checks: dict[str, tuple[memoryview, int, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leaves memory maps and cached tables behind: a worker opens its own."""
        cached = ("_documents", "document_starts", "_maps", "_checks")
        kept = {k: v for k, v in self.__dict__.items() if k not in cached}
        return kept | {"_maps": {}, "_checks": {}}

    @property
    def num_pairs(self) -> int:
        """Pairs (input, target) inside documents: what there is to train on."""
        return self.num_tokens - self.num_documents

    @cached_property
    def document_starts(self) -> np.ndarray:
        """Token offset of each document, int64 [num_documents + 1]; the last is `num_tokens`."""
        return np.concatenate([[0], self._documents[:, 0]])

    @property
    def document_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document's text, int64 [num_documents]."""
        return self._documents[:, 1]

    @property
    def document_characters(self) -> np.ndarray:
        """Code points of each document's text, int64 [num_documents]."""
        return self._documents[:, 2]

    @cached_property
    def _documents(self) -> np.ndarray:
        """[num_documents, 3], token ends counted from the start of the split."""
        tables = [np.zeros((0, 3), np.int64)]
        for shard, base in zip(self.shards, self._bases, strict=False):
            path = self._folder / shard.documents_file
            shape = (shard.num_documents, 3)
            table = np.array(self._load(shard, shard.documents_file, shape, np.int64))
            # a megabyte for every 40,000 documents, all of which was just read anyway
            if sha256_of(path) != shard.documents_sha256:
                told = f"{path}: content differs from what was written (sha256)"
                raise damaged(shard, shard.documents_file, told)
            table[:, 0] += base
            tables.append(table)
        return np.concatenate(tables)

    def span(self, name: str) -> tuple[int, int]:
        """Tokens [begin, end) of the split that lie in the shard of this name; (0, 0) if there is none."""
        for shard, base in zip(self.shards, self._bases.tolist(), strict=False):
            if shard.name == name:
                return base, base + shard.num_tokens
        return 0, 0

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the split as int32, across shards."""
        return self._read(start, count, "tokens", np.int32)

    def read_mask(self, start: int, count: int) -> np.ndarray:
        """Mask of the same tokens, uint8; without a mask all are MARK."""
        if not self.has_mask:
            return np.full(count, MARK, dtype=np.uint8)
        return self._read(start, count, "mask", np.uint8)

    def _read(self, start: int, count: int, kind: str, dtype: Any) -> np.ndarray:
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens [{start}, {start + count}) of {self.num_tokens}")
        out = np.empty(count, dtype)
        done = 0
        index = int(np.searchsorted(self._bases, start, side="right")) - 1
        while done < count:
            inside = start + done - int(self._bases[index])
            part = self._part(self.shards[index], kind, inside, count - done)
            out[done : done + len(part)] = part
            done += len(part)
            index += 1
        return out

    def document(self, index: int) -> np.ndarray:
        """All tokens of one document, BOS and EOS included, int32."""
        start, end = self.document_starts[index : index + 2]
        return self.read(int(start), int(end - start))

    def _part(self, shard: Shard, kind: str, start: int, count: int) -> np.ndarray:
        """Up to `count` values of a shard's tokens or mask, from `start` to its end at most, checked."""
        file, dtype = (
            (shard.tokens_file, self._dtype) if kind == "tokens" else (shard.mask_file, np.uint8)
        )
        if file not in self._maps:
            self._maps[file] = self._load(shard, file, (shard.num_tokens,), dtype)
        part = self._maps[file][start : start + count]
        if shard.checks_file:
            self._check(shard, file, start * part.itemsize, part.nbytes)
        return part

    def _check(self, shard: Shard, file: str, begin: int, size: int) -> None:
        """Compares the pages that hold bytes [begin, begin + size) of the array in a file.

        Raises:
          DamagedShardError: one is not what was written.
        """
        if file not in self._checks:
            pages = pages_in(shard.tokens_size), pages_in(shard.mask_size)
            checks = self._load(shard, shard.checks_file, (sum(pages),), np.uint32)
            checks = checks[: pages[0]] if file == shard.tokens_file else checks[pages[0] :]
            contents = np.memmap(self._folder / file, np.uint8, "r").data
            self._checks[file] = (contents, len(contents) - self._maps[file].nbytes, checks)
        contents, header, checks = self._checks[file]
        page = first_damaged(contents, checks, header + begin, header + begin + size)
        if page >= 0:
            where = f"bytes {page * PAGE} to {(page + 1) * PAGE}"
            told = f"{self._folder / file}: {where} are not what was written (CRC-32)"
            raise damaged(shard, file, told)

    def _load(self, shard: Shard, file: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        path = self._folder / file
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise damaged(shard, file, f"{path}: cannot be read ({error})") from error
        if array.shape != shape or array.dtype != dtype:
            wanted = f"{np.dtype(dtype)} {shape}"
            told = f"{path}: holds {array.dtype} {array.shape}, but the manifest says {wanted}"
            raise damaged(shard, file, told)
        return np.asarray(array)  # a slice of a memmap takes ten times as long as one of its view


class Prepared:
    """A folder of prepared data. Picklable."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.digest: str = manifest["digest"]
        self.tokenizer_fingerprint: str = manifest["tokenizer"]["fingerprint"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.bos_id: int = manifest["tokenizer"]["bos_id"]
        self.eos_id: int = manifest["tokenizer"]["eos_id"]
        self.sources: dict[str, dict[str, Split]] = {
            name: {
                split: Split(folder, entry, manifest["dtype"])
                for split, entry in source["splits"].items()
            }
            for name, source in manifest["sources"].items()
        }

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer's own files are."""
        return self.folder / TOKENIZER

    @property
    def holds_pairs(self) -> bool:
        """Whether its documents are pairs of a better and a worse answer."""
        return "longest_side" in self.manifest.get("conversations", {})

    def shards(self) -> list[Shard]:
        """Every shard of every source and split."""
        splits = (split for splits in self.sources.values() for split in splits.values())
        return [shard for split in splits for shard in split.shards]

    def check_sizes(
        self, without: Collection[str] = (), sources: Collection[str] | None = None
    ) -> None:
        """Looks at the size of every file, but of shards `without` only at their documents.

        Args:
          without: names of shards that will not be read.
          sources: whose training shards will be read; None: all of them.

        Raises:
          DataError: one is missing or has another size than when it was written; see `damaged`.
        """
        unread = [
            splits[TRAIN]
            for n, splits in self.sources.items()
            if sources is not None and n not in sources
        ]
        skipped = {shard.name for split in unread for shard in split.shards}
        for shard in self.shards():
            if shard.name in skipped:
                continue
            for file, size, _ in shard.files:
                if shard.name in without and file != shard.documents_file:
                    continue
                path = self.folder / file
                found = path.stat().st_size if path.is_file() else None
                if found != size:
                    told = "missing" if found is None else f"{found} bytes, but {size} were written"
                    raise damaged(shard, file, f"{path}: {told}")

    def verify(self) -> int:
        """Reads every shard and compares its sha256; returns the bytes read.

        Raises:
          DataError: naming the first file that is not what was written.
        """
        total = 0
        for shard in self.shards():
            for file, _, expected in shard.files:
                path = self.folder / file
                if sha256_of(path) != expected:
                    raise DataError(
                        f"{path}: content differs from what was written (sha256); "
                        "prepare the data again"
                    )
                total += path.stat().st_size
        return total


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_of(entry: dict[str, Any]) -> dict[str, Any]:
    """A split's entry without what follows from the rest of it: old data and new are then the same data."""
    shards = [
        {key: value for key, value in shard.items() if not key.startswith("checks_")}
        for shard in entry["shards"]
    ]
    return {**entry, "shards": shards}


def content_digest(manifest: dict[str, Any]) -> str:
    """Digest of all that decides what a reader gets; paths, config and reject counts stay out."""
    splits = {
        name: {split: content_of(entry) for split, entry in source["splits"].items()}
        for name, source in manifest["sources"].items()
    }
    kept = {key: manifest[key] for key in ("format", "dtype", "tokenizer")}
    return digest({**kept, "sources": splits})


def open_prepared(
    folder: str | os.PathLike[str],
    without: Collection[str] = (),
    sources: Collection[str] | None = None,
) -> Prepared:
    """Opens a folder of prepared data without reading the shards.

    Args:
      folder: made by `data prepare` or `data conversations`.
      without: names of shards that will not be read; they may be damaged or missing.
      sources: whose training shards will be read, so that others may be, too; None: all of them.

    Raises:
      DataError: no such folder, a damaged manifest, a missing or truncated file.
    """
    path = Path(folder)
    file = path / MANIFEST
    if not file.is_file():
        raise DataError(
            f"{path}: holds no prepared data (no {MANIFEST}); make it with `llm-jax data prepare`"
        )
    try:
        manifest = json.loads(file.read_bytes())
        if manifest["format"] != FORMAT:
            raise DataError(
                f"{file}: format {manifest['format']}, but this version reads format {FORMAT}; "
                "prepare the data again"
            )
        prepared = Prepared(path, manifest)
        intact = content_digest(manifest) == prepared.digest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: damaged manifest ({error}); prepare the data again") from error
    if not intact:
        raise DataError(f"{file}: was changed after it was written; prepare the data again")
    prepared.check_sizes(without, sources)
    return prepared
