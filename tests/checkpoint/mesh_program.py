"""Saves, or restores and checks, one state on a mesh of virtual devices: `FOLDER VERB SHAPE [ID COUNT PORT]`.

Run as a program by test_meshes.py: the number of devices is fixed when jax starts.
"""

import os
import sys
from pathlib import Path

from tests.virtual_devices import with_devices

FOLDER, VERB, SHAPE = Path(sys.argv[1]), sys.argv[2], tuple(map(int, sys.argv[3].split("x")))
PROCESS, PROCESSES, PORT = (int(word) for word in [*sys.argv[4:], "0", "1", "0"][:3])
os.environ |= with_devices(SHAPE[0] * SHAPE[1] // PROCESSES)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from llm_jax.checkpoint import CheckpointConfig, RunLock, Store, fingerprints  # noqa: E402

SPECS = {
    "params": {"w": P("fsdp", "tensor"), "b": P("tensor"), "flag": P()},
    "keys": P("fsdp"),
    "step": P(),
}


def make(step: int) -> dict:
    w = jnp.arange(4096, dtype=jnp.float32).reshape(64, 64) * step - 300  # exact, jitted or not
    params = {"w": w, "b": w[0].astype(jnp.bfloat16), "flag": w[:3] > 0}
    return {
        "params": params,
        "keys": jax.random.split(jax.random.key(9), 16),
        "step": jnp.int32(step),
    }


def main() -> None:
    if PROCESSES > 1:
        address = f"127.0.0.1:{PORT}"
        jax.distributed.initialize(address, PROCESSES, PROCESS, coordinator_bind_address=address)
    mesh = jax.make_mesh(SHAPE, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    sharded = jax.jit(make, static_argnums=0, out_shardings=shardings)
    with (
        RunLock(FOLDER) as lock,
        Store(FOLDER / "checkpoints", CheckpointConfig(), lock=lock) as store,
    ):
        if VERB == "save":
            for step in (1, 2):
                store.save(step, sharded(step), {"mesh": list(SHAPE)}, {"tokenizer.model": b"x"})
            store.wait()
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(lambda: make(0)), shardings,
        )  # fmt: skip
        state, meta = store.restore(abstract)
        assert state["params"]["w"].sharding == shardings["params"]["w"]
        actual, expected = fingerprints(state), fingerprints(sharded(meta["step"]))
        assert actual == expected, (actual, expected)
        if VERB == "damaged":  # the caller flipped a byte of step 2
            assert meta["step"] == 1
        if PROCESS == 0:
            print(meta["step"], *(actual[name] for name in sorted(actual)), flush=True)


if __name__ == "__main__":
    main()
