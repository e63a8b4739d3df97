"""The supervisor, over small real processes: when it starts them again, and when not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_jax.errors import ConfigError
from llm_jax.run import cli, supervise
from llm_jax.run.launch import find_cluster
from tests.run.tiny_pretrain import STEPS
from tests.run.tiny_runs import DEADLINE, ROOT

# counts its launches in a file and then does what its words say for that launch
CHILD = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder, plan = Path(sys.argv[1]), sys.argv[2].split(",")
gpus = "/" + os.environ["CUDA_VISIBLE_DEVICES"] if os.environ.get("CUDA_VISIBLE_DEVICES") else ""
with (folder / "launches").open("a") as file:
    file.write(os.environ.get("LLM_JAX_PROCESS_ID", "") + "/" + os.environ.get("LLM_JAX_PROCESSES", "") + gpus + "\\n")
mine = [line for line in (folder / "launches").read_text().split() if line[0] in "/0"]
word = plan[min(len(mine), len(plan)) - 1]
if word.startswith("save"):
    (folder / "checkpoints" / str(len(mine))).mkdir(parents=True)
    word = word.removeprefix("save")
if word == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if word == "orphan":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    (folder / "orphan").write_text(str(child.pid))
    word = "0"
if word == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    (folder / "ready").touch()
    time.sleep(300)
if word == "second":  # the second of two processes fails, the first would wait for it
    if os.environ["LLM_JAX_PROCESS_ID"] == "0" and os.environ["LLM_JAX_PROCESSES"] != "1":
        time.sleep(300)
    word = "0" if os.environ["LLM_JAX_PROCESSES"] == "1" else "1"
sys.exit(int(word))
"""


def words(folder: Path, plan: str, *options: str) -> list[str]:
    command = [sys.executable, "-c", CHILD, str(folder), plan]
    return ["--pause", "0.01", "--run", str(folder), *options, "--", *command]


def supervised(folder: Path, plan: str, *options: str) -> int:
    """The exit status."""
    done = subprocess.run(
        [sys.executable, "-m", "llm_jax.run.supervise", *words(folder, plan, *options)],
        cwd=ROOT,
        timeout=DEADLINE,
    )
    return done.returncode


def launches(folder: Path) -> int:
    return len((folder / "launches").read_text().split())


@pytest.mark.parametrize(
    ("plan", "status", "count"),
    [
        ("0", 0, 1),
        ("1,kill,0", 0, 3),
        ("75,134,0", 0, 3),  # a hang, and what a lost host ends as
        ("2", 2, 1),  # a user's mistake
        ("1", 1, 3),  # three tries
        ("kill", 128 + 9, 3),
        ("69,69,69,69,69,0", 0, 6),  # a late host does not count
        ("1,save1,1,save1,1,0", 0, 6),  # progress in between
    ],
)
def test_it_starts_again_what_may_succeed_and_gives_up_on_what_does_not(
    tmp_path, plan, status, count
):
    assert supervised(tmp_path, plan) == status
    assert launches(tmp_path) == count


def test_a_late_host_is_waited_for_as_long_as_patience_lasts(tmp_path):
    assert supervised(tmp_path, "69", "--patience", "0") == 69
    assert launches(tmp_path) == 1


def test_a_run_that_was_stopped_by_someone_else_goes_on_and_one_at_its_end_does_not(tmp_path):
    lines = [json.dumps({"event": event}) for event in ("start", "stop")]
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    assert supervised(tmp_path, "0,0,2") == 2
    assert launches(tmp_path) == 3


def test_events_that_a_crash_tore_are_read_as_far_as_they_are_whole(tmp_path):
    (tmp_path / "events.jsonl").write_bytes(
        '{"event": "stop"}\n17\n{"event": "resume", "host": "é'.encode()[:-1] + b"\0\0\xff\n"
    )
    assert supervised(tmp_path, "0,2") == 2
    assert launches(tmp_path) == 2


def start(folder: Path, plan: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "llm_jax.run.supervise", *words(folder, plan)]
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + DEADLINE
    while not (folder / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_sigterm_is_passed_on_and_then_it_is_not_started_again(tmp_path):
    process = start(tmp_path, "wait")
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE) == 128 + 15, "nothing says that it was at its end"
    assert launches(tmp_path) == 1


@pytest.mark.parametrize(
    ("event", "number", "status"),
    [("stop", signal.SIGTERM, 143), ("stop", signal.SIGINT, 130), ("end", signal.SIGTERM, 0)],
)
def test_told_to_stop_before_the_end_of_its_run_it_ends_as_a_failure(
    tmp_path, event, number, status
):
    (tmp_path / "events.jsonl").write_text(json.dumps({"event": event}))
    process = start(tmp_path, "wait")
    process.send_signal(number)
    assert process.wait(DEADLINE) == status
    assert launches(tmp_path) == 1


@pytest.mark.parametrize("processes", [1, 16])
def test_a_signal_that_comes_while_processes_are_started_reaches_all_of_them(processes):
    """The first one sends it as soon as it is there; each would live for longer than the test."""
    child = 'test "${LLM_JAX_PROCESS_ID:-0}" = 0 && kill -TERM $PPID; exec sleep 1000'
    words = ["--processes", str(processes), "--", "bash", "-c", child]
    supervisor = [sys.executable, "-m", "llm_jax.run.supervise", *words]
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}  # no GPUs to be shared out
    for _ in range(3):
        assert subprocess.run(supervisor, cwd=ROOT, env=environ, timeout=DEADLINE).returncode == 143


