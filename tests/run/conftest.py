"""Real prepared data of two languages, made once by the real commands, and a run of it without interruption."""

import dataclasses
import json
import os
import random
from pathlib import Path

import pytest

from llm_jax import tokenizer as tokenizers
from llm_jax.checkpoint import save_model
from llm_jax.config import to_dict
from llm_jax.run import cli, data, tokenizer
from tests.run.tiny_pretrain import config as pretrain_config
from tests.run.tiny_runs import Run
from tests.tiny import drawn_params

CONTINUE = str(Path(__file__).with_name("tiny_continue.py"))
OLD = 360  # ids of the tokenizer of `base`, whose embedding has 384 rows
WORDS = [
    "the",
    "a",
    "old",
    "river",
    "mountain",
    "keeper",
    "walked",
    "slowly",
    "across",
    "every",
    "bridge",
    "while",
    "children",
    "counted",
    "seven",
    "white",
    "stones",
    "and",
    "wrote",
    "letters",
    "about",
    "weather",
    "bread",
    "winter",
    "lamps",
    "harbour",
    "ships",
    "measure",
    "memory",
    "garden",
    "question",
    "answer",
    "teacher",
    "silver",
    "window",
]


def english_documents(count: int, seed: int = 0) -> list[str]:
    """Sentences of random words, 5 to 60 a document."""
    rng = random.Random(seed)
    return [
        f"Note {i}. {' '.join(rng.choice(WORDS) for _ in range(rng.randint(5, 60)))}."
        for i in range(count)
    ]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """One document a line, under `text`."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> Path:
    """360 pieces learned from English, so that a Chinese character is three bytes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = write_jsonl(folder / "en.jsonl", english_documents(300))
    words = [
        "train",
        "--input",
        str(text),
        "--output",
        str(folder / "out"),
        "--vocab-size",
        str(OLD),
    ]
    assert cli.run(tokenizer.main, words) == 0
    return folder / "out"


@pytest.fixture(scope="session")
def two_sources(tmp_path_factory, tiny_tokenizer) -> Path:
    """English lines and the shipped Chinese sample as token shards, some of each held out."""
    folder = tmp_path_factory.mktemp("prepared")
    text = write_jsonl(folder / "en.jsonl", english_documents(300))
    words = ["prepare", "--source", f"en={text}", "--source", "zh=sample:zh"]
    words += ["--tokenizer", str(tiny_tokenizer), "--output", str(folder / "out")]
    assert cli.run(data.main, [*words, "--holdout-fraction", "0.03"]) == 0
    return folder / "out"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> Path:
    """Where the processes of these tests keep compiled programs, so that only the first one compiles."""
    base = tmp_path_factory.getbasetemp()
    # pytest-xdist gives every worker a folder of its own below one that they share
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"


@pytest.fixture(scope="session")
def new_run(tmp_path_factory, two_sources, compiled):
    """Makes a run folder that is not there yet, and the command that trains in it."""

    def make() -> Run:
        return Run(tmp_path_factory.mktemp("runs") / "run", two_sources, compiled)

    return make


@pytest.fixture(scope="session")
def straight(new_run) -> Run:
    """A run that nothing interrupted."""
    run = new_run()
    process = run.start()
    assert process.wait_for_end() == 0, process.errors()
    return run


def write_base(folder: Path, tokenizer_folder: Path, rows: int = 384) -> Path:
    """A model of the tiny size as a folder of its own, with this many rows of the vocabulary."""
    model = dataclasses.replace(pretrain_config().model, vocab_size=rows)
    text = tokenizers.load(tokenizer_folder)
    meta = {"config": {"model": to_dict(model)}, "tokenizer_fingerprint": text.fingerprint}
    params = drawn_params(pretrain_config().model, seed=7)
    cut = {"embedding": params["embedding"][:rows], "head": params["head"][:, :rows]}
    save_model(folder, {**params, **cut}, meta, text.files)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory, tiny_tokenizer) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "model", tiny_tokenizer)


@pytest.fixture(scope="session")
def extended(tmp_path_factory, tiny_tokenizer) -> Path:
    """The two sources in the ids of the base's tokenizer extended by 40 Chinese pieces."""
    folder = tmp_path_factory.mktemp("extended")
    words = ["extend", str(tiny_tokenizer), "--input", "zh=sample:zh", "--add-pieces", "40"]
    assert cli.run(tokenizer.main, [*words, "--output", str(folder / "tokenizer")]) == 0
    text = write_jsonl(folder / "en.jsonl", english_documents(300))
    words = ["prepare", "--source", f"en={text}", "--source", "zh=sample:zh"]
    words += ["--tokenizer", str(folder / "tokenizer"), "--output", str(folder / "data")]
    assert cli.run(data.main, [*words, "--holdout-fraction", "0.03"]) == 0
    return folder / "data"


@pytest.fixture(scope="session")
def new_continued(tmp_path_factory, base, extended, compiled):
    """Makes a run that begins with the base, and the command that trains it."""

    def make() -> Run:
        folder = tmp_path_factory.mktemp("continued") / "run"
        return Run(folder, extended, compiled, (CONTINUE, "--init-from", str(base)))

    return make
