"""`llm-jax tokenizer audit TOKENIZER` and `llm-jax tokenizer compare A B ...`: vocabularies on text.

    llm-jax tokenizer audit runs/zh-tok --base BASE --input zh=news.jsonl.gz --model configs/demo.py
    llm-jax tokenizer compare BASE runs/zh-tok --input zh=news.jsonl.gz en=package-docs

What a vocabulary will cost, before a step is trained on it. r is characters per token, F the
floating-point operations to train on one token (matrix products, the output head among them):

    characters per second   r / r_base * F_base / F times the base's, at equal operations a second
    KV cache                2 * L * K * H * (bytes of a number) / r bytes a character
    context                 seq_len * r characters
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import config, tokenizer
from llm_jax.data.sources import SourceConfig
from llm_jax.errors import ConfigError, DataError
from llm_jax.run import cli
from llm_jax.run.tokenizer import describe
from llm_jax.run.tokenizer_text import add_sources, add_text_options, batches, sources_of
from llm_jax.tokenizer import audit as audits
from llm_jax.tokenizer import scripts
from llm_jax.tokenizer.audit import Identity, Tally
from llm_jax.tokenizer.base import Tokenizer

SHOWN = 10  # pieces in a list
HAN_CHARACTERS = 300_000  # of the input that `compare` measures Han text on


def audit(argv: list[str]) -> None:
    """One vocabulary, or an extended one beside its base."""
    parser = cli.Parser(prog="llm-jax tokenizer audit", description="What a vocabulary costs.")
    parser.add_argument("tokenizer", type=Path, metavar="TOKENIZER", help="a folder, or its file")
    parser.add_argument("--base", type=Path, metavar="BASE", help="what it was extended from")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="a config, a folder with config.json, or a JSON object of model settings",
    )
    parser.add_argument(
        "--vocab-multiple", type=int, default=128, metavar="N", help="of model rows"
    )
    add_sources(parser, "--input", "text to measure on", required=True)
    add_text_options(parser)
    words = parser.parse_args(argv)
    if words.vocab_multiple < 1:
        raise ConfigError(f"--vocab-multiple {words.vocab_multiple} must be at least 1")
    sources = sources_of(words.input, words.text_field)
    sizes = _model_settings(words.model) if words.model else None
    loaded = tokenizer.load(words.tokenizer)
    base = tokenizer.load(words.base) if words.base else None

    describe(loaded)
    first_new = base.vocab_size if base else loaded.vocab_size
    if base:
        _old_ids(base, loaded)
    _unreachable(loaded, first_new)
    identity = Identity(base, loaded) if base else None
    tallies, before = [], []
    for source in sources:
        mine, theirs = Tally(loaded), Tally(base or loaded)
        for batch in batches(source, words.max_reject_fraction):
            texts, names = [d.text for d in batch], [d.id for d in batch]
            mine.add(texts, names)
            if base and identity:
                theirs.add(texts, names)
                _compare_lines(identity, texts, names)
        tallies.append(mine)
        before.append(theirs if base else None)
    _usage(loaded, tallies, first_new)
    _rates(sources, tallies, before)
    if identity:
        same = identity.lines - len(identity.differences)
        print(f"\nids as in the base: {same:,} of the {identity.lines:,} lines without a character")
        print(
            "of another script than Latin; `tokenizer extend --keep` lists every line that differs"
        )
    _effect(sources, tallies, before, sizes, words.vocab_multiple)


def compare(argv: list[str]) -> None:
    """Several vocabularies on the same text."""
    parser = cli.Parser(prog="llm-jax tokenizer compare", description="Vocabularies side by side.")
    parser.add_argument(
        "tokenizers", nargs="+", type=Path, metavar="TOKENIZER", help="folders or files"
    )
    add_sources(parser, "--input", "text to measure on", required=True)
    add_text_options(parser)
    words = parser.parse_args(argv)
    sources = sources_of(words.input, words.text_field)
    loaded = [tokenizer.load(path) for path in words.tokenizers]
    names = _names(words.tokenizers)
    tallies: list[list[Tally]] = []
    runs: list[str] = []
    for source in sources:
        row = [Tally(one) for one in loaded]
        for batch in batches(source, words.max_reject_fraction):
            for tally in row:
                tally.add([d.text for d in batch], [d.id for d in batch])
            if sum(map(len, runs)) < HAN_CHARACTERS:
                han = scripts.SCRIPTS["han"].letter_run
                runs += [run for document in batch for run in han.findall(document.text)]
        tallies.append(row)

    columns = list(zip(*tallies, strict=True))
    print("tokenizers")
    rows = [[n, t.kind, f"{t.vocab_size:,}"] for n, t in zip(names, loaded, strict=True)]
    _table(["", "kind", "ids"], rows)
    print("\ncharacters per token")
    heads = [source.name for source in sources]
    _table(
        ["", *heads],
        [[n, *(f"{t.rate:.3f}" for t in c)] for n, c in zip(names, columns, strict=True)],
    )
    print("\ndocuments that come back exactly")
    _table(
        ["", *heads],
        [
            [n, *(f"{t.exact:,}/{t.documents:,}" for t in c)]
            for n, c in zip(names, columns, strict=True)
        ],
    )
    print("\nencoding speed, MB/s on all cores")
    speeds = [
        f"{sum(t.num_bytes for t in c) / max(sum(t.seconds for t in c), 1e-9) / 1e6:.1f}"
        for c in columns
    ]
    _table(["", "MB/s"], [[n, speed] for n, speed in zip(names, speeds, strict=True)])
    print("\npieces by script")
    _vocabularies(names, loaded)
    print("\nwhat each does to Chinese")
    _chinese(names, loaded, runs)


def _names(paths: Sequence[Path]) -> list[str]:
    """Last parts of the paths, longer where two are alike."""
    short = [path.name for path in paths]
    return [str(p) if short.count(p.name) > 1 else p.name for p in paths]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(str(row[at])) for row in [heads, *rows]) for at in range(len(heads))]
    for row in [heads, *rows]:
        cells = [
            str(cell).ljust(width) if at == 0 else str(cell).rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip())


def _texts(loaded: Tokenizer) -> dict[int, str]:
    """Text of every piece that stands for whole characters."""
    ids = [id for id in range(loaded.vocab_size) if id not in loaded.special_ids]
    texts = {id: loaded.decode([id]) for id in ids}
    return {
        id: text.removeprefix("##") for id, text in texts.items() if text and "\ufffd" not in text
    }


def _vocabularies(names: Sequence[str], loaded: Sequence[Tokenizer]) -> None:
    counts = [scripts.count_by_kind(_texts(one).values()) for one in loaded]
    kinds = sorted(
        {kind for c in counts for kind in c}, key=lambda k: -max(c.get(k, 0) for c in counts)
    )
    kinds = kinds[:8]
    parts = [f"{one.vocab_size - sum(c.values()):,}" for one, c in zip(loaded, counts, strict=True)]
    rows = [
        [name, *(f"{c.get(kind, 0):,}" for kind in kinds), part]
        for name, c, part in zip(names, counts, parts, strict=True)
    ]
    _table(["", *kinds, "special or part of a character"], rows)


def _chinese(names: Sequence[str], loaded: Sequence[Tokenizer], runs: Sequence[str]) -> None:
    """Characters with a piece, pieces of several characters, and what that makes of Han text.

    WordPiece behind BERT's splitter has no piece of two Han characters whatever its size, so it
    never gets above one character a token.
    """
    common = scripts.common_characters("gb2312-1")
    rows = []
    for name, one in zip(names, loaded, strict=True):
        found = (scripts.SCRIPTS["han"].letter_run.search(text) for text in _texts(one).values())
        several = [match[0] for match in found if match and len(match[0]) > 1]
        covered = sum(
            len(ids := one.encode(f"a{c}")) == 1 + len(one.encode("a")) and c in one.decode(ids)
            for c in common
        )
        tokens = sum(map(len, one.encode_batch(runs)))
        rate = f"{sum(map(len, runs)) / tokens:.3f}" if runs else "-"
        longest = max(several, key=len, default="none")
        rows.append([name, f"{covered:,}", f"{len(several):,}", rate, longest])
    heads = [
        f"of {len(common):,} common characters",
        "pieces of several",
        "Han per token",
        "longest",
    ]
    _table(["", *heads], rows)


def _old_ids(base: Tokenizer, loaded: Tokenizer) -> None:
    """Prints whether the base's ids mean what they meant."""
    if loaded.vocab_size < base.vocab_size:
        raise DataError(
            f"--base has {base.vocab_size:,} ids, the tokenizer {loaded.vocab_size:,}: it is no "
            "extension of that base"
        )
    ids = range(base.vocab_size)
    moved = [id for id in ids if base.decode([id]) != loaded.decode([id])]
    if base.special_ids - loaded.special_ids:
        moved = sorted({*moved, *(base.special_ids - loaded.special_ids)})
    print(f"old ids       {len(moved):,} of {base.vocab_size:,} stand for another text than before")


