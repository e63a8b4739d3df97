"""What every tokenizer offers, whatever file format it came from. No jax here."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """Text <-> ids. Text never turns into special ids: those are added by their id, by us.

    Instances can be pickled, so that worker processes get them.
    """

    @property
    def kind(self) -> str:
        """What the file holds, for people: `SentencePiece bpe`, `Hugging Face BPE`."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text: control tokens, BOS, EOS and padding. Encoding never gives one."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of ids; ids are 0 .. vocab_size - 1."""
        ...

    @property
    def bos_id(self) -> int:
        """Id put before every document, or -1 when the tokenizer has none."""
        ...

    @property
    def eos_id(self) -> int:
        """Id put after every document; generation stops at it."""
        ...

    @property
    def pad_id(self) -> int:
        """Id used to fill rows, or -1 when the tokenizer has none."""
        ...

    @property
    def files(self) -> Mapping[str, bytes]:
        """The tokenizer's own files by name: what `save` writes."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest that changes whenever any encoding could."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, no BOS or EOS. Lone surrogates are replaced, never an error."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts, int32 each; faster than one by one."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special ids are left out, invalid UTF-8 and the unknown id become U+FFFD.

        Raises IndexError for an id that is not in 0 .. vocab_size - 1.
        """
        ...

    def id_of(self, piece: str) -> int:
        """Id of a special token or piece, as its file spells it, or -1 when there is none."""
        ...

    def piece_of(self, id: int) -> str:
        """How its file spells an id, special ones included; "" for an id without a piece."""
        ...

    def token_num_bytes(self) -> np.ndarray:
        """int32 [V]: UTF-8 bytes of text that each id stands for; 0 for special ids.

        Summed over the ids of a text it is the text's length in bytes, for bits per byte while
        training. Exact when encoding loses nothing (identity normalisation, no dummy prefix, byte
        fallback or byte-level pieces); otherwise it counts the text as `decode` would give it, up to
        one space a document.
        """
        ...

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's own files into `folder`, byte for byte, for `tokenizer.load` to read."""
        ...


def digest(parts: dict) -> str:
    """Hex sha256 of a JSON-able description; how fingerprints are made."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def model_fingerprint(
    kind: str, rules: int, model: bytes, roles: tuple[int, int, int], special: frozenset[int]
) -> str:
    """Fingerprint of a model file, its BOS, EOS and PAD, its special ids, and our rules for them."""
    return digest(
        {
            "format": kind,
            "rules": rules,
            "model": hashlib.sha256(model).hexdigest(),
            "roles": list(roles),
            "special": sorted(special),
        }
    )


def start_id(tokenizer: Tokenizer) -> int:
    """What the first token of a document is predicted from: BOS, or the EOS of the document before.

    GPT-2, GPT-NeoX and Qwen have no BOS and separate documents by EOS alone.
    """
    return tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id


def replace_surrogates(text: str) -> str:
    """Lone surrogates (legal in JSON, not in UTF-8) become '?'; other text is returned as it is."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
