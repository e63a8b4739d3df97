"""The rows of a larger vocabulary: old ones kept bit for bit, new ones started from them.

| start | a new row is |
|---|---|
| `mean` | the mean of the rows of the old pieces that spell it; of all old rows where there are none |
| `mean_cov` | drawn from the normal distribution with the old rows' mean and covariance (2407.05841) |
| `copy_nearest` | the old row whose input embedding is nearest, by angle, to the `mean` start |
| `random` | drawn with mean 0 and the old rows' standard deviation |

The same rule makes the rows of the embedding, of the head and of its bias, each from its own old rows.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.errors import ConfigError
from llm_jax.model import ModelConfig, Params, abstract_params, logical_axes
from llm_jax.sharding import tree_shardings
from llm_jax.train.trainable import VOCAB_AXIS

Init = Literal["mean", "mean_cov", "copy_nearest", "random"]
INITS: tuple[Init, ...] = ("mean", "mean_cov", "copy_nearest", "random")
_BLOCK = 256  # new rows compared at once with all old ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResizeConfig:
    """How a base model gets the rows of an extended vocabulary."""

    init: Literal["auto", "mean", "mean_cov", "copy_nearest", "random"] = "auto"  # auto: measured
    multiple: int = 128  # rows are padded to a multiple of it, so that they shard
    seed: int = 0  # of what is drawn

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise ConfigError(f"resize.multiple={self.multiple} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"resize.seed={self.seed} must be from 0 to 4294967295")


def resize(
    params: Params,
    config: ModelConfig,
    mesh: Mesh,
    spelled: Sequence[Sequence[int]],
    *,
    first_row: int,
    init: Init,
    seed: int = 0,
) -> Params:
    """The parameters with `config.vocab_size` rows, placed on the mesh; other arrays are shared, not copied.

    Args:
      params: of the base, on the same mesh.
      config: of the resized model.
      mesh: where both live.
      spelled: for the new rows, in order, the old ids that spell each; rows behind them are padding.
      first_row: old rows that are kept: the size of the base's tokenizer, since rows behind it stand
        for nothing.
      init: how new rows start.
      seed: of what is drawn.
    """
    padding = config.vocab_size - first_row - len(spelled)
    widest = max(map(len, spelled), default=0)
    ids_NP = np.full((len(spelled) + padding, max(widest, 1)), -1, np.int32)
    for row, ids in enumerate(spelled):
        ids_NP[row, : len(ids)] = ids
    shardings = tree_shardings(mesh, abstract_params(config), logical_axes(config))
    names = [name for name in VOCAB_AXIS if name in params]
    grow = jax.jit(
        functools.partial(_grow, first_row=first_row, init=init),
        out_shardings={name: shardings[name] for name in names},
    )
    return {**params, **grow({name: params[name] for name in names}, ids_NP, jax.random.key(seed))}


def _grow(
    vocabulary: dict[str, jax.Array], ids_NP: jax.Array, key: jax.Array, first_row: int, init: Init
) -> dict[str, jax.Array]:
    """Old rows and new ones of every array with a vocabulary axis."""
    old = {}  # each [V, D], a bias with D = 1
    for name, array in vocabulary.items():
        rows = jnp.moveaxis(array, VOCAB_AXIS[name], 0)[:first_row]
        old[name] = rows.reshape(first_row, -1).astype(jnp.float32)
    if init == "copy_nearest":  # the same one for all arrays
        ids_NP = _nearest(old["embedding"], ids_NP)[:, None]
    grown = {}
    for number, (name, array) in enumerate(vocabulary.items()):
        new_ND = _start(old[name], ids_NP, jax.random.fold_in(key, number), init)
        shape = list(array.shape)
        shape[VOCAB_AXIS[name]] = len(ids_NP)
        new = new_ND.reshape(shape) if array.ndim == 1 or not VOCAB_AXIS[name] else new_ND.T
        kept = jax.lax.slice_in_dim(array, 0, first_row, axis=VOCAB_AXIS[name])
        grown[name] = jnp.concatenate([kept, new.astype(array.dtype)], VOCAB_AXIS[name])
    return grown


def _start(old_VD: jax.Array, ids_NP: jax.Array, key: jax.Array, init: Init) -> jax.Array:
    """The new rows of one array, [N, D]."""
    if init in ("mean", "copy_nearest"):  # the mean of a single row is a copy of it
        return _means(old_VD, ids_NP)
    shape = (ids_NP.shape[0], old_VD.shape[1])
    drawn_ND = jax.random.normal(key, shape)
    if init == "random":
        return drawn_ND * jnp.std(old_VD)
    mean_D = jnp.mean(old_VD, axis=0)
    values_D, vectors_DD = jnp.linalg.eigh(
        jnp.cov(old_VD, rowvar=False).reshape(shape[1], shape[1])
    )
    scale_D = jnp.sqrt(
        jnp.maximum(values_D, 0)
    )  # of fewer rows than columns some are 0, or just below
    return mean_D[None] + (drawn_ND * scale_D[None]) @ vectors_DD.T


def _means(old_VD: jax.Array, ids_NP: jax.Array) -> jax.Array:
    """Means of the rows of each row's ids, [N, D]; -1 is no id, and no ids give the mean of all rows."""

    def add(sum_ND: jax.Array, ids_N: jax.Array) -> tuple[jax.Array, None]:
        rows_ND = jnp.take(old_VD, jnp.maximum(ids_N, 0), axis=0)
        return sum_ND + jnp.where(ids_N[:, None] >= 0, rows_ND, 0), None

    # a column at a time: [N, P, D] would not fit for a large model
    zeros_ND = jnp.zeros((ids_NP.shape[0], old_VD.shape[1]))
    sum_ND, _ = jax.lax.scan(add, zeros_ND, ids_NP.T)
    count_N1 = jnp.sum(ids_NP >= 0, axis=1, keepdims=True)
    return jnp.where(
        count_N1 > 0, sum_ND / jnp.maximum(count_N1, 1), jnp.mean(old_VD, axis=0)[None]
    )


def _nearest(embedding_VD: jax.Array, ids_NP: jax.Array) -> jax.Array:
    """Ids of the old rows at the smallest angle to the means, int32 [N]."""
    unit_VD = embedding_VD / (jnp.linalg.norm(embedding_VD, axis=1, keepdims=True) + 1e-20)
    nearest: Any = lambda mean_D: jnp.argmax(unit_VD @ mean_D).astype(jnp.int32)  # noqa: E731
    return jax.lax.map(nearest, _means(embedding_VD, ids_NP), batch_size=_BLOCK)
