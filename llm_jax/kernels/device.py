"""Which accelerator a program is being traced for: the mesh's, which may be absent, or this process's."""

from typing import NamedTuple

import jax


class Device(NamedTuple):
    """`platform` is "cpu", "gpu" or "tpu"; `kind` is JAX's name of the chip, as "TPU v5 lite"."""

    platform: str
    kind: str


def current_device() -> Device:
    """The device of the mesh in use (`jax.set_mesh`), else the default backend's first.

    A mesh of devices that are only described, as for compiling ahead of time, names its own kind:
    `jax.default_backend()` would choose the host's kernels for it.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None and described.platform is not None:
        platform = "gpu" if described.platform in ("cuda", "rocm") else described.platform
        return Device(platform, described.device_kind)
    return Device(jax.default_backend(), jax.devices()[0].device_kind)
