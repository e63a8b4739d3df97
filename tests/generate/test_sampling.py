"""Sampling: what may be drawn, how often, and from which randomness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import ConfigError
from llm_jax.generate.sampling import SamplingConfig, keep_likeliest, row_keys, sample

P = np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32)  # falling: ids 1, 3, 4, 0, 2
LOGITS = jnp.log(jnp.asarray(P))[None, :]

jitted_sample = jax.jit(sample)
jitted_keep = jax.jit(keep_likeliest)


def kept(top_k, top_p):
    return np.flatnonzero(np.isfinite(np.asarray(jitted_keep(LOGITS, top_k, top_p))[0])).tolist()


def shares(temperature, top_k=0, top_p=1.0, draws=20_000, num_ids=5):
    keys = row_keys(3, jnp.arange(draws), jnp.int32(0))
    rows = jnp.broadcast_to(LOGITS, (draws, 5))
    ids = jitted_sample(keys, rows, temperature, top_k, top_p, num_ids)
    return np.bincount(np.asarray(ids), minlength=5) / draws


@pytest.mark.parametrize(
    ("top_k", "top_p", "ids"),
    [
        (0, 1.0, [0, 1, 2, 3, 4]),
        (1, 1.0, [1]),
        (3, 1.0, [1, 3, 4]),
        (9, 1.0, [0, 1, 2, 3, 4]),
        (0, 0.3, [1]),  # 0.4 alone reaches it
        (0, 0.5, [1, 3]),  # 0.4 does not, 0.65 does
        (0, 0.9, [0, 1, 3, 4]),
        (0, 1e-9, [1]),
        (2, 0.7, [1, 3]),  # of the two left, 0.4 / 0.65 = 0.62 does not reach 0.7
        (2, 0.6, [1]),
    ],
)
def test_top_k_then_top_p_keep_the_fewest_likeliest_ids(top_k, top_p, ids):
    assert kept(top_k, top_p) == ids


def test_of_equal_logits_exactly_k_are_kept_and_the_smallest_is_greedy():
    logits = jnp.zeros((1, 6))
    assert np.isfinite(np.asarray(keep_likeliest(logits, 2, 1.0))).tolist() == [
        [True] * 2 + [False] * 4
    ]
    assert sample(row_keys(0, jnp.arange(1), jnp.int32(0)), logits, 0.0).tolist() == [0]


def test_draws_follow_the_distribution():
    # standard error of a share is at most sqrt(0.25 / 20000) = 0.0035
    np.testing.assert_allclose(shares(1.0), P, atol=0.015)


def test_temperature_sharpens_as_the_formula_says():
    np.testing.assert_allclose(shares(0.5), P**2 / (P**2).sum(), atol=0.015)


def test_temperature_zero_is_the_likeliest_id_whatever_else_is_set():
    assert shares(0.0, top_k=3, top_p=0.5, draws=100).tolist() == [0, 1, 0, 0, 0]


def test_kept_ids_are_drawn_in_proportion_and_others_never():
    found = shares(1.0, top_k=2)
    np.testing.assert_allclose(found, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0], atol=0.015)
    assert found[[0, 2, 4]].sum() == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_rows_of_the_vocabulary_are_never_drawn(temperature):
    found = shares(temperature, num_ids=1)
    assert found.tolist() == [1, 0, 0, 0, 0]


def test_a_row_draws_the_same_alone_and_beside_others():
    rows = jnp.broadcast_to(LOGITS, (8, 5))
    together = jitted_sample(row_keys(7, jnp.arange(8), jnp.int32(4)), rows, 1.0, 0, 0.9, 5)
    alone = jitted_sample(row_keys(7, jnp.array([6]), jnp.int32(4)), LOGITS, 1.0, 0, 0.9, 5)
    assert together[6] == alone[0]


def test_rows_steps_and_seeds_draw_differently():
    def draws(seed, step):
        keys = row_keys(seed, jnp.arange(64), jnp.int32(step))
        return jitted_sample(keys, jnp.zeros((64, 1000)), 1.0, 0, 1.0, 1000).tolist()

    base = draws(0, 0)
    assert len(set(base)) > 50
    assert base != draws(0, 1)
    assert base != draws(1, 0)
    assert base == draws(0, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("seed", -1),
        ("seed", 2**32),
        ("batch_size", 0),
        ("stop", ("a", "")),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"sampling.{field}"):
        SamplingConfig(**{field: value})
