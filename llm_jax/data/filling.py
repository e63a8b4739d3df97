"""Pieces of documents written into the rows of a batch."""

import numpy as np

from llm_jax.data.batch import Batch
from llm_jax.data.shards import SECOND, Split, is_target


def fill_row(
    batch: Batch, position: int, split: Split, starts: np.ndarray, counts: np.ndarray
) -> None:
    """Writes pieces of documents, as `RowPlan.row` has them, into row `position` of the zeroed `batch`.

    Every piece is a segment; both sides of a pair are one each, so that segments 2 i - 1 and 2 i belong together.
    """
    begin, segment = 0, 1
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        tokens, mask = split.read(start, count + 1), split.read_mask(start, count + 1)
        here = (position, slice(begin, begin + count))
        batch.tokens_BT[here] = tokens[:-1]
        batch.targets_BT[here] = tokens[1:]
        batch.loss_mask_BT[here] = is_target(mask[1:])
        batch.positions_BT[here] = np.arange(count, dtype=np.int32)
        batch.segments_BT[here] = segment
        for side in np.flatnonzero(mask[:-1] == SECOND).tolist():
            segment += 1
            rest = (position, slice(begin + side, begin + count))
            batch.positions_BT[rest] -= side
            batch.segments_BT[rest] = segment
        segment += 1
        begin += count
