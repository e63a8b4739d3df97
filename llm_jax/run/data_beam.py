"""`llm-jax data beam`: raw files to token shards in one Apache Beam pipeline, here or on a cluster."""

import importlib.util
import logging
from typing import Any

from rich.markup import escape
from rich.table import Table

from llm_jax.data.clean.report import HTML_REPORT
from llm_jax.data.dedup.stage import DedupStage
from llm_jax.data.prepare import PrepareConfig
from llm_jax.errors import ConfigError
from llm_jax.run.data_clean import add_rules, rules_of
from llm_jax.run.data_sift import add_languages, languages_of
from llm_jax.run.data_sources import add_sources, console, read_sources

STAGES = "clean,language,dedup"


def add_beam(parser: Any) -> None:
    """Arguments of `data beam`."""
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="tokenizer to use")
    add_sources(parser)
    parser.add_argument(
        "--stages",
        default=STAGES,
        help=f"what is done before the shards are made ({STAGES}); without dedup equal texts stay "
        "too, as with `prepare --keep-duplicates`",
    )
    add_rules(parser)
    add_languages(parser)
    for stage, name, kind, text in (
        (DedupStage, "threshold", float, "similarity from which on two texts are the same"),
        (DedupStage, "shingle", int, "characters of a shingle"),
        (PrepareConfig, "holdout_fraction", float, "share of each source held out"),
        (PrepareConfig, "max_reject_fraction", float, "stop when more of a source is unusable"),
        (PrepareConfig, "shard_max_tokens", int, "tokens per shard; one worker sorts a shard"),
    ):
        default = stage.__dataclass_fields__[name].default
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=default, help=f"{text} ({default})")
    parser.add_argument("--exact-only", action="store_true", help="only equal texts are repeats")
    parser.add_argument("--overwrite", action="store_true", help="replace prepared data there")
    parser.add_argument(
        "options",
        nargs="*",
        metavar="-- BEAM OPTIONS",
        help="after '--': Beam's own, such as --runner=DataflowRunner --project=...; without: "
        "Beam's local runner",
    )


def beam(arguments: Any) -> None:
    """Runs `data beam`."""
    if importlib.util.find_spec("apache_beam") is None:
        raise ConfigError("data beam needs Apache Beam; pip install 'llm-jax[beam]'")
    # Beam says of many things that are not installed that they are not
    logging.getLogger().setLevel(logging.ERROR)
    from llm_jax.data.cluster.stage import ClusterConfig, cluster_stage

    config = ClusterConfig(
        sources=read_sources(arguments),
        tokenizer=arguments.tokenizer,
        output=arguments.output,
        stages=tuple(word.strip() for word in arguments.stages.split(",") if word.strip()),
        rules=rules_of(arguments),
        max_reject_fraction=arguments.max_reject_fraction,
        max_drop_fraction=arguments.max_drop_fraction,
        **languages_of(arguments),
        threshold=arguments.threshold,
        shingle=arguments.shingle,
        exact_only=arguments.exact_only,
        holdout_fraction=arguments.holdout_fraction,
        shard_max_tokens=arguments.shard_max_tokens,
        overwrite=arguments.overwrite,
    )
    with console.status("the pipeline runs"):
        manifest = cluster_stage(config, arguments.options)
    console.print(_table(manifest))
    folder = escape(config.output)
    if "clean" in config.stages:
        console.print(f"report in {folder}/{HTML_REPORT}")
    console.print(f"prepared data in {folder}, digest {manifest['digest'][:16]}")


def _table(manifest: dict[str, Any]) -> Table:
    """Documents read and rejected by source, then what is left of each language."""
    table = Table("source", "", box=None, pad_edge=False, header_style="bold")
    table.add_column("documents", justify="right")
    table.add_column("tokens", justify="right")
    for name, read in manifest["read"].items():
        rejects = read["rejects"]
        table.add_row(escape(name), "read", f"{rejects['records']:,}", "")
        for reason, count in rejects["rejected"].items():
            table.add_row(escape(name), f"unreadable: {escape(reason)}", f"{count:,}", "")
        for rule, done in read.get("rules", {}).get("by_rule", {}).items():
            for reason, rejected in done["rejected"].items():
                count = f"{rejected['documents']:,}"
                table.add_row(escape(name), f"{rule}: {escape(reason)}", count, "")
        for label, count in read.get("languages", {}).get("dropped", {}).items():
            table.add_row(escape(name), f"language: {escape(label)}", f"{count:,}", "")
    for name, entry in manifest["sources"].items():
        for kind in ("exact", "near"):
            table.add_row(escape(name), f"{kind} repeats", f"{entry['repeats'][kind]:,}", "")
        for split, counts in entry["splits"].items():
            numbers = f"{counts['documents']:,}", f"{counts['tokens']:,}"
            table.add_row(escape(name), split, *numbers)
    return table
