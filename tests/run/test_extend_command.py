"""`llm-jax tokenizer extend`, `audit` and `compare`, from text files to folders and lines."""

import json

import pytest

from llm_jax import tokenizer
from llm_jax.run import cli
from llm_jax.run import tokenizer as command
from llm_jax.tokenizer import files as tokenizer_files
from tests.tokenizer.tiny_bases import BASES, ENGLISH, prose


def run(*words) -> int:
    return cli.run(command.main, [str(word) for word in words])


def jsonl(path, texts):
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def place(tmp_path):
    """A folder with two bases and text of both languages."""
    for name in ("byte-level", "bpe", "unigram"):
        tokenizer_files.write(tmp_path / name, BASES[name]())
    jsonl(tmp_path / "zh.jsonl", prose(0))
    jsonl(tmp_path / "en.jsonl", [*ENGLISH, "He said 你好 twice.\nAnd left."])
    return tmp_path


def errors(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("name", ["byte-level", "bpe", "unigram"])
def test_extend_writes_the_bases_own_files_and_an_account(name, place, capsys):
    out = place / "out"
    words = ("--input", f"zh={place / 'zh.jsonl'}", "--keep", f"en={place / 'en.jsonl'}")
    assert run("extend", place / name, *words, "--add-pieces", 120, "--output", out) == 0
    printed = capsys.readouterr().out
    base, new = tokenizer.load(place / name), tokenizer.load(out)
    assert new.vocab_size == base.vocab_size + 120
    record = json.loads((out / "extension.json").read_text(encoding="utf-8"))
    assert (record["new"], record["unreachable"]) == (120, [])
    assert record["padded_size"] % 128 == 0
    assert 0 <= record["padded_size"] - record["size"] < 128
    assert [piece["id"] for piece in record["pieces"]] == list(
        range(base.vocab_size, new.vocab_size)
    )
    assert record["fingerprint"] == new.fingerprint
    # the one line that holds Chinese is counted, and listed with both spellings
    rows = [json.loads(line) for line in (out / "differences.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == ["He said 你好 twice."]
    assert rows[0]["base"] == base.encode(rows[0]["line"])
    assert rows[0]["extended"] == new.encode(rows[0]["line"])
    total = sum(text.count("\n") + 1 for text in [*ENGLISH, "a\nb"])
    assert f"kept text     {total - 1:,} of {total:,} lines" in printed
    assert "unreachable   0 of the new pieces" in printed
    assert not (place / "out.partial").exists()


def test_extend_takes_a_list_and_common_characters(place, capsys):
    (place / "words.txt").write_text("机器学习\n模型\n", encoding="utf-8")
    words = ("--pieces", place / "words.txt", "--common-characters", "gb2312-1")
    assert run("extend", place / "bpe", *words, "--output", place / "out") == 0
    new = tokenizer.load(place / "out")
    assert [len(new.encode(text)) for text in ("机器学习", "模型", "啊")] == [1, 1, 1]
    assert "not compared; give --keep" in capsys.readouterr().out


def test_an_extension_is_replaced_only_when_asked_and_only_one_of_ours(place, capsys):
    words = ("extend", place / "bpe", "--common-characters", "gb2312-1", "--output")
    assert run(*words, place / "out") == 0
    assert run(*words, place / "out") == 2
    assert "choose another folder, or add --overwrite" in errors(capsys)[0]
    assert run(*words, place / "out", "--overwrite") == 0
    assert run(*words, place / "unigram", "--overwrite") == 2  # a tokenizer that was not made here


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pieces", "twice.txt"], "twice.txt:2: piece '中国' is given twice, first at"),
        (["--pieces", "known.txt"], "known.txt:1: piece 'a' is in the base already"),
        (["--pieces", "nul.txt"], "nul.txt:1: piece 'a\\x00' holds a NUL; remove it"),
        (["--pieces", "surrogate.json"], "surrogate.json: entry 1: piece '\\ud800' holds a lone"),
        (["--pieces", "gbk.txt"], "gbk.txt:1: not valid UTF-8"),
        (["--pieces", "absent.txt"], "absent.txt: cannot be read"),
        (["--input", "gbk.txt", "--add-pieces", "5"], "'not valid UTF-8'"),
        (["--input", "empty.txt", "--add-pieces", "5"], "source 'empty'"),
        (
            ["--input", "english.txt", "--add-pieces", "5"],
            "no line holds a character of the script",
        ),
        (["--input", "zh.jsonl"], "say how many pieces with --add-pieces"),
        (["--add-pieces", "5"], "give --input, or leave --add-pieces out"),
        (["--input", "zh.jsonl", "--add-pieces", "99999"], "more than this text can fill"),
        (["--common-characters", "gb2313"], "common_characters"),
        (["--script", "hann"], "did you mean 'han'"),
        (["--add-peaces", "5"], "did you mean '--add-pieces'?"),
        ([], "nothing to add"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(words, message, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    (place / "twice.txt").write_text("中国\n中国\n", encoding="utf-8")
    (place / "known.txt").write_text("a\n")
    (place / "nul.txt").write_bytes(b"a\0\n")
    (place / "surrogate.json").write_text('["\\ud800"]')
    (place / "gbk.txt").write_bytes("中国人民\n".encode("gb18030"))
    (place / "empty.txt").write_text("")
    (place / "english.txt").write_text("only English")
    before = sorted(place.iterdir())
    assert run("extend", "byte-level", *words, "--output", "out") == 2
    found = errors(capsys)
    assert len(found) == 1
    assert message in found[0]
    assert sorted(place.iterdir()) == before


def test_a_wordpiece_base_is_not_extendable(place, capsys):
    words = ("--kind", "wordpiece", "--vocab-size", 88, "--character-coverage", 1.0)
    assert run("train", "--input", place / "zh.jsonl", "--output", place / "wp", *words) == 0
    capsys.readouterr()
    common = ("--common-characters", "gb2312-1", "--output", place / "out")
    assert run("extend", place / "wp", *common) == 2
    assert "cannot be extended: its model is WordPiece" in errors(capsys)[0]
    assert not (place / "out").exists()


def test_audit_shows_gain_round_trip_and_what_a_model_makes_of_it(place, capsys):
    source = f"zh={place / 'zh.jsonl'}"
    base, out = place / "byte-level", place / "out"
    assert run("extend", base, "--input", source, "--add-pieces", 100, "--output", out) == 0
    capsys.readouterr()
    sizes = {
        "embed_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 16, "mlp_dim": 128, "max_seq_len": 1000, "tied_embeddings": True,
    }  # fmt: skip
    words = ("--input", source, f"en={place / 'en.jsonl'}", "--model", json.dumps(sizes))
    assert run("audit", out, "--base", base, *words) == 0
    printed = capsys.readouterr().out
    texts = prose(0)
    characters = sum(map(len, texts))
    old, new = (
        characters / sum(len(t.encode(x)) for x in texts) for t in map(tokenizer.load, (base, out))
    )
    row = next(line.split() for line in printed.splitlines() if line.startswith("  zh"))
    assert row[:5] == ["zh", f"{characters:,}", f"{old:.3f}", f"{new:.3f}", f"{new / old:.2f}x"]
    assert f"{len(texts)} of {len(texts)} exact" in printed
    assert ", 0 of the new ones" in printed
    assert "old ids       0 of 404 stand for another text than before" in printed
    # 2 layers x 2 heads x 16 x 4 bytes x 2 (keys and values) = 512 bytes a token
    assert f"{512 * 1000 / old / 1e6:.2f} -> {512 * 1000 / new / 1e6:.2f}" in printed
    assert f"{1000 * old:,.0f} -> {1000 * new:,.0f}" in printed
    assert run("audit", place / "bpe", "--base", out, *words) == 2
    assert run("audit", out, *words[:2]) == 0


def test_compare_prints_what_each_kind_does_to_chinese(place, capsys):
    kinds = {"wp": "wordpiece", "bb": "byte-bpe"}
    for name, kind in kinds.items():
        sizes = ("--vocab-size", 420 if kind == "byte-bpe" else 88)
        words = ("--input", place / "zh.jsonl", "--kind", kind, *sizes)
        assert run("train", *words, "--output", place / name) == 0
    capsys.readouterr()
    assert (
        run("compare", place / "wp", place / "bb", place / "bpe", "--input", place / "zh.jsonl")
        == 0
    )
    printed = capsys.readouterr().out
    chinese = printed.split("what each does to Chinese")[1]
    wordpiece = next(line.split() for line in chinese.splitlines() if line.startswith("  wp"))
    assert wordpiece[2:] == ["0", "1.000", "none"]  # no piece of two characters, one a token
    byte_bpe = next(line.split() for line in chinese.splitlines() if line.startswith("  bb"))
    assert int(byte_bpe[2]) > 0
    for heading in ("characters per token", "come back exactly", "encoding speed", "by script"):
        assert heading in printed
