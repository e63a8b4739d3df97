"""Which parameters a stage of training changes: all of them, or the vocabulary's new rows alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

VOCAB_AXIS = {"embedding": 0, "head": 1, "head_bias": 0}  # of the parameters that have one


@dataclasses.dataclass(frozen=True)
class Trainable:
    """Rows of the vocabulary from `first_row` on, in embedding, head and its bias; 0: every parameter.

    Gradients, optimizer state and decay exist for this part only. What is not in it is not computed
    with, so it stays as it is bit for bit, and a frozen body needs no memory for Adam's moments.
    """

    first_row: int = 0

    def take(self, params: Any) -> Any:
        """The part, as a tree of arrays of its own."""
        if not self.first_row:
            return params
        return {
            name: jax.lax.slice_in_dim(params[name], self.first_row, None, axis=axis)
            for name, axis in VOCAB_AXIS.items()
            if name in params
        }

    def put(self, params: Any, part: Any) -> Any:
        """`params` with the part in its place; inverse of `take`."""
        if not self.first_row:
            return part
        joined = {}
        for name, rows in part.items():
            axis = VOCAB_AXIS[name]
            old = jax.lax.slice_in_dim(params[name], 0, self.first_row, axis=axis)
            joined[name] = jnp.concatenate([old, rows], axis=axis)
        return {**params, **joined}

    def of_leaves(self, tree: Any) -> Any:
        """The same choice in a tree with something else in place of each array."""
        if not self.first_row:
            return tree
        return {name: tree[name] for name in VOCAB_AXIS if name in tree}


ALL = Trainable()
