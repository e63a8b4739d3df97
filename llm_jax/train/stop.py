"""Asking a run to stop or to save, from outside: signals and a file."""

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)

SECONDS_TO_LEAVE = (
    5.0  # after the second request to stop; what is half-written is cleared at the next start
)
STOPPED = 130  # exit status, as of any command ended by Ctrl-C
AGREE_EVERY_STEPS = 10  # several processes ask each other this often whether a save is wanted


class StopRequest:
    """SIGTERM and Ctrl-C finish the step, save and end the run; a second one ends it at once.

    SIGUSR1, or a file `save` in the run folder, asks for a save without stopping.

    With several processes the answer must be the same on all of them at the same step. A stop then
    goes through JAX's preemption notice, which agrees on a step (it needs `jax.distributed`; it takes
    SIGTERM itself, Ctrl-C is passed on to it). A save waits for the next `AGREE_EVERY_STEPS`.
    """

    def __init__(self, folder: Path):
        self.save_file = folder / "save"
        self.stop = False
        self.save = False
        self.several = jax.process_count() > 1
        self.polls = 0  # of all processes alike: what they agree on is one of them, not a step
        self.agreed = False
        self.previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        # only the main thread may set handlers; a run inside a test thread goes without
        if threading.current_thread() is threading.main_thread():
            signals = [signal.SIGINT, signal.SIGUSR1] + ([] if self.several else [signal.SIGTERM])
            for number in signals:
                self.previous[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def receive(self, number: int, _: FrameType | None) -> None:
        """The signal handler: sets a flag that the loop reads between steps."""
        if number == signal.SIGUSR1:
            self.save = True
            return
        if self.stop:
            # a save, or a library interrupted half-way, may never let go of the way out
            way_out = threading.Timer(SECONDS_TO_LEAVE, os._exit, (STOPPED,))
            way_out.daemon = True
            way_out.start()
            raise KeyboardInterrupt
        self.stop = True
        if self.several:
            signal.raise_signal(signal.SIGTERM)
        log.warning("stopping after this step, with a checkpoint; once more to stop at once")

    def should_stop(self, step: int) -> bool:
        """True once the run was asked to stop; the same on every process. For any moment of a step."""
        if self.several and not self.agreed:
            self.polls += 1
            self.agreed = multihost_utils.reached_preemption_sync_point(self.polls)
        return self.agreed if self.several else self.stop

    def should_save(self, step: int) -> bool:
        """True once after every request to save, on every process, whichever was asked."""
        if self.several and step % AGREE_EVERY_STEPS:
            return False
        if jax.process_index() == 0 and self.save_file.exists():
            self.save_file.unlink()
            self.save = True
        asked, self.save = self.save, False
        if self.several:
            asked = bool(multihost_utils.process_allgather(np.int32(asked)).any())
        return asked
