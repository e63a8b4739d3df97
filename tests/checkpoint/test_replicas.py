"""A copy that differs on one of eight devices is found and named; equal copies and shards are not."""

import subprocess
import sys

from tests.run.tiny_runs import ROOT
from tests.virtual_devices import with_devices

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from llm_jax.checkpoint.replicas import differing_replicas

mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
values = np.arange(64, dtype=np.float32).reshape(8, 8)

def tree(poked, spec):
    '''w on the mesh; the device `poked` gets one flipped bit in its own copy.'''
    sharding = NamedSharding(mesh, spec)
    shards = []
    for device, index in sharding.addressable_devices_indices_map(values.shape).items():
        part = values[index].copy()
        if device.id in poked:
            part.view(np.uint32)[0, 0] ^= 1 << 3
        shards.append(jax.device_put(part, device))
    w = jax.make_array_from_single_device_arrays(values.shape, sharding, shards)
    step = jax.device_put(jnp.int32(7), NamedSharding(mesh, P()))
    return {"params": {"w": w}, "step": step}

for spec in (P(), P("fsdp"), P("data", "fsdp")):
    assert differing_replicas(tree([], spec)) == []
named = "params/w: the copy of device {} on process 0 differs".format
assert differing_replicas(tree([5], P())) == [named(5)]
assert differing_replicas(tree([3], P("fsdp"))) == [named(3)]
assert differing_replicas(tree([3], P("data", "fsdp"))) == [], "nobody else has that part"
both = differing_replicas(tree([6], P("data")))
assert both == [named(6), named(7)], both  # two copies: nobody knows which is right
"""


def test_one_flipped_bit_in_one_copy_is_named_by_its_device():
    words = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(words, cwd=ROOT, env=with_devices(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
