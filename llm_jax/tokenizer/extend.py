"""Extending a vocabulary: a second language is put behind the first, whose ids stay.

1. Given pieces and common characters, each joined from what the base has; a join that is needed on
   the way becomes a piece too.
2. The rest is learned from text: merges on top of the base's own spelling, most saved tokens first.

A merge is made only if its piece comes out of its own text, so none is unreachable. Learned pieces
hold characters of one script only, so text without that script keeps its ids. Learning on top of the
base, instead of appending a list that was trained by itself, is from "Teaching Old Tokenizers New
Words", https://arxiv.org/abs/2512.03989.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Literal, NamedTuple, Protocol

from llm_jax.errors import ConfigError, DataError
from llm_jax.tokenizer import files as tokenizer_files
from llm_jax.tokenizer import given, scripts
from llm_jax.tokenizer.base import Tokenizer, replace_surrogates
from llm_jax.tokenizer.byte_level import ByteLevelVocabulary
from llm_jax.tokenizer.huggingface import HuggingFaceTokenizer
from llm_jax.tokenizer.merges import MergeLearner, Runs
from llm_jax.tokenizer.piece_list import PieceListVocabulary
from llm_jax.tokenizer.sentencepiece import SentencePieceTokenizer
from llm_jax.tokenizer.train import sample, split_lines

_Step = tuple[bytes, tuple[bytes, bytes] | None]  # a piece, and what it is joined from

log = logging.getLogger(__name__)

SPARE = 1.1  # unigram: candidates for every piece that is kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtendConfig:
    """What to add to a vocabulary."""

    add_pieces: int = 0  # new ids in all; 0: only those that the given pieces need
    script: str = "han"  # whose characters learned pieces hold
    common_characters: Literal["none", "gb2312-1", "gb2312-2"] = "none"
    max_piece_characters: int = 16  # of learned pieces
    min_saved: int = 2  # tokens of the text that a learned piece must save
    max_bytes: int = 50_000_000  # learn from a sample of lines of this size when there is more text
    seed: int = 0  # of the sample

    def __post_init__(self) -> None:
        scripts.script_of(self.script)
        if not 0 <= self.add_pieces <= 1 << 20:
            raise ConfigError(f"add_pieces={self.add_pieces} must be between 0 and {1 << 20}")
        if not 1 <= self.max_piece_characters <= 64:
            raise ConfigError(
                f"max_piece_characters={self.max_piece_characters} must be between 1 and 64"
            )
        if self.min_saved < 1:
            raise ConfigError(f"min_saved={self.min_saved} must be at least 1")
        if not 0 < self.max_bytes <= 2_000_000_000:
            raise ConfigError(f"max_bytes={self.max_bytes} must be between 1 and 2000000000")


class Added(NamedTuple):
    """One new piece."""

    id: int
    piece: bytes  # UTF-8, or part of a character
    origin: Literal["given", "helper", "learned"]  # helper: needed to join a given one
    saved: int  # tokens of the text it saved when it was made; 0 for given ones and helpers


class Extension(NamedTuple):
    """The extended tokenizer and what is new in it."""

    tokenizer: Tokenizer
    added: list[Added]


class Vocabulary(Protocol):
    """A base that can be extended: `byte_level`, `piece_list`."""

    size: int
    by_text: bool  # see `merges`
    needs_path: bool  # pieces are joined two by two

    def has(self, piece: bytes) -> bool: ...
    def trouble(self, piece: str) -> str: ...
    def spell(self, piece: bytes) -> list[bytes]: ...
    def add(self, piece: bytes, pair: tuple[bytes, bytes] | None) -> None: ...
    def allowed(self, script: scripts.Script, max_characters: int) -> Callable[[bytes], bool]: ...
    def runs(
        self, lines: Sequence[str], script: scripts.Script
    ) -> tuple[Runs, dict[int, bytes], dict[int, int]]: ...
    def files(self) -> dict[str, bytes]: ...


def open_base(files: Mapping[str, bytes], where: str) -> Vocabulary:
    """The base as something to extend. Raises DataError saying why it cannot be."""
    kind = ByteLevelVocabulary if tokenizer_files.HUGGING_FACE in files else PieceListVocabulary
    return kind(files, where)


def extend(
    files: Mapping[str, bytes],
    config: ExtendConfig,
    *,
    texts: Iterable[str] = (),
    wanted: Iterable[given.Given] = (),
    skip_known: bool = False,
    where: str = "the base",
) -> Extension:
    """Adds pieces to the tokenizer made of `files` (see `files.read`). Deterministic.

    Args:
      files: of the base; they are not changed.
      config: what to add.
      texts: documents to learn from, read once.
      wanted: pieces that must be added.
      skip_known: leave out wanted pieces that are repeated or known, instead of refusing them.
      where: the base's name in messages.

    Raises:
      DataError: a base that cannot be extended, a wanted piece that cannot be added, no text.
      ConfigError: `add_pieces` is less than the wanted pieces need, or more than the text gives.
    """
    vocabulary = open_base(files, where)
    first = vocabulary.size
    pieces = given.new_ones(wanted, vocabulary.has, vocabulary.trouble, skip_known)
    if config.common_characters != "none":
        taken = set(pieces)
        common = scripts.common_characters(config.common_characters)
        pieces += [c for c in common if c not in taken and not vocabulary.has(c.encode())]
    made = _give(vocabulary, pieces)
    if config.add_pieces and len(made) > config.add_pieces:
        raise ConfigError(
            f"add_pieces={config.add_pieces} is less than the {len(made)} that the given pieces "
            f"and characters need; give at least {len(made)}, or fewer pieces"
        )
    missing = config.add_pieces - len(made)
    if missing > 0:
        lines = _lines(texts, config)
        vocabulary, learned = _learn(vocabulary, lines, missing, config, where)
        made += learned
    elif not made:
        raise ConfigError("nothing to add: give add_pieces and text, pieces, or common_characters")
    added = [Added(first + index, *piece) for index, piece in enumerate(made)]
    result = vocabulary.files()
    kind = (
        HuggingFaceTokenizer if tokenizer_files.HUGGING_FACE in result else SentencePieceTokenizer
    )
    return Extension(kind(result, where), added)


class _Made(NamedTuple):
    piece: bytes
    origin: Literal["given", "helper", "learned"]
    saved: int


def _give(vocabulary: Vocabulary, pieces: Sequence[str]) -> list[_Made]:
    """Adds `pieces`, shorter ones first, since longer ones are joined from them."""
    wanted = {piece.encode() for piece in pieces}
    made: list[_Made] = []
    for piece in sorted(pieces, key=len):
        while step := _step(vocabulary, piece.encode(), wanted):
            vocabulary.add(*step)
            made.append(_Made(step[0], "given" if step[0] in wanted else "helper", 0))
    return made


def _step(vocabulary: Vocabulary, text: bytes, wanted: Set[bytes]) -> _Step | None:
    """What to add next so that `text` becomes one piece; None when it is.

    A character without a piece, else a join that is itself wanted, else the leftmost join.
    """
    if vocabulary.has(text):
        return None
    if not vocabulary.needs_path:
        return text, None
    parts = vocabulary.spell(text)
    for part in parts:
        if not vocabulary.has(part):
            return part, None
    joins = [left + right for left, right in itertools.pairwise(parts)]
    open_ones = [at for at, join in enumerate(joins) if not vocabulary.has(join)]
    if not open_ones:
        raise DataError(
            f"piece {text.decode()!r} cannot be joined: the base spells it {parts}, and any two of "
            "these make a piece that it has already; leave it out"
        )
    at = next((at for at in open_ones if joins[at] in wanted), open_ones[0])
    return joins[at], (parts[at], parts[at + 1])


def _lines(texts: Iterable[str], config: ExtendConfig) -> list[str]:
    """Lines with a character of the script, or an even sample of them."""
    holds = scripts.script_of(config.script).any_character.search
    every = (line for text in texts for line in split_lines(replace_surrogates(text)))
    lines = sample((line for line in every if holds(line)), config.max_bytes, config.seed)
    if not lines:
        raise DataError(
            f"no text to learn from: no line holds a character of the script {config.script!r}"
        )
    return lines


def _learn(
    vocabulary: Vocabulary, lines: list[str], missing: int, config: ExtendConfig, where: str
) -> tuple[Vocabulary, list[_Made]]:
    """Learns `missing` pieces behind those that are there."""
    script = scripts.script_of(config.script)
    grown = open_base(vocabulary.files(), where)
    runs, pieces, uncovered = grown.runs(lines, script)
    log.info("learning %d pieces from %d lines, %d symbols", missing, len(lines), len(runs.symbols))
    learner = MergeLearner(
        runs,
        pieces,
        grown.allowed(script, config.max_piece_characters),
        known={text: symbol for symbol, text in pieces.items() if symbol not in uncovered},
        by_text=grown.by_text,
        uncovered=uncovered,
    )
    made: list[_Made] = []
    wanted = missing if grown.needs_path else int(missing * SPARE)
    while len(made) < wanted:
        found = learner.next(config.min_saved, _comes_out(grown))
        if found is None:
            break
        grown.add(found.piece, found.pair)
        made.append(_Made(found.piece, "learned", found.saved))
    if len(made) < missing:
        raise ConfigError(
            f"add_pieces is {missing - len(made)} more than this text can fill with pieces that save "
            f"min_saved={config.min_saved} tokens; lower add_pieces or give more text"
        )
    if not isinstance(vocabulary, PieceListVocabulary) or vocabulary.needs_path:
        return grown, made
    candidates = [piece.piece for piece in made]
    scored = vocabulary.score(lines, candidates, learner.counts(), missing)
    return vocabulary, [piece for piece in made if piece.piece in scored]


def _comes_out(vocabulary: Vocabulary) -> Callable[[bytes, bytes], bool]:
    """Whether a merge of two pieces would give their joined text one piece."""
    if not vocabulary.needs_path:
        return lambda left, right: True
    return lambda left, right: vocabulary.spell(left + right) == [left, right]
