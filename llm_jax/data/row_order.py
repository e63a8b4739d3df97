"""Which rows of the plan a step takes: the thin mapping between steps and a `DataPlan`.

Usually step s takes rows s * B to (s + 1) * B - 1. Two recorded decisions may move them: batches that were
left out because training did not survive them, and a batch size that changed at some step. Both are in every
checkpoint, so the rows of a step are a pure function of what is recorded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class RowOrder:
    """Rows by step. `sizes` begins at step 0 and ascends; `left_out` is in the order of the decisions."""

    sizes: tuple[tuple[int, int], ...]  # (from this step on, rows of a batch)
    left_out: tuple[
        tuple[int, int], ...
    ] = ()  # rows [first, last + 1) of the plan that no step takes

    def size(self, step: int) -> int:
        """Rows of the batch of step `step`, counted from 0."""
        return next(size for first, size in reversed(self.sizes) if step >= first)

    def rows(self, step: int) -> np.ndarray:
        """The rows of the plan that step `step` takes, ascending; int64 [B]."""
        before = 0
        ends = [first for first, _ in self.sizes[1:]] + [step]
        for (first, size), end in zip(self.sizes, ends, strict=True):
            before += size * max(0, min(end, step) - first)
        rows = before + np.arange(self.size(step), dtype=np.int64)
        for first, end in self._holes():
            rows[rows >= first] += end - first
        return rows

    def rows_before(self, step: int) -> int:
        """Where in the plan step `step` begins: the rows before it were taken or left out."""
        return int(self.rows(step)[0])

    def _holes(self) -> list[tuple[int, int]]:
        """`left_out`, ascending and without overlap."""
        holes: list[tuple[int, int]] = []
        for first, end in sorted(self.left_out):
            if holes and first <= holes[-1][1]:
                holes[-1] = (holes[-1][0], max(end, holes[-1][1]))
            else:
                holes.append((first, end))
        return holes

    def without(self, first_step: int, last_step: int) -> "RowOrder":
        """The same without the rows that these steps (counted from 0) take; for use from before them on."""
        first, last = self.rows(first_step)[0], self.rows(last_step)[-1]
        return RowOrder(sizes=self.sizes, left_out=(*self.left_out, (int(first), int(last) + 1)))

    def resized(self, step: int, size: int) -> "RowOrder":
        """The same with batches of `size` rows from step `step` on; what was planned after it is dropped."""
        sizes = tuple(pair for pair in self.sizes if pair[0] < step)
        if not sizes or sizes[-1][1] != size:
            sizes = (*sizes, (step, size))
        return RowOrder(sizes=sizes, left_out=self.left_out)

    def to_record(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "sizes": [list(pair) for pair in self.sizes],
            "left_out": [list(p) for p in self.left_out],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "RowOrder":
        """The inverse of `to_record`."""
        pairs = lambda name: tuple((int(a), int(b)) for a, b in record[name])  # noqa: E731
        return cls(sizes=pairs("sizes"), left_out=pairs("left_out"))
