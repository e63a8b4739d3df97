"""`llm-jax instruct` by the real commands: tuned, killed and resumed, measured, talked to, exported, refused."""

import dataclasses
import io
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llm_jax
from llm_jax import tokenizer as tokenizers
from llm_jax.checkpoint import read_meta, save_model
from llm_jax.checkpoint.hf_import import open_source, read_params
from llm_jax.config import to_dict
from llm_jax.data.shards import open_prepared
from llm_jax.run import chat, cli, data, doctor, eval, export, generate, instruct, replay
from tests.instruct import chat_cases
from tests.instruct.test_prepare_conversations import write_talks
from tests.run.tiny_instruct import STEPS
from tests.run.tiny_pretrain import config as pretrain_config
from tests.run.tiny_runs import Run, wait_for_step
from tests.tiny import drawn_params

CONFIG = str(Path(__file__).with_name("tiny_instruct.py"))
OLD = 384  # rows of the base's embedding; its tokenizer has 360 ids


@pytest.fixture(scope="session")
def untuned(tmp_path_factory, tiny_tokenizer) -> Path:
    """A model of drawn parameters as a folder of its own."""
    model = pretrain_config().model
    text = tokenizers.load(tiny_tokenizer)
    meta = {"config": {"model": to_dict(model)}, "tokenizer_fingerprint": text.fingerprint}
    folder = tmp_path_factory.mktemp("untuned") / "model"
    save_model(folder, drawn_params(model, seed=7), meta, text.files)
    return folder


@pytest.fixture(scope="session")
def talks(tmp_path_factory, tiny_tokenizer) -> Path:
    """Short conversations in Llama 3's template, three of whose tokens the tokenizer lacks."""
    folder = tmp_path_factory.mktemp("talks")
    short = [t for t in chat_cases.conversations(300, seed=8) if sum(len(x.text) for x in t) < 60]
    write_talks(folder / "talks.jsonl", short)
    words = ["conversations", "--source", f"talk={folder / 'talks.jsonl'}", "--seq-len", "64"]
    words += ["--tokenizer", str(tiny_tokenizer), "--output", str(folder / "out")]
    words += ["--template", "llama3", "--holdout-fraction", "0.1"]
    assert cli.run(data.main, words) == 0
    return folder / "out"


@pytest.fixture(scope="session")
def new_tuned(tmp_path_factory, untuned, talks, compiled):
    def make() -> Run:
        folder = tmp_path_factory.mktemp("tuned") / "run"
        page = (CONFIG, "--init-from", str(untuned))
        return Run(folder, talks, compiled, page, "instruct")

    return make


@pytest.fixture(scope="session")
def tuned(new_tuned) -> Run:
    """A run that nothing interrupted."""
    run = new_tuned()
    process = run.start()
    assert process.wait_for_end() == 0, process.errors()
    return run


def test_tuning_lowers_the_bits_per_character_of_held_out_answers(tuned):
    rows = [row for row in tuned.metrics() if "eval/bits_per_character" in row]
    assert [row["step"] for row in rows] == [0, 6, STEPS]
    bits = [row["eval/talk/bits_per_character"] for row in rows]
    assert bits[0] > bits[1] > bits[2]


def test_only_the_answers_count_as_targets(tuned, talks):
    from llm_jax.data.mixture import DataConfig, DataPlan

    plan = DataPlan(DataConfig(prepared=str(talks), seq_len=64, packing="whole"))
    for row in (row for row in tuned.metrics() if "target_tokens" in row):
        step = row["step"]
        batch = plan.rows(range((step - 1) * 8, step * 8))
        assert row["target_tokens"] == batch.loss_mask_BT.sum() < (batch.segments_BT > 0).sum()


def test_killed_and_resumed_a_tuning_run_ends_bitwise_equal(new_tuned, tuned):
    run = new_tuned()
    process = run.start()
    wait_for_step(process, 7)
    process.send(signal.SIGKILL)
    process.wait_for_end()
    assert 0 < run.newest() < STEPS
    process = run.start()
    assert process.wait_for_end() == 0, process.errors()
    assert [event["event"] for event in run.events() if event["event"] != "continuation"] == [
        "start", "resume", "end",
    ]  # fmt: skip
    assert run.arrays(STEPS) == tuned.arrays(STEPS)
    assert run.metrics() == tuned.metrics()


