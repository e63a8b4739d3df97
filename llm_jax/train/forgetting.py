"""The forgetting guard: a second language must not cost the first more than was agreed."""

import dataclasses
from collections.abc import Mapping

from llm_jax.errors import ConfigError

RATIO = "bits_per_character"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgettingConfig:
    """When training stops because held-out text of the old language is predicted too badly."""

    sources: tuple[str, ...] = ()  # held-out sources of the old language; none: no guard
    # share by which bits per character may exceed those of the base model, which are measured before
    # the first step; every evaluation is compared
    max_increase: float = 0.05

    def __post_init__(self) -> None:
        if self.max_increase < 0:
            raise ConfigError(f"forgetting.max_increase={self.max_increase} must not be negative")


def forgotten(
    config: ForgettingConfig, reference: Mapping[str, float], metrics: Mapping[str, float]
) -> str:
    """What has been forgotten, in words; "" as long as every source is within the bound.

    Args:
      reference: bits per character of the base model, by source.
      metrics: of an evaluation, as in metrics.jsonl; sources that it lacks are not looked at.
    """
    told = []
    for source in config.sources:
        now, start = metrics.get(f"eval/{source}/{RATIO}"), reference[source]
        if now is not None and now > start * (1 + config.max_increase):
            told.append(
                f"{source} is at {now:.4f} bits per character, {now / start - 1:.1%} above the base model's "
                f"{start:.4f} (forgetting.max_increase={config.max_increase} allows "
                f"{start * (1 + config.max_increase):.4f})"
            )
    return "; ".join(told)
