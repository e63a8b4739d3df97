"""Spikes against a history made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.train.guard import Watched, is_spike, remember, watch

# medians 2 and 4; deviations from them 0 to 0.2, median 0.1: a robust standard deviation of 0.148
NORMS = [1.8, 1.9, 1.9, 2.0, 2.0, 2.1, 2.1, 2.2]
HISTORY = Watched((), jnp.array([[norm, 2 * norm] for norm in NORMS], jnp.float32))


def spike(norm: float, loss: float, deviations: float = 6.0, state: object = HISTORY) -> bool:
    return bool(is_spike(state, jnp.float32(norm), jnp.float32(loss), deviations))


def test_a_norm_or_a_loss_above_the_bound_is_a_spike_and_below_it_none():
    bound = 2.0 + 6 * 1.4826 * 0.1
    assert not spike(bound - 0.01, 4.0)
    assert spike(bound + 0.01, 4.0)
    assert not spike(2.0, 2 * bound - 0.02)
    assert spike(2.0, 2 * bound + 0.02)
    assert not spike(0.0, 0.0), "what falls is welcome"


def test_one_wild_value_in_the_history_hardly_moves_the_bound():
    wild = Watched((), HISTORY.recent.at[0].set(1e6))
    assert spike(3.2, 4.0, state=wild)


def test_before_the_history_is_full_and_without_one_nothing_is_a_spike():
    young = Watched((), HISTORY.recent.at[0].set(jnp.nan))
    assert not spike(1e9, 1e9, state=young)
    assert not spike(1e9, 1e9, state=())


def test_an_even_history_does_not_make_every_wiggle_a_spike():
    flat = Watched((), jnp.full((8, 2), 2.0))
    assert not spike(2.001, 2.001, state=flat)
    assert spike(2.1, 2.0, state=flat)


def test_the_oldest_step_leaves_the_history():
    seen = remember(HISTORY, jnp.float32(9), jnp.float32(8))
    np.testing.assert_allclose(seen.recent[:-1], HISTORY.recent[1:])
    assert seen.recent[-1].tolist() == [9.0, 8.0]
    assert remember((), jnp.float32(9), jnp.float32(8)) == ()


@pytest.mark.parametrize("window", [0, 8])
def test_a_watched_optimizer_moves_parameters_as_it_would_alone(window):
    alone = optax.adamw(0.1)
    watched = watch(alone, window)
    params, grads = {"w": jnp.arange(3.0)}, {"w": jnp.ones(3)}
    expected, _ = alone.update(grads, alone.init(params), params)
    found, state = watched.update(grads, watched.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert isinstance(state, Watched) == bool(window)
