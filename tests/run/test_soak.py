"""The soak in short: two kills of one process, one of two, and the run is what it would have been."""

import subprocess
import sys

import pytest

from tests.run.tiny_runs import ROOT


@pytest.mark.slow
@pytest.mark.multidevice
def test_a_run_killed_again_and_again_is_in_the_end_the_run_left_alone():
    words = [sys.executable, "tools/soak.py", "--kills", "4", "--share-of-two", "0.25"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bitwise equal to the run left alone, no debris, no orphans") >= 2
    assert "4 kills survived" in done.stdout
