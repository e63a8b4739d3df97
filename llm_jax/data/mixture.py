"""The data plan: row k of the whole training run, as a pure function of k.

1. `Interleave` says which source row k comes from, and how many rows of that source came before.
2. Rows of a source are dealt in epochs; inside an epoch a seeded permutation gives the packed row.
3. `packing` says which pieces of documents make that row; `shards` reads them.

Any row is random access and nothing is remembered, so the only state of training data is the step,
whatever the number of hosts and workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from llm_jax.config import nearest
from llm_jax.data.batch import Batch
from llm_jax.data.packing import Packing, RowPlan, plan_rows
from llm_jax.data.permutation import permute
from llm_jax.data.shards import TRAIN, Prepared, Split, open_prepared
from llm_jax.errors import ConfigError, DataError
from llm_jax.tokenizer.base import digest

PERIOD = (
    1 << 16
)  # rows after which the order of the sources repeats; shares are exact to 1 / PERIOD
PLAN_FORMAT = 1  # raise when a change here alters any row: digests then differ


@dataclass(frozen=True, kw_only=True)
class SourceWeight:
    """One source of the mixture."""

    name: str  # as in the prepared data
    weight: float = 1.0  # share of the training tokens, relative to the others; 0 leaves it out

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(f"data.sources: weight={self.weight} of {self.name!r} must be >= 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows training sees, and who reads them."""

    prepared: str  # folder made by `llm-jax data prepare`
    sources: tuple[SourceWeight, ...] = ()  # the mixture; empty takes every source by its size
    seq_len: int = 1024  # T: pairs (input, target) per row
    packing: Packing = "best_fit"  # "concat" has no padding, "best_fit" cuts almost no document
    seed: int = 0  # order of documents, rows and epochs
    workers: int = 0  # processes that read ahead; 0 reads in a thread; never changes the rows
    prefetch: int = 4  # batches read ahead (per worker process); 0 reads when asked

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ConfigError(f"data.seq_len={self.seq_len} must be at least 2")
        if self.packing not in get_args(Packing):
            raise ConfigError(
                f"data.packing={self.packing!r}; {nearest(self.packing, get_args(Packing))}"
            )
        for field in ("seed", "workers", "prefetch"):
            if getattr(self, field) < 0:
                raise ConfigError(f"data.{field}={getattr(self, field)} must be 0 or more")
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"data.sources: {name!r} occurs twice; add up its weights")


class Interleave:
    """A fixed order of sources with exact shares, evenly spread.

    A period of rows holds `counts[s]` rows of source s, the i-th at the ideal place
    (i + 1/2) / counts[s] of the period. So in any window the rows of a source are within two of its
    share, for two sources, and the error grows with the number of sources, never with the window.
    """

    def __init__(self, row_shares: np.ndarray) -> None:
        """Args: row_shares: [sources] non-negative, not all 0; need not add up to 1."""
        self.counts = _largest_remainder(row_shares, PERIOD)
        self.counts //= max(1, int(np.gcd.reduce(self.counts)))  # one source: a period of one row
        self.period = int(self.counts.sum())
        source = np.repeat(np.arange(len(self.counts)), self.counts)
        rank = np.concatenate([np.arange(count) for count in self.counts])
        order = np.argsort((rank + 0.5) / self.counts[source], kind="stable")
        self._source, self._rank = source[order].astype(np.int32), rank[order].astype(np.int32)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number of earlier rows of that source) of each row; int64."""
        periods, place = np.divmod(np.asarray(rows, dtype=np.int64), self.period)
        source = self._source[place].astype(np.int64)
        return source, periods * self.counts[source] + self._rank[place]

    def rows_before(self, row: int) -> np.ndarray:
        """Rows of each source among the first `row` rows; int64 [sources]."""
        periods, place = divmod(int(row), self.period)
        return periods * self.counts + np.bincount(self._source[:place], minlength=len(self.counts))


def _largest_remainder(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in the proportion of `shares` that add up to `total`; positive stays positive."""
    exact = shares / shares.sum() * total
    counts = np.floor(exact).astype(np.int64)
    counts[(shares > 0) & (counts == 0)] = 1
    while (missing := total - int(counts.sum())) != 0:
        # ties go to the earlier source, so the result is the same everywhere
        step = 1 if missing > 0 else -1
        error = np.where((counts > 1) | (step > 0), step * (exact - counts), -np.inf)
        error[shares == 0] = -np.inf
        counts[int(np.argmax(error))] += step
    return counts


class _Rows:
    """Packed rows of one source."""

    def __init__(self, name: str, split: Split, config: DataConfig) -> None:
        self.name, self.split, self.seq_len = name, split, config.seq_len
        self.key = f"{config.seed}/{name}"
        self.plan: RowPlan = plan_rows(
            split.document_starts, config.seq_len, config.packing, self.key
        )

    def packed(self, indices: np.ndarray) -> np.ndarray:
        """The packed row that the `index`-th use of this source takes; int64."""
        size = len(self.plan)
        epochs, inside = np.divmod(indices, size)
        out = np.empty_like(inside)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            out[now] = permute(inside[now], size, f"{self.key}/epoch/{epoch}")
        return out

    def fill(self, batch: Batch, position: int, row: int) -> None:
        """Writes packed row `row` into row `position` of the zeroed `batch`."""
        begin = 0
        starts, counts = self.plan.row(row)
        for segment, (start, count) in enumerate(
            zip(starts.tolist(), counts.tolist(), strict=True), start=1
        ):
            tokens = self.split.read(start, count + 1)
            here = (position, slice(begin, begin + count))
            batch.tokens_BT[here] = tokens[:-1]
            batch.targets_BT[here] = tokens[1:]
            batch.positions_BT[here] = np.arange(count, dtype=np.int32)
            batch.segments_BT[here] = segment
            begin += count
        batch.loss_mask_BT[position, :begin] = 1.0


