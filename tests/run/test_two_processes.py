"""Two processes of four devices train as one process of eight: same rows, same losses, one checkpoint."""

import re
import signal
import time
from typing import NamedTuple

import pytest

from llm_jax.run.launch import HEARTBEAT_SECONDS
from llm_jax.train.watchdog import HUNG
from tests.run.tiny_runs import Process, Run, wait_for_step

pytestmark = pytest.mark.multidevice

STEPS = 40
SETTINGS = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2",
            "--train.steps", str(STEPS), "--checkpoint.save-every-steps", "1000")  # fmt: skip


class Stopped(NamedTuple):
    """A run of two processes, the second of which got SIGTERM."""

    run: Run
    processes: list[Process]
    statuses: list[int]


@pytest.fixture(scope="module")
def stopped(new_run) -> Stopped:
    run = new_run()
    processes = run.start_processes(*SETTINGS, devices=4)
    wait_for_step(processes[0], 2)
    (run.folder / "save").touch()
    wait_for_step(processes[0], 12)
    processes[1].send(signal.SIGTERM)
    return Stopped(run, processes, [process.wait_for_end() for process in processes])


@pytest.fixture(scope="module")
def alone(new_run) -> Run:
    """One process of eight devices, uninterrupted."""
    run = new_run()
    process = run.start(*SETTINGS, devices=8)
    assert process.wait_for_end() == 0, process.errors()
    return run


def assert_same_numbers(run: Run, alone: Run) -> None:
    """The same steps, target tokens, losses and held-out scores, as far as `run` went."""
    rows = run.metrics()
    for row, expected in zip(rows, alone.metrics()[: len(rows)], strict=True):
        assert row.keys() == expected.keys()
        for name in ("step", "target_tokens", "skipped"):
            assert row.get(name) == expected.get(name)
        for name in ("loss", "eval/bits_per_character"):
            if name in row:
                assert row[name] == pytest.approx(expected[name], rel=1e-5)


def test_sigterm_to_one_of_two_processes_saves_one_step_and_ends_both_with_0(stopped):
    assert stopped.statuses == [0, 0], stopped.processes[0].errors()
    assert stopped.run.newest() == stopped.processes[0].step() < STEPS


def test_a_save_on_demand_waits_for_a_step_that_both_agree_on(stopped):
    assert stopped.run.saved() == ["10", str(stopped.run.newest())]


def test_only_the_first_process_speaks_and_logs(stopped):
    assert not re.search(r"^(step|run|stopped|data) ", stopped.processes[1].output(), re.MULTILINE)
    assert [event["event"] for event in stopped.run.events()] == ["start", "stop"]
    assert not (stopped.run.folder / "run.lock").exists()


def test_two_processes_and_then_one_see_the_rows_and_losses_of_one(stopped, alone, tmp_path):
    assert_same_numbers(stopped.run, alone)
    run = stopped.run.copy(tmp_path)
    process = run.start(*SETTINGS, devices=8)
    assert process.wait_for_end() == 0, process.errors()
    assert len(run.metrics()) == len(alone.metrics()) > STEPS
    assert_same_numbers(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4, 2, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (2, 2, 1, 2)])
def test_four_processes_of_two_devices_have_the_losses_of_one_on_every_mesh(new_run, alone, sizes):
    run = new_run()
    axes = zip(("data", "fsdp", "tensor", "context"), sizes, strict=True)
    mesh = [word for axis, size in axes for word in (f"--mesh.{axis}", str(size))]
    processes = run.start_processes(*SETTINGS, *mesh, devices=2, apart=((),) * 4)
    assert [process.wait_for_end() for process in processes] == [0] * 4, processes[0].errors()
    assert len(run.metrics()) == len(alone.metrics())
    assert_same_numbers(run, alone)


@pytest.mark.slow
def test_two_processes_resume_and_ctrl_c_in_one_ends_both(stopped, alone, tmp_path):
    run = stopped.run.copy(tmp_path)
    processes = run.start_processes(*SETTINGS, devices=4)
    wait_for_step(processes[0], run.newest() + 2)
    processes[0].send(signal.SIGINT)
    assert [process.wait_for_end() for process in processes] == [0, 0], processes[0].errors()
    assert run.newest() == processes[0].step() > stopped.run.newest()
    assert_same_numbers(run, alone)


@pytest.mark.slow
def test_processes_with_different_settings_are_refused_before_anything_is_written(new_run):
    run = new_run()
    seeds = (("--data.seed", "0"), ("--data.seed", "1"))
    for process in run.start_processes(*SETTINGS, devices=4, apart=seeds):
        assert process.wait_for_end() == 2
        assert "process 1 has another config" in process.errors()
    assert not run.folder.exists()


@pytest.mark.slow
def test_when_one_process_is_killed_the_other_ends_and_the_run_goes_on_later(new_run, alone):
    run = new_run()
    often = (*SETTINGS, "--checkpoint.save-every-steps", "4")
    processes = run.start_processes(*often, devices=4)
    wait_for_step(processes[0], 10)
    processes[1].send(signal.SIGKILL)
    lost = time.monotonic()
    assert processes[1].wait_for_end() == -signal.SIGKILL
    assert processes[0].wait_for_end() != 0, "it must not wait for ever"
    # the heartbeat's limit and what it takes to notice it: a promise, not a speed
    assert time.monotonic() - lost < HEARTBEAT_SECONDS + 5
    process = run.start(*often, devices=8)
    assert process.wait_for_end() == 0, process.errors()
    assert [event["event"] for event in run.events()] == ["start", "resume", "end"]
    assert_same_numbers(run, alone)


@pytest.mark.slow
def test_when_one_process_hangs_the_other_ends_with_its_stacks_and_a_status_of_its_own(new_run):
    run = new_run()
    processes = run.start_processes(*SETTINGS, "--train.watchdog-seconds", "5", devices=4)
    try:
        wait_for_step(processes[0], 12)
        processes[1].send(signal.SIGSTOP)
        assert processes[0].wait_for_end() == HUNG, processes[0].errors()
    finally:
        processes[1].send(signal.SIGKILL)
        processes[1].wait_for_end()
    stacks = (run.folder / "hang-0.txt").read_text()
    assert stacks.startswith("no progress in phase 'step' for ")
    assert "loop.py" in stacks
    assert [event["event"] for event in run.events()] == ["start", "hang"]
