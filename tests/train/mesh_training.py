"""A short training on a mesh, for the workers that compare meshes."""

from typing import Any

import jax
from jax.sharding import Mesh

from llm_jax.data.batch import Batch
from llm_jax.model import ModelConfig
from llm_jax.sharding import batch_sharding, local_rows, place_rows
from llm_jax.train import (
    OptimizerConfig,
    StepConfig,
    TrainState,
    compile_step,
    init_state,
    make_optimizer,
    make_schedule,
)
from tests.tiny import random_batch


def train_on(mesh: Mesh, model: ModelConfig, steps: int) -> tuple[list[float], Any, TrainState]:
    """The loss of each step, the compiled step and the last state; the same batches on every mesh."""
    optimizer_config = OptimizerConfig(peak_lr=1e-2, warmup_steps=1)
    optimizer = make_optimizer(optimizer_config)
    step = compile_step(
        mesh,
        model=model,
        config=StepConfig(batch_size=8, z_loss=1e-4),
        optimizer=optimizer,
        schedule=make_schedule(optimizer_config, 10),
        clip_norm=1.0,
    )
    sharding = batch_sharding(mesh, 8, 16)
    rows = local_rows(sharding, 8)
    losses = []
    with jax.set_mesh(mesh):
        state = init_state(model, optimizer, mesh, seed=0)
        for number in range(steps):
            batch = random_batch(seed=number, rows=8, length=16)
            state, metrics = step(
                state, Batch(*(place_rows(a[rows], rows, 8, sharding) for a in batch))
            )
            losses.append(float(metrics["loss"]))
    return losses, step, state
