"""`data language`, `data dedup` and `data decontaminate` from the command line."""

import json
from importlib.util import find_spec

import pytest

from llm_jax.run import cli, data

ZH = "清晨的湖面上有一层薄雾，几条小船停在岸边，等着第一批客人，船夫坐在船头慢慢地抽着烟。"
EN = "There was a thin mist on the lake, and a few boats were waiting for the first guests."


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in (ZH, EN, ZH)))
    return str(path)


def run(capsys, *words):
    status = cli.run(data.main, list(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    ("words", "told", "folder"),
    [
        (["dedup"], "no near", "web"),
        (["language", "--keep", "zh"], "dropped", "web.zh"),
        (["language", "--reference", "zh=sample:zh"], "held-out reference zh", "web.en"),
        (["decontaminate", "--against"], "1 items looked for, 0 too short", "web"),
    ],
)
def test_each_command_writes_sources_for_the_next(capsys, tmp_path, raw, words, told, folder):
    against = tmp_path / "eval.jsonl"
    if words[-1] == "--against":
        against.write_text(json.dumps({"text": ZH}) + "\n")
        words = [*words, f"test={against}"]
    output = tmp_path / "out"
    status, out, err = run(capsys, *words, "--source", f"web={raw}", "--output", str(output))
    assert (status, err) == (0, "")
    assert told.replace("no near", "near repeats") in out
    assert (output / folder / "part-00000.jsonl.zst").is_file()
    status, out, _ = run(capsys, "verify", str(output))
    assert status == 0
    assert ("reference zh: " in out) == ("--reference" in words)
    if against.is_file():
        against.write_text(json.dumps({"text": ZH[::-1]}) + "\n")
        status, _, err = run(capsys, "verify", str(output))
        assert status == 2
        assert f"against test: {against}: content differs" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dedup", "--threshold", "0.1"], "threshold=0.1 must be between 0.3 and 1"),
        (["dedup", "--treshold", "0.1"], "did you mean '--threshold'"),
        (["language", "--keep", "fr"], "no document of any source is kept"),
        (["language", "--reference", "zh=nowhere.txt"], "'nowhere.txt' does not exist"),
        pytest.param(
            *(["language", "--second-opinion"], "lingua; pip install 'llm-jax[lid]'"),
            marks=pytest.mark.skipif(find_spec("lingua") is not None, reason="lingua is there"),
        ),
        (["decontaminate"], "--against"),
        (["decontaminate", "--against", "t=nowhere.txt"], "'nowhere.txt' does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(capsys, tmp_path, raw, words, message):
    output = tmp_path / "out"
    status, _, err = run(capsys, *words, "--source", f"web={raw}", "--output", str(output))
    assert status == 2
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.glob("out*"))
