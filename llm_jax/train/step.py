"""The training step: pure, on one screen, callable on one device with no mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llm_jax.data.batch import Batch
from llm_jax.errors import ConfigError
from llm_jax.model import LossSums, ModelConfig, Params, logical_axes, target_loss
from llm_jax.sharding import batch_sharding, constrain, replicated
from llm_jax.train.guard import is_spike, remember
from llm_jax.train.neftune import NeftuneConfig, embedding_noise
from llm_jax.train.state import TrainState, state_shardings
from llm_jax.train.trainable import ALL, Trainable

Metrics = dict[str, jax.Array]
Sums = TypeVar("Sums")  # of a loss: a tuple of scalars


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What one update does, beyond the model and the optimizer."""

    batch_size: int = 32  # rows of the global batch
    micro_batches: int = 1  # parts the batch is computed in, one after another, to save memory
    z_loss: float = 0.0  # weight of the z-penalty; 1e-4 is usual with bf16
    spike_window: int = (
        0  # steps whose median a loss or gradient norm is compared with; 0: no spikes
    )
    spike_deviations: float = 6.0  # robust standard deviations above it that make a step a spike
    neftune: NeftuneConfig = NeftuneConfig()  # noise on embeddings

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"step.{name}={getattr(self, name)} must be at least 1")
        if self.batch_size % self.micro_batches:
            raise ConfigError(
                f"step.batch_size={self.batch_size} must be a multiple of step.micro_batches={self.micro_batches}"
            )
        if self.spike_window and self.spike_window < 8:
            raise ConfigError(
                f"step.spike_window={self.spike_window} must be at least 8, or 0 for none; 128 is usual"
            )
        if self.spike_deviations <= 0:
            raise ConfigError(f"step.spike_deviations={self.spike_deviations} must be positive")
        if self.z_loss < 0:
            raise ConfigError(f"step.z_loss={self.z_loss} must not be negative")


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: ModelConfig,
    config: StepConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    clip_norm: float,
    trainable: Trainable = ALL,
) -> tuple[TrainState, Metrics]:
    """One update. Pure: no clock, no I/O, no globals.

    Loss and gradients are sums over the batch divided by its global count of target tokens, so
    packing, accumulation and sharding do not change the objective. A step whose loss or gradient
    is not finite, or a spike, leaves parameters and optimizer as they were, and is counted. What is not trainable
    has no gradient, no optimizer state and no decay.
    """
    count = jnp.sum(batch.loss_mask_BT)
    # in the weights: dividing the loss would read and write the head's whole gradient once more
    weighted = batch._replace(loss_mask_BT=batch.loss_mask_BT / jnp.maximum(count, 1.0))

    def loss(trained: Params, part: tuple[Batch, Rows]) -> tuple[jax.Array, LossSums]:
        params = trainable.put(state.params, trained)
        noise_BTD = noise_for(config, model, state.step, part[1], part[0])
        return target_loss(params, model, *part[0], z_loss=config.z_loss, noise_BTD=noise_BTD)

    grad = laid_out(jax.grad(loss, has_aux=True), trainable.of_leaves(logical_axes(model)))
    trained = trainable.take(state.params)
    parts = (weighted, rows_of(config, weighted))
    means, grads = accumulate(grad, trained, parts, config.micro_batches)
    state, metrics = apply_update(
        state, trained, grads, means.nats, optimizer=optimizer, schedule=schedule, clip_norm=clip_norm,
        spike_deviations=config.spike_deviations, trainable=trainable,
    )  # fmt: skip
    named = {"loss": means.nats, "z_penalty": means.z_penalty, "target_tokens": count}
    return state, {**named, **metrics}


