"""A step done again gives the bits that were logged and saved; anything else is named."""

import json

import pytest

from llm_jax.run import cli, replay, report
from tests.run.tiny_pretrain import STEPS
from tests.run.tiny_runs import Run


@pytest.fixture(scope="module")
def run(straight, tmp_path_factory) -> Run:
    """A copy, so that its logs may be changed."""
    return straight.copy(tmp_path_factory.mktemp("replayed"))


def replayed(run: Run, step: int, *words: str) -> int:
    return cli.run(replay.main, [str(run.folder), "--step", str(step), *words])


def test_a_step_and_the_arrays_saved_after_it_come_again_bit_for_bit(run, capsys):
    before = run.files()
    assert replayed(run, STEPS) == 0
    out = capsys.readouterr().out
    assert f"steps {STEPS - 3} to {STEPS} from checkpoint {STEPS - 4}, bit for bit" in out
    count = len(run.arrays(STEPS))
    assert f"{count} of {count} arrays as saved" in out
    assert run.files() == before


@pytest.mark.slow
def test_a_logged_loss_that_is_one_bit_off_is_named_with_its_step(run, capsys):
    path = run.folder / "metrics.jsonl"
    text = path.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    row = next(row for row in rows if row["step"] == STEPS - 2 and "loss" in row)
    row["loss"] *= 1 + 2**-22
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        assert replayed(run, STEPS - 1) == 2
    finally:
        path.write_text(text)
    error = capsys.readouterr().err
    assert f"step {STEPS - 2}: loss was " in error
    assert error.count("\n") == 1


def test_the_report_of_a_real_run_accounts_for_its_time_and_shows_its_curves(run, capsys):
    assert cli.run(report.main, [str(run.folder)]) == 0
    out = capsys.readouterr().out
    for phase in ("init", "compile", "step", "eval", "save", "goodput"):
        assert f"\n{phase} " in out
    page = (run.folder / "report.html").read_text("utf-8")
    assert f"Step {STEPS} of {STEPS}" in page
    assert page.count("<svg") == 5
    (run.folder / "report.html").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "said"),
    [(1, "has no good checkpoint before step 1"), (STEPS + 9, "is in metrics.jsonl")],
)
def test_a_step_that_cannot_be_done_again_is_told(run, capsys, step, said):
    if step > STEPS:
        (run.folder / "metrics.jsonl").rename(run.folder / "elsewhere")
    try:
        assert replayed(run, step) == 2
    finally:
        if step > STEPS:
            (run.folder / "elsewhere").rename(run.folder / "metrics.jsonl")
    assert said in capsys.readouterr().err
