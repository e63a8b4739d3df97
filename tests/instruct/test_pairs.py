"""Pairs of answers: read in every form, stored as one document, two segments of a row that belong together."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_jax.data.batch import check_batch
from llm_jax.data.documents import Rejects
from llm_jax.data.mixture import DataConfig, DataPlan
from llm_jax.data.prepare import PrepareConfig
from llm_jax.data.shards import SECOND, is_target
from llm_jax.data.sources import SourceConfig
from llm_jax.errors import ConfigError, DataError
from llm_jax.eval.pairs import PairRows
from llm_jax.eval.windows import EvalConfig, corpus_from_split
from llm_jax.instruct.conversations import Turn
from llm_jax.instruct.masks import ChatEncoder, chat_tokenizer
from llm_jax.instruct.pairs import read_pairs
from llm_jax.instruct.prepare import ConversationsConfig, prepare_conversations
from llm_jax.instruct.templates import TEMPLATES
from tests.instruct import chat_cases


def said(role, text):
    return {"role": role, "content": text}


SYSTEM, ASKED = Turn("system", "Be brief."), Turn("user", "2+2=")
GOOD, BAD = Turn("assistant", "4"), Turn("assistant", "5, or so")
RECORDS = {
    "strings": {"prompt": "2+2=", "chosen": "4", "rejected": "5, or so", "score": 0.3},
    "a question": {"question": "2+2=", "chosen": "4", "rejected": "5, or so"},
    "an instruction": {"instruction": "2+2=", "input": "", "chosen": "4", "rejected": "5, or so"},
    "turns": {
        "prompt": [said("user", "2+2=")],
        "chosen": [said("assistant", "4")],
        "rejected": [said("assistant", "5, or so")],
    },
    "conversations": {
        "prompt": "2+2=",
        "chosen": [said("user", "2+2="), said("assistant", "4")],
        "rejected": [said("user", "2+2="), said("assistant", "5, or so")],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "2+2="}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5, or so"},
    },
}


def read(path):
    rejects = Rejects()
    return list(read_pairs(SourceConfig(name="p", path=str(path)), rejects)), rejects


@pytest.mark.parametrize("name", RECORDS)
def test_every_form_gives_the_same_pair_with_and_without_a_system_turn(tmp_path, name):
    rows = [RECORDS[name], {**RECORDS[name], "system": "Be brief."}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, rejects = read(path)
    assert not rejects.counts
    assert [pair[:2] for pair in pairs] == [
        ((ASKED, GOOD), (ASKED, BAD)),
        ((SYSTEM, ASKED, GOOD), (SYSTEM, ASKED, BAD)),
    ]


def test_parquet_gives_them_too(tmp_path):
    rows = [{**RECORDS["conversations"], "system": None}] * 2
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    pairs, _ = read(tmp_path / "a.parquet")
    assert [pair[:2] for pair in pairs] == [((ASKED, GOOD), (ASKED, BAD))] * 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    tokenizer = chat_cases.byte_level()
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    rows = []
    for number, turns in enumerate(chat_cases.conversations(60, seed=5)):
        *before, last = [said(turn.role, turn.content) for turn in turns]
        rejected = said("assistant", f"{last['content']} {number}")
        rows.append({"chosen": [*before, last], "rejected": [*before, rejected]})
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "pairs.jsonl").write_text("".join(lines), "utf-8")
    return folder


def settings(place, output, **more) -> ConversationsConfig:
    common = PrepareConfig(
        sources=(SourceConfig(name="talk", path=str(place / "pairs.jsonl")),),
        tokenizer=str(place / "tokenizer"), output=str(output), holdout_fraction=0.2, shard_max_tokens=4000,
    )  # fmt: skip
    return ConversationsConfig(prepare=common, form="preference", seq_len=1024, loss="last", **more)


@pytest.fixture(scope="module")
def prepared(place):
    return prepare_conversations(settings(place, place / "out"))


@pytest.fixture(scope="module")
def wanted(place):
    """Of every pair, ids and targets of both sides."""
    template = TEMPLATES["chatml"]
    chat = ChatEncoder(chat_tokenizer(chat_cases.byte_level(), template), template, "last")
    pairs, _ = read(place / "pairs.jsonl")
    return Counter(tuple(_sided(*chat.encode(side)[:2]) for side in pair[:2]) for pair in pairs)


def _sided(ids, mask):
    return np.asarray(ids, np.int32).tobytes(), is_target(np.asarray(mask)[1:]).tobytes()


def sides_of(batch) -> Counter:
    """Of every two segments of rows that belong together, the same."""
    found = Counter()
    for row in range(len(batch.tokens_BT)):
        sides = []
        for segment in range(1, batch.segments_BT[row].max() + 1):
            here = batch.segments_BT[row] == segment
            ids, positions = batch.tokens_BT[row][here], batch.positions_BT[row][here]
            assert positions.tolist() == list(range(len(ids)))
            mask = batch.loss_mask_BT[row][here] > 0
            if segment % 2:  # all ids of the better side are inputs, its last one predicts nothing
                assert not mask[-1]
                sides.append((ids.tobytes(), mask[:-1].tobytes()))
            else:
                ids = np.append(ids, batch.targets_BT[row][here][-1])
                sides.append((ids.tobytes(), mask.tobytes()))
        found.update(zip(sides[::2], sides[1::2], strict=True))
    return found


def test_every_epoch_and_the_held_out_rows_have_every_pair_once(prepared, wanted):
    plan = DataPlan(DataConfig(prepared=str(prepared.folder), seq_len=1024, packing="whole"))
    splits = prepared.sources["talk"]
    rows = plan.epoch_rows["talk"]
    assert rows < splits["train"].num_documents, "several a row"
    batch = plan.rows(range(rows))
    check_batch(batch, prepared.vocab_size)
    held_out = list(PairRows(splits["heldout"], 1024, EvalConfig()).batches(2))
    assert {len(part.tokens_BT) for part in held_out} == {2}
    found = sum((sides_of(part) for part in held_out), sides_of(batch))
    assert found == wanted
    assert sides_of(plan.rows(range(rows, 2 * rows))) == sides_of(batch)
    targets = sum(int(part.loss_mask_BT.sum()) for part in (batch, *held_out))
    assert targets == sum(split.num_targets for split in splits.values())
    with pytest.raises(
        DataError, match=r"held-out pair of \d+ tokens is longer than data.seq_len=16"
    ):
        PairRows(splits["heldout"], 16, EvalConfig())
    few = PairRows(splits["heldout"], 1024, EvalConfig(max_documents=3))
    assert sum((sides_of(part) for part in few.batches(2)), Counter()).total() == 3


def test_the_better_answers_are_what_eval_scores(prepared, place):
    split = prepared.sources["talk"]["heldout"]
    corpus = corpus_from_split(split, chat_cases.byte_level(), EvalConfig())
    assert len(corpus.bytes) == split.num_documents
    assert corpus.scored is not None
    at = 0
    for index in range(split.num_documents):
        start, end = split.document_starts[index : index + 2].tolist()
        mask = split.read_mask(start, end - start)
        (second,) = np.flatnonzero(mask == SECOND)
        size = int(corpus.starts[index + 1] - corpus.starts[index])
        assert size == second
        np.testing.assert_array_equal(corpus.ids[at : at + size], split.read(start, size))
        at += size


def test_of_pairs_only_the_last_answers_are_learned(place):
    with pytest.raises(ConfigError, match="it must be 'last' with form='preference'"):
        ConversationsConfig(prepare=settings(place, "x").prepare, form="preference")
