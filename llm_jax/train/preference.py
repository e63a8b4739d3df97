"""Learning from pairs of answers, a better and a worse one: DPO (2305.18290) and SimPO (2405.14734).

Both need only log-probabilities of answers, which come from the fused head and loss: no logits of the batch
exist. DPO compares with a reference model, for the price of one forward pass. Where adapters are trained that is
the model below them, elsewhere parameters that come with the batch and stay as they are.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llm_jax.data.batch import Batch
from llm_jax.errors import ConfigError
from llm_jax.model import (
    ModelConfig,
    Params,
    abstract_params,
    logical_axes,
    target_nats,
    without_adapters,
)
from llm_jax.sharding import batch_sharding, replicated, tree_shardings
from llm_jax.train.segments import segment_sums
from llm_jax.train.state import TrainState, state_shardings
from llm_jax.train.step import (
    Metrics,
    Rows,
    StepConfig,
    accumulate,
    apply_update,
    laid_out,
    noise_for,
    rows_of,
)
from llm_jax.train.trainable import ALL, Trainable

Method = Literal["dpo", "simpo"]
BETA = {"dpo": 0.1, "simpo": 2.0}  # usual; the papers search 0.01 to 0.5 and 2 to 10


class Objective(NamedTuple):
    """What is made smaller."""

    method: Method  # simpo: mean log-probabilities, no reference
    beta: float
    margin: float = 0.0
    label_smoothing: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """How pairs of answers are compared."""

    beta: float = 0.0  # factor on the difference inside the sigmoid; 0: 0.1 for dpo, 2 for simpo
    # simpo: by how much the better answer should lead; gamma / beta of the paper
    margin: float = 0.0
    label_smoothing: float = 0.0  # share of pairs whose order is taken to be wrong

    def __post_init__(self) -> None:
        for name in ("beta", "margin"):
            if vars(self)[name] < 0:
                raise ConfigError(f"preference.{name}={vars(self)[name]} must not be negative")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"preference.label_smoothing={self.label_smoothing} must be at least 0 and below 0.5"
            )

    def objective(self, method: Method) -> Objective:
        """The same for a method. Raises ConfigError if it has no such setting."""
        if self.margin and method == "dpo":
            raise ConfigError(
                f"preference.margin={self.margin} belongs to method='simpo'; leave it at 0 with 'dpo'"
            )
        return Objective(method, self.beta or BETA[method], self.margin, self.label_smoothing)


class PairSums(NamedTuple):
    """Sums over pairs; the step divides them by the number of pairs."""

    loss: jax.Array
    accuracy: jax.Array  # 1 for a pair whose better answer has the larger reward
    chosen_reward: jax.Array
    rejected_reward: jax.Array

    def named(self) -> Metrics:
        """The four and the lead of the better answers under the names of metrics."""
        return {
            "loss": self.loss,
            "preference_accuracy": self.accuracy,
            "reward_margin": self.chosen_reward - self.rejected_reward,
            "chosen_reward": self.chosen_reward,
            "rejected_reward": self.rejected_reward,
        }


def count_pairs(batch: Batch) -> jax.Array:
    """Pairs of which both answers have a target, float32 scalar."""
    return jnp.sum(_both(segment_sums(jnp.asarray(batch.loss_mask_BT), batch.segments_BT)))


def _both(length_BS: jax.Array) -> jax.Array:
    """1 for pairs of which both segments have targets, float32 [B, P]."""
    return jnp.all(_pairs(length_BS) > 0, axis=-1).astype(jnp.float32)


def _pairs(values_BS: jax.Array) -> jax.Array:
    """[B, S] -> [B, P, 2]: segments 2 i - 1 and 2 i belong together; 0 is padding."""
    P = (values_BS.shape[1] - 1) // 2
    return values_BS[:, 1 : 1 + 2 * P].reshape(-1, P, 2)


def preference_loss(
    nats_BT: jax.Array, reference_BT: jax.Array | None, batch: Batch, objective: Objective
) -> PairSums:
    """Sums over the pairs of a batch.

    Reward of an answer: DPO beta (log p - log p of the reference), summed over its targets; SimPO beta times
    the mean log p. The loss is -log sigmoid of the difference of rewards (less beta * margin), mixed with
    that of the other order by `label_smoothing`: what TRL calls sigmoid and simpo.

    Args:
      nats_BT: -log p of every target.
      reference_BT: the same of the reference; None with simpo.
      batch: segments 2 i - 1 hold better answers, segments 2 i the worse ones.
      objective: which loss.
    """
    beta, smoothing = objective.beta, objective.label_smoothing
    length_BS = segment_sums(batch.loss_mask_BT, batch.segments_BT)
    gain_BT = -nats_BT if reference_BT is None else reference_BT - nats_BT
    gain_BT = jnp.where(batch.loss_mask_BT > 0, gain_BT, 0.0)  # padding may cost inf
    reward_BS = beta * segment_sums(gain_BT, batch.segments_BT)
    if objective.method == "simpo":
        reward_BS = reward_BS / jnp.maximum(length_BS, 1.0)
    both_BP = _both(length_BS)
    chosen_BP, rejected_BP = jnp.moveaxis(_pairs(reward_BS), -1, 0)
    lead_BP = chosen_BP - rejected_BP - beta * objective.margin
    loss_BP = -(1 - smoothing) * jax.nn.log_sigmoid(lead_BP)
    loss_BP -= smoothing * jax.nn.log_sigmoid(-lead_BP)
    over = lambda values_BP: jnp.sum(jnp.where(both_BP > 0, values_BP, 0.0))  # noqa: E731
    won_BP = (chosen_BP > rejected_BP).astype(jnp.float32)
    return PairSums(over(loss_BP), over(won_BP), over(chosen_BP), over(rejected_BP))


def has_reference_below(model: ModelConfig, trainable: Trainable) -> bool:
    """Whether the model below the adapters stays as it is: with anything else trained it moves with every step."""
    return bool(model.lora.rank) and trainable == Trainable("adapters")


def reference_nats(
    params: Params, reference: Params | None, batch: Batch, model: ModelConfig, method: Method
) -> jax.Array | None:
    """-log p of every target under the reference: `reference`, or what lies below the adapters; None with simpo."""
    if method == "simpo":
        return None
    below, bare = without_adapters(params, model)
    nats_BT, _ = target_nats(below if reference is None else reference, bare, *batch[:4])
    return nats_BT


def preference_step(
    state: TrainState,
    batch: Batch,
    reference: Params | None = None,
    *,
    model: ModelConfig,
    config: StepConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    clip_norm: float,
    trainable: Trainable = ALL,
) -> tuple[TrainState, Metrics]:
    """One update, as `train_step`: loss and gradients are sums over pairs / the batch's number of pairs.

    Args:
      reference: with dpo the parameters of a model without adapters that answers are compared with; None: what
        lies below the adapters.

    Raises:
      ConfigError: DPO has neither.
    """
    if (
        objective.method == "dpo"
        and reference is None
        and not has_reference_below(model, trainable)
    ):
        raise ConfigError(
            "method='dpo' needs a reference: train adapters (--model.lora.rank 8) and nothing else, whose base is "
            "one, or give its parameters; method='simpo' needs none"
        )
    count = jnp.maximum(count_pairs(batch), 1.0)

    def loss(trained: Params, part: tuple[Batch, Rows]) -> tuple[jax.Array, PairSums]:
        rows, index_B1 = part
        params = trainable.put(state.params, trained)
        noise_BTD = noise_for(config, model, state.step, index_B1, rows)
        nats_BT, _ = target_nats(params, model, *rows[:4], noise_BTD=noise_BTD)
        reference_BT = reference_nats(state.params, reference, rows, model, objective.method)
        sums = preference_loss(nats_BT, reference_BT, rows, objective)
        means = jax.tree.map(lambda total: total / count, sums)
        return means.loss, means

    trained = trainable.take(state.params)
    grad = laid_out(jax.grad(loss, has_aux=True), trainable.of_leaves(logical_axes(model)))
    parts = (batch, rows_of(config, batch))
    means, grads = accumulate(grad, trained, parts, config.micro_batches)
    state, metrics = apply_update(
        state, trained, grads, means.loss, optimizer=optimizer, schedule=schedule, clip_norm=clip_norm,
        spike_deviations=config.spike_deviations, trainable=trainable,
    )  # fmt: skip
    counts = {"pairs": count_pairs(batch), "target_tokens": jnp.sum(batch.loss_mask_BT)}
    return state, {**means.named(), **counts, **metrics}


def compile_preference_step(
    mesh: Mesh,
    *,
    model: ModelConfig,
    config: StepConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    clip_norm: float,
    trainable: Trainable = ALL,
) -> Callable[[TrainState, Batch, Params | None], tuple[TrainState, Metrics]]:
    """`preference_step` under `jax.jit` on a mesh, as `compile_step`; the reference is not given up.

    Raises:
      ConfigError: a micro-batch does not divide over the mesh.
    """
    batch_sharding(mesh, config.batch_size // config.micro_batches)
    state = state_shardings(model, optimizer, mesh, trainable)
    rows = batch_sharding(mesh, config.batch_size)
    step = functools.partial(
        preference_step, model=model, config=config, objective=objective, optimizer=optimizer,
        schedule=schedule, clip_norm=clip_norm, trainable=trainable,
    )  # fmt: skip
    given = objective.method == "dpo" and not has_reference_below(model, trainable)
    return jax.jit(
        step,
        in_shardings=(
            state,
            Batch(*[rows] * 5),
            jax.tree.map(lambda leaf: leaf.sharding, abstract_reference(model, mesh))
            if given
            else None,
        ),
        out_shardings=(state, replicated(mesh)),
        donate_argnums=0,
    )


def abstract_reference(model: ModelConfig, mesh: Mesh) -> Params:
    """The parameters of a reference as jax.ShapeDtypeStruct, which lie as those of the model without adapters."""
    _, bare = without_adapters({}, model)
    shapes = abstract_params(bare)
    shardings = tree_shardings(mesh, shapes, logical_axes(bare))
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, shapes, shardings)
