"""Pairs of answers: read, refused or left out, packed into pairs of rows, the same at any number."""

import json

import numpy as np
import pytest

from llm_jax.data.batch import check_batch
from llm_jax.errors import DataError
from llm_jax.instruct.preference import Pair, PairPlan, Rendered, plain, read_pairs
from tests.tiny_text import sentencepiece_bytes

PAIRS = [
    {"prompt": "2+2=", "chosen": "4", "rejected": "5, or so"},
    {"prompt": "天空？", "chosen": "蓝色", "rejected": "绿", "note": "other fields are fine"},
]


def write(path, *rows):
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_prompts_are_no_targets_and_answers_end_with_the_end_of_the_text(tmp_path):
    tokenizer = sentencepiece_bytes()
    pairs, left_out = read_pairs(write(tmp_path / "a.jsonl", *PAIRS), plain(tokenizer), 64)
    assert not left_out
    assert len(pairs) == 2
    for pair, row in zip(pairs, PAIRS, strict=True):
        for side, answer in zip(pair, (row["chosen"], row["rejected"]), strict=True):
            targets = [id for id, is_target in zip(*side, strict=True) if is_target]
            assert targets == [*tokenizer.encode(answer), tokenizer.eos_id]
            before = list(side.ids[: -len(targets)])
            assert before == [tokenizer.bos_id, *tokenizer.encode(row["prompt"])]


def test_pairs_that_teach_nothing_are_counted_by_reason(tmp_path):
    rows = [
        *PAIRS, {"prompt": "a", "chosen": "same", "rejected": "same"}, "",
        {"prompt": "a", "chosen": "b" * 200, "rejected": "c"},
    ]  # fmt: skip
    path = write(tmp_path / "a.jsonl", *rows)
    pairs, left_out = read_pairs(path, plain(sentencepiece_bytes()), 64)
    assert len(pairs) == 2
    assert left_out == {"same answers": 1, "longer than a row": 1}
    silent = lambda prompt, answer: Rendered([1, 2, 3], [True, False, False])  # noqa: E731
    with pytest.raises(DataError, match=r"no usable pair \(3 no target, 1 same answers\)"):
        read_pairs(path, silent, 64)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a.jsonl:3: not a JSON object"),
        ("[1]", "a.jsonl:3: needs the text 'prompt'"),
        ({"prompt": "a", "chosen": "b"}, "a.jsonl:3: needs the text 'rejected', beside prompt"),
        ({"prompt": "a", "chosen": 4, "rejected": "b"}, "a.jsonl:3: needs the text 'chosen'"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, line, message):
    with pytest.raises(DataError) as caught:
        read_pairs(write(tmp_path / "a.jsonl", *PAIRS, line), plain(sentencepiece_bytes()), 64)
    assert message in str(caught.value)


def test_a_file_that_is_absent_or_empty_is_refused(tmp_path):
    render = plain(sentencepiece_bytes())
    with pytest.raises(DataError, match="cannot be read"):
        read_pairs(tmp_path / "none.jsonl", render, 64)
    with pytest.raises(DataError, match=r"holds no usable pair \(it is empty\)"):
        read_pairs(write(tmp_path / "a.jsonl", ""), render, 64)


@pytest.fixture(scope="module")
def pairs():
    """40 pairs whose first id is their number."""
    rng = np.random.default_rng(0)

    def side(number):
        size = int(rng.integers(3, 20))
        return Rendered(
            [number, *rng.integers(100, 200, size)], [False, False] + [True] * (size - 1)
        )

    return [Pair(side(number), side(number)) for number in range(40)]


def segments_of(batch, row):
    """{segment: ids of its inputs}."""
    segments = batch.segments_BT[row]
    return {s: batch.tokens_BT[row, segments == s].tolist() for s in range(1, segments.max() + 1)}


def test_every_epoch_has_every_pair_once_with_both_sides_under_one_segment(pairs):
    plan = PairPlan(pairs, seq_len=32, seed=5)
    assert plan.num_rows < 60, "packed: 80 rows without"
    orders = []
    for epoch in range(2):
        batch = plan.rows(np.arange(plan.num_rows) + epoch * plan.num_rows)
        check_batch(batch, 200)
        seen = []
        for row in range(0, plan.num_rows, 2):
            better, worse = segments_of(batch, row), segments_of(batch, row + 1)
            assert better.keys() == worse.keys()
            for segment, ids in better.items():
                pair = pairs[ids[0]]
                assert ids == list(pair.chosen.ids[:-1])
                assert worse[segment] == list(pair.rejected.ids[:-1])
                at = batch.segments_BT[row] == segment
                assert batch.targets_BT[row, at].tolist() == list(pair.chosen.ids[1:])
                assert batch.loss_mask_BT[row, at].tolist() == list(pair.chosen.is_target[1:])
                assert batch.positions_BT[row, at].tolist() == list(range(at.sum()))
                seen.append(ids[0])
        assert sorted(seen) == list(range(40))
        orders.append(seen)
    assert orders[0] != orders[1]


def test_rows_depend_on_their_number_alone_and_the_digest_on_everything(pairs):
    plan = PairPlan(pairs, seq_len=32, seed=5)
    numbers = np.array([200, 7, 6, 33])
    together = plan.rows(numbers)
    for at, number in enumerate(numbers):
        alone = PairPlan(pairs, seq_len=32, seed=5).rows(np.array([number]))
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a[0], b[at])
    others = [PairPlan(pairs[1:], 32, 5), PairPlan(pairs, 33, 5), PairPlan(pairs, 32, 6)]
    assert len({plan.digest, *(other.digest for other in others)}) == 4
    assert plan.digest == PairPlan(list(pairs), 32, 5).digest


def test_a_reference_measured_once_over_the_packing_follows_its_rows(pairs):
    plan = PairPlan(pairs, seq_len=32, seed=5)
    every = plan.rows_of_packing(np.arange(plan.num_rows))
    reference = every.targets_BT.astype(np.float32)
    batch = plan.batch(np.arange(10) + 3 * plan.num_rows, reference)
    np.testing.assert_array_equal(batch.reference_BT, batch.rows.targets_BT)
    assert plan.batch(np.arange(2)).reference_BT is None
