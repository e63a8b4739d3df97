"""A thread that ends a process which makes no progress: stacks of all threads first, then an exit status of
its own, so that a supervisor starts the run again.

A hang is silent: a dead link inside a collective, a disk that never answers, a deadlock in a library.
"""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_jax.train.phases import Phases

HUNG = 75  # exit status EX_TEMPFAIL: the same command may succeed
QUICK = ("data", "step")  # phases of every step; the others take longer
LOOKS = 10  # times that the thread looks within the limit


class Watchdog:
    """`with Watchdog(...):` around training. Without limits, nothing.

    Args:
      phases: which `train.run` keeps up to date.
      file: where the stacks go, besides stderr.
      seconds: that a step, its batch included, may take; 0: no watchdog.
      slow_seconds: that a compile, an evaluation, a sample, a save or the start may take.
      tell: called with a line about the hang before the process ends.
    """

    def __init__(
        self,
        phases: Phases,
        file: Path,
        seconds: float,
        slow_seconds: float,
        tell: Callable[[str], Any],
    ) -> None:
        self._phases, self._file, self._tell = phases, file, tell
        self._limits = (seconds, slow_seconds)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._limits[0]:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        quick, slow = self._limits
        while not self._stop.wait(min(self._limits) / LOOKS):
            # of C, for a thread that holds the interpreter and never lets go: this one cannot run then
            faulthandler.dump_traceback_later(2 * max(quick, slow), exit=True)
            phase, idle = self._phases.now, self._phases.idle()
            limit = quick if phase in QUICK else slow
            if idle > limit:
                self._bark(f"no progress in phase {phase!r} for {idle:.0f} s (limit {limit:g} s)")

    def _bark(self, told: str) -> None:
        try:
            with self._file.open("w", encoding="utf-8") as file:
                file.write(f"{told}\n")
                file.flush()  # the stacks are written below Python
                faulthandler.dump_traceback(file, all_threads=True)
            self._tell(told)
        except OSError as error:  # the disk may be what hangs
            sys.stderr.write(f"{self._file}: {error.strerror}\n")
        sys.stderr.write(f"watchdog: {told}; stacks of all threads, also in {self._file}:\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        os._exit(HUNG)
