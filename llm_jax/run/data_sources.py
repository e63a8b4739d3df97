"""What the stages from raw text on share on the command line: their sources, and live progress."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_args

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from llm_jax.data.document_files import Compression
from llm_jax.data.sources import Format, SourceConfig, parse_source_spec
from llm_jax.data.text_files import Division

console = Console(highlight=False)


def add_stage(parser: Any) -> None:
    """The arguments of a stage from documents to documents; `read_sources` reads the sources."""
    add_sources(parser)
    parser.add_argument(
        "--max-reject-fraction",
        type=float,
        default=0.001,
        help="stop when more than this share of the records is unreadable (0.001)",
    )
    parser.add_argument("--compression", choices=get_args(Compression), default="zst")
    parser.add_argument("--overwrite", action="store_true", help="replace such data there")


def add_sources(parser: Any) -> None:
    """Where documents come from, and the folder to make; `read_sources` is the other half."""
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to make")
    parser.add_argument(
        *("--source", "--text"),
        dest="sources",
        action="append",
        required=True,
        metavar="SPEC",
        help="NAME=PATH, PATH, package-docs, package-docs:numpy,jax, sample:zh or tfds:NAME:SPLIT; "
        "repeat for more. PATH is a file, folder or glob of .txt .md .jsonl[.gz|.zst] .parquet "
        ".array_record",
    )
    parser.add_argument("--format", choices=get_args(Format), default="auto")
    parser.add_argument("--text-field", default="text", help="field or column that holds the text")
    parser.add_argument(
        "--document",
        choices=get_args(Division),
        default="auto",
        help="what of a plain text file is one document; auto: all of it up to 64 KB",
    )
    parser.add_argument("--max-bytes", type=int, default=0, help="stop each source there; 0: never")


def read_sources(arguments: Any) -> tuple[SourceConfig, ...]:
    """The sources that the arguments of `add_sources` name."""
    reading = {
        "text_field": arguments.text_field,
        "document": arguments.document,
        "max_bytes": arguments.max_bytes,
    }
    sources = [replace(parse_source_spec(spec), **reading) for spec in arguments.sources]
    if arguments.format != "auto":
        sources = [replace(source, format=arguments.format) for source in sources]
    return tuple(sources)


@contextmanager
def live_lines() -> Iterator[Any]:
    """Yields a function (name, text) that draws one live line per name."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(name: str, text: str) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task("")
            bar.update(tasks[name], description=f"{escape(name)}: {text}")

        yield show
