"""Bad input to every stage that reads text: the data rows of the table of faults, and where each is tested.

bad line, UTF-8, BOM, CRLF, empty, no dict, no str   test_bad_inputs (BAD_RECORDS, HARMLESS), data/test_sources
lone surrogate, U+2028 inside a line                 test_bad_inputs (HARMLESS), data/test_sources
deep nesting, endless numbers, lines over 16 MB      test_bad_inputs (BAD_RECORDS), data/test_sources
torn or damaged gz, zst, Parquet, ArrayRecord        data/test_sources, data/test_record_files
special tokens spelled in text                       tokenizer/test_round_trip
full disk, quota, killed while writing               data/test_prepare
truncated, missing, flipped token shard              data/test_prepare, test_bad_inputs, test_data_verify
wrong tokenizer                                      test_bad_inputs
more rejected than allowed, in every stage           here
"""

import json

import pytest

from llm_jax.run import cli, data

GOOD = "清晨的湖面上有一层薄雾，几条小船停在岸边，等着第一批客人，船夫坐在船头，第{}次看着远处。"
JUNK = "首页 | 新闻 | 体育 | 财经 | 娱乐 | 科技 | 汽车 | 房产 | 教育 | 健康 | 旅游 | 军事 {}"


def lines(text: str, count: int) -> list[str]:
    return [json.dumps({"text": text.format(n * n)}, ensure_ascii=False) for n in range(count)]


@pytest.fixture
def raw(tmp_path):
    """Three files of good records; `b` has ten bad ones, `c` two, `a` none."""
    (tmp_path / "raw").mkdir()
    bad = {"a": [], "b": ["{"] * 6 + ['{"text": 3}'] * 4, "c": ['{"txt": "x"}'] * 2}
    for name, broken in bad.items():
        content = [*lines(name + GOOD, 20), *broken]
        (tmp_path / f"raw/{name}.jsonl").write_text("\n".join(content), encoding="utf-8")
    return tmp_path / "raw"


@pytest.fixture
def run(capsys, tmp_path, tiny_tokenizer):
    def run_(stage: str, *words: str) -> tuple[int, str]:
        more = {
            "decontaminate": ["--against", "test=sample:zh"],
            "prepare": ["--tokenizer", str(tiny_tokenizer)],
        }
        capsys.readouterr()
        words = (stage, "--output", str(tmp_path / "out"), *more.get(stage, []), *words)
        return cli.run(data.main, list(words)), capsys.readouterr().err

    return run_


@pytest.mark.parametrize("stage", ["clean", "language", "dedup", "decontaminate", "prepare"])
def test_every_stage_stops_at_too_many_bad_records_and_names_the_worst(run, raw, tmp_path, stage):
    status, error = run(stage, "--source", f"web={raw}")
    assert status == 2
    assert error == (
        "error: source 'web': 12 of 72 records rejected, more than max_reject_fraction=0.001 allows; "
        "mend them or raise it. Most often 'not valid JSON' (6), first at b.jsonl:21; "
        "most of them in b.jsonl (10), c.jsonl (2)\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize("stage", ["clean", "language", "dedup", "decontaminate", "prepare"])
def test_every_stage_counts_and_samples_bad_records_that_are_allowed(run, raw, tmp_path, stage):
    assert run(stage, "--source", f"web={raw}", "--max-reject-fraction", "0.2") == (0, "")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text("utf-8"))
    entry = manifest["seen"]["web"] if "seen" in manifest else manifest["sources"]["web"]
    assert entry["rejects"] == {
        "records": 72,
        "rejected": {"not valid JSON": 6, "text is not a string": 4, "no field 'text'": 2},
        "repaired": {},
    }
    samples = (tmp_path / "out/rejects.jsonl").read_text("utf-8").splitlines()
    places = [json.loads(sample)["place"] for sample in samples]
    assert places == [f"b.jsonl:{n}" for n in range(21, 31)] + ["c.jsonl:21", "c.jsonl:22"]


def test_rules_that_reject_too_much_name_the_worst_rules_and_files(run, tmp_path):
    (tmp_path / "raw").mkdir()
    for name, junk in (("a", 1), ("b", 0), ("c", 9)):
        content = [*lines(name + GOOD, 20), *lines(JUNK, junk)]
        (tmp_path / f"raw/{name}.jsonl").write_text("\n".join(content), encoding="utf-8")
    words = ("--source", f"web={tmp_path}/raw", "--max-drop-fraction", "0.1")
    status, error = run("clean", *words)
    assert status == 2
    assert "the rules reject 10 of 70 documents, more than max_drop_fraction=0.1 allows" in error
    assert error.endswith("most of them in c.jsonl (9), a.jsonl (1)\n")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
