"""A run that moves: other devices, other hosts, another batch size. The rows stay the plan's."""

import dataclasses
import hashlib
import io
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from llm_jax.checkpoint import read_meta
from llm_jax.data.loader import batches
from llm_jax.data.mixture import DataPlan
from llm_jax.data.phases import Phase
from llm_jax.data.row_order import RowOrder
from llm_jax.data.weights import SourceWeight
from llm_jax.errors import CheckpointError, ConfigError
from llm_jax.run.pretrain import PretrainConfig, pretrain
from llm_jax.train import StepConfig
from tests.run.tiny_pretrain import STEPS
from tests.run.tiny_pretrain import config as tiny
from tests.run.tiny_runs import Run, wait_for_step


def resized(straight: Run, folder: Path, size: int, **optimizer: str) -> tuple[Run, PretrainConfig]:
    """A copy of the run that has yet to do its last four steps, with batches of another size."""
    run = straight.copy(folder)
    shutil.rmtree(run.folder / "checkpoints" / str(STEPS))
    plain = tiny()
    return run, dataclasses.replace(
        plain,
        run=str(run.folder),
        data=dataclasses.replace(plain.data, prepared=str(run.prepared)),
        optimizer=dataclasses.replace(plain.optimizer, **optimizer),
        step=StepConfig(batch_size=size),
    )


@pytest.mark.parametrize(
    ("rule", "factor"), [("linear", 2.0), pytest.param("sqrt", 2**0.5, marks=pytest.mark.slow)]
)
def test_another_batch_size_goes_on_with_the_next_row_and_the_learning_rate_follows(
    straight, tmp_path, rule, factor
):
    run, wanted = resized(straight, tmp_path, 16, lr_with_batch=rule)
    pretrain(wanted, Console(file=io.StringIO()))
    record = read_meta(run.folder / "checkpoints" / str(STEPS))
    assert record["rows"] == {"sizes": [[0, 8], [STEPS - 4, 16]], "left_out": []}
    before = {row["step"]: row for row in straight.metrics() if "loss" in row}
    plan = DataPlan(wanted.data)
    for number, row in enumerate(
        r for r in run.metrics() if r.get("loss") and r["step"] > STEPS - 4
    ):
        expected = factor * before[row["step"]]["learning_rate"]
        assert row["learning_rate"] == pytest.approx(expected, rel=1e-6)
        first = (STEPS - 4) * 8 + number * 16
        assert row["target_tokens"] == plan.rows(np.arange(first, first + 16)).loss_mask_BT.sum()
    # the way back needs a rule as well
    with pytest.raises(CheckpointError, match=r"step\.batch_size was 16 at step 80 and is 8 now"):
        pretrain(
            dataclasses.replace(wanted, step=StepConfig(batch_size=8), optimizer=tiny().optimizer),
            Console(file=io.StringIO()),
        )


def test_without_a_rule_another_batch_size_is_refused_with_what_to_type(straight, tmp_path):
    _, wanted = resized(straight, tmp_path, 16)
    with pytest.raises(CheckpointError, match=r"say by --optimizer\.lr-with-batch linear"):
        pretrain(wanted, Console(file=io.StringIO()))


def test_a_rule_that_does_not_exist_is_told():
    from llm_jax import config as config_files

    words = ["--optimizer.lr-with-batch", "cubic"]
    with pytest.raises(ConfigError, match="lr_with_batch='cubic' must be one of"):
        config_files.override(tiny(), words)


def test_the_stream_of_tokens_is_the_same_from_any_step_through_a_change_of_batch_size(two_sources):
    plan = DataPlan(dataclasses.replace(tiny().data, prepared=str(two_sources)))
    order = RowOrder(sizes=((0, 4), (3, 8)), left_out=((8, 12),))
    stream = []
    for step, size in ((2, 4), (3, 8), (4, 8)):  # each as after a restart
        with batches(plan, size, np.arange(size), step, order=order) as feed:
            stream.append(next(feed).tokens_BT)
    expected = plan.rows(np.arange(12, 12 + 20)).tokens_BT
    np.testing.assert_array_equal(np.concatenate(stream), expected)


