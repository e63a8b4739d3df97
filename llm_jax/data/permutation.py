"""A seeded permutation of 0 .. n-1 that is never stored: any element costs the same few operations.

A Feistel network is a bijection on 2^(2h) numbers whatever its round function is; walking along its
cycles until the value is below n makes it a bijection on 0 .. n-1 (Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002). The result depends on nothing but (key, n), so it stays the same
across numpy versions, which `numpy.random` does not promise.
"""

import functools
import hashlib

import numpy as np

ROUNDS = 6
MAX_SIZE = 1 << 62


@functools.lru_cache(maxsize=4096)
def _round_keys(key: str) -> tuple[int, ...]:
    digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))


def permute(indices: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where the permutation of 0 .. size-1 chosen by `key` sends each of `indices`.

    Args:
      indices: integers in [0, size), any shape.
      size: number of elements, 1 <= size <= 2^62.
      key: any text; another text gives an unrelated permutation.

    Returns:
      int64 array of the same shape.
    """
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size={size} must be between 1 and 2^62")
    values = np.asarray(indices, dtype=np.uint64)
    if values.size and int(values.max()) >= size:
        raise ValueError(f"index {int(values.max())} must be below size={size}")
    half_bits = max(2, ((size - 1).bit_length() + 1) // 2)  # at most 4 walks for size >= 16
    keys = _round_keys(key)
    result = _network(values.reshape(-1), half_bits, keys)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        walked = _network(result[outside], half_bits, keys)
        result[outside] = walked
        outside = outside[walked >= size]
    return result.reshape(values.shape).astype(np.int64)


def _network(values: np.ndarray, half_bits: int, keys: tuple[int, ...]) -> np.ndarray:
    """The bijection on [0, 4^half_bits): halves swap, one xored with a hash of the other."""
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ np.uint64(key)) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood, 2014); products wrap modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
