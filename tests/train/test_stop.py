"""Requests to stop and to save, as one process receives them; several are in tests/run/test_two_processes.py."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from llm_jax.train.stop import StopRequest

STUCK = """
import os, signal, threading, time
from pathlib import Path
from llm_jax.train import stop

stop.SECONDS_TO_LEAVE = 0.2
threading.Thread(target=time.sleep, args=(600,)).start()  # a save that never ends
with stop.StopRequest(Path(".")):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
"""


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_request_stops_after_the_step_and_the_second_at_once(tmp_path, caplog, number):
    timers = threading.active_count()
    with StopRequest(tmp_path) as request:
        assert not request.should_stop(1)
        send(number)
        assert request.should_stop(2)
        assert "once more to stop at once" in caplog.text
        assert threading.active_count() == timers
        with pytest.raises(KeyboardInterrupt):
            send(number)
        for timer in threading.enumerate():
            if isinstance(timer, threading.Timer):
                timer.cancel()  # or it would end the tests


def test_what_is_stuck_on_the_way_out_does_not_keep_the_process(tmp_path):
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, timeout=120)
    assert done.returncode == 130


def test_a_signal_and_a_file_ask_for_one_save_each(tmp_path):
    with StopRequest(tmp_path) as request:
        assert not request.should_save(1)
        send(signal.SIGUSR1)
        assert [request.should_save(step) for step in (2, 3)] == [True, False]
        (tmp_path / "save").touch()
        assert [request.should_save(step) for step in (4, 5)] == [True, False]
        assert not (tmp_path / "save").exists()
        assert not request.should_stop(5)


def test_afterwards_signals_mean_what_they_meant_before(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest(tmp_path):
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
