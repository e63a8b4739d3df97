"""Host arrays into, and against, parts of device arrays, a bounded piece at a time.

A tensor from a file is a view with its axes in another order than ours. It is turned by `device_put`, in
blocks: numpy's strided copy ran at 0.3 GB/s, this at 1.3, and a transpose fused into the update at 0.1.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PIECE_BYTES = 64 << 20

Index = tuple[slice, ...]


class Piece(NamedTuple):
    """Part of a host array that belongs into one shard."""

    values: np.ndarray  # a view, with as many axes as the shard
    starts: tuple[int, ...]  # where it begins in the shard, one number an axis


def pieces(
    value: np.ndarray, lead: tuple[int, ...], shard: Index, shape: tuple[int, ...]
) -> Iterator[Piece]:
    """What a shard needs of `value`, which is `array[lead]` of an array of this shape."""
    ranges = [s.indices(size)[:2] for s, size in zip(shard, shape, strict=True)]
    outer, inner = ranges[: len(lead)], ranges[len(lead) :]
    part = value[tuple(slice(low, high) for low, high in inner)]
    if not part.size or not all(
        low <= at < high for at, (low, high) in zip(lead, outer, strict=True)
    ):
        return
    part = part[(None,) * len(lead)]
    first = tuple(at - low for at, (low, _) in zip(lead, outer, strict=True))
    # cut across the axis that is outermost in the file
    axis = max(range(part.ndim), key=lambda a: (part.shape[a] > 1, part.strides[a]))
    step = max(1, PIECE_BYTES * part.shape[axis] // part.nbytes)
    for low in range(0, part.shape[axis], step):
        starts = [*first, *(0 for _ in inner)]
        starts[axis] += low
        cut = (slice(None),) * axis + (slice(low, low + step),)
        yield Piece(part[cut], tuple(starts))


class Filled:
    """An array being filled, one buffer per device of this process; updates reuse the buffer."""

    def __init__(self, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding):
        """Starts from zeros; every element is expected to be put."""
        self._leaf, self._sharding = leaf, sharding
        self._shards = sharding.addressable_devices_indices_map(leaf.shape)
        local = sharding.shard_shape(leaf.shape)
        self._buffers = {
            device: jnp.zeros(local, leaf.dtype, device=jax.sharding.SingleDeviceSharding(device))
            for device in self._shards
        }

    def put(self, lead: tuple[int, ...], value: np.ndarray) -> None:
        """Sets `array[lead]`, converted to the array's dtype."""
        for device, index in self._shards.items():
            for piece in pieces(value, lead, index or (), self._leaf.shape):
                values = jax.device_put(piece.values, device)
                self._buffers[device] = _fill(self._buffers[device], values, piece.starts)

    def wait(self) -> None:
        """Until the host arrays that were put are no longer needed."""
        jax.block_until_ready(list(self._buffers.values()))

    def array(self) -> jax.Array:
        """The whole; nothing can be put afterwards."""
        parts, self._buffers = list(self._buffers.values()), {}
        return jax.make_array_from_single_device_arrays(self._leaf.shape, self._sharding, parts)


def same(array: jax.Array, lead: tuple[int, ...], value: np.ndarray, dtype: Any) -> bool:
    """Whether `array[lead]` begins with the bits of `value`, both converted to `dtype`.

    Begins: a padded vocabulary has rows that a file lacks. Of several processes, each compares its part.
    """
    for shard in array.addressable_shards:
        for piece in pieces(value, lead, shard.index, array.shape):
            values = jax.device_put(piece.values, shard.device)
            if not _equal(shard.data, values, piece.starts, np.dtype(dtype)):
                return False
    return True


# Slices are taken of words, not of bfloat16: XLA's CPU backend would convert the whole buffer to float32
# and back (measured: 23 ms in place of 2 for a layer).
WORDS = {2: jnp.uint16, 4: jnp.uint32}


@functools.partial(jax.jit, donate_argnums=0)
def _fill(buffer: jax.Array, values: jax.Array, starts: tuple[Any, ...]) -> jax.Array:
    filled = jax.lax.dynamic_update_slice(
        _words(buffer), _words(values.astype(buffer.dtype)), starts
    )
    return jax.lax.bitcast_convert_type(filled, buffer.dtype)


@functools.partial(jax.jit, static_argnums=3)
def _equal(
    buffer: jax.Array, values: jax.Array, starts: tuple[Any, ...], dtype: np.dtype
) -> jax.Array:
    words = jax.lax.dynamic_slice(_words(buffer), starts, values.shape)
    ours = jax.lax.bitcast_convert_type(words, buffer.dtype)
    return jnp.array_equal(_words(ours.astype(dtype)), _words(values.astype(dtype)))


def _words(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize])
