"""Language by script, and the score against a reference."""

import gzip
import json
import math
import pickle
import random
from pathlib import Path

import pytest

from llm_jax.data.documents import Document, Rejects
from llm_jax.data.language import identify
from llm_jax.data.language_stage import (
    LanguageStage,
    language_judge,
    language_stage,
    with_opinion,
)
from llm_jax.data.ngram_score import train
from llm_jax.data.second_opinion import differ
from llm_jax.data.sift import Seen
from llm_jax.data.sources import SourceConfig, read_documents
from llm_jax.errors import ConfigError, DataError

CORPUS = Path(__file__).parents[2].parent / "shared" / "corpus"
ZH = "清晨的湖面上有一层薄雾，几条小船停在岸边，等着第一批客人。"
EN = "There was a thin mist on the lake, and a few boats were waiting for the first guests of the day."


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (ZH, "zh"),
        (EN, "en"),
        ("用 `pip install numpy` 安装，再运行 python -m main.py 就可以了。", "zh"),
        (
            "The word 你好 is how one says hello in Chinese, and it is the first that is learned.",
            "en",
        ),
        ("湖の上には薄い霧がかかっていて、小さな船が岸で待っていました。", "ja"),
        ("호수 위에는 옅은 안개가 끼어 있었다.", "ko"),
        ("Над озером стоял лёгкий туман.", "ru"),
        ("Über dem See lag dünner Nebel, einige Boote warteten.", "latin"),
        ("على البحيرة ضباب خفيف", "und"),
        ("12345 !!!", "und"),
        ("", "und"),
        ("店名叫做“味の素”，開在街角，已經三十年了。", "zh"),
    ],
)
def test_scripts_tell_the_language(text, language):
    assert identify(text).language == language


def is_plainly(language: str, paragraph: str) -> bool:
    """As the corpus' own account of usable text has it, by counting and not by what is tested."""
    visible = [c for c in paragraph if not c.isspace()]
    han = sum("\u4e00" <= c <= "\u9fff" for c in visible)
    if language == "zh":
        return han >= 8 and han >= 0.3 * len(visible)
    letters = sum(c.isalpha() for c in visible)
    return han == 0 and len(paragraph.split()) >= 8 and letters >= 0.65 * len(visible)


