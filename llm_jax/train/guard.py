"""Spikes: a gradient norm or a loss far above those of the latest steps. Such a step is skipped.

The history lies in the optimizer's state and so in every checkpoint: a resumed run judges as an
uninterrupted one. A skipped step leaves no trace in it.

Where the rows become another kind (a phase of the mixture, another batch size) the history begins anew, as at the
start of a run: for `window` steps nothing is a spike. A ramp begins anew once, at its first step. One that is
shorter than the window is over when steps are judged again; in a longer one a loss that rises in a straight line
stands 1.35 deviations above the history of `window` steps before it, however steep the line is.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

DEVIATION = 1.4826  # median absolute deviation -> standard deviation, of normal values
LEAST = 1e-3  # part of the median that a deviation is taken to be at least: a flat history sees no spikes


class Watched(NamedTuple):
    """An optimizer's state, and what the latest steps that were not skipped looked like."""

    inner: Any
    recent: jax.Array  # float32 [window, 2]: gradient norm and loss; NaN before there were any


def watch(optimizer: optax.GradientTransformation, window: int) -> optax.GradientTransformation:
    """The optimizer with a history of `window` steps; itself for 0."""
    if not window:
        return optimizer

    def init(params: Any) -> Watched:
        return Watched(optimizer.init(params), jnp.full((window, 2), jnp.nan, jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Watched]:
        directions, inner = optimizer.update(updates, state.inner, params)
        return directions, Watched(inner, state.recent)

    return optax.GradientTransformation(init, update)


def is_spike(opt_state: Any, grad_norm: jax.Array, loss: jax.Array, deviations: float) -> jax.Array:
    """Whether either is more than `deviations` robust standard deviations above the median of the history.

    False without a history, or before it is full: the first steps of a run fall from a height.
    """
    if not isinstance(opt_state, Watched):
        return jnp.zeros((), bool)
    seen = jnp.stack([grad_norm, loss]).astype(jnp.float32)
    middle = jnp.median(opt_state.recent, axis=0, keepdims=True)
    spread = DEVIATION * jnp.median(jnp.abs(opt_state.recent - middle), axis=0, keepdims=True)
    bound = middle + deviations * jnp.maximum(spread, LEAST * jnp.abs(middle))
    return jnp.any(seen[None] > bound)  # comparisons with NaN are false


def forget(opt_state: Any) -> Any:
    """The state with an empty history, on the same devices."""
    if not isinstance(opt_state, Watched):
        return opt_state
    empty = jax.jit(
        lambda recent: jnp.full_like(recent, jnp.nan), out_shardings=opt_state.recent.sharding
    )
    return opt_state._replace(recent=empty(opt_state.recent))


def remember(opt_state: Any, grad_norm: jax.Array, loss: jax.Array) -> Any:
    """The state with one more step in its history, the oldest left out."""
    if not isinstance(opt_state, Watched):
        return opt_state
    seen = jnp.stack([grad_norm, loss]).astype(jnp.float32)
    return opt_state._replace(recent=jnp.concatenate([opt_state.recent[1:], seen[None]]))
