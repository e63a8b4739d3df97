"""Whatever is broken in a checkpoint is found and named, and the one before is used."""

import re

import numpy as np
import pytest

from llm_jax.checkpoint import DamagedError, restore_params
from llm_jax.errors import CheckpointError
from tests.checkpoint.tiny_run import META, Run, abstract, equal, flip_bit_of, make_state

ABSTRACT = abstract(make_state(0))


def restored_step(run: Run) -> int:
    state, meta = run.open().restore(ABSTRACT)
    assert equal(state, make_state(meta["step"]))
    return meta["step"]


def flip_weights(run: Run) -> str:
    flip_bit_of(run.data_file(3), make_state(3).params["embed"])
    return "values of params/embed are not those saved"


def flip_tree_node(run: Run) -> str:
    (path,) = (run.checkpoints / "3/state/d").iterdir()
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)
    return f"{path.name} is damaged: its sha256"


def truncate_weights(run: Run) -> str:
    path = run.data_file(3)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return f"{path.name} has .* bytes, .* were saved"


def remove_weights(run: Run) -> str:
    run.data_file(3).unlink()
    return "ocdbt.process_0/d/.* is missing"


def remove_manifest(run: Run) -> str:
    (run.checkpoints / "3/state/manifest.ocdbt").unlink()
    return "manifest.ocdbt is missing"


def remove_record(run: Run) -> str:
    (run.checkpoints / "3/meta.json").unlink()
    return "meta.json is missing"


def edit_record(run: Run) -> str:
    path = run.checkpoints / "3/meta.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"abc"', '"abd"'), encoding="utf-8")
    return "meta.json is damaged: its contents do not match its digest"


def cut_record(run: Run) -> str:
    path = run.checkpoints / "3/meta.json"
    path.write_bytes(path.read_bytes()[:100])
    return "meta.json is damaged: not valid JSON"


def flip_tokenizer(run: Run) -> str:
    (run.checkpoints / "3/tokenizer/tokenizer.json").write_bytes(b"[]")
    return "tokenizer.json is damaged"


@pytest.mark.parametrize(
    "damage",
    [flip_weights, flip_tree_node, truncate_weights, remove_weights, remove_manifest, edit_record, cut_record, flip_tokenizer],
)  # fmt: skip
def test_a_damaged_newest_checkpoint_is_named_kept_and_stepped_over(run, caplog, damage):
    run.saved(1, 2, 3)
    message = damage(run)
    assert restored_step(run) == 2
    (line,) = [r.getMessage() for r in caplog.records if "corrupt" in r.getMessage()]
    assert re.search(message, line)
    assert "\n" not in line
    assert run.names() == ["1", "2", "3.corrupt"]


def test_after_stepping_back_saving_and_retention_go_on(run):
    run.saved(1, 2, 3, keep_last=2, keep_best=0)
    flip_weights(run)
    store = run.open(keep_last=2, keep_best=0)
    store.restore(ABSTRACT)
    for step in (3, 4):
        store.save(step, make_state(step), META, {})
    store.close()
    assert run.names() == ["3", "3.corrupt", "4"]


def test_when_none_is_good_nothing_is_renamed_and_the_reasons_are_told(run):
    run.saved(2, 3)
    flip_weights(run)
    (run.checkpoints / "2/state/_METADATA").unlink()
    for _ in range(2):  # the second time it must not look like a run without checkpoints
        with pytest.raises(CheckpointError, match=r"params/embed.*_METADATA is missing"):
            run.open().restore(ABSTRACT)
    assert run.names() == ["2", "3"]


def test_a_step_asked_for_by_number_is_never_swapped_for_another(run):
    run.saved(2, 3)
    flip_weights(run)
    with pytest.raises(CheckpointError, match="params/embed"):
        run.open().restore(ABSTRACT, step=3)
    assert run.names() == ["2", "3"]


def test_parameters_alone_are_verified_too(run):
    run.saved(3)
    flip_bit_of(run.data_file(3), make_state(3).params["embed"])
    with pytest.raises(DamagedError, match="params/embed"):
        restore_params(run.checkpoints / "3", ABSTRACT.params)


def test_damage_in_the_optimizer_does_not_stop_loading_parameters(run):
    run.saved(3)
    flip_bit_of(run.data_file(3), make_state(3).opt_state[0]["mu"])
    params, _ = restore_params(run.checkpoints / "3", ABSTRACT.params)
    assert np.array_equal(params["embed"], make_state(3).params["embed"])
