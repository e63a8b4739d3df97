"""Chooses the tiles of the attention kernels and writes them down as data.

    python tools/tune_attention.py --chip v5p              one TPU, none needed; minutes
    python tools/tune_attention.py --chip all --heads 128

For a TPU every candidate is compiled ahead of time and its bundles are counted (`tpu_bundles.py`);
what a causal row of each length then takes is added up tile by tile, with the cost of a grid step.
The result goes to llm_jax/kernels/attention/tpu_tiles.json.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tile_tables
from tpu_bundles import STEP_CYCLES, TOPOLOGIES, kind, ours

from llm_jax.kernels.attention.plan import Places, Rule, key_ranges, query_ranges
from llm_jax.kernels.attention.tpu_spec import Blocks

TABLE = Path(__file__).parent.parent / "llm_jax/kernels/attention/tpu_tiles.json"
CAUSAL = Rule(scale=1.0, causal=True, window=0, soft_cap=0.0)
LENGTHS = (2048, 8192, 32768)  # an entry serves rows up to its length; the last, longer ones too
MIB = 2**20
VMEM = {"v4": 16 * MIB, "v5e": 100 * MIB, "v5p": 56 * MIB, "v6e": 100 * MIB, "7x": 56 * MIB}
QUERIES, KEYS, CHUNK, SLICE, PARTS = (512, 1024, 2048), (1024, 2048, 4096), 512, 128, (512, 1024)
BACKWARD = ((512, 512), (1024, 512), (1024, 1024), (2048, 1024), (2048, 2048))
BACKWARD_SLICES, BACKWARD_PARTS = (512, 256), (512, 1024)
DOCUMENTS = 8  # packed into a row, beside a row of one document


def places(T: int, documents: int) -> Places:
    """A row of equal documents."""
    segments = None if documents == 1 else jnp.repeat(jnp.arange(1, documents + 1), T // documents)
    row = None if segments is None else segments[None]
    return Places(None, None, row, row)


def forward_cycles(T: int, blocks: Blocks, costs: dict[str, float], documents: int = 1) -> float:
    """Of one causal row of T and one head."""
    place = places(T, documents)
    ranges = np.asarray(key_ranges(place, CAUSAL, T, T, blocks.tiles))[0]
    parts = np.asarray(key_ranges(place, CAUSAL, T, T, blocks.parts))[0, :, ::3]
    parts = parts.reshape(len(ranges), -1, 2)
    per_block = blocks.key // blocks.chunk
    steps = (-(-ranges[:, 3] // per_block) - ranges[:, 0] // per_block).max()
    total = float(steps * len(ranges) * STEP_CYCLES)
    for (first, first_full, last_full, last), own in zip(ranges.tolist(), parts, strict=True):
        for start in range(first - first % per_block, last, per_block):
            end = start + per_block
            if first_full <= start and end <= last_full:
                total += costs["block"]
                continue
            for chunk in range(max(first, start), min(last, end)):
                if first_full <= chunk < last_full:
                    total += costs["chunk"]
                else:
                    total += costs["part"] * ((own[:, 0] <= chunk) & (chunk < own[:, 1])).sum()
    return total


def backward_cycles(T: int, blocks: Blocks, costs: dict[str, float], documents: int = 1) -> float:
    """Of one causal row of T and one head."""
    place = places(T, documents)
    ranges = np.asarray(query_ranges(place, CAUSAL, T, T, blocks.backward_tiles))[0]
    parts = np.asarray(query_ranges(place, CAUSAL, T, T, blocks.backward_parts))[0, :, ::3]
    parts = parts.reshape(len(ranges), -1, 2)
    per_tile = blocks.backward_query // blocks.backward_part
    total = float(len(ranges) * (ranges[:, 3] - ranges[:, 0]).max() * STEP_CYCLES)
    for (first, first_full, last_full, last), own in zip(ranges.tolist(), parts, strict=True):
        for tile in range(first, last):
            if first_full <= tile < last_full:
                total += costs["full"]
                continue
            lo, hi = tile * per_tile, (tile + 1) * per_tile
            seen = np.clip(own[:, 1], lo, hi) - np.clip(own[:, 0], lo, hi)
            total += costs["part"] * seen.clip(0).sum() + costs["base"]
    return total


def per_pair(cycles: Any, T: int, blocks: Blocks, costs: dict[str, float]) -> float:
    """Cycles per visible pair, over a row of one document and one of several."""
    spent = sum(cycles(T, blocks, costs, documents) for documents in (1, DOCUMENTS))
    return spent / (T * T / 2 * (1 + 1 / DOCUMENTS))


def count(chip: str, backward: bool, blocks: Blocks, H: int, causal: bool, dtype: Any) -> float:
    """Bundles, or infinity where the tiles do not fit the chip."""
    try:
        return ours(chip, backward, blocks, H=H, causal=causal, dtype=dtype)[0]
    except Exception as error:
        if "vmem" not in str(error).lower():
            raise
        return float("inf")


def all_features_fit(chip: str, blocks: Blocks, H: int, dtype: Any) -> bool:
    """Whether backward still fits with every feature: on v4 masks make it spill 12 of 16 MiB."""
    everything = {"segments": True, "alibi": True, "window": 1000, "soft_cap": 30.0}
    try:
        ours(chip, True, blocks, H=H, dtype=dtype, **everything)
    except Exception as error:
        if "vmem" not in str(error).lower():
            raise
        return False
    return True


def tune_forward(chip: str, H: int, dtype: Any) -> dict[int, tuple[float, Blocks, dict]]:
    """Per length the cheapest tiles, their cycles per pair, and what their branches cost."""
    best: dict[int, tuple[float, Blocks, dict]] = {}
    for query, key in itertools.product(QUERIES, KEYS):
        blocks = Blocks(query, query, key, CHUNK, SLICE, *[256] * 4)
        block = count(chip, False, blocks, H, False, dtype)
        if block == float("inf"):
            continue
        chunk = count(chip, False, blocks._replace(key=CHUNK), H, False, dtype)
        for part in (part for part in PARTS if part <= query):
            blocks = blocks._replace(part=part)
            masked = count(chip, False, blocks._replace(key=CHUNK), H, True, dtype) - chunk
            costs = {"block": block, "chunk": chunk, "part": masked / (query // part)}
            print(f"{chip} H={H} forward {query}/{part} x {key} {costs}", flush=True)
            for T in LENGTHS:
                if max(query, key) <= T:
                    cycles = per_pair(forward_cycles, T, blocks, costs)
                    if T not in best or cycles < best[T][0]:
                        best[T] = cycles, blocks, costs
    return best


def tune_backward(chip: str, H: int, dtype: Any) -> dict[int, tuple[float, Blocks, dict]]:
    """Per length the cheapest tiles, their cycles per pair, and what their branches cost."""
    best: dict[int, tuple[float, Blocks, dict]] = {}
    for (query, key), piece in itertools.product(BACKWARD, BACKWARD_SLICES):
        front = (512, 512, 512, 512, 128)
        blocks = Blocks(*front, query, query, key, piece)
        full = count(chip, True, blocks, H, False, dtype)
        if full == float("inf") or not all_features_fit(chip, blocks, H, dtype):
            continue
        for part in (part for part in BACKWARD_PARTS if part <= query):
            blocks = blocks._replace(backward_part=part)
            masked = count(chip, True, blocks, H, True, dtype) - full
            pieces = (query // part) * (key // piece)
            costs = {"full": full, "part": masked / pieces, "base": 0.0}
            print(f"{chip} H={H} backward {query}/{part} x {key}/{piece} {costs}", flush=True)
            for T in LENGTHS:
                if max(query, key) <= T:
                    cycles = per_pair(backward_cycles, T, blocks, costs)
                    if T not in best or cycles < best[T][0]:
                        best[T] = cycles, blocks, costs
    return best


def tune(chip: str, H: int, dtype: Any) -> list[dict[str, Any]]:
    """The table's entries for a chip and head size."""
    forward, backward = tune_forward(chip, H, dtype), tune_backward(chip, H, dtype)
    entries = []
    for T in LENGTHS:
        (_, front, costs), (_, back, back_costs) = forward[T], backward[T]
        blocks = Blocks(*front[:5], *back[5:])
        alone, packed = (
            forward_cycles(T, blocks, costs, documents)
            + backward_cycles(T, blocks, back_costs, documents)
            for documents in (1, DOCUMENTS)
        )
        entries.append(
            {
                "length": T,
                **blocks._asdict(),
                "cycles_per_head": round(alone),
                "packed_share": round(packed / alone, 3),
            }
        )
        print(f"{chip} H={H} T={T} {entries[-1]}", flush=True)
    return entries


def main() -> None:
    """Tunes the chips and head sizes asked for, and rewrites their part of the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--chip", default="all", choices=["all", *TOPOLOGIES])
    parser.add_argument("--heads", type=int, nargs="+", default=[64, 128, 256])
    arguments = parser.parse_args()
    chips = list(TOPOLOGIES) if arguments.chip == "all" else [arguments.chip]
    heads: list[int] = arguments.heads
    for chip, H in ((chip, H) for chip in chips for H in heads):
        name = kind(chip)
        found = tune(chip, H, jnp.bfloat16)
        table = tile_tables.read(TABLE)
        entry = table["chips"].setdefault(name, {"vmem_limit_bytes": VMEM[chip]})
        table["made_by"] = "python tools/tune_attention.py"
        entry[str(H)] = found
        tile_tables.write(TABLE, table)


if __name__ == "__main__":
    main()
