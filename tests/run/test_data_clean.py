"""`llm-jax data clean` from the command line: what it writes, what it reports, what it refuses."""

import json

import pytest

from llm_jax.data.sources import Rejects, SourceConfig, read_documents
from llm_jax.run import cli, data

GOOD = (
    "第{}天的早晨，我们沿着河边走了很久，看见许多水鸟在浅滩上找吃的，它们并不怕人，也不急着飞走。"
)
BAD = "首页 | 新闻 | 体育 | 财经 | 娱乐 | 科技 | 汽车 | 房产 | 教育 | 健康"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "raw.jsonl"
    texts = [GOOD.format(i) + "\u200b" * (i % 2) for i in range(40)] + [BAD, "<b>太短</b>"]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def run(capsys, *words):
    status = cli.run(data.main, list(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def read(folder):
    rejects = Rejects()
    return [d.text for d in read_documents(SourceConfig(name="x", path=str(folder)), rejects)]


def test_cleaned_sources_reports_and_manifest_are_written(capsys, tmp_path, text):
    output = tmp_path / "clean"
    status, out, _ = run(capsys, "clean", "--source", f"zh={text}", "--output", str(output))
    assert status == 0
    assert "too short" in out
    assert f"zh={output}/zh" in out.replace("\n", "")
    assert read(output / "zh") == [GOOD.format(i) for i in range(40)]
    report = json.loads((output / "report.json").read_text())["zh"]
    assert (report["documents"], report["kept"], report["kept_untouched"]) == (42, 40, 20)
    assert report["by_rule"]["normalise"]["changed"] == 20
    rejected = [s for s in report["samples"] if s["reason"]]
    assert {s["before"] for s in rejected} == {BAD, "太短"}
    page = (output / "report.html").read_text()
    assert "too short" in page
    assert BAD in page
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["inputs"]["zh"]["files"][0]["file"] == str(text)
    assert manifest["sources"]["zh"]["documents"] == 40


def test_workers_and_compression_change_no_document(capsys, tmp_path, text):
    made = []
    for name, words in (("a", []), ("b", ["--workers", "2", "--compression", "gz"])):
        words = ["--source", f"zh={text}", "--output", str(tmp_path / name), *words]
        assert run(capsys, "clean", *words)[0] == 0
        report = json.loads((tmp_path / name / "report.json").read_text())
        made.append((read(tmp_path / name / "zh"), report))
    assert made[0] == made[1]
    assert (tmp_path / "b" / "zh" / "part-00000.jsonl.gz").is_file()


def test_documents_cannot_smuggle_markup_into_the_report(capsys, tmp_path):
    path = tmp_path / "raw.jsonl"
    lines = [GOOD.format(1), "<x-y onload=alert(1)>"]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    output = tmp_path / "out"
    assert run(capsys, "clean", "--source", f"a={path}", "--output", str(output))[0] == 0
    page = (output / "report.html").read_text()
    assert "<x-y" not in page
    assert "&lt;x-y" in page


def test_a_config_file_and_flags_choose_the_rules(capsys, tmp_path, text):
    config, terms = tmp_path / "rules.json", tmp_path / "terms.tsv"
    config.write_text(json.dumps({"rules": ["normalise"], "normalise": {"control": False}}))
    terms.write_text("水鸟\t鸟\n", encoding="utf-8")
    output = tmp_path / "out"
    words = ["--config", str(config), "--terms", str(terms)]
    assert run(capsys, "clean", "--source", f"a={text}", "--output", str(output), *words)[0] == 0
    texts = read(output / "a")
    assert len(texts) == 42
    assert texts[1] == GOOD.format(1).replace("水鸟", "鸟") + "\u200b"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rules", "qualty"], "did you mean 'quality'"),
        (["--terms", "nowhere.txt"], "list 'nowhere.txt' cannot be read"),
        (["--max-drop-fraction", "0.01"], "the rules reject 2 of 42 documents, more than"),
        (["--max-drop-fraction", "2"], "max_drop_fraction=2.0 must be between 0 and 1"),
        (["--source", "zh=nowhere.jsonl"], "occurs twice"),
        (["--workers", "-1"], "workers=-1 must be 0 or more"),
        (["--text-field", "content"], "none is usable"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(capsys, tmp_path, text, words, message):
    output = tmp_path / "out"
    words = ["--source", f"zh={text}", "--output", str(output), *words]
    status, _, err = run(capsys, "clean", *words)
    assert status == 2
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.glob("out*"))


def test_when_nothing_is_left_the_worst_reason_is_named(capsys, tmp_path):
    path = tmp_path / "raw.jsonl"
    path.write_text(json.dumps({"text": BAD}) + "\n")
    output = str(tmp_path / "out")
    status, _, err = run(capsys, "clean", "--source", f"a={path}", "--output", output)
    assert status == 2
    assert "reject 1 of 1 documents, none is left" in err
    assert "raw.jsonl:1" in err
