"""New pieces in the ids of the base: what the rows of an extended vocabulary start from."""

from collections.abc import Callable

from llm_jax.errors import DataError
from llm_jax.tokenizer import byte_level, piece_list
from llm_jax.tokenizer import files as tokenizer_files
from llm_jax.tokenizer.base import Tokenizer
from llm_jax.tokenizer.sentencepiece import SPACE_MARK, ModelProto


def require_extension(base: Tokenizer, extended: Tokenizer, where: str) -> None:
    """Passes when every id of `base` is the same piece in `extended`.

    Raises:
      DataError: naming the first that is not; a row of the embedding would mean something else.
    """
    remedy = (
        "prepare the data with the base model's own tokenizer, or with what `llm-jax tokenizer extend` "
        "made of it"
    )
    for id in range(min(base.vocab_size, extended.vocab_size)):
        old, new = base.piece_of(id), extended.piece_of(id)
        if old and old != new:
            raise DataError(
                f"{where}: its tokenizer does not extend the base model's: id {id} is {old!r} there and "
                f"{new or 'missing'!r} here; {remedy}"
            )
    if extended.vocab_size < base.vocab_size:
        raise DataError(
            f"{where}: its tokenizer has {extended.vocab_size} ids, fewer than the base model's "
            f"{base.vocab_size}; {remedy}"
        )
    for role, old, new in (
        ("BOS", base.bos_id, extended.bos_id),
        ("EOS", base.eos_id, extended.eos_id),
    ):
        if old != new:
            raise DataError(
                f"{where}: its tokenizer does not extend the base model's: {role} is {old} there and {new} "
                f"here; {remedy}"
            )


def spellings(base: Tokenizer, extended: Tokenizer) -> list[list[int]]:
    """For every id of `extended` behind those of `base`, in order: the ids that `base` spells it with.

    As in the middle of a text: nothing is put before it. [] for an id that stands for nothing.
    """
    spell = _speller(base)
    pieces = map(extended.piece_of, range(base.vocab_size, extended.vocab_size))
    return [spell(piece) if piece else [] for piece in pieces]


def _speller(base: Tokenizer) -> Callable[[str], list[int]]:
    """How the base spells a piece, as that is written in the extended file."""
    if tokenizer_files.SENTENCEPIECE in base.files:
        return _sentencepiece_speller(base)
    content = base.files[tokenizer_files.HUGGING_FACE]
    description = tokenizer_files.parse_json(content, tokenizer_files.HUGGING_FACE)
    if byte_level.why_not(description):
        return lambda piece: list(base.encode(piece.replace(SPACE_MARK, " ")))
    merges = byte_level.merges_alone(description)
    alphabet = frozenset(byte_level.byte_alphabet())

    def spell(piece: str) -> list[int]:
        if alphabet.issuperset(piece):  # also one that ends inside a character, which is no text
            return [token.id for token in merges.tokenize(piece)]
        return list(base.encode(piece))

    return spell


def _sentencepiece_speller(base: Tokenizer) -> Callable[[str], list[int]]:
    proto = ModelProto.FromString(base.files[tokenizer_files.SENTENCEPIECE])
    alone = piece_list.load(proto, alone=True)

    def spell(piece: str) -> list[int]:
        ids: list[int] = []
        for part in alone.EncodeAsPieces(piece.replace(SPACE_MARK, " ")):
            id = base.id_of(part)
            text = part.replace(SPACE_MARK, " ").encode()
            ids += [id] if id >= 0 else [base.id_of(f"<0x{byte:02X}>") for byte in text]
        return [id for id in ids if id >= 0]

    return spell
