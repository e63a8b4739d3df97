"""`llm-jax verify` says what is wrong with a model's files, and its exit status says whether."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import jax.numpy as jnp
import pytest

from llm_jax.checkpoint import save_model
from llm_jax.run import cli, verify
from tests.checkpoint.tiny_run import META, TOKENIZER, Run, flip_bit_of, make_state


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with ExitStack() as stack:
        run = Run(tmp_path / "run", stack)
        run.saved(1, 2)
        yield run


def verified(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.run(verify.main, list(argv))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_good_run_is_reported_item_by_item(run, capsys):
    status, out, _ = verified(capsys, str(run.folder))
    assert status == 0
    arrays = ["key", "opt_state/0/mu", "params/embed", "params/layers/scale", "step"]
    items = [line.split()[1] for line in out.splitlines() if line.startswith("OK")]
    assert sorted(items) == sorted(["meta.json", "files", *arrays])
    assert "checkpoints/2: 7 items checked" in out


def test_a_flipped_bit_is_named_and_exits_with_two(run, capsys):
    flip_bit_of(run.data_file(2), make_state(2).params["embed"])
    status, out, error = verified(capsys, str(run.folder), "--quiet")
    assert status == 2
    assert out.splitlines()[0].startswith("BAD  params/embed: fingerprint is ")
    assert "params/embed" in error
    assert error.count("\n") == 1
    assert verified(capsys, str(run.folder), "--step", "1")[0] == 0


def test_all_checkpoints_of_a_run_are_checked_and_every_problem_counted(run, capsys):
    (run.checkpoints / "1/meta.json").unlink()
    run.data_file(2).write_bytes(b"")
    status, out, error = verified(capsys, str(run.folder), "--all", "--quiet")
    assert status == 2
    assert "1/meta.json is missing" in error
    assert "and 3 more" in error  # the file, and the two arrays too large for the index
    assert f"{run.data_file(2)} has 0 bytes" in out


def test_a_model_folder_with_every_kind_of_array_is_good(tmp_path, capsys):
    import jax

    params = {
        "half": jnp.ones((4, 4), jnp.bfloat16),
        "none": jnp.zeros((0, 3)),
        "flag": jnp.array([True]),
        "rbg": jax.random.key(1, impl="rbg"),
    }
    save_model(tmp_path / "model", params, META, TOKENIZER)
    assert verified(capsys, str(tmp_path / "model"), "--all")[0] == 0


def test_a_folder_without_a_model_is_one_line_and_exits_with_two(tmp_path, capsys):
    status, _, error = verified(capsys, str(tmp_path))
    assert status == 2
    assert "holds no model" in error
    assert error.count("\n") == 1
