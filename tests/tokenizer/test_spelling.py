"""New pieces in the ids of the base, for every kind of base; and what is no extension of it."""

import dataclasses

import pytest

from llm_jax import tokenizer
from llm_jax.errors import DataError
from llm_jax.tokenizer.extend import ExtendConfig, extend
from llm_jax.tokenizer.huggingface import HuggingFaceTokenizer
from llm_jax.tokenizer.sentencepiece import SPACE_MARK, SentencePieceTokenizer
from llm_jax.tokenizer.spelling import require_extension, spellings
from tests.tokenizer.tiny_bases import BASES, prose

KINDS = ("byte-level", "bpe", "llama-2", "bpe, added token", "unigram")


def pair(name: str) -> tuple[tokenizer.Tokenizer, tokenizer.Tokenizer]:
    """A base and its extension by 60 Chinese pieces."""
    files = BASES[name]()
    kind = HuggingFaceTokenizer if "tokenizer.json" in files else SentencePieceTokenizer
    return kind(files), extend(files, ExtendConfig(add_pieces=60), texts=prose(0)).tokenizer


@pytest.mark.parametrize("name", KINDS)
def test_a_new_piece_is_spelled_by_old_ids_that_read_as_its_text(name):
    base, extended = pair(name)
    require_extension(base, extended, "data")
    spelled = spellings(base, extended)
    assert len(spelled) == extended.vocab_size - base.vocab_size == 60
    whole = 0
    for id, ids in enumerate(spelled, start=base.vocab_size):
        assert ids
        assert max(ids) < base.vocab_size
        assert base.token_num_bytes()[ids].sum() == extended.token_num_bytes()[id]
        text = extended.decode([id])
        if "\ufffd" not in text:  # else a byte-level piece that ends inside a character
            # a dummy prefix is dropped with the first space of a text, not of a piece
            assert base.decode(ids).lstrip(" ") == text.lstrip(" ")
            whole += 1
    assert whole > 30


def test_a_space_in_a_new_piece_is_spelled_as_the_base_spells_it_in_the_middle_of_a_text():
    files = BASES["llama-2"]()
    base = SentencePieceTokenizer(files)
    from llm_jax.tokenizer.given import Given

    extended = extend(files, ExtendConfig(), wanted=[Given(" the the", "list:1")]).tokenizer
    (*_, ids) = spellings(base, extended)
    pieces = [base.piece_of(id) for id in ids]
    assert "".join(pieces).replace(SPACE_MARK, " ") == " the the"
    assert extended.piece_of(extended.vocab_size - 1).count(SPACE_MARK) == 2


def test_another_vocabulary_is_no_extension_and_the_first_id_that_differs_is_named():
    base, extended = pair("bpe")
    with pytest.raises(
        DataError, match=r"data: its tokenizer does not extend .*: id \d+ is '.*' there"
    ):
        require_extension(pair("unigram")[0], extended, "data")
    with pytest.raises(DataError, match=r"has \d+ ids, fewer than the base model's \d+"):
        require_extension(extended, base, "data")
    renamed = Renamed(base, eos_id=base.bos_id)
    with pytest.raises(DataError, match=r"EOS is 2 there and 1 here"):
        require_extension(base, renamed, "data")  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass
class Renamed:
    """A real tokenizer with another end-of-text id, as a companion file can name one."""

    inner: tokenizer.Tokenizer
    eos_id: int

    def __getattr__(self, name: str):
        return getattr(self.inner, name)
