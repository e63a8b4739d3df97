"""`llm-jax tokenizer VERB`: train a vocabulary, extend one, audit it, compare several, look at one.

    llm-jax tokenizer train --input package-docs zh=sample:zh --output runs/tok --vocab-size 8000
    llm-jax tokenizer extend BASE --input zh=news.jsonl.gz --add-pieces 6000 --output runs/zh-tok
    llm-jax tokenizer audit runs/zh-tok --base BASE --input zh=news.jsonl.gz en=package-docs
    llm-jax tokenizer compare BASE runs/zh-tok --input zh=news.jsonl.gz en=package-docs
    llm-jax tokenizer info runs/tok --text news/2024.jsonl.gz

An input is what `data prepare` takes too: a file, folder or glob, `package-docs`, `sample:zh`,
`tfds:NAME:SPLIT`, each with or without `NAME=` before it. A tokenizer is a folder, or one file in it.
"""

import dataclasses
import importlib
import json
from pathlib import Path

from llm_jax import config, tokenizer
from llm_jax.config import nearest
from llm_jax.data.sources import SourceConfig
from llm_jax.errors import ConfigError
from llm_jax.run import cli
from llm_jax.run.tokenizer_text import (
    Reader,
    add_sources,
    add_text_options,
    batches,
    check_output,
    sources_of,
)
from llm_jax.tokenizer import Tokenizer, TokenizerTrainConfig
from llm_jax.tokenizer import files as tokenizer_files
from llm_jax.tokenizer.audit import Tally

JSON_FILES = (tokenizer_files.HUGGING_FACE, "tokenizer_config.json")
RECORD = "training.json"  # beside the model: what it was trained on, and how
SETTINGS = {
    "kind": "bpe or unigram (SentencePiece; unigram trains some 20 times longer), byte-bpe, wordpiece",
    "vocab_size": "number of ids, the special ones, the newline and 256 bytes among them",
    "character_coverage": "share of the text's characters that get a piece; not with byte-bpe",
    "byte_fallback": "SentencePiece: spell other characters as bytes instead of <unk>",
    "normalization": "identity, nfkc, and of SentencePiece nmt_nfkc, nfkc_cf, nmt_nfkc_cf; all but identity lose text",
    "add_dummy_prefix": "put a space before every text",
    "remove_extra_whitespaces": "drop leading, trailing and double spaces",
    "split_digits": "make every digit a piece of its own",
    "special_tokens": "JSON list of control tokens; their ids start at 4 (byte-bpe: 2, wordpiece: 5)",
    "max_bytes": "train on an even sample of lines of this size when there is more text",
    "threads": "SentencePiece, part of the recipe: unigram scores depend on it",
    "seed": "of the sample",
}


ELSEWHERE = {  # verb -> (module in llm_jax.run, function)
    "extend": ("tokenizer_extend", "main"),
    "audit": ("tokenizer_audit", "audit"),
    "compare": ("tokenizer_audit", "compare"),
}


def main(argv: list[str]) -> None:
    """Runs one of the verbs."""
    verbs = {"train": train, "info": info}
    known = [*verbs, *ELSEWHERE]
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nllm-jax tokenizer VERB --help says more. Verbs: {', '.join(known)}.")
        return
    if argv[0] not in known:
        raise ConfigError(f"unknown command tokenizer {argv[0]!r}; {nearest(argv[0], known)}")
    if argv[0] in verbs:
        verbs[argv[0]](argv[1:])
        return
    module, function = ELSEWHERE[argv[0]]
    vars(importlib.import_module(f"llm_jax.run.{module}"))[function](argv[1:])


def train(argv: list[str]) -> None:
    """Learns a tokenizer and writes it, with a record of its making, into a folder."""
    parser = cli.Parser(prog="llm-jax tokenizer train", description="Learn a vocabulary from text.")
    add_sources(parser, "--input", "text to learn from", required=True)
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="where to put it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the tokenizer in FOLDER")
    add_text_options(parser)
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
    sources = sources_of(words.input, words.text_field)
    own = settings.kind in ("bpe", "unigram")
    made = [tokenizer_files.SENTENCEPIECE] if own else [*JSON_FILES]
    check_output(words.output, words.overwrite, made)

    reader = Reader(sources, words.max_reject_fraction)
    trained = tokenizer.train(settings, reader.texts())
    trained.save(words.output)
    record = {
        "fingerprint": trained.fingerprint,
        "settings": config.to_dict(settings),
        "sources": reader.report,
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    tokenizer_files.write_file(words.output / RECORD, text.encode())
    describe(trained)
    print(f"saved         {words.output}")


def info(argv: list[str]) -> None:
    """Prints what a tokenizer is and, on a text, how well it compresses and whether it loses any."""
    parser = cli.Parser(prog="llm-jax tokenizer info", description="Look at a tokenizer.")
    parser.add_argument(
        "tokenizer", type=Path, metavar="FOLDER", help="a folder, or one file in it"
    )
    add_sources(parser, "--text", "text to measure on")
    add_text_options(parser)
    words = parser.parse_args(argv)
    sources = sources_of(words.text, words.text_field)
    loaded = tokenizer.load(words.tokenizer)
    describe(loaded)
    for source in sources:
        _measure(loaded, source, words.max_reject_fraction)


def describe(loaded: Tokenizer) -> None:
    """Prints what a tokenizer is."""
    names = {"bos": loaded.bos_id, "eos": loaded.eos_id, "pad": loaded.pad_id}
    roles = ", ".join(f"{name} {id if id >= 0 else 'none'}" for name, id in names.items())
    print(f"kind          {loaded.kind}")
    print(f"size          {loaded.vocab_size:,} ids, {len(loaded.special_ids):,} of them special")
    print(f"special ids   {roles}")
    print(f"fingerprint   {loaded.fingerprint}")


def _measure(loaded: Tokenizer, source: SourceConfig, max_reject_fraction: float) -> None:
    """Prints the lengths of one source in characters, bytes and tokens, and its round trip."""
    tally = Tally(loaded)
    for batch in batches(source, max_reject_fraction):
        tally.add([document.text for document in batch], [document.id for document in batch])
    print(
        f"\n{source.name}: {tally.documents:,} documents, {tally.characters:,} characters, "
        f"{tally.num_bytes:,} bytes"
    )
    bytes_each = tally.num_bytes / tally.tokens
    print(
        f"tokens        {tally.tokens:,}: {tally.rate:.3f} characters, {bytes_each:.3f} bytes each"
    )
    print(f"ids used      {tally.used_V.sum():,} of {loaded.vocab_size:,}")
    changed = tally.first_changed
    where = f"; the first changed is {changed}" if changed else ""
    print(f"round trip    {tally.exact:,} of {tally.documents:,} documents exact{where}")


if __name__ == "__main__":
    cli.leave(cli.run(main))
