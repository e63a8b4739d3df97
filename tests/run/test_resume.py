"""Whatever interrupts a run, resumed it ends bit for bit as if nothing had happened."""

import dataclasses
import hashlib
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from llm_jax.data.loader import batches
from llm_jax.data.mixture import DataPlan
from llm_jax.run import cli, data, pretrain, verify
from llm_jax.tokenizer import TokenizerTrainConfig, train
from tests.run.conftest import english_documents, write_jsonl
from tests.run.tiny_pretrain import STEPS, config
from tests.run.tiny_runs import Process, Run, wait_for_step, wait_until


def assert_same_run(run: Run, straight: Run, debris: tuple[str, ...] = ()) -> None:
    """Parameters, optimizer state, every logged number and every file name are those of `straight`."""
    arrays = run.arrays(STEPS)
    assert any(name.startswith("opt_state/") for name in arrays)
    assert arrays == straight.arrays(STEPS)
    assert run.metrics() == straight.metrics()
    assert [row["step"] for row in run.metrics() if "loss" in row] == list(range(1, STEPS + 1))
    assert set(os.listdir(run.folder)) == set(os.listdir(straight.folder))
    assert set(run.saved()) == {*straight.saved(), *debris}
    assert cli.run(verify.main, [str(run.folder), "--quiet"]) == 0


def kill_and_resume(run: Run, kills: int, seed: int) -> None:
    """Kills -9 `kills` times, a few steps and a random moment after it began to step; then lets it end."""
    moments = random.Random(seed)
    for _ in range(kills):
        begun = run.newest()
        process = run.start()
        wait_for_step(process, begun + moments.randint(9, 12))  # from 8 on step 4 is saved
        time.sleep(moments.uniform(0, 0.1))
        process.send(signal.SIGKILL)
        assert process.wait_for_end() == -signal.SIGKILL
    process = run.start()
    assert process.wait_for_end() == 0, process.errors()


