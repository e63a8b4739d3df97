"""Devices that are only described: enough to compile for, nothing to run on."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from llm_jax.config import nearest
from llm_jax.errors import ConfigError
from llm_jax.plan.chips import CHIPS, Chip

# What libtpu would otherwise ask a metadata server, or a lock file, about the machine it is not on.
ABSENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
}
GENERATIONS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
FORMS = {
    "v4": "v4:2x2x4", "v5p": "v5p:4x4x4", "v5e": "v5e:4x4", "v6e": "v6e:8x8",
    "h100": "h100:1x8, hosts x GPUs", "h200": "h200:2x8, hosts x GPUs", "cpu": "cpu:8",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Some devices of one kind and how they are joined."""

    name: str  # as it is given: "v5p:4x4x4", "h100:2x8", "2*v5e:4x4" for two slices
    chip: Chip
    sides: tuple[int, ...]  # of a slice of TPUs; hosts x GPUs
    slices: int = 1

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.sides) * self.slices

    @property
    def islands(self) -> int:
        """Parts with a fast network inside, and a slow one between: slices of TPUs, hosts of GPUs."""
        return self.sides[0] if self.chip.platform == "gpu" else self.slices

    @property
    def usable(self) -> float:
        """Bytes of a device's memory that a program gets.

        On a GPU JAX takes XLA_PYTHON_CLIENT_MEM_FRACTION of it, three quarters unless set; virtual
        devices of a CPU share this machine's.
        """
        share = self.chip.usable
        if self.chip.platform == "cpu":
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / self.devices
        if self.chip.platform == "gpu":
            share = memory_fraction() or share
        return self.chip.memory * share

    @property
    def link_bandwidth(self) -> float:
        """Bytes a second a device sends, half of the chip's where the torus has no closed rings."""
        at = self.chip.closes_at
        is_open = bool(at) and any(side % at for side in self.sides)
        return self.chip.link_bandwidth / (2 if is_open else 1)


def memory_fraction() -> float:
    """What XLA is told to take of a GPU's memory; 0: nothing is said. Raises ConfigError."""
    text = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
    try:
        share = float(text or 0)
    except ValueError:
        share = -1.0
    if not 0 <= share < 2:  # above 1 XLA takes managed memory
        raise ConfigError(
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={text!r} must be a share of the memory such as 0.9; unset it for jax's own"
        )
    return share


def _is_side(side: int, dimensions: int) -> bool:
    """Whether slices have such a side: those of v5e and v6e are flat, the others made of cubes of 4."""
    return side in (1, 2, 4, 8, 16) if dimensions == 2 else side in (1, 2) or side % 4 == 0


def parse_topology(name: str) -> Topology:
    """Reads `v5p:4x4x4`, `v5e:16x16`, `h100:1x8` (hosts x GPUs), `cpu:8`, or `2*v5e:4x4`, two slices.

    Raises:
      ConfigError: no such chip, or sides that it does not have.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", name)
    generation = found[2] if found else name.rpartition("*")[2].partition(":")[0]
    if generation not in CHIPS:
        raise ConfigError(
            f"topology={name!r}: {generation!r} is no known chip; {nearest(generation, list(CHIPS))}"
        )
    wanted = FORMS[generation].partition(",")[0].count("x", FORMS[generation].index(":"))
    if not found or found[3].count("x") != wanted or "0" in found[3].split("x"):
        raise ConfigError(f"topology={name!r} must look like {FORMS[generation]}")
    chip, slices = CHIPS[generation], int(found[1] or 1)
    if slices < 1 or (slices > 1 and chip.platform != "tpu"):
        raise ConfigError(f"topology={name!r}: only TPUs come in slices, 1 or more of them")
    sides = tuple(int(side) for side in found[3].split("x"))
    if chip.slice_of and math.prod(sides) > chip.slice_of:
        raise ConfigError(
            f"topology={name!r}: a slice of {generation} has at most {chip.slice_of} chips, these are "
            f"{math.prod(sides)}; several slices are written 2*{FORMS[generation]}"
        )
    if chip.platform == "tpu" and not all(_is_side(side, len(sides)) for side in sides):
        rule = "1, 2, 4, 8 or 16" if len(sides) == 2 else "1, 2 or a multiple of 4"
        raise ConfigError(
            f"topology={name!r}: the sides of a slice of {generation} are {rule}, as in {FORMS[generation]}"
        )
    return Topology(name=name, chip=chip, sides=sides, slices=slices)


def described_devices(topology: Topology) -> list[Any]:
    """The devices of a topology, absent or virtual, to make a mesh of.

    Raises:
      ConfigError: what describes them is not installed, or does not know the topology.
    """
    if topology.chip.platform == "tpu":
        return tpu_devices(topology.name.rpartition("*")[2], topology.slices)
    if topology.chip.platform == "gpu":
        return gpu_devices(topology)
    devices = jax.devices("cpu")
    if len(devices) < topology.devices:
        raise ConfigError(
            f"topology={topology.name!r} needs XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{topology.devices} before jax starts; there are {len(devices)} devices"
        )
    return devices[: topology.devices]


def tpu_devices(topology: str, slices: int = 1) -> list[Any]:
    """Devices of TPU slices, as "v5e:4x4" or "v5p:2x2x1"; two cores of a v4 chip count as one.

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
    options: dict[str, Any] = {"chip_config_name": "megacore"} if generation == "v4" else {}
    if slices > 1:
        options["num_slices"] = slices
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"topology={topology!r} is not one libtpu knows: {reason}") from error
    return list(description.devices)


def gpu_devices(topology: Topology) -> list[Any]:
    """Devices of absent NVIDIA hosts.

    Raises:
      ConfigError: jax's CUDA plugin is not installed, or it takes no such description.
    """
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if not any(map(importlib.util.find_spec, plugins)):
        raise ConfigError(
            f"topology={topology.name!r} is compiled by jax's CUDA plugin, which is not installed: "
            'pip install "jax[cuda13]" (no GPU is needed), or ask for the estimate alone with --fast'
        )
    hosts, gpus = topology.sides
    try:
        description = topologies.get_topology_desc(
            platform="cuda",
            target_config=gpu_target(topology.chip),
            topology=f"1x{hosts}x{gpus}",
        )
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"topology={topology.name!r}: the CUDA plugin refuses it: {reason}"
        ) from error
    return list(description.devices)


def gpu_target(chip: Chip) -> str:
    """XLA's description of a Hopper GPU, a GpuTargetConfigProto in text.

    As XLA's own xla/backends/gpu/target_config/specs/h100_sxm.txtpb.
    """
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: {chip.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {chip.memory_bandwidth:.0f} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {chip.memory} device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0" name: "{chip.kind}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{chip.kind}"
"""
