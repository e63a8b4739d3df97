"""Near-duplicates: the signature estimates Jaccard similarity, and planted repeats are found."""

import json
import random

import numpy as np
import pytest

from llm_jax.data.dedup.index import EXACT, NEAR, UNIQUE, Index, Sketch
from llm_jax.data.dedup.minhash import PLACES, band_keys, choose_rows, signature
from llm_jax.data.dedup.shingles import fold, grams
from llm_jax.data.dedup.stage import DedupStage, dedup_stage, repeats, sketch
from llm_jax.data.lineage import verify
from llm_jax.data.sources import Rejects, SourceConfig, read_documents
from llm_jax.errors import ConfigError, DataError
from tests.data.dedup import planted

ENGLISH = """river stone bridge winter keeper lantern garden question silver window teacher memory ship
harbour letter answer mountain weather bread paper music engine valley market forest doctor island cotton"""
CHINESE = (
    "山水风云花鸟鱼虫日月星辰春夏秋冬东西南北天地人家国城门路桥船车马牛羊书笔纸墨琴棋诗画茶酒饭菜"
)
WORDS = {"en": ENGLISH.split(), "zh": list(CHINESE)}


def document(language: str, seed: int, count: int = 40) -> str:
    """Sentences of random words; two seeds have next to nothing in common."""
    rng = random.Random(seed)
    joint, stop = ("", "。") if language == "zh" else (" ", ". ")
    return "".join(
        joint.join(rng.choices(WORDS[language], k=rng.randint(7, 14))) + stop for _ in range(count)
    )


def jaccard(a: str, b: str) -> float:
    one, other = (set(grams(fold(text), 5).tolist()) for text in (a, b))
    return len(one & other) / len(one | other)


def test_only_letters_and_digits_count_whatever_their_case_and_width():
    assert fold("Ｈｅｌｌｏ， World 12!\n").tolist() == fold("hello world１２").tolist()
    assert "".join(map(chr, fold("你好，世界。É"))) == "你好世界é"
    assert fold("，。!? \n").size == 0
    assert fold("𠀀𠀁").tolist() == [0x20000, 0x20001]


def test_grams_are_those_of_every_place():
    values = np.array([5, 6, 7, 5, 6, 7], dtype=np.uint32)
    hashes = grams(values, 3)
    assert len(hashes) == 4
    assert hashes[0] == hashes[3]
    assert len(set(hashes.tolist())) == 3
    assert len(grams(values[:2], 3)) == 1


@pytest.mark.parametrize("size", [1, 3, 12, 40, 200])
def test_agreement_estimates_jaccard_similarity_at_every_length(size):
    errors = []
    for seed in range(60):
        a = document("en", seed, size)
        cut = int(len(a) * random.Random(seed).uniform(0.3, 1))
        b = a[:cut] + document("en", seed + 1000, 1)
        estimate = (signature(a, 5) == signature(b, 5)).mean()
        errors.append(estimate - jaccard(a, b))
    # the mean of 60 estimates with a standard error of 0.044 each
    assert abs(np.mean(errors)) < 3 * 0.044 / np.sqrt(60)
    assert np.std(errors) < 0.06


