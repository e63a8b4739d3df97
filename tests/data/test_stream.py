"""The stream of training rows is one, whoever reads it and whatever interrupts the reading.

Its hash is compared with that of the rows as the plan gives them, asked one by one in one process.
"""

import hashlib
import itertools
from typing import NamedTuple

import numpy as np
import pytest

from llm_jax.data.loader import batches
from llm_jax.data.mixture import DataConfig, DataPlan
from llm_jax.data.phases import Phase
from llm_jax.data.row_order import RowOrder
from llm_jax.data.weights import SourceWeight

BATCH, STEPS = 12, 30
TEXTS = {  # no two rows alike
    name: [" ".join(f"{name}{i}.{j}" for j in range(1 + i % 13)) for i in range(30)]
    for name in "abc"
}
LATE = 17  # the step from which the second phase holds


def weights(**shares):
    return tuple(SourceWeight(name=name, weight=weight) for name, weight in shares.items())


# three sources, one of which begins by a ramp and one of which ends, within 30 steps
RAMP = Phase(from_step=5, sources=weights(a=0.2, b=0.3, c=0.5), ramp_steps=6)
TURN = Phase(from_step=LATE, sources=weights(c=0.6, b=0.4))


@pytest.fixture
def config(make_prepared):
    prepared = make_prepared(TEXTS)
    return DataConfig(
        prepared=str(prepared.folder),
        seq_len=24,
        sources=weights(a=0.7, b=0.3),
        phases=(RAMP, TURN),
    )


def plan_of(config):
    return DataPlan(config, order=RowOrder(sizes=((0, BATCH),)))


def digest_of(rows):
    """Of every array of rows [T], in this order."""
    digest = hashlib.sha256()
    for row in rows:
        for array in row:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class Reading(NamedTuple):
    """How the stream is read."""

    hosts: int = 1
    workers: int = 0
    stops: tuple[int, ...] = ()  # steps at which every process is killed and started anew
    strided: bool = False  # hosts hold every n-th row instead of a run of rows
    added: bool = False  # the second phase is not in the config before its step


def read(config, how):
    """Rows of all hosts in the order of the global batch, from one or several lives of the run."""
    rows = np.arange(BATCH)
    parts = [rows[i :: how.hosts] for i in range(how.hosts)]
    if not how.strided:
        parts = np.array_split(rows, how.hosts)
    edges = [0, *how.stops, STEPS]
    for begin, end in itertools.pairwise(edges):
        late = how.added and begin >= LATE
        now = DataConfig(**{**vars(config), "phases": (RAMP,)}) if how.added else config
        plan = plan_of(now.with_phase(TURN) if late else now)
        loaders = [batches(plan, BATCH, mine, begin, how.workers, prefetch=3) for mine in parts]
        for _ in range(begin, end):
            held = {}
            for mine, loader in zip(parts, loaders, strict=True):
                held.update(zip(mine.tolist(), zip(*next(loader), strict=True), strict=True))
            yield from (held[row] for row in range(BATCH))
        for loader in loaders:  # what was read ahead is lost, as when a process is killed
            loader.close()


@pytest.mark.parametrize(
    "how",
    [
        Reading(),
        Reading(stops=(1, 5, 8, 16, 29)),
        Reading(hosts=2),
        Reading(hosts=3, stops=(9,)),
        Reading(hosts=4, strided=True),
        Reading(stops=(LATE,), added=True),
        Reading(hosts=2, stops=(4, LATE, 20), added=True),
        Reading(hosts=1, workers=2, stops=(LATE,), added=True),
        pytest.param(Reading(workers=1, stops=(7,)), marks=pytest.mark.slow),
        pytest.param(Reading(hosts=2, workers=3), marks=pytest.mark.slow),
        pytest.param(Reading(workers=4, stops=(11,)), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_stream_is_that_of_one_uninterrupted_process(config, how):
    plan = plan_of(config)
    straight = digest_of(plan.row(index) for index in range(STEPS * BATCH))
    assert digest_of(read(config, how)) == straight


def test_a_row_that_differs_or_moves_changes_the_hash(config):
    rows = [plan_of(config).row(index) for index in range(20)]
    other = plan_of(DataConfig(**{**vars(config), "seed": 1}))
    assert digest_of(rows) == digest_of(list(rows))
    assert digest_of(rows) != digest_of([*rows[1:], rows[0]])
    assert digest_of(rows) != digest_of([*rows[:-1], other.row(19)])


def test_every_pair_of_a_source_is_seen_once_an_epoch_across_the_phases(config):
    plan = plan_of(config)
    seen = {name: [] for name in plan.source_names}
    for index in range(STEPS * BATCH):
        row = plan.row(index)
        seen[plan.source_of(index)].append(np.stack(row[:4]).tobytes())
    for name, rows in plan.epoch_rows.items():
        taken = seen[name]
        assert len(taken) > rows  # more than an epoch, over two phases
        for begin in range(0, len(taken) - rows + 1, rows):
            assert len(set(taken[begin : begin + rows])) == rows
        assert plan.epochs_at(STEPS * BATCH)[name] == len(taken) / rows
    assert {plan.source_of(k) for k in range(5 * BATCH)} == {"a", "b"}
    assert {plan.source_of(k) for k in range(LATE * BATCH, STEPS * BATCH)} == {"b", "c"}
