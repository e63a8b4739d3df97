"""Run by test_cross_entropy.py on eight virtual devices: both losses on seven meshes equal one device."""

import jax
import numpy as np
from jax.sharding import NamedSharding

from llm_jax.kernels.cross_entropy import Split, cross_entropy, token_nats, xla_tiled
from llm_jax.sharding import MeshConfig, make_mesh, mesh_axes, partition_spec
from tests.kernels.test_cross_entropy import inputs
from tests.shapes import largest_array

# sizes of B, T, D, V and of the mesh: data, fsdp, tensor, context
CASES = [
    ((8, 48, 16, 64), (8, 1, 1, 1)),
    ((8, 48, 16, 64), (1, 8, 1, 1)),
    ((8, 48, 16, 64), (2, 2, 2, 1)),
    ((8, 48, 16, 64), (1, 2, 2, 2)),
    ((8, 48, 16, 64), (1, 1, 8, 1)),
    ((8, 48, 16, 61), (2, 2, 2, 1)),  # a vocabulary that does not divide is not split
    ((3, 48, 16, 64), (2, 2, 2, 1)),  # nor are rows, and then every device has all of dhead
]


def main() -> None:
    for number, (shape, mesh_sizes) in enumerate(CASES):
        B, T, D, V = shape
        xla_tiled.TILE_BYTES = 4 * 16 * V
        x, head, targets, weights = inputs(number, shape)
        bias = np.random.default_rng(number).normal(size=V).astype(np.float32)

        def losses(x, head, bias, targets, weights, split=None):
            value, sums = cross_entropy(
                x, head, targets, weights, bias_V=bias, z_loss=0.1, soft_cap=20.0, split=split
            )
            nats, log_z = token_nats(x, head, targets, bias_V=bias, split=split)
            return value + (nats * weights**2 + log_z).sum(), (sums, nats)

        gradient = lambda losses: jax.jit(jax.value_and_grad(losses, (0, 1, 2), has_aux=True))  # noqa: E731
        alone = gradient(losses)(x, head, bias, targets, weights)
        names = ("data", "fsdp", "tensor", "context")
        mesh = make_mesh(MeshConfig(**dict(zip(names, mesh_sizes, strict=True))))
        axes = (
            ("batch", "time", None), ("embed", "vocab"), ("vocab",), ("batch", "time"), ("batch", "time"),
        )  # fmt: skip
        with jax.set_mesh(mesh):
            split = Split(
                mesh_axes("batch", B), mesh_axes("time", T), mesh_axes("embed", D), mesh_axes("vocab", V)
            )  # fmt: skip
            on_mesh = lambda *given, split=split: losses(*given, split=split)  # noqa: E731
            placed = [
                jax.device_put(a, NamedSharding(mesh, partition_spec(names, a.shape, mesh)))
                for a, names in zip((x, head, bias, targets, weights), axes, strict=True)
            ]
            program = gradient(on_mesh).lower(*placed).compile()
            result = program(*placed)
        for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        dhead = result[1][1]
        if B == 8:  # dhead comes out as the head is stored, and no device ever held much
            parts = mesh.shape["fsdp"] * (mesh.shape["tensor"] if split.vocab else 1)
            assert dhead.addressable_shards[0].data.size * parts == D * V, dhead.sharding
            assert largest_array(program) <= B * T * max(D, V / 8), largest_array(program)
        print("same on", shape, mesh_sizes)


if __name__ == "__main__":
    main()
