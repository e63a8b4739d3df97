"""Which parameters a stage of training changes. Only these have gradients, optimizer state and decay."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llm_jax.model import is_adapter

VOCAB_AXIS = {"embedding": 0, "head": 1, "head_bias": 0}  # of the parameters that have one


@dataclasses.dataclass(frozen=True)
class Trainable:
    """Some parameters whole, and of the vocabulary's the rows from `first_row` on.

    What is not in it is not computed with, so it stays as it is bit for bit, and needs no memory for
    gradients and for Adam's moments.
    """

    # all; all but embedding, head and its bias; adapters; none whole
    leaves: Literal["all", "body", "adapters", "none"] = "all"
    first_row: int = 0  # of the rows trained in parameters that are not trained whole; 0: none are

    def take(self, params: Any) -> Any:
        """The part, as a tree of arrays of its own."""

        def cut(name: str, array: Any) -> Any:
            return jax.lax.slice_in_dim(array, self.first_row, None, axis=VOCAB_AXIS[name])

        return self._part(params, cut)

    def put(self, params: Any, part: Any) -> Any:
        """`params` with the part in its place; inverse of `take`."""
        if self.leaves == "all":
            return part
        joined = dict(params)
        for name, value in part.items():
            if isinstance(value, dict):
                joined[name] = self.put(params[name], value)
            elif self._is_whole(name):
                joined[name] = value
            else:
                axis = VOCAB_AXIS[name]
                old = jax.lax.slice_in_dim(params[name], 0, self.first_row, axis=axis)
                joined[name] = jnp.concatenate([old, value], axis=axis)
        return joined

    def of_leaves(self, tree: Any) -> Any:
        """The same choice in a tree with something else in place of each array."""
        return self._part(tree, lambda _, leaf: leaf)

    def _part(self, tree: Any, cut: Callable[[str, Any], Any]) -> Any:
        if self.leaves == "all":
            return tree
        found = {}
        for name, value in tree.items():
            if isinstance(value, dict):
                inner = self._part(value, cut)
                if inner:
                    found[name] = inner
            elif self._is_whole(name):
                found[name] = value
            elif self.first_row and name in VOCAB_AXIS:
                found[name] = cut(name, value)
        return found

    def _is_whole(self, name: str) -> bool:
        """Whether the parameter of this name, not of all of them, is trained whole."""
        if self.leaves == "adapters":
            return is_adapter(name)
        return self.leaves == "body" and name not in VOCAB_AXIS


ALL = Trainable()
