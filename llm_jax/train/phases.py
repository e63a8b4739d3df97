"""What a session spends its time on: one phase at a time, added up.

    init compile data step eval sample save

`data` is waiting for a batch, `step` everything else of a training step, `save` what the loop waits for when
a checkpoint is due. The sums are written with every checkpoint, so that a crash loses no more of them than of
the run; `llm-jax report` makes the goodput ledger of them.
"""

import time


class Phases:
    """The phase of now and the seconds of all."""

    def __init__(self) -> None:
        self.now = "init"
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """Ends the phase of now and begins `phase`; again, if it is the same: a sign of life."""
        now = time.perf_counter()
        self._seconds[self.now] = self._seconds.get(self.now, 0.0) + now - self._since
        self.now, self._since = phase, now

    def idle(self) -> float:
        """Seconds since a phase was entered."""
        return time.perf_counter() - self._since

    def totals(self) -> dict[str, float]:
        """Seconds of each phase so far, in order of their first time; rounded to milliseconds."""
        self.enter(self.now)
        return {name: round(seconds, 3) for name, seconds in self._seconds.items()}
