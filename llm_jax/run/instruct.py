"""`llm-jax instruct CONFIG`: tunes a trained model on conversations, on the same loop as pretraining.

What differs is the data (`llm-jax data conversations`): only answers are targets, and no conversation
is cut in two. The run's tokenizer has the chat template's special tokens and the template itself, so
that `llm-jax chat`, `eval --tasks` and `export` need nothing else.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from llm_jax.api import model_config
from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.data.mixture import DataConfig, DataPlan
from llm_jax.data.shards import Prepared
from llm_jax.errors import ConfigError, DataError
from llm_jax.eval.windows import EvalConfig
from llm_jax.instruct.conversations import Turn
from llm_jax.instruct.masks import load_encoder
from llm_jax.model import ModelConfig
from llm_jax.run import cli, continuation
from llm_jax.run.data_conversations import is_conversations
from llm_jax.run.hooks import say
from llm_jax.run.parts import BEST_METRIC, Beginning, Parts, SampleConfig, assemble
from llm_jax.run.phases import leaving_out
from llm_jax.run.pretrain import (
    AS_BASE,
    bytes_per_token,
    heldout_corpora,
    prepared_tokenizer,
    run_command,
)
from llm_jax.run.provenance import recorded_order
from llm_jax.run.session import train_session
from llm_jax.sharding import MeshConfig
from llm_jax.tokenizer import Tokenizer
from llm_jax.train import (
    OptimizerConfig,
    ResizeConfig,
    StageConfig,
    StepConfig,
    TrainConfig,
    TrainState,
)


@dataclass(frozen=True, kw_only=True)
class InstructConfig:
    """Everything a tuning run depends on. The resolved one is saved in the run and every checkpoint."""

    run: str  # run folder; a run that is there already is resumed
    init_from: str  # the model to tune: a run folder, checkpoint or imported model
    data: DataConfig  # conversations; packing must be "whole"
    model: ModelConfig = AS_BASE  # only what differs from the base and may: dtype, remat, attention
    resize: ResizeConfig = ResizeConfig(init="mean")  # rows of special tokens the base lacks
    stages: StageConfig = StageConfig()
    optimizer: OptimizerConfig = OptimizerConfig(peak_lr=2e-5, warmup_steps=20, weight_decay=0.0)
    step: StepConfig = StepConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1, tensor=1)
    checkpoint: CheckpointConfig = field(
        default_factory=lambda: CheckpointConfig(best_metric=BEST_METRIC)
    )
    eval: EvalConfig = EvalConfig(max_tokens=1_000_000)  # held-out answers, of every source
    # each prompt is the first turn of a conversation
    samples: SampleConfig = SampleConfig(prompts=("Who are you?", "你是谁？"))

    def __post_init__(self) -> None:
        if not self.run:
            raise ConfigError("run='' must name a folder, as in --run runs/tuned")
        if not self.init_from:
            raise ConfigError("init_from='' must name the model to tune, as in --init-from MODEL")
        if self.data.packing != "whole":
            raise ConfigError(
                f"data.packing={self.data.packing!r} would cut conversations in two; it must be 'whole'"
            )


def instruct(
    config: InstructConfig, console: Console, *, take_over: bool = False, from_step: int = -1
) -> TrainState:
    """Runs a tuning session; see `train_session`."""
    with leaving_out(Path(config.run), config.data):
        return train_session(parts_of(config, console, take_over, from_step), console)


def parts_of(config: InstructConfig, console: Console, take_over: bool, from_step: int) -> Parts:
    """What the session of a config consists of: its data, tokenizer and model looked up and checked.

    Raises:
      ConfigError, DataError, CheckpointError: they are not there, or do not fit.
    """
    prepared = config.data.open()
    if not is_conversations(prepared):
        raise DataError(
            f"{config.data.prepared}: holds text, not conversations; make it with `llm-jax data conversations`"
        )
    tokenizer = prepared_tokenizer(prepared)
    begun = beginning(config, prepared, tokenizer)
    config = replace(config, model=begun.model)
    if config.data.seq_len > config.model.max_seq_len:
        raise ConfigError(
            f"data.seq_len={config.data.seq_len} must not exceed model.max_seq_len={config.model.max_seq_len}"
        )
    order = recorded_order(Path(config.run), from_step, config.step.batch_size)
    plan = DataPlan(config.data, prepared, order=order, steps=config.train.steps)
    chat = load_encoder(tokenizer, config.data.prepared)
    turns = [(Turn("user", prompt),) for prompt in config.samples.prompts]
    parts = assemble(
        config,
        begun,
        take_over=take_over,
        from_step=from_step,
        plan=plan,
        bytes_per_token=bytes_per_token(plan, prepared),
        tokenizer=tokenizer,
        corpora=heldout_corpora(plan, prepared, tokenizer, config.eval),
        recorded_order=order,
        prompt_ids=tuple(tuple(chat.prompt(turn)) for turn in turns),
    )
    say(console, described(prepared, tokenizer))
    return parts


def beginning(config: InstructConfig, prepared: Prepared, tokenizer: Tokenizer) -> Beginning:
    """Looks the base model up; for a run that has begun, what its checkpoints say about it.

    Raises:
      ConfigError, CheckpointError, DataError: model, base and data do not fit.
    """
    record = continuation.recorded(Path(config.run))
    if record is not None:
        facts = record.get("continuation", {})
        model = continuation.fill_in(
            config.model, AS_BASE, model_config(record, config.run), 0, config.run
        )
        first = facts.get("first_new_row", 0)
        return Beginning(model, None, first, facts, continuation.origin_of(record))
    base = continuation.find_base(config.init_from)
    expected = prepared.manifest["conversations"]["base_fingerprint"]
    if base.tokenizer.fingerprint != expected:
        raise DataError(
            f"{config.data.prepared}: made with tokenizer {expected[:12]}, but {config.init_from} has "
            f"{base.tokenizer.fingerprint[:12]}; prepare it again with --tokenizer {base.folder}/tokenizer"
        )
    added = tokenizer.vocab_size - base.tokenizer.vocab_size
    least = tokenizer.vocab_size
    if least > base.model.vocab_size:
        least += -least % config.resize.multiple
    model = continuation.fill_in(config.model, AS_BASE, base.model, least, base.folder)
    return Beginning(model, base, base.tokenizer.vocab_size if added else 0, {}, base.origin)


def described(prepared: Prepared, tokenizer: Tokenizer) -> str:
    """What is learned, in one line."""
    facts = prepared.manifest["conversations"]
    train = [splits["train"] for splits in prepared.sources.values()]
    targets, tokens = (
        sum(split.num_targets for split in train),
        sum(split.num_tokens for split in train),
    )
    return (
        f"chat       template {facts['template']}, {targets:,} of {tokens:,} tokens are targets "
        f"({facts['loss']}{', with header' if facts['header'] else ''}), a turn ends with "
        f"{tokenizer.piece_of(tokenizer.eos_id)}"
    )


def main(argv: list[str]) -> None:
    """The command."""
    description = "Tunes a model on conversations; a run folder that holds checkpoints is resumed."
    run_command("llm-jax instruct", description, InstructConfig, instruct, argv)


if __name__ == "__main__":
    # config files import this module by its name: their InstructConfig is not that of `__main__`
    from llm_jax.run import instruct as imported

    cli.leave(cli.run(imported.main))
