"""`llm-jax data language` and `llm-jax data decontaminate`."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from llm_jax.data.dedup.contamination import ContaminationStage, contamination_stage
from llm_jax.data.language_stage import LanguageStage, language_stage
from llm_jax.data.sources import parse_source_spec
from llm_jax.run.data_sources import add_stage, console, live_lines, read_sources


def _reading(arguments: Any) -> dict[str, Any]:
    """What both stages are told by the same arguments."""
    return {
        "sources": read_sources(arguments),
        "output": arguments.output,
        "max_reject_fraction": arguments.max_reject_fraction,
        "compression": arguments.compression,
        "workers": arguments.workers,
        "overwrite": arguments.overwrite,
    }


def add_language(parser: Any) -> None:
    """Arguments of `data language`."""
    add_stage(parser)
    add_languages(parser)
    parser.add_argument(
        "--second-opinion",
        action="store_true",
        help="count where lingua tells another language; needs the extra [lid]",
    )
    parser.add_argument("--workers", type=int, default=0, help="processes (0: this one)")


def add_languages(parser: Any) -> None:
    """Which languages stay; `languages_of` reads them."""
    parser.add_argument("--keep", default="", metavar="zh,en", help="languages to keep (all)")
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="LANGUAGE=PATH",
        help="good text of a language; documents get `bits`, low where they are like it",
    )
    parser.add_argument(
        "--max-bits", type=float, default=0.0, help="drop what scores more bits per character"
    )


def languages_of(arguments: Any) -> dict[str, Any]:
    """What `LanguageStage` is told by the arguments of `add_languages`."""
    return {
        "keep": tuple(word.strip() for word in arguments.keep.split(",") if word.strip()),
        "references": tuple(map(parse_source_spec, arguments.reference)),
        "max_bits": arguments.max_bits,
    }


def language(arguments: Any) -> None:
    """Runs `data language`."""
    config = LanguageStage(
        **_reading(arguments),
        **languages_of(arguments),
        second_opinion=arguments.second_opinion,
    )
    with live_lines() as show:
        manifest = language_stage(config, show)
    _print(manifest, config.output)
    for name, reference in manifest["references"].items():
        told = ", ".join(f"{q} %: {bits}" for q, bits in reference["bits"].items())
        console.print(f"held-out reference {escape(name)}, bits per character: {told}")


def add_decontaminate(parser: Any) -> None:
    """Arguments of `data decontaminate`."""
    default = {f: spec.default for f, spec in ContaminationStage.__dataclass_fields__.items()}
    add_stage(parser)
    parser.add_argument(
        "--against",
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="an evaluation set, one item a document; repeat for more",
    )
    for name, kind, text in (
        ("ngram", int, "words of an n-gram; a Han character is a word"),
        ("share", float, "of an item's n-grams that a document may not hold"),
        ("min_words", int, "items below are not looked for"),
        ("workers", int, "processes"),
    ):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(
            flag, type=kind, default=default[name], help=f"{text} ({default[name]})"
        )


def decontaminate(arguments: Any) -> None:
    """Runs `data decontaminate`."""
    config = ContaminationStage(
        **_reading(arguments),
        against=tuple(map(parse_source_spec, arguments.against)),
        ngram=arguments.ngram,
        share=arguments.share,
        min_words=arguments.min_words,
    )
    with live_lines() as show:
        manifest = contamination_stage(config, show)
    _print(manifest, config.output)
    against = manifest["against"]
    console.print(f"{against['items']:,} items looked for, {against['too_short']:,} too short")


def _print(manifest: dict[str, Any], output: str) -> None:
    """Documents kept and dropped by source and label, and where the kept ones are."""
    table = Table("source", "", "", box=None, pad_edge=False, show_header=False)
    for source, seen in manifest["seen"].items():
        for kind in ("kept", "dropped", "remarks"):
            for label, count in sorted(seen.get(kind, {}).items()):
                table.add_row(escape(source), kind, escape(label), f"{count:,}")
    console.print(table)
    for name in manifest["sources"]:
        console.print(f"source for the next stage: {escape(name)}={escape(output)}/{escape(name)}")
    console.print(f"data in {escape(output)}, digest {manifest['digest'][:16]}")
