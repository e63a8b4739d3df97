"""`llm-jax data clean`: documents worth training on, and a reason for every one that is left out."""

from dataclasses import replace
from typing import Any

from rich.markup import escape
from rich.table import Table

from llm_jax.config import load
from llm_jax.data.clean.report import HTML_REPORT
from llm_jax.data.clean.rules import RULES, CleanConfig
from llm_jax.data.clean.stage import CleanStage, clean_stage
from llm_jax.run.data_sources import add_stage, console, live_lines, read_sources


def add_clean(parser: Any) -> None:
    """Arguments of `data clean`."""
    add_stage(parser)
    add_rules(parser)
    parser.add_argument("--workers", type=int, default=0, help="processes that clean (0: this one)")


def add_rules(parser: Any) -> None:
    """Which rules clean; `rules_of` reads them."""
    parser.add_argument("--config", metavar="FILE", help="a CleanConfig as .json or .py")
    parser.add_argument(
        "--rules", metavar="A,B,...", help=f"rules in this order, of {','.join(RULES)}"
    )
    parser.add_argument("--terms", metavar="FILE", help="WRONG<TAB>RIGHT a line; adds the rule")
    parser.add_argument("--block-list", metavar="FILE", help="a phrase a line; adds the rule")
    parser.add_argument(
        "--simplify", action="store_true", help="traditional characters to simplified"
    )
    parser.add_argument(
        "--max-drop-fraction",
        type=float,
        default=1.0,
        help="stop when the rules reject more than this share of a source (1)",
    )


def rules_of(arguments: Any) -> CleanConfig:
    """The rules that `--config` and the flags ask for."""
    config = load(arguments.config, CleanConfig) if arguments.config else None
    rules = config.rules if config else CleanConfig().rules
    if arguments.rules:
        rules = tuple(name.strip().replace("-", "_") for name in arguments.rules.split(","))
    added = {
        "simplify": arguments.simplify,
        "terms": arguments.terms,
        "block_list": arguments.block_list,
    }
    for name, wanted in added.items():
        if wanted and name not in rules:
            # before the rules that judge, so that these see the text as it will be
            rules = _insert(rules, name)
    files = {"terms": arguments.terms, "block_list": arguments.block_list}
    files = {name: path for name, path in files.items() if path}
    return replace(config or CleanConfig(), rules=rules, **files)


def _insert(rules: tuple[str, ...], name: str) -> tuple[str, ...]:
    judges = ("boilerplate", "block_list", "quality", "repetition", "personal")
    place = next((i for i, rule in enumerate(rules) if rule in judges), len(rules))
    return (*rules[:place], name, *rules[place:])


def clean(arguments: Any) -> None:
    """Runs `data clean`."""
    config = CleanStage(
        sources=read_sources(arguments),
        output=arguments.output,
        rules=rules_of(arguments),
        max_reject_fraction=arguments.max_reject_fraction,
        max_drop_fraction=arguments.max_drop_fraction,
        compression=arguments.compression,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    with live_lines() as show:
        manifest = clean_stage(
            config,
            lambda now: show(
                now.source,
                f"{now.documents:,} documents, {now.kept:,} kept, {now.bytes / 1e6:,.1f} M characters",
            ),
        )
    console.print(_table(manifest))
    folder = escape(config.output)
    console.print(f"report in {folder}/{HTML_REPORT}")
    for source in config.sources:
        console.print(f"source for the next stage: {source.name}={folder}/{source.name}")
    console.print(f"cleaned data in {folder}, digest {manifest['digest'][:16]}")


def _table(manifest: dict[str, Any]) -> Table:
    """Documents by source, rule and reason."""
    table = Table("source", "rule", "reason", box=None, pad_edge=False, header_style="bold")
    table.add_column("documents", justify="right")
    table.add_column("share", justify="right")
    for name, entry in manifest["sources"].items():
        counts = entry["rules"]
        total = max(1, counts["documents"])

        def row(*cells: str, count: int, total: int = total) -> None:
            table.add_row(*map(escape, cells), f"{count:,}", f"{count / total:.2%}")

        row(name, "kept", f"{counts['kept_untouched']:,} untouched", count=counts["kept"])
        for rule, done in counts["by_rule"].items():
            if done["changed"]:
                row(name, rule, "changed, kept", count=done["changed"])
            for reason, rejected in done["rejected"].items():
                row(name, rule, reason, count=rejected["documents"])
        for reason, count in entry["rejects"]["rejected"].items():
            row(name, "unreadable", reason, count=count)
    return table