def _unreachable(loaded: Tokenizer, first_new: int) -> None:
    lost = audits.unreachable(loaded)
    old = [id for id in lost if id < first_new]
    shown = ", ".join(f"{id} {loaded.decode([id])!r}" for id in lost[:SHOWN])
    new = f", {len(lost) - len(old):,} of the new ones" if first_new < loaded.vocab_size else ""
    print(f"unreachable   {len(old):,} pieces{new}{f': {shown}' if shown else ''}")


def _compare_lines(identity: Identity, texts: Sequence[str], names: Sequence[str]) -> None:
    """Compares the lines whose characters are all of the Latin kind: the others are meant to change."""
    other = [script.any_character for script in scripts.SCRIPTS.values()]
    for text, name in zip(texts, names, strict=True):
        lines = [line for line in text.split("\n") if not any(o.search(line) for o in other)]
        identity.add(lines, name)


def _usage(loaded: Tokenizer, tallies: Sequence[Tally], first_new: int) -> None:
    used_V = np.logical_or.reduce([tally.used_V for tally in tallies])
    print(f"used          {used_V.sum():,} of {loaded.vocab_size:,} ids in this text")
    if first_new < loaded.vocab_size:
        unused = np.flatnonzero(~used_V[first_new:]) + first_new
        shown = " ".join(loaded.decode([int(id)]) for id in unused[:SHOWN])
        total = loaded.vocab_size - first_new
        print(f"new, unused   {len(unused):,} of {total:,}{f': {shown}' if shown else ''}")


