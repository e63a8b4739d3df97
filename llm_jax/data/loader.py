"""Batches of a plan, read ahead by Grain. The only state is the step.

Grain hands whole batches to its workers, because a batch must be made before the dataset is split
among them: made afterwards, every worker batches rows of its own and the order depends on their
number (measured; so are the other traps named here).
"""

import functools
import os
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from llm_jax.data.batch import Batch
from llm_jax.data.mixture import DataPlan
from llm_jax.data.row_order import RowOrder
from llm_jax.data.workers import die_with_parent
from llm_jax.errors import ConfigError

SHARED_MEMORY = "/dev/shm"  # where Grain's workers put batches; 64 MB in a plain container
BYTES_PER_POSITION = 20  # five arrays of 4 bytes, see `Batch`
ENDLESS = 1 << 48  # steps; Grain wants a length


class _Steps:
    """Item i is this process's part of the batch of step `start_step + i`."""

    def __init__(self, plan: DataPlan, order: RowOrder, rows: np.ndarray, start_step: int) -> None:
        self._plan, self._order = plan, order
        self._rows, self._start_step = rows, start_step

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        # a plain tuple: Grain's options for containers differ between its versions; tuples are safe
        return tuple(self._plan.rows(self._order.rows(self._start_step + index)[self._rows]))


class Loader(Iterator[Batch]):
    """Endless iterator over batches; `close` stops its threads and worker processes."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __next__(self) -> Batch:
        if self._batches is None:
            raise RuntimeError("this loader is closed")
        # copied: from a worker the arrays are views of shared memory that Grain unmaps later
        return Batch(*(np.array(array) for array in next(self._batches)))

    def close(self) -> None:
        """Stops reading ahead; no batch can be taken afterwards. Harmless when repeated."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None  # what was read ahead holds shared memory until it is dropped

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def batches(
    plan: DataPlan,
    batch_size: int,
    rows: np.ndarray,
    start_step: int = 0,
    workers: int = 0,
    prefetch: int = 4,
    order: RowOrder | None = None,
) -> Loader:
    """Yields the batch of step `start_step`, then of each following step, without end.

    Row r of step s is row `order.rows(s)[r]` of the plan, whatever `rows`, `workers` and
    `prefetch` are.

    Args:
      plan: the rows.
      batch_size: rows of the global batch.
      rows: which rows of the global batch this process holds, [B], each below `batch_size`.
      start_step: the first step.
      workers: processes that read; 0 reads in threads of this one.
      prefetch: batches read ahead, by each worker; 0 (without workers) reads when asked.
      order: rows by step; None: `s * batch_size + r`.
    """
    import grain

    rows = np.asarray(rows, dtype=np.int64)
    if batch_size < 1 or start_step < 0 or workers < 0 or prefetch < 0:
        raise ConfigError(
            f"batch_size={batch_size} must be at least 1; start_step={start_step}, "
            f"workers={workers} and prefetch={prefetch} 0 or more"
        )
    if rows.ndim != 1 or not rows.size or rows.min() < 0 or rows.max() >= batch_size:
        raise ConfigError(f"rows={rows.tolist()} must be indices below batch_size={batch_size}")
    if workers:
        _check_shared_memory(rows.size * plan.seq_len * BYTES_PER_POSITION, workers, prefetch)
    _mark_flags_parsed()
    order = order or RowOrder(sizes=((0, batch_size),))
    steps = grain.MapDataset.source(_Steps(plan, order, rows, start_step))
    ahead = 0 if workers else prefetch
    dataset = steps.to_iter_dataset(
        grain.ReadOptions(num_threads=min(ahead, 2), prefetch_buffer_size=ahead)
    )
    if workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=max(1, prefetch)
            ),
            worker_init_fn=_start_worker,
        )
    iterator = iter(dataset)
    iterator.start_prefetch()
    return Loader(iterator)


def _start_worker(index: int, count: int) -> None:
    del index, count
    die_with_parent()


def _check_shared_memory(batch_bytes: int, workers: int, prefetch: int) -> None:
    """Raises ConfigError when /dev/shm is too small: a write beyond it kills the process (SIGBUS)."""
    if not os.path.isdir(SHARED_MEMORY):
        return
    # each worker's queue, Grain's buffer behind it, and one batch in hand at both ends
    needed = batch_bytes * workers * (2 * max(1, prefetch) + 2)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise ConfigError(
            f"data.workers={workers} with data.prefetch={prefetch} needs {needed >> 20} MB of shared "
            f"memory, but {SHARED_MEMORY} has {free >> 20} MB free; lower them, use data.workers=0, "
            "or start the container with more (--shm-size)"
        )


@functools.cache
def _mark_flags_parsed() -> None:
    """Grain reads absl flags, which raise in a program that has not parsed any."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
