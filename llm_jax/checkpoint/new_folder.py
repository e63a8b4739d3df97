"""A new folder that appears whole or not at all: made under a name of its own beside its place, then renamed.

The work lies in `OUT.unfinished-RANDOM/`, with whatever a storage library puts beside what it writes. So
nothing is removed that this run did not make, and two runs with one OUT do not meet before the rename.
"""

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from llm_jax.checkpoint.processes import all_say, first_says, highest, is_first
from llm_jax.checkpoint.record import sync_folder
from llm_jax.errors import CheckpointError, ConfigError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ROOM = "free space on the disk, or raise the quota or the limit of file sizes (ulimit -f)"
LONGEST_NAME = 255  # bytes, of every common filesystem
SHOWN_NAME = 40  # characters of OUT's name in that of the work: at most 160 bytes
SWEEP_SECONDS = 20.0
QUIET_SECONDS = 0.5  # without a file coming back, before the writers count as stopped


@contextlib.contextmanager
def making(out: Path) -> Iterator[Path]:
    """A place to make the folder in: renamed to `out` at the end, or removed. All processes enter it.

    Raises:
      ConfigError: `out` is there already, or cannot be made; CheckpointError: the disk is full.
    """
    out = out.absolute()
    check_new(out)
    work = out.with_name(f"{out.name[:SHOWN_NAME]}.unfinished-{_token()}")
    parents: list[Path] = []
    try:
        if is_first():
            parents = _make(work)
        all_say(True)
        yield work / "model"
        all_say(True)
        if is_first():
            _put(work / "model", out)
            os.rmdir(work)
    except BaseException as error:
        if is_first():
            _remove(work)
            for parent in parents:
                with contextlib.suppress(OSError):  # another run put something into it
                    os.rmdir(parent)
        if isinstance(error, OSError) and error.errno in FULL:
            raise CheckpointError(
                f"{out} could not be written: {error.strerror}; {ROOM}"
            ) from error
        raise


def check_new(out: Path) -> None:
    """Raises ConfigError if `out` is there already or cannot be made. All processes call it."""
    problem = _problem(out.absolute()) if is_first() else ""
    if not first_says(not problem):
        raise ConfigError(problem or f"{out} cannot be made; see the message of process 0")


def _problem(out: Path) -> str:
    """Why a new folder cannot be made there; empty if it can."""
    if "\0" in str(out):
        return f"{str(out)!r} cannot be made: a path holds no NUL character; choose another folder"
    long = [part for part in out.parts if len(os.fsencode(part)) > LONGEST_NAME]
    if long:
        size = len(os.fsencode(long[0]))
        return (
            f"{long[0][:SHOWN_NAME]}... cannot be made: a name of {size} bytes is longer than "
            f"{LONGEST_NAME}; choose a shorter one"
        )
    if os.path.lexists(out):
        link = " as a link that leads nowhere" if not out.exists() else ""
        return f"{out} exists already{link}; choose another folder, or remove it first"
    above = next(place for place in out.parents if os.path.lexists(place))
    if not above.is_dir():
        return f"{out} cannot be made: {above} is no folder; choose another place"
    if not os.access(above, os.W_OK | os.X_OK):
        return f"{out} cannot be made: no permission to write into {above}; choose another place"
    return ""


def _token() -> str:
    """The same random word on all processes."""
    return f"{highest(secrets.randbits(31) if is_first() else 0):08x}"


def _make(work: Path) -> list[Path]:
    """Makes the folder; returns the parents that were not there, the deepest first."""
    missing = [place for place in work.parents if not place.exists()]
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        os.mkdir(work)
    except OSError as error:
        for parent in missing:
            with contextlib.suppress(OSError):
                os.rmdir(parent)
        if error.errno in FULL:
            raise
        raise ConfigError(
            f"{work.parent} cannot be written into: {error.strerror}; choose another place"
        ) from None
    return missing


def _put(made: Path, out: Path) -> None:
    """A rename onto a folder with something in it, or onto a file, fails: nothing is overwritten."""
    try:
        os.rename(made, out)
    except OSError as error:
        if not os.path.lexists(out):
            raise
        raise ConfigError(
            f"{out} was made by another program in the meantime ({error.strerror}); it was left as it is; "
            "choose another folder"
        ) from None
    sync_folder(out.parent)


def _remove(work: Path) -> None:
    """Removes the work and what threads of a failed write still put there, until nothing comes back."""
    with contextlib.suppress(OSError):
        os.rmdir(work)
        return
    end, quiet = time.monotonic() + SWEEP_SECONDS, time.monotonic()
    while (now := time.monotonic()) < end and now - quiet < QUIET_SECONDS:
        if os.path.lexists(work):
            shutil.rmtree(work, ignore_errors=True)
            quiet = time.monotonic()
        time.sleep(0.05)
