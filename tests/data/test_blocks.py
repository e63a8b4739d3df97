"""Blocks: what workers read is what one process would have read, and is counted as it would have been."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data.blocks import blocks, documents_of
from llm_jax.data.clean.report import RuleCounts
from llm_jax.data.clean.rules import CleanConfig
from llm_jax.data.clean.stage import block_cleaner
from llm_jax.data.dedup.held import Held, pack, write_part
from llm_jax.data.document_files import Lines
from llm_jax.data.documents import Document, Rejects
from llm_jax.data.language_stage import language_judge
from llm_jax.data.sift import Seen, block_judge
from llm_jax.data.sources import SourceConfig, read_documents
from llm_jax.data.text_files import line_blocks, lines

GOOD = (
    "The keeper of the lighthouse wrote a letter, and in the morning the ship took it to the town. "
    "Nobody there had heard of him for years. They read it aloud in the market, and some of them "
    "wept, because he asked after people who were long dead. His brother, who sold fish at the "
    "harbour, said nothing at all; but on the next day he rowed out with bread and a warm coat. "
)
ROWS = [
    b"\xef\xbb\xbf" + json.dumps({"text": GOOD}).encode(),
    json.dumps({"text": "灯塔看守人写了一封信，早上船把它带到镇上去了。" * 6}).encode() + b"\r",
    b"",
    b'{"text": 3}',
    b'{"text": "\xff"}',
    b'{"text": "\\ud800 lone"}',
    json.dumps({"text": "<p>" + GOOD + "</p>"}).encode(),
    json.dumps({"text": "click here | home | login " * 20}).encode(),
    b'{"text":',
    json.dumps(
        {"text": "Корабль вышел в море рано утром, и никто его больше не видел. " * 3}
    ).encode(),
]


@given(st.binary().map(lambda data: data.replace(b"\0", b"\n")), st.integers(1, 20))
def test_the_lines_of_the_blocks_are_the_lines_of_the_stream(data, size):
    limit = 7
    found = [
        line
        for first, block in line_blocks(io.BytesIO(data), size, limit)
        for line in lines(io.BytesIO(block), limit, first)
    ]
    assert found == list(lines(io.BytesIO(data), limit))


def test_a_block_holds_no_more_of_a_long_line_than_shows_that_it_is_long():
    stream = io.BytesIO(b"ab\n" + b"x" * 1000 + b"\ncd")
    assert list(line_blocks(stream, 4, 10)) == [(1, b"ab\n" + b"x" * 12), (3, b"cd")]


@pytest.fixture
def source(tmp_path) -> SourceConfig:
    """Two files; each row 30 times, so that samples are more than are kept."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(ROWS * 30))
    return SourceConfig(name="x", path=str(tmp_path))


def state(counted) -> dict:
    """All that was counted, with the order in which reasons came."""
    return {k: list(v.items()) if isinstance(v, dict) else v for k, v in vars(counted).items()}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_documents_and_rejects_of_blocks_are_those_of_one_reading(source, tmp_path, form):
    if form == "parquet":
        values = [row or None for row in ROWS * 300]  # more than are read at once
        column = pa.array(values, pa.binary()).view(pa.string())  # not all of them are UTF-8
        pq.write_table(pa.table({"text": column}), tmp_path / "c.parquet")
        source = SourceConfig(name="x", path=str(tmp_path / "c.parquet"))
    whole, merged = Rejects(), Rejects()
    expected = list(read_documents(source, whole))
    found = []
    for block in blocks(source, merged, 200):
        rejects = Rejects()
        found += documents_of(block, rejects)
        merged.merge(rejects)
    assert found == expected
    assert state(merged) == state(whole)
    assert len(merged.samples) == 20 * len(merged.counts) >= 40


@pytest.mark.parametrize("block_bytes", [1, 700, 5000])
def test_what_rules_count_by_block_is_what_they_count_at_once(source, block_bytes):
    config = CleanConfig()
    clean, results = block_cleaner(config), []
    for size in (block_bytes, 1 << 30):
        counts, kept = RuleCounts(config.rules), []
        for cleaned in map(clean, blocks(source, Rejects(), size)):
            counts.merge(cleaned.rules)
            kept += cleaned.lines.lines
        results.append((state(counts), kept))
    assert results[0] == results[1]
    assert len(results[0][1]) == counts.kept > 50


def test_what_a_judge_sees_by_block_is_what_it_sees_at_once(source):
    judge, results = block_judge(language_judge, (("zh", "en"), {}, 0.0)), []
    for size in (1, 1 << 30):
        seen, kept = Seen(), []
        for sifted in map(judge, blocks(source, Rejects(), size)):
            seen.merge(sifted.seen)
            kept += sifted.kept.get(".en", Lines()).lines
        results.append((state(seen), kept))
    assert results[0] == results[1]
    assert results[0][1]


@pytest.mark.parametrize("part_bytes", [1, 400, 1 << 30])
def test_what_stays_is_written_in_parts_in_its_order(tmp_path, part_bytes):
    (tmp_path / "a").mkdir()
    held, texts = Held(tmp_path), [f"文 {number} {'x' * (number % 50)}" for number in range(40)]
    for start in range(0, 40, 7):
        block = Lines()
        for number in range(start, min(start + 7, 40)):
            block.add(Document(texts[number], "a", f"f:{number}"))
        held.add("a", pack(block))
    held.close()
    stays = np.arange(40) % 3 > 0
    tasks, counts = held.parts("a", tmp_path, "gz", stays, part_bytes)
    parts = [write_part(task) for task in tasks]
    written = SourceConfig(name="a", path=str(tmp_path / "a"))
    expected = [text for text, stay in zip(texts, stays, strict=True) if stay]
    assert [document.text for document in read_documents(written, Rejects())] == expected
    assert len(parts) == {1: 6, 400: 3, 1 << 30: 1}[part_bytes]
    assert sum(part.documents for part in parts) == counts["documents"] == len(expected)
    assert counts["characters"] == sum(map(len, expected))
    assert counts["bytes"] == sum(len(text.encode()) for text in expected)
    assert json.loads(held.line(23)[1])["text"] == texts[23]
