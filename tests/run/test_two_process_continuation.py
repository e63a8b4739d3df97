"""Continued training in two processes, whose devices share every array, equals that in one."""

import jax
import numpy as np
import pytest

import llm_jax
from llm_jax.train.trainable import VOCAB_AXIS
from tests.run.conftest import OLD
from tests.run.tiny_runs import Run

pytestmark = [pytest.mark.multidevice, pytest.mark.slow]

ALONE, STEPS = 2, 4
# of four devices: `fsdp` goes across the two processes, `tensor` splits the vocabulary within each
SETTINGS = ("--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.tensor", "2",
            "--stages.new-rows-steps", str(ALONE), "--stages.new-rows-warmup-steps", "1",
            "--optimizer.warmup-steps", "1", "--train.steps", str(STEPS),
            "--train.eval-every-steps", str(ALONE))  # fmt: skip


@pytest.fixture(scope="module")
def together(new_continued) -> Run:
    """Two processes of two devices."""
    run = new_continued()
    processes = run.start_processes(*SETTINGS, devices=2)
    statuses = [process.wait_for_end() for process in processes]
    assert statuses == [0, 0], processes[0].errors() + processes[1].errors()
    return run


@pytest.fixture(scope="module")
def alone(new_continued) -> Run:
    """One process of four devices."""
    run = new_continued()
    process = run.start(*SETTINGS, devices=4)
    assert process.wait_for_end() == 0, process.errors()
    return run


def test_both_choose_the_start_that_one_process_chooses(together, alone):
    ours, expected = (
        next(event for event in run.events() if event["event"] == "continuation")
        for run in (together, alone)
    )
    assert (ours["init"], ours["first_new_row"]) == (expected["init"], OLD)
    assert ours["bits_per_character"].keys() == expected["bits_per_character"].keys()
    for start, by_source in ours["bits_per_character"].items():
        assert by_source == pytest.approx(expected["bits_per_character"][start], rel=1e-5)


def test_losses_and_scores_are_those_of_one_process_on_both_sides_of_the_boundary(together, alone):
    rows, expected = together.metrics(), alone.metrics()
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    assert {row["step"] for row in rows} == set(range(STEPS + 1))
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name in ("loss", "target_tokens", "learning_rate", "eval/bits_per_character"):
            if name in row:
                assert row[name] == pytest.approx(other[name], rel=1e-5)


def test_old_rows_and_the_body_are_bitwise_the_bases_after_the_first_stage(together, base):
    before, after = llm_jax.load(base), llm_jax.load(together.folder, step=ALONE)
    for name, old in before.params.items():
        if name not in VOCAB_AXIS:
            assert all(
                np.array_equal(a, b)
                for a, b in zip(
                    *(map(np.asarray, jax.tree.leaves(tree)) for tree in (old, after.params[name])),
                    strict=True,
                )
            )
            continue
        axis = VOCAB_AXIS[name]
        kept, new = np.split(np.moveaxis(np.asarray(after.params[name]), axis, 0), [OLD])
        was = np.moveaxis(np.asarray(old), axis, 0)
        np.testing.assert_array_equal(kept, was[:OLD])
        assert new.any()
    end = llm_jax.load(together.folder, step=STEPS)
    assert not np.array_equal(end.params["embedding"][:OLD], before.params["embedding"][:OLD])
