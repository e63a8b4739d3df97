"""ROUGE-L, and finding the nearest of a pool without computing all."""

import random

import numpy as np
import pytest

from llm_jax.instruct.self_instruct.novelty import Pool, rouge_l, tokens

# made with rouge-score 0.1.2: RougeScorer(["rougeL"]).score(b, a)["rougeL"].fmeasure
GOLDEN = [
    ("Write a poem about the sea.", "Write a short poem about the old sea.", 0.8571428571428571),
    ("List three uses of salt", "Name three things that salt is used for", 0.3076923076923077),
    ("The cat, the dog; and THE bird!", "the bird and the dog and the cat", 0.6666666666666666),
    ("It's a state-of-the-art idea", "its a state of the art idea", 0.7999999999999999),
    ("Compute 3.5% of 1,200", "compute 35 of 1200", 0.4),
    ("one", "two", 0.0),
    ("", "anything at all", 0.0),
    ("你好", "你好", 0.0),
    ("naïve café", "naive cafe", 0.0),
]
CHINESE = [
    ("写一首关于春天的诗", "写一首关于春天的诗", 1.0),
    ("写一首关于春天的诗。", "写 一首 关于春天的诗", 1.0),  # marks and blanks are no tokens
    ("写一首诗", "写一封信", 0.5),
    ("解释Python的列表", "解释 python 的字典", 4 / 6),  # a Latin word is one token
    ("ＡＢＣ是什么", "abc是什么", 1.0),
    ("春夏秋冬", "冬秋夏春", 0.25),
]


@pytest.mark.parametrize(("one", "other", "score"), GOLDEN)
def test_english_scores_are_those_of_rouge_score_to_the_last_bit(one, other, score):
    assert rouge_l(one, other, "en") == score
    assert rouge_l(other, one, "en") == score


@pytest.mark.parametrize(("one", "other", "score"), CHINESE)
def test_chinese_is_compared_by_characters(one, other, score):
    assert rouge_l(one, other, "zh") == pytest.approx(score, abs=1e-15)


def longest_common(a: list[str], b: list[str]) -> int:
    """The textbook table, row by row."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def plain_nearest(text: str, pool: list[str], language: str) -> tuple[float, int]:
    """Every pair computed, by the definition."""
    scores = []
    for other in pool:
        a, b = tokens(text, language), tokens(other, language)
        common = longest_common(a, b)
        p, r = common / max(len(a), 1), common / max(len(b), 1)
        scores.append(2 * p * r / (p + r) if common else 0.0)
    return max(scores), scores.index(max(scores))


def drawn(rng: random.Random, language: str, count: int) -> list[str]:
    """Texts with common and rare words, repeats within a text, near copies, and a few empty ones."""
    words = (
        [f"w{n}" for n in range(60)] if language == "en" else [chr(0x4E00 + n) for n in range(60)]
    )
    texts: list[str] = []
    for _ in range(count):
        size = rng.choice([0, 1, 2, 5, 9, 14, 22, 70])
        made = [words[min(int(rng.paretovariate(0.7)) - 1, 59)] for _ in range(size)]
        if texts and rng.random() < 0.2:
            made = tokens(rng.choice(texts), language)
            made[len(made) // 2 : len(made) // 2 + 1] = rng.sample(words, 2)
        texts.append(" ".join(made))
    return texts


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("seed", range(2))
def test_the_nearest_is_that_of_computing_every_pair_ties_too(language, seed):
    texts = drawn(random.Random(seed), language, 110)
    pool = Pool(language)
    for number, text in enumerate(texts):
        if number:
            assert pool.nearest(text) == plain_nearest(text, texts[:number], language)
        pool.add(text)
    assert len(pool) == 110


def test_an_empty_pool_has_no_nearest():
    assert Pool("zh").nearest("写诗") == (0.0, -1)


def test_tokens_beyond_the_surrogates_of_unicode_are_told_apart():
    pool = Pool("en")
    pool.add(" ".join(f"w{n}" for n in range(0xD800 + 5000)))
    pool.add("w55295 w55296 w55297 w60000")
    assert pool.nearest("w55295 w55296 w55297 w59999") == (0.75, 1)


@pytest.mark.oracle
def test_random_english_has_the_scores_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    rng = random.Random(5)
    marks = ["", ".", ",", "'s", " - ", "é", "中"]
    texts = [
        "".join(w + rng.choice(marks) + " " for w in t.split()).title()
        for t in drawn(rng, "en", 120)
    ]
    for one in texts:
        for other in texts[::7]:
            assert rouge_l(one, other, "en") == scorer.score(one, other)["rougeL"].fmeasure
    pool = Pool("en")
    for text in texts[:100]:
        pool.add(text)
    for text in texts[100:]:
        scores = [scorer.score(text, other)["rougeL"].fmeasure for other in texts[:100]]
        assert pool.nearest(text) == (max(scores), int(np.argmax(scores)))
