"""The preflight, alone and between real processes: all equal, one different, one missing."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llm_jax import config as config_files
from llm_jax.run import cli, doctor, pretrain
from llm_jax.run.kinds import KINDS
from tests.run.tiny_runs import CONFIG, DEADLINE, ROOT
from tests.virtual_devices import with_devices


def test_on_one_host_it_says_what_a_run_would_use_and_writes_nothing(two_sources, tmp_path, capsys):
    run = tmp_path / "run"
    words = [CONFIG, "--data.prepared", str(two_sources), "--run", str(run)]
    assert cli.run(doctor.main, words) == 0
    out = capsys.readouterr().out
    for name in ("jaxlib", "code", "config", "plan", "tokenizer", "checkpoint", "process 0"):
        assert f"\n{name} " in out
    assert "all is well: 1 process(es)" in out
    assert not run.exists()


def test_what_would_stop_the_run_is_told_in_one_line(tmp_path, capsys):
    words = [CONFIG, "--data.prepared", str(tmp_path / "nothing"), "--run", str(tmp_path / "run")]
    assert cli.run(doctor.main, words) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def refused(two_sources, capsys):
    """The one line that both doctor and pretrain say; what is in the run folder stays as it was."""

    def run(folder: Path, *words: str) -> str:
        every = [CONFIG, "--data.prepared", str(two_sources), "--run", str(folder), *words]
        before = sorted(folder.rglob("*")) if folder.is_dir() else []
        said = []
        for command in (doctor.main, pretrain.main):
            assert cli.run(command, every) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            said.append(error.removeprefix("error: ").strip())
        assert said[1] in said[0]
        assert (sorted(folder.rglob("*")) if folder.is_dir() else []) == before
        return said[1]

    return run


def test_a_run_folder_that_cannot_be_made_or_is_not_a_runs_is_told(refused, tmp_path):
    file, other = tmp_path / "file", tmp_path / "other"
    file.touch()
    other.mkdir()
    (other / "text").touch()
    assert f"cannot be made a run folder: {file} is no folder; name another" in refused(file)
    assert f"cannot be made a run folder: {file} is no folder" in refused(file / "below")
    # /proc takes no files, from root either
    assert "nothing can be written in /proc/sys/kernel" in refused(Path("/proc/sys/kernel/runs/1"))
    assert "is a folder with other things in it" in refused(other)


def test_a_run_that_has_begun_and_would_be_another_one_is_told(refused, straight):
    assert "step.batch_size was 8 at step 80 and is 4 now" in refused(
        straight.folder, "--step.batch-size", "4"
    )


def test_checkpoints_that_will_be_replaced_count_as_room(straight, two_sources):
    """A disk that is full but for the next checkpoint is enough for a run whose others are there."""
    words = ["--data.prepared", str(two_sources), "--run", str(straight.folder)]
    own = doctor.config_facts(config_files.load(CONFIG, KINDS, words))["own"]
    new = doctor.config_facts(
        config_files.load(CONFIG, KINDS, [*words, "--run", f"{straight.folder}-2"])
    )["own"]
    there = doctor.saved_bytes(straight.folder / "checkpoints")
    size = new["needed"] / (doctor.ROOM + 4)  # keep_last=3, keep_best=1
    assert own["needed"] == pytest.approx(max(new["needed"] - there, doctor.ROOM * size), abs=2)
    assert own["needed"] < new["needed"] / 2


def test_collectives_that_hang_on_one_host_end_it_in_one_line(tmp_path):
    """No time is enough for them here: the thread still compiles when the process ends."""
    done = subprocess.run(
        [sys.executable, "-m", "llm_jax.run.doctor", "--join-seconds", "1e-9"],
        cwd=ROOT,
        env=with_devices(2),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 2, done.stderr
    assert "no collective within 1e-09 s; it hangs or died" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.multidevice
def test_rows_that_do_not_divide_over_the_mesh_are_refused_before_anything_is_written(
    two_sources, tmp_path
):
    folder = tmp_path / "run"
    words = [CONFIG, "--data.prepared", str(two_sources), "--run", str(folder)]
    words += ["--mesh.context", "2", "--mesh.fsdp", "1", "--data.seq-len", "63"]
    for verb in ("doctor", "pretrain"):
        done = subprocess.run(
            [sys.executable, "-m", f"llm_jax.run.{verb}", *words],
            cwd=ROOT,
            env=with_devices(2),
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert done.returncode == 2
        assert "data.seq_len: time=63 must be a multiple of mesh.context=2" in done.stderr
        assert done.stderr.count("\n") == 1
        assert not folder.exists()


def test_a_disk_too_small_for_the_checkpoints_is_told(two_sources, tmp_path, capsys):
    words = [CONFIG, "--data.prepared", str(two_sources), "--run", str(tmp_path / "run")]
    words += ["--checkpoint.keep-last", "1000000000"]
    assert cli.run(doctor.main, words) == 2
    assert "the checkpoints that stay need" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.num-layers=2"], "need a CONFIG"),
        (["none.py"], "does not exist"),
        (["--join-seconds", "-1"], "--join-seconds: -1 must be from 0 to 31,536,000 seconds"),
        (["--join-seconds", "0"], "--join-seconds: 0 must be above 0 seconds"),
        (["--join-seconds", "nan"], "--join-seconds: nan must be from 0"),
    ],
)
def test_a_wrong_word_is_one_line(words, said, capsys):
    assert cli.run(doctor.main, words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_host_that_hangs_after_it_joined_is_named():
    exchange = doctor.Exchange(["first", "second"], seconds=0.01)
    exchange.post("facts/0", {"same": {}})
    found, late = exchange.gather("facts")
    assert list(found) == [0]
    assert late == [
        "process 1 on second: no facts within 0.01 s; it hangs or died, look at its log"
    ]


def test_what_differs_is_told_by_host_and_name_and_a_broken_host_by_its_own_words():
    def host(name: str, problem: str = "", **same: str) -> dict:
        return {"same": same, "own": {"host": name, "problem": problem}}

    facts = {
        0: host("a", jax="1", code="x"),
        1: host("b", jax="1", code="x"),
        2: host("c", jax="2", code="x", plan="p", devices="1 x cpu"),
        3: host("d", problem="no data here", jax="9"),
    }
    assert doctor.differences(facts) == [
        "process 2 on c: devices is 1 x cpu, process 0 has none",
        "process 2 on c: jax is 2, process 0 has 1",
        "process 2 on c: plan is p, process 0 has none",
        "process 3 on d: jax is 9, process 0 has 1",
        "process 3 on d: no data here",
    ]


def test_a_host_that_is_unlike_is_named_before_what_comes_of_it_everywhere():
    """One with fewer devices leaves no host a mesh, and so none the facts that need one."""
    facts = {
        index: {"same": {"devices": devices}, "own": {"host": f"h{index}", "problem": "no mesh"}}
        for index, devices in enumerate(("8 x gpu", "7 x gpu"))
    }
    facts[2] = {"same": {"devices": "8 x gpu", "plan": "p"}, "own": {"host": "h2", "problem": ""}}
    assert doctor.differences(facts) == [
        "process 1 on h1: devices is 7 x gpu, process 0 has 8 x gpu",
        "process 0 on h0: no mesh",
        "process 1 on h1: no mesh",
    ]


def start(
    words: list[str],
    index: int,
    processes: int,
    port: int,
    out: Any,
    errors: Any = subprocess.STDOUT,
    devices: int = 2,
) -> subprocess.Popen:
    """One process of the preflight, with so many devices, that writes to files or descriptors."""
    environ = {
        **with_devices(devices),
        "LLM_JAX_COORDINATOR": f"127.0.0.1:{port}",
        "LLM_JAX_PROCESSES": str(processes),
        "LLM_JAX_PROCESS_ID": str(index),
    }
    command = [sys.executable, "-m", "llm_jax.run.doctor", *words]
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=out, stderr=errors)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def examined(
    words: list[list[str]], processes: int, folder: Path, devices: tuple[int, ...] = (2, 2)
) -> list[tuple[int, str]]:
    """Exit status and output of the preflight on these processes."""
    port = free_port()
    logs = [folder / f"{index}.log" for index in range(len(words))]
    started = []
    for index, (own, log) in enumerate(zip(words, logs, strict=True)):
        with log.open("w") as out:
            started.append(start(own, index, processes, port, out, devices=devices[index]))
    statuses = [process.wait(DEADLINE) for process in started]
    return [(status, log.read_text()) for status, log in zip(statuses, logs, strict=True)]


@pytest.mark.slow
@pytest.mark.multidevice
def test_two_equal_hosts_are_well(two_sources, tmp_path):
    words = [CONFIG, "--data.prepared", str(two_sources), "--run", str(tmp_path / "run")]
    for status, output in examined([words, words], 2, tmp_path):
        assert status == 0, output
        assert "all is well: 2 process(es), 4 device(s)" in output


@pytest.mark.multidevice
def test_a_host_with_another_config_is_named_on_both_with_what_differs(two_sources, tmp_path):
    words = [CONFIG, "--data.prepared", str(two_sources), "--run", str(tmp_path / "run")]
    other = [*words, "--data.seed", "1"]
    for status, output in examined([words, other], 2, tmp_path):
        assert status == 2, output
        assert "BAD  process 1 on " in output
        assert ": plan is " in output


@pytest.mark.multidevice
def test_a_host_with_fewer_devices_is_named_though_no_host_has_a_mesh_for_the_batch(
    two_sources, tmp_path
):
    words = [CONFIG, "--data.prepared", str(two_sources), "--run", str(tmp_path / "run")]
    for status, output in examined([words, words], 2, tmp_path, devices=(2, 1)):
        assert status == 2, output
        lines = [line for line in output.splitlines() if line.startswith("BAD")]
        assert ": devices is 1 x cpu, process 0 has 2 x cpu" in lines[0]
        assert "step.batch_size: batch=8 must be a multiple of mesh.fsdp=3" in lines[1]


@pytest.mark.multidevice
def test_a_host_that_is_slow_to_say_it_ends_as_the_others_do(tmp_path):
    """JAX aborts a process when the first one, which holds the store, has left before it."""
    words = [CONFIG, "--data.prepared", str(tmp_path / "none"), "--run", str(tmp_path / "run")]
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b" " * 4096)
    os.set_blocking(write, True)
    port, log = free_port(), tmp_path / "0.log"
    with log.open("w") as out, (tmp_path / "1.log").open("w") as errors:
        first = start(words, 0, 2, port, out)
        second = start(words, 1, 2, port, write, errors)
    os.close(write)
    deadline = time.monotonic() + DEADLINE
    while "error: " not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)  # for which the second one waits for its reader
    with open(read, "rb") as pipe:
        told = pipe.read().decode().strip()
    assert (first.wait(DEADLINE), second.wait(DEADLINE)) == (2, 2), told
    assert "holds no prepared data" in told


def test_a_missing_host_is_named_within_the_time_out(tmp_path):
    ((status, output),) = examined([["--join-seconds", "1"]], 2, tmp_path)
    assert status == cli.UNAVAILABLE
    assert output.startswith("error: process 1 of 2 did not come within 1 s (there: 0 on ")
