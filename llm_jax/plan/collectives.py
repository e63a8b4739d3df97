"""Collectives of a compiled program: what, over which mesh axes, how many bytes.

libtpu splits one collective over several fusions; they share a channel and count once. Its
reduce-scatter is a fusion of an all-reduce and the slice that a device keeps.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.plan.hlo import BYTES, Computations, Operation, arrays, parse, runs

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """Collectives of one kind over the same axes in one step."""

    kind: str
    axes: str  # of the mesh, as "fsdp" or "data+fsdp"; "?" when the groups are no such axes
    times: float  # how often one runs
    bytes: float  # that one device receives


def collectives(text: str, sizes: dict[str, int]) -> list[Collective]:
    """All collectives of the program, most bytes first.

    Args:
      text: of the optimised module, as `compiled.as_text()` gives it.
      sizes: of the mesh axes, in order.
    """
    computations, entry = parse(text)
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for operation, times, kind in _run(computations, entry):
        members, axes = _group(operation.rest, sizes)
        if members > 1:
            total = totals[kind, axes]
            total[0] += times
            total[1] += times * _received(kind, operation, members)
    found = [Collective(*key, *total) for key, total in totals.items()]
    return sorted(found, key=lambda c: -c.bytes)


def _run(computations: Computations, entry: str) -> Iterator[tuple[Operation, float, str]]:
    """Every collective that runs, how often, and its kind: a channel as often as where it runs least.

    libtpu puts pieces of an asynchronous one into the loops it overlaps with, over and over.
    """
    found: dict[str, tuple[Operation, float, str]] = {}
    for name, times in runs(computations, entry):
        inside = computations.get(name, [])
        sliced = bool(inside) and name != entry and inside[-1].opcode == "dynamic-slice"
        for operation in inside:
            kind = operation.opcode.removesuffix("-start")
            if kind in KINDS:
                channel = re.search(r"channel_id=(\d+)", operation.rest)
                key = channel[1] if channel else operation.name
                kind = "reduce-scatter" if sliced and kind == "all-reduce" else kind
                if key not in found or times < found[key][1]:
                    found[key] = operation, times, kind
    yield from found.values()


def _sizes(shape: str) -> list[int]:
    """Bytes of every array in a type; 0 for a scalar in a tuple."""
    found = arrays(shape)
    return [
        BYTES[dtype] * math.prod(dims) if dims or len(found) == 1 else 0 for dtype, dims in found
    ]


def _received(kind: str, operation: Operation, members: int) -> float:
    """Bytes that one device receives from the others, by the least a ring needs."""
    sizes = _sizes(operation.result)
    if operation.opcode.endswith("-start") and operation.opcode != "all-reduce-start":
        arrays = [size for size in sizes if size]
        sizes = arrays[len(arrays) // 2 :]  # operands, results, and contexts without a shape
    whole = float(sum(sizes))
    if kind == "collective-permute":
        return whole
    others = members - 1
    if operation.opcode.startswith("reduce-scatter"):  # the result is one part
        return whole * others
    return whole * others / members * (2 if kind == "all-reduce" else 1)


def _group(rest: str, sizes: dict[str, int]) -> tuple[int, str]:
    """How many devices take part in one exchange, and along which mesh axes they differ."""
    pairs = re.search(r"source_target_pairs=\{\{(.*?)\}\}", rest)
    if pairs:
        moved = [tuple(map(int, pair.split(","))) for pair in pairs[1].split("},{")]
        return 2, _axes([pair for pair in moved if pair[0] != pair[1]][:64], sizes)
    groups = _replica_groups(rest, math.prod(sizes.values()))
    return len(groups[0]), _axes(groups[:64], sizes)


def _replica_groups(rest: str, devices: int) -> list[Sequence[int]]:
    listed = re.search(r"replica_groups=\{\{(.*?)\}\}", rest)
    if listed:
        return [tuple(map(int, group.split(","))) for group in listed[1].split("},{")]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        dims = [int(n) for n in iota[3].split(",")]
        ids = np.arange(math.prod(dims)).reshape(dims)
        ids = ids.transpose([int(n) for n in iota[4].split(",")]) if iota[4] else ids
        return [tuple(row) for row in ids.reshape(int(iota[1]), int(iota[2])).tolist()]
    mesh = re.search(r"replica_groups=mesh\[(.*?)\](?: ?\[.*?\])? ?\{(.*?)\}", rest)
    if mesh:
        named = re.findall(r"'([^']+)'=(\d+)", mesh[1])
        over = re.findall(r"'([^']+)'", mesh[2])
        ids = np.arange(devices).reshape([int(n) for _, n in named])
        last = [i for i, (name, _) in enumerate(named) if name in over]
        first = [i for i in range(len(named)) if i not in last]
        members = math.prod(ids.shape[i] for i in last)
        return [tuple(row) for row in ids.transpose(first + last).reshape(-1, members).tolist()]
    return [tuple(range(devices))]


def _axes(groups: Sequence[Sequence[int]], sizes: dict[str, int]) -> str:
    """The names of the axes along which the members of a group differ."""
    names, shape = list(sizes), tuple(sizes.values())
    differ: set[str] = set()
    for group in groups:
        places = [np.unravel_index(device, shape) for device in group]
        for first, second in itertools.pairwise(places):
            differ |= {n for n, a, b in zip(names, first, second, strict=True) if a != b}
    return "+".join(name for name in names if name in differ) or "?"
