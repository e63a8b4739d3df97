"""Shares that change by the step: exact in any window, rows of a source without gaps, a past that stays."""

from typing import Any

import numpy as np
import pytest

from llm_jax.data.interleave import PERIOD, Schedule, Stretch
from llm_jax.data.mixture import DataConfig, DataPlan
from llm_jax.data.phases import Phase, raised
from llm_jax.data.row_order import RowOrder
from llm_jax.data.weights import SourceWeight, by_temperature, unimax
from llm_jax.errors import ConfigError

WINDOW, BOUND = 10_000, 10  # rows: 0.1 %


def drawn_stretches(seed, sources):
    """Up to 25 stretches of 1 to 4,000 rows; weights may be 0, every second change is a ramp."""
    rng = np.random.default_rng(seed)
    stretches, row = [], 0
    for number in range(int(rng.integers(1, 25))):
        shares = rng.dirichlet(np.full(sources, 0.5)) * (rng.random(sources) > 0.2)
        shares[int(rng.integers(sources))] += 0.01
        ramp = int(rng.integers(0, 3000)) if number and rng.random() < 0.5 else 0
        stretches.append(Stretch(row, shares, ramp))
        row += int(rng.integers(1, 4000 if rng.random() < 0.7 else 90))
    return stretches, rng.uniform(0.5, 1, sources)


def target(stretches, rows):
    """Token shares in the middle of each of `rows`, by the definition of a ramp: [rows, sources]."""
    shares = np.empty((len(rows), len(stretches[0].shares)))
    for stretch in stretches:
        here = rows >= stretch.from_row
        goal = stretch.shares / stretch.shares.sum()
        if stretch.ramp_rows:
            before = np.array([stretch.from_row - 1e-9])
            origin = target([s for s in stretches if s.from_row < stretch.from_row], before)
            part = np.clip((rows[here] - stretch.from_row) / stretch.ramp_rows, 0, 1)[:, None]
            shares[here] = origin + (goal - origin) * part
        else:
            shares[here] = goal
    return shares


