"""A compiled program as text, taken apart: its operations, their arrays, and how often each runs.

A loop's body counts as often as the loop turns. That is in the text of XLA for GPU and CPU
(`known_trip_count`); libtpu leaves it out, so it is read off the loop's condition, `i < 32`.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
    "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*->.*\{$")
OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
SHAPE = re.compile(r"\b(" + "|".join(BYTES) + r")\[([\d,]*)\]")
CALLED = re.compile(
    r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)


class Operation(NamedTuple):
    """One line of a computation."""

    name: str
    result: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        """Names, in order."""
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])


Computations = dict[str, list[Operation]]


def parse(text: str) -> tuple[Computations, str]:
    """The computations by name, and the name of the one that the program begins with.

    Args:
      text: of the optimised module, as `compiled.as_text()` gives it.
    """
    found: Computations = {}
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


def runs(computations: Computations, entry: str) -> Iterator[tuple[str, float]]:
    """Every computation that runs, from every place that calls it, and how often it does from there."""
    todo = [(entry, 1.0)]
    while todo:
        name, times = todo.pop()
        yield name, times
        for operation in computations.get(name, ()):
            if operation.opcode == "while":
                body = re.search(r"body=%?([\w.\-]+)", operation.rest)
                todo.append((body[1] if body else "", times * _turns(operation, computations)))
            elif not operation.opcode.endswith(("-update", "-done")):  # of what -start calls
                for one, several in CALLED.findall(operation.rest):
                    for called in [one] if one else several.replace("%", "").split(","):
                        todo.append((called.strip(), times))


def arrays(shape: str) -> list[tuple[str, list[int]]]:
    """Dtype and sizes of every array in a type, tuples included."""
    return [(dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in SHAPE.findall(shape)]


def _turns(operation: Operation, computations: Computations) -> float:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', operation.rest)
    if known:
        return float(known[1])
    called = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", operation.rest))
    condition = {inner.name: inner for inner in computations.get(called["condition"], ())}
    body = {inner.name: inner for inner in computations.get(called["body"], ())}
    for test in condition.values():
        if test.opcode == "compare" and "direction=LT" in test.rest:
            counter, bound = (condition.get(name) for name in test.operands)
            index = re.search(r"index=(\d+)", counter.rest) if counter else None
            if index and bound and bound.opcode == "constant":
                return _constant(bound) / _increment(body, int(index[1]))
    return 1.0


def _constant(operation: Operation) -> int:
    return int(operation.rest.partition(")")[0])


def _increment(body: dict[str, Operation], index: int) -> int:
    """What one turn adds to the counter: more than 1 where the loop was unrolled."""
    *_, root = body.values()
    total, name = 0, root.operands[index]
    while name in body and body[name].opcode == "add":
        first, second = body[name].operands
        first, second = (second, first) if body[first].opcode == "constant" else (first, second)
        if body.get(second) is None or body[second].opcode != "constant":
            break
        total, name = total + _constant(body[second]), first
    return max(total, 1)
