"""Batches of a plan, read ahead by Grain. The only state is the step.

Grain hands whole batches to its workers, because a batch must be made before the dataset is split
among them: made afterwards, every worker batches rows of its own and the order depends on their
number (measured; so are the other traps named here).
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from llm_jax.data.batch import Batch
from llm_jax.data.mixture import DataPlan
from llm_jax.data.workers import die_with_parent
from llm_jax.errors import ConfigError

ENDLESS = 1 << 48  # steps; Grain wants a length


class _Steps:
    """Item i is this process's part of the batch of step `start_step + i`."""

    def __init__(self, plan: DataPlan, batch_size: int, rows: np.ndarray, start_step: int) -> None:
        self._plan, self._batch_size = plan, batch_size
        self._rows, self._start_step = rows, start_step

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        # a plain tuple: Grain's options for containers differ between its versions; tuples are safe
        return tuple(self._plan.rows((self._start_step + index) * self._batch_size + self._rows))


class Loader(Iterator[Batch]):
    """Endless iterator over batches; `close` stops its threads and worker processes."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __next__(self) -> Batch:
        return Batch(*next(self._batches))

    def close(self) -> None:
        """Stops reading ahead; no batch can be taken afterwards. Harmless when repeated."""
        self._batches.close()

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
) -> Loader:
    """Yields the batch of step `start_step`, then of each following step, without end.

    Row r of step s is row `s * batch_size + r` of the plan, whatever `rows`, `workers` and
    `prefetch` are.

    Args:
      plan: the rows.
      batch_size: rows of the global batch.
      rows: which rows of the global batch this process holds, [B], each below `batch_size`.
      start_step: the first step.
      workers: processes that read; 0 reads in threads of this one.
      prefetch: batches read ahead, by each worker; 0 (without workers) reads when asked.
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
    _mark_flags_parsed()
    steps = grain.MapDataset.source(_Steps(plan, batch_size, rows, start_step))
    options = grain.ReadOptions(num_threads=min(prefetch, 2), prefetch_buffer_size=prefetch)
    if workers:
        dataset = steps.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=max(1, prefetch)
            ),
            worker_init_fn=_start_worker,
        )
        # through the pipe, not /dev/shm: containers give that 64 MB, and killed runs leak it
        dataset = grain.experimental.WithOptionsIterDataset(
            dataset, grain.experimental.DatasetOptions(min_shm_size=1 << 62)
        )
    else:
        dataset = steps.to_iter_dataset(options)
    iterator = iter(dataset)
    iterator.start_prefetch()
    return Loader(iterator)


def _start_worker(index: int, count: int) -> None:
    del index, count
    die_with_parent()


@functools.cache
def _mark_flags_parsed() -> None:
    """Grain reads absl flags, which raise in a program that has not parsed any."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
