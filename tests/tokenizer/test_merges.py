"""The fast learner against the plain definition of byte pair encoding."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.tokenizer.merges import SEPARATOR, MergeLearner, gather


def flat(words: list[str]) -> np.ndarray:
    """Letters as symbols, words divided."""
    parts = [[*map(ord, word), SEPARATOR] for word in words]
    return np.asarray(list(itertools.chain.from_iterable(parts)), np.int32)


def learner_of(words: list[str], by_text: bool = False, **more) -> MergeLearner:
    letters = {ord(c): c.encode() for word in words for c in word}
    known = {
        text: symbol for symbol, text in letters.items() if symbol not in more.get("uncovered", {})
    }
    runs = gather(flat(words))
    return MergeLearner(runs, letters, lambda text: True, known=known, by_text=by_text, **more)


def plain(words: list[str], number: int) -> list[tuple[bytes, int]]:
    """(piece, count) of the first merges, recounted from nothing each time; ties by the bytes.

    Ends where two pairs of equal count spell the same text: either may then be taken.
    """
    spelled = [[c.encode() for c in word] for word in words]
    known = set(itertools.chain.from_iterable(spelled))
    made = []
    for _ in range(number):
        counts: Counter = Counter()
        for word in spelled:
            counts.update(pair for pair in itertools.pairwise(word) if b"".join(pair) not in known)
        if not counts:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], b"".join(pair), pair))
        made.append((b"".join(pair), counts[pair]))
        alike = [p for p in counts if (b"".join(p), counts[p]) == made[-1]]
        if len(alike) > 1:
            break
        known.add(b"".join(pair))
        spelled = [joined(word, pair) for word in spelled]
    return made


def joined(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    out, at = [], 0
    while at < len(word):
        if tuple(word[at : at + 2]) == pair:
            out.append(b"".join(pair))
            at += 2
        else:
            out.append(word[at])
            at += 1
    return out


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.text("abc", max_size=12), min_size=1, max_size=12))
def test_merges_and_counts_are_those_of_the_definition(words):
    learner = learner_of(words)
    for piece, count in plain(words, 15):
        made = learner.next()
        assert made is not None
        assert (made.piece, made.saved) == (piece, count)


@pytest.mark.parametrize("word", ["aaa", "aaaa", "aaaaa", "aabaaa"])
def test_overlapping_pairs_are_merged_from_the_left(word):
    learner = learner_of([word])
    assert learner.next() is not None
    expected = Counter(joined([c.encode() for c in word], (b"a", b"a")))
    assert learner.counts() == dict(expected)


def test_weights_of_repeated_runs_add_up():
    runs = gather(flat(["ab", "ab", "c", "ab", "bc"]))
    assert runs.symbols.tolist() == [-1, *map(ord, "ab"), -1, ord("c"), -1, *map(ord, "bc"), -1]
    made = learner_of(["ab", "ab", "c", "ab", "bc"]).next()
    assert made == (b"ab", (b"a", b"b"), 3)


def test_by_text_all_splits_of_a_text_are_one_candidate():
    # after "bc", "abc" is spelled a|bc; "ab" then joins the others as ab|c, and both are "abc"
    words = ["bc"] * 9 + ["abc"] * 3
    learner = learner_of(words, by_text=True)
    made = [learner.next(), learner.next()]
    assert [m.piece for m in made if m] == [b"bc", b"abc"]
    assert learner.counts() == {b"bc": 9, b"abc": 3}


def test_by_text_what_spells_a_known_piece_is_merged_at_once():
    words = ["xy"] * 5 + ["axy"] * 2
    letters = {ord(c): c.encode() for c in "axy"} | {500: b"axy"}
    known = {text: symbol for symbol, text in letters.items()}
    runs = gather(flat(words))
    learner = MergeLearner(runs, letters, lambda t: True, known=known, by_text=True)
    made = learner.next()
    assert made is not None
    assert made.piece == b"xy"
    assert learner.next() is None
    assert learner.counts() == {b"xy": 5, b"axy": 2}


def test_an_uncovered_character_is_bought_when_it_saves_most():
    words = ["ab"] * 4 + ["zb"] * 3
    learner = learner_of(words, by_text=True, uncovered={ord("z"): 3})
    first, second, third = learner.next(), learner.next(), learner.next()
    assert first == (b"z", None, 6)  # three tokens become one, three times
    assert second is not None
    assert third is not None
    assert (second.piece, third.piece) == (b"ab", b"zb")
    assert learner.next() is None


def test_a_refused_candidate_is_not_made_and_the_next_is():
    learner = learner_of(["ab", "ab", "cd"])
    made = learner.next(reaches=lambda left, right: left + right != b"ab")
    assert made is not None
    assert made.piece == b"cd"
    assert learner_of(["ab", "cd"]).next(min_saved=2) is None
