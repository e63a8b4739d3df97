"""`llm-jax data`: the whole stage from the command line, and mistakes told in one line."""

import json

import pytest

from llm_jax import tokenizer as tokenizers
from llm_jax.data.shards import open_prepared
from llm_jax.run import cli, data
from llm_jax.tokenizer import TokenizerTrainConfig

TEXTS = [f"Line {i} says that {i} plus one is {i + 1}. 第{i}句。" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers.train(TokenizerTrainConfig(vocab_size=320, threads=2), TEXTS).save(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return str(path)


def llm_jax_data(capsys, *words):
    status = cli.run(data.main, list(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_prepare_then_inspect(capsys, tmp_path, tokenizer, text):
    output = str(tmp_path / "prepared")
    words = ("prepare", "--tokenizer", tokenizer, "--output", output, "--source", f"x={text}")
    status, out, _ = llm_jax_data(capsys, *words, "--holdout-fraction", "0.1")
    assert status == 0
    assert "chars/token" in out
    split = open_prepared(output).sources["x"]["train"]
    assert f"{split.num_tokens:,}" in out

    status, out, err = llm_jax_data(capsys, *words)
    assert status == 2
    assert err.count("\n") == 1
    assert "already exists; choose another output or pass --overwrite" in err
    assert llm_jax_data(capsys, *words, "--overwrite")[0] == 0

    status, out, _ = llm_jax_data(
        capsys, "inspect", output, "--verify", "--rows", "2", "--seq-len", "64"
    )
    assert status == 0
    assert "verified" in out
    assert "row 1 · x" in out
    assert "says that" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspct"], "did you mean 'inspect'"),
        (["prepare", "--tokeniser", "x"], "required|did you mean '--tokenizer'"),
        (["prepare", "--tokenizer", "T", "--output", "O"], "--source"),
        (
            ["prepare", "--tokenizer", "T", "--output", "O", "--source", "nowhere.txt"],
            "does not exist",
        ),
        (["prepare", "--tokenizer", "/no", "--output", "O", "--source", "X"], "no such file"),
        (
            ["prepare", "--tokenizer", "T", "--output", "O", "--source", "X", "--workers", "two"],
            "two",
        ),
        (
            [
                "prepare",
                "--tokenizer",
                "T",
                "--output",
                "O",
                "--source",
                "X",
                "--text-field",
                "txt",
            ],
            "60 of 60 records rejected, none is usable.*no field 'txt'",
        ),
        (["prepare", "--tokenizer", "T", "--output", "O", "--source", "sample:en"], "known: zh"),
        (["inspect", "O"], "holds no prepared data"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    capsys, tmp_path, tokenizer, text, words, message
):
    import re

    places = {"T": tokenizer, "O": str(tmp_path / "out"), "X": text}
    status, _, err = llm_jax_data(capsys, *(places.get(word, word) for word in words))
    assert status == 2
    assert err.count("\n") == 1
    assert re.search(message, err)
    assert not list(tmp_path.glob("out*"))
