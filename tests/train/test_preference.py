"""Preferences: the loss by hand, packed pairs, the reference below the adapters, and a toy set that is learned."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.data.batch import Batch
from llm_jax.errors import ConfigError
from llm_jax.model import Lora, adapters_of, without_adapters
from llm_jax.train import (
    ALL,
    Objective,
    PreferenceConfig,
    StepConfig,
    Trainable,
    make_optimizer,
    preference_step,
)
from llm_jax.train.optimizer import OptimizerConfig
from llm_jax.train.preference import count_pairs, preference_loss
from llm_jax.train.state import TrainState
from tests.tiny import LLAMA, drawn_params

PLAIN = dataclasses.replace(LLAMA, attention="reference")  # compiles fastest
ADAPTED = dataclasses.replace(PLAIN, lora=Lora(rank=4))
ADAMW = OptimizerConfig(weight_decay=0.0)


def rows_of(segments, mask):
    segments, mask = np.array(segments, np.int32), np.array(mask, np.float32)
    zeros = np.zeros_like(segments)
    return Batch(zeros, zeros, zeros, segments, mask)


# two pairs packed in a row, then a row whose third segment has no partner
HAND = rows_of(
    [[1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 0], [1, 1, 1, 2, 2, 3, 3, 3, 0, 0, 0]],
    [[0, 1, 1, 0, 1, 0, 1, 0, 1, 1, 0], [1, 1, 1, 0, 1, 0, 1, 1, 0, 0, 0]],
)
NATS = np.array(
    [[9, 1, 2, 9, 4, 9, 3, 9, 1, 1, np.inf], [1, 1, 1, 9, 2.5, 9, 5, 5, 9, 9, 0]], np.float32
)
REFERENCE = np.array(
    [[9, 2, 2, 9, 3, 9, 2, 9, 1, 2, 9], [1, 1, 2, 9, 2, 9, 1, 1, 9, 9, 9]], np.float32
)
# log ratios by hand. pair 1: better (2-1)+(2-2) = 1, worse 3-4 = -1; pair 2: better 2-3 = -1,
# worse (1-1)+(2-1) = 1; pair 3: better 0+0+1 = 1, worse 2-2.5 = -0.5
CHOSEN, REJECTED = np.array([1.0, -1.0, 1.0]), np.array([-1.0, 1.0, -0.5])


def minus_log_sigmoid(x):
    return np.log1p(np.exp(-x))


def test_the_dpo_loss_and_its_gradient_are_those_derived_by_hand():
    dpo = Objective("dpo", beta=0.5)
    total = lambda nats: preference_loss(nats, jnp.asarray(REFERENCE), HAND, dpo)  # noqa: E731
    sums = total(jnp.asarray(NATS))
    lead = 0.5 * (CHOSEN - REJECTED)
    np.testing.assert_allclose(sums.loss, minus_log_sigmoid(lead).sum(), rtol=1e-6)
    assert float(sums.accuracy) == 2
    np.testing.assert_allclose(sums.chosen_reward, 0.5 * CHOSEN.sum(), rtol=1e-6)
    np.testing.assert_allclose(sums.rejected_reward, 0.5 * REJECTED.sum(), rtol=1e-6)
    assert float(count_pairs(HAND)) == 3
    # d loss / d nats of the better answer is beta sigmoid(-lead) at each of its targets, minus that of the worse
    slope = 0.5 / (1 + np.exp(lead))
    wanted = np.zeros_like(NATS)
    wanted[0, 1:3], wanted[0, 4] = slope[0], -slope[0]
    wanted[0, 6], wanted[0, 8:10] = slope[1], -slope[1]
    wanted[1, :3], wanted[1, 4] = slope[2], -slope[2]
    got = jax.grad(lambda nats: total(nats).loss)(jnp.asarray(NATS))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)


def test_label_smoothing_mixes_the_other_order_and_simpo_takes_means_and_a_margin():
    smooth = Objective("dpo", beta=0.5, label_smoothing=0.1)
    lead = 0.5 * (CHOSEN - REJECTED)
    wanted = (0.9 * minus_log_sigmoid(lead) + 0.1 * minus_log_sigmoid(-lead)).sum()
    got = preference_loss(jnp.asarray(NATS), jnp.asarray(REFERENCE), HAND, smooth).loss
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    simpo = Objective("simpo", beta=2.0, margin=0.25)
    means = np.array([-3 / 2 + 4, -3 + 1, -1 + 2.5])
    wanted = minus_log_sigmoid(2 * (means - 0.25)).sum()
    got = preference_loss(jnp.asarray(NATS), None, HAND, simpo).loss
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.oracle
def test_losses_are_those_of_trl_in_torch():
    """`sigmoid` of DPOTrainer and `simpo` of CPOTrainer, trl 0.24, on summed and mean log-probabilities."""
    torch = pytest.importorskip("torch")
    logsigmoid = torch.nn.functional.logsigmoid
    rng = np.random.default_rng(0)
    chosen, rejected, ref_chosen, ref_rejected = torch.tensor(-rng.exponential(20, (4, 50)))
    lengths = torch.tensor(rng.integers(1, 30, (2, 50)).astype(float))
    rows = rows_of([[1, 2]] * 50, [[1.0, 1.0]] * 50)
    pair = lambda a, b: jnp.asarray(-np.stack([a, b], 1), jnp.float32)  # noqa: E731
    for beta, smoothing, gamma in ((0.1, 0.0, 0.5), (0.5, 0.2, 1.0)):
        logits = (chosen - rejected) - (ref_chosen - ref_rejected)
        dpo = -logsigmoid(beta * logits) * (1 - smoothing) - logsigmoid(-beta * logits) * smoothing
        config = Objective("dpo", beta, label_smoothing=smoothing)
        nats, reference = pair(chosen, rejected), pair(ref_chosen, ref_rejected)
        got = preference_loss(nats, reference, rows, config).loss
        np.testing.assert_allclose(got, dpo.sum(), rtol=1e-5)
        means = (chosen / lengths[0], rejected / lengths[1])
        logits = means[0] - means[1] - gamma / beta
        simpo = (
            -logsigmoid(beta * logits) * (1 - smoothing) - logsigmoid(-beta * logits) * smoothing
        )
        config = Objective("simpo", beta, gamma / beta, smoothing)
        got = preference_loss(pair(*means), None, rows, config).loss
        np.testing.assert_allclose(got, simpo.sum(), rtol=1e-5)


def toy_pairs(count=8, prompt=4, answer=4, packed=1):
    """Pairs whose better answers hold ids below 32 and worse ones ids above, `packed` to a row."""
    rng = np.random.default_rng(3)
    size = prompt + answer
    shape = (count // packed, 2 * size * packed)
    tokens, targets, positions, segments = np.zeros((4, *shape), np.int32)
    made = Batch(tokens, targets, positions, segments, np.zeros(shape, np.float32))
    for index in range(count):
        question = rng.integers(0, 64, prompt)
        for side, ids in enumerate((rng.integers(0, 32, answer), rng.integers(32, 64, answer))):
            segment = 2 * (index % packed) + side
            place = (index // packed, slice(size * segment, size * (segment + 1)))
            whole = np.concatenate([question, ids])
            made.tokens_BT[place] = whole
            made.targets_BT[place] = np.append(whole[1:], 0)
            made.positions_BT[place] = np.arange(size)
            made.segments_BT[place] = segment + 1
            made.loss_mask_BT[place][prompt - 1 : -1] = 1
    return made


@functools.cache
def stepper(
    model=ADAPTED,
    trainable=Trainable("adapters"),
    micro_batches=1,
    method: Literal["dpo", "simpo"] = "dpo",
):
    """A jitted step and its first state."""
    optimizer = make_optimizer(ADAMW)
    params = drawn_params(model)
    params["final_norm"]["scale"] = np.ones(model.embed_dim, np.float32)  # or logits could not grow
    if model.lora.rank:  # as training starts: B is 0
        for part in params["layers"].values():
            part.update(
                {name: np.zeros_like(x) for name, x in part.items() if name.endswith("_lora_b")}
            )
    zero = jnp.zeros((), jnp.int32)
    step = functools.partial(
        preference_step,
        model=model,
        config=StepConfig(batch_size=8, micro_batches=micro_batches),
        objective=Objective(method, beta=0.5 if method == "dpo" else 2.0),
        optimizer=optimizer,
        schedule=lambda _: 0.03,
        clip_norm=1.0,
        trainable=trainable,
    )
    state = TrainState(params, optimizer.init(trainable.take(params)), zero, zero, zero)
    return jax.jit(step), state


def test_with_adapters_the_model_below_is_the_reference_and_a_toy_set_is_learned():
    step, first = stepper()
    batch = toy_pairs()
    state, metrics = step(first, batch)
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-6)
    assert (float(metrics["pairs"]), float(metrics["target_tokens"])) == (8, 64)
    for _ in range(30):
        state, metrics = step(state, batch)
    assert float(metrics["preference_accuracy"]) == 1
    assert float(metrics["loss"]) < 0.3
    chosen, rejected = (float(metrics[f"{side}_reward"]) for side in ("chosen", "rejected"))
    assert chosen > 0 > rejected
    assert float(metrics["reward_margin"]) == pytest.approx(chosen - rejected)
    before, after = (without_adapters(s.params, ADAPTED)[0] for s in (first, state))
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.slow
def test_a_reference_that_is_given_and_micro_batches_and_packing_change_nothing():
    step, state = stepper()
    # away from the start, where the policy is the reference
    params = {**state.params, "layers": drawn_params(ADAPTED, seed=4)["layers"]}
    state = state._replace(params=params)
    batch = toy_pairs()
    below, bare = without_adapters(state.params, ADAPTED)
    assert adapters_of(below) == {}
    assert bare.lora.rank == 0
    halves, _ = stepper(micro_batches=2)
    runs = {
        "below": step(state, batch),
        "given": step(state, batch, below),
        "halves": halves(state, batch),
        "packed": step(state, toy_pairs(packed=2)),
    }
    for name, (_, metrics) in runs.items():
        for key in ("loss", "grad_norm", "chosen_reward", "pairs"):
            np.testing.assert_allclose(
                metrics[key], runs["below"][1][key], rtol=2e-5, atol=1e-6, err_msg=f"{name} {key}"
            )


def test_simpo_learns_without_a_reference_and_dpo_asks_for_one():
    step, state = stepper(PLAIN, ALL, method="simpo")
    batch = toy_pairs()
    first = last = step(state, batch)[1]
    for _ in range(8):
        state, last = step(state, batch)
    assert float(last["loss"]) < 0.5 * float(first["loss"])
    step, state = stepper(PLAIN, ALL)
    with pytest.raises(ConfigError, match="needs a reference: train adapters"):
        step(state, batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PreferenceConfig(beta=-1.0), "preference.beta=-1.0 must not be negative"),
        (lambda: PreferenceConfig(margin=-1.0), "preference.margin=-1.0 must not be negative"),
        (
            lambda: PreferenceConfig(margin=1.0).objective("dpo"),
            "margin=1.0 belongs to method='simpo'",
        ),
        (lambda: PreferenceConfig(label_smoothing=0.5), "must be at least 0 and below 0.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


def test_beta_is_what_is_usual_for_the_method_unless_stated():
    assert PreferenceConfig().objective("dpo") == Objective("dpo", 0.1)
    assert PreferenceConfig(margin=0.5).objective("simpo") == Objective("simpo", 2.0, 0.5)
    assert PreferenceConfig(beta=0.3).objective("dpo").beta == 0.3


@pytest.mark.parametrize("trainable", [Trainable(), Trainable("adapters", 32)])
def test_a_reference_below_the_adapters_must_not_move(trainable):
    step, state = stepper(trainable=trainable)
    with pytest.raises(ConfigError, match=r"train adapters .* and nothing else"):
        step(state, toy_pairs())
