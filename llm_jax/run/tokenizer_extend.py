"""`llm-jax tokenizer extend BASE --output OUT`: a second language behind the first, whose ids stay.

    llm-jax tokenizer extend BASE --input zh=news.jsonl.gz --add-pieces 6000 --output runs/zh-tok
    llm-jax tokenizer extend BASE --common-characters gb2312-1 --output runs/zh-tok
    llm-jax tokenizer extend BASE --pieces words.txt --input zh=news.txt --add-pieces 8000 --output OUT

BASE is a SentencePiece model (BPE or unigram) or a byte-level BPE tokenizer.json; OUT gets the same
files, with `extension.json`: what is new and what was checked. `--keep en=...` is text of the old
language: each of its lines is encoded by both, and those that differ go to `differences.jsonl`.
"""

import argparse
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from llm_jax import config, tokenizer
from llm_jax.data.sources import SourceConfig
from llm_jax.errors import ConfigError
from llm_jax.run import cli
from llm_jax.run.tokenizer import describe
from llm_jax.run.tokenizer_text import (
    Reader,
    add_sources,
    add_text_options,
    batches,
    sources_of,
)
from llm_jax.tokenizer import audit, given, scripts
from llm_jax.tokenizer import files as tokenizer_files
from llm_jax.tokenizer.extend import Added, ExtendConfig, Extension, extend

log = logging.getLogger(__name__)

RECORD, DIFFERENCES = "extension.json", "differences.jsonl"
SHOWN = 20  # new pieces printed

SETTINGS = {
    "add_pieces": "number of new ids in all, filled up by learning from --input; 0: only what is given",
    "script": f"whose characters learned pieces hold: {', '.join(scripts.SCRIPTS)}",
    "common_characters": "none, gb2312-1 (3,755 characters) or gb2312-2 (6,763)",
    "max_piece_characters": "length of learned pieces",
    "min_saved": "tokens of the text that a learned piece must save",
    "max_bytes": "learn from an even sample of lines of this size when there is more text",
    "seed": "of the sample",
}


def main(argv: list[str]) -> None:
    """Extends, checks, reports, writes."""
    words = _parse(argv)
    stated = {name: vars(words)[name] for name in SETTINGS if vars(words)[name] is not None}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in stated.items()]
    settings = config.override(ExtendConfig(), options)
    sources = sources_of(words.input, words.text_field)
    keep = sources_of(words.keep, words.text_field)
    if settings.add_pieces and not sources:
        raise ConfigError("--add-pieces learns from text; give --input, or leave --add-pieces out")
    if sources and not settings.add_pieces:
        raise ConfigError("--input is text to learn from; say how many pieces with --add-pieces")
    if words.vocab_multiple < 1:
        raise ConfigError(f"--vocab-multiple {words.vocab_multiple} must be at least 1")
    _check_output(words.output, words.overwrite)
    base = tokenizer.load(words.base)
    wanted = given.read_pieces(words.pieces) if words.pieces else []

    started = time.perf_counter()
    reader = Reader(sources, words.max_reject_fraction)
    extension = extend(
        base.files,
        settings,
        texts=reader.texts(),
        wanted=wanted,
        skip_known=words.skip_known,
        where=str(words.base),
    )
    seconds = time.perf_counter() - started
    lost = _lost(extension)
    identity = _identity(base, extension, keep, words.max_reject_fraction)
    described = describe_extension(base, extension, words.vocab_multiple)
    record = described | {
        "settings": config.to_dict(settings),
        "sources": reader.report,
        "unreachable": lost,
        "kept_lines": identity.lines,
        "kept_lines_that_differ": len(identity.differences),
        "pieces": [_shown(piece) for piece in extension.added],
    }
    _write(words.output, extension, record, identity)
    _report(extension, described, identity, lost, seconds)
    print(f"saved         {words.output}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="llm-jax tokenizer extend", description="Put a second language behind a vocabulary."
    )
    parser.add_argument("base", type=Path, metavar="BASE", help="a tokenizer's folder, or its file")
    add_sources(parser, "--input", "text of the new language to learn from")
    add_sources(parser, "--keep", "text of the old language, whose ids are compared line by line")
    parser.add_argument("--pieces", type=Path, metavar="FILE", help="pieces to add, one a line")
    parser.add_argument(
        "--skip-known",
        action="store_true",
        help="leave out pieces of FILE that repeat or that BASE has, instead of refusing them",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="where to put the result"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an extension in FOLDER")
    parser.add_argument(
        "--vocab-multiple",
        type=int,
        default=128,
        metavar="N",
        help="print the size padded to a multiple of N, for the model's rows (default: 128)",
    )
    add_text_options(parser)
    defaults = vars(ExtendConfig())
    for name, text in SETTINGS.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, metavar="VALUE", help=f"{text} (default: {defaults[name]})")
    return parser.parse_args(argv)