def test_eval_of_the_conversations_says_what_training_said(tuned, talks, tmp_path, capsys):
    words = [str(tuned.folder), "--data", str(talks), "--out", str(tmp_path / "eval.json")]
    assert cli.run(eval.main, words) == 0
    found = json.loads((tmp_path / "eval.json").read_text())["results"]["talk"]
    last = tuned.metrics()[-1]
    assert found["bits_per_character"] == pytest.approx(
        last["eval/talk/bits_per_character"], rel=1e-5
    )
    assert cli.run(eval.main, [*words, "--baselines"]) == 2
    assert "only answers are scored" in capsys.readouterr().err


def test_tasks_are_answered_scored_and_compared_with_another_model(
    tuned, untuned, tmp_path, capsys
):
    file = write_talks(tmp_path / "tasks.jsonl", chat_cases.conversations(5, seed=9))
    words = [str(tuned.folder), "--tasks", str(file), "--against", str(untuned)]
    words += ["--max-new-tokens", "4", "--out", str(tmp_path / "out.json")]
    assert cli.run(eval.main, words) == 0
    shown = capsys.readouterr().out
    assert "llama3" not in shown  # the saved template is the model's own
    assert "base" in shown
    assert "plain" in shown
    report = json.loads((tmp_path / "out.json").read_text("utf-8"))
    ours, theirs = report["models"]
    assert ours["bits_per_character"] < theirs["bits_per_character"]
    for counts in report["wins"].values():
        assert sum(counts.values()) == 5
    better = sum(
        a["nats"] / a["characters"] < b["nats"] / b["characters"]
        for a, b in zip(ours["tasks"], theirs["tasks"], strict=True)
    )
    assert report["wins"]["bits_per_character"]["wins"] == better
    total = sum(task["nats"] for task in ours["tasks"])
    characters = sum(task["characters"] for task in ours["tasks"])
    assert ours["bits_per_character"] == pytest.approx(total / np.log(2) / characters)
    page = (tmp_path / "out.md").read_text("utf-8")
    assert page.count("**model 1**") == 5


def test_the_saved_model_stops_at_the_end_of_a_turn_and_talks(tuned, monkeypatch, capsys):
    model = llm_jax.load(tuned.folder)
    assert model.tokenizer.piece_of(model.tokenizer.eos_id) == "<|eot_id|>"
    assert model.config.vocab_size == OLD, "three new ids fit into the padding of the base"
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("the river\n\n你好\n/reset\nthe river\n/exit\nno\n")
    )
    words = [str(tuned.folder), "--max-new-tokens", "6", "--temperature", "0"]
    assert cli.run(chat.main, words) == 0
    out = capsys.readouterr().out
    talk = chat.Talk(
        model, chat_of(model), llm_jax.generate.SamplingConfig(max_new_tokens=6, temperature=0)
    )
    first = "".join(talk.answer("the river"))
    second = "".join(talk.answer("你好"))
    assert out == f"{first}\n{second}\n{first}\n"
    assert [turn.role for turn in talk.turns[-2:]] == ["user", "assistant"]
    monkeypatch.setattr("sys.stdin", io.StringIO("/rest\n"))
    assert cli.run(chat.main, words) == 2
    assert "/rest: no such command" in capsys.readouterr().err


def chat_of(model):
    from llm_jax.run.eval_tasks import chat_of

    return chat_of(model)


def test_a_long_conversation_forgets_its_oldest_exchanges(tuned):
    from llm_jax.errors import ConfigError
    from llm_jax.generate import SamplingConfig
    from llm_jax.instruct.conversations import Turn

    model = llm_jax.load(tuned.folder)
    talk = chat.Talk(model, chat_of(model), SamplingConfig(max_new_tokens=4))
    talk.turns = [Turn("user", "the river"), Turn("assistant", "a river")] * 3
    talk.turns.append(Turn("user", "old"))
    assert len(talk.prompt()) <= model.config.max_seq_len - 4
    assert len(talk.turns) < 7
    assert talk.turns[-1].content == "old"
    talk.turns = [Turn("user", "the river " * 40)]
    with pytest.raises(ConfigError, match="lower either"):
        talk.prompt()


