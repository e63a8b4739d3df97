"""Two steps of new rows alone and two of everything, on meshes of 8 virtual devices; prints JSON.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.train.stages_worker rows

With `adapters` there is one stage, in which adapters and new rows are trained, with noise on embeddings.
"""

import dataclasses
import functools
import json
import math
import os
import sys

import jax
import numpy as np

from llm_jax.data.batch import Batch
from llm_jax.model import Lora, ModelConfig, without_adapters
from llm_jax.sharding import MeshConfig, batch_sharding, local_rows, make_mesh, place_rows
from llm_jax.train import (
    NeftuneConfig,
    OptimizerConfig,
    StageConfig,
    StepConfig,
    compile_step,
    enter,
    init_state,
    make_optimizer,
    plan_stages,
    staged_step,
    state_of,
)
from tests.tiny import LLAMA, random_batch

MESHES = ("1x1x1x1", "2x2x2x1")
FIRST = 51  # 13 new rows: no tensor axis divides them
ADAMW = OptimizerConfig(peak_lr=1e-2, warmup_steps=1)
CASES = {
    "rows": (LLAMA, StageConfig(new_rows_steps=2, new_rows_lr=0.1), 2),
    "adapters": (
        dataclasses.replace(LLAMA, lora=Lora(rank=4)),
        StageConfig(train="adapters_and_new_rows"),
        4,
    ),
}


def train(shape: str, model: ModelConfig, config: StageConfig, steps_frozen: int) -> dict:
    """Losses, and whether in the first steps what is frozen stayed and what is not moved."""
    sizes = dict(
        zip(("data", "fsdp", "tensor", "context"), map(int, shape.split("x")), strict=True)
    )
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
    optimizer = make_optimizer(ADAMW)
    stages = plan_stages(config, ADAMW, 4, model, FIRST)
    steps = [
        compile_step(
            mesh,
            model=model,
            config=StepConfig(
                batch_size=8, neftune=NeftuneConfig(alpha=4.0 * bool(model.lora.rank))
            ),
            optimizer=optimizer,
            schedule=stage.schedule,
            clip_norm=1.0,
            trainable=stage.trainable,
        )
        for stage in stages
    ]
    again = functools.partial(enter, model=model, optimizer=optimizer, mesh=mesh)
    step = staged_step(stages, steps, 0, again)
    sharding = batch_sharding(mesh, 8, 16)
    rows = local_rows(sharding, 8)
    losses, result = [], {}
    with jax.set_mesh(mesh):
        first = init_state(model, optimizer, mesh, seed=0).params
        before = jax.tree.map(np.asarray, first)
        state = state_of(first, model, optimizer, mesh, stages[0].trainable)
        for number in range(4):
            batch = random_batch(seed=number, rows=8, length=16)
            state, metrics = step(
                state, Batch(*(place_rows(a[rows], rows, 8, sharding) for a in batch))
            )
            losses.append(float(metrics["loss"]))
            if number == steps_frozen - 1:
                result = compare(model, before, jax.tree.map(np.asarray, state.params))
    return {"losses": losses, **result}


def compare(model: ModelConfig, before: dict, after: dict) -> dict[str, bool]:
    """Bitwise, old rows and body; and whether every new row moved."""

    def old(tree):
        tree, _ = without_adapters(tree, model)
        return {
            **tree,
            "embedding": tree["embedding"][:FIRST],
            "head": tree["head"][:, :FIRST],
        }

    same = jax.tree.map(np.array_equal, old(before), old(after))
    moved = (before["embedding"][FIRST:] != after["embedding"][FIRST:]).any(axis=1)
    return {"frozen": all(jax.tree.leaves(same)), "moved": bool(moved.all())}


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"  # programs that few steps use
    print(json.dumps({shape: train(shape, *CASES[sys.argv[1]]) for shape in MESHES}))
