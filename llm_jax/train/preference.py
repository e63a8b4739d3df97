"""Learning from pairs of answers, a better and a worse one: DPO (2305.18290) and SimPO (2405.14734).

Both need only log-probabilities of answers, which come from the fused head and loss: no logits of the batch
exist. DPO compares with a reference model. Where adapters are trained that is the model below them, for the
price of one forward pass; elsewhere its log-probabilities come with the batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llm_jax.data.batch import Batch, PreferenceBatch
from llm_jax.errors import ConfigError
from llm_jax.model import ModelConfig, Params, logical_axes, target_nats, without_adapters
from llm_jax.sharding import batch_sharding, replicated
from llm_jax.train.segments import segment_sums
from llm_jax.train.state import TrainState, state_shardings
from llm_jax.train.step import (
    Metrics,
    StepConfig,
    accumulate,
    apply_update,
    laid_out,
    noise_for,
    rows_of,
)
from llm_jax.train.trainable import ALL, Trainable


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """What is made smaller."""

    loss: Literal["dpo", "simpo"] = "dpo"  # simpo: mean log-probabilities, no reference
    beta: float = 0.1  # factor on the difference inside the sigmoid; 2 to 10 for simpo
    margin: float = (
        0.0  # simpo: by how much the better answer should lead; gamma / beta of the paper
    )
    label_smoothing: float = 0.0  # share of pairs whose order is taken to be wrong

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"preference.beta={self.beta} must be above 0")
        if self.margin < 0 or (self.margin and self.loss == "dpo"):
            raise ConfigError(
                f"preference.margin={self.margin} must be 0 or above, and 0 with loss='dpo', which has none"
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"preference.label_smoothing={self.label_smoothing} must be at least 0 and below 0.5"
            )


class PairSums(NamedTuple):
    """Sums over pairs; the step divides them by the number of pairs."""

    loss: jax.Array
    accuracy: jax.Array  # 1 for a pair whose better answer has the larger reward
    chosen_reward: jax.Array
    rejected_reward: jax.Array


def count_pairs(batch: Batch) -> jax.Array:
    """Pairs of which both answers have a target, float32 scalar."""
    return jnp.sum(_both(segment_sums(jnp.asarray(batch.loss_mask_BT), batch.segments_BT)))


def _both(length_BS: jax.Array) -> jax.Array:
    """1 where both rows have targets in a segment, float32 [B / 2, S]."""
    return jnp.all(_pairs(length_BS)[:, :, 1:] > 0, axis=1).astype(jnp.float32)


def _pairs(values_BS: jax.Array) -> jax.Array:
    """[B, S] -> [B / 2, 2, S]: rows 2 i and 2 i + 1 belong together."""
    return values_BS.reshape(-1, 2, values_BS.shape[1])


def preference_loss(
    nats_BT: jax.Array, reference_BT: jax.Array | None, batch: Batch, config: PreferenceConfig
) -> PairSums:
    """Sums over the pairs of a batch.

    Reward of an answer: DPO beta (log p - log p of the reference), summed over its targets; SimPO beta times
    the mean log p. The loss is -log sigmoid of the difference of rewards (less beta * margin), mixed with
    that of the other order by `label_smoothing`: what TRL calls sigmoid and simpo.

    Args:
      nats_BT: -log p of every target.
      reference_BT: the same of the reference; None with loss simpo.
      batch: rows 2 i hold better answers, rows 2 i + 1 the worse ones under the same segment numbers.
      config: which loss.
    """
    length_BS = segment_sums(batch.loss_mask_BT, batch.segments_BT)
    gain_BT = -nats_BT if reference_BT is None else reference_BT - nats_BT
    gain_BT = jnp.where(batch.loss_mask_BT > 0, gain_BT, 0.0)  # padding may cost inf
    reward_BS = config.beta * segment_sums(gain_BT, batch.segments_BT)
    if config.loss == "simpo":
        reward_BS = reward_BS / jnp.maximum(length_BS, 1.0)
    both_PS = _both(length_BS)
    chosen_PS, rejected_PS = (_pairs(reward_BS)[:, side, 1:] for side in (0, 1))
    lead_PS = chosen_PS - rejected_PS - config.beta * config.margin
    smoothing = config.label_smoothing
    loss_PS = -(1 - smoothing) * jax.nn.log_sigmoid(lead_PS)
    loss_PS -= smoothing * jax.nn.log_sigmoid(-lead_PS)
    over = lambda values_PS: jnp.sum(jnp.where(both_PS > 0, values_PS, 0.0))  # noqa: E731
    won_PS = (chosen_PS > rejected_PS).astype(jnp.float32)
    return PairSums(over(loss_PS), over(won_PS), over(chosen_PS), over(rejected_PS))


def preference_step(
    state: TrainState,
    batch: PreferenceBatch,
    *,
    model: ModelConfig,
    config: StepConfig,
    preference: PreferenceConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    clip_norm: float,
    trainable: Trainable = ALL,
) -> tuple[TrainState, Metrics]:
    """One update, as `train_step`: loss and gradients are sums over pairs / the batch's number of pairs.

    Raises:
      ConfigError: DPO has neither adapters nor the reference's log-probabilities.
    """
    needs_reference = preference.loss == "dpo"
    from_below = needs_reference and batch.reference_BT is None
    # with anything else trained, what lies below the adapters would move with every step
    if from_below and not (model.lora.rank and trainable == Trainable("adapters")):
        raise ConfigError(
            "preference.loss='dpo' needs a reference: train adapters (--model.lora.rank 8) and nothing else, whose "
            "base is one, or "
            "give its log-probabilities with the batch; loss='simpo' needs none"
        )
    count = jnp.maximum(count_pairs(batch.rows), 1.0)

    def loss(trained: Params, part: tuple[PreferenceBatch, jax.Array | None]):
        (rows, reference_BT), index_B1 = part
        params = trainable.put(state.params, trained)
        if from_below:
            reference_BT, _ = target_nats(*without_adapters(state.params, model), *rows[:4])
        noise_BTD = noise_for(config, model, state.step, index_B1, rows)
        nats_BT, _ = target_nats(params, model, *rows[:4], noise_BTD=noise_BTD)
        sums = preference_loss(nats_BT, reference_BT if needs_reference else None, rows, preference)
        means = jax.tree.map(lambda total: total / count, sums)
        return means.loss, means

    trained = trainable.take(state.params)
    parts = (batch, rows_of(config, batch.rows))
    grad = laid_out(jax.grad(loss, has_aux=True), trainable.of_leaves(logical_axes(model)))
    means, grads = accumulate(grad, trained, parts, config.micro_batches, together=2)
    state, metrics = apply_update(
        state, trained, grads, means.loss, optimizer=optimizer, schedule=schedule, clip_norm=clip_norm,
        spike_deviations=config.spike_deviations, trainable=trainable,
    )  # fmt: skip
    return state, {
        "loss": means.loss,
        "pairs": count_pairs(batch.rows),
        "target_tokens": jnp.sum(batch.rows.loss_mask_BT),
        "preference_accuracy": means.accuracy,
        "chosen_reward": means.chosen_reward,
        "rejected_reward": means.rejected_reward,
        **metrics,
    }


def compile_preference_step(
    mesh: Mesh,
    *,
    with_reference: bool,
    model: ModelConfig,
    config: StepConfig,
    preference: PreferenceConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    clip_norm: float,
    trainable: Trainable = ALL,
) -> Callable[[TrainState, PreferenceBatch], tuple[TrainState, Metrics]]:
    """`preference_step` under `jax.jit` on a mesh, as `compile_step`.

    Args:
      with_reference: whether batches bring the reference's log-probabilities.

    Raises:
      ConfigError: a micro-batch has an odd number of rows, or does not divide over the mesh.
    """
    micro = config.batch_size // config.micro_batches
    if micro % 2:
        raise ConfigError(
            f"step.batch_size={config.batch_size} / step.micro_batches={config.micro_batches} is {micro} rows; pairs "
            "need an even number"
        )
    batch_sharding(mesh, micro)
    state = state_shardings(model, optimizer, mesh, trainable)
    rows = batch_sharding(mesh, config.batch_size)
    step = functools.partial(
        preference_step, model=model, config=config, preference=preference, optimizer=optimizer,
        schedule=schedule, clip_norm=clip_norm, trainable=trainable,
    )  # fmt: skip
    placed = PreferenceBatch(Batch(*[rows] * 5), rows if with_reference else None)
    return jax.jit(
        step,
        in_shardings=(state, placed),
        out_shardings=(state, replicated(mesh)),
        donate_argnums=0,
    )
