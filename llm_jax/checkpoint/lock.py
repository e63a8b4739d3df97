"""One writer per run folder: `with RunLock(folder):` around everything that writes into it.

`run.lock` names the owner (host, process, since when) and is touched every few seconds. A lock is taken over

- at once, when its process is known to be dead (same machine), as after `kill -9`;
- when it was not touched for `STALE_SECONDS` (another machine: a preempted host comes back under a new name);
- on request, with `take_over=True`; an owner that still lives notices, and `check()` fails there.
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from llm_jax.checkpoint.processes import all_say, first_says, is_first
from llm_jax.errors import CheckpointError, UnavailableError

HEARTBEAT_SECONDS = 10
STALE_SECONDS = 300  # 30 missed heartbeats; a slow network filesystem misses a few

_log = logging.getLogger(__name__)


class RunLock:
    """The right to write into a run folder. All processes of a run enter it; process 0 holds the file."""

    def __init__(self, folder: str | os.PathLike[str], take_over: bool = False) -> None:
        """`take_over` ignores an owner that seems alive. Nothing happens before `acquire` or `with`."""
        self.folder = Path(folder)
        self._path = self.folder / "run.lock"
        self._take_over = take_over
        self._token = secrets.token_hex(8)
        self._held = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)

    def acquire(self) -> None:
        """Takes the lock. Raises CheckpointError naming the owner if somebody else has it."""
        problem: CheckpointError | None = None
        if is_first():
            try:
                self._claim()
            except CheckpointError as error:
                problem = error
        if not first_says(problem is None):
            raise problem or UnavailableError(
                f"{self.folder}: process 0 could not lock the run folder; see its message"
            )
        self._held = True
        if is_first():
            self._thread.start()

    def release(self) -> None:
        """Gives the lock back; safe to call twice, and when it was lost."""
        if not self._held:
            return
        self._held = False
        self._stop.set()
        if is_first():
            self._thread.join()
            if _read(self._path).get("token") == self._token:
                self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises CheckpointError on every process if the lock is not held, or was taken over."""
        mine = self._held and (not is_first() or _read(self._path).get("token") == self._token)
        if not all_say(mine):
            raise CheckpointError(
                f"{self.folder}: this process does not hold the lock of the run folder (another one took it "
                "over?); two writers would destroy each other's checkpoints, so this one stops"
            )

    def __enter__(self) -> "RunLock":
        """Acquires the lock."""
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Releases the lock."""
        self.release()

    def _claim(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: cannot be made a run folder: {error.strerror}"
            ) from None
        with _one_at_a_time(self.folder):
            if self._path.exists():
                owner = _read(self._path)
                age = _age(self._path)
                who = (
                    f"process {owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('since', '?')}"
                    f" (last sign of life {age:.0f} s ago)"
                )
                reason = _gone(owner, age) or (
                    "taking over was asked for" if self._take_over else ""
                )
                if not reason:
                    # of another machine, it may be dead all the same: time will tell
                    elsewhere = owner.get("machine") != _machine()
                    raise (UnavailableError if elsewhere else CheckpointError)(
                        f"{self.folder} is in use by {who}; wait for it, use another folder, or, "
                        "if you know that it is dead, pass --take-over"
                    )
                _log.warning("%s: taking over the lock of %s: %s", self.folder, who, reason)
                self._path.unlink()
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            with open(os.open(self._path, flags, 0o644), "w", encoding="utf-8") as file:
                json.dump({**_myself(), "token": self._token}, file, indent=2)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                if _read(self._path).get("token") != self._token:
                    _log.error(
                        "%s: the lock was taken over; saving will stop this process", self.folder
                    )
                    return
                os.utime(self._path)
            except OSError as error:  # a hiccup of the filesystem: the next beat tries again
                _log.warning("%s: could not touch the lock: %s", self.folder, error)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Serialises judging and replacing a stale lock. The kernel lets go of it when a process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a filesystem without flock: O_EXCL alone must do
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    """The owner's entry; empty if the file is gone or half-written."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _age(path: Path) -> float:
    """Seconds since the last heartbeat, by the clock of the filesystem, which all machines share."""
    with tempfile.TemporaryFile(dir=path.parent) as probe:
        return max(0.0, os.fstat(probe.fileno()).st_mtime - path.stat().st_mtime)


def _gone(owner: dict[str, Any], age: float) -> str:
    """Why the owner can be taken for dead; empty if it cannot."""
    if owner.get("machine") == _machine():
        running = _started(owner["pid"])
        # the start time tells a process from a later one that got the same number
        return "" if running and running == owner.get("started") else "that process is dead"
    return f"no sign of life for {age:.0f} s" if age > STALE_SECONDS else ""


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": _machine(),
        "started": _started(os.getpid()),
    }


def _machine() -> str:
    """Where process numbers mean the same: one boot of one host, one container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _started(pid: int) -> str:
    """When the process started, in the kernel's ticks; empty if it is not running (a zombie is not)."""
    try:
        # the name, in brackets, may hold spaces; then state (field 3) ... start time (field 22)
        fields = (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()
        )
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "running"
