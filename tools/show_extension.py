"""Shows what `tokenizer extend` promises, on the corpus beside the project.

Run: .venv/bin/python tools/show_extension.py [CORPUS]     (default ../shared/corpus; 2 minutes)
Expect: three tables; the last line says "all bars met", exit status 0.

Documents are split by a hash of their text, one in twenty held out. Bases learn from the English part:
byte-level BPE that splits as GPT-NeoX does and has its runs of spaces as added tokens, SentencePiece BPE
and unigram. Each gets 6,000 pieces from 10 MB of the Chinese part. Bars, on held-out documents: at least
1.85 characters per token on python-docs-zh and 1.7 times the base's rate on every Chinese source; on
all documents: every English line without a Chinese character keeps its ids, every file comes back
exactly, no new piece is unreachable; at most 60 s on two cores.
"""

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llm_jax import tokenizer
from llm_jax.tokenizer import TokenizerTrainConfig, audit, scripts
from llm_jax.tokenizer.extend import ExtendConfig, Extension, extend

CHINESE = ("python-docs", "tidb-docs", "oi-wiki", "d2l", "paddle-docs", "tang-poems")
ENGLISH = ("python-docs", "postgresql-docs")
PIECES, TEXT_BYTES, SECONDS, RATE, GAIN = 6000, 10_000_000, 60.0, 1.85, 1.7
BASE_SIZE = {"byte-level": 20_000, "bpe": 16_000, "unigram": 16_000}


def documents(file: Path) -> Iterator[str]:
    """The texts of a .jsonl.gz file."""
    with pyarrow.input_stream(str(file), compression="gzip") as stream:
        for line in stream.read().splitlines():
            yield json.loads(line)["text"]


def held_out(text: str) -> bool:
    """One document in twenty, by its text."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 20 == 0


def byte_level(texts: list[str]) -> tokenizer.Tokenizer:
    """GPT-NeoX's splitter and added runs of spaces, trained here."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_SIZE["byte-level"],
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(texts, trainer)
    built.add_tokens([" " * count for count in range(24, 1, -1)])
    with tempfile.TemporaryDirectory() as folder:
        built.save(f"{folder}/tokenizer.json")
        return tokenizer.load(folder)


def base_of(kind: str, texts: list[str]) -> tokenizer.Tokenizer:
    """A base that has learned from English only."""
    if kind == "byte-level":
        return byte_level(texts)
    size = {"bpe": 100_000_000, "unigram": 5_000_000}[kind]
    return tokenizer.train(
        TokenizerTrainConfig(kind=kind, vocab_size=BASE_SIZE[kind], max_bytes=size),  # pyright: ignore[reportArgumentType]
        texts,
    )


def rates(base: tokenizer.Tokenizer, new: tokenizer.Tokenizer, sources: dict) -> list[str]:
    """Prints characters per token on held-out documents; returns the bars missed."""
    missed = []
    for name, texts in sources.items():
        characters = sum(map(len, texts))
        before, after = (characters / sum(map(len, t.encode_batch(texts))) for t in (base, new))
        print(f"  {name:20} {before:6.3f} -> {after:6.3f}  {after / before:5.2f}x")
        if name.startswith("zh") and after < GAIN * before:
            missed.append(f"{name}: {after / before:.2f}x is below {GAIN}x")
        if name == "zh-python-docs" and after < RATE:
            missed.append(f"{name}: {after:.3f} is below {RATE}")
    return missed


def identity(base: tokenizer.Tokenizer, new: tokenizer.Tokenizer, texts: list[str]) -> list[str]:
    """Prints how many English lines keep their ids; returns the bars missed."""
    compared = audit.Identity(base, new)
    for text in texts:
        compared.add(text.split("\n"), "")
    holds = scripts.SCRIPTS["han"].any_character.search
    foreign = [row for row in compared.differences if holds(row["line"])]
    print(
        f"  English lines: {compared.lines:,}; ids differ in {len(compared.differences)}, of which "
        f"{len(foreign)} hold a Chinese character"
    )
    for row in compared.differences:
        print(f"    differs: {row['line'].strip()[:90]!r}")
    wrong = len(compared.differences) - len(foreign)
    return [f"{wrong} English lines changed"] if wrong else []


def lasting(extension: Extension, every: dict[str, list[str]]) -> list[str]:
    """Prints round trips and unreachable pieces; returns the bars missed."""
    missed, new = [], extension.tokenizer
    exact = {}
    for name, texts in every.items():
        tally = audit.Tally(new)
        tally.add(texts, [str(number) for number in range(len(texts))])
        exact[name] = f"{tally.exact}/{tally.documents}"
        if tally.exact < tally.documents:
            missed.append(f"{name}: document {tally.first_changed} does not come back")
    print(f"  documents that come back: {', '.join(f'{k} {v}' for k, v in exact.items())}")
    lost = {piece.id for piece in extension.added} & set(audit.unreachable(new))
    print(f"  unreachable new pieces: {len(lost)} of {len(extension.added):,}")
    return missed + ([f"{len(lost)} unreachable"] if lost else [])


def main() -> int:
    """Returns the exit status."""
    corpus = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/corpus")
    names = [f"zh-{name}" for name in CHINESE] + [f"en-{name}" for name in ENGLISH]
    files = {name: corpus / f"{name}.jsonl.gz" for name in names}
    absent = [str(file) for file in files.values() if not file.is_file()]
    if absent:
        print(f"error: {absent[0]} is not there; give the folder of the corpus", file=sys.stderr)
        return 2
    every = {name: list(documents(file)) for name, file in files.items()}
    apart = {name: [text for text in texts if held_out(text)] for name, texts in every.items()}
    learned = {n: [text for text in texts if not held_out(text)] for n, texts in every.items()}
    english = [text for name in learned if name.startswith("en") for text in learned[name]]
    chinese = [text for name in learned if name.startswith("zh") for text in learned[name]]
    missed = []
    for kind in BASE_SIZE:
        base = base_of(kind, english)
        started = time.perf_counter()
        settings = ExtendConfig(add_pieces=PIECES, max_bytes=TEXT_BYTES)
        extension = extend(base.files, settings, texts=chinese)
        seconds = time.perf_counter() - started
        print(f"{kind}: {base.vocab_size:,} ids + {len(extension.added):,} in {seconds:.1f} s")
        late = [f"{seconds:.0f} s"] if seconds > SECONDS else []
        found = rates(base, extension.tokenizer, apart) + late
        all_english = [text for name in every if name.startswith("en") for text in every[name]]
        found += identity(base, extension.tokenizer, all_english) + lasting(extension, every)
        missed += [f"{kind}: {bar}" for bar in found]
    print("\n".join(missed) if missed else "all bars met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
