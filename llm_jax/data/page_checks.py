"""Checksums of a shard's files, page by page: damage is seen when it is read, by whoever reads it.

A page is what a memory map fetches at least, so a read that is checked touches no more of the disk than one
that is not. CRC-32 finds every change of up to 32 bits in a row, and misses others once in four billion.
It is against accidents; `data verify` compares sha256.
"""

import zlib
from pathlib import Path

import numpy as np

from llm_jax.errors import DataError

PAGE = 4096  # bytes


class DamagedShardError(DataError):
    """Files of a shard are not what was written; `shard` is its name, as in SOURCE/train-00003."""

    def __init__(self, told: str, shard: str) -> None:
        super().__init__(told, shard)  # both: it comes out of other processes, pickled
        self.told, self.shard = told, shard

    def __str__(self) -> str:
        return self.told


def pages_in(size: int) -> int:
    """Pages of a file of `size` bytes; the last may be shorter."""
    return -(-size // PAGE)


def checks_of(path: Path) -> np.ndarray:
    """CRC-32 of every page of a file, uint32 [pages]."""
    with open(path, "rb") as file:
        found = [zlib.crc32(page) for page in iter(lambda: file.read(PAGE), b"")]
    return np.array(found, dtype=np.uint32)


def first_damaged(contents: memoryview, checks: np.ndarray, begin: int, end: int) -> int:
    """The first page that holds one of the bytes [begin, end) and is not what was written; -1: none.

    Args:
      contents: the file, bytes.
      checks: of its pages, as `checks_of`.
    """
    for page in range(begin // PAGE, pages_in(end)):
        if zlib.crc32(contents[page * PAGE : (page + 1) * PAGE]) != checks[page]:
            return page
    return -1