@pytest.mark.parametrize("seed", range(20))
def test_shares_hold_in_any_window_of_10000_rows_across_phases_and_ramps(seed):
    stretches, per_row = drawn_stretches(seed, sources=2 + seed % 7)
    schedule = Schedule(stretches, per_row)
    rows = np.arange(stretches[-1].from_row + WINDOW + 5000)
    source, number = schedule.locate(rows)
    by_row = target(stretches, rows + 0.5) / per_row
    by_row /= by_row.sum(axis=1, keepdims=True)
    for name in range(len(per_row)):
        mine = source == name
        assert np.array_equal(number[mine], np.arange(mine.sum()))  # no skip, no repeat
        drift = np.concatenate([[0], np.cumsum(mine - by_row[:, name])])
        assert np.abs(drift[WINDOW:] - drift[:-WINDOW]).max() < BOUND
        assert not mine[by_row[:, name] == 0].any()
    for row in (0, 1, int(rows[-1]) // 3, int(rows[-1])):
        counts = np.bincount(source[:row], minlength=len(per_row))
        assert schedule.rows_before(row).tolist() == counts.tolist()


@pytest.mark.parametrize("sources", [50, 400])
def test_shares_of_many_sources_hold_as_well(sources):
    shares = np.random.default_rng(sources).dirichlet(np.ones(sources))
    schedule = Schedule([Stretch(0, shares), Stretch(12_345, shares[::-1])], np.ones(sources))
    source, _ = schedule.locate(np.arange(4 * WINDOW))
    expected = target([Stretch(0, shares), Stretch(12_345, shares[::-1])], np.arange(4 * WINDOW))
    for name in range(0, sources, 7):
        drift = np.cumsum((source == name) - expected[:, name])
        assert np.abs(drift[WINDOW:] - drift[:-WINDOW]).max() < BOUND


def test_phases_shorter_than_a_rare_source_still_give_it_its_share():
    # 0.4 rows of the rare source in each phase of 80 rows: what is owed is carried on
    shares = [np.array([0.995, 0.005]), np.array([0.994, 0.006])]
    stretches = [Stretch(80 * i, shares[i % 2]) for i in range(300)]
    source, _ = Schedule(stretches, np.ones(2)).locate(np.arange(80 * 300))
    assert abs((source == 1).sum() - 80 * 300 * 0.0055) <= 1


def test_a_very_long_ramp_is_laid_out_in_pieces_no_longer_than_a_period():
    schedule = Schedule([Stretch(0, np.ones(2)), Stretch(10, np.array([0, 1]), 10**9)], np.ones(2))
    assert max(piece.interleave.period for piece in schedule.pieces) <= PERIOD
    half = schedule.rows_before(10 + 10**9)
    assert half[0] == pytest.approx(10**9 / 4, abs=10)  # a triangle from 1/2 down to 0


def test_rows_of_billions_are_found_as_fast_as_the_first():
    schedule = Schedule([Stretch(0, np.array([0.3, 0.7])), Stretch(10**12, np.ones(2))], np.ones(2))
    source, number = schedule.locate(np.array([10**12 + 10**9]))
    before = schedule.rows_before(10**12 + 10**9)
    assert number[0] == before[source[0]]
    assert before.sum() == 10**12 + 10**9


def test_tokens_hold_their_shares_over_rows_that_are_not_equally_full(make_prepared):
    rng = np.random.default_rng(0)
    texts = {
        name: ["x" * int(size) for size in rng.integers(low, high, 500)]
        for name, low, high in (("short", 5, 40), ("long", 40, 150))
    }
    texts = {name: [f"{i}{text}" for i, text in enumerate(some)] for name, some in texts.items()}
    prepared = make_prepared(texts, holdout_fraction=0.0)
    change = Phase(from_step=300, sources=weights(short=0.2, long=0.8), ramp_steps=1000)
    plan = plan_of(
        prepared, change, sources=weights(short=0.7, long=0.3), seq_len=64, batch_size=10
    )
    tokens = np.zeros(24_000)
    for begin in range(0, len(tokens), 1000):
        rows = np.arange(begin, begin + 1000)
        tokens[rows] = plan.rows(rows).loss_mask_BT.sum(axis=1)
    short = np.array([plan.source_of(row) == "short" for row in range(len(tokens))])
    taken = np.concatenate([[0], np.cumsum(tokens * short)])
    every = np.concatenate([[0], np.cumsum(tokens)])
    share = (taken[WINDOW:] - taken[:-WINDOW]) / (every[WINDOW:] - every[:-WINDOW])
    middle = np.arange(len(tokens)) + 0.5
    stretches = [
        Stretch(0, np.array([0.7, 0.3])),
        Stretch(3000, np.array([0.2, 0.8]), 10_000),
    ]
    wanted = np.concatenate([[0], np.cumsum(target(stretches, middle)[:, 0])])
    assert np.abs(share - (wanted[WINDOW:] - wanted[:-WINDOW]) / WINDOW).max() < 0.001


def weights(**shares):
    return tuple(SourceWeight(name=name, weight=weight) for name, weight in shares.items())


TEXTS = {name: [f"{name} {i} " * (1 + i % 5) for i in range(40)] for name in "ab"}


def plan_of(prepared, *phases, batch_size=4, steps=100, **settings):
    defaults = {"sources": weights(a=1, b=1), "seq_len": 32, "prepared": str(prepared.folder)}
    config = DataConfig(**(defaults | settings), phases=phases)
    return DataPlan(config, prepared, order=RowOrder(sizes=((0, batch_size),)), steps=steps)


def test_a_later_phase_leaves_the_digest_and_the_rows_before_it_alone(make_prepared):
    prepared = make_prepared(TEXTS)
    ramp = Phase(from_step=10, sources=weights(a=1, b=3), ramp_steps=20)
    cut = Phase(from_step=17, sources=weights(b=1))  # in the middle of the ramp
    short, long = plan_of(prepared, ramp), plan_of(prepared, ramp, cut)
    assert short.digest != long.digest
    assert short.digest_before(4 * 17) == long.digest_before(4 * 17)
    assert short.digest_before(4 * 17 + 1) != long.digest_before(4 * 17 + 1)
    for one, other in zip(short.rows(range(4 * 17)), long.rows(range(4 * 17)), strict=True):
        assert np.array_equal(one, other)
    assert [long.source_of(row) for row in range(4 * 17, 4 * 19)] == ["b"] * 8


def test_the_digest_of_the_past_covers_the_sources_it_read_and_no_other(make_prepared):
    change = Phase(from_step=5, sources=weights(b=1))
    stated: dict[str, Any] = {"sources": weights(a=1)}
    one = plan_of(make_prepared(TEXTS), change, **stated)
    other = plan_of(make_prepared({**TEXTS, "b": ["new text"] * 3}), change, **stated)
    assert one.digest_before(20) == other.digest_before(20)
    assert one.digest_before(21) != other.digest_before(21)


def test_an_added_phase_takes_its_place_among_the_others():
    planned = (Phase(from_step=3, sources=weights(a=1)), Phase(from_step=9, sources=weights(b=1)))
    config = DataConfig(prepared="x", phases=planned)
    added = config.with_phase(Phase(from_step=6, sources=weights(a=1, b=1)))
    assert [phase.from_step for phase in added.phases] == [3, 6, 9]
    again = added.with_phase(Phase(from_step=9, sources=weights(a=1)))
    assert again.phases == (*added.phases[:2], Phase(from_step=9, sources=weights(a=1)))


def test_a_raised_share_is_bounded_and_the_others_keep_their_proportions():
    shares = {"en": 0.2, "zh": 0.6, "code": 0.2}
    assert raised(shares, ["en"], 2.0, 0.5) == weights(en=0.4, zh=0.45, code=0.15)
    assert raised(shares, ["en"], 10.0, 0.5) == weights(en=0.5, zh=0.375, code=0.125)
    assert raised(shares, ["zh"], 2.0, 0.5) == weights(en=0.2, zh=0.6, code=0.2)
    with pytest.raises(ConfigError, match="the share of fr is 0"):
        raised({"en": 1.0, "fr": 0.0}, ["fr"], 2.0, 0.5)


@pytest.mark.parametrize(
    ("sizes", "rows", "cap", "expected"),
    [
        # equal parts fit under every cap
        ([100, 200, 400], 300, 1, [1 / 3, 1 / 3, 1 / 3]),
        # 600 tokens: 200 each, but the smallest ends at 100; the rest halve 500
        ([100, 300, 1000], 600, 1, [100 / 600, 250 / 600, 250 / 600]),
        # two epochs: 100 x 2 and 150 x 2 are capped, 700 are left
        ([100, 150, 1000], 1200, 2, [200 / 1200, 300 / 1200, 700 / 1200]),
        # everything capped: by size
        ([100, 300, 600], 2000, 2, [0.1, 0.3, 0.6]),
        # an empty source gets nothing
        ([0, 50, 50], 60, 1, [0, 0.5, 0.5]),
    ],
)
def test_unimax_spreads_the_budget_evenly_below_the_cap(sizes, rows, cap, expected):
    order = [2, 0, 1]  # in whatever order the sources come
    shares = unimax(np.array(sizes)[order], np.ones(3), rows, cap)
    assert shares == pytest.approx(np.array(expected)[order])


def test_unimax_counts_rows_that_are_not_equally_full():
    # 30 rows of 10 and of 5 tokens: the small source is capped at 100 tokens = 10 rows, and the
    # other fills 20 rows with 100 tokens
    shares = unimax(np.array([100, 1000]), np.array([10.0, 5.0]), 30, 1)
    assert shares == pytest.approx([0.5, 0.5])


def test_unimax_keeps_every_source_of_a_plan_below_its_cap(make_prepared):
    texts = {"small": [f"{i:020d}" for i in range(30)], "large": [f"{i:040d}" for i in range(300)]}
    prepared = make_prepared(texts, holdout_fraction=0.0)
    settings = {"sources": (), "rule": "unimax", "max_epochs": 3.0, "seq_len": 64}
    plan = plan_of(prepared, steps=150, **settings)
    epochs = plan.epochs_at(4 * 150)
    assert epochs["small"] == pytest.approx(3, abs=0.1)
    assert 1 < epochs["large"] < 3
    longer = plan_of(prepared, steps=150_000, budget_steps=150, **settings)
    assert longer.digest == plan.digest
    with pytest.raises(ConfigError, match=r"at this cap the sources last for .* raise it to"):
        plan_of(prepared, steps=150_000, **settings)


def test_temperature_flattens_the_sizes():
    sizes = np.array([1, 16, 0])
    assert by_temperature(sizes, 1.0) == pytest.approx([1 / 17, 16 / 17, 0])
    assert by_temperature(sizes, 4.0) == pytest.approx([1 / 3, 2 / 3, 0])
    assert by_temperature(np.array([10**6, 10**12]), 0.02)[0] == pytest.approx(0)


def test_a_rule_leaves_sources_of_weight_0_out(make_prepared):
    settings = {"rule": "temperature", "temperature": 2.0, "sources": weights(a=1, b=0)}
    assert plan_of(make_prepared(TEXTS), **settings).shares == {"a": 1.0, "b": 0.0}
