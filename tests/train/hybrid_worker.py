"""Two training steps on a hybrid mesh of two processes; each prints losses and who its neighbours are as JSON.

python -m tests.train.hybrid_worker PROCESS PORT MESH     with 2 processes of 4 virtual devices each
"""

import json
import sys

import jax

from llm_jax.errors import ConfigError
from llm_jax.sharding import MeshConfig, make_mesh
from tests.tiny import LLAMA
from tests.train.mesh_training import train_on

HYBRID = {
    "hsdp": MeshConfig(fsdp=4, dcn_data=2),
    "slices": MeshConfig(data=2, fsdp=2, dcn_fsdp=2),
}


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
                "losses": train_on(make_mesh(HYBRID[name]), LLAMA, steps=2)[0],
                "hosts": hosts(HYBRID[name]),
                "refused": refusal(MeshConfig(fsdp=2, dcn_data=4)),
            }
        )
    )


if __name__ == "__main__":
    main()
