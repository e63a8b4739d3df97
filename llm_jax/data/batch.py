"""The batch: what data/ hands to train/. Pretraining and instruction tuning differ in the mask only."""

from typing import Any, NamedTuple

import numpy as np

from llm_jax.errors import DataError

Array = (
    Any  # numpy on the host; the same fields hold jax arrays once the batch is placed on devices
)


class Batch(NamedTuple):
    """Rows of token ids, packed from documents. All arrays are [B, T].

    Of pairs of a better and a worse answer, segments 2 i - 1 and 2 i of a row are one, the better first.

    Position t of a row reads `tokens` and must predict `targets`; both lie in the same document, so
    no target ever crosses a document boundary. Padding has segment 0 and mask 0.
    """

    tokens_BT: Array  # int32, input ids
    targets_BT: Array  # int32, the next id of the same document
    positions_BT: Array  # int32, index inside the segment; restarts at 0 in every segment
    segments_BT: Array  # int32, counts 1, 2, ... along the row; 0 is padding
    loss_mask_BT: Array  # float32, 1 where the target counts


DTYPES = Batch(np.int32, np.int32, np.int32, np.int32, np.float32)


def check_batch(batch: Batch, vocab_size: int) -> None:
    """Raises DataError when a batch breaks the contract above; for edges, not for every step."""
    shape = batch.tokens_BT.shape
    for name, array, dtype in zip(Batch._fields, batch, DTYPES, strict=True):
        if array.shape != shape or array.ndim != 2:
            raise DataError(
                f"batch.{name} has shape {array.shape}; every array must be {shape} = [B, T]"
            )
        if array.dtype != dtype:
            raise DataError(f"batch.{name} has dtype {array.dtype}; it must be {np.dtype(dtype)}")
    for name in ("tokens_BT", "targets_BT"):
        ids = getattr(batch, name)
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            raise DataError(
                f"batch.{name} holds id {int(ids.max())}, but model.vocab_size={vocab_size}; "
                "was the data prepared with another tokenizer?"
            )
    if np.any((batch.segments_BT == 0) & (batch.loss_mask_BT > 0)):
        raise DataError("batch.loss_mask_BT counts padding: it must be 0 wherever segments_BT is 0")
