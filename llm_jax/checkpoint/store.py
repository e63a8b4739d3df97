"""Checkpoints of a run: saved while training goes on, verified when read, with a bad one stepped over.

A save: 1. the devices start computing fingerprints and Orbax takes the values (the step waits for no
more than that); 2. a thread writes `<step>.partial`, then tokenizer files and `meta.json`, and makes
them durable; 3. one rename to `<step>` makes the checkpoint exist; 4. old ones beyond the retention go.

In the folder, the order of the numbers is the order of time: what is newer than the step a run
resumes from is set aside, so "newest" always means newest.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from llm_jax.checkpoint import arrays
from llm_jax.checkpoint.fingerprint import PendingFingerprints, named_leaves
from llm_jax.checkpoint.lock import RunLock
from llm_jax.checkpoint.processes import all_say, first_says, is_first
from llm_jax.checkpoint.reading import brief, read_state
from llm_jax.checkpoint.record import (
    DamagedError,
    add_fingerprints,
    check_meta,
    describe_arrays,
    read_meta,
    rewrite_record,
    sync_folder,
    write_record,
    write_tokenizer,
)
from llm_jax.checkpoint.run_folder import numbered_folders
from llm_jax.config import nearest
from llm_jax.errors import CheckpointError, ConfigError

SWEEP_SECONDS = (
    0.5  # Orbax does not wait for its other writes when one fails (measured: 10 to 100 ms)
)
FAILURES_BEFORE_STOPPING = 3  # a full disk may be emptied while training goes on

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved and which stay."""

    save_every_steps: int = 500  # steps between saves; what a crash may cost
    keep_last: int = (
        3  # newest checkpoints that stay; 2 or more, so that a bad one can be stepped over
    )
    keep_best: int = 1  # checkpoints with the smallest `best_metric` that stay as well
    best_metric: str = "loss"  # name among the metrics given when saving; smaller is better

    def __post_init__(self) -> None:
        """Checks the values."""
        for name, least in (("save_every_steps", 1), ("keep_last", 1), ("keep_best", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"checkpoint.{name}={getattr(self, name)} must be at least {least}"
                )


@dataclass(kw_only=True)
class _Save:
    """A save on its way: everything the writing thread needs, and how it ended."""

    step: int
    meta: Mapping[str, Any]
    metrics: Mapping[str, float]
    tokenizer_files: Mapping[str, bytes]
    arrays: dict[str, dict[str, Any]]
    fingerprints: PendingFingerprints
    writing: Any = None
    thread: threading.Thread | None = None
    error: BaseException | None = None


class Store:
    """The checkpoints of one run, open for writing. All processes make the same calls in the same order.

    Use it in a `with` block, or call `close()`: writing threads die with the interpreter.
    """

    def __init__(
        self, folder: str | os.PathLike[str], config: CheckpointConfig, *, lock: RunLock
    ) -> None:
        """Opens `RUN/checkpoints` and clears what a killed process left there.

        Raises CheckpointError if `lock`, that of the run folder, is not held.
        """
        self.folder = Path(folder).absolute()
        self._config = config
        self._lock = lock
        self._current: _Save | None = None
        self._failures = 0
        self._last_error = ""
        self._warned_about_best = False
        lock.check()
        if is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear_debris()
        all_say(True)

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a save after `step` steps."""
        return step > 0 and step % self._config.save_every_steps == 0

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending; `restore` finds out which are good."""
        return numbered_folders(self.folder)  # one that lost its record is damaged, not absent

    def save(
        self,
        step: int,
        state: Any,
        meta: Mapping[str, Any],
        tokenizer_files: Mapping[str, bytes],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts saving and returns; waits only for the save before this one, if it is still going.

        `state` is a pytree of arrays with the parameters under `params`; its buffers may be donated
        afterwards. `meta` (JSON values) comes back from `restore`. A step that is there already stays if
        its arrays are equal, and is replaced if not. A failed save is reported and training goes on.

        Raises:
          CheckpointError: the third save in a row failed, or another process took the run over.
        """
        self.wait()
        self._lock.check()
        check_meta(meta)
        self._check_best_metric(metrics or {})
        leaves = named_leaves(state)
        save = _Save(
            step=step,
            meta=dict(meta),
            metrics=dict(metrics or {}),
            tokenizer_files=dict(tokenizer_files),
            arrays=describe_arrays(leaves),
            fingerprints=PendingFingerprints(leaves),
        )
        if self._is_saved(save):
            self._failures, self._last_error = 0, ""
            return
        problem = self._no_room(sum(leaf.nbytes for leaf in leaves.values())) if is_first() else ""
        if not first_says(not problem):
            self._failed(step, problem or "process 0 has not enough disk space")
            return
        if is_first():
            self._remove(self.folder.glob("*.partial*"))
        all_say(True)
        save.writing = arrays.start_writing(self._partial(step), leaves)
        save.thread = threading.Thread(target=self._finish, args=(save,), name="checkpoint")
        self._current = save
        save.thread.start()

    def wait(self) -> None:
        """Waits for the save that is on its way. Raises CheckpointError if it is the third that failed."""
        save, self._current = self._current, None
        if save is None:
            return
        assert save.thread is not None
        save.thread.join()
        if all_say(save.error is None):
            self._failures, self._last_error = 0, ""
            return
        if is_first():
            self._remove(self.folder.glob(f"{save.step}.partial*"))
        self._failed(save.step, brief(save.error) if save.error else "it failed on another process")

    def close(self) -> None:
        """Waits for the last save. Raises CheckpointError if it failed: the end of the run is not saved."""
        try:
            self.wait()
        finally:
            self._sweep()
        if self._last_error:
            raise CheckpointError(
                f"{self.folder}: the last checkpoint is missing: {self._last_error}"
            )

    def __enter__(self) -> "Store":
        """The store itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes; when the block failed, the save on its way is finished without asking the others.

        They may be in the middle of a step, waiting for this process: a question would never be answered.
        """
        if error is None:
            self.close()
            return
        save, self._current = self._current, None
        if save and save.thread:
            save.thread.join()
            if save.error:
                self._last_error = f"step {save.step} could not be saved: {brief(save.error)}"
                _log.error("%s: %s", self.folder, self._last_error)
        self._sweep()

    def restore(self, abstract_state: Any, step: int = -1) -> tuple[Any, dict[str, Any]]:
        """The newest good state (or that of `step`) on the shardings of `abstract_state`, and its record.

        A damaged checkpoint is reported, renamed to `<step>.corrupt`, and the one before is used. With
        `step`, newer checkpoints are renamed to `<step>.abandoned`: the run goes on from there. What a
        state consists of may depend on the step: `abstract_state` is then a function of it.

        Raises:
          CheckpointError: none is good, there is no such step, or the arrays are not those of the config.
        """
        self.wait()
        steps = self.steps()
        if step >= 0 and step not in steps:
            raise CheckpointError(
                f"{self.folder} has no step {step}; it has {', '.join(map(str, steps)) or 'none'}"
            )
        damaged: dict[int, str] = {}
        for candidate in [step] if step >= 0 else reversed(steps):
            try:
                wanted = abstract_state(candidate) if callable(abstract_state) else abstract_state
                state, record = read_state(self.folder / str(candidate), wanted)
            except DamagedError as error:
                damaged[candidate] = str(error)
                continue
            for bad, reason in damaged.items():
                self._set_aside(bad, "corrupt", f"is damaged and was stepped over: {reason}")
            for newer in self.steps():
                if newer > candidate:
                    self._set_aside(
                        newer, "abandoned", f"is newer than step {candidate}, where the run goes on"
                    )
            all_say(True)
            return state, record
        if not damaged:
            raise CheckpointError(f"{self.folder} has no checkpoint to restore")
        reasons = "; ".join(damaged.values())
        remedy = "restore a copy, or start a new run"
        if damaged.keys() < set(steps):
            remedy = "leave --step out to go on from the newest good one"
        raise CheckpointError(f"no good checkpoint in {self.folder}: {reasons}; {remedy}")

    def _partial(self, step: int) -> Path:
        return self.folder / f"{step}.partial"

    def _is_saved(self, save: _Save) -> bool:
        """Whether the step is there with the same values; then its metrics are brought up to date."""
        folder = self.folder / str(save.step)
        if not first_says(folder.exists()):
            return False
        actual = add_fingerprints(save.arrays, save.fingerprints.result())
        same = False
        if is_first():
            try:
                record = read_meta(folder)
                same = record["arrays"] == actual
                if same and save.metrics:
                    rewrite_record(
                        folder, {**record, "metrics": {**record["metrics"], **save.metrics}}
                    )
            except (CheckpointError, OSError) as error:
                _log.warning("%s", brief(error))
        same = first_says(same)
        if is_first() and not same:
            _log.warning("step %d was saved before with other values; it is replaced", save.step)
        return same

    def _check_best_metric(self, metrics: Mapping[str, float]) -> None:
        name = self._config.best_metric
        if (
            self._config.keep_best
            and metrics
            and name not in metrics
            and not self._warned_about_best
        ):
            self._warned_about_best = True
            hint = nearest(name, list(metrics))
            _log.warning(
                "checkpoint.best_metric=%r is not among the metrics, so none is best; %s",
                name,
                hint,
            )

    def _no_room(self, size: int) -> str:
        """Why a save of `size` bytes would not fit on the disk; empty if it does."""
        needed, free = int(1.2 * size), shutil.disk_usage(self.folder).free
        if free >= needed:
            return ""
        return (
            f"{free / 1e6:.0f} MB free on the disk, {needed / 1e6:.0f} MB needed; free some space"
        )

    def _finish(self, save: _Save) -> None:
        """The writing thread. No collectives here: they would mix with those of the training step."""
        try:
            save.writing.result()  # on process 0 this waits for all processes
            if is_first():
                partial = self._partial(save.step)
                write_tokenizer(partial, save.tokenizer_files)
                write_record(
                    partial,
                    save.meta,
                    save.step,
                    add_fingerprints(save.arrays, save.fingerprints.result()),
                    save.metrics,
                )
                self._commit(save.step)
                self._remove(self.folder / str(step) for step in self._superfluous())
        except BaseException as error:  # reported by wait(), in the thread that trains
            save.error = error

    def _commit(self, step: int) -> None:
        final, old = self.folder / str(step), self.folder / f"{step}.replaced"
        if final.exists():
            os.rename(final, old)
        os.rename(self._partial(step), final)
        sync_folder(self.folder)
        self._remove([old])

    def _superfluous(self) -> list[int]:
        """Steps that neither the newest nor the best need."""
        steps = self.steps()
        values: dict[int, float] = {}
        for step in steps if self._config.keep_best else []:
            try:
                value = read_meta(self.folder / str(step))["metrics"].get(self._config.best_metric)
            except CheckpointError:  # damaged: it cannot be the best
                continue
            if value is not None:
                values[step] = value
        best = sorted(values, key=lambda step: (values[step], -step))[: self._config.keep_best]
        return [step for step in steps[: -self._config.keep_last] if step not in best]

    def _failed(self, step: int, reason: str) -> None:
        self._failures += 1
        self._last_error = f"step {step} could not be saved: {reason}"
        if self._failures >= FAILURES_BEFORE_STOPPING:
            raise CheckpointError(
                f"{self.folder}: {self._failures} saves in a row failed; {self._last_error}"
            )
        newest = self.steps()[-1:]
        _log.error(
            "%s: %s. Training goes on; newest good checkpoint: %s. Failure %d in a row, number %d stops the run.",
            *(self.folder, self._last_error, newest[0] if newest else "none", self._failures),
            FAILURES_BEFORE_STOPPING,
        )

    def _set_aside(self, step: int, kind: str, reason: str) -> None:
        """Renames a checkpoint so that it is neither used nor deleted. Process 0."""
        if not is_first():
            return
        target = self.folder / f"{step}.{kind}"
        number = 2
        while target.exists():
            target, number = self.folder / f"{step}.{kind}-{number}", number + 1
        os.rename(self.folder / str(step), target)
        _log.warning("checkpoint %d %s; kept as %s", step, reason, target.name)

    def _sweep(self) -> None:
        """Removes what other threads of a failed save wrote after it had been cleared away."""
        deadline = time.monotonic() + SWEEP_SECONDS
        while self._last_error and is_first() and time.monotonic() < deadline:
            self._remove(self.folder.glob("*.partial*"))
            time.sleep(0.05)

    def _clear_debris(self) -> None:
        for old in self.folder.glob("*.replaced"):  # killed between the two renames of `_commit`
            if not old.with_suffix("").exists():
                os.rename(old, old.with_suffix(""))
        patterns = ("*.replaced", "*.partial", "*.deleted", arrays.TEMPORARY)
        self._remove(path for pattern in patterns for path in self.folder.glob(pattern))

    def _remove(self, folders: Any) -> None:
        """Deletes checkpoint folders; renamed first, so that a half-deleted one never looks whole."""
        for folder in list(folders):
            if not folder.exists():
                continue
            doomed = (
                folder
                if folder.suffix == ".deleted"
                else folder.with_name(f"{folder.name}.deleted")
            )
            if doomed != folder:
                shutil.rmtree(doomed, ignore_errors=True)
                os.rename(folder, doomed)
            shutil.rmtree(
                doomed, ignore_errors=True
            )  # what stays is cleared when the store opens next
