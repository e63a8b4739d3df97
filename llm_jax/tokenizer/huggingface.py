"""Hugging Face `tokenizer.json`, through the `tokenizers` library.

By default that library matches added tokens in text: a user who types `<|endoftext|>` ends the
document. Here markers are never matched (`encode_special_tokens`), and where the model itself would
spell one, as a unigram list with `</s>` in it does, the text is cut inside the marker.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers

from llm_jax.errors import DataError
from llm_jax.tokenizer import files as tokenizer_files
from llm_jax.tokenizer import specials
from llm_jax.tokenizer.base import model_fingerprint, replace_surrogates

# Looked up among the special tokens, in this order, where no companion file names the role.
# GPT-2 and GPT-NeoX use <|endoftext|> for both ends.
USUAL = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"),
}

# raise when a change here alters what any text encodes to: fingerprints then differ
ENCODING_RULES = 1

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class HuggingFaceTokenizer:
    """A `Tokenizer` (see `base.py`) over a `tokenizer.json` of any model kind."""

    def __init__(self, files: Mapping[str, bytes], where: str = tokenizer_files.HUGGING_FACE):
        """Builds the tokenizer from `tokenizer.json` and its companions, as `files.read` gives them.

        Raises:
          DataError: broken file, no end-of-text id, or companions that do not fit it.
        """
        self.files, self._where = dict(files), where
        description = tokenizer_files.parse_json(files[tokenizer_files.HUGGING_FACE], where)
        special = _flag_markers(description, where)
        self._tokenizer = _build(description, where)
        self._pieces = {id: piece for piece, id in self._tokenizer.get_vocab().items()}
        if not self._pieces:
            raise DataError(f"{where}: a tokenizer.json without pieces")
        self._size = max(self._pieces) + 1
        # "ByteLevel(...)" and so on, with those nested in a sequence: what decides how pieces spell bytes
        self._decoder_text = json.dumps(description.get("decoder"))
        self.kind = f"Hugging Face {description['model'].get('type', 'model')}"

        declared = specials.declared(files)
        usual = {role: self._first(USUAL.get(role, ()), special) for role in specials.ROLES}
        usual["unk_token"] = self._model_unknown(description["model"])
        ids = {role: declared.resolve(role, self.id_of, usual[role]) for role in specials.ROLES}
        self.bos_id, self.eos_id, self.pad_id = (
            ids[role] for role in ("bos_token", "eos_token", "pad_token")
        )
        self._unk_id = ids["unk_token"]
        if self.eos_id < 0:
            raise DataError(
                f"{where}: has no end-of-text id that could be guessed; "
                "name one as eos_token in tokenizer_config.json beside it"
            )
        flagged = {self.id_of(piece) for piece in special} - {self._unk_id}
        flagged |= declared.special & self._pieces.keys()
        flagged |= {self.bos_id, self.eos_id, self.pad_id}
        self.special_ids = frozenset(flagged - {-1})
        # the unknown id is what unknown text rightly becomes, even where a file uses it as padding
        self._never_V = np.zeros(self.vocab_size, bool)
        self._never_V[sorted(self.special_ids - {self._unk_id})] = True

    def _first(self, pieces: Sequence[str], special: frozenset[str]) -> int:
        return next((self.id_of(piece) for piece in pieces if piece in special), -1)

    def _model_unknown(self, model: Mapping[str, Any]) -> int:
        """Id of unknown text: unigram models give the id, the others the piece."""
        if isinstance(model.get("unk_id"), int):
            return model["unk_id"]
        return self.id_of(model["unk_token"]) if model.get("unk_token") else -1

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; ids without a piece count too."""
        return self._size

    @property
    def fingerprint(self) -> str:
        """Hex digest of the model's bytes, the special ids and our rules; not of where it lies."""
        roles = (self.bos_id, self.eos_id, self.pad_id)
        model = self.files[tokenizer_files.HUGGING_FACE]
        return model_fingerprint("tokenizer.json", ENCODING_RULES, model, roles, self.special_ids)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, no BOS or EOS."""
        return self._encode_plain(replace_surrogates(text))

    def _encode_plain(self, text: str) -> list[int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = encoding.ids
        spans = zip(ids, encoding.offsets, strict=True)
        leaks = [span for id, span in spans if self._never_V[id]]
        if not leaks:
            return ids
        cuts = sorted({start + 1 for start, end in leaks if end - start > 1})
        if not cuts:  # a single character that only a special token spells
            return [id for id in ids if not self._never_V[id]]
        parts = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
        return list(chain.from_iterable(self._encode_plain(part) for part in parts))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts, int32 each, on all cores."""
        clean = [replace_surrogates(text) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(clean, add_special_tokens=False)
        rows = [np.asarray(encoding.ids, np.int32) for encoding in encodings]
        for index, row in enumerate(rows):
            if self._never_V[row].any():
                rows[index] = np.asarray(self._encode_plain(clean[index]), np.int32)
        return rows

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special ids are left out."""
        pieces = []
        for id in map(int, ids):
            if not 0 <= id < self.vocab_size:
                raise IndexError(f"id {id} is not in 0 .. {self.vocab_size - 1}")
            if id == self._unk_id and id not in self.special_ids:
                pieces.append("\ufffd")
            elif id in self._pieces and id not in self.special_ids:
                pieces.append(self._pieces[id])
        return self._join(pieces)

    def _join(self, pieces: list[str]) -> str:
        decoder = self._tokenizer.decoder
        return " ".join(pieces) if decoder is None else decoder.decode(pieces)

    def id_of(self, piece: str) -> int:
        """Id of a special token or piece, or -1."""
        id = self._tokenizer.token_to_id(piece)
        return -1 if id is None else id

    def piece_of(self, id: int) -> str:
        """How the file spells an id; "" for an id without a piece."""
        return self._pieces.get(id, "")

    def token_num_bytes(self) -> np.ndarray:
        """int32 [V]: UTF-8 bytes each id stands for; 0 for special and unknown ids."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for id, piece in self._pieces.items():
            if id != self._unk_id and id not in self.special_ids:
                lengths[id] = self._piece_num_bytes(piece)
        return lengths

    def _piece_num_bytes(self, piece: str) -> int:
        if '"ByteLevel"' in self._decoder_text:  # one character of the alphabet per byte
            return len(piece) if _BYTE_ALPHABET.issuperset(piece) else len(piece.encode())
        if '"ByteFallback"' in self._decoder_text and _BYTE_PIECE.fullmatch(piece):
            return 1
        # what it adds behind another piece, with the space some decoders put or strip at the start
        return len(self._join([piece, piece]).encode()) - len(self._join([piece]).encode())

    def save(self, folder: Path) -> None:
        """Writes the files it was loaded from, byte for byte, each by an atomic rename."""
        tokenizer_files.write(Path(folder), self.files)

    def __reduce__(self):
        return type(self), (self.files, self._where)


_BYTE_ALPHABET = frozenset(pre_tokenizers.ByteLevel.alphabet())


def _flag_markers(description: dict[str, Any], where: str) -> frozenset[str]:
    """Flags added tokens that look like markers as special, in place; returns all special pieces.

    A single character that a file flags special is text all the same: it could not be typed otherwise.
    """
    tokens = description.get("added_tokens") or []
    if not isinstance(tokens, list) or not isinstance(description.get("model"), dict):
        raise DataError(
            f"{where}: not a usable tokenizer.json: needs a model and a list added_tokens"
        )
    special = set()
    for token in tokens:
        piece = token.get("content") if isinstance(token, dict) else None
        if not isinstance(piece, str):
            raise DataError(f"{where}: added_tokens holds {token!r}, which has no content")
        token["special"] = len(piece) > 1 and (
            bool(token.get("special")) or specials.is_marker(piece)
        )
        if token["special"]:
            special.add(piece)
    return frozenset(special)


def _build(description: dict[str, Any], where: str) -> tokenizers.Tokenizer:
    """The library's object; it never pads, cuts or matches special tokens in text."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the library raises plain Exception
        reason = " ".join(str(error).split())
        raise DataError(f"{where}: not a usable tokenizer.json: {reason}") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
