"""Four formats become the same turns; what is no conversation is counted under its reason."""

import gzip
import json
from pathlib import Path

import pytest

from llm_jax.data.documents import Rejects
from llm_jax.data.records import Record
from llm_jax.data.sources import SourceConfig
from llm_jax.errors import DataError
from llm_jax.instruct.conversations import Turn, detect, read_conversations

TALK = (
    Turn("system", "Be brief."),
    Turn("user", "一加一？"),
    Turn("assistant", "二。"),
    Turn("user", "And two?"),
    Turn("assistant", "Three."),
)
SPOKEN = [("human", "一加一？"), ("gpt", "二。"), ("human", "And two?"), ("gpt", "Three.")]
PARTS = [{"type": "text", "text": "Three"}, {"type": "text", "text": "."}]
FORMATS = {
    "messages": {"messages": [{"role": t.role, "content": t.content} for t in TALK]},
    "messages, under another name": {
        "conversations": [{"role": t.role, "content": t.content} for t in TALK]
    },
    "messages, in parts": {
        "messages": [*({"role": t.role, "content": t.content} for t in TALK[:-1]), {"role": "assistant", "content": PARTS}]
    },
    "sharegpt": {
        "system": "Be brief.",
        "conversations": [{"from": role, "value": text} for role, text in SPOKEN],
    },
    "alpaca": {
        "system": "Be brief.",
        "instruction": "And two?",
        "input": "",
        "output": "Three.",
        "history": [["一加一？", "二。"]],
    },
    "prompt-completion": {
        "prompt": [{"role": t.role, "content": t.content} for t in TALK[:-1]],
        "completion": [{"role": "assistant", "content": "Three."}],
    },
}  # fmt: skip


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def read(path: Path | str, **settings) -> tuple[list, Rejects]:
    rejects = Rejects()
    source = SourceConfig(name="talk", path=str(path), **settings)
    return [talk.turns for talk in read_conversations(source, "auto", rejects)], rejects


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_told_by_its_fields_and_gives_the_same_turns(tmp_path, name):
    found, rejects = read(write(tmp_path / "a.jsonl", [FORMATS[name]]))
    assert found == [TALK]
    assert detect(Record(FORMATS[name], "a:1"), "talk") == name.partition(",")[0]
    assert (rejects.records, rejects.total) == (1, 0)


def test_alpacas_input_is_kept_apart_and_takes_the_place_of_a_missing_instruction(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "", "input": "1 + 2 = ?", "output": "3"},
    ]
    (first, second), _ = read(write(tmp_path / "a.jsonl", rows))
    assert first[0] == Turn("user", "Add.", "1 2")
    assert first[0].text == "Add.\n\n1 2"
    assert second[0] == Turn("user", "1 + 2 = ?")


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("prompt", "completion"),
        ("prompt", "response"),
        ("prompt", "answer"),
        ("question", "answer"),
    ],
)
def test_a_prompt_and_its_completion_may_be_strings(tmp_path, question, answer):
    found, _ = read(write(tmp_path / "a.jsonl", [{question: "Q", answer: "A"}]))
    assert found == [(Turn("user", "Q"), Turn("assistant", "A"))]


def test_gzip_and_parquet_hold_the_same_conversations(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [FORMATS["messages"]] * 2
    plain, _ = read(write(tmp_path / "a.jsonl", rows))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    assert read(tmp_path / "b.jsonl.gz")[0] == plain
    assert read(tmp_path / "c.parquet")[0] == plain


def test_a_tfds_dataset_holds_the_same_conversations(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class TinyTalks(tfds.core.GeneratorBasedBuilder):
        __module__ = "tiny_talks"  # without dots, see tests/data/test_record_files.py
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            turn = {"role": tfds.features.Text(), "content": tfds.features.Text()}
            messages = {"messages": tfds.features.Sequence(turn)}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(messages)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):  # pyright: ignore
            yield 0, FORMATS["messages"]

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # TFDS leaves a folder behind
    builder = TinyTalks(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    found, rejects = read(f"{builder.data_path}:train", format="tfds")
    assert found == [TALK]
    assert rejects.total == 0


def talk(*turns: tuple[str, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


Q, A = ("user", "Q"), ("assistant", "A")
BAD = {
    "empty conversation": talk(),
    "unknown role 'function'": talk(Q, ("function", "x"), A),
    "two assistant turns in a row": talk(Q, A, A),
    "two user turns in a row": talk(Q, Q, A),
    "no answer to the last user turn": talk(Q, A, Q),
    "does not begin with a user turn": talk(A, Q, A),
    "a system turn that is not the first": talk(Q, ("system", "S"), A),
    "empty answer": talk(Q, ("assistant", " \n")),
    "empty user turn": talk(("user", ""), A),
    "a turn whose content is not text": talk(Q, ("assistant", {"image": 1})),
    "a turn without 'role' and 'content'": {"messages": [{"role": "user"}]},
    "no list of messages": {"messages": "Q"},
    "a turn with tool calls": {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]},
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD)
def test_what_is_no_conversation_is_counted_under_its_reason(tmp_path, reason):
    path = write(tmp_path / "a.jsonl", [talk(Q, A), BAD[reason], talk(Q, A)])
    found, rejects = read(path)
    assert len(found) == 2
    assert rejects.records == 3
    assert rejects.counts == {reason: 1}
    assert rejects.samples[0].place == "a.jsonl:2"
    with pytest.raises(DataError, match="1 of 3 records rejected") as caught:
        rejects.check("talk", 0.001)
    assert "a.jsonl:2" in str(caught.value)


def test_lone_surrogates_are_replaced_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a\\ud800", "completion": "b"}\n')
    found, rejects = read(path)
    assert found[0][0].content == "a?"
    assert sum(rejects.repairs.values()) == 1


def test_a_source_that_says_no_conversation_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"cannot tell how a.jsonl:1 says a conversation.*'text'"):
        read(write(tmp_path / "a.jsonl", [{"text": "x"}]))
    (tmp_path / "b.txt").write_text("Q\nA\n")
    with pytest.raises(DataError, match="plain text, which has no fields"):
        read(tmp_path / "b.txt")
    with pytest.raises(DataError, match="holds texts, not records"):
        read("zh", format="sample")


def test_max_bytes_stops_a_source_of_records(tmp_path):
    row = {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "A"}]}
    size = len("user你好assistantA".encode())
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps(row) + "\n") * 5)
    for limit, count in ((0, 5), (1, 1), (size, 1), (size + 1, 2), (3 * size, 3)):
        source = SourceConfig(name="a", path=str(path), max_bytes=limit)
        assert len(list(read_conversations(source, "auto", Rejects()))) == count
