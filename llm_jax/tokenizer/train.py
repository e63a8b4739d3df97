"""Training a tokenizer on text, in memory: SentencePiece here, the others in `train_huggingface`.

1. Cut documents into lines, and lines into pieces that the trainer does not skip.
2. Keep a seeded sample of them when there are more bytes than `max_bytes`.
3. Train; translate the trainer's complaints; make the file the same for any number of threads.

The defaults differ from the library's where those lose text: its normalisation rewrites full-width
Chinese punctuation, its dummy prefix and space removal break round trips, and it silently skips lines
above 4,192 bytes (some 1,400 Han characters) and lines that hold U+2585.
"""

import dataclasses
import heapq
import io
import logging
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import sentencepiece

from llm_jax.errors import ConfigError, DataError
from llm_jax.tokenizer import files as tokenizer_files
from llm_jax.tokenizer import train_huggingface
from llm_jax.tokenizer.base import Tokenizer, replace_surrogates
from llm_jax.tokenizer.sentencepiece import SPACE_MARK, ModelProto, SentencePieceTokenizer

log = logging.getLogger(__name__)

UNKNOWN, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"  # ids 0, 1, 2, 3

# 1,000 characters are at most 4,000 bytes, below the trainer's limit of 4,192
MAX_LINE_CHARS = 1000

# A newline is a piece of its own. The other two are the trainer's own spellings of space and unknown:
# a line with U+2585 is skipped, and U+2581 would be learned as a space.
_BREAKS = re.compile(f"[\n{SPACE_MARK}\u2585]")


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig:
    """What kind of vocabulary to learn, and from how much text."""

    # SentencePiece BPE and unigram (which trains some 20 times longer), byte-level BPE, BERT's WordPiece
    kind: Literal["bpe", "unigram", "byte-bpe", "wordpiece"] = "bpe"
    vocab_size: int = 32_000  # ids in all: special, newline, 256 bytes, characters, learned pieces
    character_coverage: float = (
        0.9995  # share of the text's characters that get a piece of their own
    )
    byte_fallback: bool = (
        True  # spell other characters as UTF-8 bytes; without it they become unknown
    )
    normalization: Literal["identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"] = "identity"
    add_dummy_prefix: bool = False  # put a space before every text
    remove_extra_whitespaces: bool = False  # drop leading, trailing and double spaces
    split_digits: bool = True  # every digit is a piece of its own
    special_tokens: tuple[str, ...] = (
        "<|im_start|>",
        "<|im_end|>",
    )  # ids from 4; ChatML's by default
    max_bytes: int = 100_000_000  # train on a sample of lines of this size when there is more text
    threads: int = 8  # a number, not "all": the sums behind unigram scores depend on it
    seed: int = 0  # of the sample

    def __post_init__(self) -> None:
        if self.vocab_size < 8 or self.vocab_size > 1 << 20:
            raise ConfigError(f"vocab_size={self.vocab_size} must be between 8 and {1 << 20}")
        if not 0.9 <= self.character_coverage <= 1.0:
            raise ConfigError(
                f"character_coverage={self.character_coverage} must be between 0.9 and 1.0"
            )
        if not 0 < self.max_bytes <= 2_000_000_000:
            raise ConfigError(
                f"max_bytes={self.max_bytes} must be between 1 and 2000000000; the trainer indexes with 31 bits"
            )
        if not 1 <= self.threads <= 128:
            raise ConfigError(f"threads={self.threads} must be between 1 and 128")
        _check_kind(self)
        taken = {UNKNOWN, BOS, EOS, PAD, *train_huggingface.reserved(self.kind)}
        for piece in self.special_tokens:
            # one character could be typed, and SentencePiece would then give the control id for it
            if len(piece) < 2 or re.search(rf"\s|{SPACE_MARK}|^<0x..>$", piece) or piece in taken:
                raise ConfigError(
                    f"special_tokens: {piece!r} must be two or more characters without space, not a "
                    f"byte piece, and given once (there already: {', '.join(sorted(taken))})"
                )
            taken.add(piece)


# settings that the other trainers have no way to honour, refused when they are changed
_WITHOUT_EFFECT = {
    "byte-bpe": ("character_coverage", "byte_fallback", "remove_extra_whitespaces", "threads"),
    "wordpiece": ("byte_fallback", "add_dummy_prefix", "remove_extra_whitespaces", "threads"),
}


def _check_kind(config: TokenizerTrainConfig) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    for name in _WITHOUT_EFFECT.get(config.kind, ()):
        value = vars(config)[name]
        if value != fields[name]:
            raise ConfigError(
                f"{name}={value!r} has no effect with kind={config.kind!r}; leave it out"
            )
    if config.kind in _WITHOUT_EFFECT and config.normalization not in ("identity", "nfkc"):
        raise ConfigError(
            f"normalization={config.normalization!r} is SentencePiece's own; with "
            f"kind={config.kind!r} it must be identity or nfkc"
        )


