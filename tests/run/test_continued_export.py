"""What an imported base says for its export survives extension, continued training and resumption."""

import importlib
import json
from pathlib import Path

import pytest

from llm_jax.checkpoint import read_meta
from llm_jax.run import cli, data, export, pretrain, tokenizer
from tests.checkpoint import hf_folders
from tests.run.conftest import CONTINUE, english_documents, write_jsonl
from tests.tiny_text import sentencepiece_bytes

importing = importlib.import_module("llm_jax.run.import")  # `import` is no name in Python

# without a window it has the maths of Llama, which is what a guess from the config alone would say
pytestmark = pytest.mark.slow  # three commands for three short looks

MISTRAL = {**hf_folders.LLAMA, "model_type": "mistral", "num_hidden_layers": 1}
TEMPLATE = "{{ messages[0].content }}"


def command(main, *words: object) -> None:
    assert cli.run(main, [str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Path]:
    """(imported base, export of a run that began with it, its vocabulary extended by 40 pieces)."""
    root = tmp_path_factory.mktemp("mistral")
    hf_folders.write(root / "hf", MISTRAL)
    sentencepiece_bytes().save(root / "hf")
    (root / "hf/chat_template.jinja").write_text(TEMPLATE)
    (root / "hf/generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [2, 5]}')
    command(importing.main, root / "hf", root / "base", "--no-logits")
    command(
        tokenizer.main, "extend", root / "base/tokenizer", "--input", "zh=sample:zh",
        "--add-pieces", 40, "--output", root / "tokenizer",
    )  # fmt: skip
    text = write_jsonl(root / "en.jsonl", english_documents(60))
    command(
        data.main, "prepare", "--source", f"en={text}", "--source", "zh=sample:zh",
        "--tokenizer", root / "tokenizer", "--output", root / "data", "--holdout-fraction", 0,
    )  # fmt: skip
    words = [CONTINUE, "--init-from", root / "base", "--data.prepared", root / "data"]
    words += ["--run", root / "run", "--forgetting.sources", "[]", "--resize.init", "mean"]
    words += ["--stages.new-rows-steps", 0, "--optimizer.warmup-steps", 0]
    for steps in (2, 3):  # the second one resumes
        command(pretrain.main, *words, "--train.steps", steps)
    command(export.main, root / "run", root / "out", "--no-logits")
    return root / "base", root / "out"


def test_family_and_ways_of_generating_are_the_bases(exported):
    _, out = exported
    config, generation = (
        json.loads((out / name).read_text("utf-8"))
        for name in ("config.json", "generation_config.json")
    )
    assert config["model_type"] == "mistral"
    assert config["vocab_size"] == 330 + 40
    assert config["eos_token_id"] == generation["eos_token_id"] == [2, 5]
    assert generation["temperature"] == 0.6


def test_the_chat_template_is_the_bases(exported):
    _, out = exported
    assert (out / "chat_template.jinja").read_text("utf-8") == TEMPLATE


def test_every_checkpoint_says_it_so_that_a_run_can_go_on_from_a_run(exported):
    base, out = exported
    said = read_meta(base)
    for step in (2, 3):
        record = read_meta(out.parent / "run" / "checkpoints" / str(step))
        assert {name: record[name] for name in ("family", "hf")} == {
            name: said[name] for name in ("family", "hf")
        }
        assert "source" not in record, "its hashes are those of files that this is not"
