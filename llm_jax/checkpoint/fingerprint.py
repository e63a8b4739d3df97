"""A fingerprint of every array, the same on any mesh: Orbax does not notice a flipped byte in array data.

1. Each leaf is read as unsigned words; every word is mixed with its position and the results are
   summed. Integer sums wrap and commute, so the value is the same however the array is sharded.
2. The sums run under `jit` where the array lives: one pass over memory, 8 bytes a leaf come back.
3. They are stored beside the arrays and computed again after restore, so the check covers
   device -> host -> disk -> host -> device, resharding included.

It finds accidents, not attackers. The mixer is the 32-bit one of Wellons, "Prospecting for Hash Functions".
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

LARGE = 1 << 22  # elements; larger arrays on one device are read in blocks
BLOCK = 1 << 18  # elements; with 44 times as many, most of the time went into pages for temporaries
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # 8 bytes: two words each


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by name: `params/layers/attention/query`, `opt_state/0/mu/embed`.

    Names come from dict keys, field names and indices, so they are stable across processes.
    """
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
        name = "/".join(parts)
        if not parts or any(not part or "/" in part for part in parts) or name in named:
            raise ValueError(f"leaf {name!r}: names must be unique, not empty, and free of '/'")
        named[name] = leaf
    return named


def fingerprint(array: jax.Array) -> jax.Array:
    """uint32[2] of an array of any shape, or of typed random keys. Traceable; see the module text."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    return _sums(words, jnp.uint32(0))


def fingerprint_in_blocks(array: jax.Array) -> list[jax.Array]:
    """Parts whose sum is the fingerprint of an array on one device.

    In one piece XLA's CPU backend holds the words and positions of the whole array: five times the
    memory of a bfloat16 one.
    """
    shape = _rows_of(array.shape)
    per_row = array.size // shape[0]
    rows = max(1, BLOCK // per_row)
    return [
        _block(
            array, np.uint32(low), np.uint32(low * per_row % (1 << 32)), (min(rows, left), shape)
        )
        for low in range(0, shape[0], rows)
        if (left := shape[0] - low)
    ]


def _rows_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with as many leading axes made one as it takes for a row to be no larger than a block."""
    lead = 1
    while lead < len(shape) and math.prod(shape[lead:]) > BLOCK:
        lead += 1
    return (math.prod(shape[:lead]), *shape[lead:])


@functools.partial(jax.jit, static_argnums=3)
def _block(
    array: jax.Array, low: Any, start: Any, rows_of: tuple[int, tuple[int, ...]]
) -> jax.Array:
    """Of some rows, whose first element has the position `start`."""
    # words first: a slice of bfloat16 would make the CPU backend convert the whole array to float32
    words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize])
    rows, shape = rows_of
    part = jax.lax.dynamic_slice_in_dim(words.reshape(shape), low, rows)
    return _sums(part.astype(jnp.uint32), start)


def _sums(words: jax.Array, start: Any) -> jax.Array:
    """Of uint32 words in row-major order, the first at position `start`."""
    index = jnp.zeros(words.shape, jnp.uint32)  # row-major position; wraps beyond 2^32 elements
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    index += start
    first = _mix(words ^ _mix(index))
    second = _mix(words + _mix(index ^ jnp.uint32(0x9E3779B9)))
    return jnp.stack([jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)])


def _mix(value: jax.Array) -> jax.Array:
    value = (value ^ (value >> 16)) * jnp.uint32(0x7FEB352D)
    value = (value ^ (value >> 15)) * jnp.uint32(0x846CA68B)
    return value ^ (value >> 16)


def _fingerprint_all(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([fingerprint(leaf) for leaf in leaves])


@functools.cache
def _jitted(mesh: Any) -> Any:
    # replicated over the mesh, so that every process can read the result
    return jax.jit(
        _fingerprint_all, out_shardings=NamedSharding(mesh, PartitionSpec()) if mesh else None
    )


class PendingFingerprints:
    """Fingerprints that the devices are still computing. `result()` waits; any thread may call it."""

    def __init__(self, leaves: Mapping[str, Any]) -> None:
        """Starts on `{name: array}`; the buffers may be donated as soon as this returns."""
        groups: dict[
            Any, list[tuple[str, Any]]
        ] = {}  # one jit call per mesh: a program has one set of devices
        self._blocks: dict[str, list[jax.Array]] = {}
        for name, leaf in leaves.items():
            sharding = getattr(leaf, "sharding", None)
            if isinstance(sharding, SingleDeviceSharding) and _divides(leaf):
                self._blocks[name] = fingerprint_in_blocks(leaf)
                continue
            key = sharding.mesh if isinstance(sharding, NamedSharding) else None
            devices = (
                None if key is not None or sharding is None else frozenset(sharding.device_set)
            )
            groups.setdefault((key, devices), []).append((name, _on_any_device(leaf)))
        self._parts = [
            ([name for name, _ in group], _jitted(mesh)([leaf for _, leaf in group]))
            for (mesh, _), group in groups.items()
        ]

    def result(self) -> dict[str, str]:
        """Leaf name -> 16 hexadecimal digits."""
        found: dict[str, str] = {}
        for names, values in self._parts:
            for name, (first, second) in zip(names, np.asarray(values), strict=True):
                found[name] = f"{int(first):08x}{int(second):08x}"
        for name, blocks in self._blocks.items():
            first, second = np.asarray(blocks).sum(axis=0, dtype=np.uint32).tolist()
            found[name] = f"{first:08x}{second:08x}"
        return found


def _divides(leaf: Any) -> bool:
    """Whether an array is large, and of numbers that are one word each."""
    simple = jnp.issubdtype(leaf.dtype, jnp.number) and leaf.dtype.itemsize <= 4
    return leaf.ndim > 0 and leaf.size > LARGE and simple


def _on_any_device(leaf: Any) -> Any:
    """Host arrays of 8-byte numbers as words: without x64, jit would quietly cut them to 4 bytes."""
    if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.itemsize == 8:
        words = np.ascontiguousarray(leaf).view(np.uint32)
        return words.reshape((*np.shape(leaf), 2))
    return leaf


def fingerprints(tree: Any) -> dict[str, str]:
    """Leaf name -> 16 hexadecimal digits, for a pytree of arrays on any devices."""
    return PendingFingerprints(named_leaves(tree)).result()


def differences(expected: Mapping[str, str], actual: Mapping[str, str]) -> list[str]:
    """Names whose fingerprints differ or that only one side has, in order of name."""
    return sorted(
        name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)
    )
