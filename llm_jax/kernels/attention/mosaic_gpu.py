"""Attention on Hopper (H100, H200) in Pallas Mosaic GPU: all features, forward and backward.

1. `refuses` says who must look elsewhere: other chips, dtypes, head sizes, a broken ptxas.
2. `make_ranges` finds, once per batch, the tiles that each kernel visits.
3. `attend` is the op, in `mosaic_gpu_op`; its kernels are in `mosaic_gpu_forward` and
   `mosaic_gpu_backward`, what they share in `hopper`.

Sources: FlashAttention-2 (arXiv 2307.08691) and -3 (2407.08608), ALiBi (2108.12409).
"""

import functools
import json
import re
from importlib import resources
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
    """Tiles of all three. Bounds: 227 KiB of shared memory for the block and `stages` tiles; 232 registers
    per lane for sums and scores.
    """

    forward: Tiling
    grad_queries: Tiling
    grad_keys: Tiling


HEAD_SIZES = (64, 128, 256)  # those in gpu_tiles.json


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


@functools.cache
def _table() -> dict[str, list[dict[str, Any]]]:
    text = (
        resources.files("llm_jax.kernels.attention").joinpath("gpu_tiles.json").read_text("utf-8")
    )
    return json.loads(text)["chips"]["sm_90"]


def tilings_for(T: int, S: int, H: int) -> Tilings:
    """The table's tiles for a head size and length, on the only chips there are kernels for."""
    entries = _table()[str(head_size(H))]
    entry = next((e for e in entries if e["length"] >= max(T, S)), entries[-1])
    return Tilings(*(Tiling(*entry[name]) for name in Tilings._fields))


def make_ranges(places: Places, request: Request) -> tuple[jax.Array, ...]:
    """The tiles to visit, of each kernel in the order of `Tilings`, as in `plan`."""
    tilings, sizes = (
        tilings_for(request.T, request.S, request.H),
        (request.rule, request.T, request.S),
    )
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
