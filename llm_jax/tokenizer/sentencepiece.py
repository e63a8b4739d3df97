"""SentencePiece models (`tokenizer.model`), both what we train and what others ship.

Two things are changed in memory, never in the file that is saved: pieces that are markers by the
companion files or by their look become control symbols, which SentencePiece does not match in text;
and the unknown id reads as U+FFFD instead of " ⁇ ".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as schema

from llm_jax.errors import DataError
from llm_jax.tokenizer import files as tokenizer_files
from llm_jax.tokenizer import specials
from llm_jax.tokenizer.base import model_fingerprint, replace_surrogates

SPACE_MARK = (
    "\u2581"  # how pieces spell a space; text that holds this character itself is rare but real
)

# the generated module has no type information
ModelProto: Any = schema.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
_Type = ModelProto.SentencePiece.Type

# raise when a change here alters what any text encodes to: fingerprints then differ
ENCODING_RULES = 1


class SentencePieceTokenizer:
    """A `Tokenizer` (see `base.py`) over a SentencePiece model, BPE or unigram."""

    def __init__(self, files: Mapping[str, bytes], where: str = tokenizer_files.SENTENCEPIECE):
        """Builds the tokenizer from `tokenizer.model` and its companions, as `files.read` gives them.

        Raises:
          DataError: broken model, no end-of-text id, or companions that do not fit it.
        """
        self.files, self._where = dict(files), where
        proto = _parse(files[tokenizer_files.SENTENCEPIECE], where)
        declared = specials.declared(files)
        self._num_pieces = len(proto.pieces)
        # tokens that Hugging Face files add behind the model's own, as Chinese-Alpaca's [PAD]
        self._added = {id: piece for id, piece in declared.added.items() if id >= self._num_pieces}
        self._named = {piece: id for id, piece in declared.added.items()}
        _hide_markers(proto, declared.special)
        proto.trainer_spec.unk_surface = "\ufffd"
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(proto.SerializeToString())
        except (
            RuntimeError,
            UnicodeDecodeError,
        ) as error:  # the latter: its message quotes bad bytes
            reason = " ".join(str(error).split())
            raise DataError(f"{where}: not a usable SentencePiece model: {reason}") from None
        self._pieces = [(piece.piece, piece.type) for piece in proto.pieces]
        self.bos_id = declared.resolve("bos_token", self.id_of, self._processor.bos_id())
        self.eos_id = declared.resolve("eos_token", self.id_of, self._processor.eos_id())
        self.pad_id = declared.resolve("pad_token", self.id_of, self._processor.pad_id())
        if self.eos_id < 0:
            raise DataError(
                f"{where}: has no end-of-text id; name one as eos_token in tokenizer_config.json"
            )
        control = {id for id, (_, type) in enumerate(self._pieces) if type == _Type.CONTROL}
        roles = {self.bos_id, self.eos_id, self.pad_id} - {-1}
        self.special_ids = frozenset(control | roles | self._added.keys())
        self._mark_ids = self._space_mark_ids(proto.normalizer_spec)
        names = type(proto.trainer_spec).ModelType
        self.kind = f"SentencePiece {names.Name(proto.trainer_spec.model_type).lower()}"

    @property
    def vocab_size(self) -> int:
        """Number of ids, those that companion files add included."""
        return max(self._added, default=self._num_pieces - 1) + 1

    @property
    def fingerprint(self) -> str:
        """Hex digest of the model's bytes, the special ids and our rules; not of where it lies."""
        roles = (self.bos_id, self.eos_id, self.pad_id)
        model = self.files[tokenizer_files.SENTENCEPIECE]
        return model_fingerprint("sentencepiece", ENCODING_RULES, model, roles, self.special_ids)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, no BOS or EOS."""
        text = replace_surrogates(text)
        if self._mark_ids and SPACE_MARK in text:
            return self._encode_space_marks(text)
        return self._processor.EncodeAsIds(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts, int32 each, on all cores."""
        clean = [replace_surrogates(text) for text in texts]
        threads = -1 if len(clean) > 1 else 1  # -1: as many as there are cores
        ids = self._processor.EncodeAsNumpy(clean, num_threads=threads)
        if self._mark_ids:
            for row, text in enumerate(clean):
                if SPACE_MARK in text:
                    ids[row] = np.asarray(self._encode_space_marks(text), np.int32)
        return ids

    def _encode_space_marks(self, text: str) -> list[int]:
        """Text with U+2581 itself in it: byte pieces keep it apart from a space."""
        ids: list[int] = []
        for index, part in enumerate(text.split(SPACE_MARK)):
            ids += self._mark_ids if index else []
            ids += self._processor.EncodeAsIds(part)
        return ids

    def _space_mark_ids(self, normalizer: Any) -> list[int]:
        """Byte pieces of U+2581, or [] where a cut at it would change the text around it."""
        ids = [self.id_of(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        cuttable = not normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces
        return ids if cuttable and all(id >= 0 and self._processor.IsByte(id) for id in ids) else []

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special ids are left out."""
        kept = [int(id) for id in ids]
        for id in kept:
            if not 0 <= id < self.vocab_size:
                raise IndexError(f"id {id} is not in 0 .. {self.vocab_size - 1}")
        # an id between the model's pieces and the last added one stands for nothing
        special, pieces = self.special_ids, self._num_pieces
        return self._processor.DecodeIds([id for id in kept if id < pieces and id not in special])

    def id_of(self, piece: str) -> int:
        """Id of a special token or piece, or -1."""
        if piece in self._named:
            return self._named[piece]
        id = self._processor.PieceToId(piece)
        return id if self._processor.IdToPiece(id) == piece else -1

    def piece_of(self, id: int) -> str:
        """How the file spells an id; "" for an id without a piece."""
        return self._added.get(id, "") if id >= self._num_pieces else self._pieces[id][0]

    def token_num_bytes(self) -> np.ndarray:
        """int32 [V]: UTF-8 bytes each id stands for; 0 for special and unknown ids."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for id, (piece, type) in enumerate(self._pieces):
            if type == _Type.BYTE:
                lengths[id] = 1
            elif type in (_Type.NORMAL, _Type.USER_DEFINED):
                lengths[id] = len(piece.replace(SPACE_MARK, " ").encode())
        lengths[sorted(self.special_ids)] = 0
        return lengths

    def save(self, folder: Path) -> None:
        """Writes the files it was loaded from, byte for byte, each by an atomic rename."""
        tokenizer_files.write(Path(folder), self.files)

    def __reduce__(self):
        return type(self), (self.files, self._where)


def _parse(model: bytes, where: str) -> Any:
    try:
        proto = ModelProto.FromString(model)
    except (
        Exception
    ):  # protobuf's DecodeError; naming it would need a direct dependency on protobuf
        raise DataError(f"{where}: not a SentencePiece model, or a damaged one") from None
    if not proto.pieces:
        raise DataError(f"{where}: a SentencePiece model without pieces")
    for id, piece in enumerate(proto.pieces):
        if not isinstance(piece.piece, str):  # protobuf gives bytes where a string is not UTF-8
            raise DataError(f"{where}: a damaged SentencePiece model: piece {id} is not UTF-8")
    return proto


def _hide_markers(proto: Any, special: frozenset[int]) -> None:
    """Turns every marker that would be matched in text into a control symbol."""
    for id, piece in enumerate(proto.pieces):
        matched = piece.type in (_Type.NORMAL, _Type.USER_DEFINED)
        by_look = piece.type == _Type.USER_DEFINED and specials.is_marker(piece.piece)
        if matched and (by_look or id in special):
            piece.type = _Type.CONTROL
