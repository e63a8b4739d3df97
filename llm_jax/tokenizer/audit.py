"""What a vocabulary does to text, measured before anything is trained on it.

- `unreachable`: pieces that their own text is not encoded as, so that no text is.
- `Tally`: characters, bytes, tokens, speed, round trip and used pieces of one source.
- `Identity`: whether a text keeps its ids when a base is extended.
"""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
import tokenizers

from llm_jax.tokenizer import byte_level, piece_list
from llm_jax.tokenizer import files as tokenizer_files
from llm_jax.tokenizer.base import Tokenizer
from llm_jax.tokenizer.sentencepiece import SPACE_MARK, ModelProto

_Type = ModelProto.SentencePiece.Type


def unreachable(tokenizer: Tokenizer) -> list[int]:
    """Ids of pieces that encoding can never give, special ones and single bytes aside.

    A piece is tried alone, as its text stands inside a longer one. For the merges of a BPE that is
    decisive: the merges inside a piece's span are the same wherever it stands. A byte-level piece that
    ends inside a character is tried on the merges alone; another must also survive normaliser and
    splitter. A WordPiece continuation is tried behind a letter, a digit and its own first character.
    """
    if tokenizer_files.SENTENCEPIECE in tokenizer.files:
        return _unreachable_sentencepiece(tokenizer)
    content = tokenizer.files[tokenizer_files.HUGGING_FACE]
    description = tokenizer_files.parse_json(content, tokenizer_files.HUGGING_FACE)
    built = byte_level.build(description)
    added = {token["content"] for token in description.get("added_tokens") or []}
    pieces = {
        id: piece
        for piece, id in built.get_vocab().items()
        if piece not in added and id not in tokenizer.special_ids
    }
    if not byte_level.why_not(description):
        return _unreachable_byte_level(description, built, pieces)
    prefix = description["model"].get("continuing_subword_prefix") or ""
    return sorted(
        id
        for id, piece in pieces.items()
        if not any(
            id in built.encode(text, add_special_tokens=False).ids
            for text in _settings_of(piece, prefix)
        )
    )


def _settings_of(piece: str, prefix: str) -> list[str]:
    """Texts in which a piece should show up."""
    if prefix and piece.startswith(prefix) and piece != prefix:
        rest = piece.removeprefix(prefix)
        return [start + rest for start in ("a", "1", "的", rest[0])]
    return [piece.replace(SPACE_MARK, " "), piece.replace(SPACE_MARK, "")]


def _unreachable_byte_level(
    description: dict, built: tokenizers.Tokenizer, pieces: dict[int, str]
) -> list[int]:
    model = byte_level.merges_alone(description)
    whole_words = bool(description["model"].get("ignore_merges"))
    lost = []
    for id, piece in pieces.items():
        if len(piece) == 1:
            continue
        try:
            text = byte_level.to_bytes(piece).decode()
        except (KeyError, UnicodeDecodeError):
            text = ""
        alone = [token.id for token in model.tokenize(piece)] == [id]
        if (not alone and not (whole_words and text)) or (
            text and id not in built.encode(text, add_special_tokens=False).ids
        ):
            lost.append(id)
    return sorted(lost)


def _unreachable_sentencepiece(tokenizer: Tokenizer) -> list[int]:
    proto = ModelProto.FromString(tokenizer.files[tokenizer_files.SENTENCEPIECE])
    alone, usual = piece_list.load(proto, alone=True), piece_list.load(proto)
    lost = []
    for id, piece in enumerate(proto.pieces):
        if piece.type != _Type.NORMAL or id in tokenizer.special_ids:
            continue
        text = piece.piece.replace(SPACE_MARK, " ")
        if alone.EncodeAsIds(text) != [id] or piece_list.normalized(usual, text) != text:
            lost.append(id)
    return lost


@dataclasses.dataclass
class Tally:
    """Sums over the documents of one source."""

    tokenizer: Tokenizer
    documents: int = 0
    characters: int = 0
    num_bytes: int = 0
    tokens: int = 0
    exact: int = 0
    seconds: float = 0.0  # of encoding, on all cores
    first_changed: str = ""  # id of the first document that does not come back

    def __post_init__(self) -> None:
        self.used_V = np.zeros(self.tokenizer.vocab_size, bool)

    def add(self, texts: Sequence[str], names: Sequence[str]) -> None:
        """Counts documents; `names` say which they are."""
        started = time.perf_counter()
        rows = self.tokenizer.encode_batch(texts)
        self.seconds += time.perf_counter() - started
        for text, name, ids in zip(texts, names, rows, strict=True):
            self.documents, self.tokens = self.documents + 1, self.tokens + len(ids)
            self.characters, self.num_bytes = (
                self.characters + len(text),
                self.num_bytes + len(text.encode()),
            )
            self.used_V[ids] = True
            same = self.tokenizer.decode(ids.tolist()) == text
            self.exact += same
            self.first_changed = self.first_changed or ("" if same else name)

    @property
    def rate(self) -> float:
        """Characters per token."""
        return self.characters / max(self.tokens, 1)


@dataclasses.dataclass
class Identity:
    """Lines that an extended vocabulary spells as its base does, and those that it does not."""

    base: Tokenizer
    extended: Tokenizer
    lines: int = 0
    differences: list[dict] = dataclasses.field(default_factory=list)

    def add(self, lines: Sequence[str], place: str) -> None:
        """Compares the ids of lines."""
        self.lines += len(lines)
        before, after = self.base.encode_batch(lines), self.extended.encode_batch(lines)
        for line, old, new in zip(lines, before, after, strict=True):
            if not np.array_equal(old, new):
                entry = {
                    "place": place,
                    "line": line,
                    "base": old.tolist(),
                    "extended": new.tolist(),
                }
                self.differences.append(entry)
