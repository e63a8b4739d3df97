"""`llm-jax supervise -- COMMAND`: starts a command again whenever it crashes, hangs or is preempted.

| the command ends with | then |
|---|---|
| 0, its run at the end (or unknown) | done |
| 0, its run stopped before the end | it was preempted: again |
| 2 | a mistake of the user's: no use in trying again |
| 69, a host is late or a lock may be stale | again, for `--patience` seconds without progress |
| 75 (hang), a signal, anything else | again, at most `--tries` times without progress |

Progress is a newer checkpoint in the run folder (`--run`, by default the command's own), or having lived for
`--healthy-seconds`. SIGTERM, SIGINT and SIGUSR1 are passed on; after the first two it is not started again, and
unless the run is known to be at its end the exit status is that of a failure, else 143 (SIGTERM) or 130 (SIGINT):
0 would tell whoever drained this host that there is nothing left to do. Nothing that the command started outlives it.

`--processes N` starts N processes on this host, joined by LLM_JAX_... variables, each with its part of the host's
GPUs by CUDA_VISIBLE_DEVICES (a process alone would take them all); when one fails all are started again, after two launches without progress with one process fewer, down to `--min-processes`. On several hosts
each has its own supervisor, and the roll call at the start brings them together again.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_jax.errors import ConfigError
from llm_jax.run import cli

HUNG = 75  # as in train.watchdog, which would load jax
GRACE = 30.0  # seconds for the other processes of a launch to notice that one is gone, by their heartbeat
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # passed on
PARENT_DEATH = 1  # PR_SET_PDEATHSIG of Linux's prctl


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How often to try, and what counts as progress."""

    run: Path | None
    tries: int
    patience: float
    healthy_seconds: float
    pause: float  # before the second launch; doubled by each failure without progress
    longest_pause: float
    processes: int
    min_processes: int


class Supervisor:
    """Launches of one command, one after another."""

    def __init__(self, plan: Plan, words: list[str]) -> None:
        self.plan, self.words = plan, words
        self.children: list[subprocess.Popen[bytes]] = []
        self.told_by = 0  # the signal that asked to stop
        self.launches = 0

    def receive(self, number: int, _: object) -> None:
        """The signal handler: passes on; the command saves and ends."""
        if number != signal.SIGUSR1:
            self.told_by = number
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)

    def supervise(self) -> int:
        """Until the command is done, or there is no sense in going on; its last exit status."""
        for number in SIGNALS:
            signal.signal(number, self.receive)
        plan, failures, processes = self.plan, 0, self.plan.processes
        progressed = time.monotonic()
        while True:
            newest, begun = newest_checkpoint(plan.run), time.monotonic()
            status = self.launch(processes)
            lived = time.monotonic() - begun
            if newest_checkpoint(plan.run) != newest or lived > plan.healthy_seconds:
                failures, progressed = 0, time.monotonic()
            if self.told_by:
                return self.stopped(status)
            if status == 2 or (status == 0 and last_event(plan.run) != "stop"):
                return status
            if status not in (0, cli.UNAVAILABLE):
                failures += 1
            waited = time.monotonic() - progressed
            if failures >= plan.tries or (status == cli.UNAVAILABLE and waited > plan.patience):
                tell(
                    f"{described(status)} after {lived:.0f} s, no progress in {failures} tries: giving up"
                )
                return status or 1
            if failures >= 2 and processes > plan.min_processes:
                processes -= 1
                tell(f"going on with {processes} processes")
            pause = min(plan.longest_pause, plan.pause * 2 ** max(0, failures - 1))
            tell(f"{described(status)} after {lived:.0f} s; again in {pause:g} s")
            deadline = time.monotonic() + pause
            while time.monotonic() < deadline and not self.told_by:
                time.sleep(min(0.1, pause))
            if self.told_by:
                return self.stopped(status)

    def stopped(self, status: int) -> int:
        """What to end with after a signal: 0 only if the run is known to be at its end."""
        return status or (0 if last_event(self.plan.run) == "end" else -self.told_by)

    def launch(self, processes: int) -> int:
        """Runs the command once, in one process or several; 0 if all ended well, else the first failure."""
        self.launches += 1
        environments = [dict(os.environ)]
        if self.plan.processes > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            parts = gpu_parts(host_gpus(os.environ), self.plan.processes)
            environments = [
                {**os.environ, **joined(port, processes, index), **parts[index]}
                for index in range(processes)
            ]
        try:
            self.start(environments)
            return self.wait()
        finally:
            for child in self.children:
                # its workers are in its session: what is left of it goes too
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()

    def start(self, environments: list[dict[str, str]]) -> None:
        """Starts the processes; none after a signal, and one that comes meanwhile reaches all of them."""
        # a signal between a start and its entry in the list would reach nobody: it waits for the whole list
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

        def prepare() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # a child inherits ours
            die_with_parent()

        self.children = []
        try:
            for environment in environments if not self.told_by else ():
                self.children.append(
                    subprocess.Popen(
                        self.words, env=environment, start_new_session=True, preexec_fn=prepare
                    )
                )
        except OSError as error:
            raise ConfigError(f"{self.words[0]!r} cannot be started: {error.strerror}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def wait(self) -> int:
        """Until all ended, or GRACE seconds after one failed."""
        first, deadline = 0, float("inf")
        while True:
            statuses = [child.poll() for child in self.children]
            failed = [status for status in statuses if status]
            if failed and not first:
                first, deadline = failed[0], time.monotonic() + GRACE
            if None not in statuses or time.monotonic() > deadline:
                return first
            time.sleep(0.05)


VISIBLE = re.compile(r"\d+$|(GPU|MIG)-")  # names that CUDA_VISIBLE_DEVICES may hold


def joined(port: int, processes: int, index: int) -> dict[str, str]:
    """The variables by which a process finds the others of this host."""
    return {
        "LLM_JAX_COORDINATOR": f"127.0.0.1:{port}",
        "LLM_JAX_PROCESSES": str(processes),
        "LLM_JAX_PROCESS_ID": str(index),
    }


def host_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """The NVIDIA GPUs that the command may use, as CUDA names them; none when JAX is told to use others."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    if "CUDA_VISIBLE_DEVICES" in environ:
        named = (name.strip() for name in environ["CUDA_VISIBLE_DEVICES"].split(","))
        # CUDA takes no name from the first on that is none: -1 and NoDevFiles mean no GPU
        return list(itertools.takewhile(VISIBLE.match, named))
    # CUDA counts from 0 whatever the numbers of the devices that a container was given
    return [str(number) for number, _ in enumerate(devices.glob("nvidia[0-9]*"))]


def gpu_parts(gpus: list[str], processes: int) -> list[dict[str, str]]:
    """The variables that give each process its GPUs: consecutive ones, equally many; none on a host without.

    With fewer processes after failures each keeps as many as it had.

    Raises:
      ConfigError: they cannot be shared out.
    """
    if not gpus:
        return [{}] * processes
    if len(gpus) % processes:
        raise ConfigError(
            f"--processes={processes} must divide the {len(gpus)} GPUs of this host ({','.join(gpus)}); choose "
            "another number, or other GPUs by CUDA_VISIBLE_DEVICES"
        )
    each = len(gpus) // processes
    shared = [gpus[each * index : each * (index + 1)] for index in range(processes)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in shared]


def die_with_parent() -> None:
    """In the child: SIGTERM when the supervisor is killed, so that it saves and ends too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGTERM)


