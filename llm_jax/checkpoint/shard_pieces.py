"""Host arrays into, and against, parts of device arrays, a bounded piece at a time.

A tensor from a file is a view with its axes in another order than ours. It is turned by `device_put`, in
blocks: numpy's strided copy ran at 0.3 GB/s (0.9 in tiles), this at 2.7, and a transpose fused into the
update at 0.1. Where the device is the CPU, its memory is filled and compared in place.
"""

import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PIECE_BYTES = 64 << 20
HOST_PIECE_BYTES = 2 << 20  # stays in the cache between being turned and being copied
TOUCH_BYTES = 32 << 20
THREADS = 4  # that turn and copy; with the piece size they bound what lies between file and array
ALIGNMENT = 64  # bytes; XLA's CPU backend takes such memory as it is and copies any other

Index = tuple[slice, ...]


class Piece(NamedTuple):
    """Part of a host array that belongs into one shard."""

    values: np.ndarray  # a view, with as many axes as the shard
    starts: tuple[int, ...]  # where it begins in the shard, one number an axis


def pieces(
    value: np.ndarray,
    lead: tuple[int, ...],
    shard: Index,
    shape: tuple[int, ...],
    limit: int = PIECE_BYTES,
) -> Iterator[Piece]:
    """What a shard needs of `value`, which is `array[lead]` of an array of this shape.

    Pieces have up to `limit` bytes.
    """
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
    step = max(1, limit * part.shape[axis] // part.nbytes)
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


class HostFilled:
    """`Filled` for CPU devices: host memory that becomes the array without a copy.

    Nothing is compiled, and numpy asks for large pages, which XLA does not: page by page, the system took
    longer to give the memory than the disk to give the file.
    """

    def __init__(self, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding):
        """Starts from memory that is not cleared; every element must be put."""
        self._leaf, self._sharding = leaf, sharding
        self._shards = sharding.addressable_devices_indices_map(leaf.shape)
        local = sharding.shard_shape(leaf.shape)
        self._buffers = {device: _aligned(local, np.dtype(leaf.dtype)) for device in self._shards}

    def put(self, lead: tuple[int, ...], value: np.ndarray) -> None:
        """Sets `array[lead]`, converted to the array's dtype."""
        for device, index in self._shards.items():
            fill = functools.partial(_fill_on_host, self._buffers[device], device)
            _side_by_side(
                fill, pieces(value, lead, index or (), self._leaf.shape, HOST_PIECE_BYTES)
            )

    def wait(self) -> None:
        """Nothing to wait for: `put` has copied."""

    def array(self) -> jax.Array:
        """The whole; nothing can be put afterwards."""
        parts = [jax.device_put(buffer, device) for device, buffer in self._buffers.items()]
        self._buffers = {}
        return jax.make_array_from_single_device_arrays(self._leaf.shape, self._sharding, parts)


def filled(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> Filled | HostFilled:
    """An array to be filled, in the way that is right for its devices."""
    return HostFilled(leaf, sharding) if is_on_host(sharding) else Filled(leaf, sharding)


def is_on_host(sharding: jax.sharding.Sharding) -> bool:
    """Whether such an array lies in host memory."""
    return all(device.platform == "cpu" for device in sharding.device_set)


def _fill_on_host(buffer: np.ndarray, device: Any, piece: Piece) -> None:
    turned = _turned(piece.values, buffer.dtype, device)
    _host_words(buffer[_region(piece)])[...] = _host_words(turned)


def _side_by_side(work: Callable[[Piece], Any], found: Iterator[Piece]) -> list[Any]:
    """`work` on every piece, on threads if there are several; raises what it raises."""
    todo = list(found)
    if len(todo) < 2:
        return [work(piece) for piece in todo]
    return list(_threads().map(work, todo))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Lasting ones: each new thread has the system give it memory anew, twice the page faults in all."""
    return ThreadPoolExecutor(THREADS, "shard pieces")


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory for an array that XLA's CPU backend can hold without copying it."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    # before turned blocks touch it in strides: 0.05 s of system time in place of 0.6 for 507 MB
    starts = range(0, raw.size, TOUCH_BYTES)
    list(_threads().map(_touch, (raw[at : at + TOUCH_BYTES] for at in starts)))
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _touch(memory: np.ndarray) -> None:
    """Makes the system give the pages of unused memory."""
    memory[::4096] = 0


def _turned(values: np.ndarray, dtype: np.dtype, device: Any) -> np.ndarray:
    """The values in row-major order and the dtype, converted as the device converts."""
    if values.dtype == dtype and values.flags.c_contiguous:
        return values
    array = jax.device_put(values, device)
    return np.asarray(array if array.dtype == dtype else array.astype(dtype))


def _region(piece: Piece) -> Index:
    """Where a piece lies in its shard."""
    pairs = zip(piece.starts, piece.values.shape, strict=True)
    return tuple(slice(start, start + size) for start, size in pairs)


def _host_words(values: np.ndarray) -> np.ndarray:
    """The bits; numpy copies and compares bfloat16 one element at a time."""
    return values.view(f"u{values.dtype.itemsize}")


def same(array: jax.Array, lead: tuple[int, ...], value: np.ndarray, dtype: Any) -> bool:
    """Whether `array[lead]` begins with the bits of `value`, both converted to `dtype`.

    Begins: a padded vocabulary has rows that a file lacks. Of several processes, each compares its part.
    """
    dtype = np.dtype(dtype)
    for shard in array.addressable_shards:
        cut = functools.partial(pieces, value, lead, shard.index, array.shape)
        if shard.device.platform == "cpu":
            host = np.asarray(shard.data)  # a view
            check = functools.partial(_equal_on_host, host, dtype, shard.device)
            if not all(_side_by_side(check, cut(HOST_PIECE_BYTES))):
                return False
            continue
        for piece in cut():
            values = jax.device_put(piece.values, shard.device)
            if not _equal(shard.data, values, piece.starts, dtype):
                return False
    return True


def _equal_on_host(host: np.ndarray, dtype: np.dtype, device: Any, piece: Piece) -> bool:
    ours = _turned(host[_region(piece)], dtype, device)
    return np.array_equal(_host_words(ours), _host_words(_turned(piece.values, dtype, device)))


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
