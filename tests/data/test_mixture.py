"""The data plan: rows as a pure function of their index, exact shares, documents kept apart."""

import hashlib
import itertools
import pickle
from collections import Counter

import numpy as np
import pytest

from llm_jax.data.batch import check_batch
from llm_jax.data.interleave import PERIOD, Interleave
from llm_jax.data.mixture import DataConfig, DataPlan
from llm_jax.data.permutation import permute
from llm_jax.data.shards import TRAIN
from llm_jax.data.weights import SourceWeight
from llm_jax.errors import ConfigError, DataError
from tests.data.conftest import BOS, EOS

PLANNERS = ["concat", "best_fit"]


def letters(key, count, low, high):
    """Texts of `low` to `high` - 1 letters, the same with every version of numpy."""
    sizes = low + permute(np.arange(count), 10**6, key) % (high - low)
    stream = iter(97 + permute(np.arange(sizes.sum()), 10**9, key) % 26)
    return ["".join(chr(next(stream)) for _ in range(size)) for size in sizes]


TEXTS = {"a": letters("a", 60, 2, 90), "b": letters("b", 25, 5, 30)}


@pytest.fixture
def prepared(make_prepared):
    return make_prepared(TEXTS, shard_max_tokens=500)


def make_plan(prepared, weights=None, **settings):
    sources = tuple(SourceWeight(name=n, weight=w) for n, w in (weights or {}).items())
    defaults = {"seq_len": 32, "prepared": str(prepared.folder), "sources": sources}
    return DataPlan(DataConfig(**(defaults | settings)))


def segments(row):
    """(inputs, targets, positions) of each segment of one row."""
    for segment in range(1, row.segments_BT.max() + 1):
        here = row.segments_BT == segment
        yield row.tokens_BT[here], row.targets_BT[here], row.positions_BT[here]


@pytest.mark.parametrize("packing", PLANNERS)
def test_an_epoch_holds_every_pair_of_every_document_exactly_once(prepared, packing):
    plan = make_plan(prepared, {"a": 1.0}, packing=packing)
    split = prepared.sources["a"][TRAIN]
    pairs = Counter()
    for index in range(split.num_documents):
        pairs.update(itertools.pairwise(split.document(index).tolist()))
    rows = plan.epoch_rows["a"]
    for epoch in range(2):
        batch = plan.rows(np.arange(epoch * rows, (epoch + 1) * rows))
        real = batch.loss_mask_BT > 0
        found = Counter(
            zip(batch.tokens_BT[real].tolist(), batch.targets_BT[real].tolist(), strict=True)
        )
        assert found == pairs
    first, second = (plan.rows(range(e * rows, e * rows + rows)).tokens_BT for e in range(2))
    assert not np.array_equal(first, second)  # another order
    assert sorted(r.tobytes() for r in first) == sorted(r.tobytes() for r in second)


@pytest.mark.parametrize("packing", PLANNERS)
def test_every_segment_is_a_run_of_one_document(prepared, packing):
    plan = make_plan(prepared, packing=packing)
    stored = [
        split.document(i).tolist()
        for split in (prepared.sources[name][TRAIN] for name in "ab")
        for i in range(split.num_documents)
    ]
    whole = {tuple(d) for d in stored}
    joined = {",".join(map(str, d)) for d in stored}
    for index in range(40):
        for tokens, targets, positions in segments(plan.row(index)):
            assert positions.tolist() == list(range(len(tokens)))
            assert tokens[1:].tolist() == targets[:-1].tolist()
            assert EOS not in tokens
            assert BOS not in targets
            run = [*tokens.tolist(), int(targets[-1])]
            assert any(",".join(map(str, run)) in text for text in joined)
            if packing == "best_fit" and tokens[0] == BOS and len(tokens) < 32:
                assert tuple(run) in whole


def test_rows_keep_the_contract_of_a_batch(prepared):
    batch = make_plan(prepared).rows(range(50))
    check_batch(batch, prepared.vocab_size)
    assert np.array_equal(batch.loss_mask_BT > 0, batch.segments_BT > 0)


def test_rows_do_not_depend_on_how_they_are_asked_for(prepared):
    plan = make_plan(prepared, {"a": 0.6, "b": 0.4})
    together = plan.rows(range(100))
    shuffled = np.random.default_rng(0).permutation(100)
    for one, other in zip(together, plan.rows(shuffled), strict=True):
        assert np.array_equal(one[shuffled], other)
    for k in (0, 7, 99):
        assert all(np.array_equal(r, t[k]) for r, t in zip(plan.row(k), together, strict=True))


def test_a_pickled_plan_gives_the_same_rows(prepared):
    plan = make_plan(prepared)
    plan.rows(range(3))  # opens the memory maps
    copy = pickle.loads(pickle.dumps(plan))
    assert copy.digest == plan.digest
    for one, other in zip(plan.rows(range(200)), copy.rows(range(200)), strict=True):
        assert np.array_equal(one, other)


def test_rows_never_change_between_versions(prepared):
    # stored runs depend on them; a change needs a new mixture.PLAN_FORMAT
    plan = make_plan(prepared, {"a": 0.7, "b": 0.3}, seed=3)
    digest = hashlib.sha256(b"".join(a.tobytes() for a in plan.rows([*range(64), 10**9])))
    assert digest.hexdigest()[:16] == "194662761bdb9477"


