"""`llm-jax pretrain CONFIG`: trains on prepared data, from scratch, from a base model, or on where it stopped."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from llm_jax import config as config_files
from llm_jax import tokenizer as tokenizers
from llm_jax.api import model_config
from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataConfig, DataPlan
from llm_jax.data.shards import Prepared
from llm_jax.errors import CheckpointError, ConfigError, DataError
from llm_jax.eval.windows import Corpus, EvalConfig, corpus_from_split
from llm_jax.model import ModelConfig
from llm_jax.run import cli, continuation, launch
from llm_jax.run.parts import BEST_METRIC, Beginning, Parts, SampleConfig, assemble
from llm_jax.run.phases import leaving_out
from llm_jax.run.provenance import recorded_order
from llm_jax.run.rebalance import check_share, recorded_guard
from llm_jax.run.session import train_session
from llm_jax.sharding import MeshConfig
from llm_jax.tokenizer import Tokenizer
from llm_jax.train import (
    ForgettingConfig,
    OptimizerConfig,
    ResizeConfig,
    StageConfig,
    StepConfig,
    TrainConfig,
    TrainState,
)

# states nothing: with --init-from, what is left as it is here is the base model's
AS_BASE = ModelConfig(
    vocab_size=1,
    embed_dim=1,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    mlp_dim=1,
    max_seq_len=1,
)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything a pretraining run depends on. The resolved one is saved in the run and every checkpoint."""

    run: str  # run folder; a run that is there already is resumed
    data: DataConfig
    model: ModelConfig = AS_BASE  # must be stated, unless init_from says which model goes on
    init_from: str = ""  # a run folder, checkpoint or imported model to begin with; empty: random
    resize: ResizeConfig = ResizeConfig()
    stages: StageConfig = StageConfig()
    forgetting: ForgettingConfig = ForgettingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    step: StepConfig = StepConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1, tensor=1)
    checkpoint: CheckpointConfig = field(
        default_factory=lambda: CheckpointConfig(best_metric=BEST_METRIC)
    )
    # a million tokens of every source are plenty to steer by; llm-jax eval scores all of them
    eval: EvalConfig = EvalConfig(max_tokens=1_000_000)
    samples: SampleConfig = SampleConfig()

    def __post_init__(self) -> None:
        if not self.run:
            raise ConfigError("run='' must name a folder, as in --run runs/first")
        if self.model.param_dtype != "float32" and not self.model.lora.rank:
            raise ConfigError(
                f"model.param_dtype={self.model.param_dtype!r} cannot be trained: a bfloat16 weight of 1 does "
                "not move by a learning rate below 0.004; keep 'float32' and set model.dtype='bfloat16'"
            )
        if not self.init_from and self.model.embed_dim == AS_BASE.embed_dim:
            raise ConfigError(
                "model.embed_dim is not stated; state the model's sizes, or begin with a trained model by "
                "--init-from MODEL"
            )
        if not self.init_from and self.model.lora.rank:
            raise ConfigError(
                f"model.lora.rank={self.model.lora.rank} puts adapters on frozen weights; give --init-from MODEL, "
                "or leave it at 0"
            )
        if not self.init_from and self.forgetting.sources:
            raise ConfigError(
                f"forgetting.sources={list(self.forgetting.sources)} compares with a base model; give "
                "--init-from MODEL, or leave it empty"
            )
        unstated = self.model.max_seq_len == AS_BASE.max_seq_len
        if self.data.seq_len > self.model.max_seq_len and not unstated:
            raise ConfigError(
                f"data.seq_len={self.data.seq_len} must not exceed model.max_seq_len={self.model.max_seq_len}"
            )


def pretrain(
    config: PretrainConfig, console: Console, *, take_over: bool = False, from_step: int = -1
) -> TrainState:
    """Runs a pretraining session; see `train_session`."""
    with leaving_out(Path(config.run), config.data):
        return train_session(parts_of(config, take_over=take_over, from_step=from_step), console)


def parts_of(config: PretrainConfig, *, take_over: bool = False, from_step: int = -1) -> Parts:
    """What the session of a config consists of: its data, tokenizer and model looked up and checked.

    Raises:
      ConfigError, DataError, CheckpointError: they are not there, or do not fit.
    """
    prepared = config.data.open()
    if prepared.holds_pairs:
        raise DataError(
            f"{config.data.prepared}: holds pairs of answers; llm-jax instruct --method dpo learns from them"
        )
    tokenizer = prepared_tokenizer(prepared)
    begun = beginning(config, tokenizer)
    config = replace(config, model=begun.model)
    check_vocabulary(config, prepared)
    guard = recorded_guard(Path(config.run), from_step)
    config = replace(config, data=guard.applied(config.data))
    order = recorded_order(Path(config.run), from_step, config.step.batch_size)
    plan = DataPlan(config.data, prepared, order=order, steps=config.train.steps)
    corpora = heldout_corpora(plan, prepared, tokenizer, config.eval)
    check_guard(config, corpora)
    check_share(config.forgetting, plan)
    return assemble(
        config,
        begun,
        take_over=take_over,
        from_step=from_step,
        plan=plan,
        bytes_per_token=bytes_per_token(plan, prepared),
        tokenizer=tokenizer,
        corpora=corpora,
        forgetting=config.forgetting,
        guard=guard,
        recorded_order=order,
    )


