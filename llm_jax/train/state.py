"""The training state: everything that changes from step to step, as one pytree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from llm_jax.model import ModelConfig, Params, abstract_params, init_params, logical_axes
from llm_jax.sharding import replicated, tree_shardings


class TrainState(NamedTuple):
    """Saved whole in every checkpoint. The data position is `step`; there is no other."""

    params: Params
    opt_state: Any
    step: Any  # int32 array: steps done, skipped ones included
    skipped: Any  # int32 array: steps whose loss or gradient was not finite
    skipped_in_row: Any  # int32 array: how many of the latest steps were skipped without a break


def new_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """State before the first step; the values do not depend on devices or mesh."""
    params = init_params(config, key)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, optimizer.init(params), zero, zero, zero)


def state_shardings(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh
) -> TrainState:
    """NamedShardings of the whole state: Adam's moments lie like their parameters, scalars everywhere.

    Raises:
      ConfigError: a size of the model does not divide over the mesh.
    """
    abstract = jax.eval_shape(lambda: new_state(config, optimizer, jax.random.key(0)))
    params = tree_shardings(mesh, abstract_params(config), logical_axes(config))
    everywhere = replicated(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract.opt_state,
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(params, opt_state, everywhere, everywhere, everywhere)


def abstract_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state as jax.ShapeDtypeStruct with shardings: what a checkpoint is restored into."""
    shapes = jax.eval_shape(lambda: new_state(config, optimizer, jax.random.key(0)))
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, shapes, state_shardings(config, optimizer, mesh))


def init_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """A new state, born sharded: no device ever holds more than its part."""
    shardings = state_shardings(config, optimizer, mesh)
    make = jax.jit(lambda key: new_state(config, optimizer, key), out_shardings=shardings)
    return make(jax.random.key(seed))
