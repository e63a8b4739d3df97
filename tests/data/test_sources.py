"""Reading documents: what is accepted, what is counted, what stops with one line."""

import gzip
import io
import json
import random

import pyarrow as pa
import pytest

from llm_jax.data.documents import Rejects
from llm_jax.data.sources import SourceConfig, parse_source_spec, read_documents
from llm_jax.data.text_files import GROUP_CHARACTERS, MAX_LINE_BYTES, WHOLE_FILE_BYTES, lines
from llm_jax.errors import ConfigError, DataError

GOOD = b'{"text": "good"}\n'


def read(path, **settings):
    """(documents, rejects) of a source."""
    rejects = Rejects()
    source = SourceConfig(name="s", path=str(path), **settings)
    return list(read_documents(source, rejects)), rejects


def compress(data, ending):
    return gzip.compress(data) if ending == "gz" else pa.compress(data, "zstd", asbytes=True)


def texts(path, **settings):
    return [document.text for document in read(path, **settings)[0]]


BAD_LINES = {
    "cut off": (b'{"text": "abc', "not valid JSON"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "not valid JSON"),
    "python literal": (b"{'text': 'a'}", "not valid JSON"),
    "bad UTF-8": (b'{"text": "\xff\xfe"}', "not valid UTF-8"),
    "latin-1": ('{"text": "caf\u00e9"}'.encode("latin-1"), "not valid UTF-8"),
    "utf-16": ('{"text": "a"}'.encode("utf-16"), "not valid UTF-8"),
    "NUL bytes": (b"\x00\x00\x00\x00", "not valid JSON"),
    "a list": (b'["text"]', "not a JSON object"),
    "a string": (b'"text"', "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "no field": (b'{"content": "a"}', "no field 'text'"),
    "a number": (b'{"text": 5}', "text is not a string"),
    "null text": (b'{"text": null}', "text is not a string"),
    "nested text": (b'{"text": {"text": "a"}}', "text is not a string"),
    "empty text": (b'{"text": ""}', "empty text"),
    "blank text": ('{"text": " \\n\\t\u3000"}'.encode(), "empty text"),
    "deep nesting": (b'{"text":' + b"[" * 200_000, "JSON nested too deep"),
    "huge number": (b'{"n": ' + b"9" * 5000 + b', "text": "a"}', "JSON number too long"),
    "raw control character": (b'{"text": "a\x01b"}', "not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_counted_under_its_reason_and_the_rest_is_read(tmp_path, name):
    line, reason = BAD_LINES[name]
    (tmp_path / "a.jsonl").write_bytes(GOOD + line + b"\n" + GOOD)
    documents, rejects = read(tmp_path / "a.jsonl")
    assert [d.id for d in documents] == ["a.jsonl:1", "a.jsonl:3"]
    assert rejects.counts == {reason: 1}
    assert rejects.samples[0].place == "a.jsonl:2"
    assert rejects.records == 3


GOOD_LINES = {
    "byte order mark": (b"\xef\xbb\xbf" + b'{"text": "a"}\n', "a"),
    "CRLF": (b'{"text": "a"}\r\n', "a"),
    "no newline at the end": (b'{"text": "a"}', "a"),
    "blank lines": (b'\n  \n{"text": "a"}\n\r\n', "a"),
    "U+2028 unescaped": ('{"text": "a\u2028b"}\n'.encode(), "a\u2028b"),
    "U+0085 and form feed": ('{"text": "a\u0085b\\f"}\n'.encode(), "a\u0085b\f"),
    "lone surrogate": (b'{"text": "a\\ud800b"}\n', "a?b"),
    "surrogate pair": (b'{"text": "\\ud83d\\ude00"}\n', "\U0001f600"),
    "more fields": (b'{"id": 1, "text": "a", "meta": {"x": [NaN]}}\n', "a"),
}


@pytest.mark.parametrize("name", GOOD_LINES)
def test_an_odd_but_legal_line_is_read_whole(tmp_path, name):
    line, text = GOOD_LINES[name]
    (tmp_path / "a.jsonl").write_bytes(line)
    documents, rejects = read(tmp_path / "a.jsonl")
    assert [d.text for d in documents] == [text]
    assert rejects.total == 0
    assert sum(rejects.repairs.values()) == ("lone" in name)


def test_an_overlong_line_is_skipped_in_constant_memory():
    stream = io.BytesIO(b"1234567890\n" + b"x" * 1000 + b"\nab\n" + b"y" * 11)
    assert list(lines(stream, limit=10)) == [(1, b"1234567890"), (2, None), (3, b"ab"), (4, None)]


def test_a_line_over_16_mb_is_rejected(tmp_path):
    long = json.dumps({"text": "x" * MAX_LINE_BYTES}).encode()
    (tmp_path / "a.jsonl").write_bytes(GOOD + long + b"\n" + GOOD)
    documents, rejects = read(tmp_path / "a.jsonl")
    assert len(documents) == 2
    assert rejects.counts == {"line longer than 16 MB": 1}


def test_compressed_files_read_as_the_plain_one(tmp_path):
    data = b"".join(json.dumps({"text": f"text {i}"}).encode() + b"\n" for i in range(1000))
    (tmp_path / "plain.jsonl").write_bytes(data)
    # two members and two frames, as `cat a b` and parallel compressors make
    for ending in ("gz", "zst"):
        parts = [compress(data[:5000], ending), compress(data[5000:], ending)]
        (tmp_path / f"a.jsonl.{ending}").write_bytes(b"".join(parts))
    plain = texts(tmp_path / "plain.jsonl")
    assert len(plain) == 1000
    assert texts(tmp_path / "a.jsonl.gz") == plain
    assert texts(tmp_path / "a.jsonl.zst") == plain


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["not compressed", "cut in half", "flipped"])
def test_a_damaged_compressed_file_is_one_line_with_its_name(tmp_path, ending, damage):
    numbers = random.Random(0)
    noise = b"".join(b'{"text": "%d"}\n' % numbers.randrange(10**12) for _ in range(5000))
    data = compress(noise, ending)
    if damage == "not compressed":
        data = GOOD
    elif damage == "cut in half":
        data = data[: len(data) // 2]
    else:
        data = data[:-20] + bytes([data[-20] ^ 255]) + data[-19:]
    path = tmp_path / f"bad.jsonl.{ending}"
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"bad\.jsonl\.{ending}: damaged"):
        read(path)


def test_a_folder_is_read_in_the_order_of_names_whatever_was_made_first(tmp_path):
    for name in ("b.txt", "sub/a.md", "a.txt", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}\n")
    documents, _ = read(tmp_path)
    assert [d.id for d in documents] == ["a.txt", "b.txt", "sub/a.md"]
    assert documents[0].text == "text of a.txt"


def test_globs_and_named_files_work(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.log").write_text("b")
    assert texts(tmp_path / "*.txt") == ["a"]
    assert texts(tmp_path / "b.log", format="text") == ["b"]


def test_lines_and_paragraphs_divide_a_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\n\r\n二\u2028二\nthree\n".encode())
    assert texts(path, document="file") == ["one\n\n二\u2028二\nthree"]
    assert texts(path, document="line") == ["one", "二\u2028二", "three"]


@pytest.mark.parametrize("between", ["\n\n", "\n"])
def test_paragraph_groups_are_of_bounded_size_and_lose_nothing(tmp_path, between):
    block = "word " * 199 + "end."
    text = between.join(f"{i} {block}" for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    assert len(text) > WHOLE_FILE_BYTES  # so "auto" divides it
    found = texts(tmp_path / "a.txt")
    assert len(found) > 3
    assert "\n".join(found).split() == text.split()
    assert all(GROUP_CHARACTERS <= len(t) < 2 * GROUP_CHARACTERS + 1100 for t in found[:-1])


def test_bad_utf8_in_a_text_file_names_the_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\xff bad\ngood\n")
    assert read(tmp_path / "a.txt")[1].samples[0].place == "a.txt:2"
    documents, rejects = read(tmp_path / "a.txt", document="line")
    assert [d.id for d in documents] == ["a.txt:1", "a.txt:3"]
    assert rejects.samples[0].place == "a.txt:2"


def test_the_chinese_sample_comes_in_passages():
    rejects = Rejects()
    documents = list(read_documents(parse_source_spec("sample:zh"), rejects))
    assert len(documents) > 20
    assert rejects.total == 0
    assert not any("\n---" in d.text for d in documents)
    assert sum("\u4e00" <= c <= "\u9fff" for d in documents for c in d.text) > 10_000


def test_max_bytes_stops_a_source(tmp_path):
    (tmp_path / "a.txt").write_text("12345\n" * 100)
    assert len(texts(tmp_path / "a.txt", document="line", max_bytes=12)) == 3


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ({}, {"path": "nowhere.txt"}, "does not exist"),
        ({}, {}, "is an empty folder"),
        ({"a.txt": "x", "b.jsonl": "{}"}, {}, "mixes jsonl, text files; set format"),
        ({"a.txt": "x"}, {"format": "parquet"}, r"no .parquet files"),
        ({"a.exe": "x"}, {}, "files end in .txt"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line(tmp_path, files, settings, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    path = tmp_path / settings.pop("path", "")
    with pytest.raises(DataError, match=message) as error:
        read(path, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "name", "kind", "path"),
    [
        ("news=a/b.jsonl", "news", "auto", "a/b.jsonl"),
        ("a/2024.jsonl.gz", "2024", "auto", "a/2024.jsonl.gz"),
        ("a/中文 文本/", "中文-文本", "auto", "a/中文 文本/"),
        ("package-docs", "package-docs", "package-docs", ""),
        ("en=package-docs:numpy,jax", "en", "package-docs", "numpy,jax"),
        ("sample:zh", "zh", "sample", "zh"),
        ("tfds:c4/en:train", "en", "tfds", "c4/en:train"),
        ("x=tfds:imdb:test", "x", "tfds", "imdb:test"),
    ],
)
def test_a_spec_says_name_format_and_path(spec, name, kind, path):
    source = parse_source_spec(spec)
    assert (source.name, source.format, source.path) == (name, kind, path)


@pytest.mark.parametrize("spec", ["=a.txt", "a/b=c", "tokenizer=a.txt", "", "../x=y", "name="])
def test_a_spec_that_cannot_name_a_folder_is_refused(spec):
    with pytest.raises(ConfigError):
        parse_source_spec(spec)


def test_more_rejects_than_allowed_stop_with_the_worst_reason_and_its_place(tmp_path):
    good = [GOOD] * 997
    (tmp_path / "a.jsonl").write_bytes(b"".join([*good, b"{\n", b"[]\n", b"{\n"]))
    _, rejects = read(tmp_path / "a.jsonl")
    with pytest.raises(
        DataError, match=r"3 of 1000 .* 'not valid JSON' \(2\), first at a.jsonl:998"
    ):
        rejects.check("s", 0.001)
    rejects.check("s", 0.003)


def test_a_source_without_one_usable_record_stops_whatever_is_allowed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"[]\n" * 5)
    _, rejects = read(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="none is usable"):
        rejects.check("s", 1.0)
    (tmp_path / "empty.txt").write_text("")
    _, rejects = read(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="'empty text'"):
        rejects.check("s", 1.0)
    (tmp_path / "empty.jsonl").write_text("")
    _, rejects = read(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="holds no records"):
        rejects.check("s", 1.0)
