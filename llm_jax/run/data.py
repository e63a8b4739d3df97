"""`llm-jax data`: the stages from raw text to token shards, and a look at what is in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from llm_jax import tokenizer as tokenizers
from llm_jax.config import nearest
from llm_jax.data import prepare as prepare_stage
from llm_jax.data import shards
from llm_jax.data.batch import Batch
from llm_jax.data.mixture import DataConfig, DataPlan, SourceWeight
from llm_jax.data.packing import Packing
from llm_jax.data.prepare import PrepareConfig
from llm_jax.errors import ConfigError
from llm_jax.run import cli
from llm_jax.run.data_beam import add_beam, beam
from llm_jax.run.data_clean import add_clean, clean
from llm_jax.run.data_dedup import add_dedup, dedup
from llm_jax.run.data_sift import add_decontaminate, add_language, decontaminate, language
from llm_jax.run.data_sources import add_sources, console, read_sources
from llm_jax.run.data_tfds import add_tfds, tfds
from llm_jax.run.data_verify import add_verify, verify_chain


def main(argv: list[str]) -> None:
    """Runs one of `COMMANDS`."""
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print(f"usage: llm-jax data {'|'.join(COMMANDS)} ...\n")
        print("\n".join(f"  {name:<{width}}  {text}" for name, (text, *_) in COMMANDS.items()))
        return
    if argv[0] not in COMMANDS:
        raise ConfigError(f"llm-jax data: unknown {argv[0]!r}; {nearest(argv[0], list(COMMANDS))}")
    text, add_arguments, run = COMMANDS[argv[0]]
    # one parser per command, not subparsers: those look for the nearest option in the wrong list
    parser = cli.Parser(prog=f"llm-jax data {argv[0]}", description=text)
    add_arguments(parser)
    run(parser.parse_args(argv[1:]))


def _add_prepare(parser: Any) -> None:
    default = {field: spec.default for field, spec in PrepareConfig.__dataclass_fields__.items()}
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="tokenizer to use")
    add_sources(parser)
    for name, kind, text in (
        ("holdout_fraction", float, "share of each source's documents held out"),
        ("max_reject_fraction", float, "stop when more than this share is unusable"),
        ("shard_max_tokens", int, "tokens per shard file"),
        ("workers", int, "processes that encode"),
    ):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(
            flag, type=kind, default=default[name], help=f"{text} ({default[name]})"
        )
    parser.add_argument("--keep-duplicates", action="store_true", help="keep exact repeats")
    parser.add_argument("--overwrite", action="store_true", help="replace prepared data there")


def _prepare(arguments: Any) -> None:
    config = PrepareConfig(
        sources=read_sources(arguments),
        tokenizer=arguments.tokenizer,
        output=arguments.output,
        holdout_fraction=arguments.holdout_fraction,
        max_reject_fraction=arguments.max_reject_fraction,
        drop_duplicates=not arguments.keep_duplicates,
        shard_max_tokens=arguments.shard_max_tokens,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    with progress_bar() as report:
        prepared = prepare_stage.prepare(config, report)
    console.print(counts_table(prepared))
    _print_rejects(prepared)
    console.print(f"prepared data in {escape(config.output)}, digest {prepared.digest[:16]}")


@contextmanager
def progress_bar() -> Iterator[Any]:
    """Yields a callback for `prepare` that draws one live line per source."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def report(now: prepare_stage.Progress) -> None:
            if now.source not in tasks:
                tasks[now.source] = bar.add_task("")
            text = (
                f"{escape(now.source)}: {now.documents:,} documents, {now.tokens:,} tokens, "
                f"{now.bytes / 1e6:,.1f} MB" + (f", {now.rejected:,} rejected" * bool(now.rejected))
            )
            bar.update(tasks[now.source], description=text)

        yield report


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


def _print_rejects(prepared: shards.Prepared) -> None:
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


