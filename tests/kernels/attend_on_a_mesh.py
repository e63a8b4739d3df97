"""Run by test_attention.py on four virtual devices: batch over two, heads over two."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.kernels.attention import flash_attention, xla_chunked
from llm_jax.kernels.attention.plan import Tiles

COLLECTIVE = r"= (\S+) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)"


def main() -> None:
    xla_chunked.CPU_TILES = Tiles(16, 16)
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=axes)
    random = np.random.default_rng(0)
    heads = NamedSharding(mesh, P("data", None, "tensor"))
    rows = NamedSharding(mesh, P("data"))
    q, k, v = (random.normal(size=(4, 40, n, 8)).astype(np.float32) for n in (6, 2, 2))
    segments = np.sort(random.integers(0, 4, (4, 40))).astype(np.int32)
    slopes = np.linspace(0.1, 1, 6, dtype=np.float32)

    for implementation in ("xla_chunked", "reference"):

        def loss(q, k, v, segments, implementation=implementation):
            out = flash_attention(
                q,
                k,
                v,
                alibi_slopes_N=jnp.asarray(slopes),
                q_segments_BT=segments,
                kv_segments_BS=segments,
                implementation=implementation,
            )
            return jnp.square(out).sum(), out

        gradients = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
        placed = jax.device_put((q, k, v, segments), (heads, heads, heads, rows))
        compiled = gradients.lower(*placed).compile()
        collectives = re.findall(COLLECTIVE, compiled.as_text() or "")
        assert all(kind == "all-reduce" for _, kind in collectives), collectives
        assert all(shape.startswith("pred[") for shape, _ in collectives), collectives
        for x, y in zip(
            jax.tree.leaves(compiled(*placed)),
            jax.tree.leaves(gradients(q, k, v, segments)),
            strict=True,
        ):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
        print(implementation, "ok")


if __name__ == "__main__":
    main()
