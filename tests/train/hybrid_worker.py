"""Two training steps on a hybrid mesh of two processes; each prints losses and who its neighbours are as JSON.

python -m tests.train.hybrid_worker PROCESS PORT MESH     with 2 processes of 4 virtual devices each
"""

import json
import sys

import jax

from llm_jax.data.batch import Batch
from llm_jax.errors import ConfigError
from llm_jax.sharding import MeshConfig, batch_sharding, local_rows, make_mesh, place_rows
from llm_jax.train import (
    OptimizerConfig,
    StepConfig,
    compile_step,
    init_state,
    make_optimizer,
    make_schedule,
)
from tests.tiny import LLAMA, random_batch

HYBRID = {
    "hsdp": MeshConfig(fsdp=4, dcn_data=2),
    "slices": MeshConfig(data=2, fsdp=2, dcn_fsdp=2),
}


def train(config: MeshConfig) -> list[float]:
    mesh = make_mesh(config)
    optimizer_config = OptimizerConfig(peak_lr=1e-2, warmup_steps=1)
    optimizer = make_optimizer(optimizer_config)
    step = compile_step(
        mesh,
        model=LLAMA,
        config=StepConfig(batch_size=8),
        optimizer=optimizer,
        schedule=make_schedule(optimizer_config, 10),
        clip_norm=1.0,
    )
    sharding = batch_sharding(mesh, 8, 16)
    rows = local_rows(sharding, 8)
    losses = []
    with jax.set_mesh(mesh):
        state = init_state(LLAMA, optimizer, mesh, seed=0)
        for number in range(2):
            batch = random_batch(seed=number, rows=8, length=16)
            state, metrics = step(
                state, Batch(*(place_rows(a[rows], rows, 8, sharding) for a in batch))
            )
            losses.append(float(metrics["loss"]))
    return losses


def hosts(config: MeshConfig) -> list:
    """The process of each device, laid out as the mesh is, tensor and context left out."""
    devices = make_mesh(config).devices[:, :, 0, 0]
    return [[device.process_index for device in row] for row in devices.tolist()]


def refusal(config: MeshConfig) -> str:
    try:
        make_mesh(config)
    except ConfigError as error:
        return str(error)
    return "accepted"


def main() -> None:
    process, port, name = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(
        address, num_processes=2, process_id=process, coordinator_bind_address=address
    )
    print(
        json.dumps(
            {
                "losses": train(HYBRID[name]),
                "hosts": hosts(HYBRID[name]),
                "refused": refusal(MeshConfig(fsdp=2, dcn_data=4)),
            }
        )
    )


if __name__ == "__main__":
    main()
