"""Byte-level BPE and WordPiece trained here: their ids, what they lose, what they refuse."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax import tokenizer
from llm_jax.errors import ConfigError, DataError
from llm_jax.tokenizer.train_huggingface import CHUNK_CHARACTERS, chunks
from tests.tokenizer.conftest import TEXTS, small


def byte_bpe(**changes):
    # the shared settings raise character_coverage and threads, which this kind has no use for
    plain = {"character_coverage": 0.9995, "threads": 8}
    return tokenizer.train(small(kind="byte-bpe", **(plain | changes)), TEXTS)


def wordpiece(**changes):
    return tokenizer.train(
        small(kind="wordpiece", threads=8, **({"vocab_size": 290} | changes)), TEXTS
    )


def test_ids_of_byte_level_bpe_are_laid_out_as_documented():
    trained = byte_bpe()
    markers = ("<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>")
    assert [trained.id_of(piece) for piece in markers] == [0, 1, 2, 3]
    assert (trained.bos_id, trained.eos_id, trained.pad_id) == (0, 0, 1)
    assert trained.special_ids == {0, 1, 2, 3}
    assert trained.vocab_size == 400
    assert trained.kind == "Hugging Face BPE"


BYTE_BPE = byte_bpe()


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_byte_level_bpe_gives_back_every_text(text):
    assert BYTE_BPE.decode(BYTE_BPE.encode(text)) == text


def test_byte_level_bpe_joins_chinese_and_keeps_digits_apart():
    assert len(BYTE_BPE.encode("我们")) < 6
    assert len(BYTE_BPE.encode("12345")) == 5
    together = byte_bpe(split_digits=False, vocab_size=450)
    assert len(together.encode("12345")) < 5


def test_the_same_text_gives_the_same_files():
    assert byte_bpe().fingerprint == BYTE_BPE.fingerprint
    assert wordpiece().fingerprint == wordpiece().fingerprint


def test_wordpiece_makes_every_han_character_a_token_and_drops_white_space():
    trained = wordpiece()
    assert len(trained.encode("机器学习")) == 4
    assert trained.decode(trained.encode("机器\n\n学习")) == "机 器 学 习"
    assert (trained.bos_id, trained.eos_id, trained.pad_id) == (2, 3, 0)
    assert trained.decode(trained.encode("龘")) == "\ufffd"
    assert len(trained.encode("Model")) > 0  # case and accents are kept
    assert trained.encode("The") != trained.encode("the")


def test_wordpiece_covers_the_share_of_characters_it_is_told():
    known = [
        sum(c in "".join(TEXTS) and t.id_of(c) > 0 for c in set("".join(TEXTS)))
        for t in (wordpiece(vocab_size=250, character_coverage=0.9), wordpiece())
    ]
    assert known[0] < known[1]


def test_nfkc_and_the_prefix_are_what_they_say():
    assert (
        byte_bpe(normalization="nfkc").decode(byte_bpe(normalization="nfkc").encode("ＡＢ")) == "AB"
    )
    prefixed = byte_bpe(add_dummy_prefix=True)
    assert prefixed.encode("the") == prefixed.encode(" the")


def test_parts_lose_nothing_and_are_cut_before_newlines():
    text = "word word\n    indented\n\n" * 800 + "汉" * 9000
    parts = list(chunks(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= CHUNK_CHARACTERS
    assert parts[1][0] in "\n "


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kind": "byte-bpe", "threads": 8},
            "character_coverage=1.0 has no effect with kind='byte-bpe'",
        ),
        ({"kind": "wordpiece"}, "threads=2 has no effect with kind='wordpiece'"),
        (
            {"kind": "wordpiece", "threads": 8, "add_dummy_prefix": True},
            "add_dummy_prefix=True has no",
        ),
        (
            {"kind": "wordpiece", "threads": 8, "normalization": "nmt_nfkc"},
            "must be identity or nfkc",
        ),
        ({"kind": "wordpiece", "threads": 8, "special_tokens": ("[SEP]",)}, r"'\[SEP\]' must be"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        small(**settings)


def test_sizes_that_do_not_fit_name_one_that_does():
    with pytest.raises(ConfigError, match=r"vocab_size=200 is too small: .* need 260"):
        byte_bpe(vocab_size=200)
    with pytest.raises(ConfigError, match=r"vocab_size=90000 .* largest possible is \d+"):
        byte_bpe(vocab_size=90_000)
    with pytest.raises(ConfigError, match=r"vocab_size=20 is too small for the characters"):
        wordpiece(vocab_size=20)
    with pytest.raises(DataError, match="no text to train"):
        tokenizer.train(small(kind="wordpiece", threads=8), [""])