def _rates(
    sources: Sequence[SourceConfig], tallies: Sequence[Tally], before: Sequence[Tally | None]
) -> None:
    print("\ncharacters per token")
    rows = []
    for source, mine, theirs in zip(sources, tallies, before, strict=True):
        trip = f"{mine.exact:,} of {mine.documents:,} exact"
        trip += f", first changed {mine.first_changed}" if mine.first_changed else ""
        old = [f"{theirs.rate:.3f}", f"{mine.rate / theirs.rate:.2f}x"] if theirs else ["-", "-"]
        rows.append([source.name, f"{mine.characters:,}", old[0], f"{mine.rate:.3f}", old[1], trip])
    _table(["", "characters", "base", "here", "gain", "round trip"], rows)


def _effect(
    sources: Sequence[SourceConfig],
    tallies: Sequence[Tally],
    before: Sequence[Tally | None],
    sizes: Any,
    multiple: int,
) -> None:
    """What the rates mean for a model of the given sizes (formulas: top of this file)."""
    if sizes is None:
        print("\ngive --model to see what this does to speed, KV cache and context")
        return
    from llm_jax.model import flops_per_token  # loads jax

    def rows_of(one: Tokenizer) -> int:
        return -(-one.vocab_size // multiple) * multiple

    def flops(one: Tokenizer) -> float:
        return flops_per_token(
            dataclasses.replace(sizes, vocab_size=rows_of(one)), sizes.max_seq_len
        )

    number = 2 if sizes.dtype == "bfloat16" else 4
    token_bytes = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * number
    loaded = tallies[0].tokenizer
    print(
        f"\na model of {sizes.num_layers} layers, D {sizes.embed_dim}, {sizes.num_kv_heads} KV heads of "
        f"{sizes.head_dim}, context {sizes.max_seq_len:,} tokens, {rows_of(loaded):,} rows"
    )
    base = before[0].tokenizer if before[0] else None
    if base:
        matrices = 1 if sizes.tied_embeddings else 2
        more = (rows_of(loaded) - rows_of(base)) * sizes.embed_dim * matrices
        print(f"  {more:,} parameters more than with the base's {rows_of(base):,} rows")
    table = []
    for source, mine, theirs in zip(sources, tallies, before, strict=True):
        cells = [
            f"{token_bytes * 1000 / mine.rate / 1e6:.2f}",
            f"{sizes.max_seq_len * mine.rate:,.0f}",
        ]
        if theirs:
            gain = mine.rate / theirs.rate
            speed = gain * flops(theirs.tokenizer) / flops(mine.tokenizer)
            cells[0] = f"{token_bytes * 1000 / theirs.rate / 1e6:.2f} -> {cells[0]}"
            cells[1] = f"{sizes.max_seq_len * theirs.rate:,.0f} -> {cells[1]}"
            cells = [f"{speed:.2f}x", f"{1 / gain:.2f}x", *cells]
        else:
            cells = ["-", "-", *cells]
        table.append([source.name, *cells])
    heads = [
        "",
        "characters/s",
        "tokens",
        "KV cache, MB per 1,000 characters",
        "context, characters",
    ]
    _table(heads, table)


def _model_settings(text: str) -> Any:
    """A `ModelConfig` from a config, a folder's config.json, or a JSON object."""
    from llm_jax.model import ModelConfig  # loads jax

    if text.lstrip().startswith("{"):
        data, where = _json(text, "--model"), "--model"
    else:
        path = Path(text)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(
                f"--model {path}: no such file; give a config, a folder or a JSON object"
            )
        if path.suffix == ".py":
            from llm_jax.run.pretrain import PretrainConfig

            return config.load(path, PretrainConfig).model
        data, where = _json(path.read_text(encoding="utf-8"), str(path)), str(path)
        data = data.get("model", data)
    return config.from_dict(ModelConfig, {"vocab_size": 1} | data, where)


def _json(text: str, where: str) -> dict:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: must hold a JSON object")
    return data