def test_killed_twice_and_resumed_a_run_ends_bitwise_equal(new_run, straight):
    run = new_run()
    kill_and_resume(run, kills=2, seed=0)
    assert_same_run(run, straight)
    assert [event["event"] for event in run.events()] == ["start", "resume", "resume", "end"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_five_random_moments_and_resumed_a_run_ends_bitwise_equal(
    new_run, straight, seed
):
    run = new_run()
    kill_and_resume(run, kills=5, seed=seed)
    assert_same_run(run, straight)


class Stopped(NamedTuple):
    """A run that was asked to save twice and then stopped by SIGTERM; it resumes from where it stands."""

    run: Run
    status: int
    last_step: int  # that the process did
    output: str


@pytest.fixture(scope="module")
def stopped(new_run) -> Stopped:
    run = new_run()
    # saved only when asked: each checkpoint answers one request
    process = run.start("--checkpoint.save-every-steps", "1000")
    wait_for_step(process, 3)
    (run.folder / "save").touch()
    wait_until(lambda: not (run.folder / "save").exists(), process)
    wait_for_step(process, process.step() + 2)
    process.send(signal.SIGUSR1)
    wait_for_step(process, process.step() + 2)
    process.send(signal.SIGTERM)
    return Stopped(run, process.wait_for_end(), process.step(), process.output())


def test_sigterm_saves_the_very_step_it_stopped_at_and_exits_with_0(stopped):
    run, status, step, output = stopped
    assert status == 0
    assert run.newest() == run.metrics()[-1]["step"] == step < STEPS
    assert [(event["event"], event["step"]) for event in run.events()] == [
        ("start", 0),
        ("stop", step),
    ]
    assert f"stopped at step {step} of {STEPS}" in output
    assert not (run.folder / "run.lock").exists()


def test_a_file_and_a_signal_each_ask_for_a_save_that_does_not_stop_the_run(stopped):
    by_file, by_signal, by_stop = sorted(map(int, stopped.run.saved()))
    assert 3 <= by_file < by_signal < by_stop


@pytest.fixture(scope="module")
def stopped_again(stopped, tmp_path_factory) -> Run:
    """Resumed, and stopped a few steps later by Ctrl-C."""
    run = stopped.run.copy(tmp_path_factory.mktemp("again"))
    process = run.start()
    wait_for_step(process, stopped.last_step + 6)
    process.send(signal.SIGINT)
    assert process.wait_for_end() == 0, process.errors()
    assert "once more to stop at once" in process.errors()
    assert run.newest() == process.step() < STEPS
    return run


class Resumed(NamedTuple):
    """A run that goes on until its end."""

    run: Run
    process: Process
    begun: int  # the newest checkpoint when it started


@pytest.fixture(scope="module")
def resumed(stopped, stopped_again, tmp_path_factory) -> Iterator[dict[str, Resumed]]:
    """Three copies that go on side by side, which takes less time than one after the other."""

    def go_on(run: Run, *words: str, devices: int = 1) -> Resumed:
        begun = run.newest()
        return Resumed(run, run.start(*words, devices=devices), begun)

    damaged = stopped_again.copy(tmp_path_factory.mktemp("damaged"))
    flip_a_byte_of_the_largest_file(damaged.folder / f"checkpoints/{damaged.newest()}/state")
    elsewhere = stopped.run.copy(tmp_path_factory.mktemp("elsewhere"))
    runs = {
        "as it was": go_on(stopped_again),
        "damaged": go_on(damaged),
        "four devices": go_on(elsewhere, "--mesh.data", "2", "--mesh.fsdp", "2", devices=4),
    }
    yield runs
    for _, process, _ in runs.values():  # of tests that were not selected
        process.wait_for_end()


def flip_a_byte_of_the_largest_file(folder: Path) -> None:
    """In the middle of it: in the values of an array."""
    path = max(folder.glob("ocdbt.process_*/d/*"), key=lambda path: path.stat().st_size)
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 0x10
    path.write_bytes(contents)


def test_stopped_by_sigterm_then_by_ctrl_c_a_run_ends_bitwise_equal(resumed, straight):
    run, process, _ = resumed["as it was"]
    assert process.wait_for_end() == 0, process.errors()
    assert_same_run(run, straight)


def test_a_flipped_byte_in_the_newest_checkpoint_is_named_and_the_one_before_used(
    resumed, straight
):
    run, process, newest = resumed["damaged"]
    assert process.wait_for_end() == 0, process.errors()
    (line,) = [line for line in process.errors().splitlines() if "corrupt" in line]
    told = rf"checkpoint {newest} is damaged and was stepped over: .*(params|opt_state)/"
    assert re.search(told, line)
    assert [e["step"] < newest for e in run.events() if e["event"] == "resume"][-1]
    assert_same_run(run, straight, debris=(f"{newest}.corrupt",))


def test_on_four_devices_instead_of_one_a_run_sees_the_same_rows(resumed, straight):
    run, process, begun = resumed["four devices"]
    assert process.wait_for_end() == 0, process.errors()
    for row, expected in zip(run.metrics(), straight.metrics(), strict=True):
        assert row["step"] == expected["step"]
        if "target_tokens" in row:
            assert row["target_tokens"] == expected["target_tokens"]
            # sums in another order; what that does to the parameters grows from step to step
            near = 1e-5 if row["step"] <= begun + 10 else 1e-3
            assert row["loss"] == pytest.approx(expected["loss"], rel=near)
    (changed,) = [event for event in run.events() if event["event"] == "config changed"]
    assert changed["step"] == begun
    assert changed["changes"]["mesh.data"] == [1, 2]


@pytest.mark.slow
def test_ctrl_c_reaches_reading_processes_too_and_changes_nothing(new_run, straight):
    run = new_run()
    process = run.start("--data.workers", "2")
    wait_for_step(process, 10)
    process.press_ctrl_c()
    assert process.wait_for_end() == 0, process.errors()
    assert "Traceback" not in process.errors()
    assert 10 <= run.newest() == process.step() < STEPS
    process = run.start("--data.workers", "1")
    assert process.wait_for_end() == 0, process.errors()
    assert_same_run(run, straight)


def test_a_second_writer_is_refused_and_a_second_ctrl_c_stops_at_once(new_run, capsys):
    run = new_run()
    # an evaluation of thousands of windows, to be interrupted in
    windows = ("--eval.stride", "1", "--eval.batch-size", "1", "--eval.max-documents", "0")
    process = run.start("--train.eval-every-steps", "1", *windows)
    wait_for_step(process, 1)
    assert cli.run(pretrain.main, run.words()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run.folder} is in use by process ")
    assert error.count("\n") == 1
    process.send(signal.SIGINT)
    wait_until(lambda: "once more to stop at once" in process.errors(), process)
    process.send(signal.SIGINT)
    assert process.wait_for_end() == 130
    assert process.errors().splitlines()[-1] == "stopped"
    assert "Traceback" not in process.errors()
    assert run.saved() == []
    assert not (run.folder / "run.lock").exists()


def test_rows_do_not_depend_on_how_many_processes_read_them(two_sources):
    plan = DataPlan(dataclasses.replace(config().data, prepared=str(two_sources)))
    hashes = {}
    for parts in (1, 2, 4, 8):
        for rows in np.array_split(np.arange(8), parts):
            with batches(plan, 8, rows, start_step=17) as feed:
                for step, batch in zip(range(17, 20), feed, strict=False):
                    for row, *arrays in zip(rows, *batch, strict=True):
                        content = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
                        assert hashes.setdefault((step, row), content) == content
    assert len(hashes) == len(set(hashes.values())) == 24


def with_other_tokenizer(run: Run, folder: Path) -> list[str]:
    """The same text in shards of another vocabulary."""
    train(TokenizerTrainConfig(vocab_size=330, threads=1), english_documents(80)).save(
        folder / "tokenizer"
    )
    return ["--data.prepared", prepare_english(folder, folder / "tokenizer")]


def with_other_data(run: Run, folder: Path) -> list[str]:
    """Other text in shards of the same tokenizer."""
    return ["--data.prepared", prepare_english(folder, run.folder / "tokenizer")]


def prepare_english(folder: Path, tokenizer: Path) -> str:
    text = write_jsonl(folder / "en.jsonl", english_documents(80, seed=1))
    words = ["--source", f"en={text}", "--source", f"zh={text}", "--tokenizer", str(tokenizer)]
    assert cli.run(data.main, ["prepare", *words, "--output", str(folder / "prepared")]) == 0
    return str(folder / "prepared")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--model.num-layers", "3"], "model.num_layers was 2 at step {step} and is 3 now"),
        (["--model.mlp-dim", "128"], "model.mlp_dim was 64"),
        (["--model.rope-theta", "5e5"], "model.rope_theta was 10000.0"),
        (["--step.batch-size", "16"], "step.batch_size was 8 at step {step} and is 16 now"),
        (["--data.seed", "1"], "the data changed since step {step} (data.seed 0 -> 1)"),
        (["--data.packing", "concat"], "(data.packing 'best_fit' -> 'concat')"),
        (["--data.sources.1.weight", "0.5"], "(data.sources "),
        (with_other_data, "the data changed since step {step} (data.prepared "),
        (with_other_tokenizer, "step {step} was trained with another tokenizer (fingerprint "),
    ],
)
def test_a_run_that_would_become_another_one_is_refused_and_left_alone(
    stopped, tmp_path, capsys, change, said
):
    run = stopped.run
    words = change if isinstance(change, list) else change(run, tmp_path)
    before = run.files()
    capsys.readouterr()
    assert cli.run(pretrain.main, run.words(*words)) == 2
    error = capsys.readouterr().err
    assert said.format(step=stopped.last_step) in error
    assert error.startswith(f"error: {run.folder}: ")
    assert error.count("\n") == 1
    assert run.files() == before
