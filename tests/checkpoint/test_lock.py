"""One writer per run folder, whatever happened to the one before."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from llm_jax.checkpoint import RunLock
from llm_jax.checkpoint import lock as lock_module
from llm_jax.errors import CheckpointError

OWNER = """
import sys, time
from llm_jax.checkpoint.lock import RunLock
with RunLock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_and_told_who_is_there(tmp_path):
    with RunLock(tmp_path), pytest.raises(CheckpointError) as told, RunLock(tmp_path):
        pass
    message = str(told.value)
    assert f"in use by process {os.getpid()} on " in message
    assert "--take-over" in message
    assert "\n" not in message


def test_a_released_lock_is_free(tmp_path):
    for _ in range(2):
        with RunLock(tmp_path / "run") as lock:
            lock.check()
        assert list((tmp_path / "run").iterdir()) == []


def test_a_living_process_keeps_its_lock_and_a_killed_one_loses_it(tmp_path, caplog):
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"locked\n"
        with (
            pytest.raises(CheckpointError, match=f"in use by process {owner.pid}"),
            RunLock(tmp_path),
        ):
            pass
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    with RunLock(tmp_path) as lock:
        lock.check()
    assert "that process is dead" in caplog.text


def plant(folder, seconds_ago, **changes):
    """A lock as another owner would have left it."""
    (folder / "run.lock").write_text(
        json.dumps({**lock_module._myself(), "token": "other", **changes})
    )
    then = time.time() - seconds_ago
    os.utime(folder / "run.lock", (then, then))


def test_a_number_that_another_process_got_later_is_not_the_owner(tmp_path):
    plant(tmp_path, 0, started="1")
    with RunLock(tmp_path) as lock:
        lock.check()
    assert not (tmp_path / "run.lock").exists()


def test_the_owner_on_another_machine_is_judged_by_its_heartbeat(tmp_path):
    plant(tmp_path, 200, machine="another", host="tpu-7")
    with (
        pytest.raises(CheckpointError, match=r"on tpu-7 .*last sign of life 20. s ago"),
        RunLock(tmp_path),
    ):
        pass
    plant(tmp_path, 400, machine="another")
    with RunLock(tmp_path):
        pass


def test_a_half_written_lock_is_not_taken_over_while_it_is_fresh(tmp_path):
    (tmp_path / "run.lock").write_text('{"pid"')
    with pytest.raises(CheckpointError, match=r"in use by process \? on \?"), RunLock(tmp_path):
        pass


def test_taking_over_by_request_is_noticed_by_the_old_owner(tmp_path):
    with RunLock(tmp_path) as old:
        with RunLock(tmp_path, take_over=True) as new:
            with pytest.raises(CheckpointError, match="another one took it over"):
                old.check()
            old.release()
            new.check()  # the old owner must not remove the new one's lock
        assert not (tmp_path / "run.lock").exists()


def test_a_heartbeat_touches_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.01)
    with RunLock(tmp_path):
        os.utime(tmp_path / "run.lock", (1, 1))
        touched = False
        for _ in range(1000):
            if touched := (tmp_path / "run.lock").stat().st_mtime > 2:
                break
            time.sleep(0.01)
        assert touched


def test_a_run_folder_below_a_file_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="cannot be made a run folder"),
        RunLock(tmp_path / "file" / "run"),
    ):
        pass
