"""The forgetting guard: a second language must not cost the first more than was agreed."""

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

from llm_jax.config import nearest
from llm_jax.errors import ConfigError

Action = Literal["stop", "rebalance"]

RATIO = "bits_per_character"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgettingConfig:
    """What happens when held-out text of the old language is predicted too badly."""

    sources: tuple[str, ...] = ()  # held-out sources of the old language; none: no guard
    # share by which bits per character may exceed those of the base model, which are measured before
    # the first step; every evaluation is compared
    max_increase: float = 0.05
    # "stop": the run ends. "rebalance": the share of these sources grows from the next step on, again at
    # every evaluation that is beyond the bound and no better than the one before, and ends the run when
    # it cannot grow
    action: Action = "stop"
    factor: float = 2.0  # of "rebalance": by which their share of the tokens grows at once
    max_share: float = 0.5  # of "rebalance": their largest share together

    def __post_init__(self) -> None:
        if self.max_increase < 0:
            raise ConfigError(f"forgetting.max_increase={self.max_increase} must not be negative")
        if self.action not in get_args(Action):
            remedy = nearest(self.action, get_args(Action))
            raise ConfigError(f"forgetting.action={self.action!r}; {remedy}")
        if self.action == "rebalance" and not self.sources:
            raise ConfigError(
                "forgetting.action='rebalance' needs forgetting.sources, those to have more of"
            )
        if self.factor <= 1:
            raise ConfigError(f"forgetting.factor={self.factor} must be above 1")
        if not 0 < self.max_share < 1:
            raise ConfigError(f"forgetting.max_share={self.max_share} must be between 0 and 1")


def forgotten(
    config: ForgettingConfig, reference: Mapping[str, float], metrics: Mapping[str, float]
) -> str:
    """What has been forgotten, in words; "" as long as every source is within the bound.

    Args:
      reference: bits per character of the base model, by source.
      metrics: of an evaluation, as in metrics.jsonl; sources that it lacks are not looked at.
    """
    told = []
    for source, now in beyond(config, reference, metrics).items():
        start = reference[source]
        told.append(
            f"{source} is at {now:.4f} bits per character, {now / start - 1:.1%} above the base model's "
            f"{start:.4f} (forgetting.max_increase={config.max_increase} allows "
            f"{start * (1 + config.max_increase):.4f})"
        )
    return "; ".join(told)


def beyond(
    config: ForgettingConfig, reference: Mapping[str, float], metrics: Mapping[str, float]
) -> dict[str, float]:
    """Bits per character of every source that exceeds the bound; arguments as of `forgotten`."""
    found = {}
    for source in config.sources:
        now = metrics.get(f"eval/{source}/{RATIO}")
        if now is not None and now > reference[source] * (1 + config.max_increase):
            found[source] = now
    return found
