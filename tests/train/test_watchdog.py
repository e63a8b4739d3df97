"""A process that hangs is ended from inside, and says where it hung."""

import subprocess
import sys

import pytest

from llm_jax.train.phases import Phases
from llm_jax.train.watchdog import HUNG, Watchdog
from tests.run.tiny_runs import ROOT

HANG = """
import sys, time
from pathlib import Path
from llm_jax.train.phases import Phases
from llm_jax.train.watchdog import Watchdog

def a_link_that_never_answers():
    time.sleep(60)

phases, file = Phases(), Path(sys.argv[1])
tell = lambda told: file.with_suffix(".told").write_text(told)
with Watchdog(phases, file, seconds=1.0, slow_seconds=float(sys.argv[3]), tell=tell):
    phases.enter("eval")
    time.sleep(1.5)
    phases.enter(sys.argv[2])
    a_link_that_never_answers()
"""


@pytest.mark.parametrize(("phase", "slow"), [("step", 30), ("save", 2)])
def test_a_hang_leaves_stacks_a_line_and_a_status_of_its_own(tmp_path, phase, slow):
    words = [sys.executable, "-c", HANG, str(tmp_path / "hang-0.txt"), phase, str(slow)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == HUNG
    told = (tmp_path / "hang-0.told").read_text()
    assert told.startswith(f"no progress in phase '{phase}' for ")
    for stacks in ((tmp_path / "hang-0.txt").read_text(), done.stderr):
        assert told in stacks
        assert "a_link_that_never_answers" in stacks


def test_without_a_limit_and_after_the_run_nothing_is_watched(tmp_path):
    for seconds in (0, 60):
        with Watchdog(Phases(), tmp_path / "hang", seconds, 60, tell=print) as dog:
            pass
        assert not dog._thread.is_alive()
    assert not (tmp_path / "hang").exists()


def test_seconds_go_to_the_phase_they_were_spent_in(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 3.5, 7.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    phases = Phases()
    phases.enter("step")
    phases.enter("save")
    phases.enter("step")
    assert phases.totals() == {"init": 1.0, "step": 5.5, "save": 0.5}
