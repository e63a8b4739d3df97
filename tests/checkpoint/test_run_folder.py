"""Which checkpoint MODEL means, and files that are written whole."""

import json

import pytest

from llm_jax.checkpoint import append_event, find_checkpoint, steps_in, write_json_atomic
from llm_jax.errors import CheckpointError


@pytest.fixture
def model(tmp_path):
    for name in ("100", "20", "3.corrupt", "007"):
        folder = tmp_path / "run" / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text("{}")
    (tmp_path / "run" / "checkpoints" / "300").mkdir()  # without a record: not a whole checkpoint
    return tmp_path / "run"


def test_only_whole_checkpoints_with_plain_numbers_count(model):
    assert steps_in(model / "checkpoints") == [20, 100]
    assert steps_in(model / "nowhere") == []


@pytest.mark.parametrize("path", [".", "checkpoints", "checkpoints/100"])
def test_a_run_its_checkpoints_and_a_checkpoint_all_name_the_newest(model, path):
    assert find_checkpoint(model / path) == model / "checkpoints" / "100"


def test_a_step_of_a_run_can_be_asked_for(model):
    assert find_checkpoint(model, step=20) == model / "checkpoints" / "20"
    with pytest.raises(CheckpointError, match="no checkpoint of step 30; it has 20, 100"):
        find_checkpoint(model, step=30)
    with pytest.raises(CheckpointError, match="a single checkpoint, it has no step 30"):
        find_checkpoint(model / "checkpoints" / "100", step=30)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("nothing", "does not exist"),
        ("empty", "holds no model"),
        ("fresh/checkpoints", "without a checkpoint yet"),
    ],
)
def test_a_folder_without_a_model_gets_one_line_that_says_what_to_give(tmp_path, made, message):
    if made != "nothing":
        (tmp_path / made).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=message) as told:
        find_checkpoint(tmp_path / made.split("/")[0])
    assert "\n" not in str(told.value)


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path):
    write_json_atomic(tmp_path / "env.json", {"host": "机器"})
    with pytest.raises(TypeError):
        write_json_atomic(tmp_path / "env.json", {"host": object()})
    assert json.loads((tmp_path / "env.json").read_text(encoding="utf-8")) == {"host": "机器"}
    assert [path.name for path in tmp_path.iterdir()] == ["env.json"]


def test_events_are_lines_and_a_line_cut_by_a_crash_spoils_only_itself(tmp_path):
    append_event(tmp_path, "start", step=0)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"time": "20')
    append_event(tmp_path, "resume", step=5)
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in (lines[0], lines[2])] == ["start", "resume"]
    assert len(lines) == 3
