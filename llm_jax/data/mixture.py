"""The data plan: row k of the whole training run, as a pure function of k.

1. `weights` and `phases` say what share of the tokens each source has, from which step on.
2. `interleave` says which source row k comes from, and how many rows of that source came before.
3. Rows of a source are dealt in epochs; inside an epoch a seeded permutation gives the packed row.
4. `packing` says which pieces of documents make that row; `shards` reads them.

Any row is random access and nothing is remembered, so the only state of training data is the step,
whatever the number of hosts and workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args

import numpy as np

from llm_jax.config import nearest
from llm_jax.data.batch import Batch
from llm_jax.data.filling import fill_row
from llm_jax.data.interleave import Schedule, Stretch
from llm_jax.data.packing import Packing, RowPlan, plan_rows
from llm_jax.data.permutation import permute
from llm_jax.data.phases import LeftOut, Phase, check_left_out, check_phases
from llm_jax.data.row_order import RowOrder
from llm_jax.data.shards import TRAIN, Prepared, Split, open_prepared
from llm_jax.data.weights import Rule, SourceWeight, by_temperature, check_sources, unimax
from llm_jax.errors import ConfigError, DataError
from llm_jax.tokenizer.base import digest

PLAN_FORMAT = 2  # raise when a change here alters any row: digests then differ


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows training sees, and who reads them."""

    prepared: str  # folder made by `llm-jax data prepare`
    sources: tuple[SourceWeight, ...] = ()  # the mixture; empty takes every source by its size
    # "fixed": the weights above; "temperature" and "unimax": by the sizes of the sources above
    rule: Rule = "fixed"
    temperature: float = 0.0  # of "temperature": shares go as size^(1/temperature); 1 is by size
    max_epochs: float = 0.0  # of "unimax": as even as possible, no source seen more often than this
    budget_steps: int = 0  # of "unimax": the steps that max_epochs is counted over; 0: train.steps
    phases: tuple[Phase, ...] = ()  # other weights from a step on
    leave_out: tuple[LeftOut, ...] = ()  # damaged shards, from a step on
    seq_len: int = 1024  # T: pairs (input, target) per row
    packing: Packing = (
        "best_fit"  # "concat" has no padding, "best_fit" cuts almost no document, "whole" none
    )
    seed: int = 0  # order of documents, rows and epochs
    workers: int = 0  # processes that read ahead; 0 reads in a thread; never changes the rows
    prefetch: int = 4  # batches read ahead (per worker process); 0 reads when asked

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ConfigError(f"data.seq_len={self.seq_len} must be at least 2")
        for field, known in (("packing", get_args(Packing)), ("rule", get_args(Rule))):
            value = getattr(self, field)
            if value not in known:
                raise ConfigError(f"data.{field}={value!r}; {nearest(value, known)}")
        for field in ("seed", "workers", "prefetch", "budget_steps"):
            if getattr(self, field) < 0:
                raise ConfigError(f"data.{field}={getattr(self, field)} must be 0 or more")
        check_sources(self.sources, "data.sources")
        check_phases(self.phases)
        check_left_out(self.leave_out)
        self._check_rule()

    def _check_rule(self) -> None:
        """Every setting of a rule is stated with it, and with no other."""
        for field, rule in (
            ("temperature", "temperature"),
            ("max_epochs", "unimax"),
            ("budget_steps", "unimax"),
        ):
            value = getattr(self, field)
            if value and self.rule != rule:
                raise ConfigError(
                    f"data.{field}={value:g} belongs to data.rule={rule!r}, but data.rule={self.rule!r}; set the "
                    "rule too, or leave it out"
                )
            if self.rule == rule and value <= 0 and field != "budget_steps":
                raise ConfigError(
                    f"data.{field}={value:g} must be above 0 for data.rule={rule!r}, as in "
                    f"--data.{field.replace('_', '-')} {'3.3' if rule == 'temperature' else '4'}"
                )
        for source in self.sources:
            if self.rule != "fixed" and source.weight not in (0, 1):
                raise ConfigError(
                    f"data.sources: weight={source.weight:g} of {source.name!r}, but data.rule={self.rule!r} finds "
                    "the weights; leave it out (0 leaves the source out), or set data.rule='fixed'"
                )

    def open(self) -> Prepared:
        """The prepared data, shards that are left out only in name. Raises DataError, see `open_prepared`."""
        return open_prepared(
            self.prepared, {left.shard for left in self.leave_out}, self.named_sources()
        )

    def named_sources(self) -> set[str] | None:
        """Sources that some part of the run names; None: all that there are."""
        listed = [self.sources, *(phase.sources for phase in self.phases)]
        return {source.name for sources in listed for source in sources} if self.sources else None

    def with_phase(self, phase: Phase) -> "DataConfig":
        """The same with another phase, in the place of one that begins at the same step."""
        others = [old for old in self.phases if old.from_step != phase.from_step]
        ordered = sorted([*others, phase], key=lambda phase: phase.from_step)
        return replace(self, phases=tuple(ordered))


