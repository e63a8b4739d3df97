"""The byte-level BPE vocabulary of a `tokenizer.json`, as something that can be extended.

New merges go behind all old ones. A text is thus first spelled exactly as the base spells it, and
only then are new merges tried, in their order: what holds no new pair keeps its ids.

Added tokens (`<|endoftext|>`, runs of spaces) are written into the model's vocabulary as well, as
GPT-NeoX does: the library numbers an added token that is not there by the size of the vocabulary,
so that its id would move when pieces are put behind it.
"""

import functools
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models

from llm_jax.errors import DataError
from llm_jax.tokenizer import files as tokenizer_files
from llm_jax.tokenizer.merges import SEPARATOR, Runs, gather
from llm_jax.tokenizer.scripts import ByteRule, Script

_BATCH = 2000  # lines: keeps the library's Encoding objects, some 200 bytes a token, short-lived


@functools.cache
def byte_alphabet() -> tuple[str, ...]:
    """The character that stands for each byte: itself where it prints, else one from U+0100 on (GPT-2)."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return tuple(chr(byte if byte in prints else next(others)) for byte in range(256))


@functools.cache
def _byte_of_character() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_alphabet())}


def to_bytes(piece: str) -> bytes:
    """The bytes that a piece in the byte alphabet stands for. Raises KeyError for other characters."""
    values = _byte_of_character()
    return bytes([values[character] for character in piece])


def to_alphabet(text: bytes) -> str:
    """Inverse of `to_bytes`."""
    alphabet = byte_alphabet()
    return "".join([alphabet[byte] for byte in text])


def why_not(description: Mapping[str, Any]) -> str:
    """Why a tokenizer.json is no byte-level BPE that can be extended; "" when it is one."""
    model = description.get("model") or {}
    kind = model.get("type", "BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        return f"its model is {kind}"
    if '"ByteLevel"' not in json.dumps([description.get("pre_tokenizer")]):
        return (
            "its BPE is not byte-level (give the tokenizer.model that lies beside it, if one does)"
        )
    odd = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
    used = [name for name in odd if model.get(name)]
    if used:
        return f"its BPE uses {used[0]}"
    if not set(byte_alphabet()) <= model.get("vocab", {}).keys():
        return "its vocabulary lacks some of the 256 bytes"
    return ""


def build(description: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The library's object; special tokens are not matched in text, nothing is cut or padded."""
    built = tokenizers.Tokenizer.from_str(json.dumps(description))
    built.encode_special_tokens = True
    built.no_truncation()
    built.no_padding()
    return built


def merges_alone(description: Mapping[str, Any]) -> models.Model:
    """The BPE model, without the flag that lets whole words skip the merges."""
    core = {"type": "BPE", **description["model"], "ignore_merges": False}
    shell = {**description, "model": core, "added_tokens": [], "post_processor": None}
    return tokenizers.Tokenizer.from_str(json.dumps(shell)).model


