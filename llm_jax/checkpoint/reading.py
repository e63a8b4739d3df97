"""Reads checkpoint folders and trusts nothing: files, names, shapes, dtypes and every value are checked."""

import difflib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from llm_jax.checkpoint import arrays
from llm_jax.checkpoint.fingerprint import PendingFingerprints, differences, named_leaves
from llm_jax.checkpoint.processes import all_say, highest, is_first
from llm_jax.checkpoint.record import TOKENIZER, DamagedError, damaged_files, read_meta
from llm_jax.errors import CheckpointError

_log = logging.getLogger(__name__)

_SHOWN = 3  # names in a one-line message


def read_state(
    checkpoint: str | os.PathLike[str], abstract: Any, *, whole: bool = True
) -> tuple[Any, dict[str, Any]]:
    """The arrays of a checkpoint folder as the pytree `abstract`, and its record. All processes call it.

    Args:
      checkpoint: a folder with a `meta.json`.
      abstract: pytree of `jax.ShapeDtypeStruct`; each array comes back on its sharding (one device if
        it has none), whatever mesh it was saved from.
      whole: whether the checkpoint may hold nothing else.

    Raises:
      DamagedError: a file or an array is not what was saved; both are named.
      CheckpointError: the arrays are not those of `abstract`, or cannot be read now.
    """
    folder = Path(checkpoint)
    record = read_meta(folder)
    problems = damaged_files(folder, record) if is_first() else []
    if not all_say(not problems):
        raise DamagedError(_shown(problems) or f"{folder}: process 0 found damaged files")
    wanted = {name: _placed(leaf) for name, leaf in named_leaves(abstract).items()}
    _require_same_arrays(folder, record["arrays"], wanted, whole)
    found = _load(folder, wanted)
    expected = {name: record["arrays"][name]["fingerprint"] for name in wanted}
    changed = differences(expected, PendingFingerprints(found).result())
    if changed:
        raise DamagedError(
            f"{folder}: values of {_shown(changed)} are not those saved (fingerprint differs)"
        )
    leaves = [found[name] for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves), record


def restore_params(
    checkpoint: str | os.PathLike[str], abstract_params: Any
) -> tuple[Any, dict[str, Any]]:
    """Only the parameters of a checkpoint or imported model, verified, and its record.

    Raises as `read_state`; shapes and dtypes must be those saved (cast afterwards).
    """
    state, record = read_state(checkpoint, {"params": abstract_params}, whole=False)
    return state["params"], record


def tokenizer_folder(checkpoint: str | os.PathLike[str]) -> Path:
    """Where the tokenizer files of a checkpoint lie. Raises CheckpointError if it has none."""
    folder = Path(checkpoint) / TOKENIZER
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is missing: the checkpoint was saved without tokenizer files"
        )
    return folder


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of checking one item of a checkpoint."""

    item: str  # `meta.json`, `files`, or the name of an array
    problem: str  # empty if the item is what was saved


def inspect(checkpoint: str | os.PathLike[str]) -> Iterator[Finding]:
    """Checks a checkpoint without a model: its record, its files, then array by array.

    Memory stays at the size of the largest array. Raises CheckpointError only if there is no record to
    check against.
    """
    folder = Path(checkpoint)
    record = read_meta(folder)
    yield Finding(item="meta.json", problem="")
    problems = damaged_files(folder, record)
    yield from (Finding(item="files", problem=problem) for problem in problems)
    if not problems:
        yield Finding(item="files", problem="")
    for name, saved in record["arrays"].items():
        yield Finding(item=name, problem=_array_problem(folder, name, saved))


def _array_problem(folder: Path, name: str, saved: Mapping[str, Any]) -> str:
    wanted = {name: _placed(jax.ShapeDtypeStruct(tuple(saved["shape"]), _dtype(saved["dtype"])))}
    try:
        actual = PendingFingerprints(_load(folder, wanted)).result()[name]
    except CheckpointError as error:
        return str(error).removeprefix(f"{folder}: ")
    if actual != saved["fingerprint"]:
        return f"fingerprint is {actual}, {saved['fingerprint']} was saved"
    return ""


def _dtype(name: str) -> Any:
    """The dtype written as `name`; of typed random keys too: `key<fry>`."""
    if not name.startswith("key<"):
        return jax.numpy.dtype(name)
    tag = name[4:-1]
    long = {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}
    return jax.eval_shape(lambda: jax.random.key(0, impl=long[tag])).dtype


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    if leaf.sharding is not None:
        return leaf
    if jax.process_count() > 1:
        raise ValueError("abstract arrays need a sharding when there are several processes")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)


def _require_same_arrays(
    folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct], whole: bool
) -> None:
    """Orbax would convert a dtype silently and name a missing array in its own way."""
    remedy = "use the config it was saved with (its meta.json), or another run folder"
    missing = sorted(wanted.keys() - saved.keys())
    if missing:
        close = difflib.get_close_matches(missing[0], saved.keys(), n=1)
        hint = f" (it has {close[0]})" if close else ""
        raise CheckpointError(f"{folder} has no {_shown(missing)}{hint}; {remedy}")
    extra = sorted(saved.keys() - wanted.keys())
    if whole and extra:
        raise CheckpointError(
            f"{folder} holds {_shown(extra)}, which this config does not have; {remedy}"
        )
    for name, leaf in wanted.items():
        here = f"{leaf.dtype}{list(leaf.shape)}"
        there = f"{saved[name]['dtype']}{saved[name]['shape']}"
        if here != there:
            raise CheckpointError(
                f"{folder}: {name} is {there} there but {here} in this config; {remedy}"
            )


def _load(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Loads, and tells evidence of damage from what cannot be done now (memory, permission).

    A process that meets damage alone leaves the others waiting inside Orbax until its barrier times
    out (measured: 5 minutes); then all of them agree here, so that none goes another way.
    """
    found: dict[str, jax.Array] = {}
    failure: Exception | None = None
    try:
        found = arrays.load(folder, wanted)
    except Exception as error:  # whatever a storage library raises
        failure = error
    whole, unreadable, damaged = 0, 1, 2
    mine, reason = whole, "another process found it, see its log"
    if failure:
        # tensorstore's word for contents that fail their checksum
        mine = (
            damaged if any("DATA_LOSS" in str(error) for error in _chain(failure)) else unreadable
        )
    verdict = highest(mine)
    if failure and mine == verdict:
        reason = brief(failure)
        if not is_first():
            _log.error("%s: %s", folder, reason)
    if verdict == damaged:
        raise DamagedError(f"{folder}: array data is damaged: {reason}") from failure
    if verdict == unreadable:
        raise CheckpointError(
            f"{folder} cannot be read, though its files are whole: {reason}; check memory, disk and "
            "permissions, then try again, or choose an older one with --step"
        ) from failure
    return found


def brief(error: BaseException) -> str:
    """The first cause of an exception in one line of bearable length; storage libraries write pages."""
    cause = _chain(error)[-1]
    text = " ".join(f"{type(cause).__name__}: {cause}".split())
    # both ends: what was done stands at the start, why it failed at the end, long paths between
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-175:]}"


def _chain(error: BaseException) -> list[BaseException]:
    """An exception, what it was raised from, and so on."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return chain


def _shown(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
