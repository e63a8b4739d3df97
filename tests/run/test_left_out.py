"""A shard that is damaged while a run reads it: what is said, and the run that goes on without it."""

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from llm_jax import config as config_files
from llm_jax.checkpoint import read_meta
from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.page_checks import PAGE
from llm_jax.data.shards import TRAIN, open_prepared
from llm_jax.errors import CheckpointError, DataError
from llm_jax.run import cli, data
from llm_jax.run import eval as evaluate
from llm_jax.run import pretrain as command
from llm_jax.run.pretrain import PretrainConfig, pretrain
from llm_jax.train import TrainConfig
from tests.run.tiny_pretrain import config as tiny
from tests.run.tiny_runs import CONFIG, Run

STEPS = 24


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_tokenizer) -> Path:
    """The Chinese sample in six shards or so."""
    folder = tmp_path_factory.mktemp("shards") / "out"
    words = ["prepare", "--source", "zh=sample:zh", "--tokenizer", str(tiny_tokenizer)]
    words += ["--holdout-fraction", "0.03", "--shard-max-tokens", "20000", "--output", str(folder)]
    assert cli.run(data.main, words) == 0
    return folder


def damage(prepared: Path, folder: Path) -> tuple[Path, str]:
    """A copy with one flipped bit in a page of a shard in the middle; the name of the shard."""
    shutil.copytree(prepared, folder)
    shard = open_prepared(folder).sources["zh"][TRAIN].shards[2]
    path = folder / shard.tokens_file
    contents = bytearray(path.read_bytes())
    contents[2 * PAGE + 7] ^= 1
    path.write_bytes(contents)
    return folder, shard.name


def config(folder: Path, prepared: Path, **settings: int) -> PretrainConfig:
    return dataclasses.replace(
        tiny(),
        run=str(folder),
        data=dataclasses.replace(tiny().data, prepared=str(prepared), sources=(), **settings),
        train=TrainConfig(steps=STEPS, log_every_steps=1),
        checkpoint=CheckpointConfig(save_every_steps=2, keep_last=50, keep_best=0),
    )


def train(wanted: PretrainConfig) -> Run:
    pretrain(wanted, Console(file=io.StringIO()))
    return Run(Path(wanted.run), Path(wanted.data.prepared), Path(wanted.run))


def test_a_truncated_shard_is_refused_with_what_goes_on_without_it(prepared, tmp_path, capsys):
    broken, shard = damage(prepared, tmp_path / "data")
    path = broken / f"{shard}.tokens.npy"
    path.write_bytes(path.read_bytes()[:-100])
    words = [CONFIG, "--run", str(tmp_path / "run"), "--data.prepared", str(broken)]
    assert cli.run(command.main, [*words, "--data.sources", "[]"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path}: " in error
    assert " were written; put a good copy back, or prepare the data again, or go on" in error
    assert f'--data.leave-out \'[{{"shard": "{shard}", "from_step": 0}}]\'' in error
    assert not (tmp_path / "run").exists()


def test_the_only_shard_of_a_source_is_not_proposed_to_be_left_out(tmp_path, two_sources, capsys):
    shutil.copytree(two_sources, tmp_path / "data")
    (tmp_path / "data" / "zh" / "train-00000.tokens.npy").unlink()
    words = [CONFIG, "--run", str(tmp_path / "run"), "--data.prepared", str(tmp_path / "data")]
    assert cli.run(command.main, words) == 2
    error = capsys.readouterr().err
    assert "or begin a new run whose data.sources do not name 'zh'" in error
    assert "leave-out" not in error


def test_a_batch_that_lies_wholly_in_what_is_left_out_is_a_step_and_its_data_can_be_shown(
    prepared, tmp_path, capsys
):
    broken, shard = damage(prepared, tmp_path / "data")
    (broken / f"{shard}.tokens.npy").unlink()
    left_out = ["--data.leave-out", json.dumps([{"shard": shard}])]
    one_row = config_files.override(
        config(tmp_path / "run", broken),
        [*left_out, "--step.batch-size", "1", "--train.steps", "30", "--data.seq-len", "16"],
    )
    ended = train(one_row)
    assert ended.newest() == 30
    assert 0 in [row["target_tokens"] for row in ended.metrics() if "target_tokens" in row]
    shown = [str(broken), "--config", str(ended.folder / "config.json")]
    assert cli.run(data.main, ["inspect", *shown]) == 0
    assert (
        cli.run(evaluate.main, [str(ended.folder), "--data", str(broken), "--max-documents", "1"])
        == 0
    )


@pytest.mark.slow
def test_a_run_that_meets_a_flipped_bit_goes_on_without_the_shard_and_resumes_bitwise(
    prepared, tmp_path
):
    broken, shard = damage(prepared, tmp_path / "data")
    wanted = config(tmp_path / "run", broken, workers=1)  # where it comes out of another process
    with pytest.raises(DataError, match="are not what was written") as caught:
        train(wanted)
    told = str(caught.value)
    assert "\n" not in told
    assert f"{shard}.tokens.npy: bytes {2 * PAGE} to {3 * PAGE}" in told
    typed = re.search(r"--data\.leave-out '(.*)'", told)
    assert typed
    (left,) = json.loads(typed[1])
    stopped = Run(tmp_path / "run", broken, tmp_path)
    assert left == {"shard": shard, "from_step": stopped.newest()}
    wanted = config_files.override(wanted, ["--data.leave-out", typed[1]])
    ended = train(wanted)
    assert ended.newest() == STEPS
    (event,) = [event for event in ended.events() if event["event"] == "data phases"]
    assert event["left_out"][0]["shard"] == shard
    # as after a kill: the newer checkpoints were never made
    again = ended.copy(tmp_path / "again")
    for name in again.saved():
        if int(name) > left["from_step"] + 4:
            shutil.rmtree(again.folder / "checkpoints" / name)
    train(dataclasses.replace(wanted, run=str(again.folder)))
    assert again.arrays(STEPS) == ended.arrays(STEPS)
    assert again.metrics() == ended.metrics()
    record = read_meta(ended.folder / "checkpoints" / str(STEPS))
    assert record["config"]["data"]["leave_out"] == [left]
    # the rows that were seen cannot be changed afterwards
    earlier = json.dumps([{**left, "from_step": 0}]) if left["from_step"] else "[]"
    with pytest.raises(CheckpointError, match=rf"from_step {STEPS} in --data\.leave-out"):
        train(config_files.override(wanted, ["--data.leave-out", earlier, "--train.steps", "30"]))
