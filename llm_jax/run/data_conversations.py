"""`llm-jax data conversations`: conversations to token shards that know which tokens are answers."""

from collections.abc import Sequence
from typing import Any, get_args

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llm_jax.data.prepare import PrepareConfig
from llm_jax.data.shards import TRAIN, Prepared
from llm_jax.data.sources import SourceConfig, parse_source_spec
from llm_jax.instruct.masks import Loss
from llm_jax.instruct.prepare import ConversationsConfig, Form, prepare_conversations
from llm_jax.instruct.templates import NAMES
from llm_jax.run.data_sources import console, live_lines


def add_conversations(parser: Any) -> None:
    """Arguments of `data conversations`."""
    add = parser.add_argument
    add("--tokenizer", required=True, metavar="FOLDER", help="the base model's tokenizer")
    add(
        "--source",
        dest="sources",
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="file, folder or glob of .jsonl[.gz|.zst] .parquet .array_record, or tfds:NAME:SPLIT; "
        "repeat for more",
    )
    add("--output", required=True, metavar="FOLDER", help="folder to make")
    add("--template", default="chatml", help=f"{', '.join(NAMES)} (chatml)")
    add(
        "--format", choices=get_args(Form), default="auto",
        help="by the fields; preference: pairs of a better and a worse answer, for instruct --method dpo",
    )  # fmt: skip
    add("--loss", choices=get_args(Loss), help="which turns are learned (all; of pairs last)")
    add("--header", action="store_true", help="learn the tokens that open an answer too")
    add("--seq-len", type=int, default=2048, help="longest conversation in tokens (2048)")
    add("--holdout-fraction", type=float, default=0.01, help="share held out (0.01)")
    add("--max-reject-fraction", type=float, default=0.001, help="stop above this share (0.001)")
    add("--shard-max-tokens", type=int, default=1 << 27, help="tokens per shard file")
    add("--workers", type=int, default=0, help="processes that encode (0)")
    add("--keep-duplicates", action="store_true", help="keep exact repeats")
    add("--overwrite", action="store_true", help="replace prepared data there")


def conversations(arguments: Any) -> None:
    """Runs `data conversations`."""
    config = ConversationsConfig(
        prepare=PrepareConfig(
            sources=read_specs(arguments.sources),
            tokenizer=arguments.tokenizer,
            output=arguments.output,
            holdout_fraction=arguments.holdout_fraction,
            max_reject_fraction=arguments.max_reject_fraction,
            drop_duplicates=not arguments.keep_duplicates,
            shard_max_tokens=arguments.shard_max_tokens,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
        ),
        template=arguments.template,
        form=arguments.format,
        loss=arguments.loss or ("last" if arguments.format == "preference" else "all"),
        header=arguments.header,
        seq_len=arguments.seq_len,
    )
    with live_lines() as show:
        prepared = prepare_conversations(
            config,
            lambda now: show(now.source, f"{now.documents:,} read, {now.rejected:,} rejected"),
        )
    tell_conversations(prepared, console)
    console.print(
        f"prepared data in {escape(config.prepare.output)}, digest {prepared.digest[:16]}"
    )


def read_specs(specs: Sequence[str]) -> tuple[SourceConfig, ...]:
    """Sources as the command line names them."""
    return tuple(parse_source_spec(spec) for spec in specs)


def tell_conversations(prepared: Prepared, console: Console) -> None:
    """Prints how many tokens are targets, what was left out, and how it was written down."""
    table = Table("source", "split", box=None, pad_edge=False, header_style="bold")
    pairs = prepared.holds_pairs
    for column in (
        "pairs" if pairs else "conversations",
        "tokens",
        "targets",
        "answer characters",
        "targets/tokens",
    ):
        table.add_column(column, justify="right")
    for source, splits in prepared.sources.items():
        for name, split in splits.items():
            table.add_row(
                *(escape(source), name, f"{split.num_documents:,}", f"{split.num_tokens:,}"),
                *(f"{split.num_targets:,}", f"{split.num_characters:,}"),
                f"{split.num_targets / max(1, split.num_tokens):.1%}",
            )
    console.print(table)
    for name, source in prepared.manifest["sources"].items():
        lengths, rejects = source["lengths"], source["rejects"]
        lines = [f"{count:,} rejected: {why}" for why, count in rejects["rejected"].items()]
        lines += [f"{count:,} mended: {why}" for why, count in rejects["repaired"].items()]
        if source["duplicates"]:
            lines.append(f"{source['duplicates']:,} exact duplicates dropped")
        meanings = {
            "shortened": "longer than seq_len, later turns left out",
            "truncated": "longer than seq_len, their answer cut",
            "dropped": f"dropped, {'both answers are longer than' if pairs else 'no answer within'} seq_len",
        }
        lines += [f"{lengths[key]:,} {text}" for key, text in meanings.items() if lengths[key]]
        for line in lines:
            console.print(f"{escape(name)}: {escape(line)} (of {rejects['records']:,} records)")
    facts = prepared.manifest["conversations"]
    header = "with" if facts["header"] else "without"
    console.print(
        f"template {facts['template']}, loss on {facts['loss']}, {header} the header, at most "
        f"{facts['seq_len']:,} pairs; tokenizer of {prepared.vocab_size:,} ids, EOS {prepared.eos_id}"
    )


def is_conversations(prepared: Prepared) -> bool:
    """Whether a folder was made by `data conversations`."""
    return any(split[TRAIN].has_mask for split in prepared.sources.values())
