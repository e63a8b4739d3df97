"""Runs three training steps on several meshes of 8 virtual devices; prints losses and compile counts as JSON.

A process of its own, because the number of devices is fixed before jax starts:
XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.train.mesh_worker
"""

import json
import math
import sys
from typing import Any, cast

import jax

from llm_jax.data.batch import Batch
from llm_jax.sharding import MeshConfig, batch_sharding, local_rows, make_mesh, place_rows
from llm_jax.train import (
    OptimizerConfig,
    StepConfig,
    compile_step,
    init_state,
    make_optimizer,
    make_schedule,
)
from tests.tiny import FAMILIES, SWITCHED, random_batch

# data x fsdp x tensor x context
MESHES = ("1x1x1x1", "8x1x1x1", "1x8x1x1", "2x2x2x1")
# llama's two kv heads lie on four devices
WITH_CONTEXT = {"llama": "1x1x4x2", "bloom": "1x2x2x2", "gemma": "1x2x2x2", "cohere": "1x2x2x2"}


def train(family: str, shape: str) -> dict:
    model = (FAMILIES | SWITCHED)[family]
    sizes = dict(
        zip(("data", "fsdp", "tensor", "context"), map(int, shape.split("x")), strict=True)
    )
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
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
        for number in range(3):
            batch = random_batch(seed=number, rows=8, length=16)
            state, metrics = step(
                state, Batch(*(place_rows(a[rows], rows, 8, sharding) for a in batch))
            )
            losses.append(float(metrics["loss"]))
    largest = max(jax.tree.leaves(state.params), key=lambda leaf: leaf.size)
    part = largest.addressable_shards[0].data.size / largest.size
    return {"losses": losses, "compilations": cast(Any, step)._cache_size(), "part": part}


if __name__ == "__main__":
    family = sys.argv[1]
    print(json.dumps({s: train(family, s) for s in (*MESHES, WITH_CONTEXT[family])}))
