"""A tiny training state, a run folder to save it in, and damage to do to it."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.checkpoint import CheckpointConfig, RunLock, Store

META = {"config": {"width": 8}, "plan_digest": "abc", "names": ["你好", "x"]}
TOKENIZER = {"tokenizer.model": b"\x00\x01bytes", "tokenizer.json": b"{}"}


class State(NamedTuple):
    params: Any
    opt_state: Any
    step: Any
    key: Any


def make_state(step: int) -> State:
    """Every kind of leaf, with values that tell the step; `embed` is large enough to find in a file."""
    embed = np.random.default_rng(step).normal(size=(40, 8)).astype(np.float32)
    params = {
        "embed": jnp.asarray(embed),
        "layers": {"scale": jnp.full((3, 16), step, jnp.bfloat16)},
    }
    moments = ({"mu": jnp.full((40, 8), step / 2, jnp.float32)}, ())
    return State(params, moments, jnp.asarray(step, jnp.int32), jax.random.key(step))


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def equal(one: Any, other: Any) -> bool:
    """Bitwise equality of two pytrees, typed random keys included."""
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and np.array_equal(raw(a), raw(b)), one, other
    )
    return jax.tree.all(same)


class Run:
    """A run folder under test."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.lock = stack.enter_context(RunLock(folder))
        self._stack = stack

    def open(self, **settings: Any) -> Store:
        return Store(self.checkpoints, CheckpointConfig(**settings), lock=self.lock)

    def saved(self, *steps: int, **settings: Any) -> Store:
        """A store that holds the tiny state of each of `steps`."""
        store = self.open(**settings)
        for step in steps:
            store.save(step, make_state(step), META, TOKENIZER)
        store.close()
        return store

    def names(self) -> list[str]:
        return sorted(path.name for path in self.checkpoints.iterdir())

    def data_file(self, step: int) -> Path:
        (path,) = (self.checkpoints / str(step) / "state").glob("ocdbt.process_*/d/*")
        return path


def flip_bit_of(path: Path, array: Any) -> None:
    """Flips one bit of an array inside the file that holds its bytes."""
    contents = bytearray(path.read_bytes())
    where = contents.find(np.ascontiguousarray(array).tobytes())
    assert where >= 0, "array data is expected uncompressed in the file"
    contents[where + 5] ^= 0x10
    path.write_bytes(contents)