def prepared_tokenizer(prepared: Prepared) -> Tokenizer:
    """The tokenizer in a folder of token shards. Raises DataError if it is another than theirs."""
    tokenizer = tokenizers.load(prepared.tokenizer_folder)
    if tokenizer.fingerprint != prepared.tokenizer_fingerprint:
        raise DataError(
            f"{prepared.tokenizer_folder}: not the tokenizer that the data was prepared with (fingerprint "
            f"{tokenizer.fingerprint[:12]}, the manifest says {prepared.tokenizer_fingerprint[:12]}); put that one "
            "back, or prepare the data again"
        )
    return tokenizer


def beginning(config: PretrainConfig, tokenizer: Tokenizer) -> Beginning:
    """Looks the base model up; for a run that has begun, what its checkpoints say about it.

    Raises:
      ConfigError, CheckpointError, DataError: model, base and data do not fit.
    """
    if not config.init_from:
        return Beginning(config.model, None, 0, {}, {})
    record = continuation.recorded(Path(config.run))
    if record is None:
        base = continuation.find_base(config.init_from)
        first = continuation.first_new_row(base, tokenizer, config.data.prepared)
        model, where = base.model, base.folder
        least = (
            tokenizer.vocab_size + -tokenizer.vocab_size % config.resize.multiple if first else 0
        )
        facts: dict[str, Any] = {}
        origin = base.origin
    elif "continuation" in record:
        facts, base, least = record["continuation"], None, 0
        first, origin = facts["first_new_row"], continuation.origin_of(record)
        model, where = model_config(record, config.run), config.run
    else:
        raise CheckpointError(
            f"{config.run}: this run did not begin with init_from={config.init_from!r} but with random "
            "parameters; leave --init-from out to go on, or choose another run folder with --run"
        )
    filled = continuation.fill_in(config.model, AS_BASE, model, least, where)
    return Beginning(filled, base, first, facts, origin)


def check_guard(config: PretrainConfig, corpora: Mapping[str, Corpus]) -> None:
    """The forgetting guard needs held-out text of each of its sources. Raises ConfigError."""
    for source in config.forgetting.sources:
        if source not in corpora:
            known = config_files.nearest(source, list(corpora)) if corpora else "there is none"
            raise ConfigError(
                f"forgetting.sources: {source!r} has no held-out text in {config.data.prepared}; {known}"
            )


def bytes_per_token(plan: DataPlan, prepared: Prepared) -> dict[str, float]:
    """UTF-8 bytes of text behind one target, by source; BOS is no target, EOS is one."""
    train = {name: prepared.sources[name]["train"] for name in plan.source_names}
    return {name: split.num_bytes / max(split.num_targets, 1) for name, split in train.items()}


def heldout_corpora(
    plan: DataPlan, prepared: Prepared, tokenizer: Tokenizer, config: EvalConfig
) -> dict[str, Corpus]:
    """The held-out documents of every source of the mixture, those of weight 0 included."""
    splits = {name: prepared.sources[name]["heldout"] for name in plan.source_names}
    return {
        name: corpus_from_split(split, tokenizer, config)
        for name, split in splits.items()
        if split.num_documents
    }


def check_vocabulary(config: PretrainConfig, prepared: Prepared) -> None:
    """The embedding needs a row for every id; more rows are padding."""
    if config.model.vocab_size < prepared.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} must be at least {prepared.vocab_size}, the size of the "
            f"tokenizer of {config.data.prepared}; a multiple of 128 above it shards and multiplies best"
        )


def main(argv: list[str]) -> None:
    """The command."""
    description = "Trains a model; a run folder that holds checkpoints is resumed."
    run_command("llm-jax pretrain", description, PretrainConfig, pretrain, argv)


def run_command(
    program: str,
    description: str,
    kind: type[Any],
    action: Callable[..., Any],
    argv: list[str],
) -> None:
    """What the commands that train have in common: a config of some kind, overrides, a session."""
    parser = cli.Parser(
        prog=program,
        description=description,
        epilog="Any setting is overridden as --train.steps 8; the run's own config.json is a CONFIG too.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="a file in configs/, or a saved config.json"
    )
    parser.add_argument(
        "--take-over", action="store_true", help="ignore the lock of a run that seems alive"
    )
    parser.add_argument(
        "--step",
        type=int,
        default=-1,
        help="go on from this checkpoint (default: the newest good one)",
    )
    launch.add_flags(parser)
    known, overrides = parser.parse_known_args(argv)
    config = config_files.load(known.config, kind, overrides)
    flags = (known.coordinator, known.processes, known.process_id)
    launch.start_processes(launch.find_cluster(flags), known.join_seconds)
    action(config, Console(), take_over=known.take_over, from_step=known.step)


if __name__ == "__main__":
    # config files import this module by its name: their PretrainConfig is not that of `__main__`
    from llm_jax.run import pretrain as imported

    cli.leave(cli.run(imported.main))