def test_rows_are_the_most_that_keep_the_recall():
    for threshold in (0.5, 0.7, 0.9):
        rows = choose_rows(threshold)
        found = [1 - (1 - threshold**r) ** (PLACES // r) for r in (rows, rows + 1)]
        assert found[0] >= 0.98 > found[1]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_planted_near_duplicates_are_found_and_nothing_else(tmp_path, language):
    originals = [document(language, seed) for seed in range(60)]
    rng = random.Random(1)
    copies = [planted.repost(text, language, rng) for text in originals]
    check(tmp_path, originals, copies)


@pytest.mark.skipif(not planted.CORPUS.is_dir(), reason="needs ../shared/corpus")
@pytest.mark.parametrize(("language", "characters"), [("zh", 900), ("en", 2200)])
def test_planted_near_duplicates_of_real_text_are_found(tmp_path, language, characters):
    originals = planted.corpus_documents(language, 300, characters)
    rng = random.Random(2)
    copies = [planted.repost(text, language, rng) for text in originals]
    check(tmp_path, originals, copies)


def check(folder, originals: list[str], copies: list[str]) -> None:
    """At least 95 % of the copies join their original, and no document joins another's cluster."""
    verdicts = repeats(originals + copies, folder)
    count = len(originals)
    # documents that are near each other already, as pages of one manual are, are judged by the truth
    truth = verdicts.first[:count]
    for later in np.flatnonzero(truth != np.arange(count)):
        assert jaccard(originals[later], originals[truth[later]]) > 0.6
    found = verdicts.first[count:] == truth
    assert found.mean() >= 0.95
    assert np.all(found | (verdicts.kind[count:] == UNIQUE))


def test_equal_texts_are_exact_repeats_of_the_first(tmp_path):
    texts = [document("en", 1), document("en", 2), document("en", 1), document("en", 1)]
    verdicts = repeats(texts, tmp_path)
    assert verdicts.first.tolist() == [0, 1, 0, 0]
    assert verdicts.kind.tolist() == [UNIQUE, UNIQUE, EXACT, EXACT]


def test_short_texts_are_never_near(tmp_path):
    verdicts = repeats(["答案是三", "答案是二", "答案是 三", "!!!", "..."], tmp_path)
    assert verdicts.first.tolist() == [0, 1, 2, 3, 4]


def test_sorting_in_parts_gives_the_same_clusters(tmp_path):
    texts = [document("en", seed % 30) + document("en", 99, 1 + seed // 30) for seed in range(90)]
    results = []
    for memory in (1 << 30, 900):  # 90 documents want 13,500 bytes: fifteen parts
        folder = tmp_path / str(memory)
        folder.mkdir()
        index = Index(folder, 5, 0.7, memory)
        index.add(Sketch.of(*sketch(5, False, texts), 5))
        results.append(index.verdicts())
    assert np.array_equal(results[0].first, results[1].first)
    assert np.array_equal(results[0].kind, results[1].kind)
    assert np.count_nonzero(results[0].kind == NEAR) == 60


def test_keys_differ_between_bands_and_agree_between_equals():
    signatures = np.stack([signature(document("en", s), 5) for s in (1, 1, 2)])
    keys = band_keys(signatures, 5)
    assert keys.shape == (3, 25)
    assert np.array_equal(keys[0], keys[1])
    assert not np.any(keys[0] == keys[2])
    assert len(set(band_keys(np.zeros((1, PLACES), np.uint32), 5)[0].tolist())) == 25


def stage(tmp_path, workers=0, name="out", **settings):
    first = write(tmp_path / "a.jsonl", [document("en", s) for s in (1, 2, 1)])
    second = write(tmp_path / "b.jsonl", [document("en", 2) + "One more line.", document("zh", 5)])
    sources = (SourceConfig(name="a", path=first), SourceConfig(name="b", path=second))
    output = str(tmp_path / name)
    return dedup_stage(DedupStage(sources=sources, output=output, workers=workers, **settings))


def write(path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


def read(folder) -> list[str]:
    source = SourceConfig(name="x", path=str(folder))
    return [document.text for document in read_documents(source, Rejects())]


def test_the_stage_keeps_the_first_over_all_sources(tmp_path):
    manifest = stage(tmp_path)
    assert manifest["sources"]["a"]["repeats"] == {"documents": 3, "exact": 1, "near": 0}
    assert manifest["sources"]["b"]["repeats"] == {"documents": 2, "exact": 0, "near": 1}
    assert read(tmp_path / "out" / "a") == [document("en", 1), document("en", 2)]
    assert read(tmp_path / "out" / "b") == [document("zh", 5)]
    sample = json.loads((tmp_path / "out" / "report.json").read_text())["samples"][0]
    assert (sample["dropped"], sample["kept"]) == ("b/b.jsonl:1", "a/a.jsonl:2")
    assert sample["similarity"] > 0.9
    assert not (tmp_path / "out" / "scratch").exists()
    assert all(not finding.problem for finding in verify(str(tmp_path / "out")))


def test_workers_change_nothing_and_exact_only_keeps_the_near_ones(tmp_path):
    assert stage(tmp_path)["digest"] == stage(tmp_path, workers=2, name="two")["digest"]
    exact = stage(tmp_path, name="exact", exact_only=True)
    assert exact["sources"]["b"]["documents"] == 2
    assert exact["sources"]["a"]["documents"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.2}, "threshold=0.2 must be between 0.3 and 1"),
        ({"shingle": 1}, "shingle=1 must be between 2 and 50"),
        ({"memory_mb": 0}, "memory_mb=0 must be at least 1"),
        ({"sources": ()}, "sources is empty"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, message):
    settings = {"sources": (SourceConfig(name="a", path="x"),), "output": "y", **settings}
    with pytest.raises(ConfigError, match=message):
        DedupStage(**settings)


def test_an_unusable_source_leaves_nothing(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    source = SourceConfig(name="a", path=str(tmp_path / "bad.jsonl"))
    with pytest.raises(DataError, match="none is usable"):
        dedup_stage(DedupStage(sources=(source,), output=str(tmp_path / "out")))
    assert not list(tmp_path.glob("out*"))
