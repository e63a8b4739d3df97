"""Spikes against a history made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.train import ALL, Stage, TrainState, staged_step
from llm_jax.train.guard import Watched, forget, is_spike, remember, watch

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


@pytest.mark.parametrize("window", [8, 128])
def test_what_rises_in_a_straight_line_is_no_spike_however_steep(window):
    for slope in (1e-3, 1.0, 1e3):
        line = 2.0 + slope * np.arange(window + 1)
        ramp = Watched((), jnp.asarray(np.stack([line[:-1]] * 2, axis=1), jnp.float32))
        assert not spike(line[-1], line[-1], deviations=2.0, state=ramp)
        assert spike(line[-1] + window * slope, 0.0, deviations=2.0, state=ramp)


def test_where_the_rows_change_the_history_begins_anew_and_nowhere_else():
    watched = watch(optax.sgd(1.0), 8)
    state = TrainState({}, watched.init({}), jnp.int32(0), jnp.int32(0), jnp.int32(0))

    def step(state, seen):
        now = state._replace(opt_state=remember(state.opt_state, seen, seen))
        return now, is_spike(state.opt_state, seen, seen, 6.0)

    def spikes(start: int, state: TrainState, turns: set[int]) -> tuple[list[int], TrainState]:
        one_step = staged_step([Stage(0, ALL, lambda _: 0.0)], [step], start, no_stage, turns)
        found = []
        for number in range(start, 30):
            loss = 2.0 + 0.01 * (number % 3) + (5.0 if number >= 12 else 0.0) + 5.0 * (number == 25)
            state, spike = one_step(state, jnp.float32(loss))
            found += [number] if spike else []
        return found, state

    assert 12 in spikes(0, state, set())[0], "another mixture looks like a spike"
    found, end = spikes(0, state, {12})
    assert found == [25], "what is one after it is found once the history is full again"
    # resumed at the very step: the saved state still has the history of before
    for number in range(12):
        state, _ = step(state, jnp.float32(2.0 + 0.01 * (number % 3)))
    again, resumed = spikes(12, state, {12})
    assert again == found
    jax.tree.map(np.testing.assert_array_equal, resumed.opt_state, end.opt_state)
    assert forget(()) == ()


def no_stage(state, trainable):
    raise AssertionError("there is only one stage")


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