class DataPlan:
    """Every row of the run. Picklable; the shards are opened again where it arrives.

    A mixture that changes at a later step will be a second `Interleave` that starts from
    `rows_before(step)` of the first; rows and epochs below it need not know.
    """

    def __init__(self, config: DataConfig, prepared: Prepared | None = None) -> None:
        """Plans the rows of `config` over `prepared` (by default opened from `config.prepared`).

        Raises:
          ConfigError: an unknown source or weights that are all 0.
          DataError: a source of positive weight has nothing to train on.
        """
        prepared = prepared or open_prepared(config.prepared)
        weights = _weights(config, prepared)
        self.config = config
        self.seq_len = config.seq_len
        self.vocab_size = prepared.vocab_size
        self.tokenizer_fingerprint = prepared.tokenizer_fingerprint
        self.source_names = tuple(weights)
        self._rows: list[_Rows] = []
        for name in weights:
            split = prepared.sources[name][TRAIN]
            if weights[name] > 0 and split.num_pairs == 0:
                raise DataError(
                    f"source {name!r} of {config.prepared!r} has nothing to train on "
                    f"({split.num_documents} documents); leave it out or give it weight 0"
                )
            self._rows.append(_Rows(name, split, config))
        tokens = np.array(list(weights.values()), dtype=np.float64)
        # weights are token shares, and best-fit rows are not equally full in every source
        per_row = np.array([max(rows.plan.fill, 1e-9) for rows in self._rows])
        self._interleave = Interleave(tokens / per_row)
        realised = self._interleave.counts * per_row
        self.shares: dict[str, float] = dict(
            zip(self.source_names, (realised / realised.sum()).tolist(), strict=True)
        )
        self.digest = digest(self._identity(prepared))

    def _identity(self, prepared: Prepared) -> dict[str, Any]:
        """All that decides the rows, and nothing else."""
        return {
            "format": PLAN_FORMAT,
            "prepared": prepared.digest,
            "sources": list(self.source_names),
            "counts": self._interleave.counts.tolist(),
            "seq_len": self.config.seq_len,
            "packing": self.config.packing,
            "seed": self.config.seed,
        }

    @property
    def fills(self) -> dict[str, float]:
        """Share of positions that are not padding, by source."""
        return {rows.name: rows.plan.fill for rows in self._rows}

    @property
    def epoch_rows(self) -> dict[str, int]:
        """Packed rows in one epoch, by source."""
        return {rows.name: len(rows.plan) for rows in self._rows}

    def source_of(self, row: int) -> str:
        """Name of the source that row `row` comes from."""
        return self.source_names[int(self._interleave.locate(np.array([row]))[0][0])]

    def epochs_at(self, row: int) -> dict[str, float]:
        """Epochs of each source that lie before row `row`."""
        before = self._interleave.rows_before(row)
        return {
            rows.name: float(count) / max(1, len(rows.plan))
            for rows, count in zip(self._rows, before, strict=True)
        }

    def rows(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The rows of these indices (any, from 0), in this order: arrays [len(indices), T]."""
        wanted = np.asarray(indices, dtype=np.int64)
        shape = (len(wanted), self.seq_len)
        ints = [np.zeros(shape, dtype=np.int32) for _ in range(4)]
        batch = Batch(*ints, loss_mask_BT=np.zeros(shape, dtype=np.float32))
        sources, numbers = self._interleave.locate(wanted)
        for source in np.unique(sources):
            mine = np.flatnonzero(sources == source)
            rows = self._rows[source]
            for position, row in zip(mine, rows.packed(numbers[mine]), strict=True):
                rows.fill(batch, int(position), int(row))
        return batch

    def row(self, index: int) -> Batch:
        """One row: arrays [T]."""
        return Batch(*(array[0] for array in self.rows([index])))


def _weights(config: DataConfig, prepared: Prepared) -> dict[str, float]:
    """Token share of each source of the mixture, not normalised."""
    if not config.sources:
        sizes = {name: splits[TRAIN].num_pairs for name, splits in prepared.sources.items()}
        if not any(sizes.values()):
            raise DataError(f"{config.prepared!r} holds no training documents")
        return {name: float(size) for name, size in sizes.items()}
    for source in config.sources:
        if source.name not in prepared.sources:
            raise ConfigError(
                f"data.sources: {source.name!r} is not in {config.prepared!r}; "
                f"{nearest(source.name, list(prepared.sources))}"
            )
    if not any(source.weight > 0 for source in config.sources):
        raise ConfigError("data.sources: every weight is 0; give one of them a positive weight")
    return {source.name: source.weight for source in config.sources}
