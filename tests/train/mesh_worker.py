"""Runs three training steps on several meshes of 8 virtual devices; prints losses and compile counts as JSON.

A process of its own, because the number of devices is fixed before jax starts:
XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.train.mesh_worker
"""

import json
import math
import sys
from typing import Any, cast

import jax

from llm_jax.sharding import MeshConfig, make_mesh
from tests.tiny import FAMILIES, SWITCHED
from tests.train.mesh_training import train_on

# data x fsdp x tensor x context
MESHES = ("1x1x1x1", "8x1x1x1", "1x8x1x1", "2x2x2x1")
# llama's two kv heads lie on four devices
WITH_CONTEXT = {"llama": "1x1x4x2", "bloom": "1x2x2x2", "gemma": "1x2x2x2", "cohere": "1x2x2x2"}


def train(family: str, shape: str) -> dict:
    sizes = dict(
        zip(("data", "fsdp", "tensor", "context"), map(int, shape.split("x")), strict=True)
    )
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
    losses, step, state = train_on(mesh, (FAMILIES | SWITCHED)[family], steps=3)
    largest = max(jax.tree.leaves(state.params), key=lambda leaf: leaf.size)
    part = largest.addressable_shards[0].data.size / largest.size
    return {"losses": losses, "compilations": cast(Any, step)._cache_size(), "part": part}


if __name__ == "__main__":
    family = sys.argv[1]
    print(json.dumps({s: train(family, s) for s in (*MESHES, WITH_CONTEXT[family])}))
