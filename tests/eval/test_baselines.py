"""xz and the character trigram: probabilities that sum to one, figures derived by hand."""

import lzma
import math

import pytest

from llm_jax.eval.baselines import SCALAR_VALUES, CharacterTrigram, xz_bits_per_character
from tests.tiny_text import CHINESE, ENGLISH


def total_probability(trigram, before, alphabet):
    """Sum over every character there is: the seen ones, and all others, which are alike."""
    unseen = "\N{SNOWMAN}"
    assert unseen not in alphabet
    seen = sum(trigram.probability(before, character) for character in alphabet)
    return seen + (SCALAR_VALUES - len(alphabet)) * trigram.probability(before, unseen)


@pytest.mark.parametrize("before", ["", "t", "th", "zq", "的", "☃t", "t☃", "。\n"])
def test_probabilities_sum_to_one_in_every_context(before):
    texts = ENGLISH + CHINESE
    trigram = CharacterTrigram(texts)
    alphabet = sorted(set("".join(texts)))
    assert total_probability(trigram, before, alphabet) == pytest.approx(1, abs=1e-9)


def test_an_untrained_trigram_is_uniform():
    trigram = CharacterTrigram([])
    assert trigram.bits_per_character(["any 字"]) == pytest.approx(math.log2(SCALAR_VALUES))


def test_probabilities_by_hand():
    # "ab", "ac": n(a)=2 n(b)=1 n(c)=1, n=4, t=3 different characters
    trigram = CharacterTrigram(["ab", "ac"])
    uniform = 1 / SCALAR_VALUES
    p_b = (1 + 3 * uniform) / (4 + 3)
    p_b_after_a = (1 + 2 * p_b) / (2 + 2)  # after a: b once and c once
    p_b_after_start_a = (1 + 2 * p_b_after_a) / (2 + 2)
    assert trigram.probability("a", "b") == pytest.approx(p_b_after_start_a)
    p_a = (2 + 3 * uniform) / 7
    p_a_at_start = (2 + 1 * p_a) / (2 + 1)  # two documents begin with a
    assert trigram.probability("", "a") == pytest.approx((2 + 1 * p_a_at_start) / 3)
    assert trigram.probability("zb", "b") == pytest.approx(p_b), "b is never followed by anything"
    bits = -math.log2(trigram.probability("", "a")) - math.log2(p_b_after_start_a)
    assert trigram.bits_per_character(["ab"]) == pytest.approx(bits / 2)


def test_documents_do_not_run_into_each_other():
    trigram = CharacterTrigram(["ab"] * 9)
    assert trigram.bits_per_character(["ab", "ab"]) == pytest.approx(
        trigram.bits_per_character(["ab"])
    )
    assert trigram.probability("b", "a") < 0.5, "the next document is no continuation"


def test_known_text_costs_less_than_unknown():
    trigram = CharacterTrigram(ENGLISH)
    assert trigram.bits_per_character(ENGLISH) < 2 < 5 < trigram.bits_per_character(CHINESE)


def test_xz_is_the_size_of_its_output():
    text = "".join(CHINESE) * 20
    size = len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    assert xz_bits_per_character(CHINESE * 20) == 8 * size / len(text)


def test_a_primer_that_holds_the_text_leaves_little_to_say():
    alone = xz_bits_per_character(ENGLISH)
    assert xz_bits_per_character(ENGLISH, primer=ENGLISH) < 0.2 * alone
