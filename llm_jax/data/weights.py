"""Weights of a mixture: shares of the training tokens, stated or found by a rule from the sources' sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llm_jax.errors import ConfigError

Rule = Literal["fixed", "temperature", "unimax"]


@dataclass(frozen=True, kw_only=True)
class SourceWeight:
    """One source of the mixture."""

    name: str  # as in the prepared data
    weight: float = 1.0  # share of the training tokens, relative to the others; 0 leaves it out

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(f"data.sources: weight={self.weight} of {self.name!r} must be >= 0")


def check_sources(sources: Sequence[SourceWeight], field: str) -> None:
    """Raises ConfigError when a list of weights names a source twice or weighs nothing."""
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{field}: {name!r} occurs twice; add up its weights")
    if sources and not any(source.weight > 0 for source in sources):
        raise ConfigError(f"{field}: every weight is 0; give one of them a positive weight")


def by_temperature(sizes: np.ndarray, temperature: float) -> np.ndarray:
    """Token shares in the proportion of size^(1 / temperature): 1 is by size, infinity is equal.

    Source: multilingual BERT and XLM-R, where 1 / temperature is called alpha (Conneau et al. 2020).

    Args:
      sizes: [sources] training tokens; sources of size 0 get none.
      temperature: above 0.
    """
    # over the largest first: a million tokens to the 20th are beyond float64
    shares = np.where(sizes > 0, sizes / sizes.max(), 0.0) ** (1 / temperature)
    return shares / shares.sum()


def unimax(
    sizes: np.ndarray, tokens_per_row: np.ndarray, rows: int, max_epochs: float
) -> np.ndarray:
    """Token shares as even as a cap on repeats allows (UniMax, Chung et al. 2023, arXiv:2304.09151).

    From the smallest source on, each gets an equal part of the budget that is left, or `max_epochs`
    times its size when that is less. The paper counts the budget in characters; here it is rows of
    the run, because rows of different sources hold different numbers of tokens.

    Args:
      sizes: [sources] training tokens.
      tokens_per_row: [sources] mean tokens in a row of each source.
      rows: rows of the run.
      max_epochs: how often a source may be seen.

    Returns:
      [sources] shares that add up to 1.

    Raises:
      ConfigError: even with every source at its cap the data end before the run does.
    """
    caps = max_epochs * sizes
    reach = float((caps / tokens_per_row).sum())
    if reach < rows:
        raise ConfigError(
            f"data.max_epochs={max_epochs:g}: at this cap the sources last for {int(reach):,} rows, but the run "
            f"takes {rows:,}; raise it to {np.ceil(10 * max_epochs * rows / reach) / 10:g}, or train for fewer steps"
        )
    left, tokens = float(rows), np.zeros(len(sizes))
    order = np.argsort(caps, kind="stable")
    for place, source in enumerate(order):
        rest = order[place:]
        even = left / (1 / tokens_per_row[rest]).sum()  # tokens of each, if all got as many
        tokens[source] = min(even, caps[source])
        left = max(0.0, left - tokens[source] / tokens_per_row[source])
    return tokens / tokens.sum()
