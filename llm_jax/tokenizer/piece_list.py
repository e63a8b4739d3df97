"""The vocabulary of a SentencePiece model, as something that can be extended.

BPE: SentencePiece merges any two neighbours that together spell a piece, the highest score first.
New pieces get scores below all old ones, in the order they were made: a text is first spelled as the
base spells it. (With score 0, as appended lists often have it, new pieces go first and break the
merges that longer ones need: 657 of Chinese-LLaMA-2's 23,296 can never be produced.)

Unigram: the best sum of scores wins, so a piece needs no path but a score; `unigram` finds it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece

from llm_jax.errors import DataError
from llm_jax.tokenizer import files as tokenizer_files
from llm_jax.tokenizer import specials, unigram
from llm_jax.tokenizer.merges import SEPARATOR, Runs, gather
from llm_jax.tokenizer.scripts import Script
from llm_jax.tokenizer.sentencepiece import SPACE_MARK, ModelProto

_Type = ModelProto.SentencePiece.Type
_BPE, _UNIGRAM = 2, 1  # TrainerSpec.ModelType


class PieceListVocabulary:
    """A base and the pieces put behind it so far."""

    by_text = True

    def __init__(self, files: Mapping[str, bytes], where: str):
        """Reads `tokenizer.model` among `files`. Raises DataError when it cannot be extended."""
        self._files = dict(files)
        self._proto = ModelProto.FromString(files[tokenizer_files.SENTENCEPIECE])
        kind = self._proto.trainer_spec.model_type
        if kind not in (_BPE, _UNIGRAM):
            raise DataError(
                f"{where}: cannot be extended: its model is neither BPE nor unigram; only byte-level "
                "BPE (tokenizer.json) and SentencePiece BPE or unigram (tokenizer.model) can"
            )
        self.needs_path = kind == _BPE
        _write_out_added(self._proto, specials.declared(files).added)
        self.size = len(self._proto.pieces)
        self._known = {
            _text(piece.piece): id
            for id, piece in enumerate(self._proto.pieces)
            if piece.type in (_Type.NORMAL, _Type.USER_DEFINED)
        }
        self._new: dict[bytes, int] = {}
        self._scores: dict[bytes, float] = {}  # unigram
        self._alone, self._usual = load(self._proto, alone=True), load(self._proto)

    def has(self, piece: bytes) -> bool:
        """Whether a piece with this text is there."""
        return piece in self._known or piece in self._new

    def trouble(self, piece: str) -> str:
        """Why `piece` could never be produced, or "": the base rewrites it, or drops its spaces."""
        if SPACE_MARK in piece:
            return "it holds U+2581, which SentencePiece reads as a space"
        text = normalized(self._usual, piece)
        return "" if text == piece else f"the base's normaliser rewrites it to {text!r}"

    def spell(self, piece: bytes) -> list[bytes]:
        """The pieces and uncovered characters, old and new, that this text is encoded as, by BPE."""
        parts: list[bytes] = []
        for part in self._alone.EncodeAsPieces(piece.decode()):
            text = _text(part)  # neighbouring unknown characters come as one
            parts += [text] if self.has(text) else [c.encode() for c in part]
        while len(parts) > 1:
            joined = [left + right for left, right in itertools.pairwise(parts)]
            ranks = [self._rank(text) for text in joined]
            at = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[at] == len(self._new):
                break
            parts[at : at + 2] = [joined[at]]
        return parts

    def _rank(self, text: bytes) -> int:
        """Old pieces before new ones, new ones in their order; len(new) for what is none."""
        return -1 if text in self._known else self._new.get(text, len(self._new))

    def add(self, piece: bytes, pair: tuple[bytes, bytes] | None) -> None:
        """Puts a piece behind all others; SentencePiece needs no pair."""
        del pair
        self._new[piece] = len(self._new)

    def allowed(self, script: Script, max_characters: int) -> Callable[[bytes], bool]:
        """The rule for texts that may be learned."""

        def rule(text: bytes) -> bool:
            piece = text.decode()
            return len(piece.strip(" ")) <= max_characters and bool(script.piece.fullmatch(piece))

        return rule

    def runs(
        self, lines: Sequence[str], script: Script
    ) -> tuple[Runs, dict[int, bytes], dict[int, int]]:
        """Runs of symbols that may be merged, the bytes of each, and what uncovered ones cost."""
        proto = _with_bytes(self._proto)
        base = len(proto.pieces)
        symbol_of = np.full(base, SEPARATOR, np.int32)
        byte_of = np.full(base + 1, -1, np.int32)
        pieces: dict[int, bytes] = {base - 1: b""}
        for id, piece in enumerate(proto.pieces):
            text = piece.piece.replace(SPACE_MARK, " ")
            if piece.type == _Type.BYTE:
                byte_of[id] = int(piece.piece[3:5], 16)
            elif piece.type == _Type.NORMAL and (script.piece.fullmatch(text) or text == " "):
                symbol_of[id], pieces[id] = id, text.encode()
        rows = load(proto).EncodeAsNumpy(list(lines), num_threads=-1)
        ends = itertools.repeat(np.full(1, base, np.int32))  # an id that is no piece ends a line
        ids = np.concatenate([part for pair in zip(rows, ends, strict=False) for part in pair])
        flat = _read_bytes(ids, np.append(symbol_of, SEPARATOR), byte_of, base, script)
        uncovered = {}
        for symbol in np.unique(flat[flat >= base]).tolist():
            pieces[symbol] = chr(symbol - base).encode()
            uncovered[symbol] = len(pieces[symbol])
        return gather(flat), pieces, uncovered

    def score(
        self,
        lines: Sequence[str],
        candidates: Sequence[bytes],
        counts: Mapping[bytes, int],
        wanted: int,
    ) -> Mapping[bytes, float]:
        """Unigram: adds the `wanted` most useful candidates; finds the scores of all new pieces."""
        kept = list(self._new)
        texts, size = [*kept, *candidates], len(kept) + wanted
        self._scores = unigram.choose(self._proto, texts, counts, lines, size, set(kept))
        self._new = {text: rank for rank, text in enumerate(self._scores)}
        return self._scores

    def files(self) -> dict[str, bytes]:
        """The files of the extended tokenizer."""
        proto = ModelProto.FromString(self._proto.SerializeToString())
        if self.needs_path:
            scores = [p.score for p in proto.pieces if p.type == _Type.NORMAL]
            below = min(scores, default=0.0)
            unigram.append(proto, {text: below - 1 - rank for text, rank in self._new.items()})
        else:
            unigram.append(proto, self._scores or unigram.choose(self._proto, list(self._new)))
        proto.trainer_spec.vocab_size = len(proto.pieces)
        content = proto.SerializeToString(deterministic=True)
        return self._files | {tokenizer_files.SENTENCEPIECE: content}


def _text(piece: str) -> bytes:
    return piece.replace(SPACE_MARK, " ").encode()


def load(proto: Any, *, alone: bool = False) -> sentencepiece.SentencePieceProcessor:
    """The library's object; `alone`: it takes a text as it is, and gives uncovered characters as text."""
    if alone:
        proto = ModelProto.FromString(proto.SerializeToString())
        proto.trainer_spec.byte_fallback = False
        proto.normalizer_spec.ClearField("precompiled_charsmap")
        proto.normalizer_spec.add_dummy_prefix = False
        proto.normalizer_spec.remove_extra_whitespaces = False
        for piece in proto.pieces:
            if piece.type == _Type.BYTE:  # refused where byte_fallback is off
                piece.type = _Type.UNUSED
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto.SerializeToString())
    return processor


