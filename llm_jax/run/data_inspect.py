"""`llm-jax data inspect`: what is in prepared data, and which rows a mixture of it gives."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import numpy as np
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llm_jax import config as config_files
from llm_jax import tokenizer as tokenizers
from llm_jax.data import shards
from llm_jax.data.batch import Batch
from llm_jax.data.mixture import DataConfig, DataPlan
from llm_jax.data.packing import Packing
from llm_jax.data.row_order import RowOrder
from llm_jax.data.weights import Rule, SourceWeight
from llm_jax.errors import ConfigError
from llm_jax.generate.text_stream import TextStream
from llm_jax.run.data_conversations import is_conversations, tell_conversations
from llm_jax.run.data_sources import console
from llm_jax.tokenizer import Tokenizer

# flag -> its value's form and what it says; each is the setting of this name in `DataConfig`
SETTINGS = {
    "seq-len": ("N", "tokens per row (256)"),
    "packing": (
        "|".join(get_args(Packing)),
        "how documents become rows (best_fit; of conversations whole)",
    ),
    "seed": ("N", "order of documents, rows and epochs (0)"),
    "rule": ("|".join(get_args(Rule)), "where weights come from (fixed)"),
    "temperature": ("X", "of rule temperature: shares go as size^(1/X)"),
    "max-epochs": ("X", "of rule unimax: no source is seen more often"),
    "phases": ("JSON", 'other weights later: [{"from_step": 100, "sources": [{"name": ...}]}]'),
}


def add_inspect(parser: Any) -> None:
    """Arguments of `data inspect`."""
    parser.add_argument("folder", help="folder made by `llm-jax data prepare`")
    parser.add_argument(
        "--verify", action="store_true", help="read every shard, compare its sha256"
    )
    parser.add_argument("--rows", type=int, default=0, help="how many packed rows to show")
    parser.add_argument("--first-row", type=int, default=0, help="the first of them")
    parser.add_argument("--config", help="a config of pretrain: its mixture, batch size and steps")
    parser.add_argument("--steps", type=int, default=0, help="steps of the run, to count epochs")
    parser.add_argument("--batch-size", type=int, default=0, help="rows of a step")
    for flag, (form, text) in SETTINGS.items():
        parser.add_argument(f"--{flag}", metavar=form, help=text)
    parser.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="NAME=WEIGHT",
        help="token share of a source in the mixture; without any, sources count by their size",
    )


def inspect(arguments: Any) -> None:
    """Runs `data inspect`."""
    for name in ("rows", "first_row", "steps", "batch_size"):
        if getattr(arguments, name) < 0:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag}={getattr(arguments, name)} must be 0 or more")
    prepared = shards.open_prepared(arguments.folder, sources=())
    if is_conversations(prepared):
        tell_conversations(prepared, console)
    else:
        console.print(counts_table(prepared))
        print_rejects(prepared)
    tokenizer = prepared.manifest["tokenizer"]
    console.print(
        f"tokenizer {tokenizer['fingerprint'][:16]}, {tokenizer['vocab_size']:,} ids, BOS "
        f"{tokenizer['bos_id']}, EOS {tokenizer['eos_id']}; digest {prepared.digest[:16]}"
    )
    if arguments.verify:
        prepared.check_sizes()
        with console.status("reading every shard"):
            size = prepared.verify()
        console.print(f"verified: {size / 1e6:,.1f} MB are what was written")
    config, batch_size, steps = what_to_show(arguments, is_conversations(prepared))
    prepared.check_sizes({left.shard for left in config.leave_out}, config.named_sources())
    if (config.phases or config.rule == "unimax") and not (batch_size and steps):
        raise ConfigError(
            "phases and unimax count in steps: give --steps and --batch-size, or --config FILE"
        )
    order = RowOrder(sizes=((0, batch_size),)) if batch_size else None
    plan = DataPlan(config, prepared, order=order, steps=steps)
    print_mixture(plan, batch_size, steps)
    if arguments.rows:
        text = tokenizers.load(prepared.tokenizer_folder)
        for index in range(arguments.first_row, arguments.first_row + arguments.rows):
            print_row(plan, index, text)


def what_to_show(arguments: Any, whole_only: bool) -> tuple[DataConfig, int, int]:
    """(mixture, batch size, steps): of the config file, changed by what the command line says."""
    packing = "whole" if whole_only else "best_fit"
    config = DataConfig(prepared=arguments.folder, seq_len=256, packing=packing)
    batch_size, steps = arguments.batch_size, arguments.steps
    if arguments.config:
        from llm_jax.run.pretrain import PretrainConfig  # jax: 2 seconds that others need not wait

        whole = config_files.load(arguments.config, PretrainConfig)
        config = replace(whole.data, prepared=arguments.folder)
        batch_size, steps = batch_size or whole.step.batch_size, steps or whole.train.steps
    if arguments.weight:
        config = replace(config, sources=tuple(map(_parse_weight, arguments.weight)))
    words = []
    for flag in SETTINGS:
        value = getattr(arguments, flag.replace("-", "_"))
        words += [f"--{flag}", value] if value is not None else []
    return config_files.override(config, words), batch_size, steps


def _parse_weight(word: str) -> SourceWeight:
    name, _, number = word.partition("=")
    try:
        return SourceWeight(name=name, weight=float(number))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--weight {word!r} must be NAME=NUMBER, such as zh=0.3") from None


def counts_table(prepared: shards.Prepared) -> Table:
    """A table of documents, tokens and text per source and split."""
    table = Table("source", "split", box=None, pad_edge=False, header_style="bold")
    for column in ("documents", "tokens", "MB", "characters", "chars/token"):
        table.add_column(column, justify="right")
    for source, splits in prepared.sources.items():
        for name, split in splits.items():
            per_token = split.num_characters / max(1, split.num_tokens)
            table.add_row(
                *(escape(source), name, f"{split.num_documents:,}", f"{split.num_tokens:,}"),
                *(f"{split.num_bytes / 1e6:,.2f}", f"{split.num_characters:,}", f"{per_token:.2f}"),
            )
    return table


def print_rejects(prepared: shards.Prepared) -> None:
    """One line per reason for which records were left out or mended."""
    for name, source in prepared.manifest["sources"].items():
        rejects = source["rejects"]
        lines = [f"{count:,} rejected: {why}" for why, count in rejects["rejected"].items()]
        lines += [f"{count:,} mended: {why}" for why, count in rejects["repaired"].items()]
        if source["duplicates"]:
            lines.append(f"{source['duplicates']:,} exact duplicates dropped")
        for line in lines:
            console.print(f"{escape(name)}: {escape(line)} (of {rejects['records']:,} records)")
        if rejects["rejected"]:
            console.print(f"samples are in {escape(str(prepared.folder / shards.REJECTS))}")


def print_mixture(plan: DataPlan, batch_size: int, steps: int) -> None:
    """Token shares of every phase, rows and fill of every source, and its epochs by the last step."""
    table = Table("source", box=None, pad_edge=False, header_style="bold")
    phases = plan.mixture()
    for phase in phases:
        begin, ramp = phase["from_step"], phase["ramp_steps"]
        span = f"{begin} to {begin + ramp}" if ramp else f"{begin}"
        table.add_column(f"share from step {span}" if begin else "share", justify="right")
    for column in ("rows an epoch", "full", *([f"epochs at {steps:,}"] if steps else [])):
        table.add_column(column, justify="right")
    epochs = plan.epochs_at(steps * batch_size)
    for name in plan.source_names:
        shares = [p["weights"].get(name, 0.0) / sum(p["weights"].values()) for p in phases]
        table.add_row(
            *(escape(name), *(f"{share:.2%}" for share in shares)),
            *(f"{plan.epoch_rows[name]:,}", f"{plan.fills[name]:.2%}"),
            *([f"{epochs[name]:.2f}"] if steps else []),
        )
    console.print(table)
    console.print(
        f"rows of {plan.seq_len} tokens, {plan.config.packing}; plan {plan.digest[:12]}"
        + (f"; {steps:,} steps of {batch_size} rows" if steps else "")
    )


def print_row(plan: DataPlan, index: int, tokenizer: Tokenizer) -> None:
    """A decoded row and where it comes from."""
    row = plan.row(index)
    full = np.mean(row.segments_BT > 0)
    title = f"row {index} · {plan.source_of(index)} · {full:.1%} full"
    console.rule(escape(title), align="left")
    for line in segment_lines(row, tokenizer, in_color=console.color_system is not None):
        console.print(line, soft_wrap=True)


def segment_lines(row: Batch, tokenizer: Tokenizer, in_color: bool) -> Iterator[Text]:
    """Each segment of a row of arrays [T]: what the loss counts is green, the rest dim; without colour in ⟦ ⟧."""
    for segment in range(1, int(row.segments_BT.max()) + 1):
        ids, counts = segment_ids(row, segment)
        line = Text()
        line.append(f"{segment:>3} ", style="bold cyan")
        line.append(f"({len(ids)} tokens, {sum(counts)} targets) ", style="cyan")
        for piece, is_target in pieces(row, segment, tokenizer):
            marked = piece if is_target or in_color else f"⟦{piece}⟧"
            line.append(marked, style="green" if is_target else "dim")
        yield line


def segment_ids(row: Batch, segment: int) -> tuple[list[int], list[bool]]:
    """Of one segment of a row of arrays [T]: all ids (inputs and the last target), and which the loss counts."""
    here = row.segments_BT == segment
    ids = [*row.tokens_BT[here].tolist(), int(row.targets_BT[here][-1])]
    return ids, [False, *(row.loss_mask_BT[here] > 0).tolist()]


def pieces(row: Batch, segment: int, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Text of a segment in runs that the loss counts or does not; special ids as their file spells them.

    A character of several ids belongs to where its last id does.
    """
    ids, counts = segment_ids(row, segment)
    stream, run, flag = TextStream(tokenizer), "", counts[0]
    for token, counted in zip(ids, counts, strict=True):
        if token in tokenizer.special_ids:
            text = stream.flush() + tokenizer.piece_of(token)
            stream = TextStream(tokenizer)
        else:
            text = stream.push(token)
        if counted != flag:
            if run:
                yield run, flag
            run, flag = "", counted
        run += text
    run += stream.flush()
    if run:
        yield run, flag
