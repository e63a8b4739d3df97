"""The training step: what it optimises, and that packing, accumulation and bad steps do not change it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.data.batch import Batch
from llm_jax.errors import ConfigError
from llm_jax.model import forward, init_params, target_loss
from llm_jax.train import (
    OptimizerConfig,
    StepConfig,
    make_optimizer,
    make_schedule,
    new_state,
    train_step,
)
from llm_jax.train.optimizer import decay_mask
from llm_jax.train.step import accumulate
from tests.tiny import BLOOM, LLAMA, random_batch

ADAMW = OptimizerConfig(peak_lr=1e-2, warmup_steps=2, weight_decay=0.1)


@functools.cache
def stepper(model=LLAMA, optimizer=ADAMW):
    """A jitted step with everything but state and batch filled in, and its first state; shared by tests."""
    adamw = make_optimizer(optimizer)
    step = functools.partial(
        train_step,
        model=model,
        config=StepConfig(batch_size=4),
        optimizer=adamw,
        schedule=make_schedule(optimizer, 10),
        clip_norm=optimizer.clip_norm,
    )
    return jax.jit(step), new_state(model, adamw, jax.random.key(0))


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def documents_of(batch: Batch) -> list[Batch]:
    """Each segment of each row as a batch of its own: one row that holds nothing else."""
    alone = []
    for row in range(len(batch.tokens_BT)):
        for segment in range(1, batch.segments_BT[row].max() + 1):
            at = np.flatnonzero(batch.segments_BT[row] == segment)
            document = Batch(*(np.zeros_like(array[:1]) for array in batch))
            for to, array in zip(document, batch, strict=True):
                to[0, : len(at)] = array[row, at]
            document.segments_BT[0, : len(at)] = 1
            alone.append(document)
    return alone


@pytest.mark.parametrize("model", [LLAMA, BLOOM], ids=["rope", "alibi"])
def test_a_packed_batch_has_the_loss_and_gradients_of_its_documents_alone(model):
    batch = random_batch(seed=5, rows=2, length=16)
    params = init_params(model, jax.random.key(1))

    def nats(params, part):
        return target_loss(params, model, *part)[0]

    gradient = jax.jit(jax.value_and_grad(nats))
    packed, packed_grads = gradient(params, batch)
    alone, alone_grads = 0.0, jax.tree.map(jnp.zeros_like, params)
    for document in documents_of(batch):
        loss, grads = gradient(params, document)
        alone, alone_grads = alone + loss, jax.tree.map(jnp.add, alone_grads, grads)
    np.testing.assert_allclose(packed, alone, rtol=1e-5)
    assert_trees_close(packed_grads, alone_grads, rtol=1e-4, atol=1e-5)


def test_micro_batches_with_uneven_targets_equal_one_large_batch():
    batch = random_batch(seed=2, rows=4, length=16)
    batch.loss_mask_BT[0] = 0  # one row without any target: a mean of means would notice
    params = init_params(LLAMA, jax.random.key(0))

    def loss(params, part):
        nats, sums = target_loss(params, LLAMA, *part)
        return nats / batch.loss_mask_BT.sum(), sums

    gradient = jax.grad(loss, has_aux=True)
    add = jax.jit(accumulate, static_argnums=(0, 3))
    whole, parts = add(gradient, params, batch, 1), add(gradient, params, batch, 2)
    assert float(whole[0].targets) == float(parts[0].targets) == batch.loss_mask_BT.sum()
    assert_trees_close(whole, parts, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_mean_over_counted_targets_and_starts_near_ln_v():
    step, state = stepper()
    batch = random_batch(seed=2, rows=4, length=16)
    _, metrics = step(state, batch)
    logits, _ = forward(state.params, LLAMA, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    counted = np.nonzero(batch.loss_mask_BT)
    by_hand = -np.mean([log_p[b, t, batch.targets_BT[b, t]] for b, t in zip(*counted, strict=True)])
    np.testing.assert_allclose(metrics["loss"], by_hand, rtol=1e-5)
    assert abs(by_hand - np.log(64)) < 0.5


def test_one_step_is_adamw_written_out_by_hand():
    optimizer = dataclasses.replace(ADAMW, clip_norm=0.25)
    step, state = stepper(optimizer=optimizer)
    batch = random_batch(seed=2, rows=4, length=16)

    def loss(params):
        nats, sums = target_loss(params, LLAMA, *batch)
        return nats / sums.targets

    grads = jax.jit(jax.grad(loss))(state.params)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    new, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert norm > 0.25, "the test must exercise clipping"
    lr = 1e-2 / 2  # first of two warm-up steps
    for name, decay in (("embedding", 0.1), ("final_norm", 0.0)):
        g, p, q = (
            (t[name]["scale"] if name == "final_norm" else t[name])
            for t in (grads, state.params, new.params)
        )
        g, p = np.asarray(g, np.float64) * 0.25 / norm, np.asarray(p, np.float64)
        m_hat, v_hat = g, g**2  # bias correction undoes (1 - beta) at the first step
        np.testing.assert_allclose(
            q, p - lr * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * p), rtol=2e-4, atol=2e-6
        )


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts():
    step, state = stepper()
    good = random_batch(seed=2, rows=4, length=16)
    bad = good._replace(loss_mask_BT=np.where(good.loss_mask_BT > 0, np.float32(np.inf), 0))
    state, _ = step(state, good)
    after, metrics = step(state, bad)
    assert_trees_close(
        (after.params, after.opt_state), (state.params, state.opt_state), rtol=0, atol=0
    )
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (2, 1, 1)
    assert not np.isfinite(metrics["loss"])
    again, _ = step(after, bad)
    assert int(again.skipped_in_row) == 2
    recovered, metrics = step(again, good)
    assert (int(recovered.skipped), int(recovered.skipped_in_row)) == (2, 0)
    assert np.isfinite(metrics["loss"])


def test_an_overflowing_gradient_is_skipped_and_not_silently_zeroed():
    step, state = stepper()
    state = state._replace(params={**state.params, "head": state.params["head"] * 1e30})
    after, metrics = step(state, random_batch(seed=2, rows=4, length=16))
    assert not np.isfinite(metrics["grad_norm"])
    assert int(after.skipped) == 1


def test_a_batch_without_targets_is_a_zero_and_not_a_nan():
    step, state = stepper()
    batch = random_batch(seed=2, rows=4, length=16)
    _, metrics = step(state, batch._replace(loss_mask_BT=np.zeros_like(batch.loss_mask_BT)))
    assert float(metrics["loss"]) == 0.0


def test_schedules_reach_their_corners():
    config = OptimizerConfig(
        peak_lr=1.0, warmup_steps=4, final_lr_fraction=0.1, decay_fraction=0.25
    )

    def rates(kind):
        schedule = make_schedule(dataclasses.replace(config, schedule=kind), 20)
        return np.array([np.asarray(schedule(step)) for step in range(20)])

    for kind in ("cosine", "linear", "wsd", "constant"):
        np.testing.assert_allclose(rates(kind)[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    assert rates("cosine")[-1] == pytest.approx(0.1)
    assert rates("linear")[-1] == pytest.approx(0.1)
    np.testing.assert_allclose(np.diff(rates("linear")[4:]), -0.9 / 15, rtol=1e-5)
    np.testing.assert_allclose(rates("wsd")[4:16], 1.0)
    np.testing.assert_allclose(rates("wsd")[15:], np.linspace(1.0, 0.1, 5), rtol=1e-5)
    np.testing.assert_allclose(rates("constant")[4:], 1.0)


def test_weight_decay_spares_biases_and_norm_scales():
    mask = decay_mask(init_params(BLOOM, jax.random.key(0)))
    spared = {
        jax.tree_util.keystr(path)
        for path, decays in jax.tree_util.tree_leaves_with_path(mask)
        if not decays
    }
    assert all("bias" in name or "scale" in name for name in spared)
    assert mask["embedding"]
    assert mask["layers"]["attention"]["query"]
    assert not mask["layers"]["attention"]["query_bias"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: StepConfig(batch_size=6, micro_batches=4),
            "step.batch_size=6 must be a multiple of step.micro_batches=4",
        ),
        (lambda: StepConfig(spike_window=4), "step.spike_window=4 must be at least 8, or 0"),
        (lambda: StepConfig(spike_deviations=0), "step.spike_deviations=0 must be positive"),
        (lambda: StepConfig(batch_size=0), "step.batch_size=0 must be at least 1"),
        (lambda: OptimizerConfig(peak_lr=0.0), "optimizer.peak_lr=0.0 must be above 0"),
        (lambda: OptimizerConfig(beta2=1.0), "optimizer.beta2=1.0 must be at least 0 and below 1"),
        (lambda: make_schedule(ADAMW, 2), "optimizer.warmup_steps=2 must be below train.steps=2"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


def test_the_optimizer_directions_are_those_of_optax_adamw():
    """Three steps against optax.adamw itself: our split into direction and learning rate loses nothing."""
    params = {"w": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}
    ours, theirs = (
        make_optimizer(ADAMW),
        optax.adamw(0.1, b1=0.9, b2=0.95, weight_decay=0.1, mask=decay_mask),
    )
    a, b, state_a, state_b = params, params, ours.init(params), theirs.init(params)
    for scale in (1.0, -0.5, 2.0):
        grads = jax.tree.map(lambda p, s=scale: s * jnp.ones_like(p), params)
        directions, state_a = ours.update(grads, state_a, a)
        a = jax.tree.map(lambda p, d: p - 0.1 * d, a, directions)
        updates, state_b = theirs.update(grads, state_b, b)
        b = optax.apply_updates(b, updates)
    assert_trees_close(a, b, rtol=1e-6)
