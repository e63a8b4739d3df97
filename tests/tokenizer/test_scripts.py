"""Which characters belong to a script, and which bytes only it has."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.errors import ConfigError
from llm_jax.tokenizer import scripts
from llm_jax.tokenizer.scripts import SCRIPTS, ByteRule


def test_common_characters_are_those_of_the_standard():
    assert len(scripts.common_characters("gb2312-1")) == 3755
    assert len(scripts.common_characters("gb2312-2")) == 6763
    assert scripts.common_characters("gb2312-1")[0] == "啊"
    with pytest.raises(ConfigError, match="did you mean 'gb2312-"):
        scripts.common_characters("gb2312")


@pytest.mark.parametrize(
    ("piece", "allowed"),
    [
        ("中国".encode(), True),
        ("，".encode(), True),
        ("中".encode()[:2], True),
        (b"\xe3\x80", True),  # U+3000-303F, all of the script
        (b"\xe3\x82", False),  # kana
        (b"\xe2\x80", False),  # curly quotes and dashes, which English has
        (b"\x80\x93", False),  # the end of any character
        (b"\xad" + "国".encode(), True),
        ("中，".encode(), False),
        ("a中".encode(), False),
        (" 中".encode(), False),  # Chinese has no spaces between words
        ("中".encode() * 17, False),
    ],
)
def test_bytes_of_han_pieces(piece, allowed):
    assert ByteRule(SCRIPTS["han"], 16).allowed(piece) == allowed


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    name=st.sampled_from(sorted(SCRIPTS)),
    start=st.integers(0, 20),
    length=st.integers(1, 12),
)
def test_allowed_bytes_occur_only_in_text_with_the_script(text, name, start, length):
    piece = text.encode()[start : start + length]
    if piece and ByteRule(SCRIPTS[name], 16).allowed(piece):
        assert SCRIPTS[name].any_character.search(text)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("中文", "han"),
        ("カナ", "kana"),
        ("한국", "hangul"),
        (" naïve", "latin"),
        ("12", "digits"),
        ("  ", "space"),
        ("+，", "other"),
    ],
)
def test_pieces_are_counted_by_script(text, kind):
    assert scripts.kind_of(text) == kind
