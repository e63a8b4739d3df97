"""Held-out pairs of answers in rows, as training sees them. Plain numpy."""

from collections.abc import Iterator

import numpy as np

from llm_jax.data.batch import DTYPES, Batch
from llm_jax.data.filling import fill_row
from llm_jax.data.packing import BestFitPlan
from llm_jax.data.shards import Split
from llm_jax.errors import DataError
from llm_jax.eval.windows import EvalConfig, choose


class PairRows:
    """The pairs of a split that `config` asks for, packed whole into rows of `seq_len` tokens."""

    def __init__(self, split: Split, seq_len: int, config: EvalConfig) -> None:
        """Raises DataError: a pair is longer than a row."""
        self._split, self._seq_len = split, seq_len
        chosen = choose(split.num_documents, config)
        starts = split.document_starts[chosen]
        inputs = split.document_starts[chosen + 1] - starts - 1
        if config.max_tokens:
            within = int(np.searchsorted(np.cumsum(inputs), config.max_tokens, side="right"))
            starts, inputs = starts[: max(within, 1)], inputs[: max(within, 1)]
        longest = int(inputs.max(initial=0))
        if longest > seq_len:
            raise DataError(
                f"a held-out pair of {longest} tokens is longer than data.seq_len={seq_len}, and answers are never "
                "cut: use a longer data.seq_len, or prepare the data with that --seq-len"
            )
        self._plan = BestFitPlan(starts, inputs, seq_len, "held out")

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All rows, `batch_size` at a time; the last batch is filled up with padding."""
        for first in range(0, len(self._plan), batch_size):
            batch = Batch(*(np.zeros((batch_size, self._seq_len), dtype) for dtype in DTYPES))
            for row in range(first, min(first + batch_size, len(self._plan))):
                fill_row(batch, row - first, self._split, *self._plan.row(row))
            yield batch