@pytest.mark.parametrize(
    "weights", [[1.0], [0.7, 0.3], [0.5, 0.3, 0.15, 0.05], [1, 1e-9], [3, 0, 1]]
)
def test_shares_hold_over_any_window(weights):
    weights = np.array(weights, dtype=np.float64)
    mixture = Interleave.of(weights)
    share = weights / weights.sum()
    rows = np.arange(3 * PERIOD)
    source, _ = mixture.locate(rows)
    for name, part in enumerate(share):
        taken = np.concatenate([[0], np.cumsum(source == name)])
        drift = taken - part * np.arange(len(taken))
        # any window [i, j) is off by at most the difference of two drifts, plus 1 / PERIOD a row
        assert drift.max() - drift.min() < len(weights) + 3
        if part == 0:
            assert taken[-1] == 0


def test_the_rows_of_a_source_count_up_without_gaps():
    mixture = Interleave.of(np.array([0.6, 0.25, 0.15]))
    source, number = mixture.locate(np.arange(PERIOD - 500, PERIOD + 500))
    for name in range(3):
        mine = number[source == name]
        before = int(mixture.rows_before(PERIOD - 500)[name])
        assert mine.tolist() == list(range(before, before + len(mine)))
    assert mixture.rows_before(mixture.period).tolist() == list(mixture.counts)


def test_weights_are_shares_of_tokens_not_of_rows(make_prepared):
    # rows of 20: 11 pairs leave 9 of 20 empty, 19 + 1 BOS = 20 pairs fill a row
    prepared = make_prepared(
        {
            "half": [f"{i:010d}" for i in range(50)],
            "full": [f"{i:019d}" for i in range(50)],
        },
        holdout_fraction=0.0,
    )
    plan = make_plan(prepared, {"half": 0.5, "full": 0.5}, seq_len=20)
    assert plan.fills == {"half": 11 / 20, "full": 1.0}
    tokens = Counter()
    for k in range(3100):
        tokens[plan.source_of(k)] += int(plan.row(k).loss_mask_BT.sum())
    assert tokens["half"] / sum(tokens.values()) == pytest.approx(0.5, abs=1e-3)
    assert plan.shares["half"] == pytest.approx(0.5, abs=1e-4)


def test_without_weights_every_source_counts_by_its_size(prepared):
    plan = make_plan(prepared)
    sizes = {name: prepared.sources[name][TRAIN].num_pairs for name in "ab"}
    assert plan.shares["a"] == pytest.approx(sizes["a"] / sum(sizes.values()), abs=1e-3)
    epochs = plan.epochs_at(10 * sum(plan.epoch_rows.values()))
    assert epochs["a"] == pytest.approx(10, abs=0.1)
    assert epochs["b"] == pytest.approx(10, abs=0.2)


def test_a_source_of_weight_0_is_never_read(prepared):
    plan = make_plan(prepared, {"a": 1.0, "b": 0.0})
    assert plan.source_names == ("a", "b")
    assert plan.shares == {"a": 1.0, "b": 0.0}
    assert {plan.source_of(k) for k in range(1000)} == {"a"}
    assert plan.epochs_at(1000)["b"] == 0


def test_the_digest_changes_with_all_that_changes_rows_and_nothing_else(prepared, make_prepared):
    base = make_plan(prepared, {"a": 0.5, "b": 0.5})
    different = [
        make_plan(prepared, {"a": 0.6, "b": 0.4}),
        make_plan(prepared, {"b": 0.5, "a": 0.5}),
        make_plan(prepared, {"a": 0.5}),
        make_plan(prepared, {"a": 0.5, "b": 0.5}, seq_len=33),
        make_plan(prepared, {"a": 0.5, "b": 0.5}, packing="concat"),
        make_plan(prepared, {"a": 0.5, "b": 0.5}, seed=1),
        make_plan(make_prepared(TEXTS | {"b": TEXTS["b"][:-1]}), {"a": 0.5, "b": 0.5}),
    ]
    digests = [base.digest, *(plan.digest for plan in different)]
    assert len(set(digests)) == len(digests)
    same = [
        make_plan(prepared, {"a": 2.0, "b": 2.0}),
        make_plan(prepared, {"a": 0.5, "b": 0.5}, workers=3, prefetch=1),
        make_plan(make_prepared(TEXTS, shard_max_tokens=500), {"a": 0.5, "b": 0.5}),  # elsewhere
    ]
    assert {plan.digest for plan in same} == {base.digest}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"aa": 1.0}}, r"'aa' is not in .*; did you mean|known: a, b"),
        ({"weights": {"a": -1.0}}, r"weight=-1.0 of 'a' must be >= 0"),
        ({"weights": {"a": float("nan")}}, r"weight=nan"),
        ({"weights": {"a": 0.0, "b": 0.0}}, "every weight is 0"),
        ({"seq_len": 1}, "seq_len=1 must be at least 2"),
        ({"packing": "best-fit"}, "did you mean 'best_fit'"),
        ({"seed": -1}, "seed=-1 must be 0 or more"),
    ],
)
def test_a_wrong_setting_is_one_line(prepared, settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_plan(prepared, **settings)
    assert "\n" not in str(error.value)


def test_a_source_without_training_documents_is_refused_unless_its_weight_is_0(prepared):
    prepared.sources["a"][TRAIN].num_tokens = prepared.sources["a"][TRAIN].num_documents
    config = DataConfig(prepared="x", sources=(SourceWeight(name="a"),))
    with pytest.raises(DataError, match="'a' of 'x' has nothing to train on"):
        DataPlan(config, prepared)
