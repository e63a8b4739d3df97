"""Attention on Hopper (H100, H200) in Pallas Mosaic GPU: all features, forward and backward.

1. `refuses` says who must look elsewhere: other chips, dtypes, head sizes, a broken ptxas.
2. `make_ranges` finds, once per batch, the tiles that each kernel visits.
3. `attend` is the op, in `mosaic_gpu_op`; its kernels are in `mosaic_gpu_forward` and
   `mosaic_gpu_backward`, what they share in `hopper`.

Sources: FlashAttention-2 (arXiv 2307.08691) and -3 (2407.08608), ALiBi (2108.12409).
"""

import re
from typing import Any, NamedTuple

import jax

from llm_jax.kernels.attention.plan import (
    Places,
    Plan,
    Request,
    Rule,
    Tiles,
    key_ranges,
    query_ranges,
)
from llm_jax.kernels.attention.ptxas import ptxas_objection
from llm_jax.kernels.device import Device

INTERPRET: Any = None  # on a CPU, a test puts `InterpretGPUParams` here
HOPPER = re.compile(r"\b(H|GH)(100|200|800|20)\b")  # in JAX's name of the chip
DTYPES = ("bfloat16", "float16")
BLOCK = 128  # rows of queries and of keys are padded to a multiple of this


class Tiling(NamedTuple):
    """Tiles of one kernel."""

    block: int  # rows that stay in shared memory: queries, or keys when their gradients are sought
    rows: int  # of the tiles that stream past them
    stages: int  # tiles under way


class Tilings(NamedTuple):
    """Tiles of all three."""

    forward: Tiling
    grad_queries: Tiling
    grad_keys: Tiling


# By chip and head size. Bounds: 227 KiB of shared memory for the block and `stages` tiles; 232
# registers per lane for sums and scores. From published sweeps on H100 and from registers and spills
# of compilations ahead of time; not yet swept by us on a GPU.
TILINGS = {
    ("sm_90", 64): Tilings(Tiling(128, 128, 4), Tiling(128, 128, 3), Tiling(128, 64, 4)),
    ("sm_90", 128): Tilings(Tiling(128, 128, 2), Tiling(128, 64, 3), Tiling(128, 64, 3)),
    ("sm_90", 256): Tilings(Tiling(128, 64, 2), Tiling(64, 64, 2), Tiling(64, 64, 2)),
}
HEAD_SIZES = tuple(H for _, H in TILINGS)


def refuses(request: Request, device: Device) -> str | None:
    """Why these kernels cannot take this call; None: they can."""
    if device.platform != "gpu" or not HOPPER.search(device.kind):
        return f"needs a Hopper GPU (H100, H200), not {device.kind}"
    if request.dtype not in DTYPES and INTERPRET is None:
        return f"needs {' or '.join(DTYPES)}, not {request.dtype}"
    if max(HEAD_SIZES) < request.H:
        return f"needs a head size of at most {max(HEAD_SIZES)}, not {request.H}"
    return ptxas_objection()


def head_size(H: int) -> int:
    """The size to which heads of H are padded with zeros."""
    return min(size for size in HEAD_SIZES if size >= H)


def tilings_for(H: int) -> Tilings:
    """The tiles for heads of H, on the only chips there are kernels for."""
    return TILINGS["sm_90", head_size(H)]


def make_ranges(places: Places, request: Request) -> tuple[jax.Array, ...]:
    """The tiles to visit, of each kernel in the order of `Tilings`, as in `plan`."""
    tilings, sizes = tilings_for(request.H), (request.rule, request.T, request.S)
    by_query = (
        key_ranges(places, *sizes, Tiles(query=tiling.block, key=tiling.rows))
        for tiling in (tilings.forward, tilings.grad_queries)
    )
    by_key = Tiles(query=tilings.grad_keys.rows, key=tilings.grad_keys.block)
    return *by_query, query_ranges(places, *sizes, by_key)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    slopes_N: jax.Array | None,
    plan: Plan,
    rule: Rule,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.attend`.

    The results are named `attention_out` and `attention_lse` for `jax.checkpoint` policies: saving
    both spares the backward pass a second forward.
    """
    from llm_jax.kernels.attention import mosaic_gpu_op  # Mosaic GPU is not in every jaxlib

    return mosaic_gpu_op.attend(q_BTNH, k_BSKH, v_BSKH, slopes_N, plan, rule, INTERPRET)