def test_an_export_has_the_template_and_one_eos_everywhere(tuned, tmp_path):
    out = tmp_path / "hf"
    assert cli.run(export.main, [str(tuned.folder), str(out), "--no-logits"]) == 0
    assert "{% generation %}" in (out / "chat_template.jinja").read_text()
    eos = llm_jax.load(tuned.folder).tokenizer.eos_id
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["eos_token_id"] == eos
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads((out / name).read_text())["eos_token"] == "<|eot_id|>"


def test_a_tuned_model_can_be_tuned_again_on_its_own_tokenizer(tuned, talks, tmp_path, capsys):
    file = write_talks(tmp_path / "t.jsonl", chat_cases.conversations(30, seed=12))
    tokenizer = tuned.folder / "tokenizer"
    words = ["conversations", "--source", f"t={file}", "--tokenizer", str(tokenizer)]
    words += ["--template", "base", "--seq-len", "64", "--output", str(tmp_path / "out")]
    assert cli.run(data.main, words) == 0
    out = capsys.readouterr().out
    assert "template base" in out
    assert tokenizers.load(tmp_path / "out" / "tokenizer").fingerprint == (
        tokenizers.load(tokenizer).fingerprint
    )


def test_inspect_shows_each_row_with_its_targets(talks, capsys):
    words = ["inspect", str(talks), "--rows", "1", "--seq-len", "64", "--packing", "whole"]
    assert cli.run(data.main, words) == 0
    out = capsys.readouterr().out
    assert "template llama3, loss on all, without the header" in out
    assert "<|start_header_id|>assistant<|end_header_id|>" in out
    assert "targets)" in out


ADAPTERS = ("--model.lora.rank", "2", "--step.neftune.alpha", "5", "--train.steps", "4")


def test_adapters_are_tuned_with_noise_saved_and_exported(untuned, talks, compiled, tmp_path):
    page = (CONFIG, "--init-from", str(untuned))
    run = Run(tmp_path / "run", talks, compiled, page, "instruct")
    process = run.start(*ADAPTERS, "--train.eval-every-steps", "0")
    assert process.wait_for_end() == 0, process.errors()
    was, saved = read_meta(untuned)["arrays"], run.arrays(4)
    frozen = {name for name in was if "layers" in name}
    assert {name: saved[name] for name in frozen} == {name: was[name] for name in frozen}
    assert len([n for n in saved if n.startswith("params/") and "_lora_" in n]) == 2 * 7
    before, after = (row for row in run.metrics() if "eval/bits_per_character" in row)
    assert after["eval/bits_per_character"] < before["eval/bits_per_character"]
    assert cli.run(export.main, [str(run.folder), str(tmp_path / "hf"), "--no-logits"]) == 0
    model = llm_jax.load(run.folder)
    merged = read_params(open_source(tmp_path / "hf"))["layers"]["attention"]["query"]
    np.testing.assert_array_equal(merged, model.merged().params["layers"]["attention"]["query"])
    assert "{% generation %}" in (tmp_path / "hf" / "chat_template.jinja").read_text()


# ---- what users get wrong -----------------------------------------------------------------------


def test_doctor_knows_a_tuning_run_and_replay_does_a_step_of_it_again(tuned, tmp_path, capsys):
    new = tmp_path / "run"
    for words in ([*tuned.words(), "--run", str(new)], tuned.words()):
        assert cli.run(doctor.main, words) == 0
        assert "all is well: 1 process(es)" in capsys.readouterr().out
    assert not new.exists()
    assert cli.run(replay.main, [str(tuned.folder), "--step", "6"]) == 0
    out, count = capsys.readouterr().out, len(tuned.arrays(6))
    assert "steps 5 to 6 from checkpoint 4, bit for bit" in out
    assert f"step 6: {count} of {count} arrays as saved" in out


