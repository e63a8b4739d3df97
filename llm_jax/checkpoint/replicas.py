"""Whether all copies of the same values are the same, on every device: silent corruption shows here.

Devices that hold a copy computed it each for itself, from the same gradients. A chip that miscounts once leaves
its copy different for good, and nothing else ever notices (the Gemini report expects it weekly at scale).
"""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.checkpoint.fingerprint import fingerprint, named_leaves


def differing_replicas(tree: Any) -> list[str]:
    """A line for each device whose copy of a leaf is not that of the others; every process calls it.

    Where two copies differ and there are only two, both are named: nobody knows which is right.

    Args:
      tree: pytree of arrays with NamedShardings on one mesh.
    """
    leaves = named_leaves(tree)
    mesh = next(iter(leaves.values())).sharding.mesh
    specs = tuple(leaf.sharding.spec for leaf in leaves.values())
    values = _on_each_device(mesh, specs)(tuple(leaves.values()))
    if jax.process_count() > 1:
        values = multihost_utils.process_allgather(values, tiled=True)
    prints = np.asarray(values)  # [devices, leaves, 2]
    place = {device: row for row, device in enumerate(mesh.devices.flat)}
    found = []
    for number, (name, leaf) in enumerate(leaves.items()):
        copies = collections.defaultdict(list)
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            copies[str(index)].append(device)
        for devices in copies.values():
            seen = {
                d: (int(prints[place[d], number, 0]), int(prints[place[d], number, 1]))
                for d in devices
            }
            (usual, count), *_ = collections.Counter(seen.values()).most_common()
            for device, value in seen.items():
                if value != usual or (len(set(seen.values())) > 1 and 2 * count <= len(devices)):
                    found.append(
                        f"{name}: the copy of device {device.id} on process {device.process_index} differs"
                    )
    return found


@functools.cache
def _on_each_device(mesh: Any, specs: tuple[PartitionSpec, ...]) -> Any:
    """The fingerprints of what every device itself holds: uint32 [devices, leaves, 2]."""

    def local(arrays: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.stack([fingerprint(array) for array in arrays])[None]

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=PartitionSpec(mesh.axis_names),
        check_vma=False,  # copies are to be read one by one, not taken for one value
    )
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    return jax.jit(mapped, in_shardings=(shardings,))
