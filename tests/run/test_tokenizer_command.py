"""`llm-jax tokenizer train` and `info`, from text files to folders and lines."""

import dataclasses
import json

import pytest

from llm_jax import tokenizer
from llm_jax.run import cli
from llm_jax.run import tokenizer as command
from tests.tokenizer.conftest import TEXTS


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"body": text}, ensure_ascii=False) + "\n" for text in TEXTS]
    file.write_text("".join(lines), encoding="utf-8")
    return file


def run(*words) -> int:
    return cli.run(command.main, [str(word) for word in words])


def train(corpus, folder, *words) -> int:
    coverage = () if "byte-bpe" in words else ("--character-coverage", 1.0)
    sizes = ("--vocab-size", 420, *coverage)
    return run(
        "train", "--input", corpus, "--text-field", "body", "--output", folder, *sizes, *words
    )


def test_train_writes_a_tokenizer_and_how_it_was_made(corpus, tmp_path, capsys):
    assert train(corpus, tmp_path / "t", "--special-tokens", '["<|user|>"]') == 0
    loaded = tokenizer.load(tmp_path / "t")
    assert loaded.vocab_size == 420
    assert loaded.id_of("<|user|>") == 4
    assert f"fingerprint   {loaded.fingerprint}" in capsys.readouterr().out
    record = json.loads((tmp_path / "t" / "training.json").read_text())
    assert record["fingerprint"] == loaded.fingerprint
    assert record["settings"]["special_tokens"] == ["<|user|>"]
    assert record["settings"]["threads"] == 8
    assert record["sources"][0]["records"] == len(TEXTS)
    assert record["sources"][0]["characters"] == sum(map(len, TEXTS))


def test_info_counts_text_and_round_trips(corpus, tmp_path, capsys):
    train(corpus, tmp_path / "t")
    capsys.readouterr()
    assert run("info", tmp_path / "t", "--text", corpus, "--text-field", "body") == 0
    out = capsys.readouterr().out
    characters, size = sum(map(len, TEXTS)), sum(len(text.encode()) for text in TEXTS)
    tokens = sum(len(tokenizer.load(tmp_path / "t").encode(text)) for text in TEXTS)
    assert "kind          SentencePiece bpe\n" in out
    assert "special ids   bos 1, eos 2, pad 3\n" in out
    assert f"corpus: {len(TEXTS)} documents, {characters:,} characters, {size:,} bytes\n" in out
    assert (
        f"tokens        {tokens:,}: {characters / tokens:.3f} characters, {size / tokens:.3f}"
        in out
    )
    assert f"round trip    {len(TEXTS)} of {len(TEXTS)} documents exact\n" in out


def test_info_names_the_first_document_that_does_not_come_back(corpus, tmp_path, capsys):
    train(corpus, tmp_path / "t", "--normalization", "nfkc")
    (tmp_path / "wide.jsonl").write_text(
        '{"text": "plain"}\n{"text": "ＡＢＣ"}\n', encoding="utf-8"
    )
    assert run("info", tmp_path / "t", "--text", tmp_path / "wide.jsonl") == 0
    assert (
        "round trip    1 of 2 documents exact; the first changed is wide.jsonl:2"
        in capsys.readouterr().out
    )


def test_an_existing_tokenizer_is_replaced_only_when_asked(corpus, tmp_path, capsys):
    train(corpus, tmp_path / "t")
    before = tokenizer.load(tmp_path / "t").fingerprint
    assert train(corpus, tmp_path / "t", "--kind", "unigram") == 2
    assert (
        "already holds tokenizer.model; choose another folder, or add --overwrite"
        in capsys.readouterr().err
    )
    assert tokenizer.load(tmp_path / "t").fingerprint == before
    assert train(corpus, tmp_path / "t", "--kind", "unigram", "--overwrite") == 0
    assert tokenizer.load(tmp_path / "t").kind == "SentencePiece unigram"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--kind", "bbpe"],
            "kind='bbpe' must be one of 'bpe', 'unigram', 'byte-bpe', 'wordpiece'; did you mean",
        ),
        (["--vocab-sise", "9"], "did you mean '--vocab-size'?"),
        (["--vocab-size", "5000"], "vocab_size=5000 is more than this text can fill"),
        (["--seed", "x"], "--seed='x' must be a number"),
        (["--split-digits", "maybe"], "split_digits='maybe' must be of type bool"),
        (["--text-field", "nothing"], "nothing"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(words, message, corpus, tmp_path, capsys):
    assert train(corpus, tmp_path / "t", *words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "t").exists()


def test_unknown_commands_and_help(capsys):
    assert run("inof") == 2
    assert "did you mean 'info'?" in capsys.readouterr().err
    assert run() == 0
    assert "llm-jax tokenizer train --input" in capsys.readouterr().out


def test_every_setting_has_an_option_with_help():
    fields = {field.name for field in dataclasses.fields(tokenizer.TokenizerTrainConfig)}
    assert set(command.SETTINGS) == fields


def test_inputs_may_be_given_together_or_one_by_one(corpus, tmp_path):
    assert train(corpus, tmp_path / "t", "--input", f"again={corpus}") == 0
    record = json.loads((tmp_path / "t" / "training.json").read_text())
    assert [entry["source"]["name"] for entry in record["sources"]] == ["corpus", "again"]


@pytest.mark.parametrize(("kind", "size"), [("byte-bpe", 420), ("wordpiece", 290)])
def test_other_kinds_are_trained_and_described(kind, size, corpus, tmp_path, capsys):
    assert train(corpus, tmp_path / "t", "--kind", kind, "--vocab-size", size) == 0
    names = ["tokenizer.json", "tokenizer_config.json", "training.json"]
    assert sorted(file.name for file in (tmp_path / "t").iterdir()) == names
    loaded = tokenizer.load(tmp_path / "t")
    assert loaded.vocab_size == size
    assert f"kind          {loaded.kind}" in capsys.readouterr().out
    assert train(corpus, tmp_path / "t", "--overwrite") == 2  # another kind is never replaced
    again = ("--kind", kind, "--vocab-size", size, "--overwrite")
    assert train(corpus, tmp_path / "t", *again) == 0
    assert tokenizer.load(tmp_path / "t").fingerprint == loaded.fingerprint
