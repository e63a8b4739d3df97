"""Batches from Grain: the same bytes for any number of hosts and workers, and a clean end."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llm_jax.data.batch import Batch, check_batch
from llm_jax.data.loader import batches
from llm_jax.data.mixture import DataConfig, DataPlan, SourceWeight
from llm_jax.errors import ConfigError

BATCH = 8
TEXTS = {name: [f"{name} {i} " + "word " * (i % 11) for i in range(150)] for name in "ab"}


@pytest.fixture
def plan(make_prepared):
    prepared = make_prepared(TEXTS)
    sources = (SourceWeight(name="a", weight=0.7), SourceWeight(name="b", weight=0.3))
    return DataPlan(DataConfig(prepared=str(prepared.folder), seq_len=24, sources=sources))


def global_hash(plan, hosts, workers, start_step, steps=6, prefetch=2):
    """Hash of the global batches that `hosts` processes see together."""
    digest = hashlib.sha256()
    parts = np.split(np.arange(BATCH), hosts)
    loaders = [batches(plan, BATCH, rows, start_step, workers, prefetch) for rows in parts]
    try:
        for _ in range(steps):
            for field in map(
                np.concatenate, zip(*(next(loader) for loader in loaders), strict=True)
            ):
                digest.update(field.tobytes())
    finally:
        for loader in loaders:
            loader.close()
    return digest.hexdigest()


def direct_hash(plan, start_step, steps=6):
    digest = hashlib.sha256()
    for step in range(start_step, start_step + steps):
        for field in plan.rows(np.arange(step * BATCH, (step + 1) * BATCH)):
            digest.update(field.tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("start_step", [0, 1, 977])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_any_number_of_hosts_sees_the_rows_of_the_plan(plan, hosts, start_step):
    assert global_hash(plan, hosts, 0, start_step) == direct_hash(plan, start_step)
    assert global_hash(plan, hosts, 0, start_step, prefetch=0) == direct_hash(plan, start_step)


@pytest.mark.parametrize(
    ("hosts", "workers"), [(1, 1), (2, 2), pytest.param(4, 3, marks=pytest.mark.slow)]
)
def test_any_number_of_workers_sees_the_rows_of_the_plan(plan, hosts, workers):
    assert global_hash(plan, hosts, workers, 5) == direct_hash(plan, 5)


def test_rows_may_be_any_part_of_the_batch_in_any_order(plan):
    rows = np.array([6, 1, 3])
    with batches(plan, BATCH, rows, start_step=2) as loader:
        batch = next(loader)
    check_batch(batch, plan.vocab_size)
    for one, other in zip(batch, plan.rows(2 * BATCH + rows), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_leaves_no_process_thread_or_shared_memory(plan, workers):
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    loader = batches(plan, BATCH, np.arange(BATCH), workers=workers)
    batch = next(loader)
    kept = Batch(*(array.copy() for array in batch))
    loader.close()
    loader.close()
    assert not [p for p in multiprocessing.active_children() if "grain" in p.name]
    if os.path.isdir("/dev/shm"):
        deadline = time.monotonic() + 10  # Grain unlinks in a thread
        while (left := set(os.listdir("/dev/shm")) - before) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not {name for name in left if name.startswith("psm_")}
    for one, other in zip(batch, kept, strict=True):  # taken batches stay usable
        assert np.array_equal(one, other)
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


LOAD_FOREVER = """
import multiprocessing, sys, time
import numpy as np
from llm_jax.data.loader import batches
from llm_jax.data.mixture import DataConfig, DataPlan
if __name__ == "__main__":
    plan = DataPlan(DataConfig(prepared=sys.argv[1], seq_len=24))
    loader = batches(plan, 8, np.arange(8), workers=1)
    next(loader)
    print(*(p.pid for p in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_die_with_a_killed_parent(plan, tmp_path):
    program = tmp_path / "load.py"
    program.write_text(LOAD_FOREVER)
    command = [sys.executable, str(program), plan.config.prepared]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        workers = [int(word) for word in parent.stdout.readline().split()]
        assert workers
        assert all(map(alive, workers))
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def test_reading_and_planning_import_neither_jax_nor_grain():
    code = (
        "import sys, llm_jax.data.loader, llm_jax.data.prepare, llm_jax.data.mixture\n"
        "print({'jax', 'grain', 'tensorflow_datasets', 'flax'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "set()\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": np.array([8])}, r"rows=\[8\] must be indices below batch_size=8"),
        ({"rows": np.array([], dtype=int)}, r"rows=\[\]"),
        ({"start_step": -1}, "start_step=-1"),
        ({"workers": -1}, "workers=-1"),
        ({"workers": 2, "prefetch": 10**12}, "shared memory"),
    ],
)
def test_wrong_arguments_are_one_line(plan, arguments, message):
    if "shared" in message and not os.path.isdir("/dev/shm"):
        pytest.skip("this system has no /dev/shm")
    with pytest.raises(ConfigError, match=message):
        batches(plan, **({"batch_size": BATCH, "rows": np.arange(BATCH)} | arguments))
