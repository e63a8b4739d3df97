"""Steps that cannot be trained on: back to the checkpoint before them, on without their batches, for good."""

import dataclasses
import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from llm_jax.checkpoint import read_meta
from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataPlan
from llm_jax.data.phases import Phase
from llm_jax.data.row_order import RowOrder
from llm_jax.data.weights import SourceWeight
from llm_jax.errors import TrainingError
from llm_jax.run.pretrain import PretrainConfig, pretrain
from llm_jax.train import StepConfig, TrainConfig
from tests.run.tiny_pretrain import config as tiny
from tests.run.tiny_runs import Run

STEPS = 48


def config(folder: Path, prepared: Path, **train: int) -> PretrainConfig:
    """Calls a step a spike when it is three deviations above the median: a few in a run."""
    settings = {"steps": STEPS, "log_every_steps": 1, "max_skipped_in_row": 1, "max_rollbacks": 50}
    return dataclasses.replace(
        tiny(),
        run=str(folder),
        data=dataclasses.replace(tiny().data, prepared=str(prepared)),
        step=StepConfig(batch_size=8, spike_window=8, spike_deviations=3.0),
        train=TrainConfig(**{**settings, **train}),
        checkpoint=CheckpointConfig(save_every_steps=4, keep_last=50, keep_best=0),
    )


def train(wanted: PretrainConfig) -> Run:
    pretrain(wanted, Console(file=io.StringIO()))
    return Run(Path(wanted.run), Path(wanted.data.prepared), Path(wanted.run))


@pytest.fixture(scope="module")
def gone_back(tmp_path_factory, two_sources) -> Run:
    return train(config(tmp_path_factory.mktemp("back") / "run", two_sources))


def backs(run: Run) -> list[dict]:
    return [event for event in run.events() if event["event"] == "rolled back"]


def test_a_run_goes_back_before_bad_steps_and_reaches_its_end_without_their_batches(gone_back):
    assert len(backs(gone_back)) >= 2
    for event in backs(gone_back):
        first, last = event["bad_steps"]
        assert event["step"] < first
        assert first == last
        assert event["step"] % 4 == 0
    record = read_meta(gone_back.folder / "checkpoints" / str(STEPS))
    assert record["rows"]["left_out"] == [event["left_out_rows"] for event in backs(gone_back)]
    assert all(name.isdecimal() for name in gone_back.saved()), "what was tried is not kept"
    rows = [row for row in gone_back.metrics() if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert not any(row["skipped"] for row in rows), "the bad steps are not part of the run"


def test_resumed_from_before_and_after_going_back_it_ends_bitwise_equal(
    gone_back, two_sources, tmp_path
):
    # as a kill leaves it: newer checkpoints were never made
    last = backs(gone_back)[-1]["step"]
    folder = tmp_path / "run"
    shutil.copytree(gone_back.folder, folder)
    for name in gone_back.saved():
        if not name.isdecimal() or int(name) > last:
            shutil.rmtree(folder / "checkpoints" / name)
    resumed = train(config(folder, two_sources))
    assert resumed.arrays(STEPS) == gone_back.arrays(STEPS)
    assert resumed.metrics() == gone_back.metrics()


@pytest.mark.slow
def test_it_goes_back_no_more_often_than_allowed(gone_back, two_sources, tmp_path):
    with pytest.raises(TrainingError, match=r"after train.max_rollbacks=1 times .*look at these"):
        train(config(tmp_path / "run", two_sources, max_rollbacks=1))


@pytest.mark.slow
def test_without_a_checkpoint_before_them_the_run_stops_and_says_so(two_sources, tmp_path):
    wanted = config(tmp_path / "run", two_sources)
    rare = dataclasses.replace(wanted.checkpoint, save_every_steps=1000)
    with pytest.raises(TrainingError, match="there is no checkpoint before them"):
        train(dataclasses.replace(wanted, checkpoint=rare))


@pytest.mark.slow
def test_the_first_steps_of_another_mixture_are_no_spikes_and_a_resumed_run_judges_alike(
    two_sources, tmp_path
):
    turn = 22  # not a step that is saved
    wanted = config(tmp_path / "run", two_sources, max_rollbacks=2)
    to_en = Phase(from_step=turn, sources=(SourceWeight(name="en"),))
    data = dataclasses.replace(wanted.data, phases=(to_en,))
    # judged by the steps of both languages, step 23 is a spike as often as it is done again
    straight = train(dataclasses.replace(wanted, data=data))
    assert not backs(straight)
    for number, step in enumerate((turn - 2, turn + 2)):  # as a kill leaves it
        run = straight.copy(tmp_path / str(number))
        for name in run.saved():
            if int(name) > step:
                shutil.rmtree(run.folder / "checkpoints" / name)
        train(dataclasses.replace(wanted, data=data, run=str(run.folder)))
        assert run.arrays(STEPS) == straight.arrays(STEPS), "the history of spikes is among them"
        assert run.metrics() == straight.metrics()


def test_a_phase_begins_at_its_step_whatever_was_left_out_before_it(two_sources):
    to_zh = Phase(from_step=6, sources=(SourceWeight(name="zh"),))
    data = dataclasses.replace(tiny().data, prepared=str(two_sources), phases=(to_zh,))
    straight = RowOrder(sizes=((0, 8),))
    order = straight.without(2, 3)
    plan = DataPlan(data, order=order, steps=STEPS)
    for step in range(12):
        sources = {plan.source_of(row) for row in order.rows(step).tolist()}
        assert sources == ({"zh"} if step >= 6 else {"en", "zh"})
    # and the rows before the decision are those that were seen
    before = DataPlan(data, order=straight, steps=STEPS)
    assert plan.digest_before(order.rows_before(2) - 16) == before.digest_before(16)


def test_what_is_shared_out_over_the_run_does_not_change_when_batches_are_left_out(two_sources):
    settings = {"rule": "unimax", "max_epochs": 2.0, "sources": ()}
    data = dataclasses.replace(tiny().data, prepared=str(two_sources), **settings)
    straight = RowOrder(sizes=((0, 8),))
    plans = [
        DataPlan(data, order=order, steps=STEPS) for order in (straight, straight.without(2, 9))
    ]
    assert plans[0].digest == plans[1].digest