class ByteLevelVocabulary:
    """A base and the pieces put behind it so far."""

    by_text = False
    needs_path = True

    def __init__(self, files: Mapping[str, bytes], where: str):
        """Reads `tokenizer.json` among `files`. Raises DataError when it cannot be extended."""
        self._files, self._where = dict(files), where
        content = files[tokenizer_files.HUGGING_FACE]
        self._description = tokenizer_files.parse_json(content, where)
        if reason := why_not(self._description):
            raise DataError(
                f"{where}: cannot be extended: {reason}; only byte-level BPE (tokenizer.json) and "
                "SentencePiece BPE or unigram (tokenizer.model) can"
            )
        added = self._description.get("added_tokens") or []
        self._vocab: dict[str, int] = dict(self._description["model"]["vocab"])
        self._added = {token["content"] for token in added}
        for token in added:
            self._vocab.setdefault(token["content"], token["id"])
        self.size = max(self._vocab.values()) + 1
        self._tokenizer = build(self._description)
        self._model = merges_alone(self._description)
        self._new: dict[bytes, int] = {}
        self._ranks: dict[tuple[bytes, bytes], int] = {}
        self._merges: list[tuple[bytes, bytes]] = []

    def has(self, piece: bytes) -> bool:
        """Whether a piece with these bytes is there."""
        return to_alphabet(piece) in self._vocab or piece in self._new

    def trouble(self, piece: str) -> str:
        """Why `piece` could never be produced, or "": the base rewrites it, or splits it before BPE."""
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        text = normalizer.normalize_str(piece) if normalizer else piece
        if text != piece:
            return f"the base's normaliser rewrites it to {text!r}"
        parts = [part for part, _ in splitter.pre_tokenize_str(text)] if splitter else []
        if parts != [to_alphabet(piece.encode())]:
            return f"the base's pre-tokenizer splits it into {len(parts)} words"
        return ""

    def spell(self, piece: bytes) -> list[bytes]:
        """The pieces, old and new, that these bytes are encoded as."""
        tokens = self._model.tokenize(to_alphabet(piece))
        parts = [to_bytes(token.value) for token in tokens]
        while len(parts) > 1:
            ranks = [self._ranks.get(pair, len(self._ranks)) for pair in itertools.pairwise(parts)]
            at = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[at] == len(self._ranks):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return parts

    def add(self, piece: bytes, pair: tuple[bytes, bytes] | None) -> None:
        """Puts a piece behind all others, made by merging `pair`."""
        assert pair is not None, "every byte has a piece"
        assert not self.has(piece)
        self._new[piece] = self.size + len(self._new)
        self._ranks[pair] = len(self._ranks)
        self._merges.append(pair)

    def allowed(self, script: Script, max_characters: int):
        """The rule for texts that may be learned."""
        return ByteRule(script, max_characters).allowed

    def runs(
        self, lines: Sequence[str], script: Script
    ) -> tuple[Runs, dict[int, bytes], dict[int, int]]:
        """Runs of symbols that may be merged, the bytes of each symbol, no uncovered characters."""
        rule = ByteRule(script, 1 << 20)
        pieces: dict[int, bytes] = {self.size - 1: b""}
        usable = np.zeros(self.size, bool)
        for token, id in self._vocab.items():
            if token not in self._added and _byte_of_character().keys() >= set(token):
                pieces[id] = to_bytes(token)
                usable[id] = rule.usable(pieces[id])
        parts = [np.zeros(0, np.int32)]
        for group in _groups(lines):
            for encoding in self._tokenizer.encode_batch(list(group), add_special_tokens=False):
                parts.append(_divided(encoding, usable))
        return gather(np.concatenate(parts)), pieces, {}

    def files(self) -> dict[str, bytes]:
        """The files of the extended tokenizer."""
        description = dict(self._description)
        model = description["model"] = dict(description["model"])
        new = {to_alphabet(piece): id for piece, id in self._new.items()}
        model["vocab"] = dict(sorted((self._vocab | new).items(), key=lambda item: item[1]))
        merges = [[to_alphabet(left), to_alphabet(right)] for left, right in self._merges]
        spelled = bool(model["merges"]) and isinstance(model["merges"][0], str)
        model["merges"] = model["merges"] + ([" ".join(m) for m in merges] if spelled else merges)
        text = json.dumps(description, ensure_ascii=False, indent=2)
        return self._files | {tokenizer_files.HUGGING_FACE: text.encode()}


def _groups(lines: Sequence[str]) -> Iterable[Sequence[str]]:
    return (lines[start : start + _BATCH] for start in range(0, len(lines), _BATCH))


def _divided(encoding: tokenizers.Encoding, usable: np.ndarray) -> np.ndarray:
    """Ids of one line with SEPARATOR for those that are not usable, between words, and at the end."""
    ids = np.asarray(encoding.ids, np.int32)
    symbols = np.where(usable[ids], ids, SEPARATOR).astype(np.int32)
    words = np.asarray([-1 if word is None else word for word in encoding.word_ids], np.int32)
    changes = np.flatnonzero(words[1:] != words[:-1]) + 1
    return np.insert(symbols, np.append(changes, len(symbols)), SEPARATOR)
