"""Chooses the tiles of the attention kernels and writes them down as data.

    python tools/tune_attention.py --chip v5p              one TPU, none needed; minutes
    python tools/tune_attention.py --chip all --heads 128

For a TPU every candidate is compiled ahead of time and its bundles are counted (`tpu_bundles.py`);
what a causal row of each length then takes is added up tile by tile, with the cost of a grid step.
The result goes to llm_jax/kernels/attention/tpu_tiles.json.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tpu_bundles import STEP_CYCLES, TOPOLOGIES, kind, ours

from llm_jax.kernels.attention.plan import Places, Rule, Tiles, key_ranges, query_ranges
from llm_jax.kernels.attention.tpu_spec import Blocks

TABLE = Path(__file__).parent.parent / "llm_jax/kernels/attention/tpu_tiles.json"
CAUSAL = Rule(scale=1.0, causal=True, window=0, soft_cap=0.0)
LENGTHS = (2048, 8192, 32768)  # an entry serves rows up to its length; the last, longer ones too
MIB = 2**20
VMEM = {"v4": 16 * MIB, "v5e": 100 * MIB, "v5p": 56 * MIB, "v6e": 100 * MIB, "7x": 56 * MIB}
QUERIES, KEYS, CHUNK, SLICES = (512, 1024, 2048), (1024, 2048, 4096), 512, (128, 256)
BACKWARD = ((512, 512), (1024, 512), (1024, 1024), (2048, 1024), (2048, 2048))
BACKWARD_SLICES = (256, 512)


def forward_cycles(T: int, blocks: Blocks, costs: dict[str, float]) -> float:
    """Of one causal row of T and one head."""
    ranges = np.asarray(key_ranges(Places(*[None] * 4), CAUSAL, T, T, blocks.chunks))[0]
    per_block, total = blocks.key // blocks.chunk, 0.0
    steps = -(-int(ranges[:, 3].max()) // per_block)
    for first, first_full, last_full, last in ranges.tolist():
        total += steps * STEP_CYCLES
        for start in range(first - first % per_block, last, per_block):
            end = start + per_block
            if first_full <= start and end <= last_full:
                total += costs["block"]
                continue
            lo, hi = max(first, start), min(last, end)
            full = max(min(last_full, hi) - max(first_full, lo), 0)
            total += full * costs["chunk"] + (hi - lo - full) * costs["masked"]
    return total


def backward_cycles(T: int, tiles: Tiles, costs: dict[str, float]) -> float:
    """Of one causal row of T and one head."""
    ranges = np.asarray(query_ranges(Places(*[None] * 4), CAUSAL, T, T, tiles))[0]
    full = (ranges[:, 2] - ranges[:, 1]).sum()
    visited = (ranges[:, 3] - ranges[:, 0]).sum()
    steps = len(ranges) * (ranges[:, 3] - ranges[:, 0]).max()
    return float(full * costs["full"] + (visited - full) * costs["masked"] + steps * STEP_CYCLES)


def count(chip: str, backward: bool, blocks: Blocks, H: int, causal: bool, dtype: Any) -> float:
    """Bundles, or infinity where the tiles do not fit the chip."""
    try:
        return ours(chip, backward, blocks, H=H, causal=causal, dtype=dtype)[0]
    except Exception as error:
        if "vmem" not in str(error).lower():
            raise
        return float("inf")


def tune_forward(chip: str, H: int, dtype: Any) -> dict[int, tuple[float, Blocks]]:
    """Per length the cheapest tiles and their cycles."""
    best: dict[int, tuple[float, Blocks]] = {}
    for query, key, piece in itertools.product(QUERIES, KEYS, SLICES):
        blocks = Blocks(query, key, CHUNK, piece, 256, 256, 256)
        single = blocks._replace(key=CHUNK)
        costs = {"block": count(chip, False, blocks, H, False, dtype)}
        if costs["block"] == float("inf"):
            continue
        costs["chunk"] = count(chip, False, single, H, False, dtype)
        costs["masked"] = count(chip, False, single, H, True, dtype) - costs["chunk"]
        print(f"{chip} H={H} forward {query}x{key}/{piece} {costs}", flush=True)
        for T in LENGTHS:
            if max(query, key) <= T:
                cycles = forward_cycles(T, blocks, costs)
                best[T] = min(best.get(T, (cycles, blocks)), (cycles, blocks))
    return best


def tune_backward(chip: str, H: int, dtype: Any) -> dict[int, tuple[float, Blocks]]:
    """Per length the cheapest tiles and their cycles."""
    best: dict[int, tuple[float, Blocks]] = {}
    for (query, key), piece in itertools.product(BACKWARD, BACKWARD_SLICES):
        blocks = Blocks(512, 512, 512, 128, query, key, piece)
        costs = {"full": count(chip, True, blocks, H, False, dtype)}
        both = count(chip, True, blocks, H, True, dtype)
        if both == float("inf"):
            continue
        costs["masked"] = both - costs["full"]
        print(f"{chip} H={H} backward {query}x{key}/{piece} {costs}", flush=True)
        for T in LENGTHS:
            if max(query, key) <= T:
                cycles = backward_cycles(T, blocks.backward_tiles, costs)
                best[T] = min(best.get(T, (cycles, blocks)), (cycles, blocks))
    return best


def tune(chip: str, H: int, dtype: Any) -> list[dict[str, Any]]:
    """The table's entries for a chip and head size."""
    forward, backward = tune_forward(chip, H, dtype), tune_backward(chip, H, dtype)
    entries = []
    for T in LENGTHS:
        (cycles, front), (back_cycles, back) = forward[T], backward[T]
        blocks = Blocks(*front[:4], *back[4:])
        pairs = T * T / 2 * 2 * H  # multiply-adds are two operations
        entries.append(
            {
                "length": T,
                **blocks._asdict(),
                "operations_per_bundle": [
                    round(2 * pairs / cycles),
                    round(5 * pairs / back_cycles),
                ],
            }
        )
    return entries


def main() -> None:
    """Tunes the chips and head sizes asked for, and rewrites their part of the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--chip", default="all", choices=["all", *TOPOLOGIES])
    parser.add_argument("--heads", type=int, nargs="+", default=[64, 128, 256])
    arguments = parser.parse_args()
    chips = list(TOPOLOGIES) if arguments.chip == "all" else [arguments.chip]
    for chip, H in itertools.product(chips, arguments.heads):
        name = kind(chip)
        table = json.loads(TABLE.read_text(encoding="utf-8"))
        entry = table["chips"].setdefault(name, {"vmem_limit_bytes": VMEM[chip]})
        table["made_by"] = "python tools/tune_attention.py"
        TABLE.write_text(dump(table), encoding="utf-8")
        entry[str(H)] = tune(chip, H, jnp.bfloat16)
        TABLE.write_text(dump(table), encoding="utf-8")


def dump(table: dict[str, Any]) -> str:
    """JSON with one entry a line."""
    text = json.dumps(table, indent=1)
    return "".join(line for line in text.splitlines(keepends=True))


if __name__ == "__main__":
    main()
