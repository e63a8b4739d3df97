"""The forgetting guard that goes on: more of the old language from the next step, as a phase of the data.

What it did is in every checkpoint, so a run that is resumed takes the same rows. Resumed from before a
phase it had added, it takes the phase when it comes there and decides nothing twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llm_jax.checkpoint.record import DamagedError, read_meta
from llm_jax.checkpoint.run_folder import CHECKPOINTS, steps_in
from llm_jax.config import from_dict, to_dict
from llm_jax.data.mixture import DataConfig, DataPlan
from llm_jax.data.phases import Phase, raised
from llm_jax.errors import ConfigError
from llm_jax.train.forgetting import ForgettingConfig


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What the forgetting guard has done to a run."""

    phases: tuple[Phase, ...] = ()  # that it added
    # bits per character of the sources beyond the bound, at the last evaluation; none: all within
    beyond: Mapping[str, float] = field(default_factory=dict)
    ended: bool = False  # it could do no more

    def to_record(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"phases": to_dict(self.phases), "beyond": dict(self.beyond), "ended": self.ended}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "Guard":
        """Of a checkpoint's record; one without a guard has done nothing."""
        kept = record.get("guard", {"phases": [], "beyond": {}, "ended": False})
        phases = tuple(from_dict(Phase, phase) for phase in kept["phases"])
        return cls(phases=phases, beyond=kept["beyond"], ended=kept["ended"])

    def applied(self, data: DataConfig) -> DataConfig:
        """The data of a config with the phases it added."""
        for phase in self.phases:
            data = data.with_phase(phase)
        return data


def recorded_guard(run: Path, from_step: int) -> Guard:
    """Of the checkpoint that a run goes on from: `from_step`, or the newest readable one if negative."""
    steps = steps_in(run / CHECKPOINTS)
    for step in reversed([step for step in steps if from_step in (-1, step)]):
        try:
            return Guard.of_record(read_meta(run / CHECKPOINTS / str(step)))
        except DamagedError:  # `Store.restore` tells and steps over it
            continue
    return Guard()


def check_share(config: ForgettingConfig, plan: DataPlan) -> None:
    """Raises ConfigError when the guard is to multiply a share of 0."""
    shares = plan.shares
    if config.action == "rebalance" and not sum(shares.get(name, 0) for name in config.sources):
        raise ConfigError(
            f"forgetting.action='rebalance' multiplies the share of {', '.join(config.sources)}, which is 0; give "
            "data.sources some of it"
        )


def decide(
    guard: Guard,
    config: ForgettingConfig,
    shares: Mapping[str, float],
    beyond: Mapping[str, float],
    step: int,
) -> Guard:
    """What the guard does after an evaluation: nothing, another phase, or the end.

    Args:
      guard: what it did before.
      config: its settings.
      shares: token share of each source in the rows that come next.
      beyond: bits per character of the sources that exceed the bound; may be empty.
      step: finished updates; a phase begins with the next one.
    """
    better = bool(guard.beyond) and all(
        bits < guard.beyond.get(name, 0) for name, bits in beyond.items()
    )
    decided = any(phase.from_step == step for phase in guard.phases)
    # whoever went on after it had ended the run changed the bound or the mixture
    guard = replace(guard, beyond=dict(beyond), ended=False)
    if not beyond or better or decided:
        return guard
    now = sum(shares[name] for name in config.sources)
    if not now or now >= config.max_share:
        return replace(guard, ended=True)
    grown = raised(shares, config.sources, config.factor, config.max_share)
    return replace(guard, phases=(*guard.phases, Phase(from_step=step, sources=grown)))


def what_next(before: Guard, now: Guard) -> str:
    """What the guard decided, in words; "" when it ends the run."""
    if now.ended:
        return ""
    added = now.phases[len(before.phases) :]
    if not added:
        return "better than at the evaluation before it, or seen to already"
    shares = ", ".join(f"{source.name} {source.weight:.1%}" for source in added[0].sources)
    return f"the shares from here on are {shares}"
