"""Saving and restoring: values, retention, saving a step twice, and what is refused."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.checkpoint import (
    CheckpointConfig,
    RunLock,
    Store,
    read_meta,
    restore_params,
    save_model,
    tokenizer_folder,
)
from llm_jax.config import from_dict
from llm_jax.errors import CheckpointError, ConfigError
from tests.checkpoint.tiny_run import META, TOKENIZER, State, abstract, equal, make_state


def test_everything_saved_comes_back(run):
    store = run.open()
    state = make_state(5)._replace(
        opt_state=({"mu": jnp.zeros((0, 3))},)
    )  # an array without elements too
    store.save(5, state, META, TOKENIZER, {"loss": 2.5, "bad": float("nan")})
    store.close()
    restored, meta = store.restore(abstract(state))
    assert isinstance(restored, State)
    assert equal(restored, state)
    assert {key: meta[key] for key in META} == META
    assert (meta["step"], meta["metrics"]) == (5, {"loss": 2.5, "bad": None})
    assert meta["versions"]["jax"] == jax.__version__
    files = tokenizer_folder(run.checkpoints / "5")
    assert {path.name: path.read_bytes() for path in files.iterdir()} == TOKENIZER


def test_a_checkpoint_folder_alone_gives_parameters_and_record(run, tmp_path):
    run.saved(3)
    moved = (run.checkpoints / "3").rename(tmp_path / "elsewhere")
    params, meta = restore_params(moved, abstract(make_state(3).params))
    assert equal(params, make_state(3).params)
    assert read_meta(moved) == meta


def test_buffers_may_be_donated_right_after_save(run):
    update = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    make = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), (500, 1000)))
    wanted = [np.array(make(seed)) for seed in range(3)]
    update(make(0)).block_until_ready()
    with run.open() as store:
        for step in range(3):
            array = make(step)
            store.save(step, {"params": {"w": array}}, META, {})
            for _ in range(3):
                array = update(array)
            array.block_until_ready()
    shape = {"params": {"w": jax.ShapeDtypeStruct((500, 1000), jnp.float32)}}
    for step in (0, 1, 2):
        got, _ = restore_params(run.checkpoints / str(step), shape["params"])
        assert np.array_equal(got["w"], wanted[step])


def test_the_newest_and_the_best_stay(run):
    store = run.open(keep_last=2, keep_best=1, best_metric="bpc")
    for step, value in ((1, 3.0), (2, 1.0), (3, 2.0), (4, float("nan")), (5, 4.0)):
        store.save(step, make_state(step), META, {}, {"bpc": value})
    store.close()
    assert store.steps() == [2, 4, 5]
    store.save(6, make_state(6), META, {}, {"bpc": 0.5})
    store.close()
    assert run.names() == ["5", "6"]


def test_without_best_only_the_newest_stay(run):
    store = run.saved(1, 2, 3, keep_last=1, keep_best=0)
    assert store.steps() == [3]


def test_saving_an_equal_state_again_keeps_the_checkpoint_and_takes_the_metrics(run):
    store = run.saved(1)
    inode = run.data_file(1).stat().st_ino
    store.save(1, make_state(1), META, TOKENIZER, {"loss": 1.5})
    store.close()
    assert run.data_file(1).stat().st_ino == inode
    assert read_meta(run.checkpoints / "1")["metrics"] == {"loss": 1.5}
    restored, _ = store.restore(abstract(make_state(1)))
    assert equal(restored, make_state(1))


def test_saving_other_values_for_a_step_replaces_it(run, caplog):
    store = run.saved(1)
    store.save(1, make_state(7), META, TOKENIZER)
    store.close()
    assert "step 1 was saved before with other values" in caplog.text
    restored, _ = store.restore(abstract(make_state(7)))
    assert equal(restored, make_state(7))
    assert run.names() == ["1"]


def test_resuming_from_an_older_step_sets_newer_ones_aside(run):
    store = run.saved(1, 2, 3)
    restored, _ = store.restore(abstract(make_state(1)), step=2)
    assert equal(restored, make_state(2))
    assert run.names() == ["1", "2", "3.abandoned"]
    store.save(3, make_state(33), META, {})
    store.close()
    newest, _ = store.restore(abstract(make_state(1)))
    assert equal(newest, make_state(33))
    with pytest.raises(CheckpointError, match="no step 9; it has 1, 2, 3"):
        store.restore(abstract(make_state(1)), step=9)


def change(state, **params):
    return abstract(state._replace(params={**state.params, **params}))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (change(make_state(1), embed=jnp.zeros((40, 8), jnp.int32)), r"params/embed is float32\[40, 8\] there but int32\[40, 8\]"),
        (change(make_state(1), embed=jnp.zeros((41, 8))), r"params/embed is float32\[40, 8\] there but float32\[41, 8\]"),
        (change(make_state(1), embedd=jnp.zeros(())), r"has no params/embedd \(it has params/embed\)"),
        (abstract(make_state(1)._replace(opt_state=())), "holds opt_state/0/mu, which this config does not have"),
        (abstract(make_state(1)._replace(key=jax.random.key(0, impl="rbg"))), "key is key<fry>"),
    ],
)  # fmt: skip
def test_a_state_of_another_model_is_refused_and_nothing_is_renamed(run, wanted, message):
    store = run.saved(1)
    with pytest.raises(CheckpointError, match=message):
        store.restore(wanted)
    assert run.names() == ["1"]


def test_debris_of_a_killed_process_is_removed_and_a_half_made_swap_undone(run):
    run.saved(1, 2)
    for name in ("3.partial", "3.partial.orbax-checkpoint-tmp", "0.deleted"):
        (run.checkpoints / name / "state").mkdir(parents=True)
    (run.checkpoints / "2").rename(run.checkpoints / "2.replaced")
    (run.checkpoints / "1.replaced").mkdir()
    store = run.open()
    assert run.names() == ["1", "2"]
    restored, _ = store.restore(abstract(make_state(2)))
    assert equal(restored, make_state(2))


def test_a_store_needs_the_lock_of_its_run(tmp_path):
    with pytest.raises(CheckpointError, match="does not hold the lock"):
        Store(tmp_path / "checkpoints", CheckpointConfig(), lock=RunLock(tmp_path))


def test_a_writer_that_lost_its_lock_stops_saving(run):
    store = run.saved(1)
    with (
        RunLock(run.folder, take_over=True),
        pytest.raises(CheckpointError, match="another one took it over"),
    ):
        store.save(2, make_state(2), META, {})
    assert store.steps() == [1]


def test_meta_that_cannot_be_recorded_is_refused_before_saving(run):
    store = run.open()
    for meta in ({"step": 1}, {"x": object()}, {"x": "\ud800"}):
        with pytest.raises((ValueError, TypeError)):
            store.save(1, make_state(1), meta, {})
    store.close()
    assert run.names() == []


def test_tuples_and_number_keys_in_meta_do_not_break_the_digest(run):
    store = run.open()
    store.save(1, {"params": {"w": jnp.ones(3)}}, {"shape": (1, 2), "by_id": {10: "a", 9: "b"}}, {})
    store.close()
    assert read_meta(run.checkpoints / "1")["by_id"] == {"10": "a", "9": "b"}


@pytest.mark.parametrize("setting", ["save_every_steps", "keep_last"])
def test_settings_below_one_are_refused(setting):
    with pytest.raises(ConfigError, match=f"{setting}=0 must be at least 1"):
        from_dict(CheckpointConfig, {setting: 0})


def test_saves_are_due_on_schedule_and_never_at_the_start(run):
    store = run.open(save_every_steps=4)
    assert [step for step in range(13) if store.due(step)] == [4, 8, 12]


def test_a_model_folder_has_the_layout_of_a_checkpoint(tmp_path, caplog):
    params = make_state(4).params
    save_model(tmp_path / "model", params, META, TOKENIZER)
    restored, meta = restore_params(tmp_path / "model", abstract(params))
    assert equal(restored, params)
    assert meta["plan_digest"] == "abc"
    with pytest.raises(CheckpointError, match="exists already"):
        save_model(tmp_path / "model", params, META, TOKENIZER)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is no folder"):
        save_model(tmp_path / "file" / "model", params, META, TOKENIZER)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]


def test_a_warning_tells_when_the_best_metric_is_never_given(run, caplog):
    store = run.open(best_metric="loss")
    with caplog.at_level(logging.WARNING):
        store.save(1, make_state(1), META, {}, {"losss": 1.0})
        store.save(2, make_state(2), META, {}, {"losss": 1.0})
    store.close()
    assert caplog.text.count("did you mean 'losss'?") == 1


def test_the_record_is_readable_json(run):
    run.saved(1)
    record = json.loads((run.checkpoints / "1" / "meta.json").read_text(encoding="utf-8"))
    assert record["arrays"]["params/embed"]["shape"] == [40, 8]
    assert record["names"] == ["你好", "x"]
