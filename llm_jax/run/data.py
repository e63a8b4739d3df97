"""`llm-jax data`: the stages from raw text to token shards, and a look at what is in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from llm_jax.config import nearest
from llm_jax.data import prepare as prepare_stage
from llm_jax.data.prepare import PrepareConfig
from llm_jax.errors import ConfigError
from llm_jax.run import cli
from llm_jax.run.data_beam import add_beam, beam
from llm_jax.run.data_clean import add_clean, clean
from llm_jax.run.data_dedup import add_dedup, dedup
from llm_jax.run.data_inspect import add_inspect, counts_table, inspect, print_rejects
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
    print_rejects(prepared)
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


COMMANDS = {
    "clean": ("documents worth training on, and why the others are not", add_clean, clean),
    "language": ("sources split by language, scored against a reference", add_language, language),
    "dedup": ("the same sources without exact and near repeats", add_dedup, dedup),
    "decontaminate": ("no document that holds an evaluation set", add_decontaminate, decontaminate),
    "prepare": ("text to token shards, written once", _add_prepare, _prepare),
    "beam": ("clean, language, dedup and prepare in one, on a cluster", add_beam, beam),
    "tfds": ("a folder of these as a TFDS dataset", add_tfds, tfds),
    "verify": ("follow the manifests from token shards back to raw text", add_verify, verify_chain),
    "inspect": ("counts, shares, fill and decoded rows", add_inspect, inspect),
}

if __name__ == "__main__":
    cli.leave(cli.run(main))
