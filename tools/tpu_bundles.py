"""How many VLIW bundles a TPU kernel takes: a performance model that needs no TPU.

libtpu compiles for a chip that is only described, and writes down the final program. One row is one
bundle, and with the inner loop unrolled, rows are nearly cycles: on v5p and v6e they predicted measured
times within 4 % (shared anchor kernels.md, section 4a). It does not see stalls of copies, nor about
0.35 us of a grid step. Every branch of a kernel is counted, taken or not, so costs of single branches
are differences of two programs.

    python tools/tpu_bundles.py v5p        ours against splash attention, and what features cost
"""

import argparse
import contextlib
import functools
import glob
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

DUMP = tempfile.mkdtemp(prefix="llm_jax_bundles_")
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final.* --xla_tpu_scoped_vmem_limit_kib=49152",
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
    if "MATMUL" not in header:
        raise LookupError(
            "this libtpu describes bundles in another way; 0.0.52 does it as read here"
        )
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
        out: Any = call(q, k, v, **extra)
        return out.astype(jnp.float32).sum()

    sizes, held = tpu_spec.blocks_for, lambda *_: blocks
    pallas_tpu.blocks_for = held
    try:
        function = jax.grad(attend, (0, 1, 2)) if backward else attend
        name = f"llm_jax_attention_{'backward' if backward else 'forward'}"
        return bundles(chip, name, function, q, k, v, extra)
    finally:
        pallas_tpu.blocks_for = sizes


def splash(chip: str, backward: bool, make: Callable[[int, int], Callable], T: int = 8192) -> float:
    """Bundles per block of the better splash: full attention in blocks of 2048, fused backward."""
    shapes = [jax.ShapeDtypeStruct((*heads, T, 128), jnp.bfloat16) for heads in ((4,), (), ())]
    found = [float("inf")]
    for compute in (256, 512, 1024):
        kernel = make(T, compute)
        attend = lambda q, k, v, kernel=kernel: kernel(q, k, v).astype(jnp.float32).sum()  # noqa: E731
        function = jax.grad(attend, (0, 1, 2)) if backward else attend
        try:
            name = "dkv" if backward else "splash_mqa_fwd"
            found.append(bundles(chip, name, function, *shapes)[0])
        except jax.errors.JaxRuntimeError as error:
            if "vmem" not in str(error).lower():
                raise
    return min(found)


def _sizes(compute: int) -> dict[str, Any]:
    names: tuple[str, ...] = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv")
    computed: tuple[str, ...] = ("block_kv_compute", "block_kv_dkv_compute")
    return {**dict.fromkeys(names, SPLASH_BLOCK), **dict.fromkeys(computed, compute)}


def splash_in_jax(T: int, compute: int) -> Callable:
    """The kernel that comes with jax."""
    from jax.experimental.pallas.ops.tpu import splash_attention as module

    mask = module.MultiHeadMask([module.FullMask((T, T))] * 4)
    sizes = module.BlockSizes(**_sizes(compute), use_fused_bwd_kernel=True)
    return module.make_splash_mqa(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)


def splash_in_tokamax(T: int, compute: int) -> Callable:
    """The kernel of tokamax, where it is installed."""
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # pyright: ignore[reportMissingImports]
        splash_attention_kernel as kernel,
    )
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # pyright: ignore[reportMissingImports]
        splash_attention_mask as masks,
    )

    config = kernel.SplashConfig(**_sizes(compute), use_fused_bwd_kernel=True)
    return kernel.make_splash_mqa(masks.FullMask((T, T)), config=config, q_seq_shards=1)


RIVALS = {"splash in jax": splash_in_jax, "splash in tokamax": splash_in_tokamax}


def compare(chip: str) -> dict[str, dict[str, float]]:
    """Bundles per 2048 x 2048 scores of head size 128, by kernel, forward and backward."""
    found: dict[str, dict[str, float]] = {}
    blocks = tpu_spec.blocks_for(8192, 8192, 128, "bfloat16", kind(chip))
    for name, backward in (("forward", False), ("backward", True)):
        tile = blocks.backward_tiles if backward else (blocks.query, blocks.key)
        share = SPLASH_BLOCK**2 / (tile[0] * tile[1])
        plain = ours(chip, backward, blocks, causal=False)[0]
        row = {"ours": plain * share}
        row["ours with ALiBi"] = ours(chip, backward, blocks, causal=False, alibi=True)[0] * share
        for rival, make in RIVALS.items():
            with contextlib.suppress(ImportError):
                row[rival] = splash(chip, backward, make)
        found[name] = row
    return found


def main() -> None:
    """Prints the comparison for one chip, or as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("chip", choices=TOPOLOGIES)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    found = compare(arguments.chip)
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"{kind(arguments.chip)}: bundles per 2048 x 2048 scores, head size 128, bfloat16, full")
    for name, row in found.items():
        best = min(value for rival, value in row.items() if not rival.startswith("ours"))
        for rival, value in row.items():
            print(f"{name:9} {rival:18} {value:9.0f}   {value / best:.3f} of the better splash")


if __name__ == "__main__":
    main()
