"""What a run survives: kill -9 in the middle of a save, and a disk that is full."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.checkpoint import restore_params
from llm_jax.errors import CheckpointError
from tests.checkpoint.tiny_run import META, Run, abstract, equal, make_state

ROOT = Path(__file__).parents[2]
TRAINER = """
import sys
from contextlib import ExitStack
from pathlib import Path
from tests.checkpoint.tiny_run import META, TOKENIZER, Run, abstract, equal, make_state

with ExitStack() as stack:
    run = Run(Path(sys.argv[1]), stack)
    store = run.open(keep_last=3)
    step = 0
    if store.steps():
        state, meta = store.restore(abstract(make_state(0)))
        step = meta["step"]
        assert equal(state, make_state(step))
    while True:
        step += 1
        store.save(step, make_state(step), META, TOKENIZER, {"loss": 1 / step})  # returns when step - 1 is saved
        print(step - 1, flush=True)
"""


def test_kill_nine_at_any_moment_leaves_the_newest_saved_step_restorable(tmp_path):
    moments = random.Random(0)
    folder, saved = tmp_path / "run", 0
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", TRAINER, str(folder)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as trainer:
            assert trainer.stdout is not None
            for _ in range(3):  # the third line: saving is under way
                saved = int(trainer.stdout.readline())
            time.sleep(moments.uniform(0, 0.25))
            os.kill(trainer.pid, signal.SIGKILL)
            saved = int(([saved, *trainer.stdout.read().split()])[-1])
    with ExitStack() as stack:
        state, meta = Run(folder, stack).open().restore(abstract(make_state(0)))
    assert meta["step"] >= saved >= 6
    assert equal(state, make_state(meta["step"]))
    assert all(
        name.isdecimal() for name in os.listdir(folder / "checkpoints")
    )  # no debris, nothing corrupt


def big_state(step: int) -> dict:
    """1.2 MB of parameters."""
    return {"params": {"w": jnp.full((300, 1000), step, jnp.float32)}}


def try_to_save(store, step: int) -> None:
    store.save(step, big_state(step), META, {"tokenizer.model": b"x"})
    store.wait()


def check_full_disk(run: Run, caplog, make_room) -> None:
    """Two failures are told and survived; with room again, saving goes on; three in a row stop the run."""
    store = run.open()
    for step in (2, 3):
        try_to_save(store, step)
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("llm_jax")]
    assert ["newest good checkpoint: 1." in message for message in messages] == [True, True]
    assert "Failure 2 in a row, number 3 stops the run." in messages[1]
    assert all("\n" not in message for message in messages)
    assert run.names() == ["1"]
    with make_room():
        try_to_save(store, 4)
        assert run.names() == ["1", "4"]
    try_to_save(store, 5)
    with pytest.raises(
        CheckpointError, match=r"the last checkpoint is missing: step 5 could not be saved"
    ):
        store.close()
    try_to_save(store, 6)
    with pytest.raises(CheckpointError, match="3 saves in a row failed"):
        try_to_save(store, 7)
    assert run.names() == ["1", "4"]
    params, _ = restore_params(run.checkpoints / "4", abstract(big_state(4)["params"]))
    assert np.array_equal(params["w"], big_state(4)["params"]["w"])


class FileSizeLimit:
    """The kernel refuses writes beyond 0.5 MB: like a full disk, in the middle of a file."""

    def __enter__(self) -> "FileSizeLimit":
        self.old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, self.old[1]))
        return self

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.old)

    def lifted(self) -> "LiftedLimit":
        return LiftedLimit(self)


class LiftedLimit:
    """Takes a `FileSizeLimit` away for a while."""

    def __init__(self, limit: FileSizeLimit) -> None:
        self.limit = limit

    def __enter__(self) -> None:
        self.limit.__exit__()

    def __exit__(self, *_: object) -> None:
        self.limit.__enter__()


def test_writes_that_fail_half_way_leave_nothing_and_training_goes_on(run, caplog):
    with run.open() as store:
        try_to_save(store, 1)
    with FileSizeLimit() as limit:
        check_full_disk(run, caplog, limit.lifted)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or not mount:
        pytest.skip("mounting a file system needs root")
    if subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("this machine does not let root mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_without_room_is_noticed_before_anything_is_written(small_disk, caplog):
    with ExitStack() as stack:
        run = Run(small_disk / "run", stack)
        with run.open() as store:
            try_to_save(store, 1)
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(2_000_000))

        @contextmanager
        def room():
            ballast.unlink()
            yield
            ballast.write_bytes(bytes(1_000_000))

        check_full_disk(run, caplog, room)
    assert "MB free on the disk" in caplog.text
