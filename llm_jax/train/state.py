"""The training state: everything that changes from step to step, as one pytree."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from llm_jax.model import ModelConfig, Params, abstract_params, init_params, logical_axes
from llm_jax.sharding import partition_spec, replicated, tree_shardings
from llm_jax.train.trainable import ALL, Trainable


class TrainState(NamedTuple):
    """Saved whole in every checkpoint. The data position is `step`; there is no other."""

    params: Params
    opt_state: Any
    step: Any  # int32 array: steps done, skipped ones included
    skipped: Any  # int32 array: steps whose loss or gradient was not finite
    skipped_in_row: Any  # int32 array: how many of the latest steps were skipped without a break


def new_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    trainable: Trainable = ALL,
) -> TrainState:
    """State before the first step; the values do not depend on devices or mesh."""
    return _state(init_params(config, key), optimizer, trainable)


def _state(
    params: Params, optimizer: optax.GradientTransformation, trainable: Trainable
) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, optimizer.init(trainable.take(params)), zero, zero, zero)


def state_shardings(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    trainable: Trainable = ALL,
) -> TrainState:
    """NamedShardings of the whole state: Adam's moments lie like their parameters, scalars everywhere.

    Moments of new rows alone may be too few for the mesh's tensor axis; it then does not split them.

    Raises:
      ConfigError: a size of the model does not divide over the mesh.
    """
    abstract = jax.eval_shape(lambda: new_state(config, optimizer, jax.random.key(0), trainable))
    axes = logical_axes(config)
    params = tree_shardings(mesh, abstract_params(config), axes)
    everywhere = replicated(mesh)
    place = lambda leaf, names: NamedSharding(mesh, partition_spec(names, leaf.shape, mesh))  # noqa: E731
    part = jax.eval_shape(trainable.take, abstract_params(config))
    moments = params if trainable == ALL else jax.tree.map(place, part, trainable.of_leaves(axes))
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract.opt_state,
        moments,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(params, opt_state, everywhere, everywhere, everywhere)


def count_trained(config: ModelConfig, trainable: Trainable) -> int:
    """Number of parameters that a stage trains."""
    part = jax.eval_shape(trainable.take, abstract_params(config))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part))


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    trainable: Trainable = ALL,
) -> TrainState:
    """The state as jax.ShapeDtypeStruct with shardings: what a checkpoint is restored into."""
    shapes = jax.eval_shape(lambda: new_state(config, optimizer, jax.random.key(0), trainable))
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, shapes, state_shardings(config, optimizer, mesh, trainable))


def init_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """A new state, born sharded: no device ever holds more than its part."""
    shardings = state_shardings(config, optimizer, mesh)
    make = jax.jit(lambda key: new_state(config, optimizer, key), out_shardings=shardings)
    return make(jax.random.key(seed))


def state_of(
    params: Params,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    trainable: Trainable = ALL,
) -> TrainState:
    """The state before the first step of parameters that are there already; their buffers are given up."""
    shardings = state_shardings(config, optimizer, mesh, trainable)
    make = jax.jit(
        lambda params: _state(params, optimizer, trainable),
        out_shardings=shardings,
        donate_argnums=0,
    )
    return make(params)