def train(config: TokenizerTrainConfig, texts: Iterable[str]) -> Tokenizer:
    """Learns a vocabulary from `texts`, read once. The same input gives the same fingerprint.

    Raises:
      DataError: no text.
      ConfigError: the text has too few different pieces, or too many different characters, for
        `vocab_size`; the message says the size that is possible.
    """
    own = config.kind in ("bpe", "unigram")
    lines = sample((_lines if own else _chunks)(texts), config.max_bytes, config.seed)
    if not any(line.strip() for line in lines):
        raise DataError("no text to train a tokenizer on: every document is empty or blank")
    log.info(
        "training a %s tokenizer of %d pieces on %.1f MB",
        config.kind,
        config.vocab_size,
        sum(len(line.encode()) for line in lines) / 1e6,
    )
    if config.kind == "byte-bpe":
        return train_huggingface.train_byte_bpe(
            lines,
            vocab_size=config.vocab_size,
            normalization=config.normalization,
            add_dummy_prefix=config.add_dummy_prefix,
            split_digits=config.split_digits,
            special_tokens=config.special_tokens,
        )
    if config.kind == "wordpiece":
        return train_huggingface.train_wordpiece(
            lines,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            normalization=config.normalization,
            split_digits=config.split_digits,
            special_tokens=config.special_tokens,
        )
    return _train_sentencepiece(config, lines)


def _train_sentencepiece(config: TokenizerTrainConfig, lines: list[str]) -> SentencePieceTokenizer:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines), model_writer=model, **_trainer_options(config)
        )
    except RuntimeError as error:
        raise _translate(error, config) from None
    return SentencePieceTokenizer({tokenizer_files.SENTENCEPIECE: _canonical(model.getvalue())})


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from split_lines(replace_surrogates(text))


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from train_huggingface.chunks(replace_surrogates(text))


def split_lines(text: str) -> Iterator[str]:
    """Lines of `text`, none above `MAX_LINE_CHARS`, cut before a space where there is one."""
    for line in _BREAKS.split(text):
        start = 0
        while len(line) - start > MAX_LINE_CHARS:
            space = line.rfind(" ", start + 1, start + MAX_LINE_CHARS)
            end = space if space > 0 else start + MAX_LINE_CHARS
            yield line[start:end]
            start = end
        if start < len(line):
            yield line[start:]


def sample(lines: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """All lines, or an even sample of at most `max_bytes` UTF-8 bytes, in their order.

    Every line draws a number; those with the smallest are kept, so that one pass and the memory of
    the sample are enough.
    """
    draw = random.Random(seed).random
    kept: list[tuple[float, int, str]] = []  # a heap: the largest number, negated, is on top
    total, limit = 0, 1.0
    for index, line in enumerate(lines):
        number = draw()
        if number >= limit:
            continue
        heapq.heappush(kept, (-number, index, line))
        total += len(line.encode())
        while total > max_bytes:
            number, _, dropped = heapq.heappop(kept)
            total -= len(dropped.encode())
            limit = -number
    return [line for _, _, line in sorted(kept, key=lambda entry: entry[1])]


def _trainer_options(config: TokenizerTrainConfig) -> dict:
    return {
        "model_type": config.kind,
        "vocab_size": config.vocab_size,
        "character_coverage": config.character_coverage,
        "byte_fallback": config.byte_fallback,
        "normalization_rule_name": config.normalization,
        "add_dummy_prefix": config.add_dummy_prefix,
        "remove_extra_whitespaces": config.remove_extra_whitespaces,
        "split_digits": config.split_digits,
        "allow_whitespace_only_pieces": True,  # indentation is one piece, not one a space
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": 3,
        "unk_piece": UNKNOWN,
        "bos_piece": BOS,
        "eos_piece": EOS,
        "pad_piece": PAD,
        "control_symbols": list(config.special_tokens),
        "user_defined_symbols": ["\n"],
        "num_threads": config.threads,
        "minloglevel": 2,  # its progress goes to stderr from C++
    }


def _canonical(model: bytes) -> bytes:
    """The model without the number of threads it was trained with, which encodes nothing."""
    proto = ModelProto.FromString(model)
    proto.trainer_spec.ClearField("num_threads")
    return proto.SerializeToString(deterministic=True)


def _translate(error: RuntimeError, config: TokenizerTrainConfig) -> Exception:
    """The trainer's complaint about the vocabulary size as a ConfigError; any other as it is."""
    text = str(error)
    if found := re.search(r"Vocabulary size too high .*value <= (\d+)", text):
        return ConfigError(
            f"vocab_size={config.vocab_size} is more than this text can fill; the largest possible "
            f"is {found[1]}: lower vocab_size or give more text"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", text):
        return ConfigError(
            f"vocab_size={config.vocab_size} is too small for the characters of this text; it needs "
            f"more than {found[1]}: raise vocab_size or lower character_coverage"
        )
    return error