@pytest.fixture
def refused(capsys, tmp_path, untuned, talks):
    """Runs `instruct` where it must refuse; the line it says."""

    def run(*words: object) -> str:
        start = ["--init-from", str(untuned), "--data.prepared", str(talks)]
        where = [*start, "--run", str(tmp_path / "run"), *map(str, words)]
        assert cli.run(instruct.main, [CONFIG, *where]) == 2
        assert not (tmp_path / "run").exists()
        lines = capsys.readouterr().err.splitlines()
        (line,) = [line for line in lines if line.startswith("error: ")]
        return line

    return run


def test_mistakes_in_the_config_are_one_line(refused, two_sources, tuned):
    assert "must name the model to tune" in refused("--init-from", "")
    assert "must be 'whole'" in refused("--data.packing", "best_fit")
    assert "holds text, not conversations" in refused("--data.prepared", two_sources)
    assert "prepare it again with --tokenizer" in refused("--init-from", tuned.folder)
    assert "cannot cut the longest document" in refused("--data.seq-len", "8")
    assert "must not exceed model.max_seq_len=64" in refused("--data.seq-len", "128")
    assert "contradicts the base" in refused("--model.num-layers", "3")
    assert "did you mean 'init_from'" in refused("--init-form", "x")


def test_mistakes_in_the_data_are_one_line_and_leave_nothing(capsys, tmp_path, tiny_tokenizer):
    good = write_talks(tmp_path / "good.jsonl", chat_cases.conversations(3))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "wizard", "content": "x"}]}\n')

    def run(source: Path, *words: str) -> str:
        common = ["conversations", "--tokenizer", str(tiny_tokenizer), "--source", f"t={source}"]
        assert cli.run(data.main, [*common, "--output", str(tmp_path / "out"), *words]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "did you mean 'chatml'" in run(good, "--template", "chatm")
    assert "came without a chat template" in run(good, "--template", "base")
    assert "unknown role 'wizard'" in run(bad)
    assert "invalid choice: 'alpca'" in run(good, "--format", "alpca")
    assert "does not exist" in run(tmp_path / "none.jsonl")


def test_mistakes_with_tasks_are_one_line(capsys, untuned, tmp_path):
    def run(*words: str) -> str:
        assert cli.run(eval.main, [str(untuned), *words]) == 2
        return capsys.readouterr().err

    assert "give one of --data" in run()
    assert "give --tasks FILE too" in run("--text", "x", "--against", "y")
    assert "no such file" in run("--tasks", str(tmp_path / "none.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n')
    assert "empty conversation" in run("--tasks", str(tmp_path / "bad.jsonl"))


def test_generate_continues_raw_text_with_a_tuned_model(tuned, capsys):
    words = [str(tuned.folder), "--prompt", "the", "--max-new-tokens", "2"]
    assert cli.run(generate.main, words) == 0
    assert capsys.readouterr().out.startswith("the")


def test_the_config_survives_json(tuned):
    from llm_jax import config as config_files
    from llm_jax.run.instruct import InstructConfig

    saved = config_files.load(tuned.folder / "config.json", InstructConfig)
    assert saved.model.vocab_size == OLD
    assert dataclasses.replace(saved, run="x").run == "x"


def test_as_a_tfds_dataset_conversations_keep_what_is_learned(talks, tmp_path):
    words = ["tfds", str(talks), "--name", "talks", "--data-dir", str(tmp_path)]
    assert cli.run(data.main, words) == 0
    import tensorflow_datasets as tfds

    (folder,) = (tmp_path / "talks").iterdir()
    builder: Any = tfds.builder_from_directory(folder)
    source = builder.as_data_source(split="talk_train")
    split = open_prepared(talks).sources["talk"]["train"]
    example = source[1]
    start, end = split.document_starts[1:3].tolist()
    np.testing.assert_array_equal(example["mask"], split.read_mask(start, end - start))
    assert len(example["tokens"]) == end - start
    assert 0 < np.count_nonzero(example["mask"]) < end - start
