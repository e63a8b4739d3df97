"""`pretrain --init-from`: from a base model to an extended one by the real commands, stopped, resumed, refused."""

import json
import shutil

import numpy as np
import pytest

import llm_jax
from llm_jax.checkpoint import read_meta
from llm_jax.run import cli, data, export, pretrain, tokenizer
from llm_jax.train.resize import INITS
from llm_jax.train.trainable import VOCAB_AXIS
from tests.run.conftest import CONTINUE, OLD, english_documents, write_base, write_jsonl
from tests.run.tiny_continue import ALONE, STEPS
from tests.run.tiny_runs import Run


@pytest.fixture(scope="session")
def continued(new_continued) -> Run:
    """A run that nothing interrupted."""
    run = new_continued()
    process = run.start()
    assert process.wait_for_end() == 0, process.errors()
    return run


def test_every_start_is_measured_for_both_languages_and_the_best_is_taken(continued):
    (event,) = [event for event in continued.events() if event["event"] == "continuation"]
    scores = event["bits_per_character"]
    assert list(scores) == ["base", *INITS]
    assert all(set(by_source) == {"en", "zh"} for by_source in scores.values())
    sums = {init: np.log(list(scores[init].values())).sum() for init in INITS}
    assert event["init"] == min(sums, key=sums.__getitem__)
    assert event["first_new_row"] == OLD
    first = continued.metrics()[0]
    assert first["step"] == 0
    for source in ("en", "zh"):
        assert first[f"eval/{source}/bits_per_character"] == scores[event["init"]][source]
    # the old language is scored in the same ids, by a model with some more rows
    assert scores["mean"]["en"] == pytest.approx(scores["base"]["en"], rel=0.05)


def test_the_first_stage_leaves_the_base_bit_for_bit_and_has_no_optimizer_state_for_it(
    continued, base
):
    before, after = llm_jax.load(base), llm_jax.load(continued.folder, step=ALONE)
    assert after.config.vocab_size == 512, "400 ids, padded to a multiple of 128"
    for name, array in after.params.items():
        if name in VOCAB_AXIS:
            rows, old = (
                np.moveaxis(np.asarray(a), VOCAB_AXIS[name], 0)
                for a in (array, before.params[name])
            )
            np.testing.assert_array_equal(rows[:OLD], old[:OLD])
    was, saved = read_meta(base)["arrays"], continued.arrays(ALONE)
    body = [name for name in was if not name.startswith(("params/embedding", "params/head"))]
    assert len(body) > 5
    assert {name: saved[name] for name in body} == {name: was[name] for name in body}
    moments = [facts["shape"] for name, facts in saved.items() if name.startswith("opt_state/")]
    new = 512 - OLD
    assert sorted(shape for shape in moments if shape) == sorted([[new, 32], [32, new]] * 2)
    # and the second stage moves everything
    last = continued.arrays(STEPS)
    assert all(last[name]["fingerprint"] != was[name]["fingerprint"] for name in body)
    assert sum(name.startswith("opt_state/") for name in last) > len(moments)


def test_a_run_resumed_before_or_at_the_stage_boundary_ends_bitwise_equal(
    continued, tmp_path_factory
):
    going = []
    for step in (ALONE - 2, ALONE):
        run = continued.copy(tmp_path_factory.mktemp(f"from{step}"))
        for name in run.saved():
            if int(name) > step:
                shutil.rmtree(run.folder / "checkpoints" / name)
        # the base is not needed any more: the run knows what it began with
        run.page = (CONTINUE, "--init-from", "moved away")
        going.append((run, run.start()))
    for run, process in going:
        assert process.wait_for_end() == 0, process.errors()
        assert run.arrays(STEPS) == continued.arrays(STEPS)
        assert run.metrics() == continued.metrics()


def test_the_continued_model_reads_and_writes_with_the_extended_vocabulary(continued):
    model = llm_jax.load(continued.folder)
    assert model.tokenizer.vocab_size == OLD + 40
    (score,) = model.score("这是一个故事。")
    assert score.tokens < 7 * 3
    assert np.isfinite(score.bits_per_character)


def test_the_guard_stops_with_a_checkpoint_exit_status_0_and_does_not_go_on_under_the_same_bound(
    new_continued, capsys
):
    run = new_continued()
    process = run.start("--forgetting.max-increase", "0", "--stages.new-rows-lr", "1")
    assert process.wait_for_end() == 0, process.errors()
    assert "step 4  forgetting guard: en is at " in process.output()
    assert "the same command goes on" not in process.output()
    assert run.newest() == 4
    events = {event["event"]: event for event in run.events()}
    assert events["forgetting"]["step"] == events["end"]["step"] == 4
    before = run.files()
    assert cli.run(pretrain.main, run.words("--forgetting.max-increase", "0")) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "at step 4 en is at " in error[0]
    assert "raise --forgetting.max-increase" in error[0]
    assert run.files() == before


REBALANCE = (
    # a learning rate at which everything is forgotten, and no bound
    *("--forgetting.action", "rebalance", "--forgetting.max-increase", "0"),
    *("--stages.new-rows-lr", "1", "--forgetting.max-share", "0.9", "--forgetting.factor", "1.5"),
)


@pytest.fixture(scope="module")
def rebalanced(new_continued) -> Run:
    run = new_continued()
    process = run.start(*REBALANCE)
    assert process.wait_for_end() == 0, process.errors()
    assert "the shares from here on are en 60.0%, zh 40.0%" in process.output()
    return run


