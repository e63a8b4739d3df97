"""Losses of a model: those of its logits, which neither training nor evaluation ever holds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.eval import perplexity
from llm_jax.kernels.cross_entropy import xla_tiled
from llm_jax.model import (
    abstract_params,
    forward,
    head_weights,
    hidden_states,
    init_params,
    target_loss,
    target_nats,
)
from llm_jax.train import (
    OptimizerConfig,
    StepConfig,
    make_optimizer,
    make_schedule,
    new_state,
    train_step,
)
from tests.shapes import largest_array
from tests.tiny import BLOOM, LLAMA, random_batch

# logits of a batch, 4 * 64 * 640 elements, are by far the largest array a plain loss would hold
WIDE = dataclasses.replace(LLAMA, vocab_size=640, num_layers=1, attention="xla_chunked")
ROWS, LENGTH = 4, 64
LOGITS = ROWS * LENGTH * WIDE.vocab_size


@pytest.fixture(autouse=True)
def tiles_of_16_rows(monkeypatch):
    monkeypatch.setattr(xla_tiled, "TILE_BYTES", 4 * 16 * WIDE.vocab_size)


# a head whose logits are scaled, shifted and capped
CAPPED = dataclasses.replace(LLAMA, head_bias=True, logit_multiplier=3.0, logit_soft_cap=1.5)


@pytest.mark.parametrize(
    "model",
    [pytest.param(LLAMA, marks=pytest.mark.slow), BLOOM, CAPPED],
    ids=["own head", "tied", "capped"],
)
def test_the_loss_and_its_gradients_are_those_of_the_logits(model):
    batch = random_batch(seed=3, rows=2, length=24)
    model = dataclasses.replace(model, num_layers=1, attention="reference")  # compiles fast
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(2))
    params |= {"head_bias": jnp.linspace(-1.0, 1.0, 64)} if model.head_bias else {}

    def from_logits(params):
        logits, _ = forward(params, model, *batch[:1], *batch[2:4])
        log_p = jax.nn.log_softmax(logits)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nats = -jnp.take_along_axis(log_p, batch.targets_BT[..., None], axis=-1)[..., 0]
        return ((nats + 0.01 * log_z**2) * batch.loss_mask_BT).sum()

    def fused(params):
        return target_loss(params, model, *batch, z_loss=0.01)[0]

    wanted, got = (jax.jit(jax.value_and_grad(f))(params) for f in (from_logits, fused))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), got, wanted)


def test_hidden_states_times_the_head_are_the_logits_of_which_scores_tell_the_targets():
    batch = random_batch(seed=4, rows=2, length=16)
    params = jax.jit(init_params, static_argnums=0)(BLOOM, jax.random.key(2))

    @jax.jit
    def by_all_ways(params):
        given = (params, BLOOM, *batch[:1], *batch[2:4])
        logits_BTV, (x_BTD, cache) = forward(*given)[0], hidden_states(*given)
        assert cache is None
        nats_BT, log_z_BT = target_nats(params, BLOOM, *batch[:4])
        return logits_BTV, x_BTD @ head_weights(params, BLOOM), nats_BT, log_z_BT

    logits, product, nats, log_z = map(np.asarray, by_all_ways(params))
    np.testing.assert_allclose(product, logits, atol=1e-5)
    picked = np.take_along_axis(logits, batch.targets_BT[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(log_z - nats, picked, atol=1e-5)


def test_the_head_of_bfloat16_computation_keeps_its_float32():
    rough = dataclasses.replace(LLAMA, dtype="bfloat16")
    stored = abstract_params(rough)
    assert jax.eval_shape(lambda p: head_weights(p, rough), stored).dtype == jnp.float32


def shapes_of_a_batch():
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype),
        random_batch(0, ROWS, LENGTH, WIDE.vocab_size),
    )


def test_a_compiled_training_step_holds_no_logits_of_its_batch():
    model = dataclasses.replace(WIDE, tied_embeddings=True)
    config = OptimizerConfig(warmup_steps=2)
    optimizer = make_optimizer(config)
    step = functools.partial(
        train_step,
        model=model,
        config=StepConfig(batch_size=ROWS, z_loss=1e-4),
        optimizer=optimizer,
        schedule=make_schedule(config, 10),
        clip_norm=1.0,
    )
    state = jax.eval_shape(lambda: new_state(model, optimizer, jax.random.key(0)))
    program = jax.jit(step).lower(state, shapes_of_a_batch()).compile()
    assert largest_array(program) <= LOGITS / 2


def test_compiled_evaluation_holds_no_logits_of_its_batch():
    batch = shapes_of_a_batch()
    score = perplexity._token_nats
    program = score.lower(abstract_params(WIDE), WIDE, *batch[:4]).compile()
    assert largest_array(program) <= LOGITS / 2

    plain = jax.jit(lambda params, batch: forward(params, WIDE, *batch[:1], *batch[2:4])[0])
    assert largest_array(plain.lower(abstract_params(WIDE), batch).compile()) == LOGITS
