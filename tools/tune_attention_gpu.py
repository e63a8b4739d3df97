"""Chooses the tiles of the Hopper kernels by timing them on the GPU that is here.

    python tools/tune_attention_gpu.py

For every head size and length, each candidate of each of the three kernels takes its turn in the whole
op, the other two at the tiles of the table; the median of rounds decides. Candidates are those whose
tiles fit in shared memory. The result goes to llm_jax/kernels/attention/gpu_tiles.json; heads of 256
have one candidate and are left as they are. About a minute on an H200 with 16 CPU cores.
"""

import argparse
import itertools
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tile_tables
from bench_attention import arrays, gradients, ours, seconds
from bench_attention_cases import Case

from llm_jax.kernels.attention import mosaic_gpu
from llm_jax.kernels.attention.mosaic_gpu import Tiling, Tilings

TABLE = Path(__file__).parent.parent / "llm_jax/kernels/attention/gpu_tiles.json"
TOKENS = 16384  # per call, of 2048 numbers each
LENGTHS = {64: (16384,), 128: (4096, 16384)}  # by head size; the last serves longer rows too
SHARED_MEMORY = 220 * 1024  # bytes for matrices; 227 KiB less barriers, positions and segments
ROWS, STAGES = (64, 128), (2, 3, 4)
MARGIN = 0.99  # of the table's time that a candidate must beat: less is noise


def spills(kernel: str, rows: int, H: int) -> bool:
    """Whether scores and sums exceed the registers once masks are added, which the timed case has few of.

    dQ of 128 x 128 scores spills 760 bytes with segments and ALiBi (tests/kernels/test_mosaic_gpu.py).
    """
    return kernel != "forward" and H >= 128 and rows > 64


def fits(kernel: str, tiling: Tiling, H: int) -> bool:
    """Whether the block and its stages fit; the forward block is queries alone, the others' a pair."""
    own = 1 if kernel == "forward" else 2
    return 2 * H * (own * tiling.block + 2 * tiling.stages * tiling.rows) <= SHARED_MEMORY


def candidates(held: Tilings, H: int) -> dict[tuple[str, Tiling], Tilings]:
    """The table's tiles, and those that differ from them in one kernel."""
    found = {}
    for kernel in Tilings._fields:
        block = getattr(held, kernel).block
        for rows, stages in itertools.product(ROWS, STAGES):
            tiling = Tiling(block, rows, stages)
            if fits(kernel, tiling, H) and not spills(kernel, rows, H):
                found[kernel, tiling] = held._replace(**{kernel: tiling})
    return found


def lower(case: Case, kernel: str, tilings: Tilings) -> Any:
    """Forward, or gradients, traced with these tiles."""
    attend, shapes = ours(case, "mosaic_gpu"), arrays(case, jnp.bfloat16, abstract=True)
    entry = {"length": case.T, **{name: list(t) for name, t in tilings._asdict().items()}}
    table = mosaic_gpu._table
    mosaic_gpu._table = lambda: {str(case.H): [entry]}
    try:
        if kernel == "forward":
            return jax.jit(lambda q, k, v: attend(q, k, v)).lower(*shapes[:3])
        return jax.jit(gradients(attend)).lower(*shapes)
    finally:
        mosaic_gpu._table = table


def compiled(lowered: Any) -> Any:
    """The program, or None where the compiler refuses it."""
    try:
        return lowered.compile()
    except Exception as error:
        print(f"left out: {str(error).splitlines()[0]}", flush=True)
        return None


def tune(H: int, T: int, rounds: int) -> dict[str, Any]:
    """The entry of the table for causal rows of T."""
    case = Case(f"head {H}", TOKENS // T, T, 2048 // H, 2048 // H, H)
    held = mosaic_gpu.tilings_for(T, T, H)
    wanted = candidates(held, H)
    lowered = {key: lower(case, key[0], tilings) for key, tilings in wanted.items()}
    with ThreadPoolExecutor() as pool:
        made = dict(zip(lowered, pool.map(compiled, lowered.values()), strict=True))
    made = {key: program for key, program in made.items() if program is not None}
    given = arrays(case, jnp.bfloat16)
    spent: dict[tuple[str, Tiling], list[float]] = {key: [] for key in made}
    for turn in range(rounds + 1):
        for key, program in made.items():
            took = seconds(program, given[:3] if key[0] == "forward" else given, 3)
            if turn:
                spent[key].append(1e3 * took)
    times = {key: statistics.median(took) for key, took in spent.items()}
    entry: dict[str, Any] = {"length": T}
    for kernel in Tilings._fields:
        of_kernel = {tiling: ms for (name, tiling), ms in times.items() if name == kernel}
        own = getattr(held, kernel)
        best = min(of_kernel, key=lambda tiling: of_kernel[tiling])
        entry[kernel] = list(best if of_kernel[best] < MARGIN * of_kernel[own] else own)
        for tiling, ms in sorted(of_kernel.items(), key=lambda pair: pair[1]):
            print(f"H={H} T={T} {kernel:12} {tuple(tiling)} {ms:.3f} ms", flush=True)
    return entry


def main() -> None:
    """Times everything and rewrites the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", type=int, nargs="+", default=list(LENGTHS), choices=LENGTHS)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    table = tile_tables.read(TABLE)
    for H in options.heads:
        table["chips"]["sm_90"][str(H)] = [tune(H, T, options.rounds) for T in LENGTHS[H]]
    table["measured_on"] = f"{jax.devices()[0].device_kind}, {time.strftime('%d %B %Y')}"
    tile_tables.write(TABLE, table)


if __name__ == "__main__":
    main()