class _Hole(NamedTuple):
    """Tokens [begin, end) of a split that rows from `from_row` on do without."""

    from_row: int
    begin: int
    end: int


class _Rows:
    """Packed rows of one source."""

    def __init__(self, name: str, split: Split, config: DataConfig) -> None:
        self.name, self.split, self.seq_len = name, split, config.seq_len
        self.key = f"{config.seed}/{name}"
        self.holes: list[_Hole] = []
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

    def fill(self, batch: Batch, position: int, row: int, index: int) -> None:
        """Writes packed row `row`, which is row `index` of the run, into row `position` of the zeroed `batch`."""
        starts, counts = self.plan.row(row)
        kept = np.ones(len(starts), bool)
        for hole in self.holes:
            if index >= hole.from_row:
                kept &= (starts < hole.begin) | (starts >= hole.end)
        fill_row(batch, position, self.split, starts[kept], counts[kept])


class DataPlan:
    """Every row of the run. Picklable; the shards are opened again where it arrives."""

    def __init__(
        self,
        config: DataConfig,
        prepared: Prepared | None = None,
        *,
        order: RowOrder | None = None,
        steps: int = 0,
    ) -> None:
        """Plans the rows of `config` over `prepared` (by default opened from `config.prepared`).

        Args:
          config: which rows.
          prepared: the shards.
          order: which rows the steps take; needed by what counts in steps: phases, shards that are left
            out from a step on, and UniMax.
          steps: of the run; UniMax counts its epochs over them unless `config.budget_steps` is set.

        Raises:
          ConfigError: an unknown source, or a rule that cannot be kept.
          DataError: a source of positive weight has nothing to train on.
        """
        prepared = prepared or config.open()
        if not order and (config.phases or any(left.from_step for left in config.leave_out)):
            field = "phases" if config.phases else "leave_out"
            raise ConfigError(f"data.{field} counts in steps; give the batch size too")
        self.config = config
        self.seq_len = config.seq_len
        self.vocab_size = prepared.vocab_size
        self.tokenizer_fingerprint = prepared.tokenizer_fingerprint
        self.source_names = _names(config, prepared)
        splits = [prepared.sources[name][TRAIN] for name in self.source_names]
        self._rows = [
            _Rows(name, split, config)
            for name, split in zip(self.source_names, splits, strict=True)
        ]
        self._contents = [split.digest for split in splits]
        # weights are token shares, and best-fit rows are not equally full in every source
        per_row = np.array([max(rows.plan.fill, 1e-9) for rows in self._rows]) * self.seq_len
        count = order.rows_before if order else (lambda step: 0)
        # counted as at the start of the run: batches that were left out do not change it
        budget = (config.budget_steps or steps) * order.sizes[0][1] if order else 0
        self.weights = [self._base_weights(per_row, budget)]
        self.weights += [_listed(phase.sources) for phase in config.phases]
        edges = [(0, 0)]  # of the change to each phase
        edges += [(p.from_step, p.from_step + p.ramp_steps) for p in config.phases]
        stretches = []
        for (begin, end), weights in zip(edges, self.weights, strict=True):
            shares = np.array([weights.get(name, 0.0) for name in self.source_names])
            stretches.append(Stretch(count(begin), shares, count(end) - count(begin)))
        self._schedule = Schedule(stretches, per_row)
        self._check_filled()
        for left in config.leave_out:
            rows, begin, end = self._find(left.shard)
            rows.holes.append(_Hole(count(left.from_step), begin, end))
        self.digest = self.digest_before(1 << 62)

    def _base_weights(self, per_row: np.ndarray, budget_rows: int) -> dict[str, float]:
        """Token shares from row 0 on, by source, not normalised; by the rule of the config."""
        config = self.config
        if config.rule == "fixed" and config.sources:
            return _listed(config.sources)
        stated = _listed(config.sources)
        sizes = np.array(
            [
                rows.split.num_pairs if not stated or stated.get(rows.name) else 0
                for rows in self._rows
            ]
        )
        if not sizes.any():
            raise DataError(f"{config.prepared!r} holds no training documents")
        if config.rule == "fixed":
            return dict(zip(self.source_names, sizes.astype(float).tolist(), strict=True))
        if config.rule == "temperature":
            shares = by_temperature(sizes, config.temperature)
        elif budget_rows < 1:
            raise ConfigError(
                "data.rule='unimax' shares a budget out; give the batch size and the steps of the run"
            )
        else:
            shares = unimax(sizes, per_row, budget_rows, config.max_epochs)
        return dict(zip(self.source_names, shares.tolist(), strict=True))

    def _check_filled(self) -> None:
        for rows in self._rows:
            if rows.split.num_pairs == 0 and any(w.get(rows.name) for w in self.weights):
                raise DataError(
                    f"source {rows.name!r} of {self.config.prepared!r} has nothing to train on "
                    f"({rows.split.num_documents} documents); leave it out or give it weight 0"
                )

    def _find(self, shard: str) -> tuple[_Rows, int, int]:
        """The source of a shard, and its tokens [begin, end). Raises ConfigError: there is no such shard."""
        for rows in self._rows:
            begin, end = rows.split.span(shard)
            if end and end - begin == rows.split.num_tokens:
                raise ConfigError(
                    f"data.leave_out: {shard!r} is all that {rows.name!r} has; put a good copy back, or begin "
                    "a new run whose data.sources do not name it"
                )
            if end:
                return rows, begin, end
        known = [shard.name for rows in self._rows for shard in rows.split.shards]
        raise ConfigError(
            f"data.leave_out: {shard!r} is no shard to train on; {nearest(shard, known)}"
        )

    def left_out(self) -> list[dict[str, Any]]:
        """Every shard that is left out: its name, from which step on, its source and the share of it."""
        told = []
        for left in self.config.leave_out:
            rows, begin, end = self._find(left.shard)
            share = (end - begin) / rows.split.num_tokens
            told.append({**vars(left), "source": rows.name, "share": share})
        return told

    def digest_before(self, row: int) -> str:
        """Digest of all that decides the rows before `row`, and of nothing else."""
        used: dict[str, str] = {}
        order = []
        for piece in self._schedule.pieces:
            if piece.from_row >= row:
                break
            counts = []
            spread = piece.interleave
            for name, content, count, owed in zip(
                self.source_names, self._contents, spread.counts, spread.owed, strict=True
            ):
                if count:
                    used[name] = content
                    counts.append([name, count, owed])
            order.append([piece.from_row, counts])
        identity: dict[str, Any] = {
            "format": PLAN_FORMAT,
            "tokenizer": self.tokenizer_fingerprint,
            "sources": used,
            "order": order,
            "seq_len": self.seq_len,
            "packing": self.config.packing,
            "seed": self.config.seed,
        }
        holes = sorted(
            [rows.name, *hole] for rows in self._rows for hole in rows.holes if hole.from_row < row
        )
        if holes:
            identity["left_out"] = holes
        return digest(identity)

    def mixture(self) -> list[dict[str, Any]]:
        """The weights of every phase as resolved, in plain values for a record."""
        ramps = [0, *(phase.ramp_steps for phase in self.config.phases)]
        steps = [0, *(phase.from_step for phase in self.config.phases)]
        return [
            {"from_step": step, "weights": dict(weights), "ramp_steps": ramp}
            for step, weights, ramp in zip(steps, self.weights, ramps, strict=True)
        ]

    @property
    def shares(self) -> dict[str, float]:
        """Token share of each source from row 0 on."""
        return self.shares_at(0)

    def shares_at(self, row: int) -> dict[str, float]:
        """Token share of each source where `row` lies."""
        shares = self._schedule.piece_of(row).shares
        return dict(zip(self.source_names, shares.tolist(), strict=True))

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
        return self.source_names[int(self._schedule.locate(np.array([row]))[0][0])]

    def epochs_at(self, row: int) -> dict[str, float]:
        """Epochs of each source that lie before row `row`."""
        before = self._schedule.rows_before(row)
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
        sources, numbers = self._schedule.locate(wanted)
        for source in np.unique(sources):
            mine = np.flatnonzero(sources == source)
            rows = self._rows[source]
            packed = rows.packed(numbers[mine])
            for position, row, index in zip(mine, packed, wanted[mine], strict=True):
                rows.fill(batch, int(position), int(row), int(index))
        return batch

    def row(self, index: int) -> Batch:
        """One row: arrays [T]."""
        return Batch(*(array[0] for array in self.rows([index])))


def _listed(sources: Sequence[SourceWeight]) -> dict[str, float]:
    return {source.name: source.weight for source in sources}


def _names(config: DataConfig, prepared: Prepared) -> tuple[str, ...]:
    """Every source that has a weight in any phase, those of weight 0 included, in order of appearance.

    Raises:
      ConfigError: the prepared data has no such source.
    """
    names = dict.fromkeys(source.name for source in config.sources) or dict.fromkeys(
        prepared.sources
    )
    lists = [("data.sources", config.sources)]
    lists += [(f"data.phases.{i}.sources", phase.sources) for i, phase in enumerate(config.phases)]
    for field, sources in lists:
        for source in sources:
            if source.name not in prepared.sources:
                raise ConfigError(
                    f"{field}: {source.name!r} is not in {config.prepared!r}; "
                    f"{nearest(source.name, list(prepared.sources))}"
                )
            names.setdefault(source.name)
    return tuple(names)
