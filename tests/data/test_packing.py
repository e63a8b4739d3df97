"""Packing: every pair once, no document cut without need, rows as full as promised."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.packing import best_fit_decreasing, plan_rows
from llm_jax.data.permutation import permute

PLANNERS = ["concat", "best_fit"]
# tokens per document; 0 and 1 have no pair
LENGTHS = st.lists(st.integers(0, 40), min_size=0, max_size=60)


def starts_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def pieces(plan):
    return [plan.row(i) for i in range(len(plan))]


@given(lengths=LENGTHS, seq_len=st.integers(2, 24), packing=st.sampled_from(PLANNERS))
@settings(deadline=None)
def test_every_pair_is_used_exactly_once_and_none_spans_documents(lengths, seq_len, packing):
    plan = plan_rows(starts_of(lengths), seq_len, packing, "key")
    used = []
    for starts, counts in pieces(plan):
        assert counts.sum() <= seq_len
        assert np.all(counts > 0)
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            used += range(start, start + count)
    # a pair is named by its input token; the last token of a document is never an input
    starts = starts_of(lengths).tolist()
    inputs = [t for n, s in zip(lengths, starts, strict=False) for t in range(s, s + max(0, n - 1))]
    assert sorted(used) == inputs
    assert plan.num_pairs == len(inputs)
    if len(plan):
        assert plan.fill == pytest.approx(len(inputs) / (len(plan) * seq_len))


@given(lengths=LENGTHS, seq_len=st.integers(2, 24))
@settings(deadline=None)
def test_concat_rows_are_full_but_for_the_last(lengths, seq_len):
    counts = [
        int(c.sum()) for _, c in pieces(plan_rows(starts_of(lengths), seq_len, "concat", "k"))
    ]
    assert all(count == seq_len for count in counts[:-1])


@given(lengths=LENGTHS, seq_len=st.integers(2, 24))
@settings(deadline=None)
def test_best_fit_cuts_only_documents_that_are_longer_than_a_row(lengths, seq_len):
    plan = plan_rows(starts_of(lengths), seq_len, "best_fit", "k")
    found = sorted(int(c) for _, counts in pieces(plan) for c in counts)
    expected = []
    for pairs in (n - 1 for n in lengths if n > 1):
        expected += [seq_len] * (pairs // seq_len) + ([pairs % seq_len] if pairs % seq_len else [])
    assert found == sorted(expected)


def naive_best_fit(lengths, capacity):
    """The textbook loop: each item into the fullest bin that holds it. Returns the rooms left."""
    rooms = []
    for length in lengths:
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@given(lengths=st.lists(st.integers(1, 30), max_size=80))
@settings(deadline=None)
def test_best_fit_in_bulk_equals_the_textbook_loop(lengths):
    lengths = sorted(lengths, reverse=True)
    bins, count = best_fit_decreasing(np.array(lengths, dtype=np.int64), 30)
    used = np.bincount(bins, weights=lengths, minlength=count) if lengths else np.zeros(0)
    assert sorted((30 - used).astype(int).tolist()) == naive_best_fit(lengths, 30)


def test_concat_by_hand():
    # documents of 5, 3 and 4 tokens at offsets 0, 5, 8: 4 + 2 + 3 pairs
    order = np.argsort(permute(np.arange(3), 3, "k/documents"))  # which document comes when
    plan = plan_rows(np.array([0, 5, 8, 12]), 4, "concat", "k")
    stream = [t for d in np.argsort(order) for t in range([0, 5, 8][d], [4, 7, 11][d])]
    rows = [
        [t for s, c in zip(*plan.row(i), strict=True) for t in range(s, s + c)] for i in range(3)
    ]
    assert rows == [stream[0:4], stream[4:8], stream[8:9]]


def test_best_fit_by_hand():
    # pairs 6, 4, 3, 2, 1 in rows of 8: 6+2, 4+3+1 is the only optimum and best-fit finds it
    plan = plan_rows(starts_of([7, 5, 4, 3, 2]), 8, "best_fit", "k")
    assert sorted(sorted(c.tolist()) for _, c in pieces(plan)) == [[1, 3, 4], [2, 6]]
    assert plan.fill == 1.0


def test_fill_on_lengths_like_real_ones():
    lengths = np.random.default_rng(0).lognormal(5.5, 1.1, 20_000).astype(np.int64) + 2
    for seq_len, at_least in ((256, 0.999), (1024, 0.999), (4096, 0.99)):
        assert plan_rows(starts_of(lengths), seq_len, "best_fit", "k").fill > at_least
        assert plan_rows(starts_of(lengths), seq_len, "concat", "k").fill > at_least


@pytest.mark.parametrize("packing", PLANNERS)
def test_the_key_decides_the_rows_and_nothing_else_does(packing):
    lengths = np.random.default_rng(1).integers(2, 50, 200)
    rows = {
        key: [
            (s.tolist(), c.tolist())
            for s, c in pieces(plan_rows(starts_of(lengths), 32, packing, key))
        ]
        for key in ("a", "b")
    }
    again = [
        (s.tolist(), c.tolist()) for s, c in pieces(plan_rows(starts_of(lengths), 32, packing, "a"))
    ]
    assert rows["a"] == again
    assert rows["a"] != rows["b"]


@given(size=st.integers(1, 3000), key=st.text(max_size=5))
@settings(deadline=None, max_examples=60)
def test_the_permutation_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_the_permutation_is_random_access_and_large():
    size = 10**15
    some = np.array([0, 1, 2, 10**9, size - 1])
    sent = permute(some, size, "k")
    assert np.all((sent >= 0) & (sent < size))
    assert [int(permute(np.array([i]), size, "k")[0]) for i in some] == sent.tolist()
    assert len(set(permute(np.arange(10_000), size, "k").tolist())) == 10_000


def test_the_permutation_scatters():
    sent = permute(np.arange(10_000), 10_000, "k")
    # neighbours end up far apart: the mean distance of two random places is size / 3
    assert 3000 < np.abs(np.diff(sent)).mean() < 3700
    assert 0 < np.sum(sent == np.arange(10_000)) + 1 < 12  # fixed points of a random one: about 1
    other = permute(np.arange(10_000), 10_000, "l")
    assert np.sum(sent == other) < 12


def test_the_permutation_never_changes_between_versions():
    # stored runs depend on these values; a change needs a new mixture.PLAN_FORMAT
    assert permute(np.arange(10), 10, "a").tolist() == [3, 9, 0, 5, 4, 7, 6, 8, 2, 1]
    assert permute(np.array([0, 1, 10**12 - 1]), 10**12, "0/zh/epoch/3").tolist() == GOLDEN


GOLDEN = [811555506382, 181753501837, 612576347431]


def test_an_index_outside_the_permutation_is_refused():
    with pytest.raises(ValueError, match="must be below size=3"):
        permute(np.array([3]), 3, "k")
    with pytest.raises(ValueError, match="size=0"):
        permute(np.array([], dtype=np.int64), 0, "k")
