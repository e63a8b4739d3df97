"""`llm-jax data dedup`: the same sources without exact and near repeats."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from llm_jax.data.dedup.stage import REPORT, DedupStage, dedup_stage
from llm_jax.run.data_sources import add_stage, console, live_lines, read_sources


def add_dedup(parser: Any) -> None:
    """Arguments of `data dedup`."""
    default = {field: spec.default for field, spec in DedupStage.__dataclass_fields__.items()}
    add_stage(parser)
    for name, kind, text in (
        ("threshold", float, "similarity (Jaccard, of shingles) from which on two are the same"),
        ("shingle", int, "characters of a shingle"),
        ("memory_mb", int, "memory for sorting; with less it sorts in parts"),
        ("workers", int, "processes that read, compare and write"),
    ):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(
            flag, type=kind, default=default[name], help=f"{text} ({default[name]})"
        )
    parser.add_argument("--exact-only", action="store_true", help="equal texts only")


def dedup(arguments: Any) -> None:
    """Runs `data dedup`."""
    config = DedupStage(
        sources=read_sources(arguments),
        output=arguments.output,
        threshold=arguments.threshold,
        shingle=arguments.shingle,
        exact_only=arguments.exact_only,
        memory_mb=arguments.memory_mb,
        max_reject_fraction=arguments.max_reject_fraction,
        compression=arguments.compression,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    with live_lines() as show:
        manifest = dedup_stage(
            config, lambda now: show(now.source, f"{now.documents:,} documents {now.doing}")
        )
    table = Table("source", box=None, pad_edge=False, header_style="bold")
    for column in ("documents", "exact repeats", "near repeats", "kept"):
        table.add_column(column, justify="right")
    for name, entry in manifest["sources"].items():
        counts = entry["repeats"]
        numbers = (counts["documents"], counts["exact"], counts["near"], entry["documents"])
        table.add_row(escape(name), *(f"{number:,}" for number in numbers))
    console.print(table)
    folder = escape(config.output)
    console.print(f"pairs to look at in {folder}/{REPORT}")
    for source in config.sources:
        console.print(f"source for the next stage: {source.name}={folder}/{source.name}")
    console.print(f"documents without repeats in {folder}, digest {manifest['digest'][:16]}")
