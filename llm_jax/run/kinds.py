"""The two kinds of run, for commands that serve both: what a config is of, and what its session consists of."""

from typing import Any

from rich.console import Console

from llm_jax.run import instruct, pretrain
from llm_jax.run.instruct import InstructConfig
from llm_jax.run.parts import Parts
from llm_jax.run.pretrain import PretrainConfig

RunConfig = PretrainConfig | InstructConfig
KINDS: tuple[type[Any], ...] = (PretrainConfig, InstructConfig)


def parts_of(config: RunConfig) -> Parts:
    """As of the session that the config's own command would start now.

    Raises:
      ConfigError, DataError, CheckpointError: data, tokenizer or model are not there, or do not fit.
    """
    if isinstance(config, InstructConfig):
        return instruct.parts_of(config, Console(quiet=True), take_over=False, from_step=-1)
    return pretrain.parts_of(config)
