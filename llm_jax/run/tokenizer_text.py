"""The text that tokenizer commands read: options, sources, documents in batches, output folders."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from llm_jax import config
from llm_jax.data.sources import (
    Document,
    Rejects,
    SourceConfig,
    parse_source_spec,
    read_documents,
)
from llm_jax.errors import ConfigError
from llm_jax.run import cli
from llm_jax.tokenizer import files as tokenizer_files

log = logging.getLogger(__name__)

MAX_REJECT_FRACTION = 0.001


def add_sources(parser: cli.Parser, name: str, help: str, required: bool = False) -> None:
    """An option that takes sources of text, several at once or one by one."""
    parser.add_argument(
        name, action="extend", nargs="+", default=[], required=required, metavar="SOURCE", help=help
    )


def add_text_options(parser: cli.Parser) -> None:
    """How the sources are read."""
    parser.add_argument(
        "--text-field", default="text", help="field that holds the text (default: text)"
    )
    parser.add_argument(
        "--max-reject-fraction",
        type=float,
        default=MAX_REJECT_FRACTION,
        metavar="SHARE",
        help=f"stop when more of a source's records are unusable (default: {MAX_REJECT_FRACTION})",
    )


def sources_of(specs: Sequence[str], text_field: str) -> list[SourceConfig]:
    """The sources that words of the command line name."""
    return [dataclasses.replace(parse_source_spec(spec), text_field=text_field) for spec in specs]


class Reader:
    """The texts of all sources, one after the other, and an account of what was read."""

    def __init__(self, sources: list[SourceConfig], max_reject_fraction: float):
        self._sources, self._max_reject_fraction = sources, max_reject_fraction
        self.report: list[dict] = []

    def texts(self) -> Iterator[str]:
        """Every document's text; stops on too many unusable records."""
        for source in self._sources:
            rejects, characters = Rejects(), 0
            for document in read_documents(source, rejects):
                characters += len(document.text)
                yield document.text
            rejects.check(source.name, self._max_reject_fraction)
            log.info("read %s: %d records, %d characters", source.name, rejects.records, characters)
            entry = {"source": config.to_dict(source), "characters": characters}
            self.report.append(entry | rejects.report())


def batches(
    source: SourceConfig, max_reject_fraction: float, characters: int = 1 << 20
) -> Iterator[list[Document]]:
    """Documents in groups of about `characters`, enough to keep the encoder's threads busy."""
    rejects = Rejects()
    group, total = [], 0
    for document in read_documents(source, rejects):
        group.append(document)
        total += len(document.text)
        if total >= characters:
            yield group
            group, total = [], 0
    if group:
        yield group
    rejects.check(source.name, max_reject_fraction)


def check_output(folder: Path, overwrite: bool, made: Sequence[str]) -> None:
    """Refuses before the work, not after it, what would be refused or silently replaced at its end.

    Args:
      folder: where the tokenizer goes.
      overwrite: whether one that is there may be replaced.
      made: the files that will be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder} is a file; give a folder")
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"--output {folder} cannot be made: {above} is no folder to write into")
    names = (
        tokenizer_files.SENTENCEPIECE,
        tokenizer_files.HUGGING_FACE,
        *tokenizer_files.COMPANIONS,
    )
    present = [name for name in names if (folder / name).exists()]
    replaceable = set(present) == set(made)  # else another kind, or another tool's tokenizer
    if present and not (overwrite and replaceable):
        remedy = "choose another folder" + (", or add --overwrite" if replaceable else "")
        raise ConfigError(f"--output {folder} already holds {', '.join(present)}; {remedy}")
