"""Evaluation items are found inside documents, in both languages, and common phrases convict nobody."""

import json

import pytest

from llm_jax.data.dedup.contamination import (
    ContaminationStage,
    contamination,
    contamination_stage,
    gather,
    words,
)
from llm_jax.data.sources import SourceConfig
from llm_jax.errors import ConfigError, DataError

ZH = "小明有十二个苹果，他给了小红三个，又从市场上买回来五个，请问他现在一共有多少个苹果？"
EN = "A train leaves the station at nine and travels at sixty miles an hour; how far has it gone by noon?"
SHORT = "what is the capital of france today"


@pytest.fixture(scope="module")
def items():
    named = {"zh": ZH, "en": EN, "tiny": "太短了", "short": SHORT + " please"}
    return gather(named.items(), ngram=13, min_words=8)


def test_a_han_character_is_a_word_and_so_is_a_run_of_latin_letters():
    assert len(words("我用 Python3 写，hello-world")) == 6
    assert words("HELLO, World!").tolist() == words("hello world").tolist()
    assert words("abc").tolist() != words("cba").tolist()
    assert len(words("，。！")) == 0


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (f"下面是一道题。{ZH}答案是十四个。", "zh"),
        (f"Question one.\n{EN.upper().replace(' ', '  ')}\nAnswer: 180 miles.", "en"),
        (f"Quiz: {SHORT}, please?", "short"),
    ],
)
def test_an_item_inside_a_document_is_found_whatever_its_case_and_spaces(items, text, name):
    assert contamination(items, text) == (1.0, name)


def test_part_of_an_item_counts_as_its_share(items):
    half = " ".join(EN.split()[:14])  # of 21 words 14: two of nine 13-grams
    assert contamination(items, half) == (pytest.approx(2 / 9), "en")
    assert contamination(items, "a train leaves the station at nine")[0] == 0.0
    assert contamination(items, "") == (0.0, "")


def test_items_too_short_to_tell_are_counted(items):
    assert items.names == ("zh", "en", "short")
    assert items.too_short == 1
    with pytest.raises(DataError, match="hold no item of 8 words"):
        gather([("a", "short")], 13, 8)


def test_the_stage_drops_the_documents_and_says_which_item(tmp_path):
    raw, evaluation = tmp_path / "raw.jsonl", tmp_path / "eval.jsonl"
    lines = [f"前言。{ZH}后记。", "与题目无关的一段文字，讲的是别的事情，和苹果没有关系。", EN]
    raw.write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    evaluation.write_text("".join(json.dumps({"text": t}) + "\n" for t in (ZH, EN)))
    config = ContaminationStage(
        sources=(SourceConfig(name="web", path=str(raw)),),
        against=(SourceConfig(name="test", path=str(evaluation)),),
        output=str(tmp_path / "out"),
    )
    manifest = contamination_stage(config)
    assert manifest["sources"]["web"]["documents"] == 1
    details = [sample["detail"] for sample in manifest["seen"]["web"]["samples"]]
    assert details == [f"100% of the n-grams of test/eval.jsonl:{n}" for n in (1, 2)]
    assert manifest["against"]["items"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"against": ()}, "against is empty"),
        ({"share": 0.0}, "share=0.0 must be above 0"),
        ({"min_words": 14}, "must be between 2 and ngram=13"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    source = (SourceConfig(name="a", path="x"),)
    with pytest.raises(ConfigError, match=message):
        ContaminationStage(**{"sources": source, "output": "o", "against": source, **settings})
