"""AdamW and learning-rate schedules, from optax. The learning rate is a function of the step alone."""

import dataclasses
from typing import Any, Literal

import jax
import optax

from llm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 1711.05101) with warm-up and decay."""

    peak_lr: float = 3e-4  # learning rate after warm-up
    final_lr_fraction: float = 0.1  # of peak_lr, reached at the last step
    warmup_steps: int = 100  # linear from 0
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    decay_fraction: float = 0.2  # wsd: share of all steps spent in the final linear decay
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # decoupled; not applied to biases and norm scales
    clip_norm: float = 1.0  # global gradient norm is scaled down to this; 0 turns clipping off
    # how peak_lr follows a batch size changed in mid-run, by their ratio; "": the change is refused
    lr_with_batch: Literal["", "linear", "sqrt"] = ""

    def __post_init__(self) -> None:
        for name in ("peak_lr", "eps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be above 0")
        for name in ("final_lr_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be between 0 and 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"optimizer.{name}={getattr(self, name)} must be at least 0 and below 1"
                )
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must not be negative")


def follow_batch(
    schedule: optax.Schedule, config: OptimizerConfig, first_size: int, size: int
) -> optax.Schedule:
    """The schedule for batches of `size` rows in a run that began with `first_size`.

    Linear as in Goyal et al. (1706.02677), for small batches; the square root suits Adam
    (Malladi et al., 2205.10287).
    """
    if size == first_size:
        return schedule
    factor = (size / first_size) ** (0.5 if config.lr_with_batch == "sqrt" else 1.0)
    return lambda step: factor * schedule(step)


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of each step 0 .. steps - 1.

    Raises:
      ConfigError: the warm-up is longer than the run.
    """
    if config.warmup_steps >= steps:
        raise ConfigError(
            f"optimizer.warmup_steps={config.warmup_steps} must be below train.steps={steps}: "
            "lower it, or train for longer"
        )
    peak, final = config.peak_lr, config.peak_lr * config.final_lr_fraction
    # from peak / warmup at step 0: a first step with learning rate 0 would be wasted
    warmup = optax.linear_schedule(
        peak / max(config.warmup_steps, 1), peak, max(config.warmup_steps - 1, 1)
    )
    left = steps - config.warmup_steps
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, max(left - 1, 1), alpha=config.final_lr_fraction)
    elif config.schedule == "linear":
        rest = optax.linear_schedule(peak, final, max(left - 1, 1))
    elif config.schedule == "wsd":  # warm-up, stable, decay (MiniCPM, 2404.06395)
        decay = min(max(round(steps * config.decay_fraction), 1), left)
        rest = optax.linear_schedule(peak, final, max(decay - 1, 1), transition_begin=left - decay)
    else:
        rest = optax.constant_schedule(peak)
    return (
        optax.join_schedules([warmup, rest], [config.warmup_steps]) if config.warmup_steps else rest
    )


def decay_mask(params: Any) -> Any:
    """True for the parameters that weight decay shrinks: all but biases and norm scales."""

    def decays(path: Any, _: Any) -> bool:
        name = path[-1].key
        return not (name == "scale" or name.endswith("bias"))

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipped gradients to AdamW directions; `train_step` multiplies by minus the learning rate."""
    return optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
    )