def apply_update(
    state: TrainState,
    trained: Params,
    grads: Params,
    loss: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    clip_norm: float,
    spike_deviations: float,
    trainable: Trainable,
) -> tuple[TrainState, Metrics]:
    """The state after a step with these gradients of `trained`.

    As it was, but counted, where loss or gradient are not finite or a spike (see `guard`).
    """
    grad_norm = optax.tree.norm(grads)
    # before clipping: clip(inf) is NaN everywhere, and clip of an overflowed norm is a silent zero
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    spike = is_spike(state.opt_state, grad_norm, loss, spike_deviations)
    good = finite & ~spike
    learning_rate = schedule(state.step)

    def update(params: Params, opt_state: Any) -> tuple[Params, Any]:
        scale = jnp.minimum(1.0, clip_norm / (grad_norm + 1e-6)) if clip_norm else 1.0
        clipped = jax.tree.map(lambda g: g * scale, grads)
        directions, opt_state = optimizer.update(clipped, opt_state, params)
        opt_state = remember(opt_state, grad_norm, loss)
        return jax.tree.map(
            lambda p, d: p - (learning_rate * d).astype(p.dtype), params, directions
        ), opt_state

    keep = lambda params, opt_state: (params, opt_state)  # noqa: E731
    trained, opt_state = jax.lax.cond(good, update, keep, trained, state.opt_state)
    params = trainable.put(state.params, trained)
    skipped_in_row = jnp.where(good, 0, state.skipped_in_row + 1)
    skipped = state.skipped + jnp.where(good, 0, 1)
    state = TrainState(params, opt_state, state.step + 1, skipped, skipped_in_row)
    return state, {
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(learning_rate, jnp.float32),
        "skipped": skipped,
        "skipped_in_row": skipped_in_row,
    }


Rows = jax.Array | None  # indices in the global batch, int32 [B, 1]


def rows_of(config: StepConfig, batch: Batch) -> Rows:
    """What noise is drawn by; None without noise, so that the program has nothing of it."""
    rows = batch.tokens_BT.shape[0]
    return jnp.arange(rows, dtype=jnp.int32)[:, None] if config.neftune.alpha else None


def noise_for(
    config: StepConfig, model: ModelConfig, step: jax.Array, rows_B1: Rows, batch: Batch
) -> jax.Array | None:
    """The noise on the embeddings of a part of the batch, if there is any."""
    if rows_B1 is None:
        return None
    return embedding_noise(config.neftune, step, rows_B1[:, 0], batch.segments_BT, model.embed_dim)


Gradient = Callable[[Params, Any], tuple[Params, Sums]]


def laid_out(grad: Gradient[Sums], axes: Any) -> Gradient[Sums]:
    """`grad` with gradients that lie on the mesh as their parameters do.

    Left to itself, SPMD keeps the embedding's gradient whole on every device, takes its norm there
    and carries it into the update (7B: half a gigabyte).
    """

    def placed(params: Params, part: Any) -> tuple[Params, Sums]:
        grads, sums = grad(params, part)
        return jax.tree.map(lambda g, names: constrain(g, *names), grads, axes), sums

    return placed


def accumulate(
    grad: Gradient[Sums],
    params: Params,
    batch: Any,
    parts: int,
) -> tuple[Sums, Params]:
    """Sums of loss and gradients over `parts` micro-batches; every device works on each of them.

    `batch` is a tree of arrays [B, ...] of two axes.
    """
    if parts == 1:
        grads, sums = grad(params, batch)
        return sums, grads

    def cut(x: jax.Array) -> jax.Array:
        # row r goes to part r % parts: consecutive rows lie on one device, so each part touches all devices
        return x.reshape(-1, parts, x.shape[-1]).swapaxes(0, 1)

    split = jax.tree.map(cut, batch)

    def add(total: tuple[Sums, Params], part: Any) -> tuple[tuple[Sums, Params], None]:
        grads, sums = grad(params, part)
        return jax.tree.map(jnp.add, total, (sums, grads)), None

    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[::-1])
    total, _ = jax.lax.scan(add, zeros, split)
    return total


def compile_step(
    mesh: Mesh,
    *,
    model: ModelConfig,
    config: StepConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    clip_norm: float,
    trainable: Trainable = ALL,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`train_step` under `jax.jit` on a mesh: shardings stated on both sides, state donated.

    Stated because XLA would otherwise infer other output shardings and compile again at step 2.
    """
    state = state_shardings(model, optimizer, mesh, trainable)
    rows = batch_sharding(mesh, config.batch_size)
    micro = config.batch_size // config.micro_batches
    batch_sharding(mesh, micro)  # raises when a micro-batch does not divide over the mesh
    step = functools.partial(
        train_step,
        model=model,
        config=config,
        optimizer=optimizer,
        schedule=schedule,
        clip_norm=clip_norm,
        trainable=trainable,
    )
    return jax.jit(
        step,
        in_shardings=(state, Batch(rows, rows, rows, rows, rows)),
        out_shardings=(state, replicated(mesh)),
        donate_argnums=0,
    )