def normalized(processor: sentencepiece.SentencePieceProcessor, piece: str) -> str:
    """What the model's normaliser makes of a piece in the middle of a text."""
    return processor.Normalize(f"x{piece}x").replace(SPACE_MARK, " ").strip()[1:-1]


def _with_bytes(proto: Any) -> Any:
    """The model with byte fallback, so that uncovered characters can be told from its ids."""
    proto = ModelProto.FromString(proto.SerializeToString())
    if not proto.trainer_spec.byte_fallback:
        proto.trainer_spec.byte_fallback = True
        for byte in range(256):
            proto.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=_Type.BYTE)
    return proto


def _write_out_added(proto: Any, added: Mapping[int, str]) -> None:
    """Puts tokens that companion files add behind the model's own into the model, at their ids.

    They are never matched in text, nor is what fills the gaps between them.
    """
    for id in range(len(proto.pieces), max(added, default=-1) + 1):
        proto.pieces.add(piece=added.get(id, f"<no_piece_{id}>"), score=0.0, type=_Type.CONTROL)


def _read_bytes(
    ids: np.ndarray, symbol_of: np.ndarray, byte_of: np.ndarray, base: int, script: Script
) -> np.ndarray:
    """Symbols of ids; the bytes of a character of the script become one symbol, base + code point.

    Args:
      ids: int32 [N].
      symbol_of: int32 [V]: the symbol of an id, or SEPARATOR.
      byte_of: int32 [V]: the byte that an id stands for, or -1.
      base: where symbols of characters begin.
      script: whose characters count; others divide.
    """
    symbols, values = symbol_of[ids], byte_of[ids]
    keep = np.ones(len(ids), bool)
    for length, low, high, mask in (
        (2, 0xC2, 0xDF, 0x1F),
        (3, 0xE0, 0xEF, 0xF),
        (4, 0xF0, 0xF4, 7),
    ):
        starts = np.flatnonzero((values >= low) & (values <= high))
        starts = starts[starts + length <= len(ids)]
        points = values[starts] & mask
        for step in range(1, length):
            points = points << 6 | values[starts + step] & 0x3F
        firsts = np.asarray([first for first, _ in script.characters])
        lasts = np.asarray([last for _, last in script.characters])
        at = np.searchsorted(firsts, points, "right") - 1
        inside = (at >= 0) & (points <= lasts[at])
        symbols[starts[inside]] = base + points[inside]
        for step in range(1, length):
            keep[starts[inside] + step] = False
    return symbols[keep]
