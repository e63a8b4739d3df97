"""`llm-jax demo` at tiny size: eleven real commands from raw text to a model that was carried to Chinese and tuned, and again."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from llm_jax import config as config_files
from llm_jax.errors import ConfigError
from llm_jax.eval.windows import EvalConfig
from llm_jax.run import cli, demo
from llm_jax.run.instruct import InstructConfig
from llm_jax.run.pretrain import PretrainConfig
from llm_jax.train import OptimizerConfig, TrainConfig
from tests.run.conftest import english_documents, write_jsonl

NEW = 200  # pieces put behind the vocabulary
STEPS, CARRIED, TUNED = 2, 8, 3


def tiny(root: Path) -> tuple[PretrainConfig, PretrainConfig, InstructConfig]:
    """The demo's three runs with a small model and few steps."""
    config = demo.demo_config(str(root / "data"), str(root / "run"))
    # the Chinese sample holds some 2,000 characters, each a piece of its own
    sizes = {"vocab_size": 2560, "embed_dim": 16, "num_layers": 1, "head_dim": 4, "mlp_dim": 16}
    config = replace(
        config,
        model=replace(config.model, **sizes, max_seq_len=64),
        data=replace(config.data, seq_len=64),
        optimizer=OptimizerConfig(warmup_steps=1),
        train=TrainConfig(steps=STEPS),
        eval=EvalConfig(max_tokens=500),
    )
    carried = demo.carry_config(config, str(root / "data-zh"), str(root / "run-zh"), CARRIED)
    carried = replace(
        carried,
        optimizer=replace(carried.optimizer, warmup_steps=1),
        stages=replace(carried.stages, new_rows_warmup_steps=1),
        forgetting=replace(carried.forgetting, max_increase=1.0),
    )
    tuned = demo.tune_config(carried, str(root / "data-talk"), str(root / "run-talk"), TUNED)
    return (
        config,
        carried,
        replace(
            tuned,
            optimizer=replace(tuned.optimizer, warmup_steps=1),
            samples=replace(tuned.samples, prompts=("a?",), max_new_tokens=4),
        ),
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[str]:
    text = write_jsonl(tmp_path_factory.mktemp("text") / "en.jsonl", english_documents(300))
    return [f"en={text}", "zh=sample:zh"]


def numbers(root: Path, run: str) -> dict:
    """What `eval` found, by source."""
    return json.loads((root / run / "eval.json").read_bytes())["results"]


@pytest.mark.slow
def test_the_demo_carries_its_model_to_chinese_compares_tunes_it_and_does_nothing_twice(
    sources, tmp_path, capsys
):
    root = tmp_path / "demo"
    demo.play(root, sources, *tiny(root), new_pieces=NEW)
    shown = capsys.readouterr().out
    typed = re.findall(r"^\$ llm-jax (\S+) (\S+)", shown, re.MULTILINE)
    assert [verb for verb, _ in typed] == [
        *("tokenizer", "data", "pretrain", "eval", "generate"),
        *("tokenizer", "data", "pretrain", "eval"),
        *("data", "instruct"),
    ]
    assert ("tokenizer", "extend") in typed
    assert f"--init-from {root / 'run'}" in shown
    assert f"--init-from {root / 'run-zh'}" in shown
    assert (
        f"a?|{(root / 'run-talk' / 'samples' / '0000003.txt').read_text().partition('|')[2]}"
        in shown
    )

    before, after = numbers(root, "run"), numbers(root, "run-zh")
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.strip()}
    for source in ("en", "zh"):
        pair = before[source], after[source]
        assert pair[0]["characters"] == pair[1]["characters"], "the same held-out documents"
        bits = [f"{score['bits_per_character']:.3f}" for score in pair]
        rates = [f"{score['characters'] / score['tokens']:.3f}" for score in pair]
        assert rows[source] == [*bits, *rates]
    assert before["en"]["tokens"] == after["en"]["tokens"]
    assert before["zh"]["tokens"] > 1.03 * after["zh"]["tokens"]

    # what is there stays; a stop between commands is made up for
    (root / "run-zh" / "eval.json").unlink()
    made = {path: path.stat().st_mtime_ns for path in root.rglob("*.npy")}
    demo.play(root, sources, *tiny(root), new_pieces=NEW)
    again = capsys.readouterr().out
    assert again.count("done before") == 5
    assert again.count("nothing to do") == 3
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.npy")} == made
    assert numbers(root, "run-zh") == after

    config, carried, tuned = tiny(root)
    other = replace(carried, train=replace(carried.train, steps=CARRIED + 1))
    with pytest.raises(ConfigError, match="holds a demo with other settings"):
        demo.play(root, sources, config, other, tuned, new_pieces=NEW)


def test_two_evaluations_of_the_same_text_are_put_side_by_side(tmp_path):
    for run, bits, tokens in (("old", 2.0, 50), ("new", 1.5, 40)):
        score = {"bits_per_character": bits, "characters": 100, "tokens": tokens}
        (tmp_path / run).mkdir()
        text = json.dumps({"results": {"en": score, "zh": {**score, "bits_per_character": 8.0}}})
        (tmp_path / run / "eval.json").write_text(text, encoding="utf-8")
    table = demo.comparison(tmp_path / "old", tmp_path / "new")
    shown = [list(column.cells) for column in table.columns]
    assert shown == [
        ["en", "zh"],
        ["2.000", "8.000"],
        ["1.500", "8.000"],
        ["2.000", "2.000"],
        ["2.500", "2.500"],
    ]


def test_a_command_whose_folder_is_there_is_not_repeated(tmp_path, capsys):
    stages = [
        demo.Stage("extend", "tokenizer", ["extend", "no such base"], str(tmp_path)),
        demo.Stage("look", "data", ["--help"]),
    ]
    assert demo.perform(stages, Console(), begin=0.0)
    shown = capsys.readouterr().out
    assert "$ llm-jax tokenizer extend 'no such base'\ndone before" in shown
    assert "usage: llm-jax data" in shown


def test_the_carried_run_is_the_page_for_chinese_in_short():
    config = demo.demo_config("data", "run")
    carried = demo.carry_config(config, "data-zh", "run-zh", demo.CARRY_STEPS)
    page = config_files.load(
        Path(__file__).parents[2] / "configs" / "continue_zh.py", PretrainConfig
    )
    assert carried.forgetting == page.forgetting
    assert carried.init_from == config.run
    assert 0 < carried.stages.new_rows_steps < carried.train.steps
    assert carried.model == page.model, "states nothing: the model is the base's"


def test_own_text_makes_the_five_commands_and_a_folder_of_something_else_is_refused(
    tmp_path, capsys
):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert cli.run(demo.main, ["--run", str(tmp_path)]) == 2
    assert "holds something else; choose another folder" in capsys.readouterr().err
    config = demo.demo_config("data", "run", ())
    stages = demo.stages(tmp_path, ["mine.txt"], config)
    assert [stage.verb for stage in stages] == ["tokenizer", "data", "pretrain", "eval", "generate"]