def test_a_real_time_signal_has_a_number(tmp_path):
    words = ["--tries", "1", "--", "bash", "-c", "kill -37 $$"]
    done = subprocess.run(
        [sys.executable, "-m", "llm_jax.run.supervise", *words],
        cwd=ROOT,
        timeout=DEADLINE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 128 + 37
    assert done.stderr.startswith("supervise: killed by signal 37 after ")
    assert done.stderr.count("\n") == 1


def test_a_killed_supervisor_takes_its_command_along_and_no_orphan_outlives_a_launch(tmp_path):
    assert supervised(tmp_path, "orphan") == 0
    assert not alive(int((tmp_path / "orphan").read_text()))
    process = start(tmp_path, "0,wait")
    (child,) = children(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + DEADLINE
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_of_two_processes_one_that_fails_ends_both_and_fewer_are_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "GRACE", 0.2)
    previous = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    options = ("--processes", "2", "--min-processes", "1")
    try:
        assert cli.run(supervise.main, words(tmp_path, "second", *options)) == 0
    finally:
        for number, handler in zip(
            (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), previous, strict=True
        ):
            signal.signal(number, handler)
    told = sorted((tmp_path / "launches").read_text().split())
    assert told == ["0/1/3", "0/2/3", "0/2/3", "1/2/5", "1/2/5"]
    assert os.environ.get("LLM_JAX_PROCESSES") is None


@pytest.mark.parametrize(
    ("environ", "nodes", "gpus"),
    [
        ({}, [], []),
        ({}, ["nvidia4", "nvidia5", "nvidiactl", "nvidia-uvm"], ["0", "1"]),  # as in a container
        ({"CUDA_VISIBLE_DEVICES": "6,7"}, ["nvidia0"], ["6", "7"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["nvidia0"], []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ["nvidia0"], []),
        ({"CUDA_VISIBLE_DEVICES": "GPU-3f, MIG-7a,NoDevFiles,2"}, [], ["GPU-3f", "MIG-7a"]),
        ({"JAX_PLATFORMS": "cpu"}, ["nvidia0", "nvidia1"], []),
        ({"JAX_PLATFORMS": "cuda,cpu"}, ["nvidia0"], ["0"]),
    ],
)
def test_the_gpus_of_a_host_are_those_that_its_command_may_use(tmp_path, environ, nodes, gpus):
    for name in nodes:
        (tmp_path / name).touch()
    assert supervise.host_gpus(environ, tmp_path) == gpus


def test_processes_share_the_gpus_of_their_host_evenly_and_each_is_told_which_it_is():
    parts = supervise.gpu_parts(["0", "1", "2", "3"], 2)
    assert parts == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert supervise.gpu_parts([], 3) == [{}, {}, {}]
    with pytest.raises(ConfigError, match=r"--processes=3 must divide the 4 GPUs .*\(0,1,2,3\)"):
        supervise.gpu_parts(["0", "1", "2", "3"], 3)
    cluster = find_cluster(environ=supervise.joined(61440, 2, 1))
    assert cluster
    assert (cluster.coordinator, cluster.processes, cluster.index) == ("127.0.0.1:61440", 2, 1)
    assert cluster.local_device is None, "all that it sees are its own"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["llm-jax", "pretrain"], "put the command behind --"),
        (["--"], "no command behind --"),
        (["--tries", "0", "--", "true"], "--tries=0 must be at least 1"),
        (["--processes", "0", "--", "true"], "--processes=0 must be at least 1"),
        (
            ["--min-processes", "2", "--", "true"],
            "--min-processes=2 must be from 1 to --processes=1",
        ),
        (["--", "/no/such/program"], "cannot be started: No such file"),
        (["--pause", "-1", "--", "true"], "--pause: -1 must be from 0 to 31,536,000 seconds"),
        (["--longest-pause", "nan", "--", "true"], "--longest-pause: nan must be from 0"),
        (["--patience", "-0.1", "--", "true"], "--patience: -0.1 must be from 0"),
        (["--healthy-seconds", "inf", "--", "true"], "--healthy-seconds: inf must be from 0"),
    ],
)
def test_a_wrong_word_is_one_line(words, said, capsys):
    assert cli.run(supervise.main, words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_run_folder_is_the_commands_own():
    assert supervise.own_run(["llm-jax", "pretrain", "c.py", "--run", "runs/a"]) == "runs/a"
    assert supervise.own_run(["llm-jax", "pretrain", "--run=runs/b"]) == "runs/b"
    assert supervise.own_run(["sh", "x"]) == ""


@pytest.mark.slow
@pytest.mark.multidevice
def test_a_run_whose_processes_are_killed_reaches_its_end_under_the_supervisor(new_run, tmp_path):
    run = new_run()
    options = ["--pause", "0.1", "--processes", "2"]
    command = [sys.executable, "-m", "llm_jax.run.pretrain", *run.words()]
    settings = ["--mesh.data", "2", "--mesh.fsdp", "2", "--train.watchdog-seconds", "60"]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(run.compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    words = [sys.executable, "-m", "llm_jax.run.supervise", *options, "--", *command, *settings]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log)
    for aim in (8, 40):
        deadline = time.monotonic() + DEADLINE
        while run.newest() < aim:
            assert time.monotonic() < deadline
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        os.kill(children(process.pid)[aim % 3 % 2], signal.SIGKILL)
    assert process.wait(2 * DEADLINE) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().count("supervise: killed by SIGKILL") == 2
    assert [event["event"] for event in run.events()] == ["start", "resume", "resume", "end"]
    assert [row["step"] for row in run.metrics() if "loss" in row] == list(range(1, STEPS + 1))
