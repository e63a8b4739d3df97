"""The only file that knows Orbax: named arrays to a folder, and back onto any mesh.

Traps it deals with (measured with 0.12.8): a dtype that differs from the saved one is converted
silently, so callers compare with the record first; arrays of size zero cannot be saved, so they are
left out and made again; writing goes on in threads that die with the interpreter, so wait for it; a path
with `[`, `*` or `?` is taken for a pattern, so that nothing is found, or files of another folder.
"""

import glob
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath.gpath import PosixGPath
from orbax.checkpoint import v1 as ocp

ITEM = "state"  # the subfolder that holds the arrays
CHUNK_BYTES = 32 << 20  # of large arrays written within a memory limit
WHOLE_BYTES = 1 << 30  # arrays up to this are one chunk then: see `_layout`
READ_BYTES = 256 << 20  # that may be on their way from files to devices, unless an array is larger
TEMPORARY = "*.orbax-checkpoint-tmp*"  # what a killed save leaves behind

# Orbax logs pages of traceback for every write that fails, and raises it as well: the store tells it in a line
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
# so does asyncio of each of its tasks that failed beside the first
logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
warnings.filterwarnings("ignore", message="coroutine '.*(async_serialize|OrbaxLayout)")
_LATE = (
    "Event loop is closed"  # tensorstore's threads end writes that nobody waits for after a failure
)


def _hush_late_writes() -> None:
    tell = sys.unraisablehook

    def hook(found: Any) -> None:
        if not (found.exc_type is RuntimeError and str(found.exc_value) == _LATE):
            tell(found)

    sys.unraisablehook = hook


_hush_late_writes()


class _Literal(PosixGPath):
    """A path of which no character is part of a pattern; paths made from it are of its class."""

    def glob(self, pattern: str) -> Iterator["_Literal"]:
        """Yields what matches `pattern` in this folder."""
        for found in glob.iglob(os.path.join(glob.escape(os.fspath(self)), pattern)):
            yield self._new(found)


def start_writing(
    folder: str | os.PathLike[str], leaves: Mapping[str, Any], *, memory: int = 0
) -> Any:
    """Starts writing `{name: array}` to the new `folder`; `.result()` of what returns waits, or raises.

    The values are those at the time of the call: buffers may be donated or deleted afterwards. The
    folder appears when everything is in it. All processes call it.

    `memory`: bytes that may be held beside the arrays, more than the largest has; then the call itself waits
    for most of the writing. 0: no limit (measured on a CPU: up to four times the arrays).
    """
    context = ocp.Context()
    # raw values: a damaged byte stays one wrong number, which the fingerprint finds and names. Compressing
    # float32 weights saved 8 % of the space and took 1.5 times as long.
    context.array_options.saving.use_compression = False
    if memory:
        context.memory_options.write_concurrent_bytes = memory
        context.memory_options.transfer_concurrent_bytes = memory
        context.array_options.saving.scoped_storage_options_creator = _layout
    with context:
        return ocp.save_async(
            _Literal(os.path.abspath(folder)),
            _nested(_without_empty(leaves)),
            checkpointable_name=ITEM,
        )


def _layout(key: Any, value: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions:
    """Chunks of an array (Orbax names the arguments). One chunk is written from the array's own memory; several are copied first, all
    at once (measured: 507 MB beside an array of 507 MB, and three times the CPU time). But to read any
    part of a chunk, a process reads and holds all of it, so a large array is divided.
    """
    options = ocp.options.ArrayOptions.Saving.StorageOptions()
    if value.nbytes > WHOLE_BYTES:
        options.chunk_byte_size = CHUNK_BYTES
    return options


def load(
    folder: str | os.PathLike[str], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The wanted arrays, on the shardings asked for; any part of what `folder` holds. All processes call it.

    Raises whatever Orbax raises when files are missing or unreadable; changed values go unnoticed.
    """
    found: dict[str, jax.Array] = {}
    saved = _without_empty(wanted)
    if saved:
        context = ocp.Context()
        context.pytree_options.loading.partial_load = True
        # without a limit, all arrays are in memory twice for a moment
        largest = max(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in saved.values())
        context.memory_options.read_concurrent_bytes = max(largest + 1, READ_BYTES)
        with context:
            tree = ocp.load(
                _Literal(os.path.abspath(folder)), _nested(saved), checkpointable_name=ITEM
            )
        found = {name: _leaf(tree, name) for name in saved}
    for name, leaf in wanted.items():
        if name not in found:
            found[name] = jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)
    return found


def _without_empty(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {name: leaf for name, leaf in leaves.items() if np.prod(leaf.shape) > 0}


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """`{"params/embed": x}` to `{"params": {"embed": x}}`, the form other tools expect in an Orbax folder."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _leaf(tree: Any, name: str) -> Any:
    for part in name.split("/"):
        tree = tree[part]
    return tree
