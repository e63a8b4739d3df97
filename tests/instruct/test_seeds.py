"""The seed tasks of this package, and seed files of a user."""

import json
from collections import Counter

import pytest

from llm_jax.errors import DataError
from llm_jax.instruct.self_instruct import FilterConfig
from llm_jax.instruct.self_instruct.filters import judge_drafts, judge_instruction
from llm_jax.instruct.self_instruct.novelty import Pool
from llm_jax.instruct.self_instruct.parse import Draft
from llm_jax.instruct.self_instruct.tasks import read_seeds, seeds_digest

GOOD = {"id": "a", "instruction": "Write a poem about the sea.", "is_classification": False,
        "instances": [{"input": "", "output": "Waves."}]}  # fmt: skip


@pytest.fixture(scope="module")
def seeds():
    return read_seeds((), ("en", "zh"), 8)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_package_has_sixty_seeds_a_quarter_of_them_classification(seeds, language):
    found = seeds[language]
    assert len(found) >= 60
    assert sum(task.is_classification for task in found) / len(found) == pytest.approx(
        0.25, abs=0.03
    )


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_seed_passes_the_filters_and_no_two_are_alike(seeds, language):
    pool = Pool(language)
    for task in seeds[language]:
        assert judge_instruction(task.instruction, language, FilterConfig()) == ""
        drafts = [Draft(*instance) for instance in task.instances]
        kind = task.is_classification
        _, rejected = judge_drafts(drafts, False, task.instruction, language, FilterConfig(), kind)
        assert rejected == []
        assert pool.nearest(task.instruction).score < 0.5
        pool.add(task.instruction)


def write(path, *rows) -> str:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def test_a_file_of_another_project_is_read_and_languages_are_told(tmp_path):
    chinese = {
        **GOOD,
        "id": "b",
        "name": "x",
        "instruction": "写一首关于大海的诗",
        "is_classification": True,
    }
    french = {**GOOD, "id": "c", "language": "fr"}
    file = write(
        tmp_path / "s.jsonl",
        GOOD,
        b"",
        chinese,
        french,
        {**GOOD, "id": "d", "is_classification": True},
    )
    found = read_seeds([file], ("en",), 2)
    assert [task.id for task in found["en"]] == ["a", "d"]
    with pytest.raises(
        DataError, match="1 tasks in 'zh', 1 of them classification; at least 2 are needed"
    ):
        read_seeds([file], ("zh",), 2)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (b"[1]", "not a JSON object"),
        (b'{"id": ', "not a JSON object"),
        (b"\xff", "not a JSON object"),
        ({**GOOD, "id": " "}, "'id' must be a text"),
        ({**GOOD, "instruction": 3}, "'instruction' must be a text"),
        ({**GOOD, "instances": []}, "'instances' must be a list"),
        ({**GOOD, "instances": ["x"]}, "an instance must be an object"),
        ({**GOOD, "instances": [{"input": "x", "output": ""}]}, "'output' must be a text"),
        ({**GOOD, "instances": [{"input": 1, "output": "x"}]}, "an instance must be an object"),
        ({**GOOD, "is_classification": "no"}, "'is_classification' must be true or false"),
        ({**GOOD, "id": "a"}, "id 'a' was used at"),
    ],
)
def test_a_seed_that_cannot_be_used_is_named_by_its_line(tmp_path, row, told):
    with pytest.raises(DataError, match=told) as error:
        read_seeds([write(tmp_path / "s.jsonl", GOOD, row)], ("en",), 1)
    assert "s.jsonl:2" in str(error.value)


def test_seeds_that_differ_have_another_digest(seeds):
    fewer = {**seeds, "zh": seeds["zh"][1:]}
    assert len(Counter([seeds_digest(seeds), seeds_digest(fewer), seeds_digest(dict(seeds))])) == 2
