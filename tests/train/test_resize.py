"""Rows of a larger vocabulary: old ones bit for bit, new ones by each rule, written out in numpy."""

import dataclasses
import functools

import numpy as np
import pytest

from llm_jax.sharding import MeshConfig, make_mesh
from llm_jax.train.resize import INITS, resize
from tests.tiny import BLOOM, COHERE, LLAMA, drawn_params

FIRST = 60  # of 64 rows: those behind stand for nothing
SPELLED = [[1, 2, 3], [5], [], [7, 7, 9, 11]]
MODELS = {"untied": LLAMA, "tied": BLOOM, "bias of the head": COHERE}


@functools.cache
def grown(model, init, rows=80, seed=0):
    """Old and new vocabulary arrays with rows first, and both whole trees."""
    params = drawn_params(model)
    wide = dataclasses.replace(model, vocab_size=rows)
    mesh = make_mesh(MeshConfig(fsdp=1))
    new = resize(params, wide, mesh, SPELLED, first_row=FIRST, init=init, seed=seed)
    names = [name for name in ("embedding", "head", "head_bias") if name in params]
    rows_of = lambda tree, name: np.asarray(tree[name].T if name == "head" else tree[name])  # noqa: E731
    return {name: (rows_of(params, name), rows_of(new, name)) for name in names}, params, new


@pytest.mark.parametrize(
    ("model", "init"), list(zip([*MODELS.values(), COHERE], INITS, strict=True)), ids=INITS
)
def test_old_rows_stay_bit_for_bit_and_nothing_else_is_copied(model, init):
    arrays, params, new = grown(model, init)
    assert set(arrays) == {"embedding", *([] if model.tied_embeddings else ["head"]),
                           *(["head_bias"] if model.head_bias else [])}  # fmt: skip
    for old, wide in arrays.values():
        assert len(wide) == 80
        np.testing.assert_array_equal(wide[:FIRST], old[:FIRST])
        assert np.isfinite(wide).all()
    assert new["layers"] is params["layers"]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_mean_is_the_mean_of_the_spelling_and_of_all_old_rows_for_padding(model):
    for old, wide in grown(model, "mean")[0].values():
        for row, ids in enumerate(SPELLED, start=FIRST):
            np.testing.assert_allclose(wide[row], old[ids or range(FIRST)].mean(0), atol=1e-6)
        for row in range(FIRST + len(SPELLED), 80):
            np.testing.assert_allclose(wide[row], old[:FIRST].mean(0), atol=1e-6)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_copy_nearest_copies_one_old_id_into_every_array(model):
    arrays, *_ = grown(model, "copy_nearest")
    old, wide = arrays["embedding"]
    unit = old[:FIRST] / np.linalg.norm(old[:FIRST], axis=1, keepdims=True)
    means = [old[ids or range(FIRST)].mean(0) for ids in [*SPELLED, []]]
    nearest = [int(np.argmax(unit @ mean)) for mean in means]
    assert nearest[1] == 5, "a single old piece is its own neighbour"
    for old, wide in arrays.values():
        np.testing.assert_allclose(wide[FIRST : FIRST + 5], old[nearest], rtol=1e-6)


def test_drawn_rows_have_the_moments_they_promise():
    arrays, *_ = grown(BLOOM, "mean_cov", rows=4_000)
    old, wide = arrays["embedding"]
    drawn = wide[FIRST:]
    np.testing.assert_allclose(drawn.mean(0), old[:FIRST].mean(0), atol=0.02)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(old[:FIRST].T), atol=0.006)
    arrays, *_ = grown(BLOOM, "random", rows=4_000)
    old, wide = arrays["embedding"]
    drawn = wide[FIRST:]
    np.testing.assert_allclose(drawn.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(drawn.std(), old[:FIRST].std(), rtol=0.02)


@pytest.mark.parametrize("init", ["mean_cov", "random"])
def test_what_is_drawn_depends_on_the_seed_alone_and_differs_between_arrays(init):
    one, again, other = (grown(LLAMA, init, seed=seed)[0] for seed in (0, 0, 1))
    for name in one:
        np.testing.assert_array_equal(one[name][1], again[name][1])
        assert not np.array_equal(one[name][1], other[name][1])
    assert not np.allclose(one["embedding"][1][FIRST:], one["head"][1][FIRST:])