def _check_output(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder} is a file; give a folder")
    above = next(place for place in folder.absolute().parents if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"--output {folder} cannot be made: {above} is no folder to write into")
    present = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    ours = RECORD in present
    if present and not (overwrite and ours):
        remedy = "choose another folder" + (", or add --overwrite" if ours else "")
        raise ConfigError(f"--output {folder} is not empty (it holds {present[0]}); {remedy}")


def _lost(extension: Extension) -> list[int]:
    """Ids of new pieces that no text can give: none, or a bug that the record shows."""
    new = {piece.id for piece in extension.added}
    lost = sorted(new & set(audit.unreachable(extension.tokenizer)))
    if lost:
        log.warning("%d new pieces are unreachable, the first has id %d", len(lost), lost[0])
    return lost


def _identity(
    base: tokenizer.Tokenizer,
    extension: Extension,
    keep: list[SourceConfig],
    max_reject_fraction: float,
) -> audit.Identity:
    identity = audit.Identity(base, extension.tokenizer)
    for source in keep:
        for batch in batches(source, max_reject_fraction):
            for document in batch:
                identity.add(document.text.split("\n"), document.id)
    return identity


def describe_extension(
    base: tokenizer.Tokenizer, extension: Extension, multiple: int
) -> dict[str, str | int]:
    """Sizes and fingerprints, before and after."""
    size = extension.tokenizer.vocab_size
    return {
        "base_fingerprint": base.fingerprint,
        "fingerprint": extension.tokenizer.fingerprint,
        "base_size": base.vocab_size,
        "size": size,
        "padded_size": -(-size // multiple) * multiple,
        "new": len(extension.added),
    }


def _shown(piece: Added) -> dict:
    """A new piece for the record; one that is part of a character as hexadecimal bytes."""
    try:
        spelled = {"piece": piece.piece.decode()}
    except UnicodeDecodeError:
        spelled = {"bytes": piece.piece.hex(" ")}
    return {"id": piece.id, **spelled, "origin": piece.origin, "saved": piece.saved}


def _write(folder: Path, extension: Extension, record: dict, identity: audit.Identity) -> None:
    """All files into a folder beside `folder`, which then takes its name."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name[:40]}.unfinished-", dir=folder.parent))
    partial = work / "tokenizer"  # inside: a folder of mkdtemp is closed to other users
    try:
        extension.tokenizer.save(partial)
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        tokenizer_files.write_file(partial / RECORD, text.encode())
        rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in identity.differences]
        if rows:
            tokenizer_files.write_file(partial / DIFFERENCES, "".join(rows).encode())
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _report(
    extension: Extension, described: dict, identity: audit.Identity, lost: list[int], seconds: float
) -> None:
    origins = [piece.origin for piece in extension.added]
    counts = {origin: origins.count(origin) for origin in ("given", "helper", "learned")}
    parts = ", ".join(f"{count:,} {origin}" for origin, count in counts.items() if count)
    describe(extension.tokenizer)
    print(f"new           {len(origins):,} ids in {seconds:.1f} s: {parts}")
    print(f"padded        {described['padded_size']:,} rows for the model")
    print(f"unreachable   {len(lost)} of the new pieces")
    if identity.lines:
        same = identity.lines - len(identity.differences)
        where = f"; the others are in {DIFFERENCES}" if identity.differences else ""
        print(f"kept text     {same:,} of {identity.lines:,} lines have the ids they had{where}")
    else:
        print("kept text     not compared; give --keep en=... to check that old text keeps its ids")
    print(f"first pieces  {' '.join(_first(extension.added))}")


def _first(added: list[Added]) -> Iterator[str]:
    whole = (_shown(piece).get("piece") for piece in added)
    shown = (piece for piece in whole if piece)
    for _, piece in zip(range(SHOWN), shown, strict=False):
        yield piece


if __name__ == "__main__":
    cli.leave(cli.run(main))
