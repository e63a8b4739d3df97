"""Token shards of conversations: stored as encoded, whole in every row, cut only where an answer ends."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llm_jax.data.mixture import DataConfig, DataPlan
from llm_jax.data.prepare import PrepareConfig, position_of
from llm_jax.data.shards import ANSWER, MARK, open_prepared
from llm_jax.data.sources import SourceConfig
from llm_jax.errors import ConfigError, DataError
from llm_jax.instruct.conversations import Turn
from llm_jax.instruct.masks import ChatEncoder, chat_tokenizer
from llm_jax.instruct.prepare import ConversationsConfig, fit, opening_key, prepare_conversations
from llm_jax.instruct.templates import TEMPLATES
from tests.instruct import chat_cases

TALKS = chat_cases.conversations(120, seed=21)


def write_talks(path: Path, talks) -> Path:
    rows = [
        {"messages": [{"role": t.role, "content": t.content} for t in turns]} for turns in talks
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("talks")
    tokenizer = chat_cases.byte_level()
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    write_talks(folder / "talks.jsonl", TALKS)
    return folder


def settings(place: Path, output: Path, **more) -> ConversationsConfig:
    common = PrepareConfig(
        sources=(SourceConfig(name="talk", path=str(more.pop("path", place / "talks.jsonl"))),),
        tokenizer=str(place / "tokenizer"),
        output=str(output),
        holdout_fraction=more.pop("holdout", 0.1),
        workers=more.pop("workers", 0),
        shard_max_tokens=more.pop("shard_max_tokens", 1 << 27),
    )
    return ConversationsConfig(prepare=common, **{"seq_len": 1024, **more})


@pytest.fixture(scope="module")
def prepared(place):
    return prepare_conversations(settings(place, place / "out", shard_max_tokens=2000))


@pytest.fixture(scope="module")
def chat(place) -> ChatEncoder:
    template = TEMPLATES["chatml"]
    return ChatEncoder(chat_tokenizer(chat_cases.byte_level(), template), template)


def test_every_conversation_is_stored_with_its_mask_in_one_of_the_splits(prepared, chat):
    splits = prepared.sources["talk"]
    assert len(splits["train"].shards) > 1
    assert splits["heldout"].num_documents > 0
    stored = Counter()
    for split in splits.values():
        for index in range(split.num_documents):
            start, end = map(int, split.document_starts[index : index + 2])
            ids, mask = split.document(index), split.read_mask(start, end - start)
            sizes = split.document_bytes[index], split.document_characters[index]
            stored[ids.tobytes() + mask.tobytes(), *map(int, sizes)] += 1
    made = [chat.encode(turns) for turns in TALKS]
    assert stored == Counter(
        (m.tokens.tobytes() + m.mask.tobytes(), m.num_bytes, m.num_characters) for m in made
    )
    targets = sum(int((m.mask > 0).sum()) for m in made)
    assert sum(split.num_targets for split in splits.values()) == targets


def test_the_folder_says_how_it_was_made_and_carries_the_template(prepared):
    facts = prepared.manifest["conversations"]
    assert facts["template"] == "chatml"
    assert (facts["loss"], facts["header"], facts["seq_len"]) == ("all", False, 1024)
    assert prepared.manifest["sources"]["talk"]["lengths"]["whole"] == len(TALKS)
    template = (prepared.tokenizer_folder / "chat_template.jinja").read_text("utf-8")
    assert "{% generation %}" in template
    assert prepared.verify() > 0


def test_conversations_that_begin_with_one_question_are_held_out_together_or_not_at_all(
    place, chat, tmp_path
):
    talks = []
    for n in range(40):
        for asked in (f"What is {n}?", f"what is　{n} ？"):
            talks += [
                (Turn("user", asked), Turn("assistant", answer)) for answer in ("A number.", "数。")
            ]
        told = (Turn("system", "Be brief."), Turn("user", f"What is {n}?"))
        talks.append((*told, Turn("assistant", "One.")))
    path = write_talks(tmp_path / "talks.jsonl", talks)
    made = prepare_conversations(settings(place, tmp_path / "out", holdout=0.2, path=path))
    numbers = {}
    for name, split in made.sources["talk"].items():
        texts = [chat.tokenizer.decode(split.document(i)) for i in range(split.num_documents)]
        numbers[name] = Counter(re.findall(r"is\W(\d+)", " ".join(texts)))
        assert set(numbers[name].values()) == {5}
    assert not numbers["train"].keys() & numbers["heldout"].keys()
    assert 3 <= len(numbers["heldout"]) <= 14  # 8 expected


def test_one_question_alone_is_trained_on_or_refused(place, tmp_path):
    asked = (f"question {n}" for n in range(99))
    asked = next(a for a in asked if position_of(opening_key((Turn("user", a),))) < 0.2)
    talks = [(Turn("user", asked), Turn("assistant", f"answer {n}")) for n in range(3)]
    path = write_talks(tmp_path / "talks.jsonl", talks)
    made = prepare_conversations(settings(place, tmp_path / "out", holdout=0.0, path=path))
    assert made.sources["talk"]["train"].num_documents == 3
    with pytest.raises(DataError, match="every conversation is held out"):
        prepare_conversations(settings(place, tmp_path / "none", holdout=0.2, path=path))


def test_workers_change_nothing(place, prepared, tmp_path):
    again = prepare_conversations(
        settings(place, tmp_path / "out", workers=1, shard_max_tokens=2000)
    )
    assert again.digest == prepared.digest


def test_a_flipped_bit_of_a_mask_is_named(place, tmp_path):
    made = prepare_conversations(settings(place, tmp_path / "out"))
    file = tmp_path / "out" / made.sources["talk"]["train"].shards[0].mask_file
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000.mask.npy: content differs"):
        open_prepared(tmp_path / "out").verify()
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"mask.npy: \d+ bytes, but"):
        open_prepared(tmp_path / "out")


def test_rows_hold_whole_conversations_with_their_targets(prepared):
    longest = int(np.diff(prepared.sources["talk"]["train"].document_starts).max()) - 1
    config = DataConfig(prepared=str(prepared.folder), seq_len=longest, packing="whole")
    plan, split = DataPlan(config, prepared), prepared.sources["talk"]["train"]
    rows = plan.epoch_rows["talk"]
    assert rows < split.num_documents, "several a row"
    batch, seen = plan.rows(range(rows)), Counter()
    for row in range(rows):
        assert batch.loss_mask_BT[row].any()
        for segment in range(1, batch.segments_BT[row].max() + 1):
            here = batch.segments_BT[row] == segment
            assert batch.positions_BT[row][here].tolist() == list(range(int(here.sum())))
            ids = [*batch.tokens_BT[row][here], batch.targets_BT[row][here][-1]]
            seen[np.array(ids, np.int32).tobytes(), batch.loss_mask_BT[row][here].tobytes()] += 1
    expected = Counter()
    for index in range(split.num_documents):
        start, end = map(int, split.document_starts[index : index + 2])
        mask = (split.read_mask(start + 1, end - start - 1) > 0).astype(np.float32)
        expected[split.document(index).tobytes(), mask.tobytes()] += 1
    assert seen == expected


def test_a_row_shorter_than_a_conversation_is_refused(prepared):
    config = DataConfig(prepared=str(prepared.folder), seq_len=16, packing="whole")
    with pytest.raises(DataError, match="cannot cut the longest document"):
        DataPlan(config, prepared)


def test_too_long_a_conversation_ends_behind_the_last_answer_that_fits(chat):
    turns = [t for _ in range(3) for t in (Turn("user", "the river"), Turn("assistant", "大河。"))]
    made = chat.encode(turns)
    ends = (np.flatnonzero((made.mask[1:] == MARK) & (made.mask[:-1] == ANSWER)) + 2).tolist()
    assert len(ends) == 3
    whole, length = fit(made, len(made.tokens) - 1, chat.tokenizer)
    assert whole is made
    assert length == "whole"
    for limit in (ends[1], ends[1] + 3):
        cut, length = fit(made, limit - 1, chat.tokenizer)
        assert cut is not None
        assert (len(cut.tokens), length) == (ends[1], "shortened")
        assert (cut.num_characters, cut.num_bytes) == (6, 18)
    cut, length = fit(made, ends[0] - 3, chat.tokenizer)
    assert cut is not None
    assert (len(cut.tokens), length) == (ends[0] - 2, "truncated")
    assert cut.num_characters < 3
    first = int(np.flatnonzero(made.mask)[0])
    assert fit(made, first - 1, chat.tokenizer) == (None, "dropped")


def test_what_does_not_fit_is_counted_and_nothing_but_it_is_refused(place, tmp_path):
    made = prepare_conversations(settings(place, tmp_path / "out", seq_len=60))
    lengths = made.manifest["sources"]["talk"]["lengths"]
    assert sum(lengths.values()) == len(TALKS)
    assert all(lengths[key] for key in ("whole", "shortened", "truncated", "dropped"))
    stored = made.sources["talk"].values()
    assert sum(split.num_documents for split in stored) == len(TALKS) - lengths["dropped"]
    assert max(int(np.diff(split.document_starts).max()) for split in stored) <= 61
    with pytest.raises(DataError, match="no answer of 120 conversations begins within seq_len=2"):
        prepare_conversations(settings(place, tmp_path / "none", seq_len=2))
    assert not (tmp_path / "none").exists()


def test_settings_are_checked(place, tmp_path):
    for wrong, told in (
        ({"loss": "answers"}, "loss='answers'"),
        ({"form": "alpacca"}, "did you mean 'alpaca'"),
        ({"seq_len": 1}, "seq_len=1 must be at least 2"),
    ):
        with pytest.raises(ConfigError, match=told):
            settings(place, tmp_path / "out", **wrong)


def test_a_template_that_refuses_one_conversation_counts_it(place, tmp_path):
    talks = [*TALKS, (Turn("user", "\ue0f0"), Turn("assistant", "A"))]
    write_talks(tmp_path / "talks.jsonl", talks)
    config = settings(place, tmp_path / "out")
    sources = (SourceConfig(name="talk", path=str(tmp_path / "talks.jsonl")),)
    common = PrepareConfig(
        sources=sources, tokenizer=config.prepare.tokenizer, output=config.prepare.output,
        max_reject_fraction=0.1,
    )  # fmt: skip
    made = prepare_conversations(ConversationsConfig(prepare=common, seq_len=1024))
    assert made.manifest["sources"]["talk"]["rejects"]["rejected"] == {
        "the chat template refuses it": 1
    }
    rejects = (tmp_path / "out" / "rejects.jsonl").read_text("utf-8")
    assert "talks.jsonl:121" in rejects
    assert "private characters" in rejects
