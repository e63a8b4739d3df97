"""Run folders and the processes that train in them, as seen from outside: files, signals, exit statuses."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_jax.checkpoint import read_meta
from tests.virtual_devices import with_devices

ROOT = Path(__file__).parents[2]
CONFIG = str(Path(__file__).with_name("tiny_pretrain.py"))
DEADLINE = 300  # seconds after which something that is waited for will not come
CLOCK = (
    "tokens_per_second",
    "data_wait_share",
    "seconds_per_step",
    "time",
)  # differ from run to run


class Process:
    """One process of `python -m llm_jax.run.VERB`."""

    def __init__(
        self,
        words: list[str],
        environment: dict[str, str],
        log: Path,
        largest_file: int,
        verb: str = "pretrain",
    ) -> None:
        self.log = log

        def limit() -> None:
            if largest_file:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

        with open(log.with_suffix(".out"), "w") as out, open(log, "w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"llm_jax.run.{verb}", *words],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=errors,
                preexec_fn=limit,
                start_new_session=True,
            )

    def send(self, number: signal.Signals) -> None:
        assert self._process.poll() is None, f"ended before {number.name}: {self.errors()}"
        self._process.send_signal(number)

    def press_ctrl_c(self) -> None:
        """What a terminal does: SIGINT to the process and to all that it started."""
        assert self.running(), f"ended before Ctrl-C: {self.errors()}"
        os.killpg(self._process.pid, signal.SIGINT)

    @property
    def pid(self) -> int:
        """Also the number of the session of all that it started."""
        return self._process.pid

    def running(self) -> bool:
        return self._process.poll() is None

    def wait_for_end(self) -> int:
        """The exit status."""
        try:
            return self._process.wait(DEADLINE)
        finally:
            self._process.kill()

    def step(self) -> int:
        """The last step that this process said it did."""
        return int((re.findall(r"^step (\d+)/", self.output(), re.MULTILINE) or [0])[-1])

    def output(self) -> str:
        return self.log.with_suffix(".out").read_text(encoding="utf-8")

    def errors(self) -> str:
        return self.log.read_text(encoding="utf-8")


class Run:
    """A run folder on the tiny prepared data."""

    def __init__(
        self,
        folder: Path,
        prepared: Path,
        compiled: Path,
        page: tuple[str, ...] = (CONFIG,),
        verb: str = "pretrain",
    ) -> None:
        self.verb = verb
        self.folder, self.prepared, self.compiled, self.page = folder, prepared, compiled, page

    def words(self, *words: str) -> list[str]:
        """The arguments of the command."""
        where = ["--run", str(self.folder), "--data.prepared", str(self.prepared)]
        return [*self.page, *where, *words]

    def start(
        self, *words: str, devices: int = 1, largest_file: int = 0, **environment: str
    ) -> Process:
        """Starts the command on this many virtual devices; `largest_file` limits what it can write."""
        number = len(list(self.folder.parent.glob("*.log")))
        return Process(
            self.words(*words),
            {
                **with_devices(devices),
                "JAX_COMPILATION_CACHE_DIR": str(self.compiled),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                **environment,
            },
            self.folder.parent / f"{number}.log",
            largest_file,
            self.verb,
        )

    def start_processes(
        self, *words: str, devices: int, apart: tuple[tuple[str, ...], ...] = ((), ())
    ) -> list[Process]:
        """Starts the command as one run of several processes, each with this many virtual devices.

        `apart` is what each of them gets as well.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
        return [
            self.start(
                *words,
                *own,
                devices=devices,
                LLM_JAX_COORDINATOR=coordinator,
                LLM_JAX_PROCESSES=str(len(apart)),
                LLM_JAX_PROCESS_ID=str(index),
            )
            for index, own in enumerate(apart)
        ]

    def copy(self, folder: Path) -> "Run":
        """The same run in another place."""
        shutil.copytree(self.folder, folder / "run")
        return Run(folder / "run", self.prepared, self.compiled, self.page, self.verb)

    def metrics(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl, without what depends on the clock."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        rows = [json.loads(line) for line in lines]
        return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]

    def saved(self) -> list[str]:
        """Everything in checkpoints/, by name: steps, and what should not be there."""
        folder = self.folder / "checkpoints"
        return sorted(os.listdir(folder)) if folder.exists() else []

    def newest(self) -> int:
        """The newest whole checkpoint; 0 if there is none."""
        return max((int(name) for name in self.saved() if name.isdecimal()), default=0)

    def arrays(self, step: int = -1) -> dict[str, Any]:
        """Shape, dtype and fingerprint of every array of a checkpoint, by default the newest."""
        step = self.newest() if step < 0 else step
        return read_meta(self.folder / "checkpoints" / str(step))["arrays"]

    def events(self) -> list[dict[str, Any]]:
        """The lines of events.jsonl, without those that every checkpoint adds."""
        lines = (self.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [event for event in map(json.loads, lines) if event["event"] != "ledger"]

    def files(self) -> dict[str, tuple[int, int]]:
        """Every file with its size and time of change."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return {
            str(path.relative_to(self.folder)): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in found
        }


def wait_until(happened: Callable[[], Any], process: Process) -> None:
    """Waits for something that `process` does; fails if it ends first."""
    deadline = time.monotonic() + DEADLINE
    while not happened():
        assert process.running(), process.errors()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def wait_for_step(process: Process, step: int) -> None:
    """Waits until the process did `step`."""
    wait_until(lambda: process.step() >= step, process)
