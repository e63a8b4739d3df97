"""Phases of a mixture: other weights from a step on, at once or along a ramp; and shards left out from a step on.

The rows before a phase do not depend on it. So a run that has begun may be given another phase from
its newest checkpoint on, and whether that is all that changed can be told from digests.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm_jax.data.weights import SourceWeight, check_sources
from llm_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A change of the mixture."""

    from_step: int  # the first step whose batch follows it: update number from_step + 1
    sources: tuple[SourceWeight, ...]  # token shares from then on; sources left out get none
    ramp_steps: int = 0  # steps over which the shares before it turn into these; 0: at once

    def __post_init__(self) -> None:
        where = f"data.phases: the phase from step {self.from_step}"
        if self.from_step < 1:
            raise ConfigError(
                f"data.phases: from_step={self.from_step} must be at least 1; the shares from step 0 on are "
                "data.sources"
            )
        if self.ramp_steps < 0:
            raise ConfigError(f"{where} has ramp_steps={self.ramp_steps}; it must be 0 or more")
        if not self.sources:
            raise ConfigError(f"{where} has no sources; give their names and weights")
        check_sources(self.sources, where)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A damaged shard that training goes on without: its documents turn into padding, all else stays where it is."""

    shard: str  # as in SOURCE/train-00003
    from_step: int = 0  # the first step whose batch does without it: update number from_step + 1

    def __post_init__(self) -> None:
        if self.from_step < 0:
            raise ConfigError(
                f"data.leave_out: from_step={self.from_step} of {self.shard!r} must be 0 or more"
            )


def check_left_out(left_out: Sequence[LeftOut]) -> None:
    """Raises ConfigError when a shard is named twice."""
    names = [left.shard for left in left_out]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"data.leave_out: {name!r} occurs twice; keep the one of the earlier step"
            )


def check_phases(phases: Sequence[Phase]) -> None:
    """Raises ConfigError unless each phase starts after the one before."""
    for one, other in itertools.pairwise(phases):
        if other.from_step <= one.from_step:
            raise ConfigError(
                f"data.phases: from_step={other.from_step} comes after from_step={one.from_step}; write them in "
                "the order of their steps, each once"
            )


def raised(
    shares: Mapping[str, float], sources: Sequence[str], factor: float, at_most: float
) -> tuple[SourceWeight, ...]:
    """Shares with more of some sources, the others scaled down alike.

    Args:
      shares: token shares as they are, by source, adding up to 1.
      sources: those to have more of, in the proportion they have now.
      factor: by which their share together grows, at least 1.
      at_most: their largest share together; a share that exceeds it already stays.

    Raises:
      ConfigError: none of them has a share that could grow.
    """
    now = sum(shares[name] for name in sources)
    if not now:
        raise ConfigError(
            f"the share of {', '.join(sources)} is 0 and cannot be multiplied; give data.sources some of it"
        )
    then = max(now, min(now * factor, at_most))
    grow, shrink = then / now, (1 - then) / (1 - now) if now < 1 else 0.0
    return tuple(
        SourceWeight(name=name, weight=round(share * (grow if name in sources else shrink), 6))
        for name, share in shares.items()
    )