def newest_checkpoint(run: Path | None) -> int:
    """The newest checkpoint in a run folder; -1 for none."""
    try:
        names = os.listdir(run / "checkpoints") if run else []
    except OSError:
        names = []
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def last_event(run: Path | None) -> str:
    """How a run's latest session ended: "end", or "stop" before it; "" if nothing says so."""
    try:
        # bytes: a crash of the machine leaves half a character, or zeros
        lines = (run / "events.jsonl").read_bytes().splitlines() if run else []
    except OSError:
        lines = []
    for line in reversed(lines):
        with contextlib.suppress(ValueError, AttributeError):
            event = json.loads(line).get("event")
            if event in ("end", "stop"):
                return event
    return ""


def described(status: int) -> str:
    """An exit status in words."""
    if status < 0:
        named = {number.value: number.name for number in signal.Signals}
        return f"killed by {named.get(-status, f'signal {-status}')}"  # real-time ones have no name
    words = {
        0: "stopped before its end",
        HUNG: "hung",
        cli.UNAVAILABLE: "a host is late or a lock held",
    }
    return words.get(status, f"failed with status {status}")


def tell(text: str) -> None:
    """A line on stderr."""
    print(f"supervise: {text}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    """The command. Ends with the exit status of the last launch."""
    parser = cli.Parser(
        prog="llm-jax supervise",
        description="Starts a command again whenever it crashes, hangs or is preempted.",
        usage="llm-jax supervise [OPTIONS] -- COMMAND ...",
    )
    parser.add_argument("--run", help="run folder (default: that of the command's --run)")
    parser.add_argument("--tries", type=int, default=3, help="without progress (default: 3)")
    parser.add_argument(
        "--patience", type=cli.seconds, default=900.0, help="seconds (default: 900)"
    )
    parser.add_argument("--healthy-seconds", type=cli.seconds, default=600.0, help="default: 600")
    parser.add_argument(
        "--pause", type=cli.seconds, default=1.0, help="seconds, doubled (default: 1)"
    )
    parser.add_argument(
        "--longest-pause", type=cli.seconds, default=60.0, help="seconds (default: 60)"
    )
    parser.add_argument("--processes", type=int, default=1, help="on this host (default: 1)")
    parser.add_argument("--min-processes", type=int, default=0, help="default: --processes")
    options, words = split(parser, argv)
    for flag, value in (("--tries", options.tries), ("--processes", options.processes)):
        if value < 1:
            raise ConfigError(f"{flag}={value} must be at least 1")
    least = options.min_processes or options.processes
    if not 1 <= least <= options.processes:
        raise ConfigError(
            f"--min-processes={least} must be from 1 to --processes={options.processes}"
        )
    run = options.run or own_run(words)
    plan = Plan(
        run=Path(run) if run else None,
        tries=options.tries,
        patience=options.patience,
        healthy_seconds=options.healthy_seconds,
        pause=options.pause,
        longest_pause=options.longest_pause,
        processes=options.processes,
        min_processes=least,
    )
    status = Supervisor(plan, words).supervise()
    if status:
        raise SystemExit(status if status > 0 else 128 - status)


def split(parser: cli.Parser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the command behind `--`."""
    if "--" not in argv:
        if "-h" in argv or "--help" in argv:
            parser.parse_args(argv)
        raise ConfigError(
            "llm-jax supervise: put the command behind --, as in `llm-jax supervise -- llm-jax pretrain CONFIG`"
        )
    at = argv.index("--")
    if not argv[at + 1 :]:
        raise ConfigError("llm-jax supervise: there is no command behind --")
    return parser.parse_args(argv[:at]), argv[at + 1 :]


def own_run(words: list[str]) -> str:
    """What the command's own --run says."""
    for at, word in enumerate(words):
        if word.startswith("--run="):
            return word.removeprefix("--run=")
        if word == "--run" and at + 1 < len(words):
            return words[at + 1]
    return ""


if __name__ == "__main__":
    cli.leave(cli.run(main))
