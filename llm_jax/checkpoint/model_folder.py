"""A model on its own, in the layout of a checkpoint: what import and conversion write.

MODEL/  meta.json  state/  tokenizer/
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.checkpoint import arrays
from llm_jax.checkpoint.fingerprint import PendingFingerprints, named_leaves
from llm_jax.checkpoint.processes import all_say, first_says, is_first
from llm_jax.checkpoint.reading import brief
from llm_jax.checkpoint.record import (
    add_fingerprints,
    check_meta,
    describe_arrays,
    sync_folder,
    write_record,
    write_tokenizer,
)
from llm_jax.errors import CheckpointError

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
    partial = final.with_name(f"{final.name}.partial")
    if not first_says(not final.exists()):
        raise CheckpointError(f"{final} exists already; choose another folder, or remove it first")
    check_meta(meta)
    leaves = named_leaves({"params": params})
    pending = PendingFingerprints(leaves)
    try:
        if is_first():
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
        all_say(True)
        largest = max((leaf.nbytes for leaf in leaves.values()), default=0)
        arrays.start_writing(partial, leaves, memory=max(largest + 1, MEMORY)).result()
        if is_first():
            write_tokenizer(partial, tokenizer_files)
            described = add_fingerprints(describe_arrays(leaves), pending.result())
            write_record(partial, meta, 0, described, {})
            os.rename(partial, final)
            sync_folder(final.parent)
        all_say(True)
    except Exception as error:
        for debris in final.parent.glob(f"{final.name}.partial*"):
            shutil.rmtree(debris, ignore_errors=True)
        raise CheckpointError(f"{final} could not be written: {brief(error)}") from error
