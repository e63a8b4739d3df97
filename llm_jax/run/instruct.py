"""`llm-jax instruct CONFIG`: tunes a trained model on conversations, on the same loop as pretraining.

What differs is the data (`llm-jax data conversations`): only answers are targets, and no conversation
is cut in two. The run's tokenizer has the chat template's special tokens and the template itself, so
that `llm-jax chat`, `eval --tasks` and `export` need nothing else.

`--method dpo` (or simpo) learns from pairs of a better and a worse answer instead (`data conversations
--format preference`), compared with the model that the run begins with.
"""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from rich.console import Console

from llm_jax.api import model_config
from llm_jax.checkpoint.store import CheckpointConfig
from llm_jax.config import nearest
from llm_jax.data.mixture import DataConfig, DataPlan
from llm_jax.data.shards import HELDOUT, Prepared
from llm_jax.errors import ConfigError, DataError
from llm_jax.eval.pairs import PairRows
from llm_jax.eval.windows import EvalConfig
from llm_jax.instruct.conversations import Turn
from llm_jax.instruct.masks import load_encoder
from llm_jax.model import ModelConfig
from llm_jax.run import cli, continuation
from llm_jax.run.data_conversations import is_conversations
from llm_jax.run.hooks import say
from llm_jax.run.parts import BEST_METRIC, Beginning, Parts, SampleConfig, assemble
from llm_jax.run.phases import leaving_out
from llm_jax.run.preference import find_reference
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
    Objective,
    OptimizerConfig,
    PreferenceConfig,
    ResizeConfig,
    StageConfig,
    StepConfig,
    TrainConfig,
    TrainState,
)

log = logging.getLogger(__name__)
Method = Literal["sft", "dpo", "simpo"]


@dataclass(frozen=True, kw_only=True)
class InstructConfig:
    """Everything a tuning run depends on. The resolved one is saved in the run and every checkpoint."""

    run: str  # run folder; a run that is there already is resumed
    init_from: str  # the model to tune: a run folder, checkpoint or imported model
    data: DataConfig  # conversations, or pairs of answers; packing must be "whole"
    method: Method = "sft"  # dpo and simpo learn from pairs
    preference: PreferenceConfig = PreferenceConfig()  # of dpo and simpo
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
        if self.method not in get_args(Method):
            raise ConfigError(f"method={self.method!r}; {nearest(self.method, get_args(Method))}")
        if self.method == "sft":
            if self.preference != PreferenceConfig():
                raise ConfigError(
                    "preference.* compares pairs of answers; set method='dpo' or 'simpo' too, or leave it out"
                )
            return
        self.preference.objective(self.method)
        if self.step.z_loss:
            raise ConfigError(
                f"step.z_loss={self.step.z_loss} belongs to method='sft'; leave it at 0 with {self.method!r}"
            )

    @property
    def objective(self) -> Objective | None:
        """What pairs of answers are compared by; None with sft."""
        return None if self.method == "sft" else self.preference.objective(self.method)


def instruct(
    config: InstructConfig, console: Console, *, take_over: bool = False, from_step: int = -1
) -> TrainState:
    """Runs a tuning session; see `train_session`."""
    if config.objective and config.checkpoint.best_metric == BEST_METRIC:
        log.warning(
            "checkpoint.best_metric=%r may get worse while pairs are won; eval/loss says which checkpoint is best",
            BEST_METRIC,
        )
    with leaving_out(Path(config.run), config.data):
        return train_session(parts_of(config, console, take_over, from_step), console)


def parts_of(config: InstructConfig, console: Console, take_over: bool, from_step: int) -> Parts:
    """What the session of a config consists of: its data, tokenizer and model looked up and checked.

    Raises:
      ConfigError, DataError, CheckpointError: they are not there, or do not fit.
    """
    prepared = config.data.open()
    check_kind(config, prepared)
    tokenizer = prepared_tokenizer(prepared)
    begun = beginning(config, prepared, tokenizer)
    config = replace(config, model=begun.model)
    check_length(config, prepared)
    objective = config.objective
    reference = None
    if objective:
        reference = find_reference(objective, begun, config.stages, config.init_from, config.run)
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
        objective=objective,
        reference=reference,
        pairs=heldout_pairs(plan, prepared, config.eval) if objective else {},
    )
    say(console, described(prepared, tokenizer))
    return parts


def check_kind(config: InstructConfig, prepared: Prepared) -> None:
    """Raises DataError unless the data is what the method learns from."""
    where = config.data.prepared
    if not is_conversations(prepared):
        flag = "" if config.method == "sft" else " --format preference"
        raise DataError(
            f"{where}: holds text, not conversations; make it with `llm-jax data conversations{flag}`"
        )
    if prepared.holds_pairs and config.method == "sft":
        raise DataError(
            f"{where}: holds pairs of answers, which method='sft' cannot learn from; set --method dpo or simpo"
        )
    if not prepared.holds_pairs and config.method != "sft":
        raise DataError(
            f"{where}: holds conversations, but method={config.method!r} learns from pairs of answers; make them with "
            "`llm-jax data conversations --format preference`"
        )


def check_length(config: InstructConfig, prepared: Prepared) -> None:
    """No conversation may be longer than the model's context; both of a pair share a row. Raises ConfigError."""
    rows, limit = config.data.seq_len, config.model.max_seq_len
    if prepared.holds_pairs and config.model.position != "learned":
        longest = prepared.manifest["conversations"]["longest_side"]
        if longest > limit:
            raise ConfigError(
                f"the longest answer with its prompt in {config.data.prepared} has {longest} tokens, but "
                f"model.max_seq_len={limit}; prepare the pairs with --seq-len {limit}"
            )
    elif rows > limit:
        raise ConfigError(
            f"data.seq_len={rows} must not exceed model.max_seq_len={limit}; lower it with --data.seq-len"
        )


def heldout_pairs(plan: DataPlan, prepared: Prepared, config: EvalConfig) -> dict[str, PairRows]:
    """The held-out pairs of every source of the mixture."""
    splits = {name: prepared.sources[name][HELDOUT] for name in plan.source_names}
    return {
        name: PairRows(split, plan.seq_len, config)
        for name, split in splits.items()
        if split.num_documents
    }


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
    what = "pairs of answers, " if prepared.holds_pairs else ""
    return (
        f"chat       {what}template {facts['template']}, {targets:,} of {tokens:,} tokens are targets "
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
