"""Devices that are only described: enough to compile for, nothing to run on."""

import importlib.util
import os
from typing import Any

from jax.experimental import topologies

from llm_jax.errors import ConfigError

# What libtpu would otherwise ask a metadata server, or a lock file, about the machine it is not on.
ABSENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
}
GENERATIONS = ("v4", "v5e", "v5p", "v6e", "tpu7x")


def tpu_devices(topology: str) -> list[Any]:
    """Devices of a TPU slice, as "v5e:4x4" or "v5p:2x2x1"; two cores of a v4 chip count as one.

    Raises:
      ConfigError: libtpu is not installed, or it does not know the topology.
    """
    generation = topology.partition(":")[0]
    if generation not in GENERATIONS or importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"topology={topology!r} needs the package libtpu (pip install libtpu) and a name such as "
            f"v5e:4x4, of {', '.join(GENERATIONS)}"
        )
    for name, value in ABSENT.items():
        os.environ.setdefault(name, value)
    options = {"chip_config_name": "megacore"} if generation == "v4" else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"topology={topology!r} is not one libtpu knows: {reason}") from error
    return list(description.devices)
