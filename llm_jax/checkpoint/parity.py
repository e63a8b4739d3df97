"""How alike two models' logits are, and the record of every check a model passed when it changed hands."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_jax.errors import CheckpointError

FORMAT = "llm_jax parity 1"
MAX_RELATIVE = 1e-4  # of the largest logit, both in float32
TOP = 10


def compare_logits(ours_NV: np.ndarray, theirs_NV: np.ndarray) -> dict[str, float]:
    """Numbers that say how alike two models' next-token logits are, at N places.

    `max_relative`: the largest difference over the largest logit. `kl`: nats per token of theirs from ours,
    mean and largest. `top_1`, `top_10`: mean share of their likeliest tokens that are among ours.
    """
    ours, theirs = ours_NV.astype(np.float64), theirs_NV.astype(np.float64)
    scale = float(np.abs(theirs).max())
    difference = float(np.abs(ours - theirs).max())
    log_ours, log_theirs = _log_softmax(ours), _log_softmax(theirs)
    kl_N = (np.exp(log_theirs) * (log_theirs - log_ours)).sum(-1)
    top = min(TOP, ours.shape[-1])
    return {
        "places": len(ours),
        "max_absolute": difference,
        # a model of zeros has logits of zeros
        "max_relative": difference / scale if scale else (math.inf if difference else 0.0),
        "largest_logit": scale,
        "kl_mean": float(kl_N.mean()),
        "kl_max": float(kl_N.max()),
        "top_1": _agreement(ours, theirs, 1),
        f"top_{top}": _agreement(ours, theirs, top),
    }


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _agreement(ours: np.ndarray, theirs: np.ndarray, k: int) -> float:
    best = [np.argpartition(-x, k - 1, axis=-1)[:, :k] for x in (ours, theirs)]
    shared = [len(np.intersect1d(a, b)) for a, b in zip(*best, strict=True)]
    return float(np.mean(shared)) / k


class Report:
    """What `parity.json` says: one entry a check, `passed` or `not run` with the reason."""

    def __init__(self, command: str, facts: Mapping[str, Any]):
        """Starts empty; `facts` name the model."""
        self._facts = {"format": FORMAT, "command": command, **facts}
        self.parts: dict[str, dict[str, Any]] = {}

    def passed(self, part: str, **facts: Any) -> None:
        """The check was made, with these results."""
        self.parts[part] = {"status": "passed", **facts}

    def not_run(self, part: str, why: str) -> None:
        """The check could not be made."""
        self.parts[part] = {"status": "not run", "why": why}

    def require(self, part: str, holds: bool, told: str) -> None:
        """Raises CheckpointError, which ends the command and removes its output, unless `holds`."""
        if not holds:
            raise CheckpointError(f"parity check {part!r} failed: {told}; nothing was written")

    def to_dict(self) -> dict[str, Any]:
        """The contents of the file."""
        return {**self._facts, "parts": self.parts}
