"""What every worker process of this package does first. No jax here."""

import os
import signal
import threading
import time


def die_with_parent() -> None:
    """Ends this process within a second of its parent's death.

    SIGKILL of the main process leaves spawned workers, and their shared memory, behind for good
    (measured with Grain 0.2.18: two orphans of 217 MB each).
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()
