"""A model on its own, in the layout of a checkpoint: what import and conversion write.

MODEL/  meta.json  state/  tokenizer/
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.checkpoint import arrays
from llm_jax.checkpoint.fingerprint import PendingFingerprints, named_leaves
from llm_jax.checkpoint.new_folder import FULL, ROOM, making
from llm_jax.checkpoint.processes import all_say, is_first
from llm_jax.checkpoint.reading import brief
from llm_jax.checkpoint.record import (
    add_fingerprints,
    check_meta,
    describe_arrays,
    write_record,
    write_tokenizer,
)
from llm_jax.errors import CheckpointError, ConfigError

MEMORY = 256 << 20  # bytes that saving may hold beside the parameters; nothing else runs meanwhile


def save_model(
    folder: str | os.PathLike[str],
    params: Any,
    meta: Mapping[str, Any],
    tokenizer_files: Mapping[str, bytes],
) -> None:
    """Writes parameters alone as a new folder of the same layout, for a model that was not trained here.

    Raises CheckpointError if the folder exists or cannot be written; then nothing is left behind.
    """
    final = Path(folder).absolute()
    check_meta(meta)
    try:
        with making(final) as partial:
            write_model(partial, final, params, meta, tokenizer_files)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def write_model(
    partial: Path,
    final: Path,
    params: Any,
    meta: Mapping[str, Any],
    tokenizer_files: Mapping[str, bytes],
) -> None:
    """The same, as `partial` inside `making(final)`. All processes call it.

    Raises CheckpointError, which names `final`, if something cannot be written; what is there stays.
    """
    check_meta(meta)
    leaves = named_leaves({"params": params})
    pending = PendingFingerprints(leaves)
    largest = max((leaf.nbytes for leaf in leaves.values()), default=0)
    try:
        arrays.start_writing(partial, leaves, memory=max(largest + 1, MEMORY)).result()
        if is_first():
            write_tokenizer(partial, tokenizer_files)
            described = add_fingerprints(describe_arrays(leaves), pending.result())
            write_record(partial, meta, 0, described, {})
        all_say(True)
    except Exception as error:
        raise CheckpointError(f"{final} could not be written: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What went wrong and what to do; the system's own words where a page about the array quotes them."""
    first = brief(error)
    code = re.search(r"(?:os_error_code='|\[Errno )(\d+)", f"{error} {first}")
    if code is None:
        return f"{first}; check the disk and try again"
    number = int(code[1])
    remedy = ROOM if number in FULL else "check the disk and the permissions"
    return f"{os.strerror(number)}; {remedy}"