@pytest.mark.skipif(not CORPUS.is_dir(), reason="needs ../shared/corpus")
@pytest.mark.parametrize("name", ["zh-d2l", "zh-oi-wiki", "zh-tidb-docs", "en-python-docs"])
def test_paragraphs_of_the_corpus_are_told(name):
    with gzip.open(CORPUS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        paragraphs = [p for line in lines for p in json.loads(line)["text"].split("\n\n")]
    plain = [p for p in paragraphs[::5] if is_plainly(name[:2], p)]
    # code between English paragraphs is Latin without being English; the split is between scripts
    right = {"zh": {"zh"}, "en": {"en", "latin"}}[name[:2]]
    wrong = [p for p in plain if identify(p).language not in right]
    assert len(plain) > 500
    assert len(wrong) <= 0.001 * len(plain), wrong[:5]


@pytest.mark.skipif(not CORPUS.is_dir(), reason="needs ../shared/corpus")
@pytest.mark.parametrize("name", ["en-python-docs", "en-postgresql-docs"])
def test_english_documents_are_told_from_others_in_latin_script(name):
    with gzip.open(CORPUS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        verdicts = [identify(json.loads(line)["text"]).language for line in lines]
    assert verdicts.count("en") >= 0.995 * len(verdicts)


def reference_texts() -> list[str]:
    source = SourceConfig(name="zh", format="sample", path="zh")
    return [document.text for document in read_documents(source, Rejects())]


@pytest.fixture(scope="module")
def model():
    return train(reference_texts())


def test_text_like_the_reference_scores_below_everything_else(model):
    text = reference_texts()[9]  # held out
    shuffled = "".join(random.Random(0).sample(text, len(text)))
    words = "二手车 手机壳 充电器 搬家公司 离婚律师 免费小说 发票 彩票 娱乐城 贷款 " * 4
    assert model.bits(text) < model.bits(shuffled)
    assert model.bits(text) < model.bits(words)
    assert model.bits(text) < model.bits(EN)
    assert model.quantiles["50"] <= model.quantiles["90"] <= model.quantiles["99"]


def test_the_score_is_that_of_the_definition():
    from llm_jax.data import ngram_score

    model = train(["abab " * 3000] * 10)
    n = model.characters
    unseen, prior, size = ngram_score.UNSEEN, ngram_score.PRIOR, ngram_score.ALPHABET
    count = 9 * 6000  # of "a"; "ab" and "abab"'s other grams follow from the text
    one = (count + unseen) / (n + unseen * size)
    two = (9 + prior * one) / (0 + prior)  # "a" starts each of nine texts, after no character
    three = (9 + prior * two) / (0 + prior)
    assert model.bits("a") == pytest.approx(-math.log2(three), rel=1e-3)


def test_a_model_survives_being_sent_to_a_worker(model):
    assert pickle.loads(pickle.dumps(model)).bits(ZH) == model.bits(ZH)
    assert model.bits(" \n") == 0.0


def test_a_reference_without_enough_text_is_refused():
    with pytest.raises(ConfigError, match="the reference holds 0 characters"):
        train([])


def stage(tmp_path, name="out", **settings):
    raw = tmp_path / "raw.jsonl"
    texts = [ZH, EN, "Над озером стоял лёгкий туман.", "彩票 发票 贷款 办证 刻章 加盟 招商 批发"]
    raw.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    sources = (SourceConfig(name="web", path=str(raw)),)
    return language_stage(LanguageStage(sources=sources, output=str(tmp_path / name), **settings))


def test_sources_are_split_by_language_and_the_rest_is_counted(tmp_path):
    manifest = stage(tmp_path, keep=("zh", "en"))
    assert {n: e["documents"] for n, e in manifest["sources"].items()} == {"web.zh": 2, "web.en": 1}
    assert manifest["seen"]["web"]["dropped"] == {"ru": 1}
    assert manifest["seen"]["web"]["samples"][0]["detail"] == "Cyrillic 100%"
    source = SourceConfig(name="en", path=str(tmp_path / "out" / "web.en"))
    assert [d.text for d in read_documents(source, Rejects())] == [EN]


def test_what_is_unlike_the_reference_is_dropped_with_any_number_of_workers(tmp_path, model):
    reference = (SourceConfig(name="zh", format="sample", path="zh"),)
    limit = (model.bits(ZH) + model.bits("彩票 发票 贷款 办证 刻章 加盟 招商 批发")) / 2
    made = [
        stage(tmp_path, name=f"w{workers}", references=reference, max_bits=limit, workers=workers)
        for workers in (0, 2)
    ]
    assert made[0]["seen"]["web"]["dropped"] == {"zh, unlike the reference": 1}
    assert made[0]["digest"] == made[1]["digest"]
    assert made[0]["references"]["zh"]["bits"] == model.quantiles


def test_a_second_opinion_decides_nothing_and_is_counted_with_samples():
    says = {
        ZH: "zh",
        EN: "fr",
        "彩票 发票 贷款": "",
        "Guten Morgen, liebe Sorgen": "de",
        "1234": "ko",
    }
    judge = with_opinion(language_judge(("zh", "en"), {}, 0.0), says.__getitem__)
    seen = Seen()
    for number, text in enumerate(says):
        judgement = judge(text)
        assert judgement.keep == (identify(text).language in ("zh", "en"))
        assert ("second_opinion", "fr") in judgement.fields or text != EN
        seen.add(Document(text, "a", f"f:{number}"), judgement)
    assert seen.report()["remarks"] == {"en, lingua says fr": 1}
    assert [s["id"] for s in seen.samples if "lingua" in s["reason"]] == ["f:1"]
    assert differ("latin", "en")
    assert not differ("latin", "fr")


@pytest.mark.oracle
@pytest.mark.skipif(not CORPUS.is_dir(), reason="needs ../shared/corpus")
def test_lingua_agrees_on_plain_paragraphs(tmp_path):
    pytest.importorskip("lingua")
    for name in ("zh-d2l", "en-python-docs"):
        with gzip.open(CORPUS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            paragraphs = [p for line in lines for p in json.loads(line)["text"].split("\n\n")]
        plain = [p for p in paragraphs if len(p) > 200 and is_plainly(name[:2], p)][:500]
        raw = tmp_path / f"{name}.jsonl"
        raw.write_text("".join(json.dumps({"text": p}) + "\n" for p in plain))
        source = SourceConfig(name="a", path=str(raw))
        made = [
            language_stage(
                LanguageStage(
                    sources=(source,),
                    output=str(tmp_path / f"{name}-{workers}"),
                    second_opinion=True,
                    workers=workers,
                )
            )
            for workers in (0, 2)
        ]
        assert made[0]["digest"] == made[1]["digest"]
        assert sum(made[0]["seen"]["a"].get("remarks", {}).values()) <= 0.01 * len(plain)


def test_a_limit_without_a_reference_and_nothing_kept_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs a reference"):
        stage(tmp_path, max_bits=3.0)
    with pytest.raises(DataError, match="no document of any source is kept"):
        stage(tmp_path, keep=("fr",))
    assert not (tmp_path / "out").exists()