def test_a_run_goes_on_with_more_of_what_it_forgot(rebalanced):
    assert rebalanced.newest() == 12
    (event, *_) = [event for event in rebalanced.events() if event["event"] == "forgetting"]
    assert event["step"] == 4
    assert event["then"] == "the shares from here on are en 60.0%, zh 40.0%"
    before, after = (read_meta(rebalanced.folder / f"checkpoints/{step}") for step in (2, 4))
    assert before["plan_digest"] != after["plan_digest"]
    assert after["guard"]["phases"][0]["from_step"] == 4
    assert after["config"]["data"]["phases"] == after["guard"]["phases"]
    assert after["mixture"][1]["weights"] == {"en": 0.6, "zh": 0.4}


@pytest.mark.parametrize(
    "step",
    [pytest.param(step, marks=pytest.mark.slow) for step in (2, 4, 6)],
)
def test_resumed_from_before_at_or_after_the_change_it_ends_bitwise_equal(
    rebalanced, tmp_path, step
):
    run = rebalanced.copy(tmp_path)
    expected = run.arrays(12)
    for path in (run.folder / "checkpoints").iterdir():
        if int(path.name) > step:
            path.rename(tmp_path / path.name)
    process = run.start(*REBALANCE)
    assert process.wait_for_end() == 0, process.errors()
    assert run.arrays(12) == expected
    assert run.metrics() == rebalanced.metrics()


def test_a_share_of_0_cannot_grow(capsys, new_continued):
    run = new_continued()
    words = ("--forgetting.action", "rebalance", "--data.sources.0.weight", "0")
    capsys.readouterr()
    assert cli.run(pretrain.main, run.words(*words)) == 2
    assert "multiplies the share of en, which is 0; give data.sources some of it" in (
        capsys.readouterr().err
    )
    assert not run.folder.exists()


@pytest.fixture
def refused(capsys, base, extended, tmp_path):
    """The one line that a command with these words says; nothing is written."""

    def run(*words: str) -> str:
        start = [CONTINUE, "--run", str(tmp_path / "run"), "--data.prepared", str(extended)]
        capsys.readouterr()
        assert cli.run(pretrain.main, [*start, "--init-from", str(base), *words]) == 2
        lines = capsys.readouterr().err.splitlines()
        (line,) = [line for line in lines if not line.startswith("INFO ")]
        assert not (tmp_path / "run").exists()
        return line

    return run


def test_a_config_that_contradicts_the_base_is_refused_by_the_field(refused, base):
    said = refused("--model.num-layers", "3")
    assert f"model.num_layers=3 contradicts the base {base}, which has 2; leave it out" in said
    assert "model.norm='layer' contradicts" in refused("--model.norm", "layer")
    assert "model.vocab_size=390 must be at least 400" in refused("--model.vocab-size", "390")
    assert "data.seq_len=65 must not exceed model.max_seq_len=64" in refused("--data.seq-len", "65")


def test_data_of_a_tokenizer_that_does_not_extend_the_bases_is_refused(refused, tmp_path):
    text = write_jsonl(tmp_path / "en.jsonl", english_documents(80, seed=5))
    words = [
        "train",
        "--input",
        str(text),
        "--output",
        str(tmp_path / "tok"),
        "--vocab-size",
        "365",
    ]
    assert cli.run(tokenizer.main, words) == 0
    words = ["prepare", "--source", f"en={text}", "--source", f"zh={text}"]
    words += ["--tokenizer", str(tmp_path / "tok"), "--output", str(tmp_path / "data")]
    assert cli.run(data.main, words) == 0
    said = refused("--data.prepared", str(tmp_path / "data"))
    assert "its tokenizer does not extend the base model's: id " in said


def test_a_base_whose_tokenizer_and_embedding_disagree_is_refused(
    refused, tmp_path, tiny_tokenizer
):
    small = write_base(tmp_path / "small", tiny_tokenizer, rows=352)
    said = refused("--init-from", str(small))
    assert "its tokenizer has 360 ids, but its embedding has 352 rows" in said


def test_a_first_stage_without_new_rows_and_a_guard_without_text_are_refused(refused, two_sources):
    said = refused("--data.prepared", str(two_sources))
    assert "stages.new_rows_steps=6, but there are no new rows to train" in said
    said = refused("--forgetting.sources", '["fr"]')
    assert "forgetting.sources: 'fr' has no held-out text" in said
    assert "compares with a base model; give --init-from" in refused(
        "--init-from=", "--model.embed-dim", "32"
    )
    assert "model.embed_dim is not stated" in refused("--init-from=")
    assert "nowhere does not exist" in refused("--init-from", "nowhere")


def test_a_run_that_began_at_random_does_not_become_a_continued_one(
    base, extended, tmp_path, tiny_tokenizer, capsys
):
    write_base(tmp_path / "run/checkpoints/4", tiny_tokenizer)
    words = [CONTINUE, "--init-from", str(base), "--data.prepared", str(extended)]
    assert cli.run(pretrain.main, [*words, "--run", str(tmp_path / "run")]) == 2
    assert "did not begin with init_from=" in capsys.readouterr().err


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_a_model_in_an_extended_vocabulary_is_the_same_in_transformers(continued, tmp_path):
    assert cli.run(export.main, [str(continued.folder), str(tmp_path / "out")]) == 0
    parts = json.loads((tmp_path / "out" / "parity.json").read_text("utf-8"))["parts"]
    assert parts["logits"]["status"] == "passed"
    assert parts["tokenizer"]["transformers"]["status"] == "passed"
    assert parts["tokenizer"]["ids"] == OLD + 40
