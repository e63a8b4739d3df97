"""Operations of a compiled program's matrix products, read off its text; those of our kernels apart.

XLA's own `cost_analysis` counts a loop's body once and does not look into kernels. Products are `dot`
on CPUs and `convolution` on TPUs, where a batched or many-headed product is a convolution with padding:
only what lies inside counts. A GPU's text has library calls instead, which are not read.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from llm_jax.plan.hlo import Operation, arrays, parse, runs


class Products(NamedTuple):
    """Floating-point operations of one device in one step; a multiply-add is two."""

    matrices: float
    kernels: float  # what the kernels in the program state of themselves


def products(text: str) -> Products:
    """Counts the text of an optimised module, as `compiled.as_text()` gives it."""
    computations, entry = parse(text)
    matrices = kernels = 0.0
    for name, times in runs(computations, entry):
        shapes = {operation.name: operation.result for operation in computations.get(name, ())}
        for operation in computations.get(name, ()):
            if operation.opcode == "dot":
                matrices += times * _dot(operation, shapes)
            elif operation.opcode == "convolution":
                matrices += times * _convolution(operation, shapes)
            elif operation.opcode == "custom-call":
                stated = re.search(r'"cost_estimate":\{"flops":"(\d+)"', operation.rest)
                kernels += times * float(stated[1]) if stated else 0.0
    return Products(matrices, kernels)


def _dot(operation: Operation, shapes: dict[str, str]) -> float:
    (_, result), *_ = arrays(operation.result)
    (_, left), *_ = arrays(shapes[operation.operands[0]])
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", operation.rest)
    over = [left[int(at)] for at in summed[1].split(",") if at] if summed else []
    return 2.0 * math.prod(result) * math.prod(over)


def _convolution(operation: Operation, shapes: dict[str, str]) -> float:
    """As XLA's HloCostAnalysis: of every spatial axis the pairs of output and window inside the input."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", operation.rest)
    if labels is None:
        return 0.0
    left, kernel = (arrays(shapes[name])[0][1] for name in operation.operands[:2])
    result = arrays(operation.result)[0][1]
    size_of = {
        **{("in", label): size for label, size in zip(labels[1], left, strict=True)},
        **{("kernel", label): size for label, size in zip(labels[2], kernel, strict=True)},
        **{("out", label): size for label, size in zip(labels[3], result, strict=True)},
    }
    window = _window(operation.rest, len(left) - 2)
    total = 2.0 * size_of["out", "b"] * size_of["out", "f"] * size_of["kernel", "i"]
    for axis, moves in enumerate(window):
        total *= _inside(size_of["in", str(axis)], size_of["out", str(axis)], moves)
    return total


class Moves(NamedTuple):
    """How a window moves along one spatial axis."""

    size: int
    stride: int
    low: int  # padding in front
    spread: int  # of the input: distance of its entries
    step: int  # of the window: distance of its entries


def _window(rest: str, axes: int) -> list[Moves]:
    found = re.search(r"window=\{([^}]*)\}", rest)
    given = dict(part.split("=") for part in found[1].split()) if found else {}

    def each(name: str, otherwise: str) -> list[str]:
        return given[name].split("x") if name in given else [otherwise] * axes

    return [
        Moves(int(size), int(stride), int(pad.partition("_")[0]), int(spread), int(step))
        for size, stride, pad, spread, step in zip(
            each("size", "1"), each("stride", "1"), each("pad", "0_0"),
            each("lhs_dilate", "1"), each("rhs_dilate", "1"), strict=True,
        )
    ]  # fmt: skip


def _inside(size: int, out: int, moves: Moves) -> int:
    at = (np.arange(out) * moves.stride - moves.low)[:, None] + np.arange(moves.size) * moves.step
    last = (size - 1) * moves.spread
    return int(np.count_nonzero((at >= 0) & (at <= last) & (at % moves.spread == 0)))
