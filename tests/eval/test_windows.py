"""Which token is scored where: once, with enough context, in rows that keep documents apart."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.prepare import PrepareConfig, prepare
from llm_jax.data.sources import parse_source_spec
from llm_jax.errors import ConfigError
from llm_jax.eval.windows import (
    EvalConfig,
    RowPlan,
    corpus_from_split,
    corpus_from_texts,
    plan_windows,
    start_id,
)
from tests.tiny_text import CHINESE, ENGLISH, TOKENIZERS, byte_level, sentencepiece_bytes

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)  # text tokens of each document


def laid_out(lengths):
    """Ids that tell their own place: document d holds starts[d], starts[d] + 1, ..."""
    starts = np.concatenate([[0], np.cumsum(np.array(lengths) + 1)])
    return np.arange(starts[-1], dtype=np.int32), starts


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 12), st.data())
def test_every_text_token_is_scored_once_with_the_promised_context(lengths, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    ids, starts = laid_out(lengths)
    plan = RowPlan(ids, plan_windows(starts, seq_len, stride), seq_len)
    seen = np.zeros(len(ids), int)
    for rows in plan.batches(3):
        assert rows.tokens_BT.shape == (3, seq_len)
        for row, at in zip(*np.nonzero(rows.document_BT >= 0), strict=True):
            target, document = int(rows.targets_BT[row, at]), rows.document_BT[row, at]
            seen[target] += 1
            position = int(rows.positions_BT[row, at])
            window = rows.tokens_BT[row, at - position : at + 1]
            assert (window == np.arange(target - position - 1, target)).all(), "its own past"
            segment = rows.segments_BT[row, at - position : at + 1]
            assert (segment == segment[0]).all()
            assert segment[0] > 0
            assert starts[document] < target < starts[document + 1]
            before = target - starts[document]  # tokens there are, start token included
            assert position + 1 >= min(before, seq_len - stride + 1)
    text = np.ones(len(ids), int)
    text[starts[:-1]] = 0  # the start token is given, not predicted
    assert (seen == text).all()


def test_windows_of_one_document_by_hand():
    # start token and 10 text tokens: ten targets, at offsets 1 .. 10
    windows = plan_windows(np.array([0, 11]), seq_len=4, stride=3)
    assert windows.start.tolist() == [0, 3, 6]
    assert windows.length.tolist() == [4, 4, 4]
    assert windows.skip.tolist() == [0, 1, 1]  # 4 + 3 + 3 = 10 targets


def test_short_documents_share_rows():
    ids, starts = laid_out([3] * 40)
    plan = RowPlan(ids, plan_windows(starts, 12, 6), 12)
    assert plan.num_rows == 10  # four documents of three targets a row
    assert all((rows.segments_BT > 0).all() for rows in plan.batches(10))


@pytest.mark.parametrize("tokenizer", [sentencepiece_bytes(), byte_level()])
def test_texts_are_counted_in_tokens_bytes_and_characters(tokenizer):
    texts = ["abc", "山é", ENGLISH[0]]
    corpus = corpus_from_texts(texts, tokenizer, EvalConfig())
    assert corpus.bytes.tolist() == [3, 5, len(ENGLISH[0])]
    assert corpus.characters.tolist() == [3, 2, len(ENGLISH[0])]
    assert corpus.tokens.tolist() == [len(tokenizer.encode(text)) for text in texts]
    assert (corpus.ids[corpus.starts[:-1]] == start_id(tokenizer)).all()
    assert (
        tokenizer.eos_id not in corpus.ids[np.setdiff1d(np.arange(len(corpus.ids)), corpus.starts)]
    )


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_a_prepared_split_gives_what_its_texts_give(tmp_path, kind):
    tokenizer = TOKENIZERS[kind]()
    tokenizer.save(tmp_path / "tokenizer")
    lines = [json.dumps({"text": text}) for text in ENGLISH + CHINESE]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepared = prepare(
        PrepareConfig(
            sources=(parse_source_spec(str(tmp_path / "mixed.jsonl")),),
            tokenizer=str(tmp_path / "tokenizer"),
            output=str(tmp_path / "prepared"),
            holdout_fraction=0.5,
        )
    )
    split = prepared.sources["mixed"]["heldout"]
    assert split.num_documents >= 2
    texts = [tokenizer.decode(split.document(i).tolist()) for i in range(split.num_documents)]
    stored = corpus_from_split(split, tokenizer, EvalConfig())
    direct = corpus_from_texts(texts, tokenizer, EvalConfig())
    for one, other in zip(vars(stored).values(), vars(direct).values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_token_budget_cuts_between_characters_and_counts_what_is_left():
    tokenizer = sentencepiece_bytes()
    ids = tokenizer.encode("山水")  # six byte pieces
    assert len(ids) == 6
    for budget, characters in [(6, 2), (5, 1), (4, 1), (3, 1)]:
        corpus = corpus_from_texts(["山水"], tokenizer, EvalConfig(max_tokens=budget))
        assert corpus.characters.tolist() == [characters]
        assert corpus.bytes.tolist() == [3 * characters]
        assert corpus.tokens.tolist() == [3 * characters]
    assert not len(corpus_from_texts(["山水"], tokenizer, EvalConfig(max_tokens=2)).ids)


def test_a_limited_choice_of_documents_is_seeded_and_within_the_limits():
    tokenizer = sentencepiece_bytes()
    texts = [f"document number {number}" for number in range(50)]

    def chosen(**limits):
        corpus = corpus_from_texts(texts, tokenizer, EvalConfig(**limits))
        return [tokenizer.decode(p[1:].tolist()) for p in np.split(corpus.ids, corpus.starts[1:-1])]

    assert chosen() == texts
    assert len(chosen(max_documents=7)) == 7
    assert chosen(max_documents=7) == chosen(max_documents=7) != chosen(max_documents=7, seed=1)
    assert chosen(max_documents=7) != texts[:7], "not just the first ones"
    corpus = corpus_from_texts(texts, tokenizer, EvalConfig(max_tokens=100))
    assert corpus.tokens.sum() == 100


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"batch_size": 0}, "eval.batch_size=0"),
        ({"stride": -1}, "eval.stride=-1"),
        ({"seq_len": 4, "stride": 5}, "eval.stride=5 must be at most eval.seq_len=4"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings_, message):
    with pytest.raises(ConfigError, match=message):
        EvalConfig(**settings_)


def test_window_and_stride_come_from_the_model_unless_stated():
    resolved = EvalConfig().resolve(512, hard_limit=True)
    assert (resolved.seq_len, resolved.stride) == (512, 256)
    stated = EvalConfig(seq_len=1024, stride=100).resolve(512, hard_limit=False)
    assert (stated.seq_len, stated.stride) == (1024, 100)
    with pytest.raises(ConfigError, match=r"eval.seq_len=1024 .*max_seq_len=512"):
        EvalConfig(seq_len=1024).resolve(512, hard_limit=True)
    with pytest.raises(ConfigError, match="stride=600"):
        EvalConfig(stride=600).resolve(512, hard_limit=False)
