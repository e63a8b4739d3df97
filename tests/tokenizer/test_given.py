"""Lists of wanted pieces: what is wrong with one is told by its line."""

import pytest

from llm_jax.errors import DataError
from llm_jax.tokenizer.given import read_pieces


def test_one_piece_a_line_or_a_json_list(tmp_path):
    (tmp_path / "list.txt").write_bytes("\ufeff中国\r\n\n模型\n".encode())
    assert [piece for piece, _ in read_pieces(tmp_path / "list.txt")] == ["中国", "模型"]
    assert read_pieces(tmp_path / "list.txt")[1].where.endswith("list.txt:3")
    (tmp_path / "list.json").write_text('["中国", "模型"]', encoding="utf-8")
    assert [piece for piece, _ in read_pieces(tmp_path / "list.json")] == ["中国", "模型"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", b"ok\na\0b\n", r"l\.txt:2: piece 'a\\x00b' holds a NUL; remove it"),
        ("l.txt", "ok\n中国".encode("gb18030"), r"l\.txt:2: not valid UTF-8 at byte 0 .* convert"),
        ("l.txt", b"\xed\xa0\x80", r"l\.txt:1: not valid UTF-8"),
        ("l.txt", b"a\n \n", r"l\.txt:2: piece ' ' is blank"),
        ("l.txt", b"x" * 65, r"l\.txt:1: .* has 65 characters, more than 64"),
        ("l.txt", b"a\tb", r"l\.txt:1: piece 'a\\tb' holds a control character"),
        ("l.txt", b"", r"the file is empty"),
        ("l.txt", b"\n\n", r"holds no pieces"),
        ("l.json", b'["\\ud800"]', r"l\.json: entry 1: .* holds a lone surrogate"),
        ("l.json", b'["a", 3]', r"l\.json: entry 2: 3 is not a string"),
        ("l.json", b'{"a": 1}', r"must hold a JSON list of strings, not a dict"),
        ("l.json", b"[", r"l\.json:1: not valid JSON"),
    ],
)
def test_a_bad_list_is_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_pieces(tmp_path / name)
    assert "\n" not in str(caught.value)
