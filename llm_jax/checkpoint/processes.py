"""What the processes of one run must agree on before they act: one writes, all go the same way.

Every function is called by all processes in the same order (they are collectives) and costs nothing
in a run of one process.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this process is the one that writes files, locks and renames."""
    return jax.process_index() == 0


def first_says(flag: bool) -> bool:
    """Process 0's `flag`, on all processes."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag, np.int32)))


def all_say(flag: bool) -> bool:
    """True on all processes if `flag` is true on every one. Also a barrier."""
    if jax.process_count() == 1:
        return flag
    return bool(np.all(multihost_utils.process_allgather(np.asarray(flag, np.int32))))


def highest(code: int) -> int:
    """The largest `code` that any process brought, on all processes. Also a barrier."""
    if jax.process_count() == 1:
        return code
    return int(np.max(multihost_utils.process_allgather(np.asarray(code, np.int32))))
