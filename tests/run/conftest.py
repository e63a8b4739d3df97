"""Real prepared data of two languages, made once by the real commands, and a run of it without interruption."""

import json
import os
import random
from pathlib import Path

import pytest

from llm_jax.run import cli, data, tokenizer
from tests.run.tiny_runs import Run

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
    words = ["train", "--input", str(text), "--output", str(folder / "out"), "--vocab-size", "360"]
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
