"""Noise on embeddings: how much, where, the same however the batch is computed, and nothing at all at 0."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import ConfigError
from llm_jax.train import NeftuneConfig, StepConfig, make_optimizer, make_schedule, train_step
from llm_jax.train.neftune import embedding_noise
from llm_jax.train.state import TrainState
from tests.tiny import LLAMA as USUAL
from tests.tiny import drawn_params, random_batch
from tests.train.test_step import ADAMW

LLAMA = dataclasses.replace(USUAL, attention="reference")  # compiles fastest
LOUD = NeftuneConfig(alpha=5.0)
D = 32


def noise(segments, rows=None, step=3, config=LOUD):
    segments = jnp.asarray(segments)
    rows = np.arange(len(segments)) if rows is None else rows
    return np.asarray(embedding_noise(config, jnp.int32(step), jnp.asarray(rows), segments, D))


def test_every_segment_gets_the_noise_of_its_own_length_and_padding_none():
    segments = np.array([[1] * 4 + [2] * 10 + [0] * 2, [1] * 16])
    made = noise(segments)
    for at, length in (((0, slice(0, 4)), 4), ((0, slice(4, 14)), 10), ((1, slice(0, 16)), 16)):
        part, most = made[at], 5.0 / np.sqrt(length * D)
        assert 0.95 * most < np.abs(part).max() <= most
        assert part.std() == pytest.approx(most / np.sqrt(3), rel=0.1), "uniform"
        assert abs(part.mean()) < 0.2 * most
    assert not made[0, 14:].any()


def test_noise_depends_on_step_row_and_seed_and_on_nothing_else():
    segments = random_batch(seed=1, rows=6, length=16).segments_BT
    whole = noise(segments)
    np.testing.assert_array_equal(noise(segments[1::2], rows=np.array([1, 3, 5])), whole[1::2])
    np.testing.assert_array_equal(noise(segments), whole)
    others = [noise(segments, step=4), noise(segments, rows=np.arange(6) + 6)]
    others.append(noise(segments, config=NeftuneConfig(alpha=5.0, seed=1)))
    seen = segments > 0
    for other in others:
        assert (other[seen] != whole[seen]).mean() > 0.99
    assert abs(np.corrcoef(whole[0].ravel(), whole[1].ravel())[0, 1]) < 0.2


@pytest.fixture(scope="module")
def state():
    params = drawn_params(LLAMA)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, make_optimizer(ADAMW).init(params), zero + 5, zero, zero)


def step_of(**settings):
    return functools.partial(
        train_step,
        model=LLAMA,
        config=StepConfig(batch_size=4, **settings),
        optimizer=make_optimizer(ADAMW),
        schedule=make_schedule(ADAMW, 10),
        clip_norm=1.0,
    )


def test_without_noise_the_program_draws_nothing(state):
    batch = random_batch(seed=2, rows=4, length=16)
    silent, loud = (
        str(jax.make_jaxpr(step_of(neftune=config))(state, batch))
        for config in (NeftuneConfig(alpha=0.0, seed=9), LOUD)
    )
    assert silent == str(jax.make_jaxpr(step_of())(state, batch))
    assert "random" not in silent
    assert "random_bits" in loud


@pytest.mark.slow
def test_noise_changes_training_and_micro_batches_do_not_change_noise(state):
    batch = random_batch(seed=2, rows=4, length=16)
    (one, a), (two, b), (_, quiet) = (
        jax.jit(step_of(**settings))(state, batch)
        for settings in ({"neftune": LOUD}, {"neftune": LOUD, "micro_batches": 2}, {})
    )
    assert abs(float(a["loss"]) - float(quiet["loss"])) > 1e-3
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), one.params, two.params
    )


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"step\.neftune\.alpha=-1\.0 must be 0"):
        NeftuneConfig(alpha=-1.0)
    with pytest.raises(ConfigError, match=r"step\.neftune\.seed=-1 must be"):
        NeftuneConfig(seed=-1)