# from step 30 on, in the middle of a stretch on four devices
PHASE = Phase(from_step=30, sources=(SourceWeight(name="en", weight=0.2), SourceWeight(name="zh")))
PHASES = ("--data.phases", json.dumps([dataclasses.asdict(PHASE)]))
MESHES = {
    8: ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"),
    4: ("--mesh.data", "2", "--mesh.fsdp", "2"),
    2: ("--mesh.fsdp", "1", "--mesh.data", "2"),
}


def test_the_tokens_of_a_run_that_moves_hash_to_those_of_one_that_stays_through_a_phase(
    two_sources,
):
    data = dataclasses.replace(tiny().data, prepared=str(two_sources), phases=(PHASE,))
    order = RowOrder(sizes=((0, 8),))
    plan = DataPlan(data, order=order, steps=STEPS)
    stayed, moved = hashlib.sha256(), hashlib.sha256()
    for array in plan.rows(np.arange(40 * 8)):
        stayed.update(array.tobytes())
    read = []
    for first, readers in ((0, 8), (10, 4), (20, 2), (32, 8)):  # each as after a restart
        steps = {0: 10, 10: 10, 20: 12, 32: 8}[first]
        parts = []
        for rows in np.array_split(np.arange(8), readers):
            with batches(plan, 8, rows, first, prefetch=0, order=order) as feed:
                parts.append([next(feed) for _ in range(steps)])
        read += [
            [np.concatenate(arrays) for arrays in zip(*batch, strict=True)]
            for batch in zip(*parts, strict=True)
        ]
    for arrays in zip(*read, strict=True):
        moved.update(np.concatenate(arrays).tobytes())
    assert moved.hexdigest() == stayed.hexdigest()


@pytest.fixture(scope="module")
def stayed(new_run) -> Run:
    """One device from the first step to the last, through the change of phase."""
    run = new_run()
    process = run.start(*PHASES)
    assert process.wait_for_end() == 0, process.errors()
    return run


def assert_near(run: Run, stayed: Run) -> None:
    """The same rows; losses as near as sums in another order are, from the first step to the last."""
    steps, wanted = ([row for row in r.metrics() if "loss" in row] for r in (run, stayed))
    for row, expected in zip(steps, wanted, strict=True):
        assert row["step"] == expected["step"]
        assert row["target_tokens"] == expected["target_tokens"]
        # measured without the phase: at most 6e-7, no larger at the end than at the beginning
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    records = [read_meta(r.folder / "checkpoints" / str(STEPS)) for r in (run, stayed)]
    assert records[0]["rows"] == records[1]["rows"]
    assert records[0]["rows_digest"] == records[1]["rows_digest"]


@pytest.mark.slow
@pytest.mark.multidevice
def test_from_8_devices_to_4_to_2_to_8_a_run_is_one_that_stayed(new_run, stayed):
    run = new_run()
    for number, devices in enumerate((8, 4, 2)):
        process = run.start(*PHASES, *MESHES[devices], devices=devices)
        wait_for_step(process, 20 * (number + 1))
        process.send(signal.SIGTERM)
        assert process.wait_for_end() == 0, process.errors()
    process = run.start(*PHASES, *MESHES[8], devices=8)
    assert process.wait_for_end() == 0, process.errors()
    assert_near(run, stayed)


@pytest.mark.slow
@pytest.mark.multidevice
def test_from_two_hosts_to_one_to_two_a_run_is_one_that_stayed(new_run, stayed):
    run = new_run()
    for step, hosts in ((25, 2), (50, 1), (STEPS, 2)):
        processes = (
            run.start_processes(*PHASES, *MESHES[4], devices=2)
            if hosts == 2
            else [run.start(*PHASES, *MESHES[4], devices=4)]
        )
        if step < STEPS:
            wait_for_step(processes[0], step)
            processes[-1].send(signal.SIGTERM)
        for process in processes:
            assert process.wait_for_end() == 0, process.errors()
    assert_near(run, stayed)
