"""Folders appear whole or not at all, wherever they are to lie, and nothing that was there is touched."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llm_jax.checkpoint import inspect, making, restore_params, save_model
from llm_jax.checkpoint.new_folder import check_new
from llm_jax.errors import CheckpointError, ConfigError
from tests.checkpoint.tiny_run import META, TOKENIZER, abstract, equal, make_state

ROOT = Path(__file__).parents[2]


def fail_after(work, out):
    """Makes `out` with `work`, and fails then."""
    with making(out) as partial:
        work(partial)
        raise RuntimeError("half-way")


def write(folder, text):
    """A folder with one file."""
    folder.mkdir()
    (folder / "file").write_text(text)


def listing(folder):
    """Every file and folder below, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ["base", "b*", "[ab]ase"])
def test_folders_with_names_like_ours_are_left_alone(tmp_path, name):
    for mine in ("base.partial", "base.partial-notes", "base.unfinished-notes", f"{name}.partial"):
        (tmp_path / mine).mkdir(exist_ok=True)
        (tmp_path / mine / "notes").write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(RuntimeError, match="half-way"):
        fail_after(lambda partial: write(partial, "x"), tmp_path / name)
    assert listing(tmp_path) == before
    save_model(tmp_path / name, make_state(4).params, META, TOKENIZER)
    assert [p for p in before if not (tmp_path / p).exists()] == []


def test_of_two_at_once_the_first_wins_and_the_other_says_so(tmp_path):
    out = tmp_path / "out"

    def race():
        with making(out) as loser:
            write(loser, "loser")
            with making(out) as winner:
                write(winner, "winner")

    with pytest.raises(ConfigError, match="made by another program in the meantime"):
        race()
    assert listing(tmp_path) == ["out", "out/file"]
    assert (out / "file").read_text() == "winner"


def test_parents_are_removed_after_a_failure_unless_they_were_there(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(RuntimeError):
        fail_after(Path.mkdir, tmp_path / "there" / "a" / "b" / "out")
    assert listing(tmp_path) == ["there"]


def test_what_threads_still_write_after_a_failure_is_removed_too(tmp_path):
    def write_on(folder):
        for number in range(8):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / str(number)).write_text("late")
            time.sleep(0.1)

    def start(folder):
        threads.append(threading.Thread(target=write_on, args=(folder,)))
        threads[0].start()
        time.sleep(0.05)

    threads: list[threading.Thread] = []
    with pytest.raises(RuntimeError):
        fail_after(start, tmp_path / "out")
    threads[0].join()
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file/out", "file is no folder"),
        ("file/a/out", "file is no folder"),
        ("n" * 256, "a name of 256 bytes is longer than 255"),
        ("missing/" + "中" * 90, "a name of 270 bytes"),
        ("link", "exists already as a link that leads nowhere"),
        ("link/out", "link is no folder"),
        ("a\0b", "holds no NUL character"),
        ("file", "exists already"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_any_work(tmp_path, place, said):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=said) as caught:
        check_new(tmp_path / place)
    assert "\n" not in str(caught.value)
    assert "choose" in str(caught.value)
    assert listing(tmp_path) == ["file", "link"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_one_may_not_write_into_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(ConfigError, match="no permission to write into"):
        check_new(tmp_path / "closed" / "out")


@pytest.mark.parametrize("name", ["out[1]", "p[1]/x", "a*b", "q?", "中 文", "n" * 255])
def test_names_that_look_like_patterns_are_names(tmp_path, name):
    """Orbax joined the folder with a pattern and found nothing, or the files of another folder."""
    params = make_state(4).params
    save_model(tmp_path / "aXb", make_state(5).params, META, TOKENIZER)
    save_model(tmp_path / name, params, META, TOKENIZER)
    assert [found for found in inspect(tmp_path / name) if found.problem] == []
    assert equal(restore_params(tmp_path / name, abstract(params))[0], params)


FULL_DISK = """
import resource, signal, sys
import jax
jax.config.update("jax_platforms", "cpu")
from llm_jax.checkpoint import save_model
from llm_jax.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
params = {str(i): jax.numpy.arange(50_000.0) + i for i in range(8)}
try:
    save_model(sys.argv[1], params, {}, {})
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", ["0", "10000", "100000"])
def test_a_full_disk_is_one_line_with_a_remedy_and_leaves_nothing(tmp_path, limit):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "a" / "out"), limit], cwd=ROOT, text=True,
        check=False, capture_output=True,
    )  # fmt: skip
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith(f"{tmp_path}/a/out could not be written: File too large; ")
    assert "free space on the disk" in done.stdout
    assert done.stderr == ""
    assert listing(tmp_path) == []


def test_a_model_folder_that_is_there_is_named(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out exists already"):
        save_model(tmp_path / "out", make_state(4).params, META, TOKENIZER)
