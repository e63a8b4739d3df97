"""Collectives of a compiled program, read off its text: what, over which mesh axes, how many bytes.

A loop's body counts as often as the loop turns. That is in the text of XLA for GPU and CPU
(`known_trip_count`); libtpu leaves it out, so it is read off the loop's condition, `i < 32`.
libtpu also splits one collective over several fusions; they share a channel and count once.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
    "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*->.*\{$")
OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
SHAPE = re.compile(r"\b(" + "|".join(BYTES) + r")\[([\d,]*)\]")
CALLED = re.compile(
    r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)


class Collective(NamedTuple):
    """Collectives of one kind over the same axes in one step."""

    kind: str
    axes: str  # of the mesh, as "fsdp" or "data+fsdp"; "?" when the groups are no such axes
    times: float  # how often one runs
    bytes: float  # that one device receives


class Operation(NamedTuple):
    """One line of a computation."""

    name: str
    result: str
    opcode: str
    rest: str  # operands and attributes


def collectives(text: str, sizes: dict[str, int]) -> list[Collective]:
    """All collectives of the program, most bytes first.

    Args:
      text: of the optimised module, as `compiled.as_text()` gives it.
      sizes: of the mesh axes, in order.
    """
    computations, entry = _computations(text)
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for operation, times in _run(computations, entry):
        kind = operation.opcode.removesuffix("-start")
        members, axes = _group(operation.rest, sizes)
        if members > 1:
            total = totals[kind, axes]
            total[0] += times
            total[1] += times * _received(kind, operation, members)
    found = [Collective(*key, *total) for key, total in totals.items()]
    return sorted(found, key=lambda c: -c.bytes)


def _computations(text: str) -> tuple[dict[str, list[Operation]], str]:
    found: dict[str, list[Operation]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None:
            operation = OPERATION.match(line)
            if operation:
                current.append(Operation(*operation.groups()))
    return found, entry


def _run(computations: dict[str, list[Operation]], entry: str) -> Iterator[tuple[Operation, float]]:
    """Every collective that runs and how often: a channel as often as where it runs least.

    libtpu puts pieces of an asynchronous one into the loops it overlaps with, over and over.
    """
    found: dict[str, tuple[Operation, float]] = {}
    todo = [(entry, 1.0)]
    while todo:
        name, times = todo.pop()
        for operation in computations.get(name, ()):
            if operation.opcode.removesuffix("-start") in KINDS:
                channel = re.search(r"channel_id=(\d+)", operation.rest)
                key = channel[1] if channel else operation.name
                if key not in found or times < found[key][1]:
                    found[key] = operation, times
            elif operation.opcode == "while":
                body = re.search(r"body=%?([\w.\-]+)", operation.rest)
                todo.append((body[1] if body else "", times * _turns(operation, computations)))
            else:
                for one, several in CALLED.findall(operation.rest):
                    for called in [one] if one else several.replace("%", "").split(","):
                        todo.append((called.strip(), times))
    yield from found.values()


def _turns(operation: Operation, computations: dict[str, list[Operation]]) -> float:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', operation.rest)
    if known:
        return float(known[1])
    called = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", operation.rest))
    condition = {inner.name: inner for inner in computations.get(called["condition"], ())}
    body = {inner.name: inner for inner in computations.get(called["body"], ())}
    for test in condition.values():
        if test.opcode == "compare" and "direction=LT" in test.rest:
            counter, bound = (condition.get(name) for name in _operands(test))
            index = re.search(r"index=(\d+)", counter.rest) if counter else None
            if index and bound and bound.opcode == "constant":
                return _constant(bound) / _increment(body, int(index[1]))
    return 1.0


def _operands(operation: Operation) -> list[str]:
    return re.findall(r"%([\w.\-]+)", operation.rest.partition(")")[0])


def _constant(operation: Operation) -> int:
    return int(operation.rest.partition(")")[0])


def _increment(body: dict[str, Operation], index: int) -> int:
    """What one turn adds to the counter: more than 1 where the loop was unrolled."""
    *_, root = body.values()
    total, name = 0, _operands(root)[index]
    while name in body and body[name].opcode == "add":
        first, second = _operands(body[name])
        first, second = (second, first) if body[first].opcode == "constant" else (first, second)
        if body.get(second) is None or body[second].opcode != "constant":
            break
        total, name = total + _constant(body[second]), first
    return max(total, 1)


def _sizes(shape: str) -> list[int]:
    """Bytes of every array in a type, tuples included; 0 for a scalar in a tuple."""
    found = SHAPE.findall(shape)
    return [
        BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
        if dims or len(found) == 1
        else 0
        for dtype, dims in found
    ]


def _received(kind: str, operation: Operation, members: int) -> float:
    """Bytes that one device receives from the others, by the least a ring needs."""
    sizes = _sizes(operation.result)
    if operation.opcode.endswith("-start") and kind != "all-reduce":
        arrays = [size for size in sizes if size]
        sizes = arrays[len(arrays) // 2 :]  # operands, results, and contexts without a shape
    whole = float(sum(sizes))
    if kind == "collective-permute":
        return whole
    others = members - 1
    if kind == "reduce-scatter":  # the result is one part
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
