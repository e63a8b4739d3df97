"""Exact match and ROUGE-L: words of English, characters of Chinese, values by hand."""

import pytest

from llm_jax.data.rouge import units
from llm_jax.eval.answers import exact_match, rouge_l


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat's mat, 42!", ["the", "cat", "s", "mat", "42"]),
        ("返回 list 的长度。", ["返", "回", "list", "的", "长", "度"]),
        ("ＡＢＣ　ｄ", ["abc", "d"]),
        ("？ ！", ["?", "!"]),
    ],
)
def test_units_are_words_where_there_are_spaces_and_characters_where_not(text, expected):
    assert units(text) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        # police the gunman: "the gunman" is common, 2 of 4 and 2 of 4 (Lin 2004, section 3.2)
        ("police kill the gunman", "the gunman kill police", 2 * 2 / 8),
        ("我爱北京", "我爱北京", 1.0),
        ("我爱上海", "我爱北京", 2 * 2 / 8),
        ("北京", "我爱北京", 2 * 2 / 6),
        ("", "x", 0.0),
        ("", "", 1.0),
        ("a b c", "d e f", 0.0),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(answer, reference, expected):
    assert rouge_l(answer, reference) == pytest.approx(expected)


def test_exact_match_overlooks_width_case_and_spacing_only():
    assert exact_match(" The  Answer\n", "the answer")
    assert exact_match("ＡＢ", "ab")
    assert not exact_match("the answer.", "the answer")
