"""How many VLIW bundles a TPU kernel takes: a performance model that needs no TPU.

libtpu compiles for a chip that is only described, and writes down the final program. One row is one
bundle, and with the inner loop unrolled, rows are nearly cycles: on v5p and v6e they predicted measured
times within 4 % (shared anchor kernels.md, section 4a). It does not see stalls of copies, nor about
0.35 us of a grid step. Every branch of a kernel is counted, taken or not, so costs of single branches
are differences of two programs.

    python tools/tpu_bundles.py v5p        ours against splash attention, and what features cost
"""

import functools
import glob
import os
import tempfile
from collections.abc import Callable
from typing import Any

DUMP = tempfile.mkdtemp(prefix="llm_jax_bundles_")
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final.*",
}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec  # noqa: E402

from llm_jax.kernels.attention import flash_attention, pallas_tpu, tpu_spec  # noqa: E402
from llm_jax.plan import tpu_devices  # noqa: E402

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "7x": "tpu7x:2x2x1",
}
STEP_CYCLES = 600  # of a grid step, 0.35 us at 1.75 GHz
SPLASH_BLOCK = 2048


@functools.cache
def described(chip: str) -> Mesh:
    """A mesh of one absent chip."""
    devices = tpu_devices(TOPOLOGIES[chip])[:1]
    return Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,))


def kind(chip: str) -> str:
    """JAX's name of the chip, as in tpu_tiles.json."""
    return described(chip).devices[0].device_kind


def compile_for(chip: str, function: Callable, *shapes: Any) -> Any:
    """The executable for an absent chip; `shapes` are trees of jax.ShapeDtypeStruct."""
    mesh = described(chip)
    everywhere = NamedSharding(mesh, PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)  # noqa: E731
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*jax.tree.map(place, shapes)).compile()


def bundles(chip: str, name: str, function: Callable, *shapes: Any) -> tuple[int, float]:
    """Bundles of the kernel whose name holds `name`, and the share of them that feed the MXU."""
    for path in glob.glob(f"{DUMP}/*"):
        os.remove(path)
    compile_for(chip, function, *shapes)
    found = [
        p for p in glob.glob(f"{DUMP}/*final_hlo-static-per-bundle-utilization.txt") if name in p
    ]
    if len(found) != 1:
        raise LookupError(f"{len(found)} kernels named *{name}* were compiled, not one")
    with open(found[0], encoding="utf-8") as file:
        _, header, capacities, _, *lines = file.read().splitlines()
    column = [title.strip() for title in header.split(",")].index("MATMUL")
    rows = [line.split() for line in lines if line.strip()[:1].isdigit()]
    busy = sum(int(row[column]) for row in rows)
    return len(rows), busy / (int(capacities.split()[column]) * len(rows))


def attention_shapes(T: int, N: int, K: int, H: int, dtype: Any = jnp.bfloat16) -> list[Any]:
    """q, k and v of one row."""
    return [jax.ShapeDtypeStruct((1, T, heads, H), dtype) for heads in (N, K, K)]


def ours(
    chip: str,
    backward: bool,
    blocks: tpu_spec.Blocks,
    *,
    H: int = 128,
    T: int = 8192,
    segments: bool = False,
    alibi: bool = False,
    dtype: Any = jnp.bfloat16,
    **options: Any,
) -> tuple[int, float]:
    """Bundles of our forward or backward kernel with these tiles."""
    q, k, v = attention_shapes(T, 4, 1, H, dtype)
    extra: dict[str, Any] = {}
    if segments:
        rows = jax.ShapeDtypeStruct((1, T), jnp.int32)
        extra = {"q_segments_BT": rows, "kv_segments_BS": rows}
    if alibi:
        extra["alibi_slopes_N"] = jax.ShapeDtypeStruct((4,), jnp.float32)

    def attend(q: Any, k: Any, v: Any, extra: Any) -> Any:
        call = functools.partial(flash_attention, implementation="pallas_tpu", **options)
        return call(q, k, v, **extra).astype(jnp.float32).sum()

    sizes, held = tpu_spec.blocks_for, lambda *_: blocks
    pallas_tpu.blocks_for = held
    try:
        function = jax.grad(attend, (0, 1, 2)) if backward else attend
        name = f"llm_jax_attention_{'backward' if backward else 'forward'}"
        return bundles(chip, name, function, q, k, v, extra)
    finally:
        pallas_tpu.blocks_for = sizes


def splash(
    chip: str,
    backward: bool,
    *,
    module: Any,
    H: int = 128,
    T: int = 8192,
    compute: int,
    causal: bool = False,
) -> tuple[int, float]:
    """Bundles of splash attention with blocks of 2048, its backward fused."""
    block = SPLASH_BLOCK
    sizes = {name: block for name in ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv")}
    sizes |= {"block_kv_compute": compute, "block_kv_dkv_compute": compute}
    q, k, v = (jax.ShapeDtypeStruct((heads, T, H), jnp.bfloat16) for heads in (4, 1, 1))
    mask_type = module.CausalMask if causal else module.FullMask

    def attend(q: Any, k: Any, v: Any) -> Any:
        mask = module.MultiHeadMask([mask_type((T, T))] * 4)
        kernel = module.make_splash_mqa(
            mask,
            block_sizes=module.BlockSizes(**sizes, use_fused_bwd_kernel=True),
            head_shards=1,
            q_seq_shards=1,
        )
        return kernel(q, k[0], v[0]).astype(jnp.float32).sum()

    function = jax.grad(attend, (0, 1, 2)) if backward else attend
    return bundles(chip, "dkv" if backward else "splash_mqa_fwd", function, q, k, v)


if __name__ == "__main__":
    pass
