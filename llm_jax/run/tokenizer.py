"""`llm-jax tokenizer train` learns a vocabulary from text; `llm-jax tokenizer info` looks at one.

    llm-jax tokenizer train --input package-docs zh=sample:zh --output runs/tok --vocab-size 8000
    llm-jax tokenizer info runs/tok --text news/2024.jsonl.gz

An input is what `data prepare` takes too: a file, folder or glob, `package-docs`, `sample:zh`,
`tfds:NAME:SPLIT`, each with or without `NAME=` before it.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llm_jax import config, tokenizer
from llm_jax.config import nearest
from llm_jax.data.sources import Rejects, SourceConfig, parse_source_spec, read_documents
from llm_jax.errors import ConfigError
from llm_jax.run import cli
from llm_jax.tokenizer import Tokenizer, TokenizerTrainConfig
from llm_jax.tokenizer import files as tokenizer_files

log = logging.getLogger(__name__)

RECORD = "training.json"  # beside the model: what it was trained on, and how
MAX_REJECT_FRACTION = 0.001

SETTINGS = {
    "kind": "bpe, or unigram, which trains some 20 times longer",
    "vocab_size": "number of ids, the special ones, the newline and 256 bytes among them",
    "character_coverage": "share of the text's characters that get a piece of their own",
    "byte_fallback": "spell other characters as bytes instead of <unk>",
    "normalization": "identity, nfkc, nmt_nfkc, nfkc_cf or nmt_nfkc_cf; all but identity lose text",
    "add_dummy_prefix": "put a space before every text",
    "remove_extra_whitespaces": "drop leading, trailing and double spaces",
    "split_digits": "make every digit a piece of its own",
    "special_tokens": "JSON list of control tokens; their ids start at 4",
    "max_bytes": "train on an even sample of lines of this size when there is more text",
    "threads": "part of the recipe: unigram scores depend on it",
    "seed": "of the sample",
}


def main(argv: list[str]) -> None:
    """Runs `tokenizer train ...` or `tokenizer info ...`."""
    verbs = {"train": train, "info": info}
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nllm-jax tokenizer train --help and info --help say more.")
        return
    if argv[0] not in verbs:
        raise ConfigError(f"unknown command tokenizer {argv[0]!r}; {nearest(argv[0], list(verbs))}")
    verbs[argv[0]](argv[1:])


def train(argv: list[str]) -> None:
    """Learns a tokenizer and writes it, with a record of its making, into a folder."""
    parser = cli.Parser(prog="llm-jax tokenizer train", description="Learn a vocabulary from text.")
    parser.add_argument(
        "--input",
        action="extend",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help="text to learn from",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="where to put it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the tokenizer in FOLDER")
    _add_text_options(parser)
    defaults = TokenizerTrainConfig()
    for field in dataclasses.fields(TokenizerTrainConfig):
        default = getattr(defaults, field.name)
        shown = json.dumps(default) if isinstance(default, tuple) else default
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            metavar="VALUE",
            help=f"{SETTINGS[field.name]} (default: {str(shown).replace('%', '%%')})",
        )
    words = parser.parse_args(argv)
    given = {name: getattr(words, name) for name in SETTINGS if getattr(words, name) is not None}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    settings = config.override(defaults, options)
    sources = _sources(words.input, words.text_field)
    _check_output(words.output, words.overwrite)

    reader = _Reader(sources, words.max_reject_fraction)
    trained = tokenizer.train(settings, reader.texts())
    trained.save(words.output)
    record = {
        "fingerprint": trained.fingerprint,
        "settings": config.to_dict(settings),
        "sources": reader.report,
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    tokenizer_files.write_file(words.output / RECORD, text.encode())
    _describe(trained)
    print(f"saved         {words.output}")


def info(argv: list[str]) -> None:
    """Prints what a tokenizer is and, on a text, how well it compresses and whether it loses any."""
    parser = cli.Parser(prog="llm-jax tokenizer info", description="Look at a tokenizer.")
    parser.add_argument(
        "tokenizer", type=Path, metavar="FOLDER", help="a folder, or one file in it"
    )
    parser.add_argument(
        "--text",
        action="extend",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="text to measure on",
    )
    _add_text_options(parser)
    words = parser.parse_args(argv)
    sources = _sources(words.text, words.text_field)
    loaded = tokenizer.load(words.tokenizer)
    _describe(loaded)
    for source in sources:
        _measure(loaded, source, words.max_reject_fraction)


def _add_text_options(parser: cli.Parser) -> None:
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


def _sources(specs: list[str], text_field: str) -> list[SourceConfig]:
    return [dataclasses.replace(parse_source_spec(spec), text_field=text_field) for spec in specs]


def _check_output(folder: Path, overwrite: bool) -> None:
    """Refuses before the training, not after it, what `save` would refuse or silently replace."""
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
    ours = present == [tokenizer_files.SENTENCEPIECE]  # anything more is another tool's tokenizer
    if present and not (overwrite and ours):
        remedy = "choose another folder" + (", or add --overwrite" if ours else "")
        raise ConfigError(f"--output {folder} already holds {', '.join(present)}; {remedy}")


class _Reader:
    """The texts of all sources, one after the other, and an account of what was read."""

    def __init__(self, sources: list[SourceConfig], max_reject_fraction: float):
        self._sources, self._max_reject_fraction = sources, max_reject_fraction
        self.report: list[dict] = []

    def texts(self) -> Iterator[str]:
        for source in self._sources:
            rejects, characters = Rejects(), 0
            for document in read_documents(source, rejects):
                characters += len(document.text)
                yield document.text
            rejects.check(source.name, self._max_reject_fraction)
            log.info("read %s: %d records, %d characters", source.name, rejects.records, characters)
            entry = {"source": config.to_dict(source), "characters": characters}
            self.report.append(entry | rejects.report())


def _describe(loaded: Tokenizer) -> None:
    names = {"bos": loaded.bos_id, "eos": loaded.eos_id, "pad": loaded.pad_id}
    roles = ", ".join(f"{name} {id if id >= 0 else 'none'}" for name, id in names.items())
    print(f"kind          {loaded.kind}")
    print(f"size          {loaded.vocab_size:,} ids, {len(loaded.special_ids):,} of them special")
    print(f"special ids   {roles}")
    print(f"fingerprint   {loaded.fingerprint}")


def _measure(loaded: Tokenizer, source: SourceConfig, max_reject_fraction: float) -> None:
    """Prints the lengths of one source in characters, bytes and tokens, and its round trip."""
    characters = size = tokens = documents = exact = 0
    first_changed = ""
    used = np.zeros(loaded.vocab_size, bool)
    rejects = Rejects()
    for batch in _batches(source, rejects):
        for document, ids in zip(batch, loaded.encode_batch([d.text for d in batch]), strict=True):
            documents, tokens = documents + 1, tokens + len(ids)
            characters, size = characters + len(document.text), size + len(document.text.encode())
            used[ids] = True
            same = loaded.decode(ids.tolist()) == document.text
            exact += same
            first_changed = first_changed or ("" if same else document.id)
    rejects.check(source.name, max_reject_fraction)
    print(f"\n{source.name}: {documents:,} documents, {characters:,} characters, {size:,} bytes")
    print(
        f"tokens        {tokens:,}: {characters / tokens:.3f} characters, {size / tokens:.3f} bytes each"
    )
    print(f"ids used      {used.sum():,} of {loaded.vocab_size:,}")
    where = f"; the first changed is {first_changed}" if first_changed else ""
    print(f"round trip    {exact:,} of {documents:,} documents exact{where}")


def _batches(source: SourceConfig, rejects: Rejects, characters: int = 1 << 20) -> Iterator[list]:
    """Documents in groups of about `characters`, enough to keep the encoder's threads busy."""
    group, total = [], 0
    for document in read_documents(source, rejects):
        group.append(document)
        total += len(document.text)
        if total >= characters:
            yield group
            group, total = [], 0
    if group:
        yield group


if __name__ == "__main__":
    cli.leave(cli.run(main))