def _add_inspect(parser: Any) -> None:
    parser.add_argument("folder", help="folder made by `llm-jax data prepare`")
    parser.add_argument(
        "--verify", action="store_true", help="read every shard, compare its sha256"
    )
    parser.add_argument("--rows", type=int, default=0, help="how many packed rows to show")
    parser.add_argument("--first-row", type=int, default=0, help="the first of them")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per row (256)")
    parser.add_argument("--packing", choices=get_args(Packing), default="best_fit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="NAME=WEIGHT",
        help="token share of a source in the mixture; without any, sources count by their size",
    )


def _inspect(arguments: Any) -> None:
    prepared = shards.open_prepared(arguments.folder)
    console.print(counts_table(prepared))
    _print_rejects(prepared)
    tokenizer = prepared.manifest["tokenizer"]
    console.print(
        f"tokenizer {tokenizer['fingerprint'][:16]}, {tokenizer['vocab_size']:,} ids, BOS "
        f"{tokenizer['bos_id']}, EOS {tokenizer['eos_id']}; digest {prepared.digest[:16]}"
    )
    if arguments.verify:
        with console.status("reading every shard"):
            size = prepared.verify()
        console.print(f"verified: {size / 1e6:,.1f} MB are what was written")
    if arguments.rows < 0 or arguments.first_row < 0:
        raise ConfigError(f"--rows={arguments.rows} and --first-row must be 0 or more")
    if arguments.rows:
        config = DataConfig(
            prepared=arguments.folder,
            sources=tuple(_parse_weight(word) for word in arguments.weight),
            seq_len=arguments.seq_len,
            packing=arguments.packing,
            seed=arguments.seed,
        )
        _print_rows(prepared, DataPlan(config, prepared), arguments.first_row, arguments.rows)


def _parse_weight(word: str) -> SourceWeight:
    name, _, number = word.partition("=")
    try:
        return SourceWeight(name=name, weight=float(number))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--weight {word!r} must be NAME=NUMBER, such as zh=0.3") from None


def _print_rows(prepared: shards.Prepared, plan: DataPlan, first: int, count: int) -> None:
    """Prints the mixture, then rows with a mark before every segment."""
    for name in plan.source_names:
        console.print(
            f"{escape(name)}: {plan.shares[name]:.2%} of the tokens, {plan.epoch_rows[name]:,} rows "
            f"an epoch, {plan.fills[name]:.2%} full"
        )
    tokenizer = tokenizers.load(prepared.tokenizer_folder)
    for index in range(first, first + count):
        row = plan.row(index)
        filled = row.loss_mask_BT.mean()
        title = f"row {index} · {plan.source_of(index)} · {filled:.1%} full"
        console.rule(escape(title), align="left")
        for segment in range(1, int(row.segments_BT.max()) + 1):
            ids = segment_ids(row, segment)
            opened = "BOS " if ids[0] == prepared.bos_id else "... "
            closed = " EOS" if ids[-1] == prepared.eos_id else " ..."
            console.print(
                f"[bold cyan]{segment:>3} ({len(ids)} tokens)[/] [dim]{opened}[/]"
                f"{escape(tokenizer.decode(ids))}[dim]{closed}[/]"
            )


def segment_ids(row: Batch, segment: int) -> list[int]:
    """All ids of one segment of a row of arrays [T]: its inputs and the last target."""
    here = row.segments_BT == segment
    return [*row.tokens_BT[here].tolist(), int(row.targets_BT[here][-1])]


COMMANDS = {
    "clean": ("documents worth training on, and why the others are not", add_clean, clean),
    "language": ("sources split by language, scored against a reference", add_language, language),
    "dedup": ("the same sources without exact and near repeats", add_dedup, dedup),
    "decontaminate": ("no document that holds an evaluation set", add_decontaminate, decontaminate),
    "prepare": ("text to token shards, written once", _add_prepare, _prepare),
    "beam": ("clean, language, dedup and prepare in one, on a cluster", add_beam, beam),
    "tfds": ("a folder of these as a TFDS dataset", add_tfds, tfds),
    "verify": ("follow the manifests from token shards back to raw text", add_verify, verify_chain),
    "inspect": ("counts, shares, fill and decoded rows", _add_inspect, _inspect),
}

if __name__ == "__main__":
    cli.leave(cli.run(main))
