"""`llm-jax instruct --method dpo` by the real commands: pairs prepared, learned, resumed, measured, refused."""

import json
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from llm_jax import config as config_files
from llm_jax.checkpoint import read_meta
from llm_jax.data.shards import open_prepared
from llm_jax.errors import CheckpointError
from llm_jax.run import cli, data, doctor, instruct, pretrain, replay
from llm_jax.run import eval as evaluate
from llm_jax.run.instruct import InstructConfig
from llm_jax.run.preference import find_reference
from llm_jax.run.pretrain import prepared_tokenizer
from tests.run.test_instruct import untuned as untuned
from tests.run.tiny_preference import STEPS
from tests.run.tiny_runs import Run, wait_for_step

CONFIG = str(Path(__file__).with_name("tiny_preference.py"))
ADAPTERS = ("--model.lora.rank", "4", "--optimizer.peak-lr", "0.1", "--preference.beta", "0.5")


def write_pairs(path: Path, count: int = 120) -> Path:
    """Better answers about rivers, worse ones about bread; every third as whole conversations."""
    rng = random.Random(4)
    rows = []
    for n in range(count):
        prompt = f"{n} {rng.choice(['old', 'white', 'silver'])}?"
        good = " ".join(rng.choices(["river", "mountain", "bridge"], k=rng.randint(1, 3)))
        bad = " ".join(rng.choices(["bread", "winter", "lamps"], k=rng.randint(1, 4)))
        row = {"prompt": prompt, "chosen": good, "rejected": bad}
        if n % 3 == 0:
            turn = lambda text, role="assistant": {"role": role, "content": text}  # noqa: E731
            row = {
                "chosen": [turn(prompt, "user"), turn(good)],
                "rejected": [turn(prompt, "user"), turn(bad)],
            }
        rows.append(row)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def prepare(tokenizer: Path, source: Path, output: Path, *words: str) -> list[str]:
    return [
        "conversations", "--format", "preference", "--tokenizer", str(tokenizer), "--source", f"talk={source}",
        "--output", str(output), "--template", "plain", "--seq-len", "64", "--holdout-fraction", "0.1", *words,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    file = write_pairs(folder / "pairs.jsonl")
    assert cli.run(data.main, prepare(tiny_tokenizer, file, folder / "out")) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def words(untuned, pairs):
    def make(folder: Path, *more: str) -> list[str]:
        where = ["--run", str(folder), "--data.prepared", str(pairs), "--init-from", str(untuned)]
        return [CONFIG, *where, *more]

    return make


@pytest.fixture(scope="module")
def page(untuned) -> tuple[str, ...]:
    return CONFIG, "--init-from", str(untuned)


@pytest.fixture(scope="module")
def run(tmp_path_factory, page, pairs, compiled) -> Run:
    """Everything is trained, compared with the parameters of the base."""
    run = Run(tmp_path_factory.mktemp("dpo") / "run", pairs, compiled, page, "instruct")
    process = run.start()
    assert process.wait_for_end() == 0, process.errors()
    return run


def learned(run: Run) -> None:
    first = next(row for row in run.metrics() if row["step"] == 1)
    held_out = [row for row in run.metrics() if "eval/loss" in row]
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-5), "it begins as its reference"
    assert [row["step"] for row in held_out] == [0, 4, STEPS]
    assert held_out[0]["eval/loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert held_out[-1]["eval/talk/loss"] < 0.6
    assert held_out[-1]["eval/preference_accuracy"] == 1
    assert held_out[-1]["eval/reward_margin"] > 0.3
    assert "eval/talk/bits_per_character" in held_out[-1]
    assert "bits_per_byte" not in first, "the loss is no prediction of text"


def test_held_out_pairs_are_won_after_a_few_steps_against_the_base(run, untuned):
    learned(run)
    assert read_meta(untuned)["arrays"].keys() <= run.arrays().keys()


def test_resumed_it_compares_with_the_same_base_and_ends_bitwise_equal(
    run, words, tmp_path, capsys
):
    again = run.copy(tmp_path)
    for step in (6, 8):
        shutil.rmtree(again.folder / "checkpoints" / str(step))
    process = again.start()
    assert process.wait_for_end() == 0, process.errors()
    assert again.arrays() == run.arrays()
    assert again.metrics() == run.metrics()
    assert cli.run(instruct.main, words(again.folder, "--method", "simpo")) == 2
    assert "method was 'dpo' at step 8 and is 'simpo' now" in capsys.readouterr().err


def test_doctor_knows_it_and_replay_compares_with_the_same_base(run, tmp_path, capsys):
    new = tmp_path / "run"
    for words in ([*run.words(), "--run", str(new)], run.words()):
        assert cli.run(doctor.main, words) == 0
        assert "all is well: 1 process(es)" in capsys.readouterr().out
    assert not new.exists()
    assert cli.run(replay.main, [str(run.folder), "--step", str(STEPS)]) == 0
    out, count = capsys.readouterr().out, len(run.arrays(STEPS))
    assert f"steps {STEPS - 1} to {STEPS} from checkpoint {STEPS - 2}, bit for bit" in out
    assert f"step {STEPS}: {count} of {count} arrays as saved" in out


@pytest.mark.slow
def test_killed_and_resumed_it_ends_bitwise_equal(run, page, pairs, compiled, tmp_path):
    killed = Run(tmp_path / "run", pairs, compiled, page, "instruct")
    process = killed.start()
    wait_for_step(process, 5)
    process.send(signal.SIGKILL)
    process.wait_for_end()
    assert 0 < killed.newest() < STEPS
    process = killed.start()
    assert process.wait_for_end() == 0, process.errors()
    assert killed.arrays() == run.arrays()


@pytest.mark.slow
def test_adapters_are_compared_with_what_lies_below_them(words, pairs, untuned, compiled, tmp_path):
    assert cli.run(instruct.main, words(tmp_path / "run", *ADAPTERS)) == 0
    adapted = Run(tmp_path / "run", pairs, compiled)
    learned(adapted)
    was, saved = read_meta(untuned)["arrays"], adapted.arrays()
    assert {name: saved[name] for name in was} == was
    # the reference is in the checkpoint: the base is not asked for again
    for step in (6, 8):
        shutil.rmtree(adapted.folder / "checkpoints" / str(step))
    assert cli.run(instruct.main, words(adapted.folder, *ADAPTERS, "--init-from", "gone")) == 0
    assert adapted.arrays() == saved


@pytest.mark.slow
def test_on_a_mesh_and_in_micro_batches_it_learns_the_same(run, page, pairs, compiled, tmp_path):
    spread = Run(tmp_path / "run", pairs, compiled, page, "instruct")
    mesh = ("--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    process = spread.start(*mesh, "--step.micro-batches", "2", devices=4)
    assert process.wait_for_end() == 0, process.errors()
    for ours, alone in zip(spread.metrics(), run.metrics(), strict=True):
        for name in alone:
            assert ours[name] == pytest.approx(alone[name], rel=2e-3, abs=2e-4), (
                ours["step"],
                name,
            )


@pytest.mark.slow
def test_simpo_wins_held_out_pairs_without_a_reference(words, pairs, compiled, tmp_path):
    assert cli.run(instruct.main, words(tmp_path / "run", "--method", "simpo")) == 0
    (*_, last) = [
        row for row in Run(tmp_path / "run", pairs, compiled).metrics() if "eval/loss" in row
    ]
    assert last["eval/preference_accuracy"] == 1


@pytest.mark.slow
def test_eval_scores_the_better_answers_as_training_does(run, pairs, tmp_path):
    out = tmp_path / "eval.json"
    assert cli.run(evaluate.main, [str(run.folder), "--data", str(pairs), "--out", str(out)]) == 0
    found = json.loads(out.read_text())["results"]["talk"]
    last = run.metrics()[-1]
    assert found["bits_per_character"] == pytest.approx(
        last["eval/talk/bits_per_character"], rel=1e-5
    )


def test_inspect_shows_both_answers(pairs, capsys):
    assert cli.run(data.main, ["inspect", str(pairs), "--rows", "1", "--seq-len", "64"]) == 0
    shown = capsys.readouterr().out
    assert "pairs" in shown
    assert "loss on last" in shown
    assert "  2 (" in shown, "the worse answer is a segment of its own"


# ---- what users get wrong -----------------------------------------------------------------------


def test_mistakes_in_the_config_are_one_line(words, two_sources, pairs, tmp_path, capsys):
    def refused(*more: str, verb=instruct.main) -> str:
        assert cli.run(verb, words(tmp_path / "run", *more)) == 2
        assert not (tmp_path / "run").exists()
        (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
        return line

    assert "method='dop' must be one of 'sft', 'dpo', 'simpo'; did you mean 'dpo'" in refused(
        "--method", "dop"
    )
    assert "set --method dpo or simpo" in refused("--method", "sft")
    assert "preference.* compares pairs" in refused("--method", "sft", "--preference.beta", "0.2")
    assert "belongs to method='simpo'" in refused("--preference.margin", "1")
    assert "step.z_loss=0.1 belongs to method='sft'" in refused("--step.z-loss", "0.1")
    assert "holds text, not conversations" in refused("--data.prepared", str(two_sources))
    assert "cannot cut the longest document" in refused("--data.seq-len", "16")
    assert "tune it first (--method sft)" in refused("--model.vocab-size", "512")
    assert "did you mean 'beta'" in refused("--preference.betta", "1")
    page = str(Path(__file__).with_name("tiny_continue.py"))
    where = ["--run", str(tmp_path / "run"), "--data.prepared", str(pairs)]
    assert cli.run(pretrain.main, [page, *where, "--init-from", words(tmp_path)[6]]) == 2
    assert "holds pairs of answers; llm-jax instruct --method dpo learns" in capsys.readouterr().err


def test_a_base_that_is_gone_is_refused_and_another_place_of_it_is_not(run, untuned, tmp_path):
    again = run.copy(tmp_path)
    shutil.rmtree(again.folder / "checkpoints" / "8")
    moved = untuned.rename(tmp_path / "moved")
    try:
        with pytest.raises(
            CheckpointError, match="compares with the model that the run began with"
        ):
            reference_of(again, str(run.folder))
        assert reference_of(again, str(moved)).folder == str(moved)
    finally:
        moved.rename(untuned)
    assert reference_of(again, str(run.folder)).folder == str(untuned)


def reference_of(run: Run, init_from: str):
    """What a run that goes on with this --init-from compares with."""
    where = ["--run", str(run.folder), "--data.prepared", str(run.prepared)]
    config = config_files.load(CONFIG, InstructConfig, [*where, "--init-from", init_from])
    prepared = open_prepared(run.prepared)
    begun = instruct.beginning(config, prepared, prepared_tokenizer(prepared))
    assert config.objective
    found = find_reference(config.objective, begun, config.stages, init_from, config.run)
    assert found
    return found


def test_mistakes_in_pairs_are_counted_or_one_line(tiny_tokenizer, tmp_path, capsys):
    good = [
        json.loads(line) for line in write_pairs(tmp_path / "g.jsonl", 6).read_text().splitlines()
    ]
    turn = lambda text, role="assistant": {"role": role, "content": text}  # noqa: E731
    bad = {
        "no 'rejected'": {"prompt": "a", "chosen": "b"},
        "chosen and rejected are the same": {"prompt": "a", "chosen": "b", "rejected": "b"},
        "no prompt beside chosen and rejected": {"chosen": "b", "rejected": "c"},
        "chosen and rejected differ before their last answer": {
            "chosen": [turn("x", "user"), turn("b")], "rejected": [turn("y", "user"), turn("c")]
        },
        "empty answer": {"prompt": "a", "chosen": "b", "rejected": " "},
        "unknown role 'wizard'": {"prompt": [turn("x", "wizard")], "chosen": "b", "rejected": "c"},
    }  # fmt: skip
    long = {"prompt": "a", "chosen": "bread " * 80, "rejected": "c"}
    file = tmp_path / "bad.jsonl"
    write = lambda rows: file.write_text("".join(json.dumps(row) + "\n" for row in rows))  # noqa: E731
    write([*good, *bad.values(), good[0], long])
    words = prepare(tiny_tokenizer, file, tmp_path / "out", "--max-reject-fraction", "0.9")
    assert cli.run(data.main, words) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())["sources"]["talk"]
    assert manifest["rejects"]["rejected"] == dict.fromkeys(bad, 1)
    assert (manifest["duplicates"], manifest["lengths"]["dropped"]) == (1, 1)
    assert "1 dropped, both answers are longer than seq_len" in capsys.readouterr().out

    def refused(*more: str, rows=good) -> str:
        write(rows)
        words = prepare(tiny_tokenizer, file, tmp_path / "none", *more)
        assert cli.run(data.main, words) == 2
        assert not (tmp_path / "none").exists()
        return capsys.readouterr().err

    assert "no 'rejected'" in refused(rows=[{"prompt": "a", "chosen": "b"}])
    assert "holds no records" in refused(rows=[])
    assert "none of 1 pairs fits within seq_len=64" in refused(rows=[long])
    assert "is a pair of answers, not a conversation" in refused("--format", "auto")
    assert "it must be 'last' with form='preference'" in refused("--loss", "all")
