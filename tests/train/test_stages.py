"""New rows alone, then everything: what moves, what has optimizer state, and when."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from llm_jax.errors import ConfigError
from llm_jax.model import Lora
from llm_jax.sharding import MeshConfig, make_mesh
from llm_jax.train import (
    OptimizerConfig,
    StageConfig,
    StepConfig,
    make_optimizer,
    make_schedule,
    plan_stages,
    stage_of,
    state_of,
    train_step,
)
from llm_jax.train.trainable import VOCAB_AXIS, Trainable
from tests.tiny import BLOOM, COHERE, LLAMA, drawn_params, random_batch
from tests.train.test_mesh import run_worker

FIRST = 50
ADAMW = OptimizerConfig(peak_lr=1e-2, warmup_steps=2, weight_decay=0.5)
ADAPTED = dataclasses.replace(LLAMA, lora=Lora(rank=4))
HALF = dataclasses.replace(ADAPTED, param_dtype="bfloat16")


def split(name: str, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Old rows and new rows."""
    rows = np.moveaxis(np.asarray(array), VOCAB_AXIS[name], 0)
    return rows[:FIRST], rows[FIRST:]


@pytest.mark.parametrize("model", [BLOOM, COHERE], ids=["tied", "untied, with a bias"])
def test_only_new_rows_have_optimizer_state_and_move(model):
    optimizer, trainable = make_optimizer(ADAMW), Trainable("none", FIRST)
    mesh = make_mesh(MeshConfig(fsdp=1))
    before = state_of(drawn_params(model), model, optimizer, mesh, trainable)
    step = jax.jit(
        functools.partial(
            train_step,
            model=model,
            config=StepConfig(batch_size=4),
            optimizer=optimizer,
            schedule=lambda _: 0.1,
            clip_norm=1.0,
            trainable=trainable,
        )
    )
    state, metrics = before, {}
    for seed in range(2):
        state, metrics = step(state, random_batch(seed, rows=4, length=16))
    assert metrics["skipped"] == 0
    named = {name for name in VOCAB_AXIS if name in before.params}
    for name in before.params:
        if name in named:
            (old, new), (old_now, new_now) = (split(name, s.params[name]) for s in (before, state))
            np.testing.assert_array_equal(old_now, old)
            assert (new_now != new).all()
        else:
            jax.tree.map(np.testing.assert_array_equal, state.params[name], before.params[name])
    moments = jax.tree.leaves(state.opt_state)
    sizes = sorted(leaf.shape for leaf in moments if leaf.ndim)
    rows = model.vocab_size - FIRST
    shape = {"embedding": (rows, 32), "head": (32, rows), "head_bias": (rows,)}
    assert sizes == sorted([shape[name] for name in named] * 2), "two moments of new rows, no more"


def test_taking_and_putting_back_is_the_identity_and_all_is_the_tree_itself():
    params = drawn_params(COHERE)
    for part in (Trainable("none", FIRST), Trainable("body"), Trainable("body", FIRST)):
        jax.tree.map(np.testing.assert_array_equal, part.put(params, part.take(params)), params)
    assert Trainable().take(params) is params
    assert Trainable().put({}, params) is params


def test_each_stage_warms_up_and_the_second_ends_as_a_run_of_its_own_would():
    rows, everything = plan_stages(
        StageConfig(new_rows_steps=10, new_rows_lr=0.5, new_rows_warmup_steps=4),
        ADAMW,
        30,
        LLAMA,
        FIRST,
    )
    assert np.array([rows.schedule(step) for step in (0, 1, 3, 9)]).tolist() == [
        0.125,
        0.25,
        0.5,
        0.5,
    ]
    alone = make_schedule(ADAMW, 20)
    for step in (10, 11, 20, 29):
        assert everything.schedule(step) == alone(step - 10)
    assert (rows.trainable.first_row, everything.trainable.first_row) == (FIRST, 0)
    # a state between the stages is still the first one's
    assert [stage_of([rows, everything], done) for done in (0, 1, 10, 11, 30)] == [0, 0, 0, 1, 1]
    (only,) = plan_stages(StageConfig(), ADAMW, 30, LLAMA)
    assert only.schedule(7) == make_schedule(ADAMW, 30)(7)


@pytest.mark.parametrize(
    ("settings", "model", "first", "message"),
    [
        ({"new_rows_steps": 5}, LLAMA, 0, "stages.new_rows_steps=5, but there are no new rows"),
        ({"new_rows_steps": 30}, LLAMA, FIRST, "new_rows_steps=30 must be below train.steps=30"),
        ({"new_rows_steps": 29}, LLAMA, FIRST, "optimizer.warmup_steps=2 must be below"),
        ({"train": "new_rows"}, LLAMA, 0, "stages.train='new_rows', but there are no new rows"),
        ({"train": "new_rows", "new_rows_steps": 5}, LLAMA, FIRST, "in the whole run; leave"),
        ({"train": "adapters"}, LLAMA, 0, "'adapters' does not fit model.lora.rank=0"),
        ({"train": "all"}, ADAPTED, 0, "'all' does not fit model.lora.rank=4"),
        ({"train": "adapters_and_new_rows"}, ADAPTED, 0, "but there are no new rows to train"),
        ({}, HALF, FIRST, "model.param_dtype='bfloat16' holds frozen weights only"),
        ({"new_rows_steps": 5, "train": "adapters"}, HALF, FIRST, "holds frozen weights only"),
    ],
)
def test_stages_that_cannot_be_are_refused(settings, model, first, message):
    with pytest.raises(ConfigError, match=message):
        plan_stages(StageConfig(**settings), ADAMW, 30, model, first)


@pytest.mark.parametrize(
    ("train", "model", "first", "part"),
    [
        ("auto", LLAMA, FIRST, Trainable()),
        ("auto", ADAPTED, 0, Trainable("adapters")),
        ("auto", ADAPTED, FIRST, Trainable("adapters", FIRST)),
        ("adapters", HALF, FIRST, Trainable("adapters")),
        ("new_rows", LLAMA, FIRST, Trainable("none", FIRST)),
        ("body", LLAMA, 0, Trainable("body")),
    ],
)
def test_what_is_trained_follows_from_the_model_and_may_be_said(train, model, first, part):
    (only,) = plan_stages(StageConfig(train=train), ADAMW, 30, model, first)
    assert only.trainable == part


@pytest.mark.parametrize("case", ["rows", pytest.param("adapters", marks=pytest.mark.slow)])
def test_on_eight_devices_frozen_rows_stay_bitwise_and_losses_are_those_of_one(case):
    results = run_worker("tests.train.stages_worker", case)
    losses = results["1x1x1x1"]["losses"]
    assert len(set(losses)) == len(losses) == 4
    for mesh, result in results.items():
        assert result["frozen"], mesh
        assert result["moved"], mesh
        np.testing.assert_allclose(result["losses"], losses, rtol=1e-5, err_msg=mesh)
